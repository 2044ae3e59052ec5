"""Training: useful tokens a second of packed rows here, against a plain padded transformers loop on the same documents and weights.

    python -m tests.benchmarks.training [--documents 96] [--rounds 3] [--threads 1]

Ours is train_step (Megatron's wrapper, distributed optimizer, clipping) on the rows of our plan, one row a step, which holds about as many
documents as the others' batch of 8. The others are LlavaForConditionalGeneration loaded from our own export, SDPA, torch's AdamW and clipping,
batches padded on the right to the longest: at random, and grouped by length with LengthGroupedSampler's function (so few documents are then
sorted outright). Useful tokens are those of the documents, text and image; a row or batch also computes padding, and fill is the useful share.
What a fill predicts is that share of the useful tokens a second of our rows without padding; to see it at work, a second plan leaves a fifth
of each row empty. Before anything is timed, both sides do two updates (one with a GPU) on the same documents and must agree on loss and norm.

Without a GPU: float32, a small model, CPU seconds; MFU is then against a large float32 matrix product timed in the same run. With one: bfloat16
(the others purely so, without float32 weights, which is quicker), a larger model, wall seconds, MFU against 989 and 1979 TFLOP/s, peak memory.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import typer
from transformers import LlavaForConditionalGeneration
from transformers.trainer_pt_utils import get_length_grouped_indices

from megatron_infimed.config import Recipe
from megatron_infimed.convert.export import export
from megatron_infimed.counts import Counts
from megatron_infimed.data.batch import PackedBatch
from megatron_infimed.data.shards import IMAGE, TARGET
from megatron_infimed.flops import step_flops
from megatron_infimed.train.step import train_step
from tests.benchmarks.common import (
    CUDA,
    DEVICE,
    PAD,
    PICTURE,
    Sample,
    build,
    machine,
    make_samples,
    pack,
    planned,
    seconds,
    settings,
    start,
)
from tests.parity import hf

BATCH = 8


@dataclass
class Way:
    """One way to train on all the documents: a step takes one batch and returns (loss, gradient norm)."""

    step: Callable[[Any], tuple[float, float]]
    batches: list[Any]
    computed: int
    """Tokens pushed through, padding included."""
    taken: list[list[float]] = field(default_factory=list)
    """Seconds of each step, by round."""
    gib: float = 0.0
    """Peak on the GPU above what lay there before."""

    def run(self) -> None:
        self.taken.append([])
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for batch in self.batches:
            begin = seconds()
            self.step(batch)
            self.taken[-1].append(seconds() - begin)
        if CUDA:
            self.gib = (torch.cuda.max_memory_allocated() - before) / 2**30

    def rate(self, tokens: int, only: Sequence[int] | None = None) -> list[float]:
        """Tokens a second in each round, over all steps or some."""
        return [tokens / sum(times[i] for i in (range(len(times)) if only is None else only)) for times in self.taken]


class Padded:
    """What most would write: a padded batch, the model's own loss, AdamW."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        exported = export(hf.save(folder / "run", build(recipe)[1][0], recipe, recipe.schedule[0]).path, folder / "hf")
        dtype = getattr(torch, recipe.precision.params)
        self.model = LlavaForConditionalGeneration.from_pretrained(exported, dtype=dtype, attn_implementation="sdpa").train()
        self.model.to(device=DEVICE)  # type: ignore[arg-type]
        self.tokens_per_image, o = recipe.schedule[0].tokens_per_image, recipe.optimizer
        parameters = list(self.model.parameters())
        decays = [
            {"params": [p for p in parameters if (p.dim() > 1) == wide], "weight_decay": o.weight_decay * wide} for wide in (True, False)
        ]
        self.optimizer, self.clip = torch.optim.AdamW(decays, lr=o.lr, betas=o.betas, eps=o.eps), o.clip

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        longest = max(s.length for s in samples)
        ids, labels = torch.full((len(samples), longest), PAD), torch.full((len(samples), longest), -100)
        mask = torch.zeros_like(ids)
        for i, s in enumerate(samples):
            repeats = torch.from_numpy(np.where(s.document.modes == IMAGE, self.tokens_per_image, 1))
            modes = torch.from_numpy(s.document.modes).repeat_interleave(repeats)
            values = torch.from_numpy(s.document.values).long().repeat_interleave(repeats).where(modes != IMAGE, PICTURE)
            ids[i, : s.length], mask[i, : s.length] = values, 1
            labels[i, : s.length] = values.where(modes == TARGET, -100)
        pixels = torch.cat([s.pixels for s in samples])
        images = {"pixel_values": hf.normalised(pixels).to(self.model.dtype)} if len(pixels) else {}
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **images}

    def step(self, batch: dict[str, Any]) -> tuple[float, float]:
        batch = {name: t.to(DEVICE, non_blocking=True) for name, t in batch.items()}
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), float(norm)

    def way(self, samples: list[Sample], order: list[int]) -> Way:
        lots = [[samples[i] for i in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
        return Way(self.step, [self.collate(lot) for lot in lots], sum(len(lot) * max(s.length for s in lot) for lot in lots))


class Packed:
    """Ours."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.run, self.done = recipe, start(recipe), 0

    def step(self, batch: PackedBatch) -> tuple[float, float]:
        result = train_step(self.run, self.done, [batch])
        self.done += 1
        return result.loss, result.grad_norm

    def way(self, rows: list[list[Sample]]) -> Way:
        capacity = self.recipe.data.capacity
        return Way(self.step, [pack([row], self.recipe, capacity) for row in rows], len(rows) * capacity)


def agree(ours: Packed, theirs: Padded, row: list[Sample]) -> None:
    """Updates on the same documents give the same losses and gradient norms."""
    packed, padded = pack([row], ours.recipe, ours.recipe.data.capacity), theirs.collate(row)
    updates = 1 if CUDA else 2  # bfloat16 weights take other steps than float32 ones
    figures = [(a, b) for _ in range(updates) for a, b in zip(ours.step(packed), theirs.step(padded), strict=True)]
    worst = max(abs(a - b) / b for a, b in figures)
    print(f"{len(row)} documents, {updates} updates: loss {figures[-2][0]:.4f} at last; losses and norms differ by {worst:.1e} at most")
    assert worst < (0.03 if CUDA else 1e-5), figures


def peaks() -> dict[str, float]:
    """FLOP/s that MFU is a share of."""
    if CUDA:
        return {"MFU of 989": 989e12, "MFU of 1979": 1979e12}
    a, b, taken = torch.randn(2048, 1024), torch.randn(1024, 2048), []
    for _ in range(9):
        begin = seconds()
        torch.mm(a, b)
        taken.append(seconds() - begin)
    return {"of matmul speed": 2 * 2048 * 1024 * 2048 / statistics.median(taken)}


def main(documents: int = 96, rounds: int = 3, threads: int = 1, capacity: int = 2048) -> None:
    print(f"{machine(threads)}, transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        recipe = settings(Path(folder), capacity)
        samples = make_samples(recipe, documents, longest=capacity * 4 // 5)
        theirs, ours = Padded(recipe, Path(folder)), Packed(recipe)
    rows = planned(samples, capacity)
    agree(ours, theirs, rows[0])
    by_length = get_length_grouped_indices([s.length for s in samples], BATCH, mega_batch_mult=50)
    ways = {
        "packed": ours.way(rows),
        "packed, a fifth left empty": ours.way(planned(samples, capacity * 4 // 5)),
        f"padded, batches of {BATCH} grouped by length": theirs.way(samples, by_length),
        f"padded, batches of {BATCH} at random": theirs.way(samples, list(range(documents))),
    }
    if CUDA:  # kernels are chosen and memory is taken
        for way in ways.values():
            way.run()
            way.taken.clear()
    for _ in range(rounds):
        for way in ways.values():
            way.run()
    print(*table(ways, samples, recipe), sep="\n")


def table(ways: dict[str, Way], samples: list[Sample], recipe: Recipe) -> Iterator[str]:
    packed, useful = ways["packed"], sum(s.length for s in samples)
    counts: list[Counts] = [batch.counts for batch in packed.batches]
    without_padding = [i for i, c in enumerate(counts) if not c.padding]
    if not without_padding:
        raise SystemExit("no row of so few documents is full, which what the fill predicts is measured on: take more --documents")
    full = packed.rate(len(without_padding) * recipe.data.capacity, without_padding)
    flops = sum(work.model for work in step_flops(recipe, sum(counts, Counts()), recipe.schedule[0].image_size).values())
    against = peaks()
    yield f"{len(samples)} documents, {useful:,} tokens, {sum(c.images for c in counts)} images; {len(without_padding)} of {len(counts)} rows full\n"
    heads = ["", "useful tokens/s", "packed is", "fill %", "of what the fill predicts %", "computed tokens/s", *against]
    heads += ["peak GiB above weights and optimizer"] * CUDA
    yield "| " + " | ".join(heads) + " |\n|" + "---|" * len(heads)
    for name, way in ways.items():
        rates = way.rate(useful)
        fill, rate = useful / way.computed, statistics.median(rates)
        faster = statistics.median(a / b for a, b in zip(packed.rate(useful), rates, strict=True))
        kept = statistics.median(rate / (f * fill) for rate, f in zip(rates, full, strict=True))
        cells = [name, f"{rate:,.0f}", f"{faster:.2f}x", f"{100 * fill:.1f}", f"{100 * kept:.1f}", f"{rate / fill:,.0f}"]
        cells += [f"{100 * flops / useful * rate / peak:.1f} %" for peak in against.values()] + [f"{way.gib:.1f}"] * CUDA
        yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    typer.run(main)
