"""Attention inside a packed row, without Transformer Engine.

Documents that share a row must not see each other. Rather than mask a T x T square, the row is cut at the documents' ends (`cu_seqlens`) and
each piece goes through torch's scaled_dot_product_attention by itself: cost grows with the sum of squared document lengths, not with the
squared row. On CUDA one call of torch.nn.attention.varlen does the same. The image tower has no documents: its [patches, images] block is
one full, unmasked attention. Megatron-Core calls this class as `core_attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class PackedAttention(MegatronModule):
    """core_attention for both parts of the model. Shapes: T tokens, S patches, B images, A heads, G key-value heads, D head size."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_unused) -> None:
        super().__init__(config=config)
        self.causal = attn_mask_type != AttnMaskType.no_mask

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[T, A, D], [T, G, D] with packed_seq_params -> [T, A*D]; [S, B, A, D] without -> [S, B, A*D]."""
        if packed_seq_params is None:
            out_BASD = F.scaled_dot_product_attention(
                *(x.permute(1, 2, 0, 3) for x in (query, key, value)), is_causal=self.causal, enable_gqa=True
            )
            return out_BASD.permute(2, 0, 1, 3).flatten(2)
        if query.is_cuda:
            return _varlen(query, key, value, packed_seq_params)
        return _segments(query, key, value, packed_seq_params.cu_seqlens_q)


def _segments(query_TAD: Tensor, key_TGD: Tensor, value_TGD: Tensor, cu_seqlens: Tensor) -> Tensor:
    # split, not slices: the backward of each slice writes a zero tensor as large as the row
    lengths = cu_seqlens.diff().tolist()
    parts = [
        F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, enable_gqa=True)
        for q, k, v in zip(query_TAD.split(lengths), key_TGD.split(lengths), value_TGD.split(lengths), strict=True)
    ]
    return torch.cat([part.transpose(0, 1) for part in parts]).flatten(1)


def _varlen(query_TAD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packed: PackedSeqParams) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query_TAD.size(1) // key_TGD.size(1)
    key_TAD, value_TAD = (x.repeat_interleave(groups, dim=1) for x in (key_TGD, value_TGD))
    cu, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    return varlen_attn(query_TAD, key_TAD, value_TAD, cu, cu, longest, longest, is_causal=True).flatten(1)
