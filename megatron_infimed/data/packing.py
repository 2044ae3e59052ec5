"""Which documents share a row: a pure function of lengths, image counts and budgets.

Lengths are integers no greater than the capacity, so documents of one (length, images) are interchangeable: the search runs over the
histogram of these types, not over documents. A row begins with the largest type left, and is closed EXACTLY as soon as one type, or a pair,
fills what is left of it; of all pairs the one of which most is in stock, so that rare lengths are kept for the rows that need them. Until
then the most abundant type that fits is added. The finished pattern is laid as often as the stock allows, so the work depends on the number
of types. Where images are scarce too, a row also takes its share of them: a document is then chosen for the tokens an image that the row
still lacks. Taking only a part of the stock at a time (`share`) keeps the mixture alike to the end, and is tried where the first attempt
is not already near `lower_bound`; bound.py proves how near any plan is to the best possible one.
One sort and one scatter then deal out the documents: those of a type in the order given (the mixture's is random), from a place that the
seed chooses; the rows are shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np

_SCARCE = 0.8
"""From this share of the image budget on (were every row full of tokens) a row is also made to take its share of the images."""
_GOOD = 1.0005
"""Rows over lower_bound at which no other attempt is made."""
_FEW = 5_000
"""Up to so many documents the longest that fits is tried too: with one document of most types, abundance says little."""
Pattern = tuple[dict[tuple[int, int], int], int]
"""({(length, images): times in the row}, rows laid like this)."""


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
        seed: decides which documents of a type meet which others, and the order of rows; the number of rows does not depend on it.

    Raises:
        ValueError: arrays of different sizes, a document that cannot fit a row (how many, the first few indices), budgets below 1.
    """
    lengths, images = _checked(lengths, images, capacity, max_images)
    n = len(lengths)
    if not n:
        return Plan(np.zeros(0, np.int64), np.zeros(1, np.int64))
    types, kind, counts = _histogram(lengths, images if max_images is not None else np.zeros_like(images))
    patterns = _search(types, counts.tolist(), capacity, max_images)

    rng = np.random.default_rng(seed)
    by_type = np.argsort(kind, kind="stable")  # radix sort: kind is uint16 unless there are very many types
    ends = np.cumsum(counts)
    for end, count, turn in zip(ends.tolist(), counts.tolist(), rng.integers(counts).tolist(), strict=True):
        if turn:
            by_type[end - count : end] = np.roll(by_type[end - count : end], turn)
    repeats = np.array([r for _, r in patterns])
    sizes = np.repeat(np.array([sum(row.values()) for row, _ in patterns]), repeats)
    place = rng.permutation(len(sizes))  # of each row laid, among all
    offsets = np.zeros(len(sizes) + 1, np.int64)
    offsets[place + 1] = sizes
    np.cumsum(offsets, out=offsets)

    start = dict(zip(types, (ends - counts).tolist(), strict=True))
    order, laid = np.empty(n, np.int64), 0
    for row, repeat in patterns:
        begins, column = offsets[place[laid : laid + repeat], None], 0
        for t, times in row.items():
            documents = by_type[start[t] : start[t] + repeat * times].reshape(repeat, times)
            order[begins + np.arange(column, column + times)] = documents
            start[t] += repeat * times
            column += times
        laid += repeat
    return Plan(order, offsets)


def lower_bound(lengths: np.ndarray, images: np.ndarray, capacity: int, max_images: int | None = None) -> int:
    """No packing needs fewer rows than this: the sums over the budgets. bound.py proves more."""
    return _rows_for_sums(int(np.sum(lengths, dtype=np.int64)), int(np.sum(images, dtype=np.int64)), capacity, max_images)


