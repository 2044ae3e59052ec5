"""Whether training waits for its data: a decoder that needs 0.8 times (--slow) as long as the step that trains on its images.

    python -m tests.benchmarks.loading [--slow 0.8] [--milliseconds 100] [--steps 4]

One of 8 ranks takes its 32 micro-batches a step of a real plan (pretraining at 384 px, 4096 tokens a row). Training is a pause of
equally long for every micro-batch; the decoder pauses for each image, so that a micro-batch takes it between nothing and twice the mean.
Waiting is given in % of the time spent training, without the first micro-batch, which nothing can hide. Memory is that of the pixels ahead
of training at most.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import typer

from megatron_infimed.data.decode import Decoded
from megatron_infimed.data.loader import Loader
from megatron_infimed.data.schedule import build_schedule
from megatron_infimed.data.shards import CONTEXT, IMAGE, Document
from megatron_infimed.recipe_files import load_recipe
from tests.benchmarks.balance import RECIPES, Documents, sources


class Readable(Documents):
    """With documents to read: text, then images."""

    def document(self, i: int) -> Document:
        modes = np.repeat(np.array([CONTEXT, IMAGE], np.int8), [self.text_lengths[i], self.image_counts[i]])
        return Document(np.zeros(len(modes), np.int32), modes)

    def image(self, number: int) -> bytes:
        return b""


class SlowDecoder:
    """Pauses for every image."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, images: list[bytes], size: int) -> Decoded:
        time.sleep(self.seconds * len(images))
        return Decoded(torch.zeros(len(images), 3, size, size, dtype=torch.uint8), [])

    def close(self) -> None:
        pass


def main(slow: float = 0.8, milliseconds: float = 100.0, steps: int = 4) -> None:
    shards = [Readable(s.text_lengths, s.image_counts, s.targets) for s in sources(50_000).values()]
    words = ["data.sources=[{prefix: a}, {prefix: b}, {prefix: c}]", "schedule=[{until: 1.0, image_size: 384, tokens_per_image: 144}]"]
    plain = load_recipe(RECIPES / "pretrain_4b.yaml", words)
    schedule = build_schedule(plain, shards)  # type: ignore[arg-type]
    phase, pause = schedule.phases[0], milliseconds / 1000
    mean = phase.row_images[: steps * phase.batch_rows].mean()
    print("| prefetch | waited, % of training | MB ahead |\n|---|---|---|")
    for prefetch in (1, 2, 4, 8):
        recipe = load_recipe(RECIPES / "pretrain_4b.yaml", [*words, f"data.prefetch={prefetch}"])
        decoder = SlowDecoder(slow * pause / mean)
        loader = Loader(recipe, shards, schedule, pad_id=0, image_id=1, decoder=decoder, dp_rank=3, dp_size=8)  # type: ignore[arg-type]
        trained, first = 0, 0.0
        for batches in loader.iterate(0, steps):
            for _ in batches:
                first = first or loader.wait_seconds
                time.sleep(pause)
                trained += 1
        waited = 100 * (loader.wait_seconds - first) / (trained * pause)
        print(f"| {prefetch} | {waited:.2f} | {prefetch * phase.row_images.max() * 3 * 384**2 / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
