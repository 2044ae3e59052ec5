"""Shards: what Megatron-Core reads, what we read, and what damage looks like."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_infimed.data.chat import Tokenizer, encode_batch, load_tokenizer
from megatron_infimed.data.shard_writer import ShardWriter
from megatron_infimed.data.shards import DATA_FILES, IMAGE, Shard, manifest_digest, shard_file
from megatron_infimed.errors import UserError
from megatron_infimed.intake.records import Reject, Turn
from megatron_infimed.preprocess.verify import verify
from tests.tiny import tiny_images, tiny_tokenizer

TALKS = [
    ([Turn("user", "<image>\nWhat is this?"), Turn("assistant", "A chest X-ray.")], [0]),
    ([Turn("user", "Which organ?"), Turn("assistant", "The liver."), Turn("user", "Sure?"), Turn("assistant", "Yes.")], []),
    ([Turn("user", "<image>Compare<image>"), Turn("assistant", "The same.")], [1, 0]),
    ([Turn("user", "<image>"), Turn("assistant", "An MR.")], [2]),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tok")))


def write(prefix: Path, tokenizer: Tokenizer, talks=TALKS, finish: bool = True) -> Path:
    pictures = tiny_images(3)
    with ShardWriter(prefix, tokenizer, inputs=[{"path": "x.json"}]) as w:
        for i, (segments, (_, uses)) in enumerate(zip(encode_batch(tokenizer, [t for t, _ in talks]), talks, strict=True)):
            w.add_document(f"doc é {i}", "even" if i % 2 == 0 else "odd", segments, [w.add_image(pictures[k]) for k in uses])
        w.add_reject(Reject("gone", "missing image file", "a.jpg", "odd"))
        if finish:
            w.finish()
    return prefix


@pytest.fixture
def prefix(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return write(tmp_path / "set.v1", tokenizer)  # a dot in the prefix is part of the name


def test_megatron_core_reads_it(prefix: Path, tokenizer: Tokenizer) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    text = IndexedDataset(f"{prefix}.text", multimodal=True)
    pictures = IndexedDataset(f"{prefix}.image", multimodal=False)
    ends = text.document_indices
    for i, (segments, (_, uses)) in enumerate(zip(encode_batch(tokenizer, [t for t, _ in TALKS]), TALKS, strict=True)):
        assert ends[i + 1] - ends[i] == len(segments)
        for j, (kind, value) in enumerate(segments):
            items, mode = text[int(ends[i]) + j]
            assert mode == {"context": 0, "target": 1, "image": 2}[kind]
            if kind == "image":
                assert pictures[int(items[0])].tobytes() == tiny_images(3)[uses[value]]
            else:
                assert items.dtype == np.int32 and items.tolist() == value


def test_megatron_core_builder_writes_the_same_bytes(prefix: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32, multimodal=True)
    number = {0: 0, 1: 1, 2: 2}
    for segments, (_, uses) in zip(encode_batch(tokenizer, [t for t, _ in TALKS]), TALKS, strict=True):
        for kind, value in segments:
            ids = [number[uses[value]]] if kind == "image" else value
            builder.add_item(torch.tensor(ids), mode={"context": 0, "target": 1, "image": 2}[kind])
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert shard_file(prefix, f"text.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_lengths_documents_and_images(prefix: Path, tokenizer: Tokenizer) -> None:
    shard = Shard(prefix)
    encoded = encode_batch(tokenizer, [t for t, _ in TALKS])
    assert len(shard) == 4 and shard.images == 3
    assert shard.lengths(1).dtype == np.int64
    assert shard.text_lengths.tolist() == [sum(len(v) for k, v in s if k != "image") for s in encoded]
    assert shard.image_counts.tolist() == [1, 0, 2, 1]
    assert shard.lengths(144).tolist() == (shard.text_lengths + 144 * shard.image_counts).tolist()
    for i, (segments, (_, uses)) in enumerate(zip(encoded, TALKS, strict=True)):
        document = shard.document(i)
        assert document.values.dtype == np.int32 and document.values.flags.owndata is not None and document.values.flags.writeable
        assert len(document.values) == len(document.modes) and document.images.tolist() == uses
        assert [p.mode for p in document.pieces] == [{"context": 0, "target": 1, "image": IMAGE}[k] for k, _ in segments]
        lengths, modes = shard.runs(i)
        assert np.array_equal(np.repeat(modes, lengths), document.modes) and modes.tolist() == [p.mode for p in document.pieces]
        for piece, (kind, value) in zip(document.pieces, segments, strict=True):
            assert piece.image == uses[value] if kind == "image" else piece.ids.tolist() == value
    assert [shard.record_id(i) for i in range(4)] == [f"doc é {i}" for i in range(4)] and shard.source(1) == "odd"
    assert [shard.image(k) for k in range(3)] == tiny_images(3)
    with pytest.raises(IndexError):
        shard.document(4)
    with pytest.raises(IndexError):
        shard.image(3)


def test_what_was_read_outlives_the_shard(prefix: Path) -> None:
    shard = Shard(prefix)
    lengths, document = shard.lengths(64), shard.document(2)
    wanted = lengths.tolist(), document.values.tolist()
    clone = pickle.loads(pickle.dumps(shard))
    del shard
    for _ in range(20):
        Shard(prefix)
    assert (lengths.tolist(), document.values.tolist()) == wanted and clone.image(1) == tiny_images(3)[1]


def test_manifest(prefix: Path, tokenizer: Tokenizer) -> None:
    m = Shard(prefix).manifest
    assert (m["documents"], m["images"], m["distinct_images"], m["rejected"]) == (4, 4, 3, 1)
    assert m["rejects"] == {"missing image file": {"count": 1, "examples": [{"id": "gone", "detail": "a.jpg"}]}}
    assert m["sources"]["even"]["documents"] == m["sources"]["odd"]["documents"] == 2
    assert m["text_tokens"] == int(Shard(prefix).text_lengths.sum()) > m["target_tokens"] > 0
    assert m["special_ids"]["image_pad"] == tokenizer.special.image_pad and m["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert json.loads(shard_file(prefix, "rejects.jsonl").read_text())["reason"] == "missing image file"
    assert set(m["files"]) == set(DATA_FILES)


def test_no_images_and_no_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shard = Shard(write(tmp_path / "text", tokenizer, TALKS[1:2]))
    assert shard.images == 0 and shard.image_counts.tolist() == [0] and len(shard.document(0).pieces) == 5
    empty = Shard(write(tmp_path / "empty", tokenizer, []))
    assert len(empty) == 0 and empty.lengths(144).tolist() == []


def test_another_tokenizer_is_refused(prefix: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    Shard(prefix).check_tokenizer(tokenizer)
    with pytest.raises(UserError, match=r"made with another tokenizer \(fingerprint .*run tools/preprocess"):
        Shard(prefix).check_tokenizer(load_tokenizer(tiny_tokenizer(tmp_path / "other", 390)))


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_truncated_file_is_named_with_its_size(prefix: Path, name: str) -> None:
    path = shard_file(prefix, name)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(UserError, match=rf"{name}: has {size - 1} bytes, the manifest says {size} bytes: damaged"):
        Shard(prefix)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: is missing"):
        Shard(prefix)


@pytest.mark.parametrize("name", ["text.bin", "text.idx", "image.bin", "image.idx", "docs"])
def test_truncation_shows_without_the_manifest_too(prefix: Path, name: str) -> None:
    manifest = json.loads(shard_file(prefix, "json").read_text())
    path = shard_file(prefix, name)
    os.truncate(path, path.stat().st_size - 1)
    manifest["files"][name]["bytes"] -= 1
    with pytest.raises(UserError, match="damaged, its digest is another"):
        shard_file(prefix, "json").write_text(json.dumps(manifest))
        Shard(prefix)
    shard_file(prefix, "json").write_text(json.dumps({**manifest, "digest": manifest_digest(manifest)}))
    with pytest.raises(UserError, match=rf"{name}: \d+ bytes, but .*run tools/preprocess"):
        Shard(prefix)


def test_an_unfinished_shard_is_not_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a", tokenizer, finish=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="there is no shard"):
        Shard(tmp_path / "a")


def test_killed_while_writing_and_while_replacing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.unit import test_shards as t
from megatron_infimed.data import shard_writer
from megatron_infimed.data.chat import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1]); n = 0
def stop(self):
    global n
    n += 1
    os.replace(self.tmp, self.path)
    if n == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
shard_writer.HashedFile.publish = stop
t.write(Path(sys.argv[2]), tokenizer, t.TALKS[:2])
"""
    folder = tiny_tokenizer(tmp_path / "tok")
    for files, prefix in ((1, tmp_path / "new"), (8, tmp_path / "old")):
        if prefix.name == "old":
            write(prefix, tokenizer)
        done = subprocess.run([sys.executable, "-c", script, str(folder), str(prefix), str(files)], capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
        with pytest.raises(UserError, match="never finished"):
            Shard(prefix)
        assert len(Shard(write(prefix, tokenizer))) == 4
        verify(prefix)


def test_two_writers_of_one_prefix(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with ShardWriter(tmp_path / "a", tokenizer), pytest.raises(UserError, match="another process is writing"):
        ShardWriter(tmp_path / "a", tokenizer)
