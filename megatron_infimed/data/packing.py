"""Which documents share a row: a pure function of lengths, image counts and budgets.

Lengths are integers no greater than the capacity, so documents of one (length, images) are interchangeable: the search runs over the
histogram of these types, not over documents. It builds one row at a time, starting from the largest type left; as soon as x more of that
type and y of a smaller one fill the row EXACTLY it is closed, else the largest that fits is added and the question asked again. The
finished pattern is laid as often as the histogram allows, so the work depends on the number of types. With an image limit, and as soon as
the documents left have nearly as many images for a row as it may hold, a row first takes its share of the images, spread over its tokens.
One sort and one scatter then deal out the documents; the seed shuffles documents within a type, and the rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np

_SCARCE = 0.8
"""From this share of the image budget on (were every row full of tokens) a row also gets its share of the images."""


@dataclass(frozen=True)
class Plan:
    """Row r holds documents order[offsets[r]:offsets[r + 1]]."""

    order: np.ndarray
    """int64 [n]: a permutation of the documents."""
    offsets: np.ndarray
    """int64 [rows + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, r: int) -> np.ndarray:
        return self.order[self.offsets[r] : self.offsets[r + 1]]


def plan(lengths: np.ndarray, images: np.ndarray, *, capacity: int, max_images: int | None = None, seed: int = 0) -> Plan:
    """Packs every document into rows of `capacity` tokens and at most `max_images` images.

    Args:
        lengths: int [n], tokens of each document, image tokens included; at least 1.
        images: int [n], images of each document.
        seed: shuffles documents of one type, and rows; the number of rows does not depend on it.

    Raises:
        ValueError: arrays of different sizes, a document that cannot fit a row (how many, the first few indices), budgets below 1.
    """
    lengths, images = _checked(lengths, images, capacity, max_images)
    n = len(lengths)
    if not n:
        return Plan(np.zeros(0, np.int64), np.zeros(1, np.int64))
    types, kind, counts = _histogram(lengths, images if max_images is not None else np.zeros_like(images))
    patterns = _patterns(types, counts.tolist(), capacity, max_images)

    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(n)
    by_type = shuffled[np.argsort(kind[shuffled], kind="stable")]  # radix sort: kind is uint16 unless there are very many types
    start = (np.cumsum(counts) - counts).tolist()
    order, widths, at = np.empty(n, np.int64), [], 0
    for items, repeat in patterns:
        width = sum(m for _, m in items)
        block = order[at : at + repeat * width].reshape(repeat, width)
        column = 0
        for t, m in items:
            block[:, column : column + m] = by_type[start[t] : start[t] + repeat * m].reshape(repeat, m)
            start[t] += repeat * m
            column += m
        widths.append((width, repeat))
        at += repeat * width
    sizes = np.repeat(np.array([w for w, _ in widths]), np.array([r for _, r in widths]))
    begins = np.cumsum(sizes) - sizes
    rows = rng.permutation(len(sizes))
    offsets = np.concatenate([[0], np.cumsum(sizes[rows])])
    within = np.arange(n) - np.repeat(offsets[:-1], sizes[rows])
    return Plan(order[np.repeat(begins[rows], sizes[rows]) + within], offsets)


