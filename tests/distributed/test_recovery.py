"""Killed at any moment, damaged on disk, stopped by a signal, out of space: training goes on with bitwise the same losses, or says what is wrong.

INFIMED_KILLS=20 runs the twenty kills in full (13 minutes on two cores that were shared with much else); without it there are a few.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_infimed import notes
from megatron_infimed.config import ParallelConfig
from megatron_infimed.parallel import cpu, groups
from megatron_infimed.train.checkpoint import Checkpoint, in_run
from tests.distributed import runs

SETTINGS = ["batch.rows=2", "checkpoint.every=2", "max_steps=8"]
KILLS = int(os.environ.get("INFIMED_KILLS", "3"))
# Over the whole schedule, with its change of resolution; one row in each of two processes, or two micro-batches through two stages.
KILLED = ["batch.rows=2", "checkpoint.every=2"]
LAYOUTS = {
    "DP2-overlap": ["parallel.overlap=true", "checkpoint.background=true", "model.dropout=0.1"],
    "TP2-SP": ["parallel.tensor=2", "parallel.sequence=true"],
    "PP2-VPP2": ["parallel.pipeline=2", "parallel.virtual=2", "checkpoint.background=true"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """Undisturbed; beside it the same run saving in the background. Both keep every checkpoint."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    behind = [*SETTINGS, "checkpoint.keep=9", "checkpoint.background=true"]
    runs.train_all(recipe, [(output, [*SETTINGS, "checkpoint.keep=9"]), (output.with_name("behind"), behind)], processes=2)
    return output


def lines(output):
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def resume_equals(recipe, output, whole, *more):
    text = runs.train(recipe, output, *SETTINGS, *more, processes=2)
    assert runs.figures(output) == runs.figures(whole), "losses must be the same to the last bit"
    assert (output / "DONE").exists()
    return text


def test_saved_in_the_background_is_the_same(whole):
    behind = whole.with_name("behind")
    assert runs.figures(behind) == runs.figures(whole)
    assert [c.step for c in in_run(behind)] == [c.step for c in in_run(whole)] == [2, 4, 6, 8]
    for one, other in zip(in_run(behind), in_run(whole), strict=True):
        a, b = (json.loads((c.path / "sha256.json").read_text()) for c in (one, other))
        assert {a[name] for name in a if name.endswith(".distcp")} == {b[name] for name in b if name.endswith(".distcp")}


def test_every_process_writes_its_share(whole):
    sizes = [path.stat().st_size for path in (whole / "checkpoints/step_00000008").glob("*.distcp")]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes)  # measured: 1.03; a tensor is not divided


def test_kill_in_a_step(recipe, whole, tmp_path):
    process = runs.start(recipe, tmp_path, *SETTINGS, processes=2)
    runs.kill_when(process, lambda: lines(tmp_path) == 5)
    assert lines(tmp_path) < lines(whole)
    assert "resumed from" in resume_equals(recipe, tmp_path, whole)


def test_kill_in_a_save(recipe, whole, tmp_path):
    process = runs.start(recipe, tmp_path, *SETTINGS, processes=2)
    runs.kill_when(process, (tmp_path / "checkpoints/step_00000004.tmp").exists)
    assert not (tmp_path / "checkpoints/step_00000004").exists()
    assert "step_00000002" in resume_equals(recipe, tmp_path, whole)
    assert not list(tmp_path.glob("checkpoints/*.tmp"))


def test_signal_saves_and_ends_cleanly(recipe, whole, tmp_path):
    process = runs.start(recipe, tmp_path, *SETTINGS, "checkpoint.every=0")  # alone: torchrun itself dies of SIGUSR1
    text = runs.kill_when(process, lambda: lines(tmp_path) >= 2, signal.SIGUSR1)
    assert process.returncode == notes.AGAIN, text
    assert "stopped by a signal" in text and not (tmp_path / "DONE").exists()
    done = json.loads(next(tmp_path.glob("checkpoints/step_*/state.json")).read_text())["step"]
    assert done == lines(tmp_path)
    runs.train(recipe, tmp_path, *SETTINGS, "checkpoint.every=0")
    assert runs.worst(runs.figures(tmp_path), runs.figures(whole)) < 2e-6  # whole ran on two processes


