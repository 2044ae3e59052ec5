"""Writing a shard: documents and images in, the files of shards.py out.

Every file is NAME.tmp, hashed while it is written, fsynced, and renamed at the end, the manifest last: what a kill or a full disk leaves is
never a shard. An image is hashed once, for finding its twins; that digest is kept (image.sha256), so image.bin needs no pass of its own.
merge.py writes the same files from finished pieces with the parts below ShardWriter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from megatron_infimed.data.chat import TEMPLATE_FINGERPRINT, Segment, Tokenizer
from megatron_infimed.data.safe_files import HashedFile, lock, sync
from megatron_infimed.data.shards import (
    CONTEXT,
    DATA_FILES,
    DOC_FIELDS,
    DTYPE_CODE,
    FORMAT,
    HEADER,
    IMAGE,
    MAGIC,
    TARGET,
    UNHASHED,
    VERSION,
    document_crc,
    manifest_digest,
    shard_file,
)
from megatron_infimed.intake.records import Reject

_MODES = {"context": CONTEXT, "target": TARGET, "image": IMAGE}
_EXAMPLES = 20
_META_BYTES = 4096
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_COUNTS = ("documents", "text_tokens", "target_tokens", "images")


class ShardWriter:
    """Use as a context manager; `finish` makes the shard valid, leaving without it removes what was written.

    Args:
        prefix: path without suffix; its folder is made.
        tokenizer: its fingerprint and special ids go into the manifest.
        inputs: what the manifest says the shard was made of (name, bytes, sha256, source).
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
        self.prefix, self.tally = Path(prefix), Tally()
        self._about = about(tokenizer, inputs, settings or {})
        self._exit = contextlib.ExitStack()
        self._exit.enter_context(lock(self.prefix))
        self._files = self._exit.enter_context(open_files(self.prefix))
        self._lengths, self._modes, self._ends = array("i"), bytearray(), array("q", [0])
        self._image_lengths = array("i")
        self._images: dict[bytes, int] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exit.close()

    @property
    def documents(self) -> int:
        return len(self._ends) - 1

    def add_image(self, data: bytes, digest: bytes | None = None) -> int:
        """Stores an encoded image unless it is there already; its number. `digest` is its SHA-256 where the caller knows it."""
        digest = digest or hashlib.sha256(data).digest()
        number = self._images.setdefault(digest, len(self._images))
        if number == len(self._image_lengths):
            self._image_lengths.append(len(data))
            self._files["image.bin"].write(data)
            self._files["image.sha256"].write(digest)
        return number

    def add_document(
        self, id: str, source: str, segments: Iterable[Segment], images: Sequence[int] = (), meta: Mapping[str, Any] = _NOTHING
    ) -> None:
        """Appends a document.

        Args:
            segments: as `chat.encode` gives them.
            images: number (from `add_image`) of the record's k-th image.
            meta: kept beside its id, as far as 4 KiB go; what is no JSON is kept as its text.
        """
        values, lengths, modes, count = array("i"), array("i"), bytearray(), [0, 0, 0]
        for kind, value in segments:
            ids, mode = [images[value]] if kind == "image" else value, _MODES[kind]
            values.extend(ids)
            lengths.append(len(ids))
            modes.append(mode)
            count[mode] += len(ids)
        if not lengths:
            raise ValueError(f"document {id!r} is empty")
        text, ids_file = values.tobytes(), self._files["ids.jsonl"]
        line = f'{{"id": {json.dumps(id)}, "source": {json.dumps(source)}{_meta_part(meta)}}}\n'.encode()
        crc = document_crc(text, lengths.tobytes(), modes, line)
        tokens = count[CONTEXT] + count[TARGET]
        self._files["docs"].write(DOC_FIELDS.pack(tokens, count[IMAGE], crc, ids_file.bytes))
        self._files["text.bin"].write(text)
        ids_file.write(line)
        self._lengths.extend(lengths)
        self._modes += modes
        self._ends.append(len(self._lengths))
        self.tally.add(source, tokens, count[TARGET], count[IMAGE])

    def add_reject(self, reject: Reject) -> None:
        self.tally.reject(reject)
        self._files["rejects.jsonl"].write(json.dumps(asdict(reject)).encode() + b"\n")

    def finish(self) -> dict[str, Any]:
        """Writes the indices and the manifest, makes the shard valid; returns the manifest."""
        lengths, modes = np.frombuffer(self._lengths, np.int32), np.frombuffer(self._modes, np.int8)
        image_lengths, ends = np.frombuffer(self._image_lengths, np.int32), np.frombuffer(self._ends, np.int64)
        write_index(self._files["text.idx"], np.int32, (len(lengths), len(ends)), lambda: [lengths], lambda: [ends], lambda: [modes])
        write_image_index(self._files["image.idx"], image_lengths)
        return publish(self.prefix, self._files, self._about, self.tally, len(image_lengths))


