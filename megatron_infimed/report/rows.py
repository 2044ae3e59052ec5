"""What a packed row really contains, for people: printed on the terminal and drawn as one self-contained HTML page.

`look` plans the shard as training would and reads the first rows back from disk into plain values (Row, Doc, Span); `show` prints them with
rich, `page` renders rows.html. Nothing is taken from the input files: what you see is what the loader reads. Special tokens are spans of
their own, so a token that should not be there is seen.
"""

from __future__ import annotations

import base64
import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from jinja2 import Environment, PackageLoader
from PIL import Image
from rich.console import Console
from rich.text import Text

from megatron_infimed.data import packing
from megatron_infimed.data.chat import Tokenizer, load_tokenizer
from megatron_infimed.data.shards import IMAGE, TARGET, Piece, Shard
from megatron_infimed.errors import UserError

THUMBNAIL = 180


@dataclass(frozen=True)
class Span:
    kind: Literal["context", "target", "image"]
    tokens: int
    text: str = ""
    special: bool = False
    about: str = ""
    """Of an image: number, format, size."""
    thumbnail: str = ""
    """Of an image: a data: address; empty where it does not decode."""


@dataclass(frozen=True)
class Doc:
    index: int
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
        return sum(s.kind == "image" for d in self.docs for s in d.spans)

    @property
    def targets(self) -> int:
        return sum(d.targets for d in self.docs)


@dataclass(frozen=True)
class Look:
    prefix: str
    capacity: int
    tokens_per_image: int
    rows: list[Row]
    total_rows: int
    documents: int
    too_long: int
    fill: float
    lower_bound: int


def look(
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    rows: int = 5,
    capacity: int = 4096,
    tokens_per_image: int = 144,
    max_images: int | None = None,
    seed: int = 0,
    thumbnails: bool = True,
) -> Look:
    """Plans the shard alone and reads its first rows.

    Raises:
        UserError: damaged or foreign shard, or no document fits a row.
    """
    shard = Shard(prefix)
    shard.check_tokenizer(tokenizer)
    lengths, images = shard.lengths(tokens_per_image), shard.image_counts
    fits = np.flatnonzero((lengths <= capacity) & (True if max_images is None else images <= max_images))
    if not len(fits):
        raise UserError(f"{prefix}: none of {len(shard)} documents fits a row of {capacity} tokens; raise --capacity")
    lengths, images = lengths[fits], images[fits]
    plan = packing.plan(lengths, images, capacity=capacity, max_images=max_images, seed=seed)
    special = {v: k for k, v in vars(tokenizer.special).items() if k != "pad"}

    def doc(i: int) -> Doc:
        spans = [s for p in shard.document(i).pieces for s in _spans(p, shard, tokenizer, special, tokens_per_image, thumbnails)]
        return Doc(i, shard.record_id(i), shard.source(i), spans)

    return Look(
        prefix=str(prefix),
        capacity=capacity,
        tokens_per_image=tokens_per_image,
        rows=[Row(r, [doc(int(fits[i])) for i in plan.row(r)]) for r in range(min(rows, len(plan)))],
        total_rows=len(plan),
        documents=len(fits),
        too_long=len(shard) - len(fits),
        fill=packing.fill(lengths, plan, capacity),
        lower_bound=packing.lower_bound(lengths, images, capacity, max_images),
    )


def _spans(
    piece: Piece, shard: Shard, tokenizer: Tokenizer, special: dict[int, str], tokens_per_image: int, thumbnails: bool
) -> list[Span]:
    if piece.mode == IMAGE:
        about, thumbnail = _picture(shard.image(piece.image), thumbnails)
        return [Span("image", tokens_per_image, about=f"image {piece.image}, {about}", thumbnail=thumbnail)]
    kind = "target" if piece.mode == TARGET else "context"
    cuts = sorted({0, len(piece.ids), *(c for i in np.flatnonzero(np.isin(piece.ids, list(special))) for c in (int(i), int(i) + 1))})
    out = []
    for a, b in itertools.pairwise(cuts):
        ids = piece.ids[a:b].tolist()
        is_special = ids[0] in special
        out.append(Span(kind, b - a, tokenizer.decode(ids, skip_special=False), special=is_special))
    return out


