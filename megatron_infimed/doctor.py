"""`doctor`: what is installed, what takes the place of what is missing, and what is wrong. It is what an issue should begin with.

It must answer on the machine where nothing else does, so it imports only the standard library (`python -m megatron_infimed.doctor` works
without any package). Versions come from the packages' metadata. Whether a heavy package really loads is tried in a process of its own with a
time limit: a broken binary may crash or hang. Of a machine's paths and names nothing is printed.
Facts are gathered first; what they mean (`problems`, `fallbacks`) are functions of them alone.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_infimed import __version__
from megatron_infimed.optional import REMEDY, available

SELF = "megatron-infimed"
SECONDS = 180
"""For one package to load; the first import from a network file system takes minutes."""
EXTRAS = ("", "h100", "dali", "formats", "scale", "ray")
"""Of setup.py, whose version ranges count: "" is what is always needed."""
DISTRIBUTIONS = {"nvidia.dali": "nvidia-dali-cuda130", "jpeg_ls": "pyjpegls", "openjpeg": "pylibjpeg-openjpeg"}
"""What pip calls an importable package, where that is another name."""
OTHER_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda110")
"""Older builds that containers bring: one name in the facts serves for all."""
TRIED = {"torch": "torch", "megatron-core": "megatron.core", "transformer_engine": "transformer_engine.pytorch", "flash_attn": "flash_attn",
         "nvidia.dali": "nvidia.dali"}  # fmt: skip
"""What is imported to see whether it loads, where it is installed."""
WHY = {
    "psutil": "without it saving a checkpoint hangs",
    "megatron-core": "other versions name their classes and checkpoint entries differently",
    "torch": "packed attention on GPUs came with 2.10",
}
LOST = {
    "pydicom": "DICOM scans are refused",
    "imagecodecs": "DICOM scans in JPEG 2000, JPEG-LS or lossless JPEG are refused",
    "jpeg_ls": "DICOM scans in JPEG-LS are refused",
    "openjpeg": "DICOM scans in JPEG 2000 are refused",
    "nibabel": "NIfTI volumes are refused",
    "datatrove": "shards are made by one process (no --tasks, SLURM or Ray)",
    "ray": "no --engine ray",
}

_SAY_TORCH = """
import json, torch
out = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "usable": False}
try:
    if torch.version.cuda:
        out["cudnn"] = torch.backends.cudnn.version()
        out["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    torch.zeros(1, device="cuda")
    out["usable"] = True
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        out["gpus"].append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
except Exception as e:
    out["error"] = str(e).strip().splitlines()[0]
print(json.dumps(out))
"""


@dataclass(frozen=True)
class Facts:
    """What the machine and the installation are; sizes in GiB."""

    python: str
    system: str
    cores: float
    """That this process may use."""
    memory: float
    shared_memory: float
    """Free in /dev/shm, through which NCCL and processes exchange data."""
    disk: float
    """Free in the current folder."""
    packages: dict[str, str]
    """Versions by pip's name, of what setup.py asks for and of the optional packages; only those installed."""
    requires: list[str] | None
    """setup.py's requirements, as pip has recorded them; None where the project itself is not installed."""
    requires_python: str = ""
    torch: dict[str, Any] = field(default_factory=dict)
    """What torch says: version, cuda (of its build), cudnn, nccl, usable, gpus, error."""
    driver: str = ""
    """Of NVIDIA; "" where there is none."""
    gpu_in_machine: bool = False
    """Whether an NVIDIA GPU is on the PCI bus, driver or not."""
    hidden: bool = False
    """CUDA_VISIBLE_DEVICES leaves none."""
    broken: dict[str, str] = field(default_factory=dict)
    """Packages that are installed but do not load: why."""
    wrong_apex: bool = False
    torchvision_wants: str = ""
    """The torch that the installed torchvision was built for."""
    megatron_helpers: bool = True
    """Megatron-Core's compiled dataset helpers are there."""

    def has(self, package: str) -> bool:
        """Whether an optional package (a key of optional.REMEDY) is there and loads."""
        return _distribution(package) in self.packages and package not in self.broken and not (package == "apex" and self.wrong_apex)

    @property
    def on_gpu(self) -> bool:
        return bool(self.torch.get("usable"))


@dataclass(frozen=True)
class Fallback:
    """Something that another thing takes the place of."""

    part: str
    takes: str
    because: str
    costs: str
    remedy: str


def gather(seconds: float = SECONDS) -> Facts:
    """Looks around. `seconds`: for each package to load (they are tried side by side)."""
    requires = _requires()
    named = {_name(r) for r in requires or () if _extra(r) in EXTRAS}
    packages = {name: version for name in sorted({*named, *map(_distribution, REMEDY), "torchvision"}) if (version := _version(name))}
    if dali := next(filter(None, map(_version, OTHER_DALI)), ""):
        packages.setdefault(DISTRIBUTIONS["nvidia.dali"], dali)
    tried = [name for name in TRIED if name == "torch" or _distribution(name) in packages]
    with ThreadPoolExecutor(len(tried)) as pool:
        answers = pool.map(lambda name: _run(_SAY_TORCH if name == "torch" else f"import {TRIED[name]}", seconds), tried)
    results = dict(zip(tried, answers, strict=True))
    broken = {name: why for name, (_, why) in results.items() if why and _distribution(name) in packages}
    said = json.loads(results["torch"][0].splitlines()[-1]) if not results["torch"][1] else {}
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=_cores(),
        memory=_memory(),
        shared_memory=_free("/dev/shm"),
        disk=_free("."),
        packages=packages,
        requires=requires,
        requires_python=metadata.metadata(SELF)["Requires-Python"] if requires is not None else "",
        torch={name: _without_paths(value) if name == "error" else value for name, value in said.items()},
        driver=_driver(),
        gpu_in_machine=_gpu_in_machine(),
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"),
        broken=broken,
        wrong_apex=available("apex") and not _has_part("apex", "optimizers"),
        torchvision_wants=next((r for r in _listed("torchvision") if _name(r) == "torch"), ""),
        megatron_helpers=not available("megatron") or _has_part("megatron", "core/datasets/helpers_cpp*.so"),
    )