def _rows_for_sums(tokens: int, images: int, capacity: int, max_images: int | None) -> int:
    return max(-(-tokens // capacity), 0 if max_images is None else -(-images // max_images))


def fill(lengths: np.ndarray, plan: Plan, capacity: int) -> float:
    """Share of the rows' tokens that is documents, 0 to 1; 1.0 for an empty plan."""
    return float(np.sum(lengths, dtype=np.int64)) / (len(plan) * capacity) if len(plan) else 1.0


def _checked(lengths: np.ndarray, images: np.ndarray, capacity: int, max_images: int | None) -> tuple[np.ndarray, np.ndarray]:
    lengths, images = np.asarray(lengths), np.asarray(images)
    if lengths.ndim != 1 or lengths.shape != images.shape:
        raise ValueError(f"lengths {list(lengths.shape)} and images {list(images.shape)} must be one-dimensional and equally long")
    if not len(lengths):
        return lengths.astype(np.int64), images.astype(np.int64)
    if lengths.dtype.kind not in "iu" or images.dtype.kind not in "iu":
        raise ValueError(f"lengths ({lengths.dtype}) and images ({images.dtype}) must be integers")
    if capacity < 1 or (max_images is not None and max_images < 1):
        raise ValueError(f"capacity {capacity} and max_images {max_images} must be at least 1")

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
    key = images.astype(np.int64) * base
    key += lengths
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
    """The types still to be packed, by length."""

    def __init__(self, types: list[tuple[int, int]], counts: list[int], capacity: int) -> None:
        self.count = np.zeros(capacity + 1, np.int64)
        self.fewest, self.most = np.zeros(capacity + 1, np.int32), np.zeros(capacity + 1, np.int32)  # images, of the types of a length
        self.of_length: list[dict[int, int]] = [{} for _ in range(capacity + 1)]
        self.tokens = self.images = 0
        for (length, k), n in zip(types, counts, strict=True):
            self.of_length[length][k] = n
            self.count[length] += n
            self.tokens += length * n
            self.images += k * n
        for length, kinds in enumerate(self.of_length):
            if kinds:
                self.fewest[length], self.most[length] = min(kinds), max(kinds)

    def left(self, length: int, k: int) -> int:
        return self.of_length[length].get(k, 0)

    def take(self, length: int, k: int, n: int) -> None:
        kinds = self.of_length[length]
        kinds[k] -= n
        self.count[length] -= n
        self.tokens -= length * n
        self.images -= k * n
        if not kinds[k]:
            del kinds[k]
            if kinds:
                self.fewest[length], self.most[length] = min(kinds), max(kinds)

    def closing(self, tokens: int, least: int, images: int) -> list[tuple[int, int]]:
        """The most abundant type, or pair of types, of exactly `tokens` with `least` to `images` images; [] if there is none."""
        best, found = 0, []
        for k, n in self.of_length[tokens].items():
            if least <= k <= images and n > best:
                best, found = n, [(tokens, k)]
        half = tokens // 2
        if not half:
            return found
        short, long = slice(1, half + 1), slice(tokens - 1, tokens - half - 1, -1)
        count = np.minimum(self.count[short], self.count[long])
        if 2 * half == tokens:
            count[-1] = self.count[half] // 2
        if self.images:
            count[self.fewest[short] + self.fewest[long] > images] = 0
            if least > 0:
                count[self.most[short] + self.most[long] < least] = 0
        a = int(count.argmax()) + 1
        if count[a - 1] > best:
            for k, n in self.of_length[a].items():
                for k2, n2 in self.of_length[tokens - a].items():
                    both = n // 2 if (a, k) == (tokens - a, k2) else min(n, n2)
                    if both > best and least <= k + k2 <= images:
                        best, found = both, [(a, k), (tokens - a, k2)]
        return found

    def abundant(self, tokens: int, images: int, per_image: float | None, longest: bool) -> tuple[int, int] | None:
        """The most abundant type that fits, the longer of equals; with per_image one that brings the row nearer so many tokens an image."""
        count = self.count[1 : tokens + 1]
        if self.images:
            fewest = self.fewest[1 : tokens + 1]
            count = np.where(fewest <= images, count, 0)
            if per_image is not None:
                dense = fewest * per_image >= np.arange(1, tokens + 1)
                wanted = np.where(dense if per_image <= self.tokens / self.images else ~dense, count, 0)
                count = wanted if wanted.any() else count
        length = tokens - int((count[::-1] > 0 if longest else count[::-1]).argmax())
        if not length or not count[length - 1]:
            return None
        return length, max((k for k in self.of_length[length] if k <= images), key=lambda k: (self.of_length[length][k], -k))


@dataclass(frozen=True)
class _Way:
    """How a search goes about it."""

    spread: bool = False
    """Each row takes its share of the images."""
    share: float = 1.0
    """Of the stock of a type that one pattern may use up; a row's first type is not held back."""
    longest: bool = False
    """The longest type that fits is added, not the most abundant: better for few documents."""
    exact: bool = True
    """Look for what closes a row exactly. longest without exact is first-fit-decreasing."""


def _search(types: list[tuple[int, int]], counts: list[int], capacity: int, max_images: int | None) -> list[Pattern]:
    tokens = sum(length * n for (length, _), n in zip(types, counts, strict=True))
    images = sum(k * n for (_, k), n in zip(types, counts, strict=True))
    tight = max_images is not None and images * capacity > _SCARCE * tokens * max_images
    goal = _GOOD * _rows_for_sums(tokens, images, capacity, max_images)
    few = sum(counts) <= _FEW
    ways = [
        _Way(),
        *([_Way(spread=True)] if tight else []),
        _Way(share=0.25),
        *([_Way(longest=True), _Way(longest=True, exact=False)] if few else []),
    ]
    best: list[Pattern] = []
    fewest, chosen = 0, ways[0]
    for way in ways:
        if way.share < 1 and chosen.spread:
            continue  # it has not helped there
        found = list(_patterns(types, counts, capacity, max_images, way))
        rows = sum(n for _, n in found)
        if not best or rows < fewest:
            best, fewest, chosen = found, rows, way
        if fewest <= goal:
            break
    return best


def _patterns(types: list[tuple[int, int]], counts: list[int], capacity: int, max_images: int | None, way: _Way) -> Iterator[Pattern]:
    """Rows until every document is in one."""
    limit = capacity if max_images is None else max_images
    stock = _Stock(types, counts, capacity)
    largest = sorted(types, key=lambda t: (max(t[0] / capacity, t[1] / limit), t))
    while largest:
        first = largest[-1]
        if not stock.left(*first):
            largest.pop()
            continue
        used = _row(stock, first, capacity, limit, way)
        more = min(stock.left(*t) // n if t == first else int(way.share * (stock.left(*t) // n)) for t, n in used.items())
        for (length, k), n in used.items():
            if more:
                stock.take(length, k, n * more)
        yield used, more + 1


def _row(stock: _Stock, first: tuple[int, int], capacity: int, limit: int, way: _Way) -> dict[tuple[int, int], int]:
    """Takes one row's types out of the stock."""
    share, space = 0.0, capacity  # images and tokens that an average row has
    if way.spread:
        share = min(limit, stock.images * capacity / stock.tokens)
        space = min(capacity, ceil(stock.tokens * limit / max(stock.images, 1)))
    used: dict[tuple[int, int], int] = {}
    tokens, images = 0, 0

    def use(length: int, k: int) -> None:
        nonlocal tokens, images
        stock.take(length, k, 1)
        used[length, k] = used.get((length, k), 0) + 1
        tokens, images = tokens + length, images + k

    use(*first)
    while tokens < capacity:
        lacking = share - images
        if way.exact and tokens < space and (closing := stock.closing(space - tokens, ceil(lacking - 1e-9), limit - images)):
            for t in closing:
                use(*t)
            break
        per_image = max(space - tokens, 0) / lacking if lacking > 0 else None
        if (t := stock.abundant(capacity - tokens, limit - images, per_image, way.longest)) is None:
            break
        use(*t)
    return used
