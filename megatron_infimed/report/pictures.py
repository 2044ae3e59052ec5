"""Stored images, looked at: thumbnails within a budget of bytes, and what the headers of a sample say.

Nothing here trusts an image: what does not decode is shown as such, and only the raster formats that shards hold are tried (never EPS,
for which Pillow starts Ghostscript).
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_infimed.data.shards import Shard
from megatron_infimed.report.shardset import ShardSet

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")
_READERS = 8


class Thumbnails:
    """JPEG data: addresses of at most `size` pixels a side, until `budget` characters are given out. An image is decoded once."""

    def __init__(self, size: int, budget: int) -> None:
        self.size, self.left = size, budget
        self._made: dict[tuple[str, int], tuple[str, str]] = {}

    def of(self, shard: Shard, number: int) -> tuple[str, str]:
        """(format and size or why it does not decode, address; empty if it does not decode or the budget is spent)."""
        key = (shard.prefix, number)
        if key not in self._made:
            self._made[key] = describe(shard.image(number), self.size if self.left > 0 else None)
        about, address = self._made[key]
        if self.left <= 0:
            return about, ""
        self.left -= len(address)
        return about, address


def describe(data: bytes, thumbnail: int | None) -> tuple[str, str]:
    """(about, data: address or ""); the picture is decoded only for a thumbnail."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            about = f"{image.format} {image.width} x {image.height}, {len(data) / 1024:.1f} KiB"
            if thumbnail is None:
                return about, ""
            image.thumbnail((thumbnail, thumbnail))
            out = io.BytesIO()
            image.convert("RGB").save(out, "JPEG", quality=78)
    except Exception as e:  # decoders raise all sorts of things; shown, not hidden: training will show a gray picture
        return f"does not decode: {type(e).__name__}", ""
    return about, "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


@dataclass(frozen=True)
class Originals:
    """Headers of a sample of the distinct images."""

    distinct: int
    sampled: int
    unreadable: int
    sizes: np.ndarray
    """int64 [readable, 2]: width, height."""
    formats: Counter[str]

    def below(self, side: int) -> int:
        """Images whose shorter side has fewer pixels: they would be enlarged."""
        return int((self.sizes.min(axis=1) < side).sum()) if len(self.sizes) else 0


def originals(shards: ShardSet, sample: int, seed: int) -> Originals:
    """Reads `sample` distinct images drawn by the seed (all, if there are fewer); no pixel is decoded."""
    distinct = int(shards.image_starts[-1])
    drawn = np.sort(np.random.default_rng(seed).choice(distinct, min(sample, distinct), replace=False, shuffle=False))
    with ThreadPoolExecutor(_READERS) as pool:  # a network file system answers many readers sooner than one
        found = list(pool.map(lambda i: _header(shards.image(i)), drawn.tolist()))
    read = [h for h in found if h is not None]
    sizes = np.array([size for _, size in read], np.int64).reshape(-1, 2)
    return Originals(distinct, len(drawn), len(found) - len(read), sizes, Counter(kind for kind, _ in read))


def _header(data: bytes) -> tuple[str, tuple[int, int]] | None:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return str(image.format), image.size
    except Exception:  # counted as unreadable
        return None
