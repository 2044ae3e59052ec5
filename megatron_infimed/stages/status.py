"""Where a chain stands: one line a stage, from what is on disk and what SLURM's queue says."""

from __future__ import annotations

import fcntl
import json
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_infimed.stages import slurm
from megatron_infimed.stages.chain import Chain, Stage
from megatron_infimed.stages.execute import few
from megatron_infimed.stages.standing import read, standings

RECENT = 20
"""Steps whose median time the rest is reckoned with."""


@dataclass(frozen=True)
class Line:
    """A stage's state in words: done, running, queued, waiting, stale, stopped, failed, cancelled or open."""

    stage: str
    state: str
    about: str = ""
    job: str = ""


def status(chain: Chain) -> list[Line]:
    """Every stage's, in the order of the file."""
    found = standings(chain)
    jobs = slurm.submitted(chain)
    queued = slurm.queue(chain) if jobs and shutil.which("squeue") else {}
    here = _held(Path(chain.output) / "lock")
    out: dict[str, Line] = {}
    for name, stage in chain.stages.items():
        job = queued[name].job if name in queued else jobs.get(name)
        number = job.number if job else ""
        missing = [other for other in chain.after(name) if not found[other].done]
        begun = read(chain, f"{name}.begun.json") is not None
        if found[name].done:
            seconds = found[name].seconds or 0
            out[name] = Line(name, "done", f"in {_time(seconds)}" + _gained(stage, done=True))
        elif name in queued:
            out[name] = _queued(name, stage, queued[name], missing, number)
        elif begun and here:
            out[name] = Line(name, "running", "here" + _gained(stage))
        elif broken := [other for other in missing if out[other].state in ("failed", "cancelled")]:
            out[name] = Line(name, "cancelled" if job else "waiting", f"because {broken[0]} {out[broken[0]].state}", number)
        elif found[name].stale:
            out[name] = Line(name, "stale", f"{few(found[name].changed)} changed")
        elif job:
            out[name] = _ended(name, stage, job)
        elif why := _why(Path(chain.output) / f"{name}.notes"):
            out[name] = Line(name, "failed", why)
        elif begun:
            out[name] = Line(name, "stopped", "run the chain again to go on" + _gained(stage))
        else:
            out[name] = Line(name, "waiting", f"for {', '.join(missing)}") if missing else Line(name, "open")
    return list(out.values())


def text(chain: Chain, lines: list[Line]) -> str:
    """For people."""
    wide = max(len(line.stage) for line in lines)
    head = f"{chain.chain}: {sum(line.state == 'done' for line in lines)} of {len(lines)} stages done, notes in {chain.output}"
    rows = (f"  {line.stage:<{wide}}  {line.state:<9}  {line.about}{f'  [job {line.job}]' if line.job else ''}".rstrip() for line in lines)
    return "\n".join([head, *rows])


def as_json(lines: list[Line]) -> str:
    return json.dumps([asdict(line) for line in lines], indent=1)


def _queued(name: str, stage: Stage, one: slurm.Queued, missing: list[str], number: str) -> Line:
    if one.state in ("RUNNING", "COMPLETING"):
        return Line(name, "running", f"on {one.nodes}" + _gained(stage), number)
    if one.reason == "Dependency":
        return Line(name, "waiting", f"for {', '.join(missing)}", number)
    return Line(name, "queued", f"{one.reason}" + _gained(stage), number)


def _ended(name: str, stage: Stage, job: slurm.Job) -> Line:
    """A job that the queue does not know any more, and that has not done its stage."""
    why = _why(job.notes)
    if why:
        return Line(name, "failed", why, job.number)
    return Line(name, "cancelled", f"or lost; see {job.log}, submit the chain again to go on" + _gained(stage), job.number)


def _why(notes: Path) -> str:
    for note in ("why", "crash"):
        if (notes / note).exists() and (lines := (notes / note).read_text().splitlines()):
            return lines[0] + (f" {lines[1].strip()}" if len(lines) > 1 and lines[0].endswith(("recipe", "chain")) else "")
    return ""


def _gained(stage: Stage, done: bool = False) -> str:
    """Of training: step, loss, what is left."""
    recipe = stage.recipe
    lines = _last_lines(Path(recipe.output) / "metrics.jsonl") if stage.kind == "train" and recipe is not None else []
    if not lines:
        return ""
    last = lines[-1]
    if done:
        return f", loss {last['loss']:.4f} after step {last['step']}"
    steps = min(last["of_steps"], recipe.max_steps or last["of_steps"])  # type: ignore[union-attr]
    left = (steps - last["step"]) * statistics.median(line["seconds"] for line in lines)
    return f", step {last['step']} of {steps}, loss {last['loss']:.4f}, {_time(left)} left"


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file that is being written: whole lines only."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 4096 * RECENT))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return [json.loads(line) for line in lines[:-1][-RECENT:] if line.startswith(b"{")]


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _held(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False