def problems(facts: Facts) -> list[str]:
    """What stops the project, or would let it crash or hang: one line each, with the remedy."""
    out, torch = [], facts.torch
    if facts.requires is None:
        out.append(f"{SELF} is not installed, so nothing says which packages it needs: pip install -e . in its folder")
    out += _out_of_range(facts)
    out += [f"{name} is installed but does not load ({why}): install it again, or uninstall it" for name, why in facts.broken.items()]
    if facts.wrong_apex:
        out.append("apex is not NVIDIA's but PyPI's package of that name, which Megatron-Core stumbles over: pip uninstall apex")
    if facts.torchvision_wants and not _fits(facts.torchvision_wants, facts.packages.get("torch", "")):
        out.append(
            f"torchvision {facts.packages['torchvision']} was built for {facts.torchvision_wants}, not for torch "
            f"{facts.packages.get('torch', '(missing)')}, and transformers imports it: pip uninstall torchvision, or install the matching one"
        )
    if torch.get("cuda") and not facts.on_gpu and not facts.hidden and (facts.driver or facts.gpu_in_machine):
        have = f"driver {facts.driver}" if facts.driver else "no driver (in a container: no --gpus all)"
        out.append(
            f"there is a GPU, but torch cannot use it ({torch.get('error', 'no reason given')}): {have}, torch is built for CUDA "
            f"{torch['cuda']}; install a driver that knows this CUDA, or the torch of an older one"
        )
    if len(torch.get("gpus", ())) > 1 and facts.shared_memory < 1:
        out.append(
            f"{facts.shared_memory * 1024:.0f} MiB free in /dev/shm for {len(torch['gpus'])} GPUs, through which NCCL exchanges data: "
            "start the container with --ipc=host or --shm-size=16g"
        )
    return out


