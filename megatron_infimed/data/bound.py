"""How few rows any plan could need: a bound that is proven, not only the sums over the budgets.

Packing is cutting stock. Whoever gives every type of document a price u >= 0 such that no row that fits holds more than 1 in all has proven
that sum(documents x u) rows are needed. Column generation finds such prices: a linear program over the rows known so far (HiGHS) proposes
prices, a knapsack over all rows finds the dearest one, which is added; dividing by its price makes ANY prices valid (Farley), so the search
may stop at any time. Prices are smoothed towards the best ones so far, which saves most of the rounds. Lengths are first rounded DOWN to a
coarse grid, whose bound is valid too and takes a moment; finer grids follow while the plan in hand is not yet within `close` of the bound.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil

import highspy
import numpy as np

from megatron_infimed.data.packing import lower_bound

_GRIDS = (32, 16, 8, 4, 2, 1)
_COLUMNS = 300  # rows added in a round at most
_ROUNDING = 1e-9  # far more than floating point can have added to a bound


@dataclass(frozen=True)
class Bound:
    rows: int
    """No plan needs fewer."""
    method: str
    """"sums" or "linear program, lengths rounded down to N"."""


def prove(
    lengths: np.ndarray,
    images: np.ndarray,
    capacity: int,
    max_images: int | None = None,
    *,
    rows: int,
    close: float = 5e-3,
    seconds: float = 10.0,
) -> Bound:
    """The best bound found until a plan of `rows` rows is proven to be within `close` of the best possible, or `seconds` have passed.

    Args:
        lengths: int [n], 1 to capacity. images: int [n], 0 to max_images.
        rows: of the plan in question.
    """
    best = Bound(lower_bound(lengths, images, capacity, max_images), "sums")
    end = time.monotonic() + seconds
    for grid in _GRIDS:
        enough = rows * (1 - close)
        if best.rows >= enough or time.monotonic() >= end:
            break
        if capacity % grid:
            continue
        found = ceil(_column_generation(lengths // grid, images, capacity // grid, max_images, enough, end) * (1 - _ROUNDING))
        if found > best.rows:
            best = Bound(found, f"linear program, lengths rounded down to multiples of {grid}")
    return best


def _column_generation(lengths: np.ndarray, images: np.ndarray, capacity: int, max_images: int | None, enough: float, end: float) -> float:
    limit = max_images or 0
    key = (images if max_images is not None else np.zeros_like(images)) * (capacity + 1) + lengths
    types, counts = np.unique(key[lengths > 0], return_counts=True)  # fewer documents: still a bound
    if not len(types):
        return 0.0
    length, k = types % (capacity + 1), types // (capacity + 1)
    knapsack = _Knapsack(length, k, capacity, limit)
    program = _Program(counts)
    for i in range(len(types)):  # rows of one type, so that there is a first solution
        times = min(*(b // x for b, x in ((capacity, int(length[i])), (limit, int(k[i]))) if x), 1 << 30)
        program.add({i: times})
    best, anchor = 0.0, length / capacity
    while time.monotonic() < end:
        value, prices = program.solve()
        added = 0
        for weight in (0.9, 0.5, 0.0):
            tried = weight * anchor + (1 - weight) * prices
            dearest, rows = knapsack.solve(tried)
            if (bound := float(counts @ tried) / dearest) > best:
                best, anchor = bound, tried / dearest
            added = sum(program.add(row) for row in rows if sum(n * prices[t] for t, n in row.items()) > 1 + 1e-7)
            if added:
                break
        if not added or best >= enough or best >= value * (1 - 1e-4):
            break
    return best


class _Program:
    """Fewest rows that hold every document, over the rows added so far, in fractions."""

    def __init__(self, counts: np.ndarray) -> None:
        self._solver = highspy.Highs()
        self._solver.silent()
        self._known: set[tuple[tuple[int, int], ...]] = set()
        nothing = np.zeros(0, np.int32), np.zeros(0)
        for n in counts.tolist():
            self._solver.addRow(float(n), highspy.kHighsInf, 0, *nothing)

    def add(self, row: dict[int, int]) -> bool:
        name = tuple(sorted(row.items()))
        if name in self._known:
            return False
        self._known.add(name)
        index, times = zip(*name, strict=True)
        self._solver.addCol(1.0, 0.0, highspy.kHighsInf, len(index), np.array(index, np.int32), np.array(times, float))
        return True

    def solve(self) -> tuple[float, np.ndarray]:
        self._solver.run()
        return self._solver.getObjectiveValue(), np.maximum(np.array(self._solver.getSolution().row_dual), 0.0)


class _Knapsack:
    """The dearest row, exactly, by dynamic programming over tokens and images."""

    def __init__(self, length: np.ndarray, k: np.ndarray, capacity: int, limit: int) -> None:
        self.length, self.k, self.capacity, self.limit = length, k, capacity, limit
        self._groups = []
        for images in np.unique(k):
            members = np.flatnonzero(k == images)  # ascending in length
            upto = np.searchsorted(length[members], np.arange(capacity + 1), side="right")
            self._groups.append((int(images), members, length[members], upto))

    def solve(self, prices: np.ndarray) -> tuple[float, list[dict[int, int]]]:
        """(price of the dearest row, the dearest rows that hold each of the most promising types)."""
        value = np.zeros((self.capacity + 1, self.limit + 1))  # of what fits c tokens and m images
        last = np.full((self.capacity + 1, self.limit + 1), -1, np.int32)  # type put in last; -1: same as one token less
        places = np.arange(self.limit + 1)
        for c in range(self.capacity + 1):
            row, chosen = (value[c - 1].copy() if c else value[0]), last[c]
            for images, members, length, upto in self._groups:
                fits = upto[c]
                if not fits:
                    continue
                room = self.limit + 1 - images
                offer = value[c - length[:fits], :room] + prices[members[:fits], None]
                pick = offer.argmax(0)
                offer = offer[pick, places[:room]]
                better = offer > row[images:]
                row[images:][better] = offer[better]
                chosen[images:][better] = members[pick[better]]
            value[c] = row
        with_type = prices + value[self.capacity - self.length, self.limit - self.k]
        rows = []
        for t in np.argsort(-with_type)[:_COLUMNS].tolist():
            row = self._walk(last, self.capacity - int(self.length[t]), self.limit - int(self.k[t]))
            row[t] = row.get(t, 0) + 1
            rows.append(row)
        return float(value[-1, -1]), rows

    def _walk(self, last: np.ndarray, c: int, m: int) -> dict[int, int]:
        row: dict[int, int] = {}
        while c > 0:
            t = int(last[c, m])
            if t < 0:
                c -= 1
                continue
            row[t] = row.get(t, 0) + 1
            c, m = c - int(self.length[t]), m - int(self.k[t])
        return row
