"""Curves for HTML pages, drawn without a plotting library.

A Track is one strip of a chart: paths in a box of WIDTH x HEIGHT that the page stretches to any width (strokes do not scale with it), and
labels in per cent of the strip, which the page sets as HTML, so that text stays readable on a telephone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 1000.0, 100.0
_MOST_POINTS = 1200


@dataclass(frozen=True)
class Track:
    name: str
    raw: str = ""
    """SVG path of every measurement."""
    line: str = ""
    """SVG path of what to look at: the smoothed measurements, or a step line."""
    ticks: list[tuple[float, str]] = field(default_factory=list)
    """(per cent from the top, label)."""
    notes: list[tuple[float, float, str]] = field(default_factory=list)
    """(per cent from the left, per cent from the top, label)."""


def smooth(values: Sequence[float]) -> list[float]:
    """Geometric mean over a window around each value, a thirtieth of the curve, cut off at its ends; so nothing lags."""
    sums = list(itertools.accumulate((math.log(max(v, 1e-6)) for v in values), initial=0.0))
    half, n, out = max(2, len(values) // 60), len(values), []
    for i in range(n):
        first, end = max(0, i - half), min(n, i + half + 1)
        out.append(math.exp((sums[end] - sums[first]) / (end - first)))
    return out


def loss_track(stages: Sequence[Sequence[float]]) -> Track:
    """Losses of stages laid end to end, on a logarithmic axis. Smoothing begins anew with each stage."""
    values = [max(v, 1e-6) for stage in stages for v in stage]
    low, high = math.log10(min(values)), math.log10(max(values))
    low, high = low - 0.04 * (high - low or 1), high + 0.06 * (high - low or 1)

    def y(value: float) -> float:
        return HEIGHT * (high - math.log10(max(value, 1e-6))) / (high - low)

    raw, line, at = [], [], 0
    for stage in stages:
        xs = [WIDTH * (at + i + 0.5) / len(values) for i in range(len(stage))]
        raw.append(_path(xs, [y(v) for v in stage]))
        line.append(_path(xs, [y(v) for v in smooth(stage)]))
        at += len(stage)
    marks = [(m * 10.0**e, m) for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    inside = [(v, m) for v, m in marks if low <= math.log10(v) <= high]
    if len(inside) > 6:
        inside = [(v, m) for v, m in inside if m == 1] if len(inside) > 12 else [(v, m) for v, m in inside if m != 2]
    return Track("loss", "".join(raw), "".join(line), [(y(v), f"{v:g}") for v, _ in inside if y(v) > 0.08 * HEIGHT])


def step_track(name: str, values: Sequence[float]) -> Track:
    """A quantity that stays for many steps and then jumps; each level is labelled where it begins."""
    top, path, notes = max(values) * 1.6, [], []
    for i, value in enumerate(values):
        if i == 0 or value != values[i - 1]:
            x, y = WIDTH * i / len(values), HEIGHT * (1 - value / top)
            path.append(f"H{x:.2f}V{y:.2f}" if path else f"M{x:.2f} {y:.2f}")
            notes.append((100 * i / len(values), y, f"{value:g}"))
    return Track(name, line="".join([*path, f"H{WIDTH:.2f}"]), notes=notes)


def share_track(name: str, stages: Sequence[Sequence[float]], label: str) -> Track:
    """Shares from 0 to 1 with one label for all of them; the strip's lower edge is 0, its upper 1."""
    n, path, at = sum(len(s) for s in stages), [], 0
    for stage in stages:
        path.append(_path([WIDTH * (at + i + 0.5) / n for i in range(len(stage))], [HEIGHT * (1 - v) for v in stage]))
        at += len(stage)
    return Track(name, line="".join(path), notes=[(0.0, 92.0, label)])


def step_ticks(steps: int) -> list[tuple[float, str]]:
    """(per cent from the left, label) of about six round step numbers."""
    rough = steps / 6
    size = 10 ** math.floor(math.log10(max(rough, 1)))
    every = max(1, round(next(m * size for m in (1, 2, 5, 10) if m * size >= rough)))
    return [(100 * s / steps, f"{s:,}".replace(",", " ")) for s in range(0, steps + 1, every)]


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    every = max(1, math.ceil(len(xs) / _MOST_POINTS))
    points = [f"{x:.1f} {y:.2f}" for x, y in zip(xs[::every], ys[::every], strict=True)]
    return "M" + "L".join(points) if points else ""
