"""Checkpoints of one process: a true snapshot in the background, a full disk, what is kept, what is fallen back to."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import resource
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_infimed.config import CheckpointConfig, ParallelConfig, Recipe
from megatron_infimed.errors import UserError
from megatron_infimed.model.infimed import build_pieces
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.parallel import cpu, groups
from megatron_infimed.parallel.groups import Ranks
from megatron_infimed.train import checkpoint, saver
from megatron_infimed.train.checkpoint import Checkpoint
from megatron_infimed.train.optimizer import wrap_and_optimize
from megatron_infimed.train.saver import Saver
from tests.distributed.runs import RECIPE


class Training:
    """A tiny model with its optimizer, one step done; a step is an update with random gradients. A checkpoint takes 1.9 MB."""

    def __init__(self, ranks: Ranks, steps: int = 1) -> None:
        recipe = Recipe.model_validate(RECIPE)
        self.ranks, self.pieces = ranks, build_pieces(recipe, ranks)
        initialize_weights(self.pieces[0], recipe)
        _, self.optimizer = wrap_and_optimize(self.pieces, recipe)
        self.steps = 0
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.steps += 1
        torch.manual_seed(self.steps)
        for weight in self.pieces[0].parameters():
            weight.main_grad.normal_()  # type: ignore[attr-defined]
        with cpu.cuda_means_cpu():
            self.optimizer.step()

    def save(self, to: Saver) -> None:
        to.save({"step": self.steps}, self.pieces, self.optimizer)

    def saver(self, run: Path, **settings) -> Saver:
        return Saver(run, self.ranks, CheckpointConfig.model_validate(settings))


class Piece(nn.Module):
    """Part of a model: weights by global name."""

    def __init__(self, *names: str, fill: int = 0) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.full((3,), float(fill + ord(name)))) for name in names})

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        return {
            f"weights.{name}": ShardedTensor.from_rank_offsets(name, weight, replica_id=dist.get_rank())
            for name, weight in self.weights.items()
        }


def save_small(to: Saver, step: int) -> None:
    to.save({"step": step, "recipe": RECIPE}, [Piece("a", fill=step)], None)  # type: ignore[list-item]


@pytest.fixture(scope="module")
def ranks():
    yield groups.initialize(ParallelConfig())
    groups.shut_down()


@pytest.fixture
def training(ranks):
    return Training(ranks)


@pytest.fixture
def gate(monkeypatch):
    """Holds the background writer until it is set."""
    gate, write = threading.Event(), saver._Share.write
    monkeypatch.setattr(saver._Share, "write", lambda self, files: gate.wait(60) and write(self, files))
    return gate


def hashes(run: Path, step: int) -> dict[str, str]:
    return json.loads((run / f"checkpoints/step_{step:08d}/sha256.json").read_text())


def steps(run: Path) -> list[int]:
    return [c.step for c in checkpoint.in_run(run)]


def test_background_is_a_snapshot(training, tmp_path, gate):
    """Training goes on, and changes every weight and moment, before the first byte is written: the files are those of the step of save()."""
    gate.set()
    training.save(training.saver(tmp_path / "at once"))
    gate.clear()
    behind = training.saver(tmp_path / "behind", background=True)
    training.save(behind)
    for _ in range(3):
        training.step()
        assert behind.poll() is None and behind.newest is None and not steps(tmp_path / "behind")
    gate.set()
    found = behind.finish()
    assert found.step == 1 and behind.newest == found and behind.poll() is None
    at_once, of_behind = hashes(tmp_path / "at once", 1), hashes(tmp_path / "behind", 1)
    assert at_once["__0_0.distcp"] == of_behind["__0_0.distcp"] and at_once["common.pt"] == of_behind["common.pt"]
    training.save(training.saver(tmp_path / "later"))
    assert hashes(tmp_path / "later", 4)["__0_0.distcp"] != at_once["__0_0.distcp"], "the test must be able to fail"


def test_a_checkpoint_may_come_before_the_first_update(ranks, tmp_path):
    """A guard may leave every step out until then. Who goes on from it trains as if it had never been."""
    fresh, resumed = Training(ranks, steps=0), Training(ranks, steps=2)
    to = fresh.saver(tmp_path)
    fresh.save(to)
    checkpoint.load_all(to.finish(), resumed.pieces, resumed.optimizer)
    resumed.steps = 0
    for one in (fresh, resumed):
        for group in one.optimizer.param_groups:
            group["step"] = 0
        one.step()
    for a, b in zip(fresh.pieces[0].parameters(), resumed.pieces[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_next_save_waits_for_the_last(training, tmp_path, gate, caplog):
    behind = training.saver(tmp_path, background=True)
    training.save(behind)
    training.step()
    threading.Timer(0.2, gate.set).start()
    with caplog.at_level(logging.INFO, "megatron_infimed"):
        training.save(behind)
    assert steps(tmp_path) == [1] and re.search(r"waited \d.\d s for \S+step_00000001", caplog.text)
    while behind.poll() is None:
        pass
    assert steps(tmp_path) == [1, 2]


def test_every_file_is_in_the_manifest(training, tmp_path):
    training.save(training.saver(tmp_path))
    there = {p.name for p in (tmp_path / "checkpoints/step_00000001").iterdir()}
    assert there == {*hashes(tmp_path, 1), "sha256.json"} >= {".metadata", "common.pt", "metadata.json", "state.json", "__0_0.distcp"}


@contextlib.contextmanager
def small_disk(folder: Path):
    """Files in it cannot exceed 1 MiB, really: a file system of that size (root), else the kernel's limit. Yields what the kernel says."""
    folder.mkdir(exist_ok=True)
    if os.getuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode == 0:
        try:
            yield r"No space left on device, \d\.\d MiB free.*free or add space, or lower checkpoint.keep"
        finally:
            subprocess.run(["umount", folder], check=True)
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            yield r"File too large.*raise the limit on the size of a file"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [False, True])
def test_full_disk(training, tmp_path, background):
    """One clear line, nothing that looks complete, nothing half-written; and the next attempt, with space, succeeds."""
    run = tmp_path / "run"
    to = training.saver(run, background=background)
    with small_disk(run) as words:
        with pytest.raises(UserError, match=words) as told:
            training.save(to)
            assert background
            training.step()
            to.finish()
        assert "\n" not in str(told.value) and "step_00000001: process 0 cannot write it" in str(told.value)
        assert "no checkpoint is the newest complete one" in str(told.value)
        assert not list((run / "checkpoints").iterdir()) and to.newest is None and to.poll() is None
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    training.save(to)
    assert to.finish().step == training.steps and not to.finish().damaged(training.ranks)


