"""Histograms and a heat map as plain numbers, for pages that draw them with SVG or HTML and no plotting library.

Like charts.py: everything is in per cent of the drawing, which the page stretches to any width; labels are set as HTML, so that they stay
readable on a telephone. Quantities that span decades (tokens, pixels) have logarithmic axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

_LEAST = 1.5
"""Height in per cent of a bar that is not empty: one document among a million is seen too."""


@dataclass(frozen=True)
class Bar:
    label: str
    count: int
    left: float
    width: float
    height: float
    beyond: bool = False
    """On the far side of the mark."""


@dataclass(frozen=True)
class Histogram:
    bars: list[Bar]
    """Without the empty ones."""
    ticks: list[tuple[float, str]]
    """(per cent from the left, label)."""
    marks: list[tuple[float, str]] = field(default_factory=list)

    @property
    def most(self) -> int:
        return max((b.count for b in self.bars), default=0)


@dataclass(frozen=True)
class HeatMap:
    cells: list[tuple[float, float, float, str]]
    """(per cent from the left, per cent from the top, opacity, label); all of one size."""
    side: float
    """Of a cell, in per cent."""
    ticks: list[tuple[float, str]]
    """From the left, and from the bottom."""
    marks: list[tuple[float, str]]


def octaves(low: float, high: float, *, through: float, parts: int) -> np.ndarray:
    """Edges [k] at a constant ratio, 2 ** (1 / parts), one of them `through`, that enclose low and high."""
    first = int(np.floor(parts * np.log2(min(low, through) / through)))
    last = int(np.floor(parts * np.log2(max(high, through) / through))) + 1
    return through * 2.0 ** (np.arange(first, last + 1) / parts)


def histogram(
    values: np.ndarray,
    edges: np.ndarray,
    label: Callable[[float, float], str],
    *,
    ticks: Sequence[tuple[float, str]],
    mark: tuple[float, str] | None = None,
) -> Histogram:
    """Counts between edges on a logarithmic axis.

    Args:
        values: [n], each within the edges.
        label: of a bar from a to b.
        ticks, mark: (value, label); those outside the edges are left out. Bars from the mark on are `beyond`.
    """
    counts, _ = np.histogram(values, edges)
    at = _places(edges, edges)
    top = max(int(counts.max(initial=0)), 1)
    bars = [
        Bar(
            label(float(edges[i]), float(edges[i + 1])),
            int(counts[i]),
            float(at[i]),
            float(at[i + 1] - at[i]),
            _height(int(counts[i]), top),
            mark is not None and float(edges[i]) >= mark[0],
        )
        for i in np.flatnonzero(counts)
    ]
    return Histogram(bars, _inside(ticks, edges), _inside([mark], edges) if mark else [])


def categories(labels: Sequence[str], counts: Sequence[int]) -> Histogram:
    """A bar of equal width for each label; a tenth at most."""
    width, top = 100 / max(len(labels), 10), max([*counts, 1])
    bars = [Bar(label, n, i * width, width, _height(n, top)) for i, (label, n) in enumerate(zip(labels, counts, strict=True)) if n]
    return Histogram(bars, [((i + 0.5) * width, label) for i, label in enumerate(labels)])


def heat_map(sizes: np.ndarray, *, marks: Sequence[int]) -> HeatMap:
    """Widths against heights, both on the same logarithmic axis, so that square pictures lie on the diagonal.

    Args:
        sizes: int [n, 2], n at least 1.
        marks: numbers of pixels to draw lines at.
    """
    edges = octaves(min(int(sizes.min()), *marks), max(int(sizes.max()), *marks), through=marks[-1], parts=4)
    counts, _, _ = np.histogram2d(sizes[:, 0], sizes[:, 1], bins=[edges, edges])
    side, top = 100 / (len(edges) - 1), counts.max()
    cells = [
        (
            float(x * side),
            float(100 - (y + 1) * side),
            float(0.2 + 0.8 * np.sqrt(counts[x, y] / top)),
            f"{_pixels(edges, x)} wide, {_pixels(edges, y)} high: {int(counts[x, y]):,}",
        )
        for x, y in zip(*np.nonzero(counts), strict=True)
    ]
    few = edges[-1] < 16 * edges[0]
    ticks = _inside([(m, f"{m:,}") for k in range(31) for m in ((2**k, 3 * 2**k) if few else (2**k,))], edges)
    return HeatMap(cells, float(side), ticks, _inside([(m, str(m)) for m in marks], edges))


def between(a: float, b: float) -> str:
    """The whole numbers from a on and below b."""
    first, last = int(np.ceil(a)), int(np.ceil(b)) - 1
    return f"{first:,}" if first >= last else f"{first:,} to {last:,}"


def _pixels(edges: np.ndarray, i: int) -> str:
    return between(float(edges[i]), float(edges[i + 1]))


def _height(count: int, top: int) -> float:
    return max(100 * count / top, _LEAST) if count else 0.0


def _places(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    low, high = np.log(edges[0]), np.log(edges[-1])
    return 100 * (np.log(values) - low) / (high - low)


def _inside(ticks: Sequence[tuple[float, str]], edges: np.ndarray) -> list[tuple[float, str]]:
    return [(float(_places(np.array(v), edges)), label) for v, label in ticks if edges[0] <= v <= edges[-1]]