def _picture(data: bytes, thumbnail: bool) -> tuple[str, str]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            about = f"{image.format} {image.width} x {image.height}, {len(data) / 1024:.1f} KiB"
            if not thumbnail:
                return about, ""
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            out = io.BytesIO()
            image.convert("RGB").save(out, "JPEG", quality=80)
    except Exception as e:  # shown, not hidden: a picture that training will show gray
        return f"does not decode: {type(e).__name__}", ""
    return about, "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def show(found: Look, console: Console) -> None:
    """Prints the rows: context dim, targets green, images and special tokens in their own colours."""
    console.print(Text(headline(found), style="bold"))
    for row in found.rows:
        console.print()
        console.rule(Text(_row_line(row, found)))
        for doc in row.docs:
            line = f"[{doc.index}] {doc.id} ({doc.source}): {doc.tokens} tokens, {doc.targets} with loss"
            console.print(Text(line, style="underline"))
            text = Text()
            for s in doc.spans:
                if s.kind == "image":
                    text.append(f"[{s.tokens} x <|image_pad|>: {s.about}]", style="cyan")
                else:
                    text.append(
                        s.text, style={"target": "bold green", "context": "bright_black"}[s.kind] + (" italic" if s.special else "")
                    )
            console.print(text, soft_wrap=True)


def headline(found: Look) -> str:
    dropped = f", {found.too_long:,} documents too long or with too many images for a row" if found.too_long else ""
    return (
        f"{found.prefix}: {found.documents:,} documents in {found.total_rows:,} rows of {found.capacity:,} tokens at "
        f"{found.tokens_per_image} tokens an image: {100 * found.fill:.2f} % full, at least {found.lower_bound:,} rows needed{dropped}"
    )


def _row_line(row: Row, found: Look) -> str:
    return (
        f"row {row.number}: {len(row.docs)} documents, {row.images} images, {row.tokens:,} of {found.capacity:,} tokens "
        f"({100 * row.tokens / found.capacity:.1f} %), {row.targets:,} with loss"
    )


def page(found: Look) -> str:
    """The same as one HTML document without any outside address."""
    env = Environment(loader=PackageLoader("megatron_infimed", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    context: dict[str, Any] = {"look": found, "headline": headline(found), "row_line": lambda row: _row_line(row, found)}
    return env.get_template("rows.html").render(context)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def command(
    prefix: Annotated[str, typer.Argument(help="PREFIX of the shard's files")],
    tokenizer: Annotated[str, typer.Option(help="the tokenizer the shard was made with")],
    rows: Annotated[int, typer.Option(min=1, help="rows to show")] = 5,
    capacity: Annotated[int, typer.Option(min=1, help="tokens in a row")] = 4096,
    tokens_per_image: Annotated[int, typer.Option(min=1)] = 144,
    max_images: Annotated[int | None, typer.Option(min=1, help="images in a row at most")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    html: Annotated[Path | None, typer.Option(help="draw the rows into this file")] = None,
) -> None:
    """Prints and draws what packed rows really contain."""
    found = look(
        prefix,
        load_tokenizer(tokenizer),
        rows=rows,
        capacity=capacity,
        tokens_per_image=tokens_per_image,
        max_images=max_images,
        seed=seed,
        thumbnails=html is not None,
    )
    show(found, Console(highlight=False))
    if html is not None:
        try:
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(page(found), encoding="utf-8", errors="replace")
        except OSError as e:
            raise UserError(f"{html}: cannot write there ({e.strerror})") from None
        print(f"drawn: {html}")