def fallbacks(facts: Facts) -> list[Fallback]:
    """What runs in place of what is missing. Figures are those of docs/benchmarks.md; nothing has been measured on a GPU."""
    out, unmeasured = [], "not measured"
    no_te = _why_not(facts, "transformer_engine")
    if not facts.on_gpu:
        out.append(
            Fallback("device", "CPU and gloo", _why_no_gpu(facts), unmeasured, "a GPU with its driver and torch's build for its CUDA")
        )
    if no_te:
        out.append(Fallback("layers", "Megatron-Core's own, no FP8", no_te, unmeasured, REMEDY["transformer_engine"]))
        attention, cost = "SDPA, one call a document", "nothing: on CPUs a masked row takes 6 to 35 times as long"
        if facts.on_gpu:
            kernel = "flash-attn" if facts.has("flash_attn") else "torch varlen_attn"
            attention, cost = f"{kernel}, packed (in float32 {attention})", unmeasured
        out.append(Fallback("attention", attention, no_te, cost, REMEDY["transformer_engine"]))
    if not facts.on_gpu or not facts.has("nvidia.dali"):
        cost = "on CPUs nothing: DALI takes 2.4 to 6.3 times as long there; against DALI on a GPU not measured"
        out.append(Fallback("decoder", "simplejpeg and torch, on the CPU", _why_not(facts, "nvidia.dali"), cost, REMEDY["nvidia.dali"]))
    if not facts.on_gpu or not (facts.has("transformer_engine") or facts.has("apex")):
        because = "no GPU" if not facts.on_gpu else f"{no_te}; {_why_not(facts, 'apex')}"
        remedy = f"{REMEDY['transformer_engine']}; or {REMEDY['apex']}"
        out.append(Fallback("optimizer", "AdamW of torch (train/optimizer.py)", because, unmeasured, remedy))
    if not facts.megatron_helpers:
        out.append(Fallback("index", "our own planning", "Megatron-Core's compiled helpers are missing", "nothing: they are not used", ""))
    for package, lost in LOST.items():
        if not facts.has(package):
            out.append(Fallback(package, lost, f"{package} is missing", "", REMEDY[package]))
    return out


def text(facts: Facts) -> str:
    """For people, and for an issue."""
    torch, needed = facts.torch, {_name(r) for r in facts.requires or () if not _extra(r)}
    versions = {True: [], False: []}
    for name, version in facts.packages.items():
        versions[name in needed].append(f"{name} {version}")
    missing = [_distribution(p) for p in REMEDY if _distribution(p) not in facts.packages]
    build = f"CUDA {torch['cuda']}, cuDNN {torch.get('cudnn')}, NCCL {torch.get('nccl')}" if torch.get("cuda") else "without CUDA"
    head = {
        "megatron_infimed": f"{__version__}, Python {facts.python}, {facts.system}",
        "machine": f"{facts.cores:g} cores, {facts.memory:.1f} GiB memory; free: {facts.shared_memory:.1f} GiB in /dev/shm, "
        f"{facts.disk:.1f} GiB on disk here",
        "GPU": "; ".join(f"{n} x {gpu}" for gpu, n in Counter(torch.get("gpus", ())).items()) or f"none: {_why_no_gpu(facts)}",
        "driver": facts.driver or ("?" if facts.on_gpu else "none"),
        "torch built": build if torch else "?",
        "needed": ", ".join(versions[True]) or "?",
        "optional": ", ".join(versions[False]) or "none",
        "not there": ", ".join(missing) or "nothing",
    }
    lines = [_wrapped(f"{name:<17}", value) for name, value in head.items()]
    found = fallbacks(facts)
    lines += ["", "What takes the place of what is missing" if found else "Nothing is missing."]
    for one in found:
        lines.append(_wrapped(f"  {one.part:<11}", f"{one.takes}, because {one.because}" if one.costs else one.takes))
        if one.costs:
            lines.append(_wrapped("    costs:   ", one.costs))
        if one.remedy:
            lines.append(_wrapped("    remedy:  ", one.remedy))
    wrong = problems(facts)
    lines += ["", f"{len(wrong)} problem{'s' if len(wrong) > 1 else ''}" if wrong else "No problems: everything needed to run is there."]
    return "\n".join([*lines, *(f"  {line}" for line in wrong)])


def as_json(facts: Facts) -> str:
    """Facts, fallbacks and problems, for machines."""
    found = {"version": __version__, **asdict(facts), "fallbacks": [asdict(f) for f in fallbacks(facts)], "problems": problems(facts)}
    del found["requires"]  # setup.py has it
    return json.dumps(found, indent=1)


