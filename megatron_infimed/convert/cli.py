"""The command line of tools/convert_checkpoint.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help="Checkpoints from and to Hugging Face.")


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command("import")
def import_(
    language: Annotated[Path, typer.Option(help="Hugging Face folder of a Qwen3 model.")],
    vision: Annotated[Path, typer.Option(help="Hugging Face folder of a SigLIP model.")],
    output: Annotated[Path, typer.Option(help="New run directory; a recipe starts from it with init_from.")],
    feature_layer: Annotated[int, typer.Option(help="SigLIP layer whose output is the feature, from the end.")] = -2,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: as stored, float32 where the two differ.")] = None,
    seed: Annotated[int, typer.Option(help="Of the fresh projector.")] = 1234,
) -> None:
    """Makes a starting checkpoint from Qwen3 and SigLIP folders of any size, with a fresh projector."""
    from megatron_infimed.convert.start import import_checkpoint

    with _alone():
        made = import_checkpoint(language, vision, output, feature_layer=feature_layer, dtype=dtype.value if dtype else None, seed=seed)
    state = made.state
    typer.echo(f"{made.path}: {state['recipe']['precision']['params']}, {len(state['imported']['left_out'])} source tensors not needed")


@app.command("export")
def export_(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder, or a run directory (its newest checkpoint).")],
    output: Annotated[Path, typer.Option(help="New folder, or an earlier export to replace.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Hugging Face tokenizer folder. Default: the recipe's.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: as in the checkpoint.")] = None,
) -> None:
    """Turns a checkpoint of any layout into a stock LlavaForConditionalGeneration folder, audited tensor by tensor."""
    from megatron_infimed.convert.export import export

    with _alone():
        made = export(checkpoint, output, tokenizer=tokenizer, dtype=dtype.value if dtype else None)
    typer.echo(f"{made}: LlavaForConditionalGeneration, every tensor audited (conversion.json)")


@contextmanager
def _alone() -> Iterator[None]:
    """One process, whose groups end with it."""
    from megatron_infimed import log
    from megatron_infimed.parallel import groups

    log.set_up()
    try:
        yield
    finally:
        groups.shut_down()
