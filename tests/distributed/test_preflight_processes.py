"""`preflight` on real processes, a node each, where one of them is broken: it is named, the others end too, in time."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_infimed import notes
from tests.distributed import runs

LIMIT = "6"
"""Seconds of each step where one must run out; a rank has nothing to import here."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml, tokenizer and shard."""
    return runs.make_data(tmp_path_factory.mktemp("data")).parent


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.distributed.preflight_worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        yield process
        assert process.stdin
        process.stdin.close()


@dataclass(frozen=True)
class Ended:
    codes: list[Any]
    said: str
    """By all, in the order of the ranks."""
    notes: dict[str, str]


Job = Callable[..., Ended]


@pytest.fixture
def job(worker: subprocess.Popen[str], data: Path, tmp_path: Path) -> Job:
    """Runs preflight on nodes n1, n2, ..., a rank each."""

    def run(
        nodes: int,
        faults: dict[int, str] | None = None,
        absent: tuple[int, ...] = (),
        folders: dict[int, Path] | None = None,
        words: tuple[str, ...] = (),
        **env: str,
    ) -> Ended:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        (tmp_path / "notes").mkdir(exist_ok=True)
        shared = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "INFIMED_NOTES": str(tmp_path / "notes"),
            "SLURM_STEP_NUM_TASKS": str(nodes), "SLURM_STEP_NODELIST": f"n[1-{nodes}]", "SLURM_STEP_TASKS_PER_NODE": f"1(x{nodes})",
            "SLURM_LOCALID": "0", "INFIMED_PREFLIGHT_SECONDS": "60", **env,
        }  # fmt: skip
        ranks = [
            {
                "env": {**shared, "SLURM_PROCID": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"},
                "cwd": str((folders or {}).get(rank, data)),
                "fault": (faults or {}).get(rank, ""),
                "words": [str(data / "recipe.yaml"), f"output={tmp_path / 'run'}", "batch.rows=12", *words],
            }
            for rank in range(nodes)
            if rank not in absent
        ]
        assert worker.stdin and worker.stdout
        worker.stdin.write(json.dumps(ranks) + "\n")
        worker.stdin.flush()
        answers = json.loads(worker.stdout.readline())
        written = {p.name: p.read_text() for p in (tmp_path / "notes").iterdir()}
        return Ended([code for code, _ in answers], "".join(text for _, text in answers), written)

    return run


def test_all_is_well(job: Job, tmp_path: Path) -> None:
    ended = job(3)
    assert ended.codes == [0, 0, 0] and ended.notes == {}, ended.said
    (line,) = ended.said.splitlines()
    for part in ("3 nodes, 3 processes", "clocks within", "all-reduce of 4 MiB by gloo", "over all", "needed"):
        assert part in line
    assert list((tmp_path / "run").iterdir()) == [], "preflight leaves nothing behind"


def test_a_rank_that_never_comes_and_one_that_hangs_are_named(job: Job) -> None:
    ended = job(4, absent=(1,), faults={2: "hangs"}, INFIMED_PREFLIGHT_SECONDS=LIMIT)
    assert ended.codes == [notes.BAD_NODE] * 3, ended.said
    assert ended.notes == {"bad_nodes": "n2\nn3\n"}
    never = f"bad node n2: rank 1 not heard of within {LIMIT} s\n"
    assert ended.said == never + f"bad node n3: rank 2 not done with reading a disk that does not answer after {LIMIT} s\n"


def test_a_first_rank_that_never_comes_is_named_by_the_others(job: Job) -> None:
    ended = job(3, absent=(0,), INFIMED_PREFLIGHT_SECONDS="1")
    assert ended.codes == [notes.BAD_NODE] * 2, ended.said
    assert ended.notes == {"bad_nodes": "n1\n"}
    assert ended.said.count("bad node n1: rank 0 does not answer: ") == 2


def test_a_first_rank_that_stops_is_named_one_that_dies_is_not(job: Job, tmp_path: Path) -> None:
    """It is also killed where the job is cancelled: not its node's fault."""
    ended = job(3, faults={0: "stops early"}, INFIMED_PREFLIGHT_SECONDS="2")
    assert ended.codes == ["stopped", notes.BAD_NODE, notes.BAD_NODE] and ended.notes == {"bad_nodes": "n1\n"}, ended.said
    (tmp_path / "notes" / "bad_nodes").unlink()
    ended = job(2, faults={0: "dies"})
    assert ended.codes == [-9, 1] and "bad_nodes" not in ended.notes, ended.said


def test_most_nodes_are_not_left_out_for_one_that_does_not_hear_them(job: Job) -> None:
    ended = job(3, absent=(1, 2), INFIMED_PREFLIGHT_SECONDS=LIMIT)
    assert ended.codes == [1] and "bad_nodes" not in ended.notes, ended.said
    assert "2 of 3 nodes did not get through to rank 0 on n1" in ended.notes["crash"]


def test_ranks_lost_in_an_all_reduce_are_named_not_their_partners(job: Job) -> None:
    ended = job(4, faults={1: "dies", 3: "stops"}, INFIMED_PREFLIGHT_SECONDS=LIMIT)
    assert ended.codes == [notes.BAD_NODE, -9, notes.BAD_NODE, "stopped"], ended.said
    assert ended.notes == {"bad_nodes": "n2\nn4\n"}, ended.said
    for node, rank in (("n2", 1), ("n4", 3)):
        assert f"bad node {node}: rank {rank} does not answer any more" in ended.said


def test_two_that_cannot_connect_are_both_left_out(job: Job) -> None:
    ended = job(4, faults={2: "loses"})
    assert ended.codes == [notes.BAD_NODE] * 4, ended.said
    assert ended.notes == {"bad_nodes": "n3\nn4\n"}
    assert ended.said.count("all-reduce between n3 and n4 did not work") == 2 and "connection refused" in ended.said


def test_a_wrong_clock_among_three(job: Job) -> None:
    ended = job(3, faults={0: "late"})
    assert ended.codes == [notes.BAD_NODE] * 3, ended.said
    assert ended.notes == {"bad_nodes": "n1\n"}
    assert "bad node n1: its clock is 3600.0 s behind" in ended.said


def test_a_damaged_copy_of_the_data_on_one_node(job: Job, data: Path, tmp_path: Path) -> None:
    local = shutil.copytree(data, tmp_path / "disk_of_n2")
    with (local / "shard.image.bin").open("r+b") as file:
        file.truncate(1000)
    ended = job(2, folders={1: local}, words=("data.sources=[{prefix: shard}]", "data.tokenizer=tokenizer"))
    assert ended.codes == [notes.BAD_NODE] * 2, ended.said
    assert ended.notes == {"bad_nodes": "n2\n"}, ended.said
    assert "bad node n2: data, which 1 of 2 nodes can use: shard.image.bin: has 1000 bytes, the manifest says" in ended.said


def test_an_output_that_is_not_mounted_on_one_node(job: Job, tmp_path: Path) -> None:
    for node in ("shared", "n2"):
        (tmp_path / node).mkdir()
    relative = ("output=run",)
    ended = job(3, folders={0: tmp_path / "shared", 1: tmp_path / "n2", 2: tmp_path / "shared"}, words=relative)
    assert ended.codes == [notes.BAD_NODE] * 3 and ended.notes == {"bad_nodes": "n2\n"}, ended.said
    assert "bad node n2: run is another folder there" in ended.said
    two = job(2, folders={0: tmp_path / "shared", 1: tmp_path / "n2"}, words=relative)
    assert two.codes == [2, 2], "with two nodes nobody can tell whose fault it is"
    assert two.said == f"error: {two.notes['why']}" and "run is not one folder for all: what n1 writes there, n2 cannot see" in two.said


def test_what_is_wrong_everywhere_is_the_users_mistake_and_said_once(job: Job, tmp_path: Path) -> None:
    ended = job(2, words=("data.tokenizer=nowhere", f"init_from={tmp_path / 'none'}"))
    assert ended.codes == [2, 2] and "bad_nodes" not in ended.notes, ended.said
    assert ended.said == f"error: {ended.notes['why']}"
    assert "data: nowhere" in ended.said and f"init_from: {tmp_path / 'none'} does not exist" in ended.said


def test_too_slow_for_the_least_that_is_wanted(job: Job) -> None:
    two = job(2, INFIMED_MIN_GBPS="1e6")
    assert two.codes == [notes.BAD_NODE] * 2 and two.notes == {"bad_nodes": "n1\nn2\n"}, two.said
    assert "bad node n1: all-reduce between n1 and n2 reaches" in two.said
    three = job(3, INFIMED_MIN_GBPS="1e6")
    assert three.codes == [2] * 3 and "all-reduce is slow between all 3 nodes" in three.said


def command(recipe: Path, *words: str, processes: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "megatron_infimed", "preflight", str(recipe), *words],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_alone_and_under_torchrun(data: Path, tmp_path: Path, processes: int) -> None:
    done = command(data / "recipe.yaml", f"output={tmp_path}", processes=processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"preflight: 1 node, {processes} process") and done.stdout.count("\n") == 1
    assert ("all-reduce" in done.stdout) == (processes > 1)


def test_other_code_on_one_node(data: Path, tmp_path: Path) -> None:
    """Three real processes, one of which imports another copy of the package."""
    root = Path(__file__).parents[2]
    other = shutil.copytree(
        root / "megatron_infimed", tmp_path / "other" / "megatron_infimed", ignore=shutil.ignore_patterns("__pycache__")
    )
    same = shutil.copytree(other, tmp_path / "same" / "megatron_infimed")
    with (other / "train" / "step.py").open("a") as file:
        file.write("# a line more\n")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_infimed", "preflight", data / "recipe.yaml", f"output={tmp_path / 'run'}", "batch.rows=12"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "RANK": str(rank),
                 "SLURMD_NODENAME": f"n{rank + 1}", "INFIMED_NOTES": str(tmp_path), "PYTHONPATH": str((other if rank == 1 else same).parent)},
        )
        for rank in range(3)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [notes.BAD_NODE] * 3, said
    assert (tmp_path / "bad_nodes").read_text() == "n2\n"
    assert "bad node n2: code " in said[0] and "on 2 other nodes" in said[0] and said[1:] == ["", ""]