def main(in_json: bool = False) -> int:
    """Prints; the exit code: 0, or 2 where there are problems."""
    facts = gather()
    print(as_json(facts) if in_json else text(facts))
    return 2 if problems(facts) else 0


def _out_of_range(facts: Facts) -> list[str]:
    out = []
    if facts.requires_python and not _fits(f"python{facts.requires_python}", facts.python):
        out.append(f"Python {facts.python} is not {facts.requires_python}: make the environment with another one")
    for requirement in dict.fromkeys(r.split(";")[0].strip() for r in facts.requires or () if _extra(r) in EXTRAS):
        name, optional = _name(requirement), requirement not in (facts.requires or ())
        have, why = facts.packages.get(name, ""), f" ({WHY[name]})" if name in WHY else ""
        if not have and not optional:
            out.append(f"{name} is missing{why}: pip install '{requirement}'")
        elif have and not _fits(requirement, have):
            out.append(f"{name} {have} is not what setup.py asks for, {requirement}{why}: pip install '{requirement}'")
    return out


def _fits(requirement: str, version: str) -> bool:
    """Containers call their torch 2.10.0a0+b5: that counts as 2.10.0. Without `packaging` all fits: its absence is a problem by itself."""
    try:
        from packaging.requirements import Requirement
        from packaging.version import InvalidVersion, Version
    except ImportError:
        return True
    try:
        return Requirement(requirement).specifier.contains(Version(version).base_version)
    except InvalidVersion:
        return False


def _why_no_gpu(facts: Facts) -> str:
    if not facts.torch:
        return "torch is missing or does not load"
    if not facts.torch.get("cuda"):
        return "torch is built without CUDA"
    if facts.hidden:
        return "CUDA_VISIBLE_DEVICES hides the GPUs"
    return "no driver" if not facts.driver else str(facts.torch.get("error", "no reason given"))


def _why_not(facts: Facts, package: str) -> str:
    name = _distribution(package)
    if name not in facts.packages or package in facts.broken:
        return f"{name} {'does not load' if package in facts.broken else 'is missing'}" + ("" if facts.on_gpu else ", and no GPU")
    return "" if facts.on_gpu else "no GPU"


def _distribution(package: str) -> str:
    return DISTRIBUTIONS.get(package, package.replace("_", "-"))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except Exception:  # damaged metadata raises what it likes; to us it is not installed
        return ""


def _listed(distribution: str) -> list[str]:
    try:
        return metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []


def _requires() -> list[str] | None:
    return _listed(SELF) or None


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _extra(requirement: str) -> str:
    found = re.search(r"extra\s*==\s*['\"]([\w-]+)", requirement)
    return found[1] if found else ""


def _has_part(package: str, pattern: str) -> bool:
    """Whether the folders of an importable package hold such a file; it is not imported."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return any(next(Path(folder).glob(pattern), None) for folder in folders or ())


def _run(code: str, seconds: float) -> tuple[str, str]:
    """(what it printed, why it failed or "")."""
    try:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "", f"not done after {seconds:g} s"
    if done.returncode < 0:
        return done.stdout, f"killed by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return done.stdout, _without_paths(lines[-1]) if done.returncode else ""


def _without_paths(line: str) -> str:
    return re.sub(r"(?:/[^/\s:'\",()]+)+/([^/\s:'\",()]+)", r"\1", line)[:200]


def _cores() -> float:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(allowed, round(int(quota) / int(period), 1)) if quota.isdigit() and period.isdigit() else allowed


def _memory() -> float:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max")
    return (min(whole, int(limit)) if limit.isdigit() else whole) / 2**30


def _free(folder: str) -> float:
    try:
        return shutil.disk_usage(folder).free / 2**30
    except OSError:
        return 0.0


def _driver() -> str:
    found = re.search(r"Kernel Module\D*([\d.]+)", _read("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def _gpu_in_machine() -> bool:
    devices = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(_read(d) == "0x10de" and _read(d.with_name("class")).startswith("0x03") for d in devices)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _wrapped(label: str, value: str) -> str:
    return textwrap.fill(value, 118, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main("--json" in sys.argv[1:]))
