"""Every byte of a shard read again; all damage is named: the file, the byte, the documents it hits.

Each file's size and hash (image.bin's content is held by image.sha256) say WHETHER it is damaged. WHERE is found by what the files know of
each other: PREFIX.docs holds a checksum of each document's text, modes and id, image.sha256 one of each image, and lengths, pointers and
counts of the indices must fit. Nothing is trusted: a truncated or scrambled file is read as far as it goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

from megatron_infimed.data.shards import (
    DOC,
    DTYPE_CODE,
    HEADER,
    IMAGE,
    MAGIC,
    TARGET,
    UNHASHED,
    document_crc,
    hash_file,
    index_parts,
    manifest_digest,
    read_manifest,
    shard_file,
)
from megatron_infimed.errors import UserError
from megatron_infimed.intake.images import check_image

SHOWN, KEPT = 20, 1000
Told = Callable[[str, int, int], None]
"""what, done, of how many"""


def verify(prefix: str | Path, threads: int | None = None, told: Told = lambda what, done, of: None) -> dict[str, Any]:
    """Checks everything; the manifest of a sound shard.

    Raises:
        UserError: all damage, a line each (the first SHOWN).
    """
    damage = find_damage(prefix, threads, told)
    if n := damage.count:
        more = [f"... and {n - SHOWN} more"] if n > SHOWN else []
        first = f"{prefix}: {n} place{'s' if n > 1 else ''} damaged; copy the shard again or make it again"
        raise UserError("\n".join([first, *(f"  {line}" for line in damage.lines[:SHOWN]), *more]))
    return read_manifest(prefix)


@contextlib.contextmanager
def watched() -> Iterator[Told]:
    """`told` as a bar on a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        lines: dict[str, TaskID] = {}

        def told(what: str, done: int, of: int) -> None:
            if what not in lines:
                lines[what] = bar.add_task(what, total=of)
            bar.update(lines[what], completed=done)

        yield told


def find_damage(prefix: str | Path, threads: int | None = None, told: Told = lambda what, done, of: None) -> Damage:
    """All damage; UserError where there is no manifest to compare with."""
    manifest = read_manifest(prefix, check=False)
    found = Damage(prefix)
    try:
        if manifest_digest(manifest) != manifest.get("digest"):
            found.add("json", "its own digest does not hold: something in it was changed")
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
            _check_files(manifest, found, pool, told)
            shard = _Torn(prefix, manifest)
            with shard:
                _check_indices(shard, found)
                bad_images = _check_images(shard, found, pool, told)
                _check_documents(shard, found, bad_images, told)
        _check_counts(shard, found)
    except (KeyError, TypeError, AttributeError) as e:
        found.add("json", f"not a whole manifest ({type(e).__name__}: {e})")
    return found


@dataclass
class Damage:
    prefix: str | Path
    count: int = 0
    lines: list[str] = field(default_factory=list)
    """A line for each place; the first KEPT."""
    files: set[str] = field(default_factory=set)
    """Names of files whose size or hash is wrong."""

    def add(self, name: str, what: str) -> None:
        self.count += 1
        if len(self.lines) < KEPT:
            self.lines.append(f"{shard_file(self.prefix, name)}: {what}")


def _check_files(manifest: dict[str, Any], found: Damage, pool: ThreadPoolExecutor, told: Told) -> None:
    """Size and hash of each file."""

    def look(name: str, about: dict[str, Any]) -> str | None:
        path = shard_file(found.prefix, name)
        if not path.is_file():
            return "is missing"
        if (size := path.stat().st_size) != about["bytes"]:
            end = f"{'cut off' if size < about['bytes'] else 'grown'} at byte {min(size, about['bytes'])}"
            return f"has {size} bytes, the manifest says {about['bytes']} bytes: {end}"
        if name != UNHASHED and (digest := hash_file(path)) != about["sha256"]:
            return f"sha256 {digest[:12]}, the manifest says {about['sha256'][:12]}"
        return None

    files = manifest["files"]
    for done, (name, wrong) in enumerate(zip(files, pool.map(look, files, files.values()), strict=True)):
        told("files", done + 1, len(files))
        if wrong:
            found.files.add(name)
            found.add(name, wrong)