def lower_bound(lengths: np.ndarray, images: np.ndarray, capacity: int, max_images: int | None = None) -> int:
    """No packing needs fewer rows than this."""
    rows = -(-int(np.sum(lengths, dtype=np.int64)) // capacity)
    return rows if max_images is None else max(rows, -(-int(np.sum(images, dtype=np.int64)) // max_images))


def fill(lengths: np.ndarray, plan: Plan, capacity: int) -> float:
    """Share of the rows' tokens that is documents, 0 to 1; 1.0 for an empty plan."""
    return float(np.sum(lengths, dtype=np.int64)) / (len(plan) * capacity) if len(plan) else 1.0


def _checked(lengths: np.ndarray, images: np.ndarray, capacity: int, max_images: int | None) -> tuple[np.ndarray, np.ndarray]:
    lengths, images = np.asarray(lengths), np.asarray(images)
    if lengths.ndim != 1 or lengths.shape != images.shape:
        raise ValueError(f"lengths {list(lengths.shape)} and images {list(images.shape)} must be one-dimensional and equally long")
    if not len(lengths):
        lengths, images = lengths.astype(np.int64), images.astype(np.int64)
    if lengths.dtype.kind not in "iu" or images.dtype.kind not in "iu":
        raise ValueError(f"lengths ({lengths.dtype}) and images ({images.dtype}) must be integers")
    if capacity < 1 or (max_images is not None and max_images < 1):
        raise ValueError(f"capacity {capacity} and max_images {max_images} must be at least 1")
    lengths, images = lengths.astype(np.int64), images.astype(np.int64)

    def refuse(bad: np.ndarray, what: str) -> None:
        if bad.any():
            first = ", ".join(map(str, np.flatnonzero(bad)[:5]))
            raise ValueError(
                f"{int(bad.sum())} of {len(bad)} documents {what} (first indices: {first}); cut or reject them before planning"
            )

    refuse(lengths < 1, "have a length below 1")
    refuse(images < 0, "have a negative number of images")
    refuse(lengths > capacity, f"are longer than a row of {capacity} tokens")
    if max_images is not None:
        refuse(images > max_images, f"have more than {max_images} images")
    return lengths, images


def _histogram(lengths: np.ndarray, images: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """(length, images) of each type; the type of each document [n]; documents of each type."""
    base = int(lengths.max()) + 1
    key = images * base + lengths
    if (size := int(key.max()) + 1) <= max(1 << 22, 4 * len(key)):
        counts = np.bincount(key, minlength=size)
        present = np.flatnonzero(counts)
        number = np.zeros(size, np.uint16 if len(present) <= 1 << 16 else np.int32)
        number[present] = np.arange(len(present))
        kind, counts = number[key], counts[present]
    else:
        present, kind, counts = np.unique(key, return_inverse=True, return_counts=True)
        kind = kind.astype(np.uint16 if len(present) <= 1 << 16 else np.int32)
    return [(int(k % base), int(k // base)) for k in present], kind, counts


class _Stock:
    """The types still to be packed. `used` is what the row in hand takes away before it is laid."""

    def __init__(self, types: list[tuple[int, int]], counts: list[int]) -> None:
        self.types, self.counts = types, counts
        self.tokens = sum(length * n for (length, _), n in zip(types, counts, strict=True))
        self.images = sum(k * n for (_, k), n in zip(types, counts, strict=True))
        self.of_length: dict[int, list[int]] = {}
        self.columns: dict[int, list[tuple[int, int]]] = {}  # images -> ascending (length, type)
        for t, (length, k) in enumerate(types):
            self.of_length.setdefault(length, []).append(t)
            self.columns.setdefault(k, []).append((length, t))
        self.used: dict[int, int] = {}
        self._divisors: dict[int, list[int]] = {}

    def left(self, t: int) -> int:
        return self.counts[t] - self.used.get(t, 0)

    def use(self, t: int, n: int) -> None:
        if n:
            self.used[t] = self.used.get(t, 0) + n

    def longest(self, tokens: int, images: int, per_image: float | None = None) -> int:
        """The longest type that fits, -1 if none; with per_image, of those that have images and at most so many tokens an image."""
        best, most = -1, 0
        for k, column in self.columns.items():
            if k > images or (per_image is not None and not k):
                continue
            at = bisect_right(column, (tokens if per_image is None else min(tokens, int(per_image * k)), len(self.types))) - 1
            while at >= 0 and column[at][0] > most and not self.left(column[at][1]):
                at -= 1
            if at >= 0 and column[at][0] > most:
                most, best = column[at]
        return best

    def exactly(self, tokens: int, images: int, below: int) -> tuple[int, int] | None:
        """(type, y): y of one type shorter than `below` fill `tokens`. The longest such type: small ones are kept to fill later rows."""
        if tokens not in self._divisors:
            small = np.arange(1, int(tokens**0.5) + 1)
            small = small[tokens % small == 0]
            self._divisors[tokens] = sorted({*small.tolist(), *(tokens // small).tolist()}, reverse=True)
        for length in self._divisors[tokens]:
            if length < below:
                for t in self.of_length.get(length, ()):
                    y = tokens // length
                    if self.types[t][1] * y <= images and self.left(t) >= y:
                        return t, y
        return None

    def lay(self) -> tuple[list[tuple[int, int]], int]:
        """Lays the row in hand as often as the stock allows."""
        items = list(self.used.items())
        repeat = min(self.counts[t] // m for t, m in items)
        for t, m in items:
            length, k = self.types[t]
            self.tokens -= length * m * repeat
            self.images -= k * m * repeat
            self.counts[t] -= m * repeat
            if not self.counts[t]:
                column = self.columns[k]
                column.pop(bisect_right(column, (length, t)) - 1)
                self.of_length[length].remove(t)
                if not column:
                    del self.columns[k]
        self.used = {}
        return items, repeat


def _patterns(
    types: list[tuple[int, int]], counts: list[int], capacity: int, max_images: int | None
) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Yields ([(type, times in the row)], rows laid like this) until every document is in a row."""
    stock = _Stock(types, counts)
    while stock.columns:
        if max_images is None:
            _fill_tokens(stock, capacity, capacity)
        else:
            tokens, images = capacity, max_images
            scarcity = stock.images * capacity / (stock.tokens * max_images)  # of images against tokens
            if scarcity > _SCARCE:
                tokens, images = _take_images(stock, capacity, max_images, min(max_images, ceil(max_images * scarcity)))
            _fill_tokens(stock, tokens, images)
        yield stock.lay()


def _take_images(stock: _Stock, tokens: int, images: int, wanted: int) -> tuple[int, int]:
    """Begins a row with the longest type, then takes `wanted` images spread over its tokens; what is left of both budgets."""
    spare = images - wanted
    per_image = None
    while images > spare and tokens:
        t = stock.longest(tokens, images, per_image)
        if t < 0:
            break
        length, k = stock.types[t]
        x = 1 if per_image is None else max(1, min((images - spare) // k // 2, stock.left(t), tokens // length))
        stock.use(t, x)
        tokens, images = tokens - x * length, images - x * k
        per_image = tokens / max(images - spare, 1)
    return tokens, images


def _fill_tokens(stock: _Stock, tokens: int, images: int) -> None:
    """Fills the row: at each step exactly, by two types, or else with the longest that fits."""
    while tokens and (t := stock.longest(tokens, images)) >= 0:
        length, k = stock.types[t]
        for x in range(min(stock.left(t), tokens // length, images // k if k else tokens), 0, -1):
            space = tokens - x * length
            if not space:
                stock.use(t, x)
                return
            if (done := stock.exactly(space, images - x * k, length)) is not None:
                stock.use(t, x)
                stock.use(*done)
                return
        stock.use(t, 1)
        tokens, images = tokens - length, images - k
