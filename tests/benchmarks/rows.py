"""Step time against the length of a row, at a constant number of tokens: packed attention must not grow quadratically with the row.

    python -m tests.benchmarks.rows [--tokens 16384] [--rounds 3] [--threads 1]

The same documents, none longer than the shortest row, are packed once into rows of that length, and these are laid end to end, 2, 4, 8 and 16
at a time: the same documents and padding in rows of 2k, 4k, 8k and 16k tokens. Beside it the same tokens with the boundaries taken out, one
document as long as the row: nothing but attention then differs. And the same documents under a block-diagonal mask over the whole row, where
that stays below `--masked` tokens (CPU only: it replaces attention.py's one call a document). A step is train_step over all the tokens, one row
at a time. All take turns; time a token is relative to packed rows of the shortest length in the same round.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import typer

from megatron_infimed.data.batch import PackedBatch
from megatron_infimed.model import attention
from megatron_infimed.train.step import train_step
from tests.benchmarks.common import CUDA, machine, make_samples, pack, planned, seconds, settings, start

PACKED, ALONE, MASKED = "packed", "one document a row", "block-diagonal mask"


def one_document(row: PackedBatch) -> PackedBatch:
    return dataclasses.replace(row, cu_seqlens=row.cu_seqlens[[0, -1]], max_seqlen=len(row.tokens))


def block_mask(q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Stands in for attention._segments."""
    document_T = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())
    mask_TT = (document_T[:, None] == document_T[None, :]).tril_()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TAD, k_TGD, v_TGD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT, enable_gqa=True).squeeze(0).transpose(0, 1).flatten(1)


def main(tokens: int = 16384, shortest: int = 1024, rounds: int = 3, threads: int = 1, masked: int = 4096) -> None:
    print(machine(threads))
    with tempfile.TemporaryDirectory() as folder:
        recipe = settings(Path(folder), shortest)
    count = tokens // shortest
    rows = planned(make_samples(recipe, 8 * count, longest=shortest), shortest)[:count]
    assert len(rows) == count, f"{len(rows)} rows, {count} wanted"
    run, done = start(recipe), 0

    def step(batches: list[PackedBatch]) -> float:
        nonlocal done
        begin = seconds()
        result = train_step(run, done, batches)
        done += 1
        assert result.counts.documents == sum(map(len, rows))
        return seconds() - begin

    sizes = [1 << n for n in range(count.bit_length())]
    work: dict[tuple[str, int], Callable[[], float]] = {}
    for size in sizes:
        batches = [pack(rows[at : at + size], recipe, shortest) for at in range(0, count, size)]
        work[PACKED, size] = lambda b=batches: step(b)
        work[ALONE, size] = lambda b=[one_document(row) for row in batches]: step(b)
        if size * shortest <= masked and not CUDA:
            work[MASKED, size] = mock.patch.object(attention, "_segments", block_mask)(lambda b=batches: step(b))
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in work}
    for timed in work.values() if CUDA else [work[PACKED, 1]]:
        timed()  # kernels are chosen, memory is taken
    for _ in range(rounds):
        for key, timed in work.items():
            taken[key].append(timed())
    first = taken[PACKED, 1]
    rate = tokens / statistics.median(first)
    print(f"{sum(map(len, rows))} documents in {tokens:,} tokens; packed in rows of {shortest:,}: {rate:,.0f} tokens/s\n")
    print(f"| tokens a row | {PACKED} | {ALONE} | {MASKED} |\n|---|---|---|---|")
    for size in sizes:
        cells = [
            f"{statistics.median(b / a for a, b in zip(first, taken[way, size], strict=True)):.2f}" if (way, size) in taken else ""
            for way in (PACKED, ALONE, MASKED)
        ]
        print(f"| {size * shortest:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
