"""Attention inside a packed row, without Transformer Engine.

Documents that share a row must not see each other. Rather than mask a T x T square, the row is cut at the documents' ends (`cu_seqlens`) and
each piece goes through torch's scaled_dot_product_attention by itself: cost grows with the sum of squared document lengths, not with the
squared row. On CUDA one call of torch.nn.attention.varlen, or of flash-attn, does the same. The image tower has no documents: its [patches,
images] block is one full, unmasked attention. Under context parallelism each process has its chunks of every document (PackedBatch.share) as
queries and gathers the keys and values of all. Megatron-Core calls this class as `core_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_infimed.data.batch import context_positions
from megatron_infimed.optional import available


class PackedAttention(MegatronModule):
    """core_attention for both parts of the model. Shapes: T tokens, S patches, B images, A heads, G key-value heads, D head size."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, pg_collection, **_unused) -> None:
        super().__init__(config=config)
        self.causal = attn_mask_type != AttnMaskType.no_mask
        self.context_group: dist.ProcessGroup | None = pg_collection.cp if config.context_parallel_size > 1 else None

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
        """[T, A, D], [T, G, D] with packed_seq_params -> [T, A*D] (T of this process's share); [S, B, A, D] without -> [S, B, A*D]."""
        if packed_seq_params is None:
            q_BASD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out_BASD = F.scaled_dot_product_attention(q_BASD, k_BGSD, v_BGSD, is_causal=self.causal, enable_gqa=True)
            return out_BASD.permute(2, 0, 1, 3).flatten(2)
        if self.context_group is not None:
            return _shared(query, key, value, packed_seq_params.cu_seqlens_q, self.context_group)
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):  # what the kernel takes
            return _varlen(query, key, value, packed_seq_params)
        return _segments(query, key, value, packed_seq_params.cu_seqlens_q)


def _segments(query_TAD: Tensor, key_TGD: Tensor, value_TGD: Tensor, cu_seqlens: Tensor) -> Tensor:
    # Four dimensions and equal head counts: what torch's flash kernel for CPUs takes (tests/benchmarks/attention.py).
    # split, not slices: the backward of each slice writes a zero tensor as large as the row.
    lengths = cu_seqlens.diff().tolist()
    key_TAD, value_TAD = _for_each_head(query_TAD, key_TGD), _for_each_head(query_TAD, value_TGD)
    parts = [
        F.scaled_dot_product_attention(_alone(q), _alone(k), _alone(v), is_causal=True)
        for q, k, v in zip(query_TAD.split(lengths), key_TAD.split(lengths), value_TAD.split(lengths), strict=True)
    ]
    return torch.cat([part.squeeze(0).transpose(0, 1) for part in parts]).flatten(1)


def _shared(query_TAD: Tensor, key_TGD: Tensor, value_TGD: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    rank, size = group.rank(), group.size()
    held = torch.cat([context_positions(cu_seqlens, r, size) for r in range(size)])
    kv_T = torch.cat([key_TGD, value_TGD], -1)
    whole_T = gather_from_sequence_parallel_region(kv_T, group=group).index_select(0, held.argsort())  # gathered by rank -> by position
    key_TGD, value_TGD = whole_T.split(key_TGD.shape[-1], -1)
    key_TAD, value_TAD = _for_each_head(query_TAD, key_TGD), _for_each_head(query_TAD, value_TGD)
    lengths = cu_seqlens.diff().tolist()
    queries = query_TAD.split([n // (2 * size) for n in lengths for _ in range(2)])
    parts = []
    for document, (keys, values) in enumerate(zip(key_TAD.split(lengths), value_TAD.split(lengths), strict=True)):
        for half, number in enumerate((rank, 2 * size - 1 - rank)):
            chunk = queries[2 * document + half]
            seen = (number + 1) * len(chunk)
            causal = torch.ones(len(chunk), seen, dtype=torch.bool, device=chunk.device).tril(seen - len(chunk))
            parts.append(F.scaled_dot_product_attention(_alone(chunk), _alone(keys[:seen]), _alone(values[:seen]), attn_mask=causal))
    return torch.cat([part.squeeze(0).transpose(0, 1) for part in parts]).flatten(1)


def _alone(document_TAD: Tensor) -> Tensor:
    return document_TAD.transpose(0, 1).unsqueeze(0)


def _for_each_head(query_TAD: Tensor, shared_TGD: Tensor) -> Tensor:
    groups = query_TAD.size(1) // shared_TGD.size(1)
    return shared_TGD.repeat_interleave(groups, dim=1) if groups > 1 else shared_TGD


def _varlen(query_TAD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packed: PackedSeqParams) -> Tensor:
    cu, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    if available("flash_attn"):
        from flash_attn import flash_attn_varlen_func  # takes fewer key-value heads as they are

        return flash_attn_varlen_func(query_TAD, key_TGD, value_TGD, cu, cu, longest, longest, causal=True).flatten(1)
    from torch.nn.attention.varlen import varlen_attn

    causal: Any = {"is_causal": True} if torch.__version__ < "2.11" else {"window_size": (-1, 0)}
    key_TAD, value_TAD = _for_each_head(query_TAD, key_TGD), _for_each_head(query_TAD, value_TGD)
    return varlen_attn(query_TAD, key_TAD, value_TAD, cu, cu, longest, longest, **causal).flatten(1)  # type: ignore[union-attr]