class _Torn:
    """The files as far as they go: shapes come from the manifest, what is not there reads as nothing."""

    def __init__(self, prefix: str | Path, manifest: dict[str, Any]) -> None:
        self.prefix, self.manifest = prefix, manifest
        self.documents, self.images = manifest["documents"], manifest["distinct_images"]
        self.sequences = (manifest["files"]["text.idx"]["bytes"] - HEADER.size - 8 * (self.documents + 1)) // 13
        self.text_head, (self.lengths, self.pointers, self.ends, self.modes) = self._index("text.idx", self.sequences, self.documents + 1)
        self.image_head, (self.sizes, self.places, self.image_ends, _) = self._index("image.idx", self.images, self.images + 1)
        raw = self._whole("docs")
        self.docs: Any = raw[: len(raw) // DOC.itemsize * DOC.itemsize].view(DOC)
        self.digests = self._whole("image.sha256").tobytes()
        self._open: dict[str, int] = {}

    def __enter__(self) -> _Torn:
        for name in ("text.bin", "image.bin", "ids.jsonl"):
            if shard_file(self.prefix, name).is_file():
                self._open[name] = os.open(shard_file(self.prefix, name), os.O_RDONLY)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._open.values():
            os.close(handle)

    def read(self, name: str, start: int, count: int) -> bytes:
        """What is there of these bytes."""
        size = os.fstat(self._open[name]).st_size if name in self._open else 0
        if not 0 <= start < size or count <= 0:
            return b""
        return os.pread(self._open[name], min(count, size - start), start)

    def _whole(self, name: str) -> np.ndarray:
        path = shard_file(self.prefix, name)
        there = path.is_file() and path.stat().st_size
        return np.asarray(np.memmap(path, np.uint8, "r")) if there else np.zeros(0, np.uint8)

    def _index(self, name: str, n: int, d: int) -> tuple[bytes, tuple[np.ndarray, ...]]:
        raw, wanted = self._whole(name), self.manifest["files"][name]["bytes"]
        padded = raw[:wanted] if len(raw) >= wanted else np.concatenate([raw, np.full(wanted - len(raw), 255, np.uint8)])
        return padded[: HEADER.size].tobytes(), index_parts(padded, n, d)

    def id(self, i: int) -> str:
        try:
            return repr(json.loads(self.line(i))["id"])
        except (ValueError, KeyError, TypeError, IndexError):
            return "unreadable"

    def line(self, i: int) -> bytes:
        """The document's line in ids.jsonl."""
        if i >= len(self.docs):
            return b""
        start = int(self.docs["id_offset"][i])
        end = int(self.docs["id_offset"][i + 1]) if i + 1 < len(self.docs) else self.manifest["files"]["ids.jsonl"]["bytes"]
        return self.read("ids.jsonl", start, min(end - start, 1 << 20))

    def name(self, documents: Iterable[int]) -> str:
        """The first few documents, by number and id."""
        first = list(itertools.islice(documents, 4))
        return ", ".join(f"document {i} (id {self.id(i)})" for i in first[:3]) + (" and others" if len(first) > 3 else "")


def _check_indices(shard: _Torn, found: Damage) -> None:
    """Headers, and pointers that do not follow from the lengths."""
    for name, head, n, d, kind in (
        ("text.idx", shard.text_head, shard.sequences, shard.documents + 1, np.int32),
        ("image.idx", shard.image_head, shard.images, shard.images + 1, np.uint8),
    ):
        wanted = HEADER.pack(MAGIC, 1, DTYPE_CODE[np.dtype(kind)], n, d)
        if name in found.files and head != wanted:
            byte = next(i for i, (a, b) in enumerate(zip(head, wanted, strict=True)) if a != b)
            found.add(name, f"byte {byte}: its header is not that of {n} sequences and {d} document ends; it hits every document")
    if "image.idx" in found.files:
        wrong = np.flatnonzero(shard.image_ends != np.arange(shard.images + 1))
        if len(wrong):
            byte = HEADER.size + 12 * shard.images + 8 * int(wrong[0])
            found.add(
                "image.idx", f"byte {byte}: end {wrong[0]} is not a running number; Megatron's reader needs it, no document here does"
            )


def _check_images(shard: _Torn, found: Damage, pool: ThreadPoolExecutor, told: Told) -> dict[int, tuple[str, int, str]]:
    """Image number -> (file, byte, what is wrong), for those that are damaged."""
    bad: dict[int, tuple[str, int, str]] = {}

    def look(k: int) -> tuple[str, int, str] | None:
        start, size = int(shard.places[k]), int(shard.sizes[k])
        data = shard.read("image.bin", start, size)
        if hashlib.sha256(data).digest() == shard.digests[32 * k : 32 * k + 32] and len(data) == size:
            problem = check_image(data)
            return problem and ("image.bin", start, f"image {k} does not decode: {problem[1]}")
        if "image.idx" in found.files and (start != place_of[k] or (k + 1 < shard.images and start + size != int(shard.places[k + 1]))):
            return "image.idx", HEADER.size + 4 * k, f"length or place of image {k} is wrong"
        if len(data) < size:
            return "image.bin", start + len(data), f"image {k} is cut off"
        if "image.sha256" in found.files and check_image(data) is None:
            return "image.sha256", 32 * k, f"digest of image {k} is not that of its bytes"
        return "image.bin", start, f"{size} bytes of image {k}: their sha256 does not hold"

    place_of = np.concatenate([[0], np.cumsum(shard.sizes[:-1], dtype=np.int64)]) if shard.images else np.zeros(0, np.int64)
    step = 4096
    for a in range(0, shard.images, step):
        block = range(a, min(a + step, shard.images))
        bad.update((k, wrong) for k, wrong in zip(block, pool.map(look, block), strict=True) if wrong)
        told("images", block.stop, shard.images)
    return bad


def _check_documents(shard: _Torn, found: Damage, bad_images: dict[int, tuple[str, int, str]], told: Told) -> None:
    """Each document against its record in PREFIX.docs; and who uses the damaged images."""
    users: dict[int, list[int]] = {k: [] for k in bad_images}
    for i in range(shard.documents):
        if wrong := _document_damage(shard, found, i, users):
            for name, byte, what in wrong:
                found.add(name, f"byte {byte}: {what}; it hits {shard.name([i])}")
        if i % 4096 == 4095:
            told("documents", i + 1, shard.documents)
    for k, (name, byte, what) in bad_images.items():
        found.add(name, f"byte {byte}: {what}; it hits {shard.name(users[k]) or 'no document that can be read'}")


def _document_damage(shard: _Torn, found: Damage, i: int, users: dict[int, list[int]]) -> list[tuple[str, int, str]]:
    """(file, byte, what) for each file that may be the reason why document i is not what PREFIX.docs says."""
    a, b = int(shard.ends[i]), int(shard.ends[i + 1])
    shape = 0 <= a < b <= len(shard.lengths)
    lengths, modes = (shard.lengths[a:b], shard.modes[a:b]) if shape else (np.zeros(0, np.int32), np.zeros(0, np.int8))
    start, count = (int(shard.pointers[a]) if shape else 0), 4 * int(lengths.sum(dtype=np.int64))
    steps = np.cumsum(lengths, dtype=np.int64) * 4
    shape = shape and bool((lengths > 0).all()) and np.array_equal(shard.pointers[a:b], start + steps - lengths * np.int64(4))
    text = shard.read("text.bin", start, count) if shape else b""
    images = int((modes == IMAGE).sum())
    line = shard.line(i)
    if i < len(shard.docs) and shape and len(text) == count:
        record = shard.docs[i]
        if users and images:
            for k in np.frombuffer(text, np.int32)[((steps - 4) // 4)[modes == IMAGE]].tolist():
                if k in users and (not users[k] or users[k][-1] != i):
                    users[k].append(i)
        held = (int(record["text_tokens"]), int(record["images"]), int(record["crc32"]))
        if held == (count // 4 - images, images, document_crc(text, lengths.tobytes(), modes.tobytes(), line)):
            return []
    places = {
        "text.bin": (
            min(start, shard.manifest["files"]["text.bin"]["bytes"]),
            f"the {count} bytes from here are not the text that was written",
        ),
        "text.idx": (HEADER.size + 12 * shard.sequences + 8 * i, "ends, lengths, pointers or modes are not those that were written"),
        "docs": (DOC.itemsize * i, "the record is not the one that was written"),
        "ids.jsonl": (int(shard.docs["id_offset"][i]) if i < len(shard.docs) else 0, "the line is not the one that was written"),
    }
    blamed = [name for name in places if name in found.files] or ["text.bin"]
    return [(name, *places[name]) for name in blamed]


def _check_counts(shard: _Torn, found: Damage) -> None:
    """The manifest's counts against the files, where these are whole."""
    if found.count:
        return
    m, docs = shard.manifest, shard.docs
    lengths = shard.lengths.astype(np.int64)
    rejects = Counter(r["reason"] for r in _json_lines(shard_file(shard.prefix, "rejects.jsonl")))
    counted = {
        "text_tokens": int(docs["text_tokens"].sum(dtype=np.int64)),
        "target_tokens": int(lengths[shard.modes == TARGET].sum()),
        "images": int(docs["images"].sum(dtype=np.int64)),
        "image_bytes": int(shard.sizes.sum(dtype=np.int64)),
        "rejected": rejects.total(),
    }
    for name, n in counted.items():
        if m[name] != n:
            found.add("json", f"{name} is {m[name]}, the files hold {n}")
    if {reason: entry["count"] for reason, entry in m["rejects"].items()} != dict(rejects):
        found.add("json", "rejects are not those of rejects.jsonl")
    sources = Counter(line["source"] for line in _json_lines(shard_file(shard.prefix, "ids.jsonl")))
    if {s: c["documents"] for s, c in m["sources"].items()} != dict(sources):
        found.add("json", "documents of the sources are not those of ids.jsonl")


def _json_lines(path: Path) -> Iterator[dict[str, str]]:
    with path.open("rb") as lines:
        yield from map(json.loads, lines)
