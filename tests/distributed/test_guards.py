"""The documents that spoil a step are named, whatever the layout, and the run goes on as if nothing had happened; who hangs is named too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.distributed import runs
from tests.distributed.culprits import ROWS, SPOILED

# Four processes each.
LAYOUTS = {
    "PP2-DP2-overlap": {"pipeline": 2, "overlap": True},
    "PP2-VPP2-DP2": {"pipeline": 2, "virtual": 2},
    "TP2-CP2-SP": {"tensor": 2, "context": 2, "sequence": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("culprits")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["-m", "tests.distributed.culprits", str(folder), json.dumps(LAYOUTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_documents_that_spoil_a_step_are_named(folder, name):
    out = json.loads((folder / f"{name}.json").read_text())
    replicas = 2 if "DP2" in name else 1

    def suspects(spoiled):
        lines = [json.loads(line) for line in (folder / name / f"{spoiled}.jsonl").read_text().splitlines()]
        return sorted((line["micro_batch"], line["data_rank"], line["documents"]) for line in lines)

    def place(row):  # row r is micro-batch r // replicas of data parallel rank r % replicas
        return row // replicas + 1, row % replicas

    for spoiled in ("loss", "gradient", "image"):
        assert out[spoiled]["kind"] == "nonfinite"
        assert suspects(spoiled) == sorted((*place(row), [f"doc 0:{10 * row + i}"]) for row, i in SPOILED[spoiled])
    assert suspects("together") == [(*place(3), ["doc 0:32", "doc 0:33"])]
    assert out["loss"]["said"] == f"2 of {ROWS} micro-batches gave it; bad by themselves: " + ", ".join(
        f"doc 0:{d}" for _, _, (d,) in sorted((row % replicas, row, [10 * row + i]) for row, i in SPOILED["loss"])
    )
    assert out["together"]["said"] == f"1 of {ROWS} micro-batches gave it; suspected: doc 0:32, doc 0:33"
    assert "UserError: step 10: weights are not finite" in out["weights"]["said"] and "no document is to blame" in out["weights"]["said"]
    weights = json.loads((folder / name / "weights.jsonl").read_text())["weights"]
    assert [weight.split(":")[0] for weight in weights] == [f"rank {r}" for r in range(4)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_goes_on_as_without(folder, name):
    """Weights, moments, dropout masks, buffers and overlapped reduction: the losses are the same to the last bit."""
    out = json.loads((folder / f"{name}.json").read_text())
    assert out["figures"] == out["undisturbed"] and len(out["figures"]) == len(SPOILED)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return runs.make_data(tmp_path_factory.mktemp("data"))


def test_a_run_that_diverges_leaves_steps_out_and_then_stops(recipe, tmp_path):
    text = runs.train(recipe, tmp_path, "optimizer.lr=1e30", "guards.nonfinite=skip", "guards.max_skips=2", "batch.rows=2", code=2)
    assert "Traceback" not in text
    assert text.count("not finite; step left out") == 3 and "max_skips 2 in a row" in text.splitlines()[-1], text
    assert "2 of 2 micro-batches gave it" in text and "rather the weights have diverged" in text
    lines = [json.loads(line) for line in (tmp_path / "suspects.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == [2, 3, 4]
    prefix = str(recipe.parent / "shard")
    assert all(document.startswith(prefix) for line in lines for document in line["documents"])


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    runs.train(recipe, output, *HANG, processes=2)
    return output


HANG = ["batch.rows=2", "max_steps=8", "guards.hang_minutes=0.1"]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_hang_names_the_process_that_is_late(recipe, undisturbed, tmp_path, stopped):
    """The one that writes to the terminal, or the other one; then it goes on, and the run ends as if nothing had been."""
    process = runs.start(recipe, tmp_path, *HANG, processes=2)
    other = tmp_path / "log" / f"rank_{1 - stopped}.log"
    try:
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text().count("\n") >= 2, process)
        (late,) = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == str(stopped)]
        late.suspend()
        began = time.monotonic()
        wait_for(lambda: "no progress" in other.read_text(), process, 60)
        print(f"said after {time.monotonic() - began:.1f} s")
        report = json.loads((tmp_path / "hang" / f"rank_{1 - stopped}.json").read_text())
        assert any("all_reduce" in line or "backward" in line for line in report["stack"])
        late.resume()
        text, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, text
    assert f"rank {stopped} ({report['host']}) does not answer: it is stopped, dead or stuck" in text  # on the terminal
    assert "goes on, after" in other.read_text()
    assert not list((tmp_path / "hang").glob("*.json")), "reports are taken back"
    assert runs.figures(tmp_path) == runs.figures(undisturbed)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
