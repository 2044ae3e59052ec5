"""`doctor`: as a user calls it, here and among broken packages; and what it says of machines that we do not have."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from megatron_infimed import doctor
from megatron_infimed.optional import REMEDY

H100 = doctor.Facts(
    python="3.12.3",
    system="Linux x86_64",
    cores=96,
    memory=1900,
    shared_memory=900,
    disk=3000,
    packages={
        "torch": "2.11.0+cu130", "megatron-core": "0.16.1", "psutil": "7.0", "packaging": "26", "transformer-engine": "2.11.0",
        "flash-attn": "2.8.3", "apex": "0.1", "nvidia-dali-cuda130": "2.4.0", "pydicom": "3.0.2", "imagecodecs": "2026.1", "pyjpegls": "1.5",
        "pylibjpeg-openjpeg": "2.6", "nibabel": "5.4", "datatrove": "0.10.1", "ray": "2.60.0",
    },
    requires=["torch>=2.10", "megatron-core<0.17,>=0.16.1", "psutil", "transformer-engine[pytorch]<2.12,>=2.9; extra == \"h100\"",
              "flash-attn>=2.7; extra == \"h100\"", "pytest>=8; extra == \"dev\""],
    requires_python="<3.13,>=3.11",
    torch={"version": "2.11.0+cu130", "cuda": "13.0", "cudnn": 91900, "nccl": "2.28.9", "usable": True,
           "gpus": ["NVIDIA H100 80GB HBM3, 79 GiB, sm_90"] * 8},
    driver="580.95.05",
    gpu_in_machine=True,
)  # fmt: skip


def without(facts: doctor.Facts, *names: str, **versions: str) -> doctor.Facts:
    """The same machine lacking packages, or with others."""
    changed = {name.replace("_", "-"): version for name, version in versions.items()}
    return replace(facts, packages={n: v for n, v in {**facts.packages, **changed}.items() if n not in names})


def call(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_infimed", "doctor", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=250, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    )


def test_here_nothing_is_wrong_and_nothing_of_the_machine_is_told():
    done = call("--json")
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["problems"] == [] and told["packages"]["torch"] == metadata.version("torch") == told["torch"]["version"]
    assert {f["part"] for f in told["fallbacks"]} >= {"device", "layers", "attention", "decoder", "optimizer"}
    for private in (socket.gethostname(), str(Path.home()), os.getcwd(), sys.prefix, f"/{getpass.getuser()}/"):
        assert private not in done.stdout


def test_broken_packages_do_not_break_it(tmp_path):
    for name, version, code in (
        ("apex", "0.9.10", ""),
        ("flash_attn", "2.8.3", "import os; os.kill(os.getpid(), 11)"),
        ("torchvision", "0.24.1", ""),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        needs = "Requires-Dist: torch==2.9.1\n" if name == "torchvision" else ""
        (tmp_path / f"{name}-{version}.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    done = call(PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr == "", done.stderr
    wrong = done.stdout.split("4 problems\n")[1].splitlines()
    assert [line.split()[0] for line in wrong] == ["megatron-core", "flash_attn", "apex", "torchvision"]  # the first imports the second
    assert "does not load (killed by signal 11)" in wrong[1]
    assert wrong[2].endswith("pip uninstall apex")
    assert f"torch==2.9.1, not for torch {metadata.version('torch')}" in wrong[3]
    assert str(tmp_path) not in done.stdout


def test_an_import_that_hangs_or_fails():
    assert doctor._run("import time; time.sleep(60)", 0.5) == ("", "not done after 0.5 s")
    code = "raise ImportError('/home/jane/venv/lib/te.so: undefined symbol: _ZN2at4_ops')"
    assert doctor._run(code, 60) == ("", "ImportError: te.so: undefined symbol: _ZN2at4_ops")


def test_a_machine_with_everything():
    assert doctor.fallbacks(H100) == [] and doctor.problems(H100) == []
    text = doctor.text(H100)
    assert "8 x NVIDIA H100 80GB HBM3, 79 GiB, sm_90" in text and "CUDA 13.0, cuDNN 91900, NCCL 2.28.9" in text
    assert "Nothing is missing." in text and "No problems" in text
    container = without(H100, torch="2.11.0a0+b558c98", transformer_engine="2.9.0+70f5366")
    assert doctor.problems(container) == []


def test_what_takes_the_place_of_what_is_missing():
    def of(facts: doctor.Facts) -> dict[str, str]:
        return {f.part: f.takes for f in doctor.fallbacks(facts)}

    no_te = without(H100, "transformer-engine")
    assert of(no_te) == {"layers": "Megatron-Core's own, no FP8", "attention": "flash-attn, packed (in float32 SDPA, one call a document)"}
    assert "torch varlen_attn, packed" in of(without(no_te, "flash-attn"))["attention"]
    assert "torch varlen_attn, packed" in of(replace(no_te, broken={"flash_attn": "undefined symbol"}))["attention"]
    assert set(of(without(no_te, "apex"))) == {"layers", "attention", "optimizer"} == set(of(replace(no_te, wrong_apex=True)))
    assert of(without(H100, "nvidia-dali-cuda130")) == {"decoder": "simplejpeg and torch, on the CPU"}
    assert of(without(H100, "pydicom", "ray")) == {"pydicom": "DICOM scans are refused", "ray": "no --engine ray"}
    on_cpu = replace(H100, torch={"version": "2.11.0", "cuda": None, "usable": False, "gpus": []}, driver="", gpu_in_machine=False)
    assert of(on_cpu)["attention"] == "SDPA, one call a document" and set(of(on_cpu)) == {
        "device",
        "layers",
        "attention",
        "decoder",
        "optimizer",
    }
    for found in doctor.fallbacks(without(H100, *H100.packages)):
        assert found.remedy in REMEDY.values() or found.part == "optimizer"
    assert set(doctor.LOST) | {"transformer_engine", "flash_attn", "apex", "nvidia.dali"} == set(REMEDY), (
        "each optional package is spoken of"
    )


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (without(H100, "psutil"), "psutil is missing (without it saving a checkpoint hangs): pip install 'psutil'"),
        (without(H100, torch="2.9.1+cu130"), "torch 2.9.1+cu130 is not what setup.py asks for, torch>=2.10 "),
        (without(H100, megatron_core="0.15.0"), "megatron-core 0.15.0 is not what setup.py asks for, megatron-core<0.17,>=0.16.1 "),
        (without(H100, transformer_engine="2.13.0"), "transformer-engine 2.13.0 is not what setup.py asks for, transformer-engine[pytorch]<2.12,"),
        (replace(H100, python="3.13.1"), "Python 3.13.1 is not <3.13,>=3.11"),
        (replace(H100, requires=None), "megatron-infimed is not installed, so nothing says which packages it needs"),
        (replace(H100, shared_memory=0.0625), "64 MiB free in /dev/shm for 8 GPUs"),
        (
            replace(H100, torch={"cuda": "13.0", "usable": False, "gpus": [], "error": "The NVIDIA driver is too old"}, driver="535.2"),
            "there is a GPU, but torch cannot use it (The NVIDIA driver is too old): driver 535.2, torch is built for CUDA 13.0",
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)  # fmt: skip
def test_one_line_for_each_problem(facts, line):
    (said,) = doctor.problems(facts)
    assert said.startswith(line) and doctor.text(facts).endswith(f"1 problem\n  {said}")


def test_gpus_hidden_on_purpose_or_a_login_node_are_no_problem():
    hidden = replace(H100, torch={"cuda": "13.0", "usable": False, "gpus": [], "error": "No CUDA GPUs are available"}, hidden=True)
    assert doctor.problems(hidden) == [] and doctor.fallbacks(hidden)[0].because == "CUDA_VISIBLE_DEVICES hides the GPUs"
    login = replace(hidden, hidden=False, driver="", gpu_in_machine=False)
    assert doctor.problems(login) == [] and doctor.fallbacks(login)[0].because == "no driver"


def test_its_figures_are_those_of_the_benchmarks():
    page = Path("docs/benchmarks.md").read_text()

    def rows(title: str) -> list[list[float]]:
        section = page.split(f"## {title}")[1].split("\n## ")[0]
        lines = [line for line in section.splitlines() if line.startswith("|") and re.search(r"\|\s*[\d.]+", line)]
        return [[float(cell.strip(" x")) for cell in line.split("|")[2:5]] for line in lines]

    attention = [mask for *_, mask in rows("Attention in a packed row")]
    decoding = [dali / ours for ours, _, dali in rows("Decoding")]
    costs = " ".join(f.costs for f in doctor.fallbacks(replace(H100, torch={})))
    assert f"a masked row takes {min(attention):.0f} to {max(attention):.0f} times as long" in costs
    assert f"DALI takes {min(decoding):.1f} to {max(decoding):.1f} times as long" in costs
