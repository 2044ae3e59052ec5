"""A process whose rows are all text dilutes nobody's gradients: those of tower and projector equal one process's, element by element."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

# Measured worst |difference| over the largest gradient of each weight (2 cores, gloo, float32): 0, for the sums have the same order here.
TOLERANCE = 1e-6


def gradients(file, *words: str, processes: int = 1) -> dict[str, torch.Tensor]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.distributed.encoder", str(file), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("words", [(), ("overlap",)], ids=["plain", "overlap"])
def test_encoder_gradients_equal_those_of_one_process(tmp_path, words):
    alone, shared = gradients(tmp_path / "one.pt"), gradients(tmp_path / "two.pt", *words, processes=2)
    assert alone.keys() == shared.keys() and len(alone) > 20
    assert all(g.abs().max() > 0 for g in alone.values())
    worst = max(float((shared[name] - g).abs().max() / g.abs().max()) for name, g in alone.items())
    print(f"worst {worst:.1e}")
    assert worst < TOLERANCE
