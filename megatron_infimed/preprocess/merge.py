"""Finished pieces -> the shard: concatenated in the order of the rows, so that neither tasks, engine nor piece size leave a trace.

An image that several pieces hold is kept where it comes first (found by its digest) and the numbers in the text follow; image bytes are
copied by the kernel, neither decoded nor hashed again. Memory: 64 bytes an image for the digests, and one piece's text. The manifest comes
last, then the pieces go; killed anywhere before, it starts again from the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infimed.data.safe_files import HashedFile, disk_trouble
from megatron_infimed.data.shard_writer import Tally, open_files, publish, write_image_index, write_index
from megatron_infimed.data.shards import DOC, IMAGE, Index, document_crc, read_manifest, shard_file
from megatron_infimed.errors import UserError
from megatron_infimed.preprocess.job import Job


def merge(job: Job, told: Callable[[int, int], None] = lambda done, of: None) -> dict[str, Any]:
    """Makes the shard and removes the work folder; the caller holds the prefix's lock. Returns the manifest.

    Raises:
        UserError: pieces are missing, nothing is left to train on, or the disk is full (the pieces stay).
    """
    prefix, pieces = Path(job.output), _all_pieces(job)
    tally = Tally()
    for piece in pieces:
        tally.add_manifest(read_manifest(piece))
    if not tally.documents:
        with disk_trouble(prefix):
            raise _nothing_left(job, pieces, tally)
    with disk_trouble(prefix), open_files(prefix) as files:
        digests = np.concatenate([np.fromfile(shard_file(p, "image.sha256"), "S32") for p in pieces])
        numbers, first = _distinct(digests)
        at = 0
        for done, piece in enumerate(pieces):
            images = slice(at, at := at + shard_file(piece, "image.sha256").stat().st_size // 32)
            _append_documents(files, piece, numbers[images])
            _append_images(files["image.bin"], piece, first[images])
            files["rejects.jsonl"].write(shard_file(piece, "rejects.jsonl").read_bytes())
            told(done + 1, len(pieces))
        files["image.sha256"].write(digests[first].tobytes())
        _index(files, pieces, first)
        manifest = publish(prefix, files, job.about(), tally, int(first.sum()))
    job.discard()
    return manifest


def complete(job: Job) -> bool:
    """Whether every piece is there."""
    for f in range(len(job.inputs)):
        rows = job.rows(f)
        if rows is None or not all(job.finished(f, k) for k in range(-(-rows // job.piece_rows))):
            return False
    return True


def _all_pieces(job: Job) -> list[Path]:
    """Prefixes of the pieces in order; UserError unless all are there."""
    pieces, missing = [], []
    for f, input in enumerate(job.inputs):
        if (rows := job.rows(f)) is None:
            raise UserError(f"{job.output}: {input.path} was not read to its end: the tasks did not finish; run the same command again")
        for k in range(-(-rows // job.piece_rows)):
            (pieces if job.finished(f, k) else missing).append(job.piece(f, k) / "piece")
    if missing:
        raise UserError(
            f"{job.output}: {len(missing)} of {len(missing) + len(pieces)} pieces are missing, the first is {missing[0].parent.name}: "
            "a task failed or was stopped; run the same command again, it makes only those"
        )
    return pieces


def _nothing_left(job: Job, pieces: list[Path], tally: Tally) -> UserError:
    older = shard_file(job.output, "json").exists()  # its own rejects stay
    rejects = HashedFile(job.work / "rejects.jsonl" if older else shard_file(job.output, "rejects.jsonl"))
    try:
        for piece in pieces:
            rejects.write(shard_file(piece, "rejects.jsonl").read_bytes())
        rejects.close()
        rejects.publish()
    finally:
        rejects.discard()
    if not older:
        job.discard()
    reasons = ", ".join(f"{reason} ({entry['count']})" for reason, entry in tally.rejects.items()) or "the input is empty"
    return UserError(f"{', '.join(i.path for i in job.inputs)}: not one document left: {reasons}; see {rejects.path}")


def _distinct(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of each in the shard int32 [N], whether it is the first of its kind bool [N]); numbers go by first use."""
    _, where, which = np.unique(digests, return_index=True, return_inverse=True)
    first = np.zeros(len(digests), bool)
    first[where] = True
    number = np.empty(len(where), np.int32)
    number[np.argsort(where)] = np.arange(len(where), dtype=np.int32)
    return number[which], first


def _append_documents(files: Mapping[str, HashedFile], prefix: Path, numbers: np.ndarray) -> None:
    """Text, docs and ids of a piece whose image k is image numbers[k] of the shard."""
    text = Index(f"{prefix}.text", np.int32)
    values, docs = np.fromfile(text.path, np.int32), np.fromfile(shard_file(prefix, "docs"), DOC)
    ids = shard_file(prefix, "ids.jsonl").read_bytes()
    slots = text.pointers[text.modes == IMAGE] // 4
    values[slots] = numbers[values[slots]]
    for i in np.flatnonzero(docs["images"]).tolist():
        a, b = text.ends[i], text.ends[i + 1]
        start = int(text.pointers[a]) // 4
        stop = start + docs["text_tokens"][i] + docs["images"][i]
        line = ids[docs["id_offset"][i] : docs["id_offset"][i + 1] if i + 1 < len(docs) else None]
        docs["crc32"][i] = document_crc(values[start:stop].tobytes(), text.lengths[a:b].tobytes(), text.modes[a:b].tobytes(), line)
    docs["id_offset"] += files["ids.jsonl"].bytes
    files["text.bin"].write(values.tobytes())
    files["docs"].write(docs.tobytes())
    files["ids.jsonl"].write(ids)


def _append_images(file: HashedFile, prefix: Path, keep: np.ndarray) -> None:
    """The kept images of a piece, runs of them at once."""
    image = Index(f"{prefix}.image", np.uint8)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    for a, b in edges.reshape(-1, 2).tolist():
        start = int(image.pointers[a])
        file.copy(image.handle, start, int(image.pointers[b - 1]) + int(image.lengths[b - 1]) - start)


def _index(files: Mapping[str, HashedFile], pieces: list[Path], first: np.ndarray) -> None:
    def text() -> Iterator[Index]:
        return (Index(f"{p}.text", np.int32) for p in pieces)

    def ends() -> Iterator[np.ndarray]:
        base = 0
        yield np.zeros(1, np.int64)
        for index in text():
            yield index.ends[1:] + base
            base += len(index.lengths)

    counts = np.sum([(len(t.lengths), len(t.ends) - 1) for t in text()], axis=0)
    write_index(
        files["text.idx"],
        np.int32,
        (int(counts[0]), int(counts[1]) + 1),
        lambda: (t.lengths for t in text()),
        ends,
        lambda: (t.modes for t in text()),
    )
    lengths = np.concatenate([Index(f"{p}.image", np.uint8).lengths for p in pieces])
    write_image_index(files["image.idx"], lengths[first])
