"""One fixed order of documents for a set of sources: what is seen, how often, and when.

How many documents a source gives is exact: `epochs` times its size, or its share of `documents` by weight (largest remainder). A source
is walked in passes; each pass is its own permutation, seeded by (seed, the source's name, pass) and by nothing else, so the k-th document
of a source does not change when another source is added, dropped or weighted differently. Sources are then interleaved evenly: the k-th
of n documents gets the key (k + jitter) / n, and the keys are sorted. Any stretch of the stream thus holds the sources in nearly their
overall proportion, which keeps the phases of a resolution schedule alike.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_infimed.config import DataConfig, SourceConfig
from megatron_infimed.errors import UserError

_JITTER = -1  # stands where a pass number stands, so that the jitter has a seed of its own


@dataclass(frozen=True)
class Stream:
    """The order in which documents are seen.

    Attributes:
        source: int32 [n], place of the document's source in `data.sources`.
        document: int32 [n], its number within the source.
    """

    source: NDArray[np.int32]
    document: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.document)


def mix(data: DataConfig, sizes: Sequence[int]) -> Stream:
    """The stream of a recipe's sources.

    Args:
        data: sources, documents and seed.
        sizes: documents in each source, in the order of `data.sources`.

    Raises:
        UserError: no sources, an empty source, or shares that come to no document at all.
    """
    if len(sizes) != len(data.sources):
        raise ValueError(f"{len(sizes)} sizes for {len(data.sources)} sources")
    if not data.sources:
        raise UserError("data.sources is empty: list at least one shard prefix, for example data.sources=[{prefix: data/train}]")
    for spec, size in zip(data.sources, sizes, strict=True):
        if size == 0:
            raise UserError(f"{spec.prefix}: the shard holds no documents; take it out of data.sources or preprocess it again")
    counts = shares(data.sources, sizes, data.documents or 0)
    if not sum(counts):
        raise UserError(f"the mixture comes to 0 documents: epochs {[s.epochs for s in data.sources]} of {list(sizes)} round down to none")

    keys, inner = np.empty(sum(counts)), np.empty(sum(counts), np.int32)
    at = 0
    for name, size, count in zip(identities(data.sources), sizes, counts, strict=True):
        for number, begin in enumerate(range(0, count, size)):
            end = min(begin + size, count)
            inner[at + begin : at + end] = _rng(data.seed, name, number).permuted(np.arange(size, dtype=np.int32))[: end - begin]
        keys[at : at + count] = (np.arange(count) + _rng(data.seed, name, _JITTER).random(count)) / max(count, 1)
        at += count
    # The keys of one source rise, so a stable sort merges a few sorted runs and keeps the inner order even where keys collide.
    order = np.argsort(keys, kind="stable")
    del keys
    source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return Stream(source[order], inner[order])


def shares(sources: Sequence[SourceConfig], sizes: Sequence[int], documents: int) -> list[int]:
    """Documents drawn from each source: floor(epochs * size), or the weight's share of `documents` by largest remainder."""
    total = math.fsum(s.weight for s in sources if s.weight is not None)
    exact = [
        documents * spec.weight / total if spec.weight is not None else (1.0 if spec.epochs is None else spec.epochs) * size
        for spec, size in zip(sources, sizes, strict=True)
    ]
    counts = [math.floor(x + 1e-6) for x in exact]  # 0.1 * 30 is 3.0000000000000004, 0.7 * 10 could as well fall short of 7
    weighted = [i for i, spec in enumerate(sources) if spec.weight is not None]
    missing = documents - sum(counts[i] for i in weighted) if weighted else 0
    for i in sorted(weighted, key=lambda i: (counts[i] - exact[i], i))[:missing]:
        counts[i] += 1
    return counts


def identities(sources: Sequence[SourceConfig]) -> list[str]:
    """A name for each source that survives moving the data: the prefix's last part, numbered where two are the same."""
    seen: Counter[str] = Counter()
    names = []
    for spec in sources:
        name = spec.name or Path(spec.prefix).name
        names.append(f"{name}#{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _rng(seed: int, name: str, number: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
