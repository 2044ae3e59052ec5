"""The one table of names: a Megatron-Core weight <-> the Hugging Face weights that hold the same numbers. Import and export both read it.

`*` stands for the layer number. Most rows are one tensor on either side. Two kinds are laid out differently:
  qkv    Megatron keeps one matrix; for each group of queries it stacks the group's query heads, its key head, its value head.
         Hugging Face has q, k and v apart. (The tower has as many groups as heads.)
  gated  Megatron stacks gate and up of a gated MLP; Hugging Face has both.
Names on our side are those of `InfiMed.state_dict()` with local layers. On the other side they are those of Qwen3ForCausalLM, of SigLIP's
vision model (without a prefix) and of LLaVA's projector; PREFIX puts them where LlavaForConditionalGeneration has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_infimed.config import ModelConfig

Part = Literal["vision", "projector", "language"]
Kind = Literal["same", "qkv", "gated"]

OURS: dict[Part, str] = {"vision": "vision_tower.", "projector": "projector.", "language": "language_model."}
PREFIX: dict[Part, str] = {"vision": "vision_tower.vision_model.", "projector": "multi_modal_projector.", "language": "language_model."}

_VISION = (
    ("patch_embedding.weight", "embeddings.patch_embedding.weight"),
    ("patch_embedding.bias", "embeddings.patch_embedding.bias"),
    ("position_embedding", "embeddings.position_embedding.weight"),
    ("decoder.layers.*.input_layernorm.{weight,bias}", "encoder.layers.*.layer_norm1.{weight,bias}"),
    ("decoder.layers.*.self_attention.linear_qkv.{weight,bias}", "encoder.layers.*.self_attn.[q_proj|k_proj|v_proj].{weight,bias}"),
    ("decoder.layers.*.self_attention.linear_proj.{weight,bias}", "encoder.layers.*.self_attn.out_proj.{weight,bias}"),
    ("decoder.layers.*.pre_mlp_layernorm.{weight,bias}", "encoder.layers.*.layer_norm2.{weight,bias}"),
    ("decoder.layers.*.mlp.linear_fc1.{weight,bias}", "encoder.layers.*.mlp.fc1.{weight,bias}"),
    ("decoder.layers.*.mlp.linear_fc2.{weight,bias}", "encoder.layers.*.mlp.fc2.{weight,bias}"),
)
_PROJECTOR = (
    ("linear_fc1.{weight,bias}", "linear_1.{weight,bias}"),
    ("linear_fc2.{weight,bias}", "linear_2.{weight,bias}"),
)
_LANGUAGE = (
    ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    ("decoder.layers.*.input_layernorm.weight", "model.layers.*.input_layernorm.weight"),
    ("decoder.layers.*.self_attention.linear_qkv.weight", "model.layers.*.self_attn.[q_proj|k_proj|v_proj].weight"),
    ("decoder.layers.*.self_attention.q_layernorm.weight", "model.layers.*.self_attn.q_norm.weight"),
    ("decoder.layers.*.self_attention.k_layernorm.weight", "model.layers.*.self_attn.k_norm.weight"),
    ("decoder.layers.*.self_attention.linear_proj.weight", "model.layers.*.self_attn.o_proj.weight"),
    ("decoder.layers.*.pre_mlp_layernorm.weight", "model.layers.*.post_attention_layernorm.weight"),
    ("decoder.layers.*.mlp.linear_fc1.weight", "model.layers.*.mlp.[gate_proj|up_proj].weight"),
    ("decoder.layers.*.mlp.linear_fc2.weight", "model.layers.*.mlp.down_proj.weight"),
    ("decoder.final_layernorm.weight", "model.norm.weight"),
    ("output_layer.weight", "lm_head.weight"),  # where embeddings are not tied
)
_KIND: dict[int, Kind] = {1: "same", 2: "gated", 3: "qkv"}


@dataclass(frozen=True)
class Entry:
    """One weight of ours and the one, two or three of Hugging Face that hold the same numbers."""

    part: Part
    ours: str
    """Name in InfiMed.state_dict()."""
    theirs: tuple[str, ...]
    """Names in the folder of the part alone."""
    kind: Kind
    groups: int
    heads: int
    """Query heads of one group."""

    @property
    def exported(self) -> tuple[str, ...]:
        """Names in the exported LlavaForConditionalGeneration."""
        return tuple(PREFIX[self.part] + name for name in self.theirs)

    def split(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Our weight as Hugging Face's."""
        if self.kind == "same":
            return (ours,)
        if self.kind == "gated":
            return tuple(ours.chunk(2))
        rest = ours.shape[1:]
        grouped = ours.view(self.groups, self.heads + 2, -1, *rest)  # [groups, heads of the group + key + value, head size, ...]
        return tuple(part.reshape(-1, *rest) for part in grouped.split([self.heads, 1, 1], dim=1))

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Hugging Face's weights as ours."""
        if self.kind == "same":
            return theirs[0]
        if self.kind == "gated":
            return torch.cat(tuple(theirs))
        rest = theirs[0].shape[1:]
        size = theirs[1].shape[0] // self.groups
        grouped = [part.reshape(self.groups, -1, size, *rest) for part in theirs]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)


def entries(model: ModelConfig) -> list[Entry]:
    """The table written out for a model: every weight it has, once."""
    v, lm = model.vision, model.language
    parts: tuple[tuple[Part, tuple[tuple[str, str], ...], int, int, int], ...] = (
        ("vision", _VISION, v.built_layers, v.num_heads, 1),
        ("projector", _PROJECTOR, 0, 1, 1),
        ("language", _LANGUAGE, lm.num_layers, lm.num_kv_heads, lm.num_heads // lm.num_kv_heads),
    )
    out = []
    for part, rows, layers, groups, heads in parts:
        for ours, theirs in rows:
            if ours == "output_layer.weight" and lm.tied_embeddings:
                continue
            for our_name, their_name in _variants(ours, theirs):
                for layer in range(layers if "*" in our_name else 1):
                    names = tuple(n.replace("*", str(layer)) for n in _alternatives(their_name))
                    out.append(Entry(part, OURS[part] + our_name.replace("*", str(layer)), names, _KIND[len(names)], groups, heads))
    return out


def _variants(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    """`{weight,bias}` stands for two rows."""
    for word in ("weight", "bias") if "{weight,bias}" in ours else ("",):
        yield ours.replace("{weight,bias}", word), theirs.replace("{weight,bias}", word)


def _alternatives(name: str) -> list[str]:
    """`a.[q|k|v].b` stands for several tensors of one row."""
    if "[" not in name:
        return [name]
    head, _, rest = name.partition("[")
    words, _, tail = rest.partition("]")
    return [head + word + tail for word in words.split("|")]
