"""A chain on SLURM, by `stages submit`: the same losses as `stages run`, whatever happens to its jobs on the way; refusals, cancellation, status."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import psutil
import pytest

from tests import chains
from tests.distributed import runs
from tests.slurm.conftest import Slurm

STEPS = 30
ACROSS = {"nodes": 2, "processes": 2, "time": 10, "sbatch": ["--mem=1G"]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("data"))


def make(folder: Path, recipe: Path, **changes: object) -> Path:
    """The chain of tests/chains.py with its first stage over two nodes, and long enough to be disturbed."""
    words = [*chains.SHORT, "data.sources.0.epochs=2", f"max_steps={STEPS}", f"output={folder}/first", "stage=first"]
    first = {"train": str(recipe), "set": words, "resources": ACROSS}
    return chains.make_chain(folder, recipe, **{"first": first, **changes})


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    """What `stages run` computes here."""
    chain = make(tmp_path_factory.mktemp("here"), recipe)
    chains.stages("run", chain)
    return chains.figures(chain)


class Submitted:
    """A chain on the cluster."""

    def __init__(self, slurm: Slurm, project: Path, chain: Path) -> None:
        self.slurm, self.project, self.chain = slurm, project, chain
        self.before = 0
        self.stages("submit")
        self.jobs: dict[str, str] = {
            stage: job[0] for stage, job in json.loads((chain.parent / "chain" / "jobs.json").read_text())["jobs"].items()
        }

    def stages(self, command: str, *words: str, code: int = 0) -> str:
        return chains.stages(command, self.chain, *words, code=code, env=self.slurm.env, cwd=self.project)

    def states(self) -> dict[str, str]:
        return {line["stage"]: line["state"] for line in json.loads(self.stages("status", "--json"))}

    def steps(self) -> int:
        """Steps of the first stage that are saved."""
        return max((int(p.name.removeprefix("step_")) for p in self.chain.parent.glob("first/checkpoints/step_????????")), default=0)

    def at_work(self, steps: int) -> None:
        """Waits until the first stage trains and has saved some steps more."""
        self.slurm.until(lambda: self.slurm.state(self.jobs["first"]) == "RUNNING" and self.tasks("01"), 90, self.log)
        self.before, before = self.restarts(), self.steps()
        self.slurm.until(lambda: self.steps() >= before + steps, 90, self.log)

    def restarted(self) -> None:
        """Waits until the first stage's job was started again, since it was last seen at work."""
        self.slurm.until(lambda: self.restarts() > self.before, log=self.log)

    def restarts(self) -> int:
        return int(self.slurm.field(self.jobs["first"], "Restarts") or 0)

    def tasks(self, ranks: str) -> list[psutil.Process]:
        """The first stage's training processes of these ranks."""
        return self.slurm.tasks_of(self.jobs["first"], ranks, "train")

    def log(self) -> str:
        return self.slurm.log(self.project, self.jobs["first"])

    def ends_like(self, figures: dict[str, list[tuple[float, float]]]) -> None:
        ended = {stage: self.slurm.wait(job, 240) for stage, job in self.jobs.items()}
        assert set(ended.values()) == {"COMPLETED"}, f"{ended}\n{self.log()}"
        assert chains.figures(self.chain) == figures, "losses must be the same to the last bit"
        assert set(self.states().values()) == {"done"}


def test_submitted_it_computes_what_run_does(slurm: Slurm, project: Path, recipe: Path, tmp_path: Path, undisturbed: dict) -> None:
    one = Submitted(slurm, project, make(tmp_path, recipe))
    assert list(one.jobs) == ["note", "first", "measure", "second"]
    said = one.stages("submit", code=2)
    assert "is on SLURM already: note" in said and "`stages cancel` ends it" in said
    assert "is on SLURM already" in one.stages("run", code=2), "nor does it run here at the same time"
    one.at_work(1)
    lines = {line["stage"]: line for line in json.loads(one.stages("status", "--json"))}
    assert lines["note"]["state"] == "done" and lines["first"]["state"] == "running" and lines["first"]["job"] == one.jobs["first"]
    assert f"of {STEPS}, loss" in lines["first"]["about"] and lines["first"]["about"].endswith(" left")
    assert (lines["measure"]["state"], lines["measure"]["about"]) == ("waiting", "for first")
    one.ends_like(undisturbed)
    assert "all stages are done" in one.stages("submit")


def usr1(one: Submitted) -> None:
    one.slurm.run("scancel", "--batch", "--signal=USR1", one.jobs["first"])


def term(one: Submitted) -> None:
    one.slurm.run("scancel", "--batch", "--signal=TERM", one.jobs["first"])


def requeue(one: Submitted) -> None:
    one.slurm.run("scontrol", "requeue", one.jobs["first"])


def kill_a_task(one: Submitted) -> None:
    one.tasks("1")[0].kill()


def pre_empt(one: Submitted) -> None:
    job = one.slurm.sbatch("sleep 1", "--nodes=2", "--exclusive", "--partition=urgent")
    assert one.slurm.wait(job, 60) == "COMPLETED"


