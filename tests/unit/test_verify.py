"""verify names every damage: the file, the byte, the document."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_infimed.data.shards import DATA_FILES, DOC, Index, Shard, manifest_digest, shard_file
from megatron_infimed.errors import UserError
from megatron_infimed.preprocess.preprocess import preprocess
from megatron_infimed.preprocess.verify import find_damage, verify
from tests import jobs

ALL = (*DATA_FILES, "json")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = jobs.make_corpus(tmp_path_factory.mktemp("corpus"), 90)
    preprocess(output=folder / "shard" / "set", **jobs.settings(folder))  # type: ignore[arg-type]
    verify(folder / "shard" / "set")
    return folder / "shard" / "set"


@pytest.fixture
def prefix(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound.parent, tmp_path / "copy")
    return tmp_path / "copy" / "set"


def flip(prefix: Path, name: str, byte: int, bit: int = 0) -> None:
    path = shard_file(prefix, name)
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def document_at(prefix: Path, name: str, byte: int) -> set[int]:
    """Documents whose bytes these are, worked out from the sound shard."""
    shard, text, image = Shard(prefix), Index(f"{prefix}.text", np.int32), Index(f"{prefix}.image", np.uint8)
    if name == "text.bin":
        starts = text.pointers[text.ends[:-1]]
        return {int(np.searchsorted(starts, byte, "right")) - 1}
    if name == "docs":
        return {byte // DOC.itemsize}
    if name == "ids.jsonl":
        return {shard_file(prefix, name).read_bytes()[:byte].count(b"\n")}
    number = int(np.searchsorted(image.pointers, byte, "right")) - 1 if name == "image.bin" else byte // 32
    return {i for i in range(len(shard)) if number in shard.document(i).images}


@pytest.mark.parametrize("name", ["text.bin", "docs", "ids.jsonl", "image.bin", "image.sha256"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_flip_is_named_with_its_document(sound: Path, prefix: Path, name: str, seed: int) -> None:
    rng = random.Random(f"{name}{seed}")
    byte = rng.randrange(shard_file(sound, name).stat().st_size)
    hit = document_at(sound, name, byte)
    flip(prefix, name, byte, rng.randrange(8))
    lines = [line for line in find_damage(prefix).lines if "it hits" in line]
    assert lines and all(line.startswith(f"{shard_file(prefix, name)}: byte ") for line in lines), lines
    named = {int(n) for line in lines for n in re.findall(r"document (\d+) \(id ", line)}
    start = int(re.search(r": byte (\d+):", lines[0])[1])  # type: ignore[index]
    assert start <= byte < start + 40_000
    assert named & hit and (named <= hit or name in ("ids.jsonl", "docs")), (named, hit)  # an id_offset bounds two lines
    assert len(named) <= max(3, len(hit))


@pytest.mark.parametrize("name", ALL)
def test_every_flipped_bit_is_found(prefix: Path, name: str) -> None:
    rng, path = random.Random(name), shard_file(prefix, name)
    whole = path.read_bytes()
    for _ in range(6):
        flip(prefix, name, rng.randrange(len(whole)), rng.randrange(8))
        with pytest.raises(UserError, match=re.escape(str(path))):
            verify(prefix)
        path.write_bytes(whole)
    verify(prefix)


@pytest.mark.parametrize("name", ALL)
def test_a_truncated_or_missing_file_is_named(prefix: Path, name: str) -> None:
    path = shard_file(prefix, name)
    size = path.stat().st_size
    for left in (size - 1, size // 2, 0):
        os.truncate(path, left)
        with pytest.raises(UserError) as error:
            verify(prefix)
        assert f"{path}: " in str(error.value)
        if name != "json":
            assert f"cut off at byte {left}" in str(error.value)
        if name in ("text.bin", "image.bin", "docs", "ids.jsonl", "image.sha256"):
            assert re.search(r"it hits document \d+ \(id ", str(error.value))
    path.unlink()
    with pytest.raises(UserError, match=r"is missing|there is no shard|never finished"):
        verify(prefix)


def test_all_damage_is_reported_at_once(prefix: Path) -> None:
    shard = Shard(prefix)
    flip(prefix, "text.bin", 5)
    flip(prefix, "image.bin", 5)
    flip(prefix, "ids.jsonl", shard_file(prefix, "ids.jsonl").stat().st_size - 3)
    text = "\n".join(find_damage(prefix).lines)
    assert re.search(r"text\.bin: byte 0: .*document 0 \(id 'a0'\)", text)
    assert re.search(r"image\.bin: byte 0: \d+ bytes of image 0: .*document \d+", text)
    assert re.search(rf"ids\.jsonl: byte \d+: .*document {len(shard) - 1} ", text)


def test_the_report_is_bounded(prefix: Path) -> None:
    os.truncate(shard_file(prefix, "text.bin"), 0)
    with pytest.raises(UserError) as error:
        verify(prefix)
    lines = str(error.value).splitlines()
    assert len(lines) == 22 and re.fullmatch(r"\.\.\. and \d+ more", lines[-1])


def test_counts_of_the_manifest_are_checked_with_the_files(prefix: Path) -> None:
    path = shard_file(prefix, "json")
    manifest = json.loads(path.read_text())
    for name in ("text_tokens", "target_tokens", "images", "image_bytes", "rejected"):
        changed = {**manifest, name: manifest[name] + 1}
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match="own digest does not hold"):
            verify(prefix)
        path.write_text(json.dumps({**changed, "digest": manifest_digest(changed)}))
        with pytest.raises(UserError, match=rf"{name} is {changed[name]}, the files hold {manifest[name]}"):
            verify(prefix)


def test_the_command(sound: Path, prefix: Path) -> None:
    def run(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "megatron_infimed", "verify", str(path), "--threads", "2"], capture_output=True, text=True
        )

    good = run(sound)
    assert good.returncode == 0 and "sound: " in good.stdout and good.stderr == ""
    flip(prefix, "text.bin", 0)
    bad = run(prefix)
    assert bad.returncode == 2 and bad.stdout == "" and "Traceback" not in bad.stderr
    assert bad.stderr.startswith(f"error: {prefix}: 2 places damaged") and "document 0 (id 'a0')" in bad.stderr
