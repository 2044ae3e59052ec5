"""`preflight` by srun on two SLURM nodes, one of which really is wrong: its clock, its copy of the data, its copy of the code."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_infimed import notes
from tests.distributed import runs
from tests.slurm.conftest import Slurm

ROOT = Path(__file__).parents[2]
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))

Job = Callable[..., tuple[int, str, dict[str, str]]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("data")).parent


@pytest.fixture
def preflight(slurm: Slurm, data: Path, tmp_path: Path) -> Job:
    """Runs it on n1 and n2, in the folder $SLURMD_NODENAME of the test's; (srun's exit code, what was printed, notes)."""

    def run(*words: str) -> tuple[int, str, dict[str, str]]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for name in ("notes", "n1", "n2"):
            (tmp_path / name).mkdir(exist_ok=True)
        line = " ".join(
            [sys.executable, "-m", "megatron_infimed", "preflight", str(data / "recipe.yaml"), f"output={tmp_path}/run", *words]
        )
        job = slurm.sbatch(
            f"cd {tmp_path}\n"
            f"export MASTER_PORT={port} INFIMED_NOTES={tmp_path}/notes PYTHONPATH={ROOT} OMP_NUM_THREADS=1 INFIMED_PREFLIGHT_SECONDS=60\n"
            f"srun --kill-on-bad-exit=1 --wait=60 bash -c 'cd $SLURMD_NODENAME && exec {line}'; echo code $?",
            "--nodes=2", "--ntasks-per-node=1", f"--chdir={tmp_path}",
        )  # fmt: skip
        assert slurm.wait(job) == "COMPLETED", slurm.output(job)
        said, _, code = slurm.output(job).rpartition("code ")
        return int(code), said, {p.name: p.read_text() for p in (tmp_path / "notes").iterdir()}

    return run


def test_two_sound_nodes(preflight: Job) -> None:
    code, said, written = preflight()
    assert code == 0 and written == {}, said
    assert said.startswith("preflight: 2 nodes, 2 processes") and "(n1 and n2)" in said


def test_a_clock_that_is_an_hour_ahead(slurm: Slurm, preflight: Job) -> None:
    """Files keep the kernel's time, as they would a file server's: two clocks alone could not tell which is wrong."""
    assert FAKETIME, "no libfaketime here: apt-get install -y --no-install-recommends faketime"
    fake = {"LD_PRELOAD": FAKETIME[0], "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": 1, "NO_FAKE_STAT": 1}
    with slurm.node_env("n2", **fake):
        code, said, written = preflight()
    assert code == notes.BAD_NODE and written == {"bad_nodes": "n2\n"}, said
    assert "bad node n2: its clock is 3600.0 s ahead" in said and "n1" not in written["bad_nodes"]


def test_a_node_whose_copy_of_the_data_is_not_whole(preflight: Job, data: Path, tmp_path: Path) -> None:
    for node in ("n1", "n2"):
        shutil.copytree(data, tmp_path / node)
    (tmp_path / "n2" / "shard.text.bin").unlink()
    code, said, written = preflight("data.sources=[{prefix:\\ shard}]", "data.tokenizer=tokenizer")
    assert code == notes.BAD_NODE and written == {"bad_nodes": "n2\n"}, said
    assert "bad node n2: data, which 1 of 2 nodes can use: shard.text.bin: is missing" in said


def test_two_nodes_with_different_code_are_both_named_for_nobody_knows_which_is_right(slurm: Slurm, preflight: Job, tmp_path: Path) -> None:
    other = shutil.copytree(
        ROOT / "megatron_infimed", tmp_path / "other" / "megatron_infimed", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (other / "train" / "step.py").open("a") as file:
        file.write("# a line more\n")
    with slurm.node_env("n2", PYTHONPATH=other.parent):
        code, said, written = preflight()
    assert code == 2 and written.keys() == {"why"} and written["why"] in said, said
    assert "the nodes have different versions of code" in said and " on n1; " in said and " on n2" in said
