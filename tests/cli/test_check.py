"""`check` as a user calls it."""

from __future__ import annotations

import subprocess
import sys

import pytest


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_infimed", *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("recipe", "language"), [("pretrain_4b", "4.022 B"), ("sft_general_1p7b", "1.721 B")])
def test_check_builds_the_full_size_model(recipe, language):
    done = call("check", f"launch/recipes/{recipe}.yaml", "--processes", "32")
    assert done.returncode == 0, done.stderr
    assert f"language model   {language} parameters, trained" in done.stdout
    assert "vision tower     0.398 B parameters, frozen (26 of 27 layers" in done.stdout
    assert done.stderr == ""


def test_check_refuses_in_plain_words():
    done = call("check", "launch/recipes/pretrain_4b.yaml", "parallel.tensor=5", "optimizer.rate=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "optimizer.rate" in done.stderr
    done = call("check", "launch/recipes/pretrain_4b.yaml", "--processes", "24")
    assert done.returncode == 2 and "batch.rows: 256 is not a multiple of micro_rows 1 x 24" in done.stderr
    done = call("train", "launch/recipes/pretrain_4b.yaml", "precision.fp8=delayed")
    assert done.returncode == 2 and "needs a GPU and Transformer Engine" in done.stderr
    done = call("check", "nowhere.yaml")
    assert done.returncode == 2 and "cannot read the recipe" in done.stderr and done.stderr.count("\n") == 1
