"""A shard PREFIX on disk: written once, read at random, the same for every image resolution.

PREFIX.text.{bin,idx}   int32, Megatron-Core's IndexedDataset with its mode byte a sequence: 0 context tokens, 1 target tokens (loss),
                        2 one image (a sequence of length 1 holding its number). One document a record.
PREFIX.image.{bin,idx}  uint8, one sequence an image: the encoded file, each distinct one once, in the order of first use.
PREFIX.image.sha256     32 bytes an image: its SHA-256. image.bin needs no hash of its own.
PREFIX.docs             DOC, one record a document: what planning needs (the length law), a checksum, and where its line in ids.jsonl starts.
PREFIX.ids.jsonl        id and source of each document, a line each.    PREFIX.rejects.jsonl   what was left out, and why.
PREFIX.json             the manifest; written last, so that a shard without it is unfinished and is never opened.
Files are written as NAME.tmp, fsynced and renamed (shard_writer.py). Text and indices are memory-mapped; images, nearly all of the bytes, are
read with pread: on a network file system one request, not a fault a page, and an image.bin damaged under a running job is an error, not a
SIGBUS. Whatever is returned is the caller's own copy.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_infimed.data.chat import TEMPLATE_FINGERPRINT, Tokenizer
from megatron_infimed.errors import UserError

CONTEXT, TARGET, IMAGE = 0, 1, 2
FORMAT, VERSION = "megatron_infimed shard", 2
DATA_FILES = ("text.bin", "text.idx", "image.bin", "image.idx", "image.sha256", "docs", "ids.jsonl", "rejects.jsonl")
UNHASHED = "image.bin"
"""Its content is held by image.sha256, which is hashed."""
DOC = np.dtype([("text_tokens", "<i4"), ("images", "<i4"), ("crc32", "<u4"), ("id_offset", "<i8")])
"""crc32: `document_crc` of the document; id_offset: byte of its line in ids.jsonl."""
DOC_FIELDS = struct.Struct("<iiIq")  # the same, for writing one
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version 1, dtype code, sequences, documents + 1
DTYPE_CODE = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4}
AGAIN = "run tools/preprocess_multimodal.py again"


def shard_file(prefix: str | Path, name: str) -> Path:
    """PREFIX.NAME; the prefix may contain dots."""
    return Path(f"{prefix}.{name}")


def document_crc(text: bytes | memoryview, lengths: bytes, modes: bytes | bytearray, line: bytes) -> int:
    """CRC-32 of all that a document is: its part of text.bin, its lengths (int32) and modes (int8) in text.idx, its line in ids.jsonl."""
    return zlib.crc32(line, zlib.crc32(modes, zlib.crc32(lengths, zlib.crc32(text))))


class Index:
    """One .bin/.idx pair, open: lengths int32 [S], pointers int64 [S] (bytes), ends int64 [n+1], modes int8 [S] (text only).

    The arrays are views of the mapped .idx; `read` gives bytes of the .bin. `length_at`, `pointer_at` and `end_at` are the same memory for
    single values: a memoryview gives a Python int in a third of the time.

    Raises:
        UserError: a missing, truncated or foreign file.
    """

    def __init__(self, prefix: str, dtype: type[np.generic]) -> None:
        idx, bin = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        kind, with_modes = np.dtype(dtype), np.dtype(dtype) == np.int32
        try:
            raw = np.asarray(np.memmap(idx, np.uint8, "r")) if idx.stat().st_size else np.zeros(0, np.uint8)
            self.handle = os.open(bin, os.O_RDONLY)
        except OSError as e:
            raise UserError(f"{e.filename}: {e.strerror}; the shard is incomplete, {AGAIN}") from None
        if len(raw) < HEADER.size:
            raise UserError(f"{idx}: {len(raw)} bytes, shorter than an index header ({HEADER.size}): truncated; {AGAIN}")
        magic, version, code, n, d = HEADER.unpack(raw[: HEADER.size].tobytes())
        if magic != MAGIC or version != 1 or code != DTYPE_CODE[kind]:
            raise UserError(f"{idx}: not a Megatron index of {kind} (magic {magic!r}, version {version}, dtype code {code})")
        wanted = HEADER.size + n * (4 + 8 + with_modes) + 8 * d
        if len(raw) != wanted:
            raise UserError(f"{idx}: {len(raw)} bytes, but {n} sequences and {d} document ends need {wanted}: truncated; {AGAIN}")
        self.lengths, self.pointers, self.ends, self.modes = index_parts(raw, n, d)
        self.length_at = self.lengths.view(np.uint8).data.cast("i")
        self.pointer_at, self.end_at = (a.view(np.uint8).data.cast("q") for a in (self.pointers, self.ends))
        self.path = bin
        size = self.size = os.fstat(self.handle).st_size
        need = int(self.pointers[-1]) + int(self.lengths[-1]) * kind.itemsize if n else 0
        if size != need:
            raise UserError(f"{bin}: {size} bytes, but its index describes {need}: truncated or of another shard; {AGAIN}")

    def read(self, pointer: int, count: int) -> bytes:
        if not 0 <= pointer <= pointer + count <= self.size:
            raise UserError(
                f"{self.path}: its index asks for {count} bytes at byte {pointer} of {self.size}: damaged; copy it again or {AGAIN}"
            )
        return read_at(self.handle, pointer, count, self.path)

    def __del__(self) -> None:
        if (handle := getattr(self, "handle", None)) is not None:
            os.close(handle)


def index_parts(raw: np.ndarray, n: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(lengths, pointers, ends, modes) as views of an .idx file's bytes; modes is empty for an index without them."""
    cuts = np.cumsum([HEADER.size, 4 * n, 8 * n, 8 * d]).tolist()
    kinds = (np.int32, np.int64, np.int64, np.int8)
    lengths, pointers, ends, modes = (raw[a:b].view(k) for a, b, k in zip(cuts, [*cuts[1:], None], kinds, strict=True))
    return lengths, pointers, ends, modes


