"""What our code around the model costs: train_step against a plain loop over the same model, with and without the loader.

    python -m tests.benchmarks.overhead [--steps 4] [--rounds 5] [--threads 1]

Bare is InfiMed's forward and backward on ready micro-batches, clip_grad_norm_ and torch's AdamW: no wrapper, no pipeline schedule, no gradient
buffers, no distributed optimizer, no figures to share. Ours is train_step on the same micro-batches, then train_step on what the loader packs
and decodes meanwhile (JPEGs of 640 x 480). The tiny model has next to nothing to compute: it shows what a step costs however small. The first
losses must agree. Bare and ours take turns step by step, the ratio is the median over steps (with the loader over passes). CPU seconds of all
threads, the loader's too; with a GPU wall seconds. Waited is the wall time in which train_step had no data. Then what train_step does, from
cProfile (which makes Python dearer than it is).
"""

from __future__ import annotations

import cProfile
import io
import pstats
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image

from megatron_infimed.config import Recipe
from megatron_infimed.data.batch import PackedBatch
from megatron_infimed.data.decode import make_decoder
from megatron_infimed.data.loader import Loader
from megatron_infimed.data.schedule import build_schedule
from megatron_infimed.train.step import Run, train_step
from tests.benchmarks.common import CUDA, DEVICE, MODELS, PAD, PICTURE, build, machine, make_samples, seconds, settings, start
from tests.unit.test_schedule import MemoryShard

TINY: dict[str, Any] = {
    "vision": {"image_size": 112, "hidden_size": 16, "num_layers": 3, "num_heads": 1, "ffn_hidden_size": 16},
    "language": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 1, "num_kv_heads": 1, "head_dim": 32, "ffn_hidden_size": 32, "vocab_size": 512,
    },
}  # fmt: skip
CASES = [
    ("tiny", TINY, 256, 1),
    ("tiny", TINY, 256, 4),
    ("real proportions", MODELS[DEVICE], 2048, 1),
    ("real proportions", MODELS[DEVICE], 512, 4),
]

PARTS = ("forward_backward", "zero_gradients", "_over_all_processes", "prepare_grads", "get_grad_norm", "clip_grad_by_total_norm_fp32",
         "step_with_ready_grads")  # fmt: skip


def make_loader(recipe: Recipe, rows: int) -> Loader:
    """Over documents in memory, enough for so many rows."""
    pictures = np.random.default_rng(0).integers(0, 256, (4, 12, 16, 3), np.uint8)
    files = [io.BytesIO() for _ in pictures]
    for pixels, file in zip(pictures, files, strict=True):
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    samples = make_samples(recipe, rows * max(recipe.data.capacity // 150, 8), longest=recipe.data.capacity)
    shard: Any = MemoryShard([(s.document.values, s.document.modes) for s in samples], [file.getvalue() for file in files])
    schedule = build_schedule(recipe, [shard])
    assert schedule.phases[0].rows >= rows, (schedule.phases[0].rows, rows)
    return Loader(
        recipe, [shard], schedule, pad_id=PAD, image_id=PICTURE, decoder=make_decoder("torch", 1, DEVICE), pin_memory=DEVICE == "cuda"
    )


class Bare:
    """The plain loop."""

    def __init__(self, recipe: Recipe) -> None:
        o = recipe.optimizer
        self.model, self.clip = build(recipe)[1][0], o.clip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)

    def step(self, batches: Sequence[PackedBatch]) -> float:
        targets, total = sum(b.counts.target_tokens for b in batches), 0.0
        for batch in batches:
            loss = self.model(batch.to(DEVICE)).sum() / targets
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def compare(loader: Loader, ready: list[list[PackedBatch]], bare: Bare, run: Run) -> tuple[np.ndarray, np.ndarray, float]:
    """Seconds of each step, bare and ours, which take turns; and on average of ours with the loader, whose thread works when it likes."""
    marks = [seconds()]
    for step, batches in enumerate(ready):
        for work in (partial(bare.step, batches), partial(train_step, run, step, batches)):
            work()
            marks.append(seconds())
    taken = np.diff(marks)
    begin = seconds()
    for step, batches in enumerate(loader.iterate(0, len(ready))):
        train_step(run, step, batches)
    return taken[::2], taken[1::2], (seconds() - begin) / len(ready)


def where(run: Run, ready: list[list[PackedBatch]]) -> Iterator[str]:
    """What train_step does, in ms a step."""
    profile = cProfile.Profile()
    profile.enable()
    for number, batches in enumerate(ready):
        train_step(run, number, batches)
    profile.disable()
    stats: Any = pstats.Stats(profile)
    for wanted in PARTS:
        cumulative = max((times[3] for (_, _, name), times in stats.stats.items() if name == wanted), default=0.0)
        yield f"{1e3 * cumulative / len(ready):.1f}"


def main(steps: int = 4, rounds: int = 5, threads: int = 1, only: str = "") -> None:
    print(machine(threads))
    heads = ["model", "rows a step", "tokens a row", "bare, ms a step", "train_step, ms", "more than bare", "loader, more", "waited, ms"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    parts: list[list[Any]] = []
    for name, model, capacity, rows in (case for case in CASES if only in case[0]):
        with tempfile.TemporaryDirectory() as folder:
            recipe = settings(Path(folder), capacity, rows, model)
        loader = make_loader(recipe, steps * rows)
        ready = [list(loader.microbatches(step)) for step in range(steps)]
        bare, run = Bare(recipe), start(recipe)
        assert abs(bare.step(ready[0]) / train_step(run, 0, ready[0]).loss - 1) < (0.03 if CUDA else 1e-5)
        before = loader.wait_seconds
        bares, ours, loads = (np.array(x) for x in zip(*(compare(loader, ready, bare, run) for _ in range(rounds)), strict=True))
        waited = (loader.wait_seconds - before) / rounds / steps
        cells = [f"{1e3 * np.median(bares):.1f}", f"{1e3 * np.median(ours):.1f}", f"{100 * np.median(ours / bares - 1):.1f} %"]
        cells += [f"{100 * np.median(loads / ours.mean(1) - 1):.1f} %", f"{1e3 * waited:.1f}"]
        print(f"| {name} | {rows} | {capacity} | " + " | ".join(cells) + " |", flush=True)
        parts.append([name, rows, *where(run, ready)])
        loader.close()
    print("\nms a step under cProfile\n\n| model | rows a step | " + " | ".join(PARTS) + " |\n|---|---|" + "---|" * len(PARTS))
    print(*("| " + " | ".join(map(str, cells)) + " |" for cells in parts), sep="\n")


if __name__ == "__main__":
    typer.run(main)
