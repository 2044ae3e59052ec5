"""The SigLIP tower: patches, position embeddings, transformer blocks up to the feature layer, then average pooling to the phase's grid.

Position embeddings are learned for one size and interpolated for the others exactly as Hugging Face does (bicubic), so one set of weights
serves the whole resolution schedule. Pooling comes before the projector; at equal grids it is the identity.
N images, S pixels along a side, P patches, C width of the tower, t = tokens an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_infimed.config import Recipe
from megatron_infimed.model import presets, specs


class VisionTower(MegatronModule):
    """uint8 pixels [N, 3, S, S] -> features [N, P, C] of the feature layer."""

    def __init__(self, recipe: Recipe) -> None:
        config = presets.vision_config(recipe)
        super().__init__(config=config)
        v, layers = recipe.model.vision, recipe.precision.layers
        self.patch_size, self.grid = v.patch_size, v.grid
        dtype = config.params_dtype
        self.patch_embedding = nn.Conv2d(3, v.hidden_size, v.patch_size, stride=v.patch_size, dtype=dtype)
        self.position_embedding = nn.Parameter(torch.empty(v.grid**2, v.hidden_size, dtype=dtype))
        self.decoder = TransformerBlock(
            config=config,
            spec=specs.block(specs.vision_layer(layers), v.built_layers, layers),
            post_process=False,  # the features are taken before SigLIP's final norm
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        images, dtype = len(pixels), self.patch_embedding.weight.dtype
        if self.config.fp8 and images % 16:  # FP8 kernels take multiples of 16 tokens, and 729 patches are odd
            pixels = torch.cat([pixels, pixels.new_zeros(-images % 16, *pixels.shape[1:])])
        scaled = (pixels.to(torch.float32) / 127.5 - 1.0).to(dtype)  # mean = std = 0.5 of SigLIP's processor
        patches_NCHW = self.patch_embedding(scaled)
        x_NPC = patches_NCHW.flatten(2).transpose(1, 2) + self.positions(patches_NCHW.shape[-1])
        x_PNC = self.decoder(x_NPC.transpose(0, 1).contiguous(), attention_mask=None)
        return x_PNC.transpose(0, 1)[:images]

    def positions(self, side: int) -> Tensor:
        """Position embeddings [side * side, C] for a grid of side x side patches."""
        if side == self.grid:
            return self.position_embedding
        grid = self.position_embedding.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).reshape(side * side, -1)


def pool(features_NPC: Tensor, tokens_per_image: int) -> Tensor:
    """Adaptive average pooling of the square patch grid: [N, P, C] -> [N, t, C]."""
    n, p, c = features_NPC.shape
    if p == tokens_per_image:
        return features_NPC
    side, wanted = round(p**0.5), round(tokens_per_image**0.5)
    grid_NCHW = features_NPC.transpose(1, 2).reshape(n, c, side, side)
    return F.adaptive_avg_pool2d(grid_NCHW, wanted).flatten(2).transpose(1, 2)
