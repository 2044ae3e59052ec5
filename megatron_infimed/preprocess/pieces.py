"""One task's work: its pieces of every input, each read, de-identified, checked, tokenised and written as a small shard.

Records flow through in batches, so memory is bounded by a batch and the digests of a piece's images. Every distinct image of a piece is read
and decoded once, fully, in threads (the decoders release the GIL); what does not decode is a reject, never a training sample. What the
de-identification gate decides is counted by row and by use of an image, so that sums do not depend on where a piece ends.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_infimed import notes
from megatron_infimed.data.chat import Tokenizer, encode_batch
from megatron_infimed.data.safe_files import disk_trouble, sync
from megatron_infimed.data.shard_writer import ShardWriter
from megatron_infimed.intake.deid import DeidPolicy, Gate
from megatron_infimed.intake.fieldmap import FieldMap
from megatron_infimed.intake.images import ImageStore, load, open_images
from megatron_infimed.intake.readers import read
from megatron_infimed.intake.records import BadImage, ImageRef, Record, Reject, Stored
from megatron_infimed.preprocess.job import Job

BATCH = 256
"""Records, or images, held at a time."""

Told = Callable[[int, int], None]
"""Called now and then with the documents and rejects since the last call."""


def _silent(documents: int, rejects: int) -> None: ...


def run_task(job: Job, rank: int, world: int, told: Told = _silent) -> None:
    """Makes the pieces (f, k) with (f + k) % world == rank that are not there yet.

    Raises:
        UserError: an input that cannot be read, or a full disk; finished pieces stay.
    """
    with disk_trouble(Path(job.output)), PieceMaker(job, told) as maker:
        for f in range(len(job.inputs)):
            _run_input(maker, f, lambda k, f=f: (f + k) % world == rank)


def _run_input(maker: PieceMaker, f: int, is_mine: Callable[[int], bool]) -> None:
    job, size = maker.job, maker.job.piece_rows
    wanted = functools.cache(lambda k: is_mine(k) and not job.finished(f, k))
    known = job.rows(f)
    if known is not None and not any(wanted(k) for k in range(-(-known // size))):
        return
    rows = maker.rows(f, lambda number: wanted(number // size))
    for k, part in itertools.groupby(rows, key=lambda row: row.number // size):
        maker.write(f, k, part)
    job.agree_on_rows(f, rows.total)
    for k in range(-(-rows.total // size)):
        if wanted(k) and not job.finished(f, k):  # its rows gave neither records nor rejects
            maker.write(f, k, ())


@dataclass(frozen=True, slots=True)
class Row:
    number: int
    item: Record | Reject
    decisions: Counter[str]
    """What the gate decided about it."""


class Rows:
    """The wanted rows of an input; `total` is the number of all its rows, known at the end."""

    def __init__(self, rows: Generator[tuple[int, Record | Reject], None, int], gate: Gate) -> None:
        self._rows, self._gate, self.total = rows, gate, 0

    def __iter__(self) -> Iterator[Row]:
        while True:
            try:
                number, item = next(self._rows)
            except StopIteration as end:
                self.total = end.value
                return
            decisions = Counter(self._gate.counts)
            self._gate.counts.clear()
            yield Row(number, item, decisions)


class PieceMaker:
    """Holds what the pieces of a task share: tokenizer, image folders and archives, threads."""

    def __init__(self, job: Job, told: Told = _silent) -> None:
        self.job, self._told = job, told
        self._tokenizer = job.tokenizer
        self._map = FieldMap.model_validate(job.map)
        self._policy = DeidPolicy(**{**job.deid, "allow_burned_in": tuple(job.deid["allow_burned_in"])})
        self._store: ImageStore | None = open_images(job.images, job.work / "spool") if job.images else None
        self._pool = ThreadPoolExecutor(job.threads)

    def __enter__(self) -> PieceMaker:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def rows(self, f: int, mine: Callable[[int], bool] | None = None) -> Rows:
        gate, input = Gate(self._policy), self.job.inputs[f]
        return Rows(read(input.path, map=self._map, images=self._store, source=input.source, gate=gate, mine=mine), gate)

    def write(self, f: int, k: int, rows: Iterable[Row]) -> None:
        """Makes piece (f, k) of these rows and publishes it."""
        final = self.job.piece(f, k)
        aside = final.with_name(f"{final.name}.{os.uname().nodename}-{os.getpid()}.tmp")
        try:
            with ShardWriter(aside / "piece", self._tokenizer, settings={"job": self.job.fingerprint}) as writer:
                pictures = _Pictures(writer, self._pool, self._policy)
                for batch in _batches(rows):
                    before = writer.documents, sum(r["count"] for r in writer.tally.rejects.values())
                    _write(batch, writer, pictures, self._tokenizer, self.job.max_text_tokens)
                    after = writer.documents, sum(r["count"] for r in writer.tally.rejects.values())
                    self._told(after[0] - before[0], after[1] - before[1])
                writer.finish()
            self._publish(f, k, aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _publish(self, f: int, k: int, aside: Path) -> None:
        """Another task may do the same, or have done it: its piece is as good, and may be in use."""
        final = self.job.piece(f, k)
        if self.job.finished(f, k):
            return
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        try:
            os.rename(aside, final)
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not self.job.finished(f, k):
                raise
        sync(final.parent)
        notes.write("progress", final.name)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    images = 0
    for row in rows:
        batch.append(row)
        images += len(row.item.images) if isinstance(row.item, Record) else 0
        if len(batch) >= BATCH or images >= BATCH:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def _write(batch: Sequence[Row], writer: ShardWriter, pictures: _Pictures, tokenizer: Tokenizer, limit: int | None) -> None:
    records = [row.item for row in batch if isinstance(row.item, Record)]
    encoded = iter(encode_batch(tokenizer, [r.turns for r in records]))
    pictures.load(records)
    for row in batch:
        writer.tally.decisions.update(row.decisions)
        if isinstance(row.item, Reject):
            writer.add_reject(row.item)
            continue
        record, segments = row.item, next(encoded)
        if bad := pictures.check(record):
            writer.add_reject(bad)
            continue
        tokens = sum(len(v) for kind, v in segments if kind != "image")
        if limit is not None and tokens > limit:
            writer.add_reject(Reject(record.id, "too many text tokens", f"{tokens}, the limit is {limit}", record.source))
            continue
        writer.add_document(record.id, record.source, segments, pictures.store(record), record.meta)
    pictures.forget()


@dataclass(slots=True)
class _Picture:
    decisions: Counter[str] = field(default_factory=Counter)
    bad: tuple[str, str] | None = None
    """(reason, detail) where it is unusable."""
    data: bytes = b""
    digest: bytes = b""
    number: int = -1
    """In the piece, once stored."""


_Key = tuple[object, str]
"""Which image (its digest, or where it lies) for which source: the gate may decide by source."""


class _Pictures:
    """The images of one piece: each distinct one is read and checked once."""

    def __init__(self, writer: ShardWriter, pool: ThreadPoolExecutor, policy: DeidPolicy) -> None:
        self._writer, self._pool, self._policy = writer, pool, policy
        self._known: dict[_Key, _Picture] = {}
        self._keys: dict[int, list[_Key]] = {}

    def load(self, records: Sequence[Record]) -> None:
        """Reads and checks the images of a batch."""
        self._keys = {id(r): [_key(image, r.source) for image in r.images] for r in records}
        wanted = {key: image for r in records for key, image in zip(self._keys[id(r)], r.images, strict=True) if key not in self._known}
        self._known.update(zip(wanted, self._pool.map(self._read, wanted, wanted.values()), strict=True))

    def check(self, record: Record) -> Reject | None:
        """Counts what was decided about the record's images, up to the first unusable one."""
        for k, (key, image) in enumerate(zip(self._keys[id(record)], record.images, strict=True)):
            picture = self._known[key]
            self._writer.tally.decisions.update(picture.decisions)
            if picture.bad:
                named = self._policy.text == "off" and isinstance(image, Stored)  # a file may be named after its patient
                where = f"image {k}" if isinstance(image, bytes) else f"image {k}, {image.name if named else image.label}"
                return Reject(record.id, picture.bad[0], f"{where}: {picture.bad[1]}", record.source)
        return None

    def store(self, record: Record) -> list[int]:
        """Numbers of the record's images in the piece."""
        pictures = [self._known[key] for key in self._keys[id(record)]]
        for picture in pictures:
            if picture.number < 0:
                picture.number, picture.data = self._writer.add_image(picture.data, picture.digest), b""
        return [p.number for p in pictures]

    def forget(self) -> None:
        """Drops images that were read and not stored, for the memory."""
        self._known = {key: p for key, p in self._known.items() if not p.data}

    def _read(self, key: _Key, image: ImageRef) -> _Picture:
        gate = Gate(self._policy)
        try:
            data = load(image, key[1], gate)
        except BadImage as bad:
            reason, detail = map(str, bad.args)
            return _Picture(gate.counts, bad=(reason, detail))
        known = data is image and isinstance(key[0], bytes)
        return _Picture(gate.counts, data=data, digest=key[0] if known else hashlib.sha256(data).digest())  # type: ignore[arg-type]


def _key(image: ImageRef, source: str) -> _Key:
    return (hashlib.sha256(image).digest() if isinstance(image, bytes) else image), source
