"""The only place that builds a TransformerConfig: the recipe's sizes in Megatron-Core's terms."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_infimed.config import Recipe
from megatron_infimed.optional import use_transformer_engine

_gelu_tanh = partial(F.gelu, approximate="tanh")


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def language_config(recipe: Recipe) -> TransformerConfig:
    """Qwen3: RMSNorm, SwiGLU, grouped queries, norm on queries and keys, no biases."""
    lm, parallel, te = recipe.model.language, recipe.parallel, use_transformer_engine(recipe.precision.layers)
    return TransformerConfig(
        **_common(recipe, recipe.precision.recompute.language, recipe.model.dropout),
        **_fp8(recipe, "language"),
        num_layers=lm.num_layers,
        hidden_size=lm.hidden_size,
        num_attention_heads=lm.num_heads,
        num_query_groups=lm.num_kv_heads,
        kv_channels=lm.head_dim,
        ffn_hidden_size=lm.ffn_hidden_size,
        layernorm_epsilon=lm.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        apply_rope_fusion=te,
        pipeline_model_parallel_size=parallel.pipeline,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        overlap_p2p_comm=parallel.virtual > 1,  # interleaving is wrong with batched sends on gloo, and slower on NCCL
        batch_p2p_comm=parallel.virtual == 1,
        context_parallel_size=parallel.context,
        pipeline_dtype=params_dtype(recipe),
        sequence_parallel=parallel.sequence,
        calculate_per_token_loss=True,  # before DDP is built, else gradients are scaled wrongly and only grad_norm shows it
        finalize_model_grads_func=finalize_model_grads,
    )


def vision_config(recipe: Recipe) -> TransformerConfig:
    """SigLIP: LayerNorm, GELU (tanh), biases everywhere. It lives whole on the first pipeline stage."""
    v = recipe.model.vision
    return TransformerConfig(
        **_common(recipe, recipe.precision.recompute.vision),
        **_fp8(recipe, "vision"),
        num_layers=v.built_layers,
        hidden_size=v.hidden_size,
        num_attention_heads=v.num_heads,
        ffn_hidden_size=v.ffn_hidden_size,
        layernorm_epsilon=v.layernorm_eps,
        normalization="LayerNorm",
        activation_func=_gelu_tanh,
        add_bias_linear=True,
        add_qkv_bias=True,
    )


def projector_config(recipe: Recipe) -> TransformerConfig:
    """Linear, exact GELU, Linear, both with bias, as LLaVA's."""
    hidden = recipe.model.language.hidden_size
    return TransformerConfig(
        **_common(recipe, "none"),
        num_layers=1,
        hidden_size=hidden,
        ffn_hidden_size=hidden,
        num_attention_heads=recipe.model.language.num_heads,
        activation_func=F.gelu,
        add_bias_linear=True,
    )


def params_dtype(recipe: Recipe) -> torch.dtype:
    return getattr(torch, recipe.precision.params)


_RECOMPUTE = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _common(recipe: Recipe, recompute: str, dropout: float = 0.0) -> dict:
    return {
        "tensor_model_parallel_size": recipe.parallel.tensor,
        "params_dtype": params_dtype(recipe),
        "bf16": recipe.precision.params == "bfloat16",
        "hidden_dropout": dropout,
        "attention_dropout": 0.0,
        # model/initialize.py fills the weights, the same for every layout. (Not perform_initialization=False: the layers would then not mark
        # which weights are split, and the gradient norm would count half of them.)
        "init_method": _leave_as_is,
        "output_layer_init_method": _leave_as_is,
        "embedding_init_method": _leave_as_is,
        # On the meta device too: with CUDA the layers would else name the GPU themselves, and take its memory.
        "use_cpu_initialization": not torch.cuda.is_available() or torch.get_default_device().type == "meta",
        # The fusions are CUDA kernels of apex or Transformer Engine; without them these must be off.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        **_RECOMPUTE[recompute],
    }


def _fp8(recipe: Recipe, part: str) -> dict:
    precision = recipe.precision
    # Whatever region of FP8 ends reduces the maxima of all, over the processes that are sure to come by: not every row has images.
    shared = {"tp_only_amax_red": precision.fp8 != "off" and "vision" in precision.fp8_parts}
    if precision.fp8 == "off" or part not in precision.fp8_parts:
        return shared
    first, last = (precision.fp8_first, precision.fp8_last) if part == "language" else (0, 0)
    ends = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": first, "num_layers_at_end_in_bf16": last}
    return {"fp8": "hybrid", "fp8_recipe": precision.fp8, **shared, **(ends if first or last else {})}
