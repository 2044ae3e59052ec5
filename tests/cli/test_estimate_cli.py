"""`estimate` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys

RECIPE = "launch/recipes/pretrain_4b.yaml"


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_infimed", "estimate", *words], capture_output=True, text=True, timeout=240)


def test_it_says_what_fits_and_that_nothing_was_measured():
    done = call(RECIPE, "--gpus", "64")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("pretrain on 64 x H100 80 GB SXM (8 nodes of 8)\n")
    for text in (
        "on a GPU nothing was measured",
        "Time: modelled, not measured",
        "79.1: fits",
        "To use one, add its words",
        "Disk: 57.2 GB",
    ):
        assert text in done.stdout
    for name in ("weights", "gradients", "optimizer", "activations", "working", "allowance", "loss", "tower and embedding forward"):
        assert name in done.stdout


def test_json_of_described_documents():
    words = ("--gpus", "8", "--documents", "1000000", "--tokens-a-document", "100", "--images-a-document", "2", "--json")
    done = call(RECIPE, "precision.recompute=none", *words)
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout)
    low, high = plain["work"]["loads"]
    assert abs(low["steps"] * low["images"] / (0.6 * 2e6) - 1) < 0.01 and high["tokens_per_image"] == 144
    assert plain["own"]["fits"] and plain["proposals"]


def test_it_refuses_in_one_line():
    for words, text in (
        (("--gpus", "12"), "--gpus 12: not a whole number of nodes of 8"),
        (("--gpus", "24"), "24 GPUs: no layout suits or fits"),
        (("--gpus", "8", "--gpu", "b300"), "--gpu b300: not known"),
    ):
        done = call(RECIPE, *words)
        assert done.returncode == 2 and done.stdout == ""
        assert text in done.stderr and done.stderr.count("\n") == 1
