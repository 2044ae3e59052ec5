"""A set of shards as one HTML page that needs nothing else, and its short version on the terminal; tools/inspect_data.py.

`survey` computes every figure from the indices and manifests (whole, vectorised) and from seeded samples (headers of originals, a gallery
of documents); rows.py reads the first packed rows. `page` renders shard.html, whose Content-Security-Policy forbids every address but
data: pictures and every script but its own. Without JavaScript the page shows all charts and unsorted tables.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_infimed.data import packing
from megatron_infimed.data.chat import load_tokenizer
from megatron_infimed.errors import UserError
from megatron_infimed.report import histogram as draw
from megatron_infimed.report.pictures import Originals, Thumbnails, originals
from megatron_infimed.report.rows import Doc, Look, Span, fitting, look, packing_line, read_document, row_line, show
from megatron_infimed.report.shardset import ShardSet

TOKENS_PER_IMAGE = (64, 144, 256, 729)
SIDES = (224, 384)
MOST_INPUTS = 500
_BARS = 60
GALLERY, GALLERY_TEXT, GALLERY_PICTURES, SAMPLE = 24, 1000, 3, 5000
_GALLERY_SIDE, _GALLERY_BUDGET, _ROWS_SIDE, _ROWS_BUDGET = 224, 1_000_000, 120, 1_400_000  # characters; the page stays below 4 MB


@dataclass(frozen=True)
class Lengths:
    """Tokens of the documents at one resolution."""

    tokens_per_image: int
    mean: float
    quantiles: tuple[int, int, int, int]
    """Median, 90 %, 99 %, longest."""
    beyond: int
    histogram: draw.Histogram


@dataclass(frozen=True)
class Packing:
    capacity: int
    tokens_per_image: int
    too_long: int
    rows: int
    lower_bound: int
    fill: float
    documents: int
    images: int


@dataclass(frozen=True)
class Survey:
    shards: ShardSet
    look: Look
    seed: int
    max_images: int | None
    lengths: list[Lengths]
    packings: list[Packing]
    images_a_document: draw.Histogram
    originals: Originals
    sizes: draw.HeatMap | None
    megapixels: draw.Histogram | None
    aspects: draw.Histogram | None
    gallery: list[Doc]


def survey(
    shards: ShardSet, *, rows: int = 5, capacity: int = 4096, tokens_per_image: int = 144, max_images: int | None = None, seed: int = 0
) -> Survey:
    """Everything the page shows.

    Raises:
        UserError: no document fits a row.
    """
    thumbnails = Thumbnails(_ROWS_SIDE, _ROWS_BUDGET)
    found = look(
        shards,
        rows=rows,
        capacity=capacity,
        tokens_per_image=tokens_per_image,
        max_images=max_images,
        seed=seed,
        thumbnails=thumbnails,
    )
    resolutions = sorted({*TOKENS_PER_IMAGE, tokens_per_image})
    headers = originals(shards, SAMPLE, seed)
    sizes = headers.sizes
    return Survey(
        shards,
        found,
        seed,
        max_images,
        lengths(shards, resolutions, capacity),
        [packed(shards, c, t, max_images, seed) for c in (capacity, 2 * capacity, 4 * capacity) for t in resolutions],
        images_a_document(shards.image_counts),
        headers,
        draw.heat_map(sizes, marks=SIDES) if len(sizes) else None,
        _megapixels(sizes) if len(sizes) else None,
        _aspects(sizes) if len(sizes) else None,
        gallery(shards, GALLERY, tokens_per_image, seed),
    )


def lengths(shards: ShardSet, resolutions: Sequence[int], capacity: int) -> list[Lengths]:
    """A histogram for each resolution, all on one axis of about _BARS bars, cut at the capacity."""
    every = {t: shards.lengths(t) for t in resolutions}
    low, high = min(int(v.min()) for v in every.values()), max(int(v.max()) for v in every.values())
    span = math.log2(max(high, capacity + 1) / min(low, capacity))
    parts = max(1, min(16, round(_BARS / max(span, 1))))
    edges = np.unique(np.ceil(draw.octaves(low, high, through=capacity + 1, parts=parts)))  # whole: no bar without a number in it
    ticks = [(2.0**k, f"{2**k:,}" if k < 14 else f"{2 ** (k - 10)} Ki") for k in range(41)]
    mark = (capacity + 1.0, f"row of {capacity:,}")
    out = []
    for t, values in every.items():
        chart = draw.histogram(values, edges, lambda a, b: f"{draw.between(a, b)} tokens", ticks=ticks, mark=mark)
        median, most, nearly_all, longest = np.quantile(values, (0.5, 0.9, 0.99, 1), method="higher").tolist()
        out.append(Lengths(t, float(values.mean()), (median, most, nearly_all, longest), int((values > capacity).sum()), chart))
    return out


def packed(shards: ShardSet, capacity: int, tokens_per_image: int, max_images: int | None, seed: int) -> Packing:
    """What the planner makes of the set at these budgets; documents that fit no row are left out and counted."""
    tokens, images, fits = fitting(shards, capacity, tokens_per_image, max_images)
    plan = packing.plan(tokens, images, capacity=capacity, max_images=max_images, seed=seed)
    bound = packing.lower_bound(tokens, images, capacity, max_images)
    fill = packing.fill(tokens, plan, capacity)
    return Packing(capacity, tokens_per_image, len(shards) - len(fits), len(plan), bound, fill, len(fits), int(images.sum()))


def images_a_document(counts: np.ndarray) -> draw.Histogram:
    """Up to eight images one bar each, then doubling."""
    most = int(counts.max(initial=0))
    firsts = [*range(9), *(8 * 2**k + 1 for k in range(max(0, math.ceil(math.log2(max(most, 1) / 8)))))]
    firsts = firsts[: next((i for i, first in enumerate(firsts) if first > most), len(firsts))]
    ends = [*firsts[1:], max(most + 1, firsts[-1] + 1)]
    labels = [str(a) if b == a + 1 else f"{a:,}–{b - 1:,}" for a, b in zip(firsts, ends, strict=True)]
    found, _ = np.histogram(counts, [*firsts, ends[-1]])
    return draw.categories(labels, found.tolist())


def gallery(shards: ShardSet, count: int, tokens_per_image: int, seed: int) -> list[Doc]:
    """Documents drawn by the seed, those with images first."""
    drawn = np.random.default_rng(seed).choice(len(shards), min(count, len(shards)), replace=False)
    drawn = sorted(drawn.tolist(), key=lambda i: not shards.image_counts[i])
    thumbnails = Thumbnails(_GALLERY_SIDE, _GALLERY_BUDGET)
    return [read_document(shards, i, tokens_per_image, thumbnails, most_pictures=GALLERY_PICTURES) for i in drawn]


def shortened(spans: Sequence[Span], limit: int = GALLERY_TEXT) -> list[Span]:
    """Spans until `limit` characters are reached; the last one cut and marked."""
    out: list[Span] = []
    for span in spans:
        if limit <= 0:
            break
        out.append(span if len(span.text) <= limit else Span(span.kind, span.tokens, span.text[:limit] + " …", span.special))
        limit -= len(span.text)
    return out


def _megapixels(sizes: np.ndarray) -> draw.Histogram:
    values = sizes.prod(axis=1) / 1e6
    ticks = [(10.0**k, f"{10.0**k:g} MP") for k in range(-6, 7)]
    edges = draw.octaves(float(values.min()), float(values.max()), through=1.0, parts=2)
    return draw.histogram(values, edges, lambda a, b: f"{a:.3g} to {b:.3g} megapixels", ticks=ticks)


def _aspects(sizes: np.ndarray) -> draw.Histogram:
    values = sizes[:, 0] / sizes[:, 1]
    edges = draw.octaves(min(float(values.min()), 0.5), max(float(values.max()), 2.0), through=2.0**0.125, parts=4)
    ticks = [(2.0**k, f"{2**k}:1" if k >= 0 else f"1:{2**-k}") for k in range(-12, 13)]
    return draw.histogram(values, edges, lambda a, b: f"width {a:.2f} to {b:.2f} times the height", ticks=ticks)


def page(found: Survey) -> str:
    """One HTML document without any outside address."""
    loader = PackageLoader("megatron_infimed", "report")
    env = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"count": lambda n: f"{n:,}", "percent": lambda x, d=1: f"{100 * x:.{d}f} %", "size": _size, "shortened": shortened}
    script, _, _ = loader.get_source(env, "shard_script.html")
    context: dict[str, Any] = {
        "s": found,
        "look": found.look,
        "packing_line": packing_line(found.look),
        "row_line": lambda row: row_line(row, found.look),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "sides": SIDES,
        "pictures": GALLERY_PICTURES,
        "most_inputs": MOST_INPUTS,
    }
    return env.get_template("shard.html").render(context)


def _size(n: int) -> str:
    unit = min(int(math.log2(max(n, 1)) / 10), 4)
    return f"{n / 1024**unit:,.{1 if unit else 0}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def summary(shards: ShardSet) -> Table:
    """What the set holds and what was left out, for the terminal."""
    t = shards.totals
    table = Table(title=escape(shards.name), title_justify="left", box=None, pad_edge=False)
    for column in ("source", "documents", "images", "text tokens", "with loss"):
        table.add_column(column, justify="left" if column == "source" else "right")
    keys = ("documents", "images", "text_tokens", "target_tokens")
    for name, counts in shards.sources.items():
        table.add_row(escape(name), *(f"{counts[k]:,}" for k in keys))
    table.add_row("all", *(f"{t[k]:,}" for k in keys), style="bold")
    rejects = ", ".join(f"{reason} {entry['count']:,}" for reason, entry in shards.rejects.items())
    table.caption = f"{t['distinct_images']:,} distinct images, {_size(t['image_bytes'])}; rejected {t['rejected']:,}" + escape(
        f" ({rejects})" if rejects else ""
    )
    table.caption_justify = "left"
    return table


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def command(
    prefixes: Annotated[list[str], typer.Argument(metavar="PREFIX...", help="PREFIX of a shard's files; several are seen as one set")],
    tokenizer: Annotated[str, typer.Option(help="the tokenizer the shards were made with")],
    rows: Annotated[int, typer.Option(min=1, help="rows to show")] = 5,
    capacity: Annotated[int, typer.Option(min=1, help="tokens in a row")] = 4096,
    tokens_per_image: Annotated[int, typer.Option(min=1)] = 144,
    max_images: Annotated[int | None, typer.Option(min=1, help="images in a row at most")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the plan, and of what is drawn to be shown")] = 0,
    html: Annotated[Path | None, typer.Option(help="draw the whole set into this file")] = None,
) -> None:
    """Shows what shards hold: a summary and the first packed rows here, everything else on one HTML page."""
    shards, console = ShardSet(prefixes, load_tokenizer(tokenizer)), Console(highlight=False)
    options: dict[str, Any] = {"rows": rows, "capacity": capacity, "tokens_per_image": tokens_per_image, "max_images": max_images}
    try:
        found = survey(shards, **options, seed=seed) if html else None
        looked = found.look if found else look(shards, **options, seed=seed)
    except (ValueError, IndexError, KeyError, OSError) as e:
        names = " ".join(prefixes)
        raise UserError(f"{names}: cannot be read as a shard ({type(e).__name__}); run python -m megatron_infimed verify on it") from None
    if found is None:
        console.print(summary(shards))
        console.print()
    show(looked, console)
    if found and html:
        try:
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(page(found), encoding="utf-8", errors="replace")
        except OSError as e:
            raise UserError(f"{html}: cannot write there ({e.strerror})") from None
        print(f"drawn: {html}")
