"""The shard does not depend on tasks, engine, piece size, kills, full disks or dead workers: the same bytes, or one clear error."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_infimed.data.shards import Shard, shard_file
from megatron_infimed.errors import UserError
from megatron_infimed.preprocess import job as job_module
from megatron_infimed.preprocess import pieces
from megatron_infimed.preprocess.job import Job
from megatron_infimed.preprocess.preprocess import preprocess
from megatron_infimed.preprocess.verify import verify
from tests import jobs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus: Path) -> dict[str, str]:
    """Hashes of the shard made in one piece an input, in one process."""
    make(corpus, corpus / "whole" / "set")
    return jobs.hashes(corpus / "whole" / "set")


def make(corpus: Path, prefix: Path, **more: object) -> dict[str, object]:
    return preprocess(output=prefix, **{**jobs.settings(corpus), **more}).manifest  # type: ignore[arg-type]


def finished_pieces(prefix: Path) -> list[str]:
    return sorted(p.name for p in Path(f"{prefix}.work", "pieces").glob("f*[0-9]"))


def test_the_corpus_has_it_all(corpus: Path, whole: dict[str, str]) -> None:
    m = Shard(corpus / "whole" / "set").manifest
    counts = {reason: entry["count"] for reason, entry in m["rejects"].items()}
    assert counts.keys() == {"missing image file", "corrupt image", "too many text tokens", "identifying text", "broken json"}, counts
    assert m["images"] > 10 * m["distinct_images"] and m["deid"]["counts"]["text name: rejected"] == 1
    text = json.dumps({k: v for k, v in m.items() if k != "rejects"})
    assert str(corpus) not in text and os.uname().nodename not in text and m["inputs"][0]["name"] == "a.jsonl"
    verify(corpus / "whole" / "set")


@pytest.mark.parametrize("rows", [7, 64])
def test_piece_size_leaves_no_trace(corpus: Path, whole: dict[str, str], tmp_path: Path, rows: int) -> None:
    make(corpus, tmp_path / "set", piece_rows=rows)
    assert jobs.hashes(tmp_path / "set") == whole
    assert [p.name for p in tmp_path.iterdir() if "set." not in p.name] == []


@pytest.mark.parametrize(("tasks", "workers", "rows"), [(3, 2, 64), (8, 3, 16)])
def test_local_tasks_leave_no_trace(corpus: Path, whole: dict[str, str], tmp_path: Path, tasks: int, workers: int, rows: int) -> None:
    done = jobs.run(corpus, tmp_path / "set", "--tasks", tasks, "--workers", workers, "--piece-rows", rows)
    assert jobs.hashes(tmp_path / "set") == whole
    assert done.stderr == "" and "documents" in done.stdout  # none of datatrove's chatter


@pytest.mark.slow
def test_ray_leaves_no_trace(corpus: Path, whole: dict[str, str], tmp_path: Path) -> None:
    jobs.run(corpus, tmp_path / "set", "--engine", "ray", "--tasks", 3, "--workers", 2, "--piece-rows", 64)
    assert jobs.hashes(tmp_path / "set") == whole


def _run_in_child(corpus: Path, prefix: Path) -> None:
    make(corpus, prefix, piece_rows=40)


def test_killed_at_ten_moments(corpus: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["megatron_infimed.preprocess.preprocess", "megatron_infimed.intake.dicom", "megatron_infimed.intake.nifti"]
    )
    made: list[tuple[int, int]] = []
    real = pieces.PieceMaker.write
    monkeypatch.setattr(pieces.PieceMaker, "write", lambda self, f, k, rows: (made.append((f, k)), real(self, f, k, rows))[1])
    start = time.monotonic()
    _run_in_child(corpus, tmp_path / "timed")
    took, total = time.monotonic() - start, len(made)
    assert total == 6 + 2 and jobs.hashes(tmp_path / "timed") == whole

    def after(seconds: float) -> Callable[[Path], bool]:
        end = time.monotonic() + seconds
        return lambda prefix: time.monotonic() > end

    rng = random.Random(0)
    in_time = [lambda s=rng.uniform(0.05, 0.9) * took: after(s) for _ in range(6)]
    in_merge = [lambda: lambda p: Path(f"{p}.text.bin.tmp").exists(), lambda: lambda p: Path(f"{p}.image.sha256.tmp").exists(),
                lambda: lambda p: Path(f"{p}.json.tmp").exists(), lambda: lambda p: Path(f"{p}.text.bin").exists()]  # fmt: skip
    cut = 0
    for i, moment in enumerate([*in_time, *in_merge]):
        prefix = tmp_path / str(i) / "set"
        process = context.Process(target=_run_in_child, args=(corpus, prefix))
        process.start()
        come = moment()
        while not come(prefix) and process.is_alive():
            pass
        process.kill()
        process.join()
        cut += process.exitcode == -signal.SIGKILL
        if not shard_file(prefix, "json").exists():
            with pytest.raises(UserError, match=r"never finished|there is no shard"):
                Shard(prefix)
        kept, finished = finished_pieces(prefix), shard_file(prefix, "json").exists()
        made.clear()
        make(corpus, prefix, piece_rows=40)
        assert jobs.hashes(prefix) == whole, f"killed at moment {i}"
        assert finished or len(made) == total - len(kept)
    assert cut >= 8, "the kills came too late to say anything"


def test_the_tool_killed_with_its_workers(corpus: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """The process a user sees is killed; its workers end by themselves and the rerun is not disturbed."""
    prefix = tmp_path / "set"
    tool = subprocess.Popen(jobs.words(corpus, prefix, "--tasks", 4, "--workers", 2, "--piece-rows", 10), stderr=subprocess.DEVNULL)
    pids = [note["pid"] for note in _running(prefix)]
    tool.kill()
    tool.wait()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/stat").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        assert time.monotonic() < end, "a worker outlives its tool"
        time.sleep(0.05)
    assert finished_pieces(prefix) and not shard_file(prefix, "json").exists()
    make(corpus, prefix, piece_rows=10)
    assert jobs.hashes(prefix) == whole


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
def test_the_tool_killed_in_its_first_moments(corpus: Path, tmp_path: Path, delay: float) -> None:
    """The process that is to run the tasks has not even imported what it needs."""
    mark = uuid.uuid4().hex
    words = jobs.words(corpus, tmp_path / "set", "--tasks", 4, "--workers", 2, "--piece-rows", 10)
    tool = subprocess.Popen(words, stderr=subprocess.DEVNULL, env={**os.environ, "THIS_TEST": mark})
    end = time.monotonic() + 60
    while len(_marked(mark)) < 2:
        assert time.monotonic() < end
    time.sleep(delay)
    tool.kill()
    tool.wait()
    end = time.monotonic() + 5
    while _marked(mark):
        assert time.monotonic() < end, "it outlives its tool"
        time.sleep(0.1)
    assert finished_pieces(tmp_path / "set") == []  # ended, not done


def _marked(mark: str) -> list[psutil.Process]:
    """Processes with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("THIS_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_a_dead_worker_is_one_error_soon(corpus: Path, whole: dict[str, str], tmp_path: Path) -> None:
    prefix = tmp_path / "set"
    words = jobs.words(corpus, prefix, "--tasks", 4, "--workers", 2, "--piece-rows", 10)
    tool = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.kill(_running(prefix)[0]["pid"], signal.SIGKILL)
    start = time.monotonic()
    said, error = tool.communicate(timeout=30)
    assert time.monotonic() - start < 5 and tool.returncode == 2 and said == ""
    assert re.fullmatch(
        r"error: .*set: a worker died \(task \d, process \d+\); .*run the same command again, finished pieces are kept\n", error
    )
    make(corpus, prefix, piece_rows=10)
    assert jobs.hashes(prefix) == whole


def _running(prefix: Path) -> list[dict[str, int]]:
    """Notes of the tasks, once one runs and there is a piece."""
    end = time.monotonic() + 60
    while not finished_pieces(prefix) or not (notes := list(Path(f"{prefix}.work", "running").glob("[0-9]"))):
        assert time.monotonic() < end
        time.sleep(0.005)
    return [json.loads(note.read_text()) for note in notes]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"A FULL DISK WAS NOT TESTED: no tmpfs can be mounted here ({done.stderr.strip()}); run as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def assert_no_space(error: str, prefix: Path) -> None:
    numbers = r"No space left on device \([\d.,]+ MiB free in .*free or add space and run the same command again"
    assert re.match(rf"(error: )?{prefix}: {numbers}", error) and error.strip().count("\n") == 0, error
    assert not shard_file(prefix, "json").exists() and not list(prefix.parent.glob("*.tmp"))


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_full_disk_is_one_error(corpus: Path, whole: dict[str, str], tmp_path: Path, tasks: int) -> None:
    with small_disk(tmp_path / "disk", "160k") as disk:
        assert_no_space(jobs.run(corpus, disk / "set", "--piece-rows", 50, "--tasks", tasks, code=2).stderr, disk / "set")
        resize(disk, "20m")
        make(corpus, disk / "set", piece_rows=50)
        assert jobs.hashes(disk / "set") == whole


def test_a_full_disk_in_the_merge(corpus: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", "20m") as disk:
        prepared(corpus, disk / "set", monkeypatch)
        made = {name: (disk / "set.work" / "pieces" / name).stat().st_ino for name in finished_pieces(disk / "set")}
        resize(disk, str(shutil.disk_usage(disk).used + 100_000))
        with pytest.raises(UserError) as error:
            make(corpus, disk / "set", piece_rows=100)
        assert_no_space(str(error.value), disk / "set")
        assert {name: (disk / "set.work" / "pieces" / name).stat().st_ino for name in finished_pieces(disk / "set")} == made
        resize(disk, "20m")
        make(corpus, disk / "set", piece_rows=100)
        assert jobs.hashes(disk / "set") == whole


def test_a_full_disk_in_a_dry_run(corpus: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        assert_no_space(jobs.run(corpus, disk / "set", "--dry-run", 1000, code=2).stderr, disk / "set")
        assert list(disk.iterdir()) == []


def test_a_file_size_limit_is_one_error(corpus: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            make(corpus, tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not shard_file(tmp_path / "set", "json").exists()


@pytest.mark.parametrize("tasks", [1, 2])
def test_an_unreadable_input_is_one_error(corpus: Path, tmp_path: Path, tasks: int) -> None:
    shutil.copytree(corpus, tmp_path / "c", ignore=shutil.ignore_patterns("whole"))
    make(tmp_path / "c", tmp_path / "right" / "set")
    good = (tmp_path / "c" / "b.parquet").read_bytes()
    (tmp_path / "c" / "b.parquet").write_bytes(good[: len(good) // 2])
    done = jobs.run(tmp_path / "c", tmp_path / "set", "--tasks", tasks, "--piece-rows", 100, code=2)
    assert re.fullmatch(r"error: .*b\.parquet: .*\n", done.stderr) and done.stdout == ""
    assert not shard_file(tmp_path / "set", "json").exists() and len(finished_pieces(tmp_path / "set")) >= 1
    (tmp_path / "c" / "b.parquet").write_bytes(good)
    make(tmp_path / "c", tmp_path / "set", piece_rows=100)  # another input: nothing of the first run is used
    assert jobs.hashes(tmp_path / "set") == jobs.hashes(tmp_path / "right" / "set")


def prepared(corpus: Path, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose pieces are made and which is not merged."""
    with monkeypatch.context() as patch:
        patch.setattr("megatron_infimed.preprocess.preprocess.merge", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(corpus, prefix, piece_rows=100)
    return Job.load(f"{prefix}.work")


def test_pieces_of_other_settings_are_removed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepared(corpus, tmp_path / "set", monkeypatch)
    inode = job.piece(0, 0).stat().st_ino
    assert prepared(corpus, tmp_path / "set", monkeypatch).piece(0, 0).stat().st_ino == inode  # the same job again: kept
    make(corpus, tmp_path / "set", piece_rows=100, max_text_tokens=2000)
    make(corpus, tmp_path / "other", max_text_tokens=2000)
    assert jobs.hashes(tmp_path / "set") == jobs.hashes(tmp_path / "other")
    assert Shard(tmp_path / "set").manifest["rejects"].keys().isdisjoint({"too many text tokens"})


def test_a_damaged_or_missing_piece_is_made_again(
    corpus: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_infimed.preprocess.merge import merge

    job = prepared(corpus, tmp_path / "set", monkeypatch)
    os.truncate(job.piece(0, 1) / "piece.text.bin", 10)
    shutil.rmtree(job.piece(1, 0))
    with pytest.raises(UserError, match=r"2 of 4 pieces are missing, the first is f000000-k0000001: .*run the same command again"):
        merge(job)
    make(corpus, tmp_path / "set", piece_rows=100)
    assert jobs.hashes(tmp_path / "set") == whole


def test_tasks_must_agree_on_the_rows(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepared(corpus, tmp_path / "set", monkeypatch)
    job.agree_on_rows(0, 240)
    with pytest.raises(UserError, match=r"a\.jsonl: 239 rows now, 240 rows before: it changed while being read"):
        job.agree_on_rows(0, 239)
    (job.work / "rows" / "f000000").write_text(f"{'0' * 64} 100")  # of another job
    assert job.rows(0) is None
    job.agree_on_rows(0, 240)
    assert job.rows(0) == 240


def test_what_a_killed_removal_left_is_not_used(
    corpus: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of rows and pieces without the job.json that says whose they are."""
    job = prepared(corpus, tmp_path / "set", monkeypatch)
    (job.work / "job.json").unlink()
    for stale in ("100", f"{job.fingerprint} 100"):
        (job.work / "rows" / "f000000").write_text(stale)
    make(corpus, tmp_path / "set", piece_rows=100)
    assert jobs.hashes(tmp_path / "set") == whole


def test_a_kill_in_the_removal_leaves_all_or_nothing(
    corpus: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(corpus, tmp_path / "set", monkeypatch)
    real = shutil.rmtree

    def killed(path: Path, **kw: object) -> None:
        if Path(path).exists():
            real(Path(path) / "pieces")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job_module.shutil, "rmtree", killed)
        make(corpus, tmp_path / "set", piece_rows=50)
    assert [p.name for p in tmp_path.glob("set.*")] == [f"set.work.{os.getpid()}.old"]
    make(corpus, tmp_path / "set", piece_rows=50)
    assert jobs.hashes(tmp_path / "set") == whole  # and the .old is gone


def test_a_piece_that_another_task_made_is_left_alone(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepared(corpus, tmp_path / "set", monkeypatch)
    inode = job.piece(0, 0).stat().st_ino
    with pieces.PieceMaker(job) as maker:
        maker.write(0, 0, maker.rows(0, lambda number: number < 100))
        assert job.piece(0, 0).stat().st_ino == inode
        answers = iter([False, True])  # it comes between our look and our rename
        monkeypatch.setattr(Job, "finished", lambda self, f, k: next(answers))
        monkeypatch.setattr(pieces.shutil, "rmtree", lambda path, **kw: None)
        maker.write(0, 0, maker.rows(0, lambda number: number < 100))
    assert job.piece(0, 0).stat().st_ino == inode and next(answers, None) is None


def test_a_rerun_does_not_hash_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = job_module.hash_file
    monkeypatch.setattr(job_module, "hash_file", lambda path: (hashed.append(path.name), real(path))[1])
    prepared(corpus, tmp_path / "set", monkeypatch)
    assert sorted(hashed) == ["a.jsonl", "b.parquet"]
    prepared(corpus, tmp_path / "set", monkeypatch)
    assert len(hashed) == 2
    os.utime(corpus / "a.jsonl")
    prepared(corpus, tmp_path / "set", monkeypatch)
    assert hashed[2:] == ["a.jsonl"]