def node_down(one: Submitted) -> None:
    one.slurm.set_node("n2", "down")
    one.restarted()
    one.slurm.run("scontrol", "update", "NodeName=n2", "State=resume", check=False)  # it may have come back by itself


def lose_power(one: Submitted) -> None:
    """Of the node that the batch script runs on."""
    one.slurm.kill("n1")
    one.slurm.kill_tasks("n1")
    one.restarted()
    one.slurm.start("n1")


def lose_slurmd(one: Submitted) -> None:
    """The node is given up while its task hangs; it wakes up when the job runs elsewhere, or again, and must do no harm."""
    left_over = one.tasks("01")
    for task in left_over:
        task.suspend()
    one.slurm.kill("n2")
    one.restarted()
    one.slurm.start("n2")
    before = one.before
    one.at_work(1)
    one.before = before
    for task in left_over:
        with contextlib.suppress(psutil.NoSuchProcess):
            task.resume()


def lose_controller(one: Submitted) -> None:
    """A task is killed while SLURM's controller is not there to be asked for another start."""
    one.slurm.kill("slurmctld")
    one.tasks("1")[0].kill()
    one.slurm.until(lambda: list(one.project.glob(f"launch/logs/*-{one.jobs['first']}.notes/answer")))
    one.slurm.start("slurmctld")


BAD_DAYS = {"nodes": [pre_empt, node_down, lose_power, lose_slurmd], "processes": [usr1, term, requeue, kill_a_task, lose_controller]}


@pytest.mark.parametrize("what", BAD_DAYS)
def test_a_chain_survives(what: str, fragile: Slurm, project: Path, recipe: Path, tmp_path: Path, undisturbed: dict) -> None:
    """One thing after another happens to the same job."""
    one = Submitted(fragile, project, make(tmp_path, recipe))
    for happens in BAD_DAYS[what]:
        one.at_work(1)
        happens(one)
        one.restarted()
        assert one.steps() < STEPS, f"{happens.__name__} came too late"
    one.ends_like(undisturbed)
    said = one.log()
    if what == "processes":
        for words in ("SIGUSR1: it is asked to save", "SIGTERM: it is asked to save", "exit code 75 after a signal, got to step_"):
            assert words in said
        assert re.search(r"exit code (?!75)\d+, got to step_", said), "of the killed task, or of the one that misses it"


def test_a_stage_that_fails_for_good_takes_those_after_it_along(slurm: Slurm, project: Path, recipe: Path, tmp_path: Path) -> None:
    broken = {"train": str(recipe), "set": [f"output={tmp_path}/first", "model.language.vocab_size=16"], "resources": {"processes": 2}}
    one = Submitted(slurm, project, make(tmp_path, recipe, first=broken))
    assert slurm.wait(one.jobs["first"]) == "FAILED" and slurm.field(one.jobs["first"], "Restarts") == "0"
    assert {slurm.wait(one.jobs[stage]) for stage in ("measure", "second")} == {"CANCELLED"}
    assert one.states() == {"note": "done", "first": "failed", "measure": "cancelled", "second": "cancelled"}
    (line,) = [line for line in one.stages("status").splitlines() if line.split()[0] == "first"]
    assert "vocab_size is 16" in line, "one line says why"
    make(tmp_path, recipe)
    chain = Submitted(slurm, project, one.chain)
    assert list(chain.jobs) == ["first", "measure", "second"], "mended, it goes on from there"
    chain.stages("cancel")
    slurm.until(lambda: not slurm.run("squeue", "-h").strip())
    assert "no job waits or runs" in chain.stages("cancel")
    assert set(chain.states().values()) == {"done", "cancelled"}


def test_a_closed_gate_fails_the_job(slurm: Slurm, project: Path, recipe: Path, tmp_path: Path) -> None:
    gate = {"file": f"{tmp_path}/measured.json", "value": "last.loss", "at_most": 1.0}
    last = {"train": str(recipe), "set": [f"output={tmp_path}/second", "max_steps=1"], "gates": [gate]}
    (tmp_path / "measured.json").write_text('{"last": {"loss": 1.5}}')
    one = Submitted(slurm, project, make(tmp_path, recipe, first=None, measure=None, second=last))
    assert slurm.wait(one.jobs["second"]) == "FAILED"
    assert "second does not start: last.loss is 1.5" in one.stages("status") and not (tmp_path / "second").exists()


def test_sbatch_s_refusal_is_one_line(slurm: Slurm, project: Path, recipe: Path, tmp_path: Path) -> None:
    chain = make(tmp_path, recipe, measure={"run": "true", "resources": {"sbatch": ["--partition=nowhere"]}}, second=None)
    said = chains.stages("submit", chain, code=2, env=slurm.env, cwd=project)
    assert "sbatch said no" in said and "invalid partition" in said
    slurm.until(lambda: not slurm.run("squeue", "-h").strip())  # those before it are cancelled
