"""A shard PREFIX on disk: written once, read at random, the same for every image resolution.

PREFIX.text.{bin,idx}   int32, Megatron-Core's IndexedDataset with its mode byte a sequence: 0 context tokens, 1 target tokens (loss),
                        2 one image (a sequence of length 1 holding its number). One document a record.
PREFIX.image.{bin,idx}  uint8, one sequence an image: the encoded file as it came, each distinct one once (by SHA-256).
PREFIX.ids.jsonl        id and source of each document, a line each.    PREFIX.rejects.jsonl   what was left out, and why.
PREFIX.json             the manifest; written last, so that a shard without it is unfinished and is never opened.
Files are written as NAME.tmp, fsynced and renamed. Reading uses pread, not a memory map: what comes back is the caller's own copy, and a
file damaged under a running job is an error, not a SIGBUS.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_infimed.data.chat import TEMPLATE_FINGERPRINT, Segment, Tokenizer
from megatron_infimed.data.records import Reject
from megatron_infimed.errors import UserError

CONTEXT, TARGET, IMAGE = 0, 1, 2
FORMAT, VERSION = "megatron_infimed shard", 1
DATA_FILES = ("text.bin", "text.idx", "image.bin", "image.idx", "ids.jsonl", "rejects.jsonl")
_MODES = {"context": CONTEXT, "target": TARGET, "image": IMAGE}
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version 1, dtype code, sequences, documents + 1
_DTYPE_CODE = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4}
_AGAIN = "run tools/preprocess_multimodal.py again"
_BUFFER, _DIRECT = 1 << 20, 1 << 14
_EXAMPLES = 20


def shard_file(prefix: str | Path, name: str) -> Path:
    """PREFIX.NAME; the prefix may contain dots."""
    return Path(f"{prefix}.{name}")


class _File:
    """NAME.tmp, hashed while it is written, renamed by `publish`."""

    def __init__(self, path: Path) -> None:
        self.path, self.tmp = path, Path(f"{path}.tmp")
        self.digest, self.bytes, self._pending = hashlib.sha256(), 0, bytearray()
        self._out: BinaryIO = self.tmp.open("wb")

    def write(self, data: bytes | memoryview) -> None:
        self.bytes += len(data)
        if len(data) >= _DIRECT:  # an image: not worth a copy
            self._flush()
            self.digest.update(data)
            self._out.write(data)
            return
        self._pending += data
        if len(self._pending) >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        self.digest.update(self._pending)
        self._out.write(self._pending)
        self._pending.clear()

    def close(self) -> dict[str, Any]:
        self._flush()
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()
        return {"bytes": self.bytes, "sha256": self.digest.hexdigest()}

    def publish(self) -> None:
        os.replace(self.tmp, self.path)

    def discard(self) -> None:
        self._out.close()
        self.tmp.unlink(missing_ok=True)


class ShardWriter:
    """Use as a context manager; `finish` makes the shard valid, leaving without it removes what was written.

    Args:
        prefix: path without suffix; its folder is made.
        tokenizer: its fingerprint and special ids go into the manifest.
        inputs: what the manifest says the shard was made of (path, bytes, sha256, source).
        settings: other things that decided its content.

    Raises:
        UserError: another process is writing this prefix, or the folder cannot be written.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: Tokenizer,
        *,
        inputs: Sequence[dict[str, Any]] = (),
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.prefix = Path(prefix)
        self._lock = _lock(self.prefix)
        self._files = {name: _File(shard_file(prefix, name)) for name in DATA_FILES}
        self._about = {
            "tokenizer": {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
            "chat_template": TEMPLATE_FINGERPRINT,
            "special_ids": asdict(tokenizer.special),
            "inputs": list(inputs),
            "settings": settings or {},
        }
        self._lengths, self._modes, self._ends = array("i"), bytearray(), array("q", [0])
        self._image_lengths = array("i")
        self._images: dict[bytes, int] = {}
        self._sources: dict[str, Counter[str]] = {}
        self._rejects: dict[str, dict[str, Any]] = {}
        self._done = False

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._done:
            for file in self._files.values():
                file.discard()
        self._unlock()

    def _unlock(self) -> None:
        shard_file(self.prefix, "lock").unlink(missing_ok=True)
        os.close(self._lock)

    @property
    def documents(self) -> int:
        return len(self._ends) - 1

    def add_image(self, data: bytes) -> int:
        """Stores an encoded image unless it is there already; its number."""
        digest = hashlib.sha256(data).digest()
        number = self._images.setdefault(digest, len(self._images))
        if number == len(self._image_lengths):
            self._image_lengths.append(len(data))
            self._files["image.bin"].write(data)
        return number

    def add_document(self, id: str, source: str, segments: Iterable[Segment], images: Sequence[int] = ()) -> None:
        """Appends a document.

        Args:
            segments: as `chat.encode` gives them.
            images: number (from `add_image`) of the record's k-th image.
        """
        text, count = self._files["text.bin"], self._sources.setdefault(source, Counter())
        before = len(self._lengths)
        for kind, value in segments:
            ids = [images[value]] if kind == "image" else value
            text.write(array("i", ids).tobytes())
            self._lengths.append(len(ids))
            self._modes.append(_MODES[kind])
            count["images" if kind == "image" else "text_tokens"] += len(ids)
            if kind == "target":
                count["target_tokens"] += len(ids)
        if len(self._lengths) == before:
            raise ValueError(f"document {id!r} is empty")
        self._ends.append(len(self._lengths))
        count["documents"] += 1
        self._files["ids.jsonl"].write(json.dumps({"id": id, "source": source}).encode() + b"\n")

    def add_reject(self, reject: Reject) -> None:
        entry = self._rejects.setdefault(reject.reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append({"id": reject.id, "detail": reject.detail})
        self._files["rejects.jsonl"].write(json.dumps(asdict(reject)).encode() + b"\n")

    @property
    def rejects(self) -> dict[str, dict[str, Any]]:
        """reason -> {"count", "examples": up to 20 of {"id", "detail"}}."""
        return self._rejects

    def finish(self) -> dict[str, Any]:
        """Writes the indices and the manifest, makes the shard valid; returns the manifest."""
        lengths, modes = np.frombuffer(self._lengths, np.int32), np.frombuffer(self._modes, np.int8)
        image_lengths = np.frombuffer(self._image_lengths, np.int32)
        ends = np.frombuffer(self._ends, np.int64)
        _write_index(self._files["text.idx"], np.dtype(np.int32), lengths, ends, modes)
        _write_index(self._files["image.idx"], np.dtype(np.uint8), image_lengths, np.arange(len(image_lengths) + 1, dtype=np.int64), None)
        total: Counter[str] = Counter()
        for count in self._sources.values():
            total.update(count)
        keys = ("documents", "text_tokens", "target_tokens", "images")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **self._about,
            **{k: total[k] for k in keys},
            "distinct_images": len(image_lengths),
            "image_bytes": self._files["image.bin"].bytes,
            "sources": {s: {k: c[k] for k in keys} for s, c in sorted(self._sources.items())},
            "rejected": sum(r["count"] for r in self._rejects.values()),
            "rejects": dict(sorted(self._rejects.items(), key=lambda kv: (-kv[1]["count"], kv[0]))),
            "files": {name: file.close() for name, file in self._files.items()},
        }
        head = _File(shard_file(self.prefix, "json"))
        head.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        head.close()
        head.path.unlink(missing_ok=True)  # an older shard stops being valid before its files change
        _sync_folder(self.prefix.parent)
        for file in (*self._files.values(), head):
            file.publish()
        _sync_folder(self.prefix.parent)
        self._done = True
        return manifest

    def keep_rejects(self) -> Path:
        """Publishes only the list of rejects, for when nothing else is worth keeping; its path."""
        file = self._files["rejects.jsonl"]
        file.close()
        file.publish()
        return file.path


def _lock(prefix: Path) -> int:
    path = shard_file(prefix, "lock")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise UserError(f"{path}: cannot write there ({e.strerror}); choose another output") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{prefix}: another process is writing this shard; wait for it or choose another output") from None
    except OSError:  # a file system without locks: we go on without
        return handle
    if not path.exists() or os.fstat(handle).st_ino != path.stat().st_ino:  # its last owner removed it while we waited
        os.close(handle)
        return _lock(prefix)
    return handle


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_index(file: _File, dtype: np.dtype, lengths: np.ndarray, ends: np.ndarray, modes: np.ndarray | None) -> None:
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
    pointers *= dtype.itemsize
    file.write(_HEADER.pack(_MAGIC, 1, _DTYPE_CODE[dtype], len(lengths), len(ends)))
    for part in (lengths, pointers, ends, modes):
        if part is not None:
            file.write(part.tobytes())


class _Indexed:
    """One .bin/.idx pair: lengths int32 [S], pointers int64 [S] (bytes), ends int64 [n+1], modes int8 [S]; views of the mapped index."""

    def __init__(self, prefix: str, dtype: np.dtype, with_modes: bool) -> None:
        idx, bin = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            raw = np.asarray(np.memmap(idx, np.uint8, "r")) if idx.stat().st_size else np.zeros(0, np.uint8)
            self.handle = os.open(bin, os.O_RDONLY)
        except OSError as e:
            raise UserError(f"{e.filename}: {e.strerror}; the shard is incomplete, {_AGAIN}") from None
        if len(raw) < _HEADER.size:
            raise UserError(f"{idx}: {len(raw)} bytes, shorter than an index header ({_HEADER.size}): truncated; {_AGAIN}")
        magic, version, code, n, d = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != 1 or code != _DTYPE_CODE[dtype]:
            raise UserError(f"{idx}: not a Megatron index of {dtype} (magic {magic!r}, version {version}, dtype code {code})")
        wanted = _HEADER.size + n * (4 + 8 + with_modes) + 8 * d
        if len(raw) != wanted:
            raise UserError(f"{idx}: {len(raw)} bytes, but {n} sequences and {d} document ends need {wanted}: truncated; {_AGAIN}")
        cuts = np.cumsum([_HEADER.size, 4 * n, 8 * n, 8 * d]).tolist()
        self.lengths = raw[cuts[0] : cuts[1]].view(np.int32)
        self.pointers = raw[cuts[1] : cuts[2]].view(np.int64)
        self.ends = raw[cuts[2] : cuts[3]].view(np.int64)
        self.modes = raw[cuts[3] :].view(np.int8) if with_modes else None
        self.path, self.itemsize = bin, dtype.itemsize
        size = os.fstat(self.handle).st_size
        need = int(self.pointers[-1]) + int(self.lengths[-1]) * self.itemsize if n else 0
        if size != need:
            raise UserError(f"{bin}: {size} bytes, but its index describes {need}: truncated or of another shard; {_AGAIN}")

    def read(self, pointer: int, count: int) -> bytes:
        data = os.pread(self.handle, count, pointer)
        while len(data) < count:  # a signal, or more than 2 GiB
            more = os.pread(self.handle, count - len(data), pointer + len(data))
            if not more:
                raise UserError(f"{self.path}: ends at byte {pointer + len(data)}, {count - len(data)} short: it was changed while open")
            data += more
        return data

    def __del__(self) -> None:
        if (handle := getattr(self, "handle", None)) is not None:
            os.close(handle)


class Piece(NamedTuple):
    mode: int
    """0 context, 1 target, 2 image."""
    ids: np.ndarray
    """int32 [L]; empty for an image."""
    image: int
    """The image's number in the shard; -1 for text."""


_NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Document:
    """One document, its images not yet expanded; the arrays are the caller's own.

    `np.repeat(modes, np.where(modes == IMAGE, tokens_per_image, 1))` is the document at a resolution.
    """

    values: np.ndarray
    """int32 [S]: token ids; an image's number where `modes` is 2."""
    modes: np.ndarray
    """int8 [S]: 0 context, 1 target, 2 image."""

    @property
    def images(self) -> np.ndarray:
        """int32 [K]: image numbers in order."""
        return self.values[self.modes == IMAGE]

    @property
    def pieces(self) -> list[Piece]:
        """Runs of one mode, in order; every image is a piece of its own."""
        edges = np.flatnonzero((np.diff(self.modes) != 0) | (self.modes[1:] == IMAGE)) + 1
        cuts = [0, *edges.tolist(), len(self.modes)]
        out = []
        for a, b in itertools.pairwise(cuts):
            mode = int(self.modes[a])
            out.append(Piece(mode, _NO_IDS, int(self.values[a])) if mode == IMAGE else Piece(mode, self.values[a:b], -1))
        return out


class Shard:
    """Random access to a finished shard. Safe to use from threads and after a fork; pickles as its prefix.

    Raises:
        UserError: no manifest, another format version, or files whose sizes do not match the manifest and their index.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.manifest = read_manifest(prefix)
        for name, about in self.manifest["files"].items():
            path = shard_file(prefix, name)
            size = path.stat().st_size if path.is_file() else None
            if size != about["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{path}: {found}, the manifest says {about['bytes']} bytes: damaged; copy it again or {_AGAIN}")
        self._text = _Indexed(f"{prefix}.text", np.dtype(np.int32), with_modes=True)
        self._image = _Indexed(f"{prefix}.image", np.dtype(np.uint8), with_modes=False)
        if len(self) != self.manifest["documents"] or len(self._image.lengths) != self.manifest["distinct_images"]:
            raise UserError(
                f"{prefix}: {len(self)} documents and {len(self._image.lengths)} images indexed, the manifest says "
                f"{self.manifest['documents']} and {self.manifest['distinct_images']}: files of two shards; {_AGAIN}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return (Shard, (self.prefix,))

    def __len__(self) -> int:
        return len(self._text.ends) - 1

    @cached_property
    def text_lengths(self) -> np.ndarray:
        """int64 [n]: tokens of each document without its images."""
        assert self._text.modes is not None
        return self._per_document(np.where(self._text.modes == IMAGE, 0, self._text.lengths))

    @cached_property
    def image_counts(self) -> np.ndarray:
        """int64 [n]: images of each document."""
        return self._per_document(self._text.modes == IMAGE)

    def _per_document(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, self._text.ends[:-1], dtype=np.int64) if len(self) else np.zeros(0, np.int64)

    def lengths(self, tokens_per_image: int) -> np.ndarray:
        """int64 [n]: tokens of each document at this resolution. From the index alone."""
        return self.text_lengths + self.image_counts * tokens_per_image

    def document(self, i: int) -> Document:
        text = self._text
        assert text.modes is not None
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.prefix}")
        a, b = int(text.ends[i]), int(text.ends[i + 1])
        lengths = text.lengths[a:b]
        values = np.frombuffer(bytearray(text.read(int(text.pointers[a]), 4 * int(lengths.sum()))), np.int32)
        return Document(values, np.repeat(text.modes[a:b], lengths))

    @property
    def images(self) -> int:
        """Distinct images stored."""
        return len(self._image.lengths)

    def image(self, number: int) -> bytes:
        """The encoded file."""
        if not 0 <= number < len(self._image.lengths):
            raise IndexError(f"image {number} of {len(self._image.lengths)} in {self.prefix}")
        return self._image.read(int(self._image.pointers[number]), int(self._image.lengths[number]))

    @cached_property
    def _id_lines(self) -> tuple[np.ndarray, np.ndarray]:
        raw = np.fromfile(shard_file(self.prefix, "ids.jsonl"), np.uint8)
        return raw, np.concatenate([[0], np.flatnonzero(raw == 10) + 1])

    def _about(self, i: int) -> dict[str, str]:
        raw, starts = self._id_lines
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.prefix}")
        return json.loads(raw[starts[i] : starts[i + 1]].tobytes())

    def record_id(self, i: int) -> str:
        return self._about(i)["id"]

    def source(self, i: int) -> str:
        return self._about(i)["source"]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """UserError unless the shard was made with this tokenizer and this chat template."""
        check_tokenizer(self.prefix, self.manifest, tokenizer)


def check_tokenizer(prefix: str | Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    """UserError unless the manifest names this tokenizer and this chat template."""
    for what, made, given in (
        ("tokenizer", manifest["tokenizer"]["fingerprint"], tokenizer.fingerprint),
        ("chat template", manifest["chat_template"], TEMPLATE_FINGERPRINT),
    ):
        if made != given:
            raise UserError(
                f"{prefix}: made with another {what} (fingerprint {made[:12]}, this one is {given[:12]}): "
                f"use the one it was made with or {_AGAIN}"
            )


def read_manifest(prefix: str | Path) -> dict[str, Any]:
    """PREFIX.json, checked for format and version."""
    path = shard_file(prefix, "json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        left = shard_file(prefix, "text.bin.tmp").exists() or shard_file(prefix, "text.bin").exists()
        why = "the shard was never finished (the manifest is written last)" if left else "there is no shard"
        raise UserError(f"{path}: {why}; run tools/preprocess_multimodal.py --output {prefix}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable manifest ({e}); {_AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        version = manifest.get("version") if isinstance(manifest, dict) else None
        raise UserError(f"{path}: shard format version {version}, this code reads {VERSION}: {_AGAIN}")
    return manifest


def hash_file(path: str | Path) -> str:
    """SHA-256, hexadecimal."""
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(prefix: str | Path) -> None:
    """Reads every byte: UserError naming the first file whose hash is not the manifest's."""
    for name, about in read_manifest(prefix)["files"].items():
        path = shard_file(prefix, name)
        found = hash_file(path) if path.is_file() else "missing"
        if found != about["sha256"]:
            raise UserError(
                f"{path}: sha256 {found[:12]}, the manifest says {about['sha256'][:12]}: damaged; copy it again or make it again"
            )
