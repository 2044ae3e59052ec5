"""Input files -> one shard: read, check images, tokenise in batches, write; `tools/preprocess_multimodal.py` is its command line.

Records flow through in batches of BATCH, so memory does not grow with the input. Every distinct image is decoded once, fully, in threads
(the decoders release the GIL); what does not decode is a reject, never a training sample. A finished shard of the same inputs, settings,
tokenizer and template is left alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import simplejpeg
import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_infimed.data.chat import TEMPLATE_FINGERPRINT, Tokenizer, encode_batch, load_tokenizer
from megatron_infimed.data.readers import inputs_of, read
from megatron_infimed.data.records import ImageRef, Record, Reject
from megatron_infimed.data.shards import Shard, ShardWriter, hash_file, shard_file
from megatron_infimed.errors import UserError

BATCH = 256
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")
_REMEMBERED = 1 << 20  # image paths whose number is kept, so that many questions about one picture read it once


@dataclass(frozen=True)
class Outcome:
    manifest: dict[str, Any]
    skipped: bool
    """The shard was there already and nothing was done."""


def check_image(data: bytes) -> tuple[str, str] | None:
    """None if the file decodes to the last pixel, else (reason, detail)."""
    limit = Image.MAX_IMAGE_PIXELS or sys.maxsize
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limit:
                return "image too large", f"{width} x {height} pixels, the limit is {limit}"
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                try:
                    simplejpeg.decode_jpeg(data)
                    return None
                except ValueError:
                    pass  # Pillow has the last word
            image.load()
    except Exception as e:  # decoders raise all sorts of things on damaged files
        return "corrupt image", re.sub(r" ?<_io\.[^>]*>", "", f"{len(data)} bytes: {type(e).__name__}: {e}")[:200]
    return None


class _Images:
    """Image references to numbers in the shard."""

    def __init__(self, writer: ShardWriter, threads: int) -> None:
        self._writer, self._pool = writer, ThreadPoolExecutor(threads)
        self._verdict: dict[bytes, tuple[str, str] | None] = {}
        self._number: dict[Path, int] = {}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def load(self, records: Sequence[Record]) -> list[list[int | bytes] | Reject]:
        """For each record its images as numbers (stored before) or checked bytes, or why one of them is unusable."""
        wanted = {ref: None for r in records for ref in r.images if isinstance(ref, bytes) or ref not in self._number}
        loaded = dict(zip(wanted, self._pool.map(self._checked, wanted), strict=True))
        out: list[list[int | bytes] | Reject] = []
        for record in records:
            found: list[int | bytes] = []
            for k, ref in enumerate(record.images):
                number = self._number.get(ref) if isinstance(ref, Path) else None
                value = number if number is not None else loaded[ref]
                if isinstance(value, tuple):
                    reason, detail = value
                    where = f"image {k}" if isinstance(ref, bytes) else str(ref)
                    out.append(Reject(record.id, reason, f"{where}: {detail}", record.source))
                    break
                found.append(value)
            else:
                out.append(found)
        return out

    def store(self, record: Record, loaded: list[int | bytes]) -> list[int]:
        numbers = [v if isinstance(v, int) else self._writer.add_image(v) for v in loaded]
        if len(self._number) > _REMEMBERED:
            self._number.clear()
        self._number.update({ref: n for ref, n in zip(record.images, numbers, strict=True) if isinstance(ref, Path)})
        return numbers

    def _checked(self, ref: ImageRef) -> bytes | tuple[str, str]:
        try:
            data = ref if isinstance(ref, bytes) else ref.read_bytes()
        except OSError as e:
            return "unreadable image file", str(e.strerror)
        digest = hashlib.sha256(data).digest()
        if digest not in self._verdict:
            if len(self._verdict) > _REMEMBERED:
                self._verdict.clear()
            self._verdict[digest] = check_image(data)
        return self._verdict[digest] or data


def preprocess(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    images: str | Path | None = None,
    source: str | None = None,
    max_text_tokens: int | None = None,
    threads: int | None = None,
    force: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Makes shard `output` of the input files (or folders of them), in the order given.

    Args:
        images: folder of image paths; by default the folder of each input file.
        source: data set name for the manifest; by default each file's stem.
        max_text_tokens: documents with more text tokens (images not counted) are rejected.
        force: make it again although it is finished.
        console: shows progress where it is a terminal.

    Raises:
        UserError: unreadable input, or not one document left.
    """
    files = [f for name in inputs for f in inputs_of(name)]
    if not files:
        raise UserError("no input: give at least one file")
    about = [{"path": str(f), "bytes": f.stat().st_size, "sha256": hash_file(f), "source": source or f.stem} for f in files]
    settings = {"images": str(images) if images is not None else None, "max_text_tokens": max_text_tokens}
    if not force and (manifest := _finished(output, tokenizer, about, settings)):
        return Outcome(manifest, skipped=True)

    rows = itertools.chain.from_iterable(read(f, images, source) for f in files)
    with ShardWriter(output, tokenizer, inputs=about, settings=settings) as writer:
        store = _Images(writer, threads or min(8, os.cpu_count() or 1))
        try:
            with _progress(console) as progress:
                task = progress.add_task("", total=None)
                for batch in _batched(rows, BATCH):
                    _write(batch, writer, store, tokenizer, max_text_tokens)
                    rejected = sum(r["count"] for r in writer.rejects.values())
                    progress.update(task, description=f"{writer.documents:,} documents, {rejected:,} rejected")
        finally:
            store.close()
        if not writer.documents:
            kept = writer.keep_rejects()
            reasons = ", ".join(f"{r} ({v['count']})" for r, v in writer.rejects.items()) or "the input is empty"
            raise UserError(f"{', '.join(map(str, files))}: not one document left: {reasons}; see {kept}")
        return Outcome(writer.finish(), skipped=False)