def _meta_json(value: Any) -> str:
    """As JSON; of what JSON cannot hold, the text."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, default=str)
    except (TypeError, ValueError):  # keys of several types, not a number, a cycle
        return json.dumps(str(value))


def _meta_part(meta: Mapping[str, Any]) -> str:
    """The members "meta" and, where fields did not fit, "meta_left_out": their number."""
    parts, left_out, room = [], 0, _META_BYTES
    for name, value in sorted((str(name), _meta_json(value)) for name, value in meta.items()):
        part = f"{json.dumps(name)}: {value}"
        if len(part) + 2 > room:
            left_out += 1
            continue
        parts.append(part)
        room -= len(part) + 2
    held = f', "meta": {{{", ".join(parts)}}}' if parts else ""
    return held + (f', "meta_left_out": {left_out}' if left_out else "")


class Tally:
    """What the manifest counts; tallies of pieces add up in order (`add_manifest`)."""

    def __init__(self) -> None:
        self.sources: dict[str, Counter[str]] = {}
        self.rejects: dict[str, dict[str, Any]] = {}
        """reason -> {"count", "examples": up to 20 of {"id", "detail"}}."""
        self.decisions: Counter[str] = Counter()
        """What the de-identification gate decided."""

    @property
    def documents(self) -> int:
        return sum(c["documents"] for c in self.sources.values())

    def add(self, source: str, tokens: int, targets: int, images: int) -> None:
        count = self.sources.setdefault(source, Counter())
        for name, n in zip(_COUNTS, (1, tokens, targets, images), strict=True):
            count[name] += n

    def reject(self, reject: Reject) -> None:
        self._rejected(reject.reason, 1, [{"id": reject.id, "detail": reject.detail}])

    def add_manifest(self, manifest: Mapping[str, Any]) -> None:
        for source, count in manifest["sources"].items():
            self.sources.setdefault(source, Counter()).update(count)
        for reason, entry in manifest["rejects"].items():
            self._rejected(reason, entry["count"], entry["examples"])
        self.decisions.update(manifest["deid"]["counts"])

    def _rejected(self, reason: str, count: int, examples: list[dict[str, str]]) -> None:
        entry = self.rejects.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] += examples[: _EXAMPLES - len(entry["examples"])]


def about(tokenizer: Tokenizer, inputs: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that says what a shard was made of and how."""
    return {
        "tokenizer": {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "chat_template": TEMPLATE_FINGERPRINT,
        "special_ids": asdict(tokenizer.special),
        "inputs": list(inputs),
        "settings": settings,
    }


@contextlib.contextmanager
def open_files(prefix: Path) -> Iterator[dict[str, HashedFile]]:
    """The shard's data files under their .tmp names; what was not published by the end is removed."""
    files: dict[str, HashedFile] = {}
    try:
        for name in DATA_FILES:
            files[name] = HashedFile(shard_file(prefix, name), hashed=name != UNHASHED)
        yield files
    finally:
        for file in files.values():
            file.discard()


Parts = Callable[[], Iterable[np.ndarray]]
"""An array in parts, to be gone through more than once."""


def write_index(file: HashedFile, dtype: type[np.generic], counts: tuple[int, int], lengths: Parts, ends: Parts, modes: Parts) -> None:
    """An .idx as Megatron-Core writes it. counts: (sequences, document ends)."""
    kind, start = np.dtype(dtype), np.int64(0)
    file.write(HEADER.pack(MAGIC, 1, DTYPE_CODE[kind], *counts))
    for part in lengths():
        file.write(part.tobytes())
    for part in lengths():
        stops = start + np.cumsum(part, dtype=np.int64) * kind.itemsize
        file.write((stops - part * np.int64(kind.itemsize)).tobytes())
        start = stops[-1] if len(part) else start
    for parts in (ends, modes):
        for part in parts():
            file.write(part.tobytes())


def write_image_index(file: HashedFile, lengths: np.ndarray) -> None:
    """image.idx: each image is a sequence and a document, no modes."""
    ends = np.arange(len(lengths) + 1, dtype=np.int64)
    write_index(file, np.uint8, (len(lengths), len(ends)), lambda: [lengths], lambda: [ends], list)


def publish(prefix: Path, files: Mapping[str, HashedFile], about: dict[str, Any], tally: Tally, distinct_images: int) -> dict[str, Any]:
    """Closes and renames the files, writes the manifest last; returns it."""
    total = sum(tally.sources.values(), Counter())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **about,
        **{k: total[k] for k in _COUNTS},
        "distinct_images": distinct_images,
        "image_bytes": files["image.bin"].bytes,
        "sources": {s: {k: c[k] for k in _COUNTS} for s, c in sorted(tally.sources.items())},
        "rejected": sum(r["count"] for r in tally.rejects.values()),
        "rejects": dict(sorted(tally.rejects.items(), key=lambda kv: (-kv[1]["count"], kv[0]))),
        "deid": {"policy": about["settings"].get("deid", {}), "counts": dict(sorted(tally.decisions.items()))},
        "files": {name: file.close() for name, file in files.items()},
    }
    manifest["digest"] = manifest_digest(manifest)
    head = HashedFile(shard_file(prefix, "json"))
    try:
        head.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        head.close()
        head.path.unlink(missing_ok=True)  # an older shard stops being valid before its files change
        sync(prefix.parent)
        for file in (*files.values(), head):
            file.publish()
        sync(prefix.parent)
    finally:
        head.discard()
    return manifest
