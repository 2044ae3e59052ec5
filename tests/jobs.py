"""A small corpus with everything that preprocessing meets, the command that makes a shard of it, and the shard's hashes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from megatron_infimed.data.shards import DATA_FILES, shard_file
from tests.tiny import tiny_images, tiny_tokenizer

ROOT = Path(__file__).parents[1]


def make_corpus(folder: Path, rows: int = 240) -> Path:
    """In `folder`: tok, images.zip, images/, a.jsonl (images by name), b.parquet (images inside); few pictures, used again and again.

    Among them: one picture under two names, two missing, one broken, one too long text, two texts with a name or date, a broken line.
    """
    tiny_tokenizer(folder / "tok")
    pictures = tiny_images(24)
    (folder / "images").mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, data in enumerate([*pictures[:20], pictures[3], b"<html>not found</html>"]):
            (archive.writestr(f"{i}.img", data) if i % 2 else (folder / "images" / f"{i}.img").write_bytes(data))
    talks = [
        {"id": f"a{i}", "question": f"Number {i}?", "answer": f"It is {i}.", "images": [f"{(7 * i + k) % 21}.img" for k in range(i % 4)]}
        for i in range(rows)
    ]
    talks[9]["images"], talks[rows // 2]["images"] = ["gone.img"], ["1.img", "gone.img"]
    talks[rows // 3]["images"], talks[rows // 3 + 1]["question"] = ["21.img"], "word " * 300
    talks[rows // 4]["question"], talks[rows - 5]["answer"] = "Seen by Dr. Smith?", "Compared with the study of 12/03/2019."
    lines = [json.dumps(t) for t in talks]
    lines[20] = "{broken"
    (folder / "a.jsonl").write_text("\n".join(lines))
    inside = [
        {"images": [{"bytes": pictures[(5 * i) % 24], "path": None}], "question": "What?", "answer": f"No. {i}"} for i in range(rows // 3)
    ]
    inside[4]["images"][0]["bytes"] = pictures[4][:100]  # type: ignore[index]
    pa.parquet.write_table(pa.Table.from_pylist(inside), folder / "b.parquet", row_group_size=16)
    return folder


def words(corpus: Path, output: Path, *more: object) -> list[str]:
    """The command that makes `output` of the corpus."""
    return [
        sys.executable, str(ROOT / "tools" / "preprocess_multimodal.py"), "--input", str(corpus / "a.jsonl"), "--input", str(corpus / "b.parquet"),
        "--images", str(corpus / "images"), "--images", str(corpus / "images.zip"), "--tokenizer", str(corpus / "tok"),
        "--output", str(output), "--max-text-tokens", "200", "--threads", "1", *map(str, more),
    ]  # fmt: skip


def run(corpus: Path, output: Path, *more: object, code: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words(corpus, output, *more), capture_output=True, text=True, cwd=ROOT, env=env or dict(os.environ), timeout=180)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def settings(corpus: Path) -> dict[str, object]:
    """The same as keyword arguments of preprocess()."""
    return {
        "inputs": [corpus / "a.jsonl", corpus / "b.parquet"],
        "tokenizer": corpus / "tok",
        "images": [corpus / "images", corpus / "images.zip"],
        "max_text_tokens": 200,
        "threads": 1,
    }


def hashes(prefix: Path) -> dict[str, str]:
    """Of every file of the shard; nothing else of it may be left."""
    names = (*DATA_FILES, "json")
    assert {p.name for p in prefix.parent.glob(f"{prefix.name}.*")} == {shard_file(prefix, n).name for n in names}
    return {name: hashlib.sha256(shard_file(prefix, name).read_bytes()).hexdigest() for name in names}
