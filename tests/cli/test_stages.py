"""`stages` as a user types it: a chain of two training stages, run, run again, killed, changed, refused. SLURM: tests/slurm/test_stages_jobs.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import chains
from tests.distributed import runs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chain = chains.make_chain(tmp_path_factory.mktemp("whole"), recipe)
    said = chains.stages("run", chain)
    assert [line.split()[1:3] for line in said.splitlines() if "begins" in line] == [[f"{n}:", "begins"] for n in json.loads(names(chain))]
    return chain


def names(chain: Path) -> str:
    return json.dumps(list(chains.states(chain)))


def copy(chain: Path, folder: Path) -> Path:
    """The finished chain elsewhere; its paths point there."""
    shutil.copytree(chain.parent, folder, dirs_exist_ok=True)
    for path in [folder / "chain.yaml", *folder.glob("chain/*.json")]:
        path.write_text(path.read_text().replace(str(chain.parent), str(folder)))
    return folder / "chain.yaml"


def test_a_chain_runs_once(whole: Path) -> None:
    before = chains.figures(whole)
    assert len(before["first"]) == 6 and len(before["second"]) == 3
    assert before["second"][0][0] < before["first"][0][0] - 0.5, "the weights were not carried over"
    assert set(chains.states(whole).values()) == {"done"}
    said = chains.stages("run", whole)
    assert said.count("done before") == 4 and "begins" not in said
    status = chains.stages("status", whole)
    assert "4 of 4 stages done" in status and f"loss {before['second'][-1][0]:.4f} after step 3" in status


def test_what_changed_is_named_and_redone(whole: Path, recipe: Path, tmp_path: Path) -> None:
    first, words = tmp_path / "first", [*chains.SHORT, "stage=first"]
    chain = chains.make_chain(tmp_path, recipe, measure=None, second=None)
    chains.stages("run", chain)
    trained = (first / "metrics.jsonl").read_bytes()
    change = {"train": str(recipe), "set": [*words, f"output={first}", "optimizer.lr=1e-3"], "resources": {"processes": 2}}
    chains.make_chain(tmp_path, recipe, measure=None, second=None, first=change)
    said = chains.stages("run", chain, code=2)
    assert "1 stages are done, but of something else than now\n  first: recipe.optimizer changed" in said
    assert (first / "metrics.jsonl").read_bytes() == trained and "begins" not in said
    assert chains.states(chain) == {"note": "done", "first": "stale"}
    chains.stages("run", chain, "--redo")
    assert (first / "metrics.jsonl").read_bytes() != trained
    (kept,) = tmp_path.glob("first.before-*")
    assert (kept / "metrics.jsonl").read_bytes() == trained, "what was done before is kept"


def test_killed_and_run_again_ends_the_same(whole: Path, recipe: Path, tmp_path: Path) -> None:
    chain = chains.make_chain(tmp_path, recipe)
    words = [sys.executable, "-m", "megatron_infimed", "stages", "run", str(chain)]
    for number, stage in ((signal.SIGKILL, "first"), (signal.SIGTERM, "second")):
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        metrics = tmp_path / stage / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.01)
        if number == signal.SIGTERM:
            assert chains.states(chain) == {"note": "done", "first": "done", "measure": "done", "second": "running"}
            if metrics.read_text().count("\n") == 3:
                process.wait(60)
                break  # it was over before the signal
            process.send_signal(number)
        else:
            for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                one.kill()
        said = process.communicate(timeout=120)[0]
        assert process.returncode == (-9 if number == signal.SIGKILL else 75), said[-3000:]
        assert chains.states(chain)[stage] == "stopped"
    chains.stages("run", chain)
    assert chains.figures(chain) == chains.figures(whole), "losses must be the same to the last bit"


def test_a_closed_gate_stops_the_chain(whole: Path, tmp_path: Path) -> None:
    chain = copy(whole, tmp_path)
    (tmp_path / "chain" / "second.json").unlink()
    shutil.rmtree(tmp_path / "second")
    text = chain.read_text()
    assert "at_most: 50" in text
    chain.write_text(text.replace("at_most: 50", "at_most: 0.01"))
    said = chains.stages("run", chain, "--accept", code=2)  # its paths are others now
    assert "second does not start: last.loss is" in said and "its gate asks for at most 0.01" in said
    assert chains.states(chain)["second"] == "failed" and "does not start" in chains.stages("status", chain)
    assert not (tmp_path / "second").exists()


def test_a_failing_stage_ends_the_chain_and_says_why(recipe: Path, tmp_path: Path) -> None:
    broken = {"train": str(recipe), "set": [f"output={tmp_path}/first", "init_from=/nowhere"], "resources": {"processes": 2}}
    note = {"run": "true", "outputs": ["/nowhere"]}
    chain = chains.make_chain(tmp_path, recipe, first=broken, note=note)
    assert "note ended without /nowhere" in chains.stages("run", chain, code=2)
    made = {"run": "true"}
    broken["set"][-1] = "model.language.vocab_size=16"
    chain = chains.make_chain(tmp_path, recipe, first=broken, note=made)
    said = chains.stages("run", chain, code=2)
    assert "vocab_size is 16" in said and "first failed (exit code 2)" in said
    assert chains.states(chain) == {"note": "done", "first": "failed", "measure": "waiting", "second": "waiting"}
    line = next(line for line in chains.stages("status", chain).splitlines() if line.split()[0] == "first")
    assert "vocab_size is 16" in line, "one line says why"


def test_a_signal_reaches_a_stage_of_one_process(recipe: Path, tmp_path: Path) -> None:
    alone = {"train": str(recipe), "set": ["batch.rows=2", "data.sources.0.epochs=9", f"output={tmp_path}/first", "stage=first"]}
    chain = chains.make_chain(tmp_path, recipe, first=alone)
    words = [sys.executable, "-m", "megatron_infimed", "stages", "run", str(chain)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "first" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "saved in" in said, said
    assert "error: first was stopped by a signal; run the chain again to go on from what it has saved" in said
    assert chains.states(chain)["first"] == "stopped"


def test_until_and_mistakes(recipe: Path, tmp_path: Path) -> None:
    chain = chains.make_chain(tmp_path, recipe)
    chains.stages("run", chain, "--until", "note")
    assert chains.states(chain) == {"note": "done", "first": "open", "measure": "waiting", "second": "waiting"}
    assert "--until third: the chain has note, first" in chains.stages("run", chain, "--until", "third", code=2)
    assert "cannot read the chain" in chains.stages("status", tmp_path / "none.yaml", code=2)
    assert "no such name to set; it has measured=..." in chains.stages("run", chain, "split=dev", code=2)


def test_without_slurm_submit_says_so(recipe: Path, tmp_path: Path) -> None:
    bare = {"PATH": f"{Path(sys.executable).parent}:/bin/nowhere"}
    said = chains.stages("submit", chains.make_chain(tmp_path, recipe), code=2, env=bare)
    assert "no SLURM here" in said