def _write(batch: Sequence[Record | Reject], writer: ShardWriter, store: _Images, tokenizer: Tokenizer, limit: int | None) -> None:
    records = [r for r in batch if isinstance(r, Record)]
    encoded = iter(encode_batch(tokenizer, [r.turns for r in records]))
    loaded = iter(store.load(records))
    for item in batch:
        if isinstance(item, Reject):
            writer.add_reject(item)
            continue
        segments, pictures = next(encoded), next(loaded)
        tokens = sum(len(v) for kind, v in segments if kind != "image")
        if isinstance(pictures, Reject):
            writer.add_reject(pictures)
        elif limit is not None and tokens > limit:
            writer.add_reject(Reject(item.id, "too many text tokens", f"{tokens}, the limit is {limit}", item.source))
        else:
            writer.add_document(item.id, item.source, segments, store.store(item, pictures))


def _batched(rows: Iterator[Record | Reject], n: int) -> Iterator[tuple[Record | Reject, ...]]:
    while batch := tuple(itertools.islice(rows, n)):
        yield batch


def _finished(output: str | Path, tokenizer: Tokenizer, inputs: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a sound shard made of the same things; None otherwise. Where the files lie does not matter."""
    if not shard_file(output, "json").exists():
        return None
    try:
        manifest = Shard(output).manifest
    except UserError:
        return None

    def content(entries: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [(e.get("sha256"), e.get("source")) for e in entries]

    same = (
        manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
        and manifest["chat_template"] == TEMPLATE_FINGERPRINT
        and content(manifest["inputs"]) == content(inputs)
        and manifest["settings"] == settings
    )
    return manifest if same else None


def _progress(console: Console | None) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    quiet = console is None or not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=quiet)


def summary(prefix: str | Path, outcome: Outcome) -> Table:
    """What the shard holds and what was left out, for people."""
    m = outcome.manifest
    table = Table(
        title=f"{escape(str(prefix))}{' (finished before, left alone; --force makes it again)' if outcome.skipped else ''}",
        show_header=False,
    )
    rows = (
        ("documents", f"{m['documents']:,}"),
        ("images", f"{m['images']:,} ({m['distinct_images']:,} distinct, {m['image_bytes'] / 2**20:,.1f} MiB)"),
        ("text tokens", f"{m['text_tokens']:,} ({m['target_tokens']:,} with loss)"),
        ("rejected", f"{m['rejected']:,}"),
    )
    for row in rows:
        table.add_row(*row)
    for reason, entry in m["rejects"].items():
        table.add_row(f"  {reason}", f"{entry['count']:,}, for example {escape(entry['examples'][0]['id'])}")
    return table


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def command(
    input: Annotated[list[str], typer.Option(help="json, jsonl or parquet file, or a folder of them; repeat for several")],
    tokenizer: Annotated[str, typer.Option(help="Hugging Face folder, or SentencePiece .model")],
    output: Annotated[str, typer.Option(help="PREFIX of the shard's files")],
    images: Annotated[str | None, typer.Option(help="folder that image paths are relative to (default: the input's)")] = None,
    source: Annotated[str | None, typer.Option(help="name of the data set (default: the input's name)")] = None,
    max_text_tokens: Annotated[int | None, typer.Option(min=1, help="reject documents with more text tokens")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads that check images (default: up to 8)")] = None,
    force: Annotated[bool, typer.Option(help="make the shard again although it is finished")] = False,
) -> None:
    """Turns image-text data into a shard: checked, tokenised, every distinct image stored once."""
    outcome = preprocess(
        input,
        output,
        load_tokenizer(tokenizer),
        images=images,
        source=source,
        max_text_tokens=max_text_tokens,
        threads=threads,
        force=force,
        console=Console(stderr=True),
    )
    Console().print(summary(output, outcome))
