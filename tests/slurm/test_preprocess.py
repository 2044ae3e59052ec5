"""Preprocessing as a real SLURM array: the same bytes as on one machine, and what happens when a task is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests import jobs
from tests.slurm.conftest import Slurm

SLURM = ("--engine", "slurm", "--slurm-partition", "main", "--slurm-time", "5", "--slurm-arg", "mem-per-cpu=500M")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def local(corpus: Path) -> dict[str, str]:
    jobs.run(corpus, corpus / "local" / "set")
    return jobs.hashes(corpus / "local" / "set")


@pytest.mark.parametrize("tasks", [3, 8])
def test_an_array_makes_the_same_bytes(slurm: Slurm, corpus: Path, local: dict[str, str], tmp_path: Path, tasks: int) -> None:
    done = jobs.run(corpus, tmp_path / "set", *SLURM, "--wait", "--tasks", tasks, "--piece-rows", 32, env=slurm.env)
    assert "documents" in done.stdout and jobs.hashes(tmp_path / "set") == local


def test_a_killed_task_stops_the_merge_and_a_rerun_completes(slurm: Slurm, corpus: Path, local: dict[str, str], tmp_path: Path) -> None:
    said = jobs.run(corpus, tmp_path / "set", *SLURM, "--tasks", 2, "--workers", 1, "--piece-rows", 16, env=slurm.env).stdout
    array, merge = re.findall(r"(?:array|job) (\d+)", " ".join(said.split()))[:2]
    running = tmp_path / "set.work" / "running"
    end = time.monotonic() + 60
    while not list(running.glob("[0-9]")) or not list((tmp_path / "set.work" / "pieces").glob("f*[0-9]")):
        assert time.monotonic() < end, slurm.run("squeue")
        time.sleep(0.01)
    pids = [json.loads(note.read_text())["pid"] for note in running.glob("[0-9]")]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    busy = jobs.run(corpus, tmp_path / "set", *SLURM, env=slurm.env, code=2).stderr
    assert re.search(rf"SLURM jobs {array}, {merge} are at it; .*scancel", busy), busy
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert "FAILED" in slurm.wait(array)
    assert slurm.wait(merge) == "CANCELLED"
    assert not (tmp_path / "set.json").exists()
    made = {p.name: p.stat().st_ino for p in (tmp_path / "set.work" / "pieces").glob("f*[0-9]")}
    assert made
    jobs.run(corpus, tmp_path / "set", *SLURM, "--wait", "--tasks", 2, "--piece-rows", 16, env=slurm.env)
    assert jobs.hashes(tmp_path / "set") == local


def test_a_queued_forced_run_keeps_its_folder(slurm: Slurm, corpus: Path, local: dict[str, str], tmp_path: Path) -> None:
    jobs.run(corpus, tmp_path / "set")
    said = jobs.run(corpus, tmp_path / "set", *SLURM, "--force", "--tasks", 2, "--slurm-arg", "begin=now+20", env=slurm.env).stdout
    _, merge = re.findall(r"(?:array|job) (\d+)", " ".join(said.split()))[:2]
    before = (tmp_path / "set.work" / "job.json").stat().st_ino
    for more in ((), ("--force",), (*SLURM, "--force")):
        assert "are at it" in jobs.run(corpus, tmp_path / "set", *more, env=slurm.env, code=2).stderr
        assert (tmp_path / "set.work" / "job.json").stat().st_ino == before
    assert slurm.wait(merge) == "COMPLETED"
    assert jobs.hashes(tmp_path / "set") == local


def test_mistakes_are_one_line(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    assert "needs --slurm-partition" in jobs.run(corpus, tmp_path / "set", "--engine", "slurm", code=2).stderr
    done = jobs.run(corpus, tmp_path / "set", "--engine", "slurm", "--slurm-partition", "nowhere", code=2, env=slurm.env)
    assert "sbatch did not take the job" in done.stderr and "invalid partition" in done.stderr and "Traceback" not in done.stderr