def test_no_folder_can_be_made(training, tmp_path):
    (tmp_path / "checkpoints").write_text("a file in its place")
    with pytest.raises(UserError, match=r"step_00000001: process 0 cannot write it \(Not a directory, .* MiB free\): see to the disk"):
        training.save(training.saver(tmp_path))


def test_a_bug_in_the_writer_is_told_too(training, tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "_write_item", lambda *_: {}["what"])
    to = training.saver(tmp_path, background=True)
    training.save(to)
    with pytest.raises(RuntimeError, match="did not save it: KeyError: 'what'"):
        to.finish()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_trouble_that_may_pass_is_not_the_user_s(training, tmp_path, monkeypatch):
    """On a cluster the job is started again, perhaps on other nodes."""

    def lost(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(saver, "_write_item", lost)
    with pytest.raises(RuntimeError, match=r"step_00000001: process 0 cannot write it \(Stale file handle"):
        training.save(training.saver(tmp_path))


def test_a_mount_that_is_gone(training, tmp_path, monkeypatch):
    """Not even how much space there is can be asked; nor is what cannot be read damaged."""
    training.save(training.saver(tmp_path))

    def gone(*_, **__):
        raise OSError(errno.ESHUTDOWN, "Cannot send after transport endpoint shutdown", "the file")

    with monkeypatch.context() as patch:
        patch.setattr(saver, "_write_item", gone)
        patch.setattr(shutil, "disk_usage", gone)
        with pytest.raises(RuntimeError, match=r"cannot write it \(Cannot send after transport endpoint shutdown\): see to the disk"):
            training.save(training.saver(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256", gone)
        with pytest.raises(RuntimeError, match="the file: process 0 cannot read it"):
            checkpoint.newest_sound(tmp_path, training.ranks)
    (tmp_path / "checkpoints/step_00000001/.metadata").unlink()
    assert Checkpoint(tmp_path / "checkpoints/step_00000001").damaged(training.ranks) == [".metadata"]


@pytest.mark.parametrize(
    ("error", "its"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), False),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("Error(s) in loading state_dict for InfiMed: size mismatch"), True),
        (KeyError("it lacks a.weight"), True),
        (CheckpointException("read", {0: (OSError(errno.EIO, "Input/output error"), None)}), False),  # type: ignore[dict-item]
        (CheckpointException("plan", {1: (ValueError("Size mismatch between saved"), None)}), True),  # type: ignore[dict-item]
    ],
)
def test_what_fails_while_loading_is_the_checkpoint_s_fault_or_not(ranks, tmp_path, monkeypatch, error, its):
    def fails(*_args, **_):
        raise error

    monkeypatch.setattr(checkpoint, "sharded_state", fails)
    with pytest.raises(UserError if its else RuntimeError, match="is it of another recipe" if its else "could not be loaded"):
        checkpoint.load_weights(Checkpoint(tmp_path), [])


