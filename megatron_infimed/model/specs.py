"""Which classes make up a transformer layer: Transformer Engine's where it is there and asked for, Megatron-Core's own ones otherwise.

Both name their checkpoint entries alike (Megatron-Core maps the separate norms of the local layer to the fused names of Transformer
Engine's), so a checkpoint written with one loads into the other.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_infimed.model.attention import PackedAttention
from megatron_infimed.optional import available, use_transformer_engine


class Norm:
    """torch's RMSNorm or LayerNorm. Unlike Megatron-Core's wrapper it allows sequence parallelism: it marks its weights for the reduction."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused) -> nn.Module:
        norm = (nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm)(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def language_layer(layers: str) -> ModuleSpec:
    """One Qwen3 layer. `layers`: precision.layers of the recipe."""
    if use_transformer_engine(layers):
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    return _local(causal=True, qk_layernorm=True)


def vision_layer(layers: str) -> ModuleSpec:
    """One SigLIP layer: the same, seeing every patch (the stock ViT spec of 0.16.1 is causal)."""
    if use_transformer_engine(layers):
        spec: Any = copy.deepcopy(get_gpt_layer_with_transformer_engine_spec(qk_layernorm=False))
        spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
        return spec
    return _local(causal=False, qk_layernorm=False)


def language_block(config: TransformerConfig, layers: str, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The Qwen3 layers of this process's pipeline stage, or of one piece of it."""
    return block(language_layer(layers), get_num_layers_to_build(config, vp_stage), layers)


def block(layer: ModuleSpec, num_layers: int, layers: str) -> TransformerBlockSubmodules:
    """`num_layers` equal layers and the final norm (which only a block with post_process builds)."""
    if use_transformer_engine(layers):
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)  # type: ignore[arg-type]
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)  # type: ignore[arg-type]


def projector_submodules() -> MLPSubmodules:
    """The projector is small: plain parallel linear layers everywhere."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _local(causal: bool, qk_layernorm: bool) -> ModuleSpec:
    spec: Any = copy.deepcopy(get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm"))
    layer, attention = spec.submodules, spec.submodules.self_attention
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention.params = {"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask}
    attention.submodules.core_attention = PackedAttention
    if qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = Norm
    return spec


def attention_kernel(layers: str) -> str:
    """What will compute attention here, for `check` and the logs."""
    if use_transformer_engine(layers):
        return "Transformer Engine, packed (THD)"
    if not torch.cuda.is_available():
        return "torch SDPA, one call a document"
    return "flash-attn, packed" if available("flash_attn") else "torch varlen_attn, packed"
