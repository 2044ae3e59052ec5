"""How long the slowest of many data parallel ranks takes over the mean, by the cost model: rows by number against rows by cost.

    python -m tests.benchmarks.balance [--documents 1000000] [--ranks 64]

Plans a synthetic mixture (captions, VQA turns and reports with 0 to 2 images, interleaved documents with 2 to 5, text alone) with the 4B
recipes: pretraining at 224 px / 64 tokens and 384 px / 144 tokens, SFT at 384 px / 729 tokens; the tower frozen, as the recipes have it, and
learning. For each step of the plan the slowest rank is compared with the mean. CPU ms is what one rank spends on a step to know its rows.
"and output": the same balanced rows, with the output layer's work added, which depends on the number of target tokens and is not known to
the plan; the documents' targets are drawn here (captions nearly whole, VQA and reports about a third, text about a half).
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import typer

from megatron_infimed.counts import Counts
from megatron_infimed.data.balance import row_costs, spread
from megatron_infimed.data.schedule import Phase, build_schedule
from megatron_infimed.flops import step_flops
from megatron_infimed.recipe_files import load_recipe
from tests.unit.test_packing import mixture

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
HEADS = ["phase", "tower", "rows", "by number", "by cost", "and output", "CPU ms"]


class Documents:
    """As much of a Shard as planning reads, and each document's target tokens."""

    def __init__(self, text: np.ndarray, images: np.ndarray, learnt: np.ndarray) -> None:
        self.text_lengths, self.image_counts = text.astype(np.int32), images.astype(np.int32)
        self.targets = text * learnt

    def __len__(self) -> int:
        return len(self.text_lengths)


def sources(documents: int) -> dict[str, Documents]:
    rng = np.random.default_rng(0)
    single, several, none = round(0.7 * documents), round(0.1 * documents), round(0.2 * documents)
    lengths, images = mixture(single)
    text = np.minimum(lengths - 144 * images, 4096 - 729 * images)
    learnt = np.where(text < 90, 0.9, rng.beta(3, 6, single))
    long = np.clip(rng.lognormal(6, 0.8, none), 32, 4000).astype(int)
    return {
        "single": Documents(text, images, learnt),
        "several": Documents(rng.integers(50, 451, several), rng.integers(2, 6, several), rng.beta(3, 6, several)),
        "text": Documents(long, np.zeros(none, int), rng.beta(4, 4, none)),
    }


def over_mean(loads: list[np.ndarray]) -> str:
    percent = [100 * (of_ranks.max() / of_ranks.mean() - 1) for of_ranks in loads]
    return f"{np.median(percent):.2f} / {np.percentile(percent, 95):.2f} / {max(percent):.2f}"


def row_targets(phase: Phase, shards: list[Documents]) -> np.ndarray:
    targets = np.concatenate([s.targets for s in shards])
    base = np.cumsum([0, *(len(s) for s in shards)])[:-1]
    return np.add.reduceat(targets[base[phase.source] + phase.document], phase.offsets[:-1])


def main(documents: int = 1_000_000, ranks: int = 64) -> None:
    mix = sources(documents)
    print(f"slowest of {ranks} ranks over the mean, % : median / 95th percentile / worst of a phase's steps\n")
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS))
    for name in ("pretrain_4b", "sft_general_4b"):
        words = [f"data.sources=[{', '.join(f'{{prefix: {source}}}' for source in mix)}]"]
        schedule = build_schedule(load_recipe(RECIPES / f"{name}.yaml", words), list(mix.values()))  # type: ignore[arg-type]
        for phase in schedule.phases:
            for learns in (False, True):
                recipe = load_recipe(RECIPES / f"{name}.yaml", [*words, f"trainable.vision={str(learns).lower()}"])
                target = step_flops(recipe, Counts(target_tokens=1), phase.image_size)["output"].hardware
                for rows in (2 * ranks, 4 * ranks, 8 * ranks):
                    steps = range(0, phase.rows, rows)
                    begin = time.process_time()
                    costs = [row_costs(recipe, phase, first, rows) for first in steps]
                    chosen = [spread(c, ranks) for c in costs]
                    spent = (time.process_time() - begin) / len(steps)
                    output = np.append(target * row_targets(phase, list(mix.values())), np.zeros(rows))
                    loads = [
                        [c.reshape(-1, ranks).sum(0) for c in costs],
                        [c[mine].sum(1) for c, mine in zip(costs, chosen, strict=True)],
                        [(c[mine] + output[first + mine]).sum(1) for first, c, mine in zip(steps, costs, chosen, strict=True)],
                    ]
                    what = f"{phase.image_size} px, {phase.tokens_per_image} tokens"
                    cells = [what, "learns" if learns else "frozen", rows, *map(over_mean, loads), f"{1000 * spent:.2f}"]
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
