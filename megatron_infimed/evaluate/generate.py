"""Greedy answers from the Megatron model, in packed rows.

Prompts are packed into rows exactly as training documents are. The first pass over some rows gives each of their prompts its next token;
after that every pass takes one token of each (cache.py), until all have said `<|im_end|>` or the limit is reached. Images go through the
tower once, and only the last position of a prompt reaches the output layer. A document sees only itself, so its answer does not depend on
its neighbours; in low precision a near tie of two tokens can still fall differently in another batch.

Suffixes: N images, t tokens an image, T tokens of the rows, D documents, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from torch import Tensor

from megatron_infimed.config import PhaseConfig
from megatron_infimed.data import packing
from megatron_infimed.data.batch import length, pack_rows
from megatron_infimed.data.chat import Segment, SpecialIds
from megatron_infimed.data.shards import CONTEXT, IMAGE, Document
from megatron_infimed.evaluate.cache import caching
from megatron_infimed.model.infimed import InfiMed, packed_seq_params

IMAGES_AT_ONCE = 16


def prompt_document(segments: Sequence[Segment], images: Sequence[int]) -> Document:
    """A prompt as a document; its k-th image is number images[k] of the pixels that `generate` is given."""
    values: list[int] = []
    modes: list[int] = []
    for kind, value in segments:
        here = [images[value]] if kind == "image" else value
        values += here
        modes += [IMAGE if kind == "image" else CONTEXT] * len(here)
    return Document(np.array(values, np.int32), np.array(modes, np.int8))


@torch.no_grad()
def generate(
    model: InfiMed,
    prompts: Sequence[Document],
    pixels: Tensor,
    *,
    phase: PhaseConfig,
    special: SpecialIds,
    capacity: int,
    rows: int = 1,
    max_new_tokens: int = 16,
) -> list[list[int]]:
    """The most likely next tokens of each prompt, up to and without `<|im_end|>`; `max_new_tokens` of them where it does not come.

    Args:
        model: built with gather_logits=True, one pipeline stage. Tensor parallel processes call this together with the same prompts.
        prompts: see `prompt_document`.
        pixels: uint8 [N, 3, S, S], S = phase.image_size.
        capacity: tokens in a row; where a prompt is longer, rows grow to a multiple that holds it.
        rows: rows in a pass, which bounds the memory.
    """
    was_training = model.training
    model.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    features_NtH = _features(model, pixels, phase.tokens_per_image)
    lengths = np.array([length(d.modes, phase.tokens_per_image) for d in prompts], np.int64)
    capacity *= max(1, -(-int(lengths.max(initial=0)) // capacity))
    plan = packing.plan(lengths, np.zeros_like(lengths), capacity=capacity)
    for first in range(0, len(plan), rows):
        laid = [plan.row(r).tolist() for r in range(first, min(first + rows, len(plan)))]
        said = _answer_rows(model, [[prompts[i] for i in row] for row in laid], features_NtH, phase, special, capacity, max_new_tokens)
        for i, ids in zip((i for row in laid for i in row), said, strict=True):
            answers[i] = ids
    model.train(was_training)
    return answers


def _features(model: InfiMed, pixels: Tensor, tokens_per_image: int) -> Tensor:
    device = next(model.parameters()).device
    parts = [model.encode(p.to(device), tokens_per_image) for p in pixels.split(IMAGES_AT_ONCE)] if len(pixels) else []
    flat = torch.cat(parts) if parts else model.encode(None, tokens_per_image)
    return flat.view(-1, tokens_per_image, flat.shape[-1])


def _answer_rows(
    model: InfiMed, rows: list[list[Document]], features_NtH: Tensor, phase: PhaseConfig, special: SpecialIds, capacity: int, limit: int
) -> list[list[int]]:
    """The answers of the rows' documents, in the order they are laid."""
    device = next(model.parameters()).device
    batch = pack_rows(
        rows,
        capacity=capacity,
        tokens_per_image=phase.tokens_per_image,
        image_size=phase.image_size,
        pad_id=special.pad,
        image_id=special.image_pad,
    ).to(device)
    documents = [d for row in rows for d in row]
    shown = np.concatenate([d.values[d.modes == IMAGE] for d in documents]).astype(np.int64)
    starts, lengths = _places(rows, phase.tokens_per_image, capacity, _multiple(model))
    starts, lengths = starts.to(device), lengths.to(device)

    with caching(model.language_model, starts, lengths, limit) as cache:
        e_TH = _embed(model, batch.tokens)
        features = features_NtH[torch.from_numpy(shown).to(device)].flatten(0, 1)
        e_TH = e_TH.index_copy(0, batch.slots, features.to(e_TH.dtype))
        logits_DV = _logits(model, e_TH, packed_seq_params(batch), only=starts + lengths - 1)
        alone = _one_token_each(len(starts), device)
        answers: list[list[int]] = [[] for _ in documents]
        asking = set(range(len(documents)))
        for step in range(limit):
            token_D = logits_DV.argmax(-1)
            ids = token_D.tolist()
            asking = {i for i in asking if ids[i] != special.im_end}
            for i in asking:
                answers[i].append(ids[i])
            if not asking or step == limit - 1:
                break
            cache.advance()
            logits_DV = _logits(model, _embed(model, token_D), alone)
    return answers


def _places(rows: list[list[Document]], tokens_per_image: int, capacity: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Start and length of every document; copies of the first one fill up to a multiple."""
    places = []
    for number, row in enumerate(rows):
        at = number * capacity
        for document in row:
            places.append((at, length(document.modes, tokens_per_image)))
            at += places[-1][1]
    places += places[:1] * (-len(places) % multiple)
    starts, lengths = torch.tensor(places, dtype=torch.int64).unbind(1)
    return starts, lengths


def _multiple(model: InfiMed) -> int:
    """A pass of one token a document needs this many documents, or a multiple: sequence parallelism and FP8 divide them."""
    config = model.language_model.config
    return (config.tensor_model_parallel_size if config.sequence_parallel else 1) * (16 if config.fp8 else 1)


def _one_token_each(documents: int, device: torch.device) -> PackedSeqParams:
    cuts = torch.arange(documents + 1, dtype=torch.int32, device=device)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cuts, cu_seqlens_kv=cuts, max_seqlen_q=1, max_seqlen_kv=1)


def _embed(model: InfiMed, tokens_T: Tensor) -> Tensor:
    return model.language_model.embedding.word_embeddings(tokens_T.unsqueeze(0)).squeeze(0)


def _logits(model: InfiMed, e_TH: Tensor, packed: PackedSeqParams, only: Tensor | None = None) -> Tensor:
    """Logits [T, V], or those of the positions `only`."""
    e_T1H = e_TH.unsqueeze(1)
    if model.config.sequence_parallel:
        e_T1H = scatter_to_sequence_parallel_region(e_T1H)
    language = model.language_model
    with _output_layer_sees(language.output_layer, only):
        return language(input_ids=None, position_ids=None, attention_mask=None, decoder_input=e_T1H, packed_seq_params=packed)


@contextmanager
def _output_layer_sees(output_layer: torch.nn.Module, only: Tensor | None) -> Iterator[None]:
    def choose(_layer: torch.nn.Module, args: tuple) -> tuple:
        return args if only is None else (args[0].index_select(0, only), *args[1:])

    hook = output_layer.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
