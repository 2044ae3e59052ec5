"""Preprocessing: what goes in comes out, bad images and identifying text are rejects, a finished shard is left alone."""

from __future__ import annotations

import datetime
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from megatron_infimed.data.chat import encode, load_tokenizer
from megatron_infimed.data.shard_writer import ShardWriter
from megatron_infimed.data.shards import FORMAT, IMAGE, TARGET, VERSION, Shard, shard_file
from megatron_infimed.errors import UserError
from megatron_infimed.intake.images import check_image, open_images
from megatron_infimed.intake.images import read as read_image
from megatron_infimed.intake.readers import read
from megatron_infimed.intake.records import Record
from megatron_infimed.preprocess import pieces as module
from megatron_infimed.preprocess.dry_run import try_out
from megatron_infimed.preprocess.engines import Engine
from megatron_infimed.preprocess.job import Job
from megatron_infimed.preprocess.preprocess import make_job, preprocess
from megatron_infimed.preprocess.verify import verify
from tests.tiny import tiny_images, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tok"))


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


def test_what_goes_in_comes_out(corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 7)
    outcome = preprocess([corpus / "set.jsonl"], corpus / "out" / "set", tokenizer, images=[corpus / "images"], max_text_tokens=200)
    shard, words = Shard(corpus / "out" / "set"), load_tokenizer(tokenizer)
    assert not outcome.skipped and outcome.manifest == shard.manifest
    rows = (item for _, item in read(corpus / "set.jsonl", images=open_images([corpus / "images"])))
    wanted = {r.id: r for r in rows if isinstance(r, Record)}
    assert [shard.record_id(i) for i in range(len(shard))] == [f"d{i}" for i in range(30)]
    for i in range(30):
        record = wanted[f"d{i}"]
        pieces = shard.document(i).pieces
        assert [p.ids.tolist() for p in pieces if p.mode != IMAGE] == [v for k, v in encode(words, record) if k != "image"]
        assert [shard.image(p.image) for p in pieces if p.mode == IMAGE] == [read_image(image) for image in record.images]
        assert words.decode(next(p.ids for p in pieces if p.mode == TARGET)) == f"It is {i}."
    assert shard.images == 4
    counts = {reason: entry["count"] for reason, entry in outcome.manifest["rejects"].items()}
    assert counts == {"corrupt image": 3, "missing image file": 1, "too many text tokens": 1, "broken json": 1}
    rejects = [json.loads(line) for line in shard_file(shard.prefix, "rejects.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rejects] == ["cut", "empty", "text", "gone", "set.jsonl:line 11", "long"]
    verify(shard.prefix)


def test_an_image_in_several_batches_is_read_once(corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[object] = []
    real = module.load
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "load", lambda image, *a: (reads.append(image), real(image, *a))[1])
    preprocess([corpus / "set.jsonl"], corpus / "out", tokenizer, images=[corpus / "images"])
    assert len(reads) == len(set(reads)) == 5 + 3


def test_same_inputs_same_bytes(corpus: Path, tokenizer: Path) -> None:
    a, b = (
        preprocess([corpus / "set.jsonl"], corpus / n, tokenizer, images=[corpus / "images"], threads=t) for n, t in (("a", 1), ("b", 4))
    )
    assert a.manifest == b.manifest


def test_finished_is_skipped_and_changes_are_not(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    def again(tok: Path = tokenizer, **kw: object) -> bool:
        return preprocess([corpus / "set.jsonl"], corpus / "out", tok, images=[corpus / "images"], **kw).skipped  # type: ignore[arg-type]

    assert [again(), again(), again(piece_rows=5), again(force=True)] == [False, True, True, False]
    for change in ({"max_text_tokens": 100}, {"text_phi": "off"}, {"source": "x"}, {"map": "vqa_rad"}, {"allow_burned_in": ["x"]}):
        if change != {"map": "vqa_rad"}:  # another map may leave no row
            assert [again(**change), again(**change)] == [False, True], change
    assert again(tiny_tokenizer(tmp_path / "other", 390)) is False
    assert again() is False
    with shard_file(corpus / "out", "image.bin").open("ab") as f:
        f.write(b"x")
    assert again() is False
    with (corpus / "set.jsonl").open("a") as f:
        f.write("\n")
    assert [again(), again()] == [False, True]


def test_where_the_files_lie_does_not_matter(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    a = preprocess([corpus / "set.jsonl"], tmp_path / "a", tokenizer, images=[corpus / "images"])
    for name in ("set.jsonl", "images"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        shutil.move(corpus / name, tmp_path / "moved" / name)
    assert preprocess([tmp_path / "moved" / "set.jsonl"], tmp_path / "a", tokenizer, images=[tmp_path / "moved" / "images"]).skipped
    assert a.manifest["inputs"][0].keys() == {"name", "bytes", "sha256", "source"}


def test_an_interrupted_run_leaves_the_old_shard(corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ([corpus / "set.jsonl"], corpus / "out", tokenizer)
    preprocess(*args, images=[corpus / "images"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "encode_batch", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        preprocess(*args, images=[corpus / "images"], force=True)
    verify(corpus / "out")
    assert not list(corpus.glob("*.tmp")) and not list(corpus.glob("*.lock")) and not list(corpus.glob("out.work/pieces/*"))
    assert preprocess(*args, images=[corpus / "images"]).skipped and not (corpus / "out.work").exists()


def test_nothing_left_is_an_error(corpus: Path, tokenizer: Path) -> None:
    (corpus / "bad.jsonl").write_text('{"id": "1", "image": "gone.jpg", "caption": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"not one document left: missing image file \(3\); see .*out\.rejects\.jsonl"):
        preprocess([corpus / "bad.jsonl"], corpus / "out", tokenizer)
    assert len((corpus / "out.rejects.jsonl").read_text().splitlines()) == 3 and not (corpus / "out.work").exists()
    with pytest.raises(UserError, match="there is no shard"):
        Shard(corpus / "out")
    (corpus / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="not one document left: the input is empty"):
        preprocess([corpus / "empty.jsonl"], corpus / "out", tokenizer)


def test_nothing_left_leaves_an_older_shard_whole(corpus: Path, tokenizer: Path) -> None:
    preprocess([corpus / "set.jsonl"], corpus / "out", tokenizer, images=[corpus / "images"])
    (corpus / "bad.jsonl").write_text('{"id": "1", "image": "gone.jpg", "caption": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"not one document left: .*; see .*out\.work/rejects\.jsonl"):
        preprocess([corpus / "bad.jsonl"], corpus / "out", tokenizer)
    assert len((corpus / "out.work" / "rejects.jsonl").read_text().splitlines()) == 3
    verify(corpus / "out")


def test_force_uses_nothing_of_before(corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*, force: bool = False) -> Job:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("megatron_infimed.preprocess.preprocess.merge", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
            made(force=force)
        return Job.load(corpus / "out.work")

    def made(name: str = "out", *, force: bool = False) -> dict[str, object]:
        return preprocess([corpus / "set.jsonl"], corpus / name, tokenizer, images=[corpus / "images"], force=force).manifest

    old = stopped()
    (corpus / "images" / "1.img").write_bytes(tiny_images(9)[8])
    forced = stopped(force=True)
    assert forced.fingerprint != old.fingerprint
    inode = forced.piece(0, 0).stat().st_ino
    assert stopped(force=True).piece(0, 0).stat().st_ino == inode  # the forced run goes on
    assert stopped().piece(0, 0).stat().st_ino == inode
    manifest = made(force=True)
    assert manifest == made("fresh") and made()  # nothing of the forcing is in the shard
    assert any(Shard(corpus / "out").image(k) == tiny_images(9)[8] for k in range(4))
    verify(corpus / "out")
    shutil.rmtree(corpus / "images")
    with pytest.raises(UserError, match="no such image folder"):
        made(force=True)


def test_what_lies_in_the_way_is_one_error(corpus: Path, tokenizer: Path) -> None:
    args = ([corpus / "set.jsonl"], corpus / "out", tokenizer)
    (corpus / "out.work").write_text("mine")
    with pytest.raises(UserError, match=r"out\.work: .*it is a file or a link; move it"):
        preprocess(*args, images=[corpus / "images"])
    (corpus / "out.work").unlink()
    (corpus / "out.work" / "pieces").mkdir(parents=True)
    (corpus / "out.work" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"out\.work: .*it holds other things \(thesis\.tex\); move it"):
        preprocess(*args, images=[corpus / "images"])
    assert (corpus / "out.work" / "thesis.tex").read_text() == "mine"
    shutil.rmtree(corpus / "out.work")
    shard_file(corpus / "out", "json").write_text(json.dumps({"format": FORMAT, "version": VERSION}))
    assert not preprocess(*args, images=[corpus / "images"]).skipped
    verify(corpus / "out")


def test_kept_fields_are_in_the_shard(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "map.yaml").write_text('talk:\n  - turns: [{user: "{ask}", assistant: "{tell}"}]\nkeep: [modality, tags, note, long]\n')
    rows = [
        {"ask": "Seen when?", "tell": "On 12/03/2019.", "modality": "CT", "tags": ["a", {"b": 1}]},
        {"ask": "What?", "tell": "A lung.", "modality": "MR", "note": "read by Dr. Smith", "score": 3},
        {"ask": "What?", "tell": "A liver.", "modality": "XR", "long": "x" * 5000},
        {"ask": "What?", "tell": "A heart."},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    preprocess([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer, map=tmp_path / "map.yaml", text_phi="flag", piece_rows=2)
    lines = [json.loads(line) for line in shard_file(tmp_path / "out", "ids.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k.startswith("meta")} for line in lines] == [
        {"meta": {"modality": "CT", "phi": ["date"], "tags": ["a", {"b": 1}]}},
        {"meta": {"modality": "MR"}},
        {"meta": {"modality": "XR"}, "meta_left_out": 1},
        {},
    ]
    m = Shard(tmp_path / "out").manifest
    assert m["deid"]["counts"]["kept field, name: left out"] == 1
    assert "Smith" not in "".join(p.read_bytes().decode("latin1") for p in tmp_path.glob("out.*"))
    verify(tmp_path / "out")


def test_any_meta_is_a_line_of_json(tmp_path: Path, tokenizer: Path) -> None:
    odd = {
        "z": float("nan"),
        "when": datetime.date(2020, 1, 2),
        "b": b"\xff",
        "mixed": {1: 2, "a": 3},
        "half": "\ud800",
        "new\nline": '"\n',
    }
    with ShardWriter(tmp_path / "s", load_tokenizer(tokenizer)) as writer:
        writer.add_document("a", "s", [("target", [1])], meta=odd)
        writer.add_document("b", "s", [("target", [2])])
        writer.finish()
    first, second = (json.loads(line) for line in shard_file(tmp_path / "s", "ids.jsonl").read_text().splitlines())
    assert first["meta"] == {
        "z": "nan", "when": "2020-01-02", "b": "b'\\xff'", "mixed": "{1: 2, 'a': 3}", "half": "\ud800", "new\nline": '"\n',
    }  # fmt: skip
    assert second == {"id": "b", "source": "s"} and [Shard(tmp_path / "s").record_id(i) for i in range(2)] == ["a", "b"]
    verify(tmp_path / "s")


@pytest.mark.parametrize(("how", "documents", "counted"), [
    ("reject", 1, "text name: rejected"), ("redact", 2, "text name: redacted"), ("flag", 2, "text name: flagged"), ("off", 2, "text: not looked at"),
])  # fmt: skip
def test_identifying_text(tmp_path: Path, tokenizer: Path, how: str, documents: int, counted: str) -> None:
    rows = [{"question": "Seen by Dr. Smith?", "answer": "Yes."}, {"question": "Which organ?", "answer": "The liver."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    m = preprocess([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer, text_phi=how).manifest  # type: ignore[arg-type]
    assert m["documents"] == documents and m["deid"]["policy"] == {"text": how, "allow_burned_in": []}
    assert m["deid"]["counts"][counted] == (2 if how == "off" else 1)
    left = "".join(p.read_bytes().decode("latin1") for p in tmp_path.glob("out.*")) + json.dumps(m)
    assert "Smith" not in left


def test_a_folder_of_dicom_files(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "scans").mkdir()
    for name in ("CT_small.dcm", "examples_rgb_color.dcm"):  # the second is an ultrasound: it may show the patient's name
        shutil.copy(str(get_testdata_file(name)), tmp_path / "scans" / name)
    closed = preprocess([tmp_path / "scans"], tmp_path / "closed", tokenizer, map="dicom", piece_rows=1).manifest
    assert closed["documents"] == 1 and closed["rejects"].keys() == {"modality may burn in text"}
    assert closed["deid"]["counts"]["dicom: pixels only"] == 1
    opened = preprocess([tmp_path / "scans"], tmp_path / "open", tokenizer, map="dicom", allow_burned_in=["scans"]).manifest
    assert opened["documents"] == opened["distinct_images"] == 2 and len(opened["inputs"]) == 1
    assert opened["deid"]["counts"]["dicom modality may burn in text: allowed by name"] == 1
    assert all(Shard(tmp_path / "open").image(k).startswith(b"\x89PNG") for k in range(2))
    verify(tmp_path / "open")
    shutil.copy(tmp_path / "scans" / "CT_small.dcm", tmp_path / "scans" / "another.dcm")
    assert not preprocess([tmp_path / "scans"], tmp_path / "closed", tokenizer, map="dicom").skipped


def test_decisions_do_not_depend_on_the_piece(tmp_path: Path, tokenizer: Path) -> None:
    """One ultrasound asked about in every row: read once a piece, counted for every use."""
    shutil.copy(str(get_testdata_file("examples_rgb_color.dcm")), tmp_path / "us.dcm")
    rows = [{"id": f"r{i}", "image": "us.dcm", "question": "What?", "answer": f"{i}"} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = [
        preprocess([tmp_path / "a.jsonl"], tmp_path / str(n), tokenizer, allow_burned_in=["a"], piece_rows=n).manifest for n in (5, 100)
    ]
    assert made[0] == made[1]
    assert made[0]["deid"]["counts"] == {"dicom modality may burn in text: allowed by name": 12, "text: clean": 12}


def test_a_dry_run_tells_and_leaves_nothing(corpus: Path, tokenizer: Path) -> None:
    from rich.console import Console

    out = io.StringIO()
    job = make_job(
        [corpus / "set.jsonl"], corpus / "dry" / "out", tokenizer, map=None, images=[corpus / "images"], source=None, max_text_tokens=None,
        text_phi=None, allow_burned_in=(), piece_rows=10, threads=1, hashed=False,
    )  # fmt: skip
    Console(file=out, width=150).print(try_out(job, 12, Engine(tasks=3)))
    text = out.getvalue()
    for words in (
        "1 with 36 rows; 12 were looked at",
        "corrupt image",
        "3: cut (",
        "set.jsonl:line 11",
        "text: clean",
        "local, 3 tasks, 4 pieces of 10 rows",
    ):
        assert words in text, text
    assert not (corpus / "dry").exists() and not list(corpus.glob("*.work"))
    (corpus / "set.jsonl").rename(corpus / "x.json")
    (corpus / "x.json").write_text('[{"question": "a", "answer": "b"}, {"question": ')
    job = make_job(
        [corpus / "x.json"], corpus / "dry" / "out", tokenizer, map=None, images=(), source=None, max_text_tokens=None,
        text_phi=None, allow_burned_in=(), piece_rows=10, threads=1, hashed=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"x\.json: the array breaks off after 1 row"):  # found although it lies behind the first row
        try_out(job, 1, Engine())


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
