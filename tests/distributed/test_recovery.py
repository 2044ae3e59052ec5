"""Killed at any moment, damaged on disk, stopped by a signal: training goes on with bitwise the same losses, or says what is wrong."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from tests.distributed import runs

SETTINGS = ["batch.rows=2", "checkpoint.every=2", "max_steps=8"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    runs.train(recipe, output, *SETTINGS, processes=2)
    return output


def lines(output):
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def resume_equals(recipe, output, whole, *more):
    text = runs.train(recipe, output, *SETTINGS, *more, processes=2)
    assert runs.figures(output) == runs.figures(whole), "losses must be the same to the last bit"
    assert (output / "DONE").exists()
    return text


def test_kill_in_a_step(recipe, whole, tmp_path):
    process = runs.start(recipe, tmp_path, *SETTINGS, processes=2)
    runs.kill_when(process, lambda: lines(tmp_path) == 5)
    assert lines(tmp_path) < lines(whole)
    assert "resumed from" in resume_equals(recipe, tmp_path, whole)


def test_kill_in_a_save(recipe, whole, tmp_path):
    process = runs.start(recipe, tmp_path, *SETTINGS, processes=2)
    runs.kill_when(process, lambda: (tmp_path / "checkpoints/step_00000004.tmp/common.pt").exists())
    assert not (tmp_path / "checkpoints/step_00000004").exists()
    assert "step_00000002" in resume_equals(recipe, tmp_path, whole)
    assert not list(tmp_path.glob("checkpoints/*.tmp"))


def test_signal_saves_and_ends_cleanly(recipe, whole, tmp_path):
    process = runs.start(recipe, tmp_path, *SETTINGS, "checkpoint.every=0")  # alone: torchrun itself dies of SIGUSR1
    text = runs.kill_when(process, lambda: lines(tmp_path) >= 2, signal.SIGUSR1)
    assert process.returncode == 0, text
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
