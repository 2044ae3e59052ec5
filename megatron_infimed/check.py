"""`check`: what a recipe would train, and with what, found out on any machine in seconds.

The full-size model is built on torch's meta device: every layer and every shape is real, no memory is taken.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_infimed.config import ParallelConfig, Recipe
from megatron_infimed.data.decode import decoder_name
from megatron_infimed.errors import UserError
from megatron_infimed.model import specs
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.optional import use_transformer_engine
from megatron_infimed.parallel import groups


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Counts of the whole model, over all ranks."""

    language: int
    vision: int
    projector: int


def count_parameters(recipe: Recipe) -> Parameters:
    """Builds the whole model (one process, meta device) and counts."""
    plain = recipe.precision.model_copy(update={"layers": "local", "fp8": "off"})
    alone = recipe.model_copy(update={"parallel": ParallelConfig(), "precision": plain})
    ranks = groups.initialize(alone.parallel)
    try:
        with torch.device("meta"):
            model = InfiMed(alone, ranks)
        parts = (model.language_model, model.vision_tower, model.projector)
        return Parameters(*(sum(p.numel() for p in part.parameters()) for part in parts if part is not None))
    finally:
        groups.shut_down()


def report(recipe: Recipe, processes: int | None = None) -> str:
    """Lines for people.

    Raises:
        UserError: the layout does not suit `processes`.
    """
    if problems := recipe.problems(processes):
        raise UserError("\n".join([f"{len(problems)} problems in the recipe", *(f"  {p}" for p in problems)]))
    counts, parallel = count_parameters(recipe), recipe.parallel
    learns = recipe.trainable
    tokens = recipe.batch.rows * recipe.data.capacity
    layers = recipe.precision.layers
    unavailable = " (not here)" if recipe.precision.fp8 != "off" and not use_transformer_engine(layers) else ""
    lines = [
        f"stage            {recipe.stage}",
        f"language model   {counts.language / 1e9:.3f} B parameters{_state(learns.language)}",
        f"vision tower     {counts.vision / 1e9:.3f} B parameters{_state(learns.vision)} "
        f"({recipe.model.vision.built_layers} of {recipe.model.vision.num_layers} layers, feature layer {recipe.model.vision.feature_layer})",
        f"projector        {counts.projector / 1e9:.3f} B parameters{_state(learns.projector)}",
        *(
            f"phase {i}          until {p.until:.0%}: {p.image_size} px, {p.tokens_per_image} tokens an image"
            for i, p in enumerate(recipe.schedule)
        ),
        f"tokens a step    {tokens:,} ({recipe.batch.rows} rows of {recipe.data.capacity:,})",
        f"layout           tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}"
        f"{', sequence parallel' if parallel.sequence else ''}"
        + (f", data {processes // parallel.model_parallel} on {processes} processes" if processes else ""),
        f"precision        {recipe.precision.params}, FP8 {recipe.precision.fp8}{unavailable}, recompute {_recompute(recipe)}",
        f"layers here      {'Transformer Engine' if use_transformer_engine(layers) else 'Megatron-Core local'}",
        f"attention here   {specs.attention_kernel(layers)}",
        f"decoder here     {decoder_name(recipe.data.decoder)}",
    ]
    return "\n".join(lines)


def _recompute(recipe: Recipe) -> str:
    return ", ".join(f"{part} {mode}" for part, mode in recipe.precision.recompute.model_dump().items())


def _state(learns: bool) -> str:
    return ", trained" if learns else ", frozen"
