"""A key-value cache for packed rows, put around Megatron-Core's attention from outside.

While `caching` lasts, every layer's core attention is replaced by one that remembers. The first pass is the usual packed one, and its
keys and values are kept, document by document. In each further pass every document brings one token, as a segment of length 1: Megatron
then rotates it by nothing, because RoPE restarts with each segment, so the rotation to its true position is done here, the token joins
its document's keys and values, and attends to all of them. All of it is local to a tensor parallel process, whatever the layers are made
of.

Suffixes: D documents, L longest document with its answer, A heads, G key-value heads, d head size, T tokens of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as rotate
from torch import Tensor, nn


class Documents:
    """Where the documents of a batch lie and how far each has come; shared by the layers."""

    def __init__(self, starts: Tensor, lengths: Tensor, room: int, rope: nn.Module) -> None:
        """`starts`, `lengths`: int64 [D], places in the packed rows; `room`: tokens that may follow each document."""
        self.starts_D, self.next_D = starts, lengths - 1
        self.longest = int(lengths.max()) + room
        self.freqs = rope(self.longest).squeeze(1)  # [L, 1, d]
        self.first_pass = True

    def advance(self) -> None:
        """Before each pass but the first: every document gets one more token."""
        self.first_pass = False
        self.next_D = self.next_D + 1

    def unpack(self, x_TGd: Tensor) -> Tensor:
        """[T, G, d] of the rows -> [D, L, G, d]; what lies behind a document's end is not attended to."""
        places_DL = self.starts_D[:, None] + torch.arange(self.longest, device=x_TGd.device)
        return x_TGd[places_DL.clamp_(max=len(x_TGd) - 1)]


class RememberingAttention(nn.Module):
    """core_attention of one layer while `caching` lasts."""

    def __init__(self, inner: nn.Module, documents: Documents) -> None:
        super().__init__()
        self.inner, self.documents = inner, documents

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest, **more) -> Tensor:
        at = self.documents
        if at.first_pass:
            self.keys_DLGd, self.values_DLGd = at.unpack(key), at.unpack(value)
            return self.inner(query, key, value, *rest, **more)
        freqs_D1d, every = at.freqs[at.next_D], torch.arange(len(query), device=query.device)
        self.keys_DLGd[every, at.next_D] = rotate(key, freqs_D1d)
        self.values_DLGd[every, at.next_D] = value
        known_DL = torch.arange(at.longest, device=query.device) <= at.next_D[:, None]
        out_DA1d = F.scaled_dot_product_attention(
            rotate(query, freqs_D1d).unsqueeze(2),
            self.keys_DLGd.transpose(1, 2),
            self.values_DLGd.transpose(1, 2),
            attn_mask=known_DL[:, None, None, :],
            enable_gqa=True,
        )
        return out_DA1d.flatten(1)


@contextmanager
def caching(language_model: nn.Module, starts: Tensor, lengths: Tensor, room: int) -> Iterator[Documents]:
    """Inside, the model's first pass fills the cache and each pass after `advance` extends it."""
    documents = Documents(starts, lengths, room, language_model.rotary_pos_emb)  # type: ignore[arg-type]
    attentions = [layer.self_attention for layer in language_model.decoder.layers]  # type: ignore[union-attr]
    for attention in attentions:
        attention.core_attention = RememberingAttention(attention.core_attention, documents)
    try:
        yield documents
    finally:
        for attention in attentions:
            attention.core_attention = attention.core_attention.inner
