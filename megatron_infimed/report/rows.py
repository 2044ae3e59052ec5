"""What documents and packed rows really contain, in plain values (Span, Doc, Row) and printed on the terminal.

`read_document` reads one document back from disk, `look` plans the shards as training would and reads the first rows. Nothing is taken from
the input files: what you see is what the loader reads. Special tokens are spans of their own, so a token that should not be there is seen.
rows.html draws the same values; shard.py sets the page.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Console
from rich.text import Text

from megatron_infimed.data import packing
from megatron_infimed.data.chat import Tokenizer
from megatron_infimed.data.shards import IMAGE, TARGET, Piece
from megatron_infimed.errors import UserError
from megatron_infimed.report.pictures import Thumbnails, describe
from megatron_infimed.report.shardset import ShardSet

_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(range(0x7F, 0xA0), "\ufffd")
"""Control characters as pictures: text of a data set does not steer the reader's terminal."""


@dataclass(frozen=True)
class Span:
    kind: Literal["context", "target", "image"]
    tokens: int
    text: str = ""
    special: bool = False
    about: str = ""
    """Of an image: number, format, size."""
    thumbnail: str = ""
    """Of an image: a data: address; empty where it does not decode or none is wanted."""


@dataclass(frozen=True)
class Doc:
    number: int
    """In the set of shards."""
    name: str
    """Its number in its shard, with the shard's prefix where there are several."""
    id: str
    source: str
    spans: list[Span]

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.spans)

    @property
    def targets(self) -> int:
        return sum(s.tokens for s in self.spans if s.kind == "target")

    @property
    def images(self) -> list[Span]:
        return [s for s in self.spans if s.kind == "image"]

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(kind, tokens) with neighbours merged."""
        out: list[tuple[str, int]] = []
        for s in self.spans:
            if out and out[-1][0] == s.kind != "image":
                out[-1] = (s.kind, out[-1][1] + s.tokens)
            else:
                out.append((s.kind, s.tokens))
        return out


@dataclass(frozen=True)
class Row:
    number: int
    docs: list[Doc]

    @property
    def tokens(self) -> int:
        return sum(d.tokens for d in self.docs)

    @property
    def images(self) -> int:
        return sum(len(d.images) for d in self.docs)

    @property
    def targets(self) -> int:
        return sum(d.targets for d in self.docs)


@dataclass(frozen=True)
class Look:
    name: str
    capacity: int
    tokens_per_image: int
    rows: list[Row]
    total_rows: int
    documents: int
    too_long: int
    fill: float
    lower_bound: int


def read_document(shards: ShardSet, i: int, tokens_per_image: int, thumbnails: Thumbnails | None, most_pictures: int | None = None) -> Doc:
    """Document i of the set at a resolution. Without thumbnails, and after `most_pictures`, only headers of pictures are read."""
    shard, k = shards.document(i)
    special = [v for name, v in vars(shards.tokenizer.special).items() if name != "pad"]
    spans: list[Span] = []
    pictures = 0
    for piece in shard.document(k).pieces:
        if piece.mode != IMAGE:
            spans += _text_spans(piece, shards.tokenizer, special)
            continue
        wanted = most_pictures is None or pictures < most_pictures
        about, thumbnail = thumbnails.of(shard, piece.image) if thumbnails and wanted else describe(shard.image(piece.image), None)
        spans.append(Span("image", tokens_per_image, about=f"image {piece.image}, {about}", thumbnail=thumbnail))
        pictures += 1
    return Doc(i, f"{k}" if len(shards.shards) == 1 else f"{k} of {shard.prefix}", shard.record_id(k), shard.source(k), spans)


def look(
    shards: ShardSet,
    *,
    rows: int = 5,
    capacity: int = 4096,
    tokens_per_image: int = 144,
    max_images: int | None = None,
    seed: int = 0,
    thumbnails: Thumbnails | None = None,
) -> Look:
    """Plans the shards alone, together, and reads the first rows.

    Raises:
        UserError: no document fits a row.
    """
    lengths, images, fits = fitting(shards, capacity, tokens_per_image, max_images)
    if not len(fits):
        raise UserError(f"{shards.name}: none of {len(shards)} documents fits a row of {capacity} tokens; raise --capacity")
    plan = packing.plan(lengths, images, capacity=capacity, max_images=max_images, seed=seed)
    shown = [
        Row(r, [read_document(shards, int(fits[i]), tokens_per_image, thumbnails) for i in plan.row(r)])
        for r in range(min(rows, len(plan)))
    ]
    return Look(
        name=shards.name,
        capacity=capacity,
        tokens_per_image=tokens_per_image,
        rows=shown,
        total_rows=len(plan),
        documents=len(fits),
        too_long=len(shards) - len(fits),
        fill=packing.fill(lengths, plan, capacity),
        lower_bound=packing.lower_bound(lengths, images, capacity, max_images),
    )


def fitting(shards: ShardSet, capacity: int, tokens_per_image: int, max_images: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, images, number in the set) of the documents that fit a row, each int64 [m]."""
    lengths, images = shards.lengths(tokens_per_image), shards.image_counts
    fits = np.flatnonzero((lengths <= capacity) & (True if max_images is None else images <= max_images))
    return lengths[fits], images[fits], fits


def _text_spans(piece: Piece, tokenizer: Tokenizer, special: list[int]) -> list[Span]:
    kind = "target" if piece.mode == TARGET else "context"
    cuts = sorted({0, len(piece.ids), *(c for i in np.flatnonzero(np.isin(piece.ids, special)) for c in (int(i), int(i) + 1))})
    out = []
    for a, b in itertools.pairwise(cuts):
        ids = piece.ids[a:b].tolist()
        out.append(Span(kind, b - a, tokenizer.decode(ids, skip_special=False), special=ids[0] in special))
    return out


def show(found: Look, console: Console) -> None:
    """Prints the rows: context dim, targets green, images and special tokens in their own colours."""
    console.print(_text(f"{found.name}: {packing_line(found)}", "bold"))
    for row in found.rows:
        console.print()
        console.rule(_text(row_line(row, found)))
        for doc in row.docs:
            console.print(_text(f"[{doc.name}] {doc.id} ({doc.source}): {doc.tokens} tokens, {doc.targets} with loss", "underline"))
            text = Text()
            for s in doc.spans:
                if s.kind == "image":
                    text.append(f"[{s.tokens} x <|image_pad|>: {s.about}]", style="cyan")
                else:
                    style = {"target": "bold green", "context": "bright_black"}[s.kind] + (" italic" if s.special else "")
                    text.append(_text(s.text, style))
            console.print(text, soft_wrap=True)


def _text(words: str, style: str = "") -> Text:
    return Text(words.translate(_VISIBLE), style)


def packing_line(found: Look) -> str:
    dropped = f", {found.too_long:,} documents too long or with too many images for a row" if found.too_long else ""
    return (
        f"{found.documents:,} documents in {found.total_rows:,} rows of {found.capacity:,} tokens at "
        f"{found.tokens_per_image} tokens an image: {100 * found.fill:.2f} % full, at least {found.lower_bound:,} rows needed{dropped}"
    )


def row_line(row: Row, found: Look) -> str:
    return (
        f"row {row.number}: {len(row.docs)} documents, {row.images} images, {row.tokens:,} of {found.capacity:,} tokens "
        f"({100 * row.tokens / found.capacity:.1f} %), {row.targets:,} with loss"
    )
