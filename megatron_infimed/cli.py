"""The command line: `python -m megatron_infimed COMMAND`. Settings live in recipes; a word `key.path=value` overrides one.

A UserError becomes one message on stderr and exit code 2; anything else is a bug and shows its traceback. Heavy imports happen inside the
commands, so that `--help` and a wrong word answer at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from megatron_infimed import notes
from megatron_infimed.errors import UserError
from megatron_infimed.recipe_files import load_recipe
from megatron_infimed.stages.cli import app as stages

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n\n")[0])
app.add_typer(stages, name="stages")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, see launch/recipes/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="for example optimizer.lr=2e-5")]


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    processes: Annotated[int | None, typer.Option(help="check that the layout suits this many processes")] = None,
) -> None:
    """Validates a recipe and builds its model without memory: parameters, tokens a step, what would run here."""
    from megatron_infimed.check import report

    print(report(load_recipe(recipe, overrides or []), processes))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """Says what is installed, what stands in for what is not and what that costs, and what is wrong (exit code 2)."""
    from megatron_infimed.doctor import main as examine

    raise typer.Exit(examine(as_json))


@app.command()
def estimate(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="in all")] = 8,
    gpus_a_node: Annotated[int, typer.Option(min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="its kind; cpu for this machine's memory model")] = "h100",
    documents: Annotated[
        int | None, typer.Option(min=1, help="where the shards are not there yet (default: a billion tokens' worth)")
    ] = None,
    tokens_a_document: Annotated[int, typer.Option(min=1, help="of text")] = 256,
    images_a_document: Annotated[float, typer.Option(min=0)] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Memory, time and disk of a recipe on a cluster, and the layouts that fit it, quickest first. Needs no GPU."""
    from megatron_infimed.estimate.report import estimate
    from megatron_infimed.estimate.workload import Described

    described = Described(documents, tokens_a_document, images_a_document)
    print(estimate(load_recipe(recipe, overrides or []), gpus, gpus_a_node, gpu, described, as_json))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    prove_seconds: Annotated[float, typer.Option(min=0, help="for each phase, on proving how near the best possible plan it is")] = 10.0,
) -> None:
    """Packs the recipe's data ahead of training, saves the plan in OUTPUT/plan and prints each phase's rows, fill and bound."""
    from megatron_infimed import log
    from megatron_infimed.data.saved_plan import lines, plan_of
    from megatron_infimed.train.trainer import open_data

    log.set_up()
    settings = load_recipe(recipe, overrides or [])
    schedule = plan_of(settings, open_data(settings)[1], prove_seconds=prove_seconds)
    print("\n".join(lines(schedule, settings.data.capacity, settings.data.max_images)))


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Trains a stage, or continues it. Alone, or under torchrun or srun. A signal (TERM, USR1) saves and ends it with exit code 75: start it
    again to go on."""
    from megatron_infimed.parallel import groups
    from megatron_infimed.train.trainer import fit

    settings = load_recipe(recipe, overrides or [])
    try:
        done = fit(settings)
    finally:
        groups.shut_down()
    if not done:
        raise typer.Exit(notes.AGAIN)


@app.command()
def preflight(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Looks for what would stop or slow down this training on these nodes: GPUs, network, data, disk, versions, clocks. Started like
    training, before it. Exit code 69 after naming bad nodes."""
    from megatron_infimed.preflight.run import preflight

    preflight(load_recipe(recipe, overrides or []))


@app.command()
def validate(
    recipe: RecipePath,
    overrides: Overrides = None,
    data: Annotated[list[str] | None, typer.Option(help="PREFIX of a held-out shard; may stand several times")] = None,
    output: Annotated[Path, typer.Option(help="JSON file")] = Path("validation.json"),
    checkpoint: Annotated[str | None, typer.Option(help="checkpoint or run directory (default: the recipe's output)")] = None,
) -> None:
    """Computes the loss of a checkpoint on held-out shards, for the gates of a chain of stages. Alone, or under torchrun or srun."""
    from megatron_infimed.parallel import groups
    from megatron_infimed.train.validate import validate

    settings = load_recipe(recipe, overrides or [])
    try:
        validate(settings, data or [], output, checkpoint=checkpoint)
    finally:
        groups.shut_down()


@app.command()
def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    questions: Annotated[Path, typer.Option(help="jsonl: id, image, question, answer, kind, ...")] = Path("questions.jsonl"),
    images: Annotated[Path, typer.Option(help="folder that image paths start from")] = Path(),
    output: Annotated[Path, typer.Option(help="folder for answers.jsonl and scores.json")] = Path("evaluation"),
    checkpoint: Annotated[str | None, typer.Option(help="checkpoint or run directory (default: the recipe's output)")] = None,
    gray: Annotated[bool, typer.Option(help="ask everything again with gray images: what is still right was not seen")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Answers questions about held-out images with a trained checkpoint, greedily, and scores them. Alone, or under torchrun or srun."""
    from megatron_infimed.evaluate.run import evaluate
    from megatron_infimed.parallel import groups

    settings = load_recipe(recipe, overrides or [])
    try:
        evaluate(settings, questions, images, output, gray=gray, checkpoint=checkpoint, max_new_tokens=max_new_tokens)
    finally:
        groups.shut_down()


@app.command()
def verify(
    prefix: Annotated[Path, typer.Argument(help="PREFIX of the shard's files")],
    threads: Annotated[int | None, typer.Option(min=1, help="that read and decode images (default: up to 8)")] = None,
) -> None:
    """Reads every byte of a shard again: sizes, checksums, counts, every image decoded. All damage is named with its document; exit code 2."""
    from megatron_infimed.preprocess.verify import verify, watched

    with watched() as told:
        manifest = verify(prefix, threads, told)
    print(f"{prefix}: sound: {manifest['documents']:,} documents, {manifest['distinct_images']:,} images, {len(manifest['files'])} files")


def run(command: typer.Typer) -> None:
    """Runs a typer app under the project's error rule; the tools/ scripts use it too."""
    if not os.environ.get("MEGATRON_INFIMED_WARNINGS"):
        warnings.simplefilter(
            "ignore"
        )  # Megatron-Core says a dozen times at import that Transformer Engine is not there; `check` says it once
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    try:
        command()
    except UserError as e:
        print(f"error: {e}" if rank == "0" else f"error (rank {rank}): {e}", file=sys.stderr)
        notes.write("why", str(e))
        sys.exit(2)
    except Exception as e:
        notes.write("crash", f"{type(e).__name__} on rank {rank}: {' '.join(str(e).split())}"[:500])
        raise


def main() -> None:
    run(app)
