"""Floating point operations of a global batch, from its real document lengths and patches: what was useful, and what was executed.

Only matrix products count, 2 m n k each; norms, activations, RoPE, pooling, the optimizer and embedding look-ups are left out. Forward:
    tower       an image of P patches   2 P (3 p^2) C  +  layers (2 P C (4 C + 2 F) + 4 P^2 C)         p: side of a patch, C wide, F in the MLP
    projector   a visual token          2 (C H + H^2)
    language    a token                 2 layers H ((2 A + 2 G) D + 3 F)                               A heads, G of keys and values, D wide
    attention   a pair                  4 layers A D                                                   a token and one it sees, itself included
    output      a target                2 H V
A document of l tokens has l (l + 1) / 2 pairs (Counts.pairs). The gradient of a matrix product with respect to its weight costs the forward
once, and with respect to its input once more; what is frozen needs no weight gradient, and below the lowest part that learns nothing needs
an input gradient. Attention has two products of two inputs each, so its backward is twice the forward.

Executed, besides: padding; what is recomputed; the scores, which every fused kernel computes again in its backward (half a forward); all but
the last of the output layer's blocks (model/loss.py). Not counted: the blank images that some layouts and FP8 fill up with. Apart from those
parallel layouts share the work out, they do not change the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from megatron_infimed.config import Recipe
from megatron_infimed.counts import Counts


@dataclass(frozen=True)
class Work:
    """FLOPs, forward and backward."""

    model: float = 0.0
    """What the gradients need: no padding, nothing twice."""
    hardware: float = 0.0
    """What was executed."""

    def __add__(self, other: Work) -> Work:
        return Work(self.model + other.model, self.hardware + other.hardware)


class Peak(NamedTuple):
    """FLOP/s a GPU cannot exceed, dense. fp8 is None where it has no such units."""

    bf16: float
    fp8: float | None


# By what the device's name contains, first match. NVIDIA's data sheets (H100 and H200: their figures "with sparsity", halved).
PEAKS = {
    "H100 PCIe": Peak(756e12, 1513e12),
    "H100 NVL": Peak(835e12, 1671e12),
    "H200 NVL": Peak(835e12, 1671e12),
    "H100": Peak(989e12, 1979e12),
    "H200": Peak(989e12, 1979e12),
    "A100": Peak(312e12, None),
}


def peak_of(device_name: str) -> Peak | None:
    """As torch.cuda.get_device_name names it; None for one that is not in PEAKS."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def step_flops(recipe: Recipe, counts: Counts, image_size: int) -> dict[str, Work]:
    """Work of a global batch, by part: tower, projector, language, attention (the language model's), output.

    Args:
        counts: of the whole global batch.
        image_size: pixels along a side in this phase.
    """
    lm, again = recipe.model.language, recipe.precision.recompute.language
    learns = recipe.trainable.language
    tokens = counts.text_tokens + counts.image_tokens
    rows = tokens + counts.padding
    projections = 2 * lm.num_layers * lm.hidden_size * 2 * (lm.num_heads + lm.num_kv_heads) * lm.head_dim
    mlp = 2 * lm.num_layers * lm.hidden_size * 3 * lm.ffn_hidden_size
    pair, target = 4 * lm.num_layers * lm.num_heads * lm.head_dim, 2 * lm.hidden_size * lm.vocab_size
    # Whatever learns is in the language model or below it, so gradients run through all of it: even a frozen one has input gradients.
    return {
        "tower": _tower(recipe, image_size, counts.images),
        "projector": _projector(recipe, counts.image_tokens),
        "language": _linear(projections * tokens, projections * rows, learns, True, again == "full")
        + _linear(mlp * tokens, mlp * rows, learns, True, again in ("full", "mlp")),
        "attention": _attention(pair * counts.pairs, pair * (counts.pairs + counts.padding_pairs), True, again == "full"),
        "output": _linear(target * counts.target_tokens, target * counts.target_tokens, learns, True, _output_again(recipe, counts)),
    }


def _output_again(recipe: Recipe, counts: Counts) -> float:
    """Share of the output layer's forward that is computed again, taking every micro-batch for an average one."""
    batch = recipe.batch
    targets = counts.target_tokens * batch.micro_rows / batch.rows / recipe.parallel.context
    blocks = max(1, math.ceil(targets / batch.loss_tokens))
    return 1 - 1 / blocks


def _tower(recipe: Recipe, image_size: int, images: int) -> Work:
    v, learns = recipe.model.vision, recipe.trainable.vision
    again = learns and recipe.precision.recompute.vision == "full"
    patches, width = (image_size // v.patch_size) ** 2, v.hidden_size
    embedding = images * 2 * patches * 3 * v.patch_size**2 * width
    linear = images * 2 * v.built_layers * patches * width * (4 * width + 2 * v.ffn_hidden_size)
    pairs = images * 4 * v.built_layers * patches**2 * width
    work = _linear(embedding, embedding, learns, False)
    return work + _linear(linear, linear, learns, learns, again) + _attention(pairs, pairs, learns, again)


def _projector(recipe: Recipe, visual_tokens: int) -> Work:
    width, learns, below = recipe.model.language.hidden_size, recipe.trainable.projector, recipe.trainable.vision
    first, second = (2 * visual_tokens * inputs * width for inputs in (recipe.model.vision.hidden_size, width))
    unasked = first if learns and not below else 0  # Megatron-Core's linear layers never leave the input gradient out
    return _linear(first, first, learns, below) + _linear(second, second, learns, learns or below) + Work(0, unasked)


def _linear(useful: int, executed: int, weight: bool, inputs: bool, again: float = 0) -> Work:
    """From the forward's FLOPs: which gradients are needed, and how much of the forward is computed again for them."""
    factor = 1 + weight + inputs
    return Work(useful * factor, executed * (factor + again))


def _attention(useful: int, executed: int, backward: bool, again: bool) -> Work:
    return Work(useful * (1 + 2 * backward), executed * (1 + 2.5 * backward + again))
