"""Fresh weights that do not depend on the layout.

Each weight is drawn whole from a generator seeded by its checkpoint name, and a process keeps its part. So the same recipe and seed start
from the same numbers under any tensor and pipeline size, and a run can be compared across layouts from its very first step.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from megatron_infimed.config import Recipe
from megatron_infimed.model.infimed import InfiMed


@torch.no_grad()
def initialize_weights(model: InfiMed, recipe: Recipe) -> None:
    """Norms to one, biases to zero, everything else normal with model.init_std (null: width ** -0.5 of its part)."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
    width = {
        "vision_tower": recipe.model.vision.hidden_size,
        "projector": recipe.model.vision.hidden_size,
        "language_model": recipe.model.language.hidden_size,
    }
    for tensor in _sharded_tensors(model.sharded_state_dict()):
        assert tensor.data is not None
        if tensor.key.endswith("bias"):
            tensor.data.zero_()
        elif "norm" not in tensor.key:
            std = recipe.model.init_std or width[tensor.key.split(".")[0]] ** -0.5
            tensor.data.copy_(_draw(tensor, std, recipe.seed))


def _sharded_tensors(state: dict) -> Iterator[ShardedTensor]:
    for value in state.values():
        if isinstance(value, ShardedTensorFactory):
            value = value.build()
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, ShardedTensor) and item.data is not None and item.data.is_floating_point():
                yield item


def _draw(tensor: ShardedTensor, std: float, seed: int) -> torch.Tensor:
    layer = tensor.global_offset[: tensor.prepend_axis_num]
    shape, offset = tensor.global_shape[tensor.prepend_axis_num :], tensor.global_offset[tensor.prepend_axis_num :]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {tensor.key} {layer}".encode()))
    whole = torch.randn(shape, generator=generator).mul_(std)
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, tensor.local_shape, strict=True))]
