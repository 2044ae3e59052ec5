"""Memory of the rank that needs most, put together from the trace of one micro-batch.

What stays: weights; float32 gradients of what learns (Megatron's buffers); the optimizer's float32 weights and two moments, shared out over
the data and context parallel ranks (float32 weights are their own). Frozen parts have weights alone. What comes and goes: each micro-batch in
flight keeps its activations, and the last of them passes through moments that need something on top: tower and embedding, a layer, the loss, a
layer's backward (when a tied output weight's gradient waits for the embedding's), the embedding's backward; then the optimizer's step. A rank's
peak is the highest of these. Under 1F1B stage s of p has p - s micro-batches in flight, interleaved with v pieces
2 (p - s - 1) + (v - 1) p + 1 pieces of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_infimed.config import ParallelConfig, Recipe
from megatron_infimed.data.batch import PackedBatch
from megatron_infimed.estimate.hardware import Gpu
from megatron_infimed.estimate.trace import LAYERS, Trace, Weights, trace, traced_step
from megatron_infimed.model import presets


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that needs most."""

    stage: int
    """Its pipeline stage, from 0."""
    weights: int
    fp8_copies: int
    gradients: int
    optimizer: int
    batch: int
    """Tokens and images of a micro-batch."""
    activations: int
    """Kept for the backward pass by all micro-batches in flight, and buffers."""
    moments: dict[str, int]
    """What each moment of a step needs, kept activations included; the highest counts."""
    allowance: int
    """CUDA context, libraries, NCCL's buffers and what the allocator cannot use."""

    @property
    def highest(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def total(self) -> int:
        kept = self.weights + self.fp8_copies + self.gradients + self.optimizer + self.batch
        return kept + self.moments[self.highest] + self.allowance


def stage_layers(recipe: Recipe) -> list[int]:
    """Language layers of each pipeline stage."""
    p, layers = recipe.parallel, recipe.model.language.num_layers
    if p.first_stage_layers is None:
        return [layers // p.pipeline] * p.pipeline
    return [p.first_stage_layers] + [(layers - p.first_stage_layers) // (p.pipeline - 1)] * (p.pipeline - 1)


def memory(recipe: Recipe, world: int, gpu: Gpu, batch: PackedBatch | None = None) -> Memory:
    """Of the rank that needs most. The recipe must suit `world` processes.

    Args:
        batch: a micro-batch without its images; by default the worst one, see trace.worst_batch.
    """
    seen = trace(recipe, gpu.is_cuda, batch)
    return max((_on_stage(recipe, world, gpu, seen, s) for s in range(recipe.parallel.pipeline)), key=lambda m: m.total)


def _on_stage(recipe: Recipe, world: int, gpu: Gpu, seen: Trace, stage: int) -> Memory:
    p, precision = recipe.parallel, recipe.precision
    size, data_ranks = presets.params_dtype(recipe).itemsize, world // (p.tensor * p.pipeline)
    weights = stage_weights(recipe, seen, stage)
    shard = -(-weights.trained // data_ranks)
    kept, moments = _moments(recipe, seen, stage, in_flight(p, stage, micro_batches(recipe, world)))
    if not gpu.is_cuda or precision.layers == "local":  # torch's Adam; Transformer Engine's makes nothing on the side
        moments["optimizer step"] = seen.buffers + round(shard * traced_step())
    fp8 = _fp8_copies(recipe, seen, stage)
    static = weights.all * size + fp8 + weights.trained * 4
    optimizer = shard * (8 if precision.params == "float32" else 12)
    return Memory(
        stage=stage,
        weights=weights.all * size,
        fp8_copies=fp8,
        gradients=weights.trained * 4,
        optimizer=optimizer,
        batch=seen.batch,
        activations=kept,
        moments=moments,
        allowance=gpu.allowance(static + optimizer + seen.batch + max(moments.values())),
    )


def micro_batches(recipe: Recipe, world: int) -> int:
    """That a process pushes through in a step."""
    return recipe.batch.rows // recipe.batch.micro_rows // (world // recipe.parallel.model_parallel)


def in_flight(p: ParallelConfig, stage: int, micro: int) -> tuple[int, int]:
    """Pieces of the model whose activations a stage keeps at once, over all micro-batches; and how many of them are the first piece."""
    if p.virtual == 1:
        pieces = min(p.pipeline - stage, micro)
        return pieces, pieces
    everything = micro * p.virtual
    pieces = everything if micro == p.pipeline else min((p.pipeline - stage - 1) * 2 + (p.virtual - 1) * p.pipeline + 1, everything)
    rounds, rest = divmod(pieces, p.pipeline * p.virtual)  # p micro-batches go through piece 0, then through piece 1, ...
    return pieces, rounds * p.pipeline + min(rest, p.pipeline)


def stage_weights(recipe: Recipe, seen: Trace, stage: int) -> Weights:
    p, tied = recipe.parallel, recipe.model.language.tied_embeddings
    out = seen.layer * stage_layers(recipe)[stage]
    if stage == 0:
        out += seen.embedding + seen.tower + seen.tower_layer * recipe.model.vision.built_layers
    if stage == p.pipeline - 1:
        out += seen.norm + (seen.embedding if tied and p.pipeline > 1 else seen.output)
    return out


def _moments(recipe: Recipe, seen: Trace, stage: int, flight: tuple[int, int]) -> tuple[int, dict[str, int]]:
    """What all micro-batches in flight keep, and what each moment needs, that included."""
    p = recipe.parallel
    first, last, alone = stage == 0, stage == p.pipeline - 1, p.pipeline == 1
    layers = stage_layers(recipe)[stage] // p.virtual
    more_tower = seen.tower_kept * (recipe.model.vision.built_layers - LAYERS)
    before = seen.embed_kept + more_tower if first else seen.hidden
    pieces, first_pieces = flight
    own = before + layers * seen.layer_kept
    kept = first_pieces * before + (pieces - first_pieces) * seen.hidden + pieces * layers * seen.layer_kept
    others = kept - own
    left, left_at_embed = (seen.head_left, seen.left_at_embed) if alone else (seen.hidden, seen.hidden)
    moments = {
        "layer forward": kept - seen.layer_kept + seen.layer_forward,
        "layer backward": kept + left + seen.layer_backward,
    }
    if last:
        moments["loss"] = kept + seen.head_peak
    if first:
        moments["tower and embedding forward"] = others + more_tower + seen.embed_forward
        moments["tower and embedding backward"] = others + before + left_at_embed + seen.embed_backward
    return kept + seen.buffers, {name: size + seen.buffers for name, size in moments.items()}


def _fp8_copies(recipe: Recipe, seen: Trace, stage: int) -> int:
    """Transformer Engine keeps the weights of FP8 layers in FP8 too, and transposed: 2 bytes a parameter."""
    precision = recipe.precision
    if precision.fp8 == "off":
        return 0
    layers = stage_layers(recipe)[stage] * ("language" in precision.fp8_parts)
    tower = recipe.model.vision.built_layers * ("vision" in precision.fp8_parts and stage == 0)
    return 2 * (seen.layer.all * layers + seen.tower_layer.all * tower)
