"""Planning: fill, proven bound and CPU seconds, against what others pack with, on the same lengths in the same run.

    python tests/benchmarks/planning.py [--documents 1000000] [--others/--no-others] [--prove-seconds 20]

The documents are synthetic captions, VQA turns and reports with 0 to 2 images (tests/unit/test_packing.mixture). Others: first-fit-decreasing
(here with a segment tree, n log n, as fast as plain Python allows; those in use are slower), and a greedy knapsack (Megatron-LM's and
Energon's method: for each row again the longest that fits, by bisection in the sorted lengths left). --bridge takes Megatron-Bridge's
src/megatron/bridge/data/packing/algorithms.py and runs its own first_fit_decreasing too.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
import tempfile
import time
import types
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from megatron_infimed.config import DataConfig, PhaseConfig, Recipe, SourceConfig
from megatron_infimed.data.bound import prove
from megatron_infimed.data.packing import fill, plan
from megatron_infimed.data.saved_plan import plan_of
from tests.unit.test_packing import mixture

CASES = [  # tokens an image, capacity, images a row
    (144, 4096, None),
    (144, 4096, 18),
    (144, 4096, 10),
    (256, 4096, 9),
    (729, 4096, None),
    (729, 4096, 4),
    (729, 8192, None),
    (729, 16384, None),
]


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    size = 1 << (len(lengths) - 1).bit_length()
    room = [capacity] * (2 * size)  # a segment tree: the largest room below each node
    used = 0
    for length in sorted(lengths, reverse=True):
        node = 1
        while node < size:
            node *= 2
            if room[node] < length:
                node += 1
        used = max(used, node - size + 1)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return used


def greedy_knapsack(lengths: list[int], capacity: int) -> int:
    left = sorted(lengths)
    rows = 0
    while left:
        rows += 1
        space = capacity
        while left and (at := bisect_right(left, space)):
            space -= left.pop(at - 1)
    return rows


def cpu(work: Callable[[], int]) -> tuple[int, float]:
    begin = time.process_time()
    rows = work()
    return rows, time.process_time() - begin


def of_bridge(file: Path) -> Callable[[list[int], int], int]:
    for name in ("megatron.bridge", "megatron.bridge.utils", "megatron.bridge.utils.safe_pickle"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["megatron.bridge.utils.safe_pickle"].safe_load_npy = None  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("bridge_algorithms", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda lengths, capacity: len(module.first_fit_decreasing(lengths, capacity))


class Listed:
    """As much of a Shard as planning reads."""

    def __init__(self, size: int, name: str) -> None:
        rng = np.random.default_rng(len(name))
        self.text_lengths = np.minimum(rng.lognormal(4.8, 0.8, size) + 10, 3400).astype(np.int32)
        self.image_counts = rng.choice(np.array([0, 1, 1, 1, 2, 3], np.int32), size)
        self.manifest = {"files": {"docs": {"sha256": name}}}

    def __len__(self) -> int:
        return len(self.text_lengths)


def stage(documents: int, images_a_row: int | None) -> None:
    """Mixture, packing, statistics, saving and loading of three sources and two phases; the memory is that of the whole process."""
    shares = {"a": documents // 2, "b": documents // 4, "c": documents - documents // 2 - documents // 4}
    shards = [Listed(n, name) for name, n in shares.items()]
    data = DataConfig(sources=tuple(SourceConfig(prefix=name) for name in shares), max_images=images_a_row)
    phases = tuple(PhaseConfig(until=u, image_size=s, tokens_per_image=t) for u, s, t in ((0.6, 224, 64), (1.0, 384, 144)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        schedule = plan_of(Recipe(output=folder, data=data, schedule=phases), shards)  # type: ignore[arg-type]
        seconds = time.process_time() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{documents:,} documents: {seconds:.1f} CPU s, at most {peak:.2f} GB resident ({before:.2f} before planning)")
        for p in schedule.phases:
            print(f"phase {p.number}: {p.rows:,} rows, at least {p.bound.rows:,}, {100 * p.fill:.2f} % full, lost {p.lost}")


def main(
    documents: int = 1_000_000,
    others: bool = True,
    prove_seconds: float = 20.0,
    only_first: bool = False,
    knapsack: bool = True,
    bridge: Path | None = None,
    whole_stage: Annotated[bool, typer.Option("--stage")] = False,
    images_a_row: int | None = None,
) -> None:
    if whole_stage:
        return stage(documents, images_a_row)
    methods = {"FFD": first_fit_decreasing, **({"knapsack": greedy_knapsack} if knapsack else {})} if others else {}
    if bridge:
        methods["Bridge"] = of_bridge(bridge)
    heads = ["tokens an image", "capacity", "images a row", "fill %", "at most possible %", "CPU s"]
    heads += [head for name in methods for head in (f"{name} fill %", f"{name} CPU")]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for tokens_per_image, capacity, max_images in CASES[:1] if only_first else CASES:
        lengths, images = mixture(documents)
        lengths = lengths + (tokens_per_image - 144) * images
        lengths, images = lengths[lengths <= capacity], images[lengths <= capacity]
        begin = time.process_time()
        ours = plan(lengths, images, capacity=capacity, max_images=max_images)
        seconds = time.process_time() - begin
        bound = prove(lengths, images, capacity, max_images, rows=len(ours), close=1e-4, seconds=prove_seconds)
        full = 100 * fill(lengths, ours, capacity)
        cells = [tokens_per_image, capacity, max_images or "", f"{full:.2f}", f"{full * len(ours) / bound.rows:.2f}", f"{seconds:.2f}"]
        for method in methods.values() if max_images is None else ():
            rows, theirs = cpu(lambda m=method, x=lengths.tolist(), c=capacity: m(x, c))
            cells += [f"{100 * lengths.sum() / (rows * capacity):.2f}", f"{theirs:.1f} s, {theirs / seconds:.0f}x"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