def one_disk_is_full(rank: int, port: int, run: Path) -> None:
    """A process of two; the second one's disk is full."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    to = Saver(run, groups.initialize(ParallelConfig()), CheckpointConfig(background=True))
    save_small(to, 1)
    to.finish()
    write = saver._Share.write
    saver._Share.write = lambda self, files: write(self, files) if rank == 0 else Path("/dev/full").write_text("x")  # type: ignore[method-assign]
    save_small(to, 2)
    try:
        while to.poll() is None:
            pass
    except UserError as e:
        (run / f"told_{rank}").write_text(str(e))
    groups.shut_down()


def test_trouble_of_one_process_reaches_all(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_disk_is_full, (port, tmp_path), nprocs=2)
    told = [(tmp_path / f"told_{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1] and "step_00000002: process 1 cannot write it (No space left on device" in told[0]
    assert "step_00000001 is the newest complete one" in told[0]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.parametrize(
    "keep, keep_every, left", [(1, None, [9]), (3, None, [7, 8, 9]), (2, 4, [4, 8, 9]), (1, 3, [3, 6, 9]), (20, None, list(range(1, 10)))]
)
def test_retention(ranks, tmp_path, keep, keep_every, left):
    to = Saver(tmp_path, ranks, CheckpointConfig(keep=keep, keep_every=keep_every))
    for step in range(1, 10):
        save_small(to, step)
    assert steps(tmp_path) == left
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step_{n:08d}" for n in left]


def test_later_ones_go(ranks, tmp_path):
    """They were passed over as damaged: they must not push good ones out, nor stay because of keep_every."""
    to = Saver(tmp_path, ranks, CheckpointConfig(keep=3, keep_every=4))
    for step in (2, 6, 8, 3):
        save_small(to, step)
    assert steps(tmp_path) == [2, 3]


def garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["sha256.json", "state.json", "metadata.json", ".metadata", "common.pt", "__0_0.distcp"])
@pytest.mark.parametrize("harm", [garble, Path.unlink, lambda path: path.write_text(""), lambda path: path.write_text("{")])
def test_damage_falls_back(ranks, run, name, harm, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_00000002"
    harm(newest / name)
    found = checkpoint.newest_sound(tmp_path / "run", ranks)
    assert found is not None and found.step == 1
    named = f"{newest} is damaged \\((?P<files>.*)\\): going back to the checkpoint before it"
    told = re.search(named, caplog.text)
    assert told and (name in told["files"] or name == "sha256.json")
    with pytest.raises(UserError, match=r"is damaged|cannot be read"):
        checkpoint.find_sound(tmp_path / "run", Recipe.model_validate(RECIPE).model, ranks)


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """A run directory with the checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("run")
    to = Saver(run, ranks)
    for step in (1, 2):
        save_small(to, step)
    return run


def test_half_written_ones_are_removed(ranks, tmp_path):
    for name in ("step_00000004.tmp", "step_00000002.old.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.newest_sound(tmp_path, ranks) is None
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("written, read", [(["ab", "cd"], ["abcd"]), (["abcd"], ["ab", "cd"]), (["ac", "bd"], ["ab", "cd"])])
def test_pieces_are_not_in_the_files(ranks, tmp_path, written, read):
    """What several pieces of a model have saved, one reads, and the other way round."""
    found = saver.save(tmp_path, {"step": 0}, [Piece(*names) for names in written], None, ranks)  # type: ignore[misc]
    pieces = [Piece(*names, fill=1000) for names in read]
    checkpoint.load_weights(found, pieces)  # type: ignore[arg-type]
    for piece in pieces:
        for name, weight in piece.weights.items():
            assert weight.tolist() == [ord(name)] * 3
