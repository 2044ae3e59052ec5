"""Which rows of a global batch each data parallel rank takes, so that all are done at the same time.

Every row has `capacity` tokens, so the linear layers cost the same for each, full or empty. What differs is attention, which goes with the
square of a document's length (padding at a row's end is a document of its own, and an empty row is one long one), and the images, which
alone go through the tower. `spread` deals the rows out in rounds, the costliest first, and in each round the costliest row to the rank that
is lightest so far; then it exchanges rows of the costliest rank while that helps. Every rank works this out for itself from the plan, a
millisecond a step, so only operations that give the same bits on every machine are used (no sums whose order is left to the processor).
The cost is a model, flops.py's executed work: how fast each kind of work runs is not in it, nor is the output layer, which computes at
target tokens alone (PREFIX.docs does not know how many). Padding inside a document's segment (data.document_alignment) counts as the end's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_infimed.config import Recipe
from megatron_infimed.counts import Counts
from megatron_infimed.data.schedule import Phase
from megatron_infimed.flops import step_flops

_CLOSE = 1e-3
"""Ranks whose costs differ by no more than this share are as good as equal."""


class Prices(NamedTuple):
    """FLOPs executed in a step, forward and backward."""

    token: float
    """A token's way through the linear layers of the language model."""
    pair: float
    """A token and one it sees, in all of its attention layers."""
    image: float
    """An image through tower and projector."""


def prices(recipe: Recipe, phase: Phase) -> Prices:
    token, pair, image = (
        step_flops(recipe, counts, phase.image_size)
        for counts in (Counts(padding=1), Counts(pairs=1), Counts(images=1, image_tokens=phase.tokens_per_image))
    )
    return Prices(token["language"].hardware, pair["attention"].hardware, image["tower"].hardware + image["projector"].hardware)


def row_costs(recipe: Recipe, phase: Phase, first: int = 0, count: int | None = None) -> NDArray[np.float64]:
    """FLOPs [count] of the rows from `first` on (default: all); past the phase's last row they are empty."""
    count = phase.rows - first if count is None else count
    tokens, images, pairs = (
        np.pad(part.astype(np.float64), (0, count - len(part)))
        for part in (a[first : first + count] for a in (phase.row_tokens, phase.row_images, phase.row_pairs))
    )
    padding, price = recipe.data.capacity - tokens, prices(recipe, phase)
    pairs += padding * (padding + 1) / 2
    return recipe.data.capacity * price.token + pairs * price.pair + images * price.image


def rows_of(recipe: Recipe, phase: Phase, first: int, rank: int, ranks: int) -> NDArray[np.int64]:
    """The rows [micro-batches, micro_rows] of data parallel rank `rank` in the step that begins at row `first`.

    With `parallel.balance` off micro-batch m takes rows first + (m * ranks + rank) * micro_rows + 0, 1, ...
    """
    rows, micro_rows = recipe.batch.rows, recipe.batch.micro_rows
    if not recipe.parallel.balance:
        return first + np.arange(rows).reshape(-1, ranks, micro_rows)[:, rank]
    costs = row_costs(recipe, phase, first, rows)
    mine = spread(costs, ranks)[rank]
    return first + mine[spread(costs[mine], len(mine) // micro_rows)]


def spread(costs: NDArray[np.float64], parts: int) -> NDArray[np.int64]:
    """Rows [parts, rows / parts] with parts of nearly equal cost; rows rise within a part, and so do the parts' first rows."""
    chosen = np.empty((parts, len(costs) // parts), np.int64)
    loads = np.zeros(parts)
    for place, rows in enumerate(np.argsort(-costs, kind="stable").reshape(-1, parts)):
        lightest = np.argsort(loads, kind="stable")
        chosen[lightest, place] = rows
        loads[lightest] += costs[rows]
    while loads.max() - loads.min() > _CLOSE * loads.max() and _exchange(chosen, loads, costs):
        pass
    chosen.sort(axis=1)
    return chosen[np.argsort(chosen[:, 0])]


def _exchange(chosen: NDArray[np.int64], loads: NDArray[np.float64], costs: NDArray[np.float64]) -> bool:
    """Makes the one exchange that relieves the costliest part most; False where none does."""
    top = int(loads.argmax())
    moved = costs[chosen[top]][:, None, None] - costs[chosen]  # [place in top, part, place in part]
    heavier = np.maximum(loads[top] - moved, loads[:, None] + moved)
    best = int(heavier.argmin())
    if heavier.flat[best] >= loads[top]:
        return False
    place, part, other = (int(i) for i in np.unravel_index(best, heavier.shape))
    loads[top] -= moved[place, part, other]
    loads[part] += moved[place, part, other]
    chosen[top, place], chosen[part, other] = chosen[part, other], chosen[top, place]
    return True
