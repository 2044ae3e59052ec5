"""A chain on SLURM: each stage a job of launch/stage.sh, each waiting for those before it to end well (afterok).

A job that is stopped, pre-empted or loses a node goes on under its own number (launch/common.sh), so what waits for it keeps waiting; one
that fails for good takes those after it along. What waits or runs, the queue knows, by the jobs' names and folder; what was submitted last stands
in OUTPUT/jobs.json, so that the log of an ended job is found.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_infimed.errors import UserError
from megatron_infimed.stages.chain import Chain, Resources
from megatron_infimed.stages.execute import locked, to_do
from megatron_infimed.stages.standing import read, write

SCRIPT = "launch/stage.sh"
LOGS = Path("launch/logs")


@dataclass(frozen=True)
class Job:
    """A stage's job, as submitted."""

    stage: str
    number: str
    name: str

    @property
    def notes(self) -> Path:
        return LOGS / f"{self.name}-{self.number}.notes"

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}-{self.number}.log"


@dataclass(frozen=True)
class Queued:
    """A job that waits or runs, as the queue shows it."""

    job: Job
    state: str
    reason: str
    nodes: str


def submit(chain: Chain, path: Path, words: Sequence[str], redo: bool = False) -> list[Job]:
    """Submits the stages that are to do.

    Args:
        path, words: where the chain was read from, and with which names: the jobs read it again.

    Raises:
        UserError: no SLURM here, the chain is running, or sbatch does not take a job (those before it are cancelled then).
    """
    if not Path(SCRIPT).exists():
        raise UserError(f"{SCRIPT} is not here: submit from the project's folder")
    with locked(chain):
        refuse_running(chain)
        jobs: list[Job] = []
        for name in to_do(chain, redo):
            before = [job.number for job in jobs if job.stage in chain.after(name)]
            try:
                jobs.append(_submit(chain, name, [str(path), name, *words, *(["--redo"] * redo)], before))
            except UserError:
                if jobs:
                    with contextlib.suppress(UserError):  # sbatch's own words matter
                        _run("scancel", *(job.number for job in jobs))
                raise
            write(chain, "jobs.json", {"at": time.time(), "jobs": {job.stage: [job.number, job.name] for job in jobs}})
    return jobs


def submitted(chain: Chain) -> dict[str, Job]:
    """The jobs of the last submission, by stage."""
    return {stage: Job(stage, *rest) for stage, rest in (read(chain, "jobs.json") or {"jobs": {}})["jobs"].items()}


def queue(chain: Chain) -> dict[str, Queued]:
    """The chain's jobs that wait or run, by stage."""
    out = {}
    for line in _run("squeue", "--noheader", "--me", "--format=%i|%T|%r|%N|%Z|%j").splitlines():
        number, state, reason, nodes, folder, name = line.split("|", 5)
        stage = name.removeprefix(f"{chain.chain}.")
        if stage != name and stage in chain.stages and folder == os.getcwd():
            out[stage] = Queued(Job(stage, number, name), state, reason, nodes)
    return {stage: out[stage] for stage in chain.stages if stage in out}


def cancel(chain: Chain) -> list[Job]:
    """Cancels what waits or runs; those jobs. What they have saved stays: submit the chain again to go on."""
    jobs = [one.job for one in queue(chain).values()]
    if jobs:
        _run("scancel", *(job.number for job in reversed(jobs)))
    return jobs


def refuse_running(chain: Chain) -> None:
    """UserError where jobs of the chain wait or run."""
    if alive := queue(chain):
        numbers = ", ".join(f"{stage} ({one.job.number}, {one.state.lower()})" for stage, one in alive.items())
        raise UserError(f"{chain.chain} is on SLURM already: {numbers}; `stages status` shows it, `stages cancel` ends it")


def forget(chain: Chain) -> None:
    """The jobs that were submitted have no say any more. UserError like `refuse_running`."""
    if submitted(chain):
        if not shutil.which("squeue"):
            raise UserError(
                f"{chain.chain} was submitted to SLURM, which cannot be asked from here whether its jobs still run: look on a login node "
                f"(`stages status`); if none do, delete {chain.output}/jobs.json"
            )
        refuse_running(chain)
        write(chain, "jobs.json", {"at": time.time(), "jobs": {}})


def _submit(chain: Chain, name: str, arguments: list[str], before: list[str]) -> Job:
    job_name = f"{chain.chain}.{name}"
    options = [f"--job-name={job_name}", *options_of(chain.stages[name].resources)]
    if before:
        options += [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"]
    # The site's account and partition come from its file, as for the other launchers.
    site = os.environ.get("INFIMED_SITE", "launch/site.sh")
    bash = '[ ! -f "$0" ] || . "$0"; exec sbatch --parsable "$@"'
    answer = _run("bash", "-c", bash, site, *options, SCRIPT, *arguments)
    return Job(name, answer.strip().splitlines()[-1].split(";")[0], job_name)


def options_of(resources: Resources) -> list[str]:
    """sbatch's options; an empty one, as a name in the chain may give, is none."""
    options = [f"--nodes={resources.nodes}", f"--ntasks-per-node={resources.ranks // resources.nodes}"]
    if resources.gpus:
        options.append(f"--gpus-per-node={resources.gpus}")
    if resources.cpus:
        options.append(f"--cpus-per-gpu={resources.cpus}" if resources.gpus else f"--cpus-per-task={resources.cpus}")
    if resources.time is not None:
        options.append(f"--time={resources.time}")
    return [*options, *(option for option in resources.sbatch if option)]


def _run(*words: str) -> str:
    if not shutil.which("squeue"):
        raise UserError("no SLURM here (squeue is not found): use a login node, or `stages run` for this machine")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} does not answer within 120 s: is SLURM's controller up? (sinfo)") from None
    if done.returncode:
        told = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{'sbatch' if words[0] == 'bash' else words[0]} said no: {told}")
    return done.stdout