def test_damaged_checkpoint_falls_back(recipe, whole, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole, output)  # DONE and all: a finished run whose last checkpoint went bad is finished again
    newest = sorted(output.glob("checkpoints/step_*"))[-1]
    victim = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0xFF
    victim.write_bytes(data)
    text = resume_equals(recipe, output, whole, "checkpoint.keep=1")
    assert len(list(output.glob("checkpoints/step_*"))) == 1, "the damaged one must not push out what is written now"
    assert f"{newest.name} is damaged ({victim.name})" in text


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 5 MiB; a checkpoint takes 2."""
    folder.mkdir(parents=True)
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", folder], check=False).returncode:
        pytest.skip("a small disk can be made by root alone; tests/unit/test_checkpoint.py has the kernel's limit on file sizes")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_full_disk(recipe, whole, tmp_path):
    """Found in the background by the writer of step 6; with more space the run goes on from step 4."""
    with small_disk(tmp_path / "checkpoints"):
        text = runs.train(recipe, tmp_path, *SETTINGS, "checkpoint.background=true", processes=2, code=1)  # 1 is torchrun's
        assert "cannot write it (No space left on device" in text and "step_00000004 is the newest complete one" in text
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path / "checkpoints"], check=True)
        assert "step_00000004" in resume_equals(recipe, tmp_path, whole)


def test_done_is_skipped_and_another_recipe_is_refused(recipe, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    assert "nothing to do" in runs.train(recipe, whole, *SETTINGS)
    text = runs.train(recipe, whole, *SETTINGS, "optimizer.lr=1e-5", code=2)
    assert "differs in recipe.optimizer" in text and "Traceback" not in text
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_next_stage_starts_from_weights(recipe, whole, tmp_path):
    """init_from carries the weights, not the optimizer, also where other parts learn; frozen parts stay as they were."""
    text = runs.train(recipe, tmp_path / "next", f"init_from={whole}", "trainable.vision=false", "max_steps=2", "stage=sft")
    assert f"weights of {whole}" in text
    assert runs.figures(tmp_path / "next")[0][0] < runs.figures(whole)[0][0] - 0.5, "the weights were not carried over"


def test_a_run_that_is_not_done_is_no_start_unless_named(recipe, whole, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "checkpoints").symlink_to(whole / "checkpoints")
    newest = in_run(tmp_path / "half")[-1].path
    text = runs.train(recipe, tmp_path / "next", f"init_from={tmp_path / 'half'}", code=2)
    assert f"half is not done, its newest checkpoint is {newest.name}" in text and f"init_from={newest}" in text
    done = json.loads((whole / "DONE").read_text())
    (tmp_path / "half" / "DONE").write_text(json.dumps({**done, "checkpoint": "step_00000001"}))  # it goes on, with more steps than it had
    assert "half is not done" in runs.train(recipe, tmp_path / "next", f"init_from={tmp_path / 'half'}", code=2)
    assert f"weights of {newest}" in runs.train(recipe, tmp_path / "next", f"init_from={newest}", "max_steps=1")


def test_next_stage_may_take_the_moments(recipe, whole, tmp_path):
    """After one step each, with the same weights and rows: what is left of the old moments is the difference, whatever the new settings."""
    again = [f"init_from={whole}", "max_steps=1", "optimizer.betas=[0.8, 0.9]", "batch.rows=2"]
    text = runs.train_all(recipe, [(tmp_path / "without", again), (tmp_path / "with", [*again, "init_optimizer=true"])], processes=2)
    assert f"weights and moments of {whole}" in text
    before, without, taken = (_tensors(in_run(run)[-1]) for run in (whole, tmp_path / "without", tmp_path / "with"))
    moments = [name for name in before if name.startswith("optimizer.state.exp_avg.")]
    assert len(moments) > 20
    for name in moments:
        torch.testing.assert_close(taken[name] - without[name], 0.8 * before[name], rtol=1e-4, atol=1e-7)  # worst: 1e-9 off
    assert runs.figures(tmp_path / "with")[0] == runs.figures(tmp_path / "without")[0]
    text = runs.train(recipe, tmp_path / "other", *again, "init_optimizer=true", "trainable.vision=false", code=2)
    assert "moments of other parts" in text


def test_a_left_over_process_saves_nothing(recipe, whole, tmp_path):
    """On a node that was given up processes may live on: the run belongs to the last that started."""
    left_over = runs.start(recipe, tmp_path, *SETTINGS, "checkpoint.every=4")
    try:
        while lines(tmp_path) < 2:
            assert left_over.poll() is None
            time.sleep(0.01)
        left_over.send_signal(signal.SIGSTOP)
        resume_equals(recipe, tmp_path, whole)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoints/*/*")}
        left_over.send_signal(signal.SIGCONT)
        text = left_over.communicate(timeout=120)[0]
        assert left_over.returncode == 2 and "was taken over by a later start" in text, text
        assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoints/*/*")} == before
        assert runs.figures(tmp_path) == runs.figures(whole)
    finally:
        left_over.kill()


def test_errors_are_one_line(recipe, tmp_path):
    for overrides, message in [
        (["init_from=/nowhere"], "/nowhere does not exist"),
        (["model.language.vocab_size=16"], "vocab_size is 16"),
        (["data.sources=[{prefix: /nowhere/x}]"], "/nowhere/x"),
        (["optimizer.learning_rate=1"], "optimizer.learning_rate"),
        (["parallel.tensor=2"], "processes"),
    ]:
        text = runs.train(recipe, tmp_path / "run", *overrides, code=2)
        assert message in text and "Traceback" not in text, text


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    runs.train_all(recipe, [(folder / name, [*KILLED, *words]) for name, words in LAYOUTS.items()], processes=2)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_kills_at_random_moments(recipe, undisturbed, tmp_path, name):
    """Killed again and again, in a step or in a save, then left alone: bitwise the figures of the undisturbed run, and no process left."""
    chance, settings = random.Random(name), [*KILLED, *LAYOUTS[name]]
    wanted = runs.figures(undisturbed / name)
    for number in range(list(LAYOUTS).index(name), KILLS, len(LAYOUTS)):
        newest = max((c.step for c in in_run(tmp_path)), default=0)
        moment = _moment(tmp_path, newest, len(wanted), chance, in_save=number % 2 == 0)
        runs.kill_when(runs.start(recipe, tmp_path, *settings, processes=2), moment)
        assert not (tmp_path / "DONE").exists(), "the run was over before the kill"
        assert not [p for p in psutil.process_iter(["cmdline"]) if f"output={tmp_path}" in (p.info["cmdline"] or [])]
        torn = [p.name for p in tmp_path.glob("checkpoints/*.tmp")]
        print(f"{name}, kill {number + 1}: resumed from step {newest}, killed after step {lines(tmp_path)}", *torn)
    left = in_run(tmp_path)
    text = runs.train(recipe, tmp_path, *settings, processes=2)
    assert f"resumed from {left[-1].path}" in text if left else "fresh weights" in text
    assert runs.figures(tmp_path) == wanted and (tmp_path / "DONE").exists()
    assert not list(tmp_path.glob("checkpoints/*.tmp"))
    assert not _stale(in_run(tmp_path)[-1]), "weights in the checkpoint are not those that the optimizer has made"


def _moment(output: Path, newest: int, steps: int, chance: random.Random, in_save: bool) -> Callable[[], bool]:
    """True from a random moment of the run that is about to start: some time after a step's line, or after a save has begun."""
    figures, before = output / "metrics.jsonl", _inode(output / "metrics.jsonl")
    step = min(newest + chance.choice([1, 3]), steps)  # nothing is saved after odd ones
    aside = output / f"checkpoints/step_{min(newest + chance.choice([2, 4]), steps):08d}.tmp"
    delay, begun = chance.uniform(0, 0.5 if in_save else 0.05), 0.0

    def reached() -> bool:
        nonlocal begun
        resumed = _inode(figures) != before  # it writes the file anew: lines and folders of the attempt before do not count
        if not begun and resumed and (aside.exists() if in_save else lines(output) >= step):
            begun = time.monotonic()
        return bool(begun) and time.monotonic() >= begun + delay

    return reached


def _inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def _stale(checkpoint: Checkpoint) -> list[str]:
    """Names of weights that differ from the optimizer's copy of them (float32: they are the same numbers)."""
    held = _tensors(checkpoint)
    mains = {name: tensor for name, tensor in held.items() if name.startswith("optimizer.state.param.")}
    assert mains
    return [name for name, main in mains.items() if not torch.equal(main, held[name.removeprefix("optimizer.state.param.")])]


def _tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    groups.initialize(ParallelConfig())
    with cpu.cuda_means_cpu():
        held = dist_checkpointing.load_plain_tensors(str(checkpoint.path))
    groups.shut_down()
    return held