def read_at(handle: int, pointer: int, count: int, path: str | Path) -> bytes:
    """`count` bytes from byte `pointer`; UserError where the file ends before."""
    data = os.pread(handle, count, pointer)
    while len(data) < count:  # a signal, or more than 2 GiB
        more = os.pread(handle, count - len(data), pointer + len(data))
        if not more:
            raise UserError(f"{path}: ends at byte {pointer + len(data)}, {count - len(data)} short: it was changed while open")
        data += more
    return data


class Piece(NamedTuple):
    mode: int
    """0 context, 1 target, 2 image."""
    ids: np.ndarray
    """int32 [L]; empty for an image."""
    image: int
    """The image's number in the shard; -1 for text."""


_NO_IDS = np.zeros(0, np.int32)


@dataclass(slots=True, eq=False)
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
        return self.values.compress(self.modes == IMAGE)

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
        check_sizes(prefix, self.manifest)
        self._values = mapped(shard_file(prefix, "text.bin"), np.dtype(np.int32))
        self._text = Index(f"{prefix}.text", np.int32)
        self._image = Index(f"{prefix}.image", np.uint8)
        self._docs = mapped(shard_file(prefix, "docs"), DOC)
        self._ids = os.open(shard_file(prefix, "ids.jsonl"), os.O_RDONLY)
        counts = len(self._text.ends) - 1, len(self._docs), len(self._image.lengths)
        m = self.manifest
        if counts != (m["documents"], m["documents"], m["distinct_images"]):
            raise UserError(
                f"{prefix}: text.idx holds {counts[0]} documents, docs {counts[1]}, image.idx {counts[2]} images; the manifest says "
                f"{m['documents']} documents and {m['distinct_images']} images: files of two shards; {AGAIN}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return (Shard, (self.prefix,))

    def __del__(self) -> None:
        if (handle := getattr(self, "_ids", None)) is not None:
            os.close(handle)

    def __len__(self) -> int:
        return len(self._docs)

    @cached_property
    def text_lengths(self) -> np.ndarray:
        """int32 [n]: tokens of each document without its images."""
        return self._column("text_tokens")

    @cached_property
    def image_counts(self) -> np.ndarray:
        """int32 [n]: images of each document."""
        return self._column("images")

    def _column(self, name: str) -> np.ndarray:
        values = np.ascontiguousarray(self._docs[name])
        if (total := int(values.sum(dtype=np.int64))) != self.manifest[name] or (len(values) and int(values.min()) < 0):
            path = shard_file(self.prefix, "docs")
            raise UserError(f"{path}: {total} {name}, the manifest says {self.manifest[name]}: damaged; copy it again or {AGAIN}")
        return values

    def lengths(self, tokens_per_image: int) -> np.ndarray:
        """int64 [n]: tokens of each document at this resolution. PREFIX.docs alone is read."""
        return self.text_lengths + self.image_counts * np.int64(tokens_per_image)

    def document(self, i: int) -> Document:
        text = self._text
        if not 0 <= i < len(self._docs):
            self._check(i)
        a, b = text.end_at[i], text.end_at[i + 1]
        start, modes = text.pointer_at[a] // 4, text.modes[a:b].repeat(text.lengths[a:b])
        values = self._values[start : start + len(modes)].copy()
        if len(values) != len(modes) or start < 0:
            path = shard_file(self.prefix, "text.idx")
            raise UserError(f"{path}: asks for {len(modes)} tokens at {start} of {len(self._values)}: damaged; copy it again or {AGAIN}")
        return Document(values, modes)

    def runs(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(lengths int32 [s], modes int8 [s]) of a document's runs of one mode, from the index alone; an image is a run of length 1."""
        self._check(i)
        span = slice(self._text.end_at[i], self._text.end_at[i + 1])
        return self._text.lengths[span], self._text.modes[span]

    @property
    def images(self) -> int:
        """Distinct images stored."""
        return len(self._image.lengths)

    def image(self, number: int) -> bytes:
        """The encoded file."""
        number, image = int(number), self._image  # a NumPy integer is slow to compare and to index with
        if not 0 <= number < len(image.length_at):
            raise IndexError(f"image {number} of {len(image.length_at)} in {self.prefix}")
        return image.read(image.pointer_at[number], image.length_at[number])

    def record_id(self, i: int) -> str:
        return self._about(i)["id"]

    def source(self, i: int) -> str:
        return self._about(i)["source"]

    def meta(self, i: int) -> dict[str, Any]:
        """What the field map kept of the row, and `phi`, the kinds of identifying text that were found and flagged."""
        return self._about(i).get("meta", {})

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """UserError unless the shard was made with this tokenizer and this chat template."""
        check_tokenizer(self.prefix, self.manifest, tokenizer)

    def _check(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.prefix}")

    def _about(self, i: int) -> dict[str, Any]:
        self._check(i)
        size, path = self.manifest["files"]["ids.jsonl"]["bytes"], shard_file(self.prefix, "ids.jsonl")
        a = int(self._docs["id_offset"][i])
        b = int(self._docs["id_offset"][i + 1]) if i + 1 < len(self) else size
        if not 0 <= a < b <= size:
            raise UserError(f"{path}: docs asks for bytes {a} to {b} of {size}: damaged; copy it again or {AGAIN}")
        return json.loads(read_at(self._ids, a, b - a, path))


def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file of records, mapped read-only (an empty file cannot be)."""
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise UserError(f"{path}: {size} bytes, but a record has {dtype.itemsize}: truncated; {AGAIN}")
    return np.asarray(np.memmap(path, dtype, "r")) if size else np.zeros(0, dtype)


def check_sizes(prefix: str | Path, manifest: dict[str, Any]) -> None:
    """UserError unless every file has the size the manifest says."""
    for name, about in manifest["files"].items():
        path = shard_file(prefix, name)
        size = path.stat().st_size if path.is_file() else None
        if size != about["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"{path}: {found}, the manifest says {about['bytes']} bytes: damaged; copy it again or {AGAIN}")


def check_tokenizer(prefix: str | Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    """UserError unless the manifest names this tokenizer and this chat template."""
    for what, made, given in (
        ("tokenizer", manifest["tokenizer"]["fingerprint"], tokenizer.fingerprint),
        ("chat template", manifest["chat_template"], TEMPLATE_FINGERPRINT),
    ):
        if made != given:
            raise UserError(
                f"{prefix}: made with another {what} (fingerprint {made[:12]}, this one is {given[:12]}): "
                f"use the one it was made with or {AGAIN}"
            )


def read_manifest(prefix: str | Path, check: bool = True) -> dict[str, Any]:
    """PREFIX.json, of this format and version and, unless `check` is off, undamaged."""
    path = shard_file(prefix, "json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        left = shard_file(prefix, "text.bin.tmp").exists() or shard_file(prefix, "text.bin").exists()
        why = "the shard was never finished (the manifest is written last)" if left else "there is no shard"
        raise UserError(f"{path}: {why}; run tools/preprocess_multimodal.py --output {prefix}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable manifest ({e}); {AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        version = manifest.get("version") if isinstance(manifest, dict) else None
        raise UserError(f"{path}: shard format version {version}, this code reads {VERSION}: {AGAIN}")
    if check and manifest.get("digest") != manifest_digest(manifest):
        raise UserError(f"{path}: damaged, its digest is another; copy it again or {AGAIN}")
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its own digest."""
    return hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True).encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    """SHA-256, hexadecimal."""
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
