"""`stages`: a chain of stages here or on SLURM."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from megatron_infimed import log, notes
from megatron_infimed.stages import execute, slurm
from megatron_infimed.stages import status as standing
from megatron_infimed.stages.chain import load_chain

app = typer.Typer(no_args_is_help=True, help="A chain of stages, from raw data to evaluation, as a YAML file (launch/chains/).")

ChainPath = Annotated[Path, typer.Argument(metavar="CHAIN", help="YAML file, see launch/chains/")]
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=TEXT | STAGE.key.path=VALUE]...", help="for what the chain's `let` names, and over a stage's recipe"),
]
Redo = Annotated[bool, typer.Option("--redo", help="do again what was done with something else; what it left is kept beside")]
Accept = Annotated[bool, typer.Option("--accept", help="take what was done with something else as it is")]


@app.command()
def run(
    path: ChainPath,
    names: Names = None,
    redo: Redo = False,
    accept: Accept = False,
    processes: Annotated[int | None, typer.Option(min=1, help="for every command of several, instead of what the chain says")] = None,
    until: Annotated[str | None, typer.Option(help="the last stage to run")] = None,
) -> None:
    """Runs the stages that are not done on this machine, one after another."""
    log.set_up()
    chain = load_chain(path, names or [])
    slurm.forget(chain)
    _accept(chain, accept)
    try:
        execute.run_here(chain, redo, processes, until)
    except execute.StageFailed as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(e.code if e.code in (2, notes.AGAIN) else 1) from None


@app.command()
def submit(path: ChainPath, names: Names = None, redo: Redo = False, accept: Accept = False) -> None:
    """Puts the stages that are not done on SLURM, each after those before it."""
    log.set_up()
    chain = load_chain(path, names or [])
    _accept(chain, accept)
    jobs = slurm.submit(chain, path, names or [], redo)
    for job in jobs:
        print(f"{job.stage}: job {job.number}, log {job.log}")
    if not jobs:
        print(f"{chain.chain}: all stages are done")


@app.command()
def status(path: ChainPath, names: Names = None, as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """Where each stage stands, what it waits for, last loss and time left."""
    chain = load_chain(path, names or [], to_run=False)
    lines = standing.status(chain)
    print(standing.as_json(lines) if as_json else standing.text(chain, lines))


@app.command()
def cancel(path: ChainPath, names: Names = None) -> None:
    """Cancels the chain's jobs on SLURM. What they have saved stays."""
    chain = load_chain(path, names or [], to_run=False)
    jobs = slurm.cancel(chain)
    print(
        f"{chain.chain}: " + (f"cancelled {', '.join(f'{job.stage} ({job.number})' for job in jobs)}" if jobs else "no job waits or runs")
    )


@app.command(hidden=True)
def begin(path: ChainPath, stage: str, names: Names = None, redo: Redo = False) -> None:
    """Of launch/stage.sh: looks whether the stage is to run, and leaves what the job is to run in INFIMED_NOTES/commands."""
    log.set_up()
    chain = load_chain(path, names or [], to_run=False)
    lines = []
    if execute.begin(chain, stage, redo):
        one = chain.stages[stage]
        for command in one.commands:
            if one.kind == "train":
                lines.append(["train", str(one.train), *one.set])
            else:
                lines.append(["ranks" if command.ranks > 1 else "alone", *command.words])
    notes.write("commands", " &&\n".join(shlex.join(words) for words in lines) or ":")


@app.command(hidden=True)
def end(path: ChainPath, stage: str, names: Names = None, redo: Redo = False) -> None:
    """Of launch/stage.sh: records that the stage is done."""
    execute.end(load_chain(path, names or [], to_run=False), stage)


def _accept(chain, accept: bool) -> None:
    for name in execute.accept(chain) if accept else []:
        print(f"{name}: taken as it is")
