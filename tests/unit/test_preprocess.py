"""Preprocessing: what goes in comes out, bad images are rejects, a finished shard is left alone."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_infimed.data import preprocess as module
from megatron_infimed.data.chat import Tokenizer, encode, load_tokenizer
from megatron_infimed.data.preprocess import check_image, preprocess
from megatron_infimed.data.readers import read
from megatron_infimed.data.records import Record
from megatron_infimed.data.shards import IMAGE, TARGET, Shard, shard_file, verify
from megatron_infimed.errors import UserError
from tests.tiny import tiny_images, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tok")))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """30 documents over 5 pictures (2 with the same bytes), 6 rejects."""
    pictures = tiny_images(4)
    (tmp_path / "images").mkdir()
    for i, data in enumerate([*pictures, pictures[0]]):
        (tmp_path / "images" / f"{i}.img").write_bytes(data)
    (tmp_path / "images" / "cut.jpg").write_bytes(pictures[0][: len(pictures[0]) // 2])
    (tmp_path / "images" / "empty.jpg").write_bytes(b"")
    (tmp_path / "images" / "text.jpg").write_bytes(b"<html>not found</html>")
    rows: list[dict[str, object]] = [
        {"id": f"d{i}", "image": f"{i % 5}.img", "question": f"Number {i}?", "answer": f"It is {i}."} for i in range(30)
    ]
    rows[3:3] = [{"id": n, "image": f"{n}.jpg", "caption": "x"} for n in ("cut", "empty", "text", "gone")]
    rows.append({"id": "long", "question": "word " * 300, "answer": "a"})
    lines = [json.dumps(r) for r in rows]
    lines.insert(10, "{broken")
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_what_goes_in_comes_out(corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 7)
    outcome = preprocess([corpus / "set.jsonl"], corpus / "out" / "set", tokenizer, images=corpus / "images", max_text_tokens=200)
    shard = Shard(corpus / "out" / "set")
    assert not outcome.skipped and outcome.manifest == shard.manifest
    wanted = {r.id: r for r in read(corpus / "set.jsonl", corpus / "images") if isinstance(r, Record)}
    assert [shard.record_id(i) for i in range(len(shard))] == [f"d{i}" for i in range(30)]
    for i in range(30):
        record = wanted[f"d{i}"]
        pieces = shard.document(i).pieces
        assert [p.ids.tolist() for p in pieces if p.mode != IMAGE] == [v for k, v in encode(tokenizer, record) if k != "image"]
        assert [shard.image(p.image) for p in pieces if p.mode == IMAGE] == [p.read_bytes() for p in record.images if isinstance(p, Path)]
        assert tokenizer.decode(next(p.ids for p in pieces if p.mode == TARGET)) == f"It is {i}."
    assert shard.images == 4
    counts = {reason: entry["count"] for reason, entry in outcome.manifest["rejects"].items()}
    assert counts == {"corrupt image": 3, "missing image file": 1, "too many text tokens": 1, "broken json": 1}
    rejects = [json.loads(line) for line in shard_file(shard.prefix, "rejects.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rejects] == ["cut", "empty", "text", "gone", "set.jsonl:line 11", "long"]
    verify(shard.prefix)


def test_same_inputs_same_bytes(corpus: Path, tokenizer: Tokenizer) -> None:
    a, b = (preprocess([corpus / "set.jsonl"], corpus / n, tokenizer, images=corpus / "images", threads=t) for n, t in (("a", 1), ("b", 4)))
    assert a.manifest == b.manifest


def test_finished_is_skipped_and_changes_are_not(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def again(tok: Tokenizer = tokenizer, **kw: object) -> bool:
        return preprocess([corpus / "set.jsonl"], corpus / "out", tok, images=corpus / "images", **kw).skipped  # type: ignore[arg-type]

    assert [again(), again(), again(force=True), again(max_text_tokens=100), again(max_text_tokens=100)] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert again(load_tokenizer(tiny_tokenizer(tmp_path / "other", 390))) is False
    assert again() is False
    with shard_file(corpus / "out", "image.bin").open("ab") as f:
        f.write(b"x")
    assert again() is False
    with (corpus / "set.jsonl").open("a") as f:
        f.write("\n")
    assert [again(), again()] == [False, True]


def test_an_interrupted_run_leaves_the_old_shard(corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ([corpus / "set.jsonl"], corpus / "out", tokenizer)
    preprocess(*args, images=corpus / "images")
    monkeypatch.setattr(module, "encode_batch", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        preprocess(*args, images=corpus / "images", force=True)
    verify(corpus / "out")
    assert not list(corpus.glob("*.tmp")) and not list(corpus.glob("*.lock"))


def test_nothing_left_is_an_error(corpus: Path, tokenizer: Tokenizer) -> None:
    (corpus / "bad.jsonl").write_text('{"id": "1", "image": "gone.jpg", "caption": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"not one document left: missing image file \(3\); see .*out\.rejects\.jsonl"):
        preprocess([corpus / "bad.jsonl"], corpus / "out", tokenizer)
    assert len((corpus / "out.rejects.jsonl").read_text().splitlines()) == 3
    with pytest.raises(UserError, match="there is no shard"):
        Shard(corpus / "out")


def picture(mode: str, kind: str, size: tuple[int, int] = (40, 30), **kw: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **kw)
    return out.getvalue()


KINDS = "RGB JPEG, L JPEG, CMYK JPEG, P PNG, LA PNG, I;16 PNG, RGB WEBP, RGB TIFF, 1 BMP, RGB GIF"


@pytest.mark.parametrize(
    "data", [*(picture(k.split()[0], k.split()[1]) for k in KINDS.split(", ")), picture("RGB", "JPEG", progressive=True)]
)
def test_ordinary_images_pass_and_every_truncation_fails(data: bytes) -> None:
    assert check_image(data) is None
    assert check_image(data[: len(data) // 2]) is not None


def test_a_bomb_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in ("PNG", "JPEG"):
        assert check_image(picture("L", kind)) == ("image too large", "40 x 30 pixels, the limit is 1000")


def test_noise_is_a_reject_not_a_crash() -> None:
    rng = np.random.default_rng(0)
    for data in tiny_images(8):
        for _ in range(10):
            broken = bytearray(data)
            broken[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            verdict = check_image(bytes(broken))
            assert verdict is None or verdict[0] in ("corrupt image", "image too large")
