"""Field maps: each shipped one on a file of exactly its data set's shape, awkward rows included, and what a map may say."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_infimed.errors import UserError
from megatron_infimed.intake import images as image_files
from megatron_infimed.intake.fieldmap import SHIPPED, FieldMap, load_map
from megatron_infimed.intake.images import open_images
from megatron_infimed.intake.readers import read
from megatron_infimed.intake.records import Record, Reject, Turn
from tests.tiny import tiny_images
from tests.unit.test_images import CONTAINERS, pack

PICTURES = tiny_images(6)
A, B, C = PICTURES[:3]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def seen(file: Path, name: str, *places: Path) -> list[Any]:
    """Records as (id, images, texts, meta), Rejects as (id, reason)."""
    store = open_images(places, file.parent / "spool") if places else None
    out: list[Any] = []
    for _, item in read(file, map=load_map(name), images=store):
        if isinstance(item, Reject):
            out.append((item.id, item.reason))
        else:
            assert [t.role for t in item.turns] == ["user", "assistant"] * (len(item.turns) // 2)
            out.append((item.id, [image_files.read(i) for i in item.images], [t.text for t in item.turns], dict(item.meta)))
    return out


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def array(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def table(path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> Path:
    columns = {name: pa.array([r.get(name) for r in rows], types.get(name)) for name in rows[0]}
    parquet.write_table(pa.table(columns), path)
    return path


def sheet(path: Path, header: list[str], *rows: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([header, *rows])
    return path


def test_pubmedvision(tmp_path: Path) -> None:
    about = {"modality": "CT", "body_part": "Chest"}
    rows = [
        {"id": "p0", "image": ["images/a.jpg"], "conversations": talk("What?", "A CT."), **about},
        {"id": "p1", "image": ["images/a.jpg", "images/b.jpg"], "conversations": talk("Compare.", "Same."), **about},
        {"id": "p2", "image": ["images/gone.jpg"], "conversations": talk("What?", "?"), **about},
        {"id": "p3", "image": ["images/b.jpg"], "conversations": talk("What tag?", "Write <image>."), **about},
        {"id": "p4", "image": None, "conversations": talk("What?", "?"), **about},
    ]
    zips = [tmp_path / "0", tmp_path / "1"]
    for folder, name, data in zip(zips, ("a", "b"), (A, B), strict=True):
        folder.mkdir()
        pack(folder, {f"images/{name}.jpg": data}, "zip")
    assert seen(array(tmp_path / "set.json", *rows), "pubmedvision", *(z / "pictures.zip" for z in zips)) == [
        ("p0", [A], ["<image>\nWhat?", "A CT."], about),
        ("p1", [A, B], ["<image>\n<image>\nCompare.", "Same."], about),
        ("p2", "missing image file"),
        ("p3", [B], ["<image>\nWhat tag?", "Write <image>."], about),
        ("p4", "null image"),
    ]


def test_llava(tmp_path: Path) -> None:
    rows = [
        {"id": "l0", "image": "a.jpg", "domain": {"ct": True}, "conversatons": talk("What?\n<image>", "A CT.", "Sure?", "Yes.")},
        {"pair_id": "l1", "image": "b.jpg", "conversations": talk("<image>\nWhat?", "Gross.")},
        {"id": "l2", "image": "b.jpg", "conversations": talk("<image><image>", "Two?")},
        {"id": "l3", "conversations": talk("Only text?", "Yes.")},
    ]
    pack(tmp_path, {"images/a.jpg": A, "images/b.jpg": B}, "folder")
    assert seen(array(tmp_path / "set.json", *rows), "llava", tmp_path / "pictures") == [
        ("l0", [A], ["What?\n<image>", "A CT.", "Sure?", "Yes."], {}),
        ("l1", [B], ["<image>\nWhat?", "Gross."], {}),
        ("l2", "more image marks than images"),
        ("l3", [], ["Only text?", "Yes."], {}),
    ]


def test_pmc_oa(tmp_path: Path) -> None:
    rows = [
        {"image": "PMC1_Fig1_0.jpg", "caption": " A. Real time <image>", "pmcid": "PMC1", "url_name": "x.jpg"},
        {"image": "PMC1_Fig1_1.jpg", "caption": "B.", "pmcid": "PMC1", "url_name": "y.jpg"},
        {"image": "PMC1_Fig1_1.jpg", "caption": "", "pmcid": "PMC1", "url_name": "y.jpg"},
        {"image": "PMC1_Fig1_1.jpg", "caption": None, "pmcid": "PMC1", "url_name": "y.jpg"},
    ]
    zipped = pack(tmp_path, {"images/PMC1_Fig1_1.jpg": B, "images/PMC1_Fig1_0.jpg": A}, "zip")
    assert seen(lines(tmp_path / "train.jsonl", *rows), "pmc_oa", zipped) == [
        ("PMC1_Fig1_0.jpg", [A], ["<image>\n", "A. Real time <image>"], {"pmcid": "PMC1"}),
        ("PMC1_Fig1_1.jpg", [B], ["<image>\n", "B."], {"pmcid": "PMC1"}),
        ("PMC1_Fig1_1.jpg", "empty assistant text"),
        ("PMC1_Fig1_1.jpg", "unknown row shape"),
    ]


def test_rocov2(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": A, "path": "x.jpg"}, "image_id": "ROCOv2_1", "caption": "A CT.", "cui": ["C1", "C2"]},
        {"image": None, "image_id": "ROCOv2_2", "caption": "Gone.", "cui": []},
    ]
    assert seen(table(tmp_path / "r.parquet", rows, image=IMAGE), "rocov2") == [
        ("ROCOv2_1", [A], ["<image>\n", "A CT."], {"cui": ["C1", "C2"]}),
        ("ROCOv2_2", "null image"),
    ]
    captions = sheet(tmp_path / "train_captions.csv", ["ID", "Caption"], ["R_1", 'An "MR",\nsagittal'], ["R_9", "Gone"], ["R_2"])
    assert seen(captions, "rocov2", pack(tmp_path, {"train/R_1.jpg": B}, "zip")) == [
        ("R_1", [B], ["<image>\n", 'An "MR",\nsagittal'], {}),
        ("R_9", "missing image file"),
        ("train_captions.csv:row 2", "wrong number of columns"),
    ]


def test_pmc_vqa_of_both_versions(tmp_path: Path) -> None:
    choices = [" A:Diffuse ", "B:Focal", "C:None", "D:Cannot tell"]
    asks = (
        "<image>\nWhat is it?\nA:Diffuse\nB:Focal\nC:None\nD:Cannot tell\nAnswer with the option's letter from the given choices directly."
    )
    letters = [f"Choice {c}" for c in "ABCD"]
    one = sheet(
        tmp_path / "train.csv",
        ["Figure_path", "Question", "Answer", *letters, "Answer_label"],
        ["P_F1.jpg", " What is it?", "Focal", *choices, "B"],
        ["P_F2.jpg", "What is it?", "Focal", *choices, "B"],
    )
    assert seen(one, "pmc_vqa", pack(tmp_path, {"images/P_F1.jpg": A}, "zip")) == [
        ("train.csv:row 0", [A], [asks, "B"], {}),
        ("train.csv:row 1", "missing image file"),
    ]
    two = sheet(
        tmp_path / "train_2.csv",
        ["index", "Figure_path", "Caption", "Question", *letters, "Answer", "split"],
        ["7", "P_F1.jpg", "The caption", "What is it?", *choices, "B ", "train"],
        ["8", "P_F1.jpg", "The caption", "What is it?", *choices, "", "train"],
    )
    assert seen(two, "pmc_vqa", pack(tmp_path, {"figures/P_F1.jpg": C}, "tar.gz")) == [
        ("7", [C], [asks, "B"], {}),
        ("8", "empty assistant text"),
    ]


@pytest.mark.parametrize("name", ["vqa_rad", "path_vqa"])
def test_vqa_rad_and_path_vqa(tmp_path: Path, name: str) -> None:
    rows = [
        {"image": {"bytes": A, "path": None}, "question": "is it ct?", "answer": "yes"},
        {"image": {"bytes": None, "path": None}, "question": "is it ct?", "answer": "yes"},
        {"image": {"bytes": B, "path": None}, "question": "is it ct?", "answer": None},
    ]
    assert seen(table(tmp_path / "v.parquet", rows, image=IMAGE), name) == [
        ("v.parquet:row 0", [A], ["<image>\nis it ct?", "yes"], {}),
        ("v.parquet:row 1", "null image"),
        ("v.parquet:row 2", "unknown row shape"),
    ]


def test_slake(tmp_path: Path) -> None:
    def row(qid: int, lang: str, img: str) -> dict[str, Any]:
        about = {"modality": "MRI", "location": "Abdomen", "answer_type": "OPEN", "content_type": "Modality"}
        names = {
            "img_id": 1,
            "img_name": img,
            "question": "What?",
            "answer": "MRI",
            "q_lang": lang,
            "base_type": "vqa",
            "triple": ["v"],
            "qid": qid,
        }
        return names | about

    rows = [row(0, "en", "xmlab1/source.jpg"), row(1, "zh", "xmlab1/source.jpg"), row(2, "en", "xmlab9/source.jpg")]
    assert seen(array(tmp_path / "train.json", *rows), "slake", pack(tmp_path, {"imgs/xmlab1/source.jpg": A}, "zip")) == [
        (
            "0",
            [A],
            ["<image>\nWhat?", "MRI"],
            {"modality": "MRI", "location": "Abdomen", "answer_type": "OPEN", "content_type": "Modality"},
        ),
        ("1", "left out by the map"),
        ("2", "missing image file"),
    ]


def test_mimic_cxr(tmp_path: Path) -> None:
    asks = "Write the report of this chest X-ray."
    rows = [
        {"image": ["p10/a.jpg", "p10/b.jpg"], "findings": "Clear lungs.", "impression": "Normal."},
        {"image": ["p10/a.jpg"], "findings": "", "impression": "Normal."},
        {"image": ["p10/a.jpg"], "findings": "Clear lungs.", "impression": None},
        {"image": ["p10/a.jpg"], "impression": "Normal."},
        {"image": ["p10/a.jpg"], "findings": "", "impression": ""},
        {"image": ["p10/a.jpg", "p10/c.jpg"], "findings": "x", "impression": "y"},
    ]
    assert seen(
        lines(tmp_path / "m.jsonl", *rows), "mimic_cxr", pack(tmp_path, {"files/p10/a.jpg": A, "files/p10/b.jpg": B}, "folder")
    ) == [
        ("m.jsonl:line 1", [A, B], [f"<image>\n<image>\n{asks}", "Findings: Clear lungs.\nImpression: Normal."], {}),
        ("m.jsonl:line 2", [A], [f"<image>\n{asks}", "Impression: Normal."], {}),
        ("m.jsonl:line 3", [A], [f"<image>\n{asks}", "Findings: Clear lungs."], {}),
        ("m.jsonl:line 4", [A], [f"<image>\n{asks}", "Impression: Normal."], {}),
        ("m.jsonl:line 5", "empty assistant text"),
        ("m.jsonl:line 6", "missing image file"),
    ]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.zst"])
def test_webdataset(tmp_path: Path, kind: str) -> None:
    about = {"uid": "u0", "url": "http://x", "caption": "not this", "key": "000000000", "status": "success", "width": 8, "exif": "{}"}
    many = {f"d/000000002.{k}.jpg": PICTURES[k % 6] for k in (10, 0, 9, 1)}
    files = {
        "000000000.jpg": A,
        "000000000.txt": b"A cat.\n",
        "000000000.json": json.dumps(about).encode(),
        "000000001.png": B,
        "000000001.json": json.dumps({"caption": "From the json.", "key": "000000001", "url": "http://y"}).encode(),
        **many,
        "d/000000002.txt": "Vier Bilder, ünsortiert".encode(),
        "000000003.jpg": C,
        "000000004.txt": b"no picture",
        "000000005.json": b"{broken",
        "000000005.jpg": C,
        "000000006.jpg": C,
        "000000006.txt": b"\xff",
        "000000000.webp": A,
    }
    assert seen(pack(tmp_path, files, kind), "webdataset") == [
        ("u0", [A], ["<image>\n", "A cat."], {"url": "http://x"}),
        ("000000001", [B], ["<image>\n", "From the json."], {"url": "http://y"}),
        ("d/000000002", [PICTURES[k] for k in (0, 1, 3, 4)], ["<image>\n" * 4, "Vier Bilder, ünsortiert"], {}),
        ("000000003", "unknown row shape"),
        ("000000004", "unknown row shape"),
        (f"pictures.{kind}:000000005", "broken json"),
        (f"pictures.{kind}:000000006", "text is not valid Unicode"),
        (f"pictures.{kind}:000000000", "sample is not in one piece"),
    ]


def test_llava_onevision(tmp_path: Path) -> None:
    rows = [
        {"id": "o0", "image": {"bytes": A, "path": "a.jpg"}, "conversations": talk("<image>\nWhat?", "A."), "data_source": "s"},
        {"id": "o1", "image": None, "conversations": talk("Hi", "Ho"), "data_source": "s"},
        {"id": "o3", "image": {"bytes": None, "path": None}, "conversations": talk("Hi", "Ho"), "data_source": "s"},
        {"id": "o2", "image": None, "conversations": talk("<image>\nWhat?", "A."), "data_source": "s"},
    ]
    file = table(tmp_path / "o.parquet", rows, image=IMAGE)
    assert seen(file, "llava_onevision") == [
        ("o0", [A], ["<image>\nWhat?", "A."], {"data_source": "s"}),
        ("o1", [], ["Hi", "Ho"], {"data_source": "s"}),
        ("o3", [], ["Hi", "Ho"], {"data_source": "s"}),
        ("o2", "null image"),
    ]
    assert [r[1] for r in seen(file, "auto")][1:] == ["null image"] * 3


def test_mammoth_vl(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "image": "m/a.jpg", "conversations": talk("<image>\nWhat?", "A."), "source": "s"},
        {"id": 2, "conversations": talk("Hi", "Ho"), "source": "s"},
        {"id": 3, "image": "", "conversations": talk("Hi", "Ho"), "source": "s"},
        {"id": 4, "image": ["m/a.jpg", "m/b.jpg"], "conversations": talk("<image> or <image>?", "B"), "source": "s"},
        {"id": 5, "image": "m/z.jpg", "conversations": talk("<image>\nWhat?", "A."), "source": "s"},
    ]
    assert seen(array(tmp_path / "m.json", *rows), "mammoth_vl", pack(tmp_path, {"m/a.jpg": A, "m/b.jpg": B}, "tar.gz")) == [
        ("1", [A], ["<image>\nWhat?", "A."], {"source": "s"}),
        ("2", [], ["Hi", "Ho"], {"source": "s"}),
        ("3", [], ["Hi", "Ho"], {"source": "s"}),
        ("4", [A, B], ["<image> or <image>?", "B"], {"source": "s"}),
        ("5", "missing image file"),
    ]


def test_finevision(tmp_path: Path) -> None:
    def row(pictures: Any, *texts: tuple[str, str]) -> dict[str, Any]:
        pairs = [{"user": u, "assistant": a} for u, a in texts]
        return {"images": pictures, "texts": pairs, "source": "s", "relevance_ratings": [5] * len(pairs), "relevance_min": 5}

    rows = [
        row([{"bytes": A, "path": None}, {"bytes": B, "path": None}], ("What?", "Two."), ("Sure?", "Yes.")),
        row([], ("Hi", "Ho")),
        row(None, ("Hi", "Ho")),
        row([{"bytes": A, "path": None}], ("What?", "")),
        row([{"bytes": A, "path": None}]),
    ]
    assert seen(table(tmp_path / "f.parquet", rows, images=pa.list_(IMAGE)), "finevision") == [
        ("f.parquet:row 0", [A, B], ["<image>\n<image>\nWhat?", "Two.", "Sure?", "Yes."], {"source": "s"}),
        ("f.parquet:row 1", [], ["Hi", "Ho"], {"source": "s"}),
        ("f.parquet:row 2", [], ["Hi", "Ho"], {"source": "s"}),
        ("f.parquet:row 3", "empty assistant text"),
        ("f.parquet:row 4", "no assistant turn"),
    ]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_image_with_its_caption(tmp_path: Path, kind: str) -> None:
    """300 pictures in a shuffled folder or archive, 400 captions in another order, each naming the hash of its picture."""
    pictures = {f"{k % 7}/{k}.jpg": data for k, data in enumerate(tiny_images(300))}
    names = random.Random(0).sample(sorted(pictures), len(pictures))
    archive = pack(tmp_path, {n: pictures[n] for n in names}, kind)
    asked = random.Random(1).choices(sorted(pictures), k=400)
    file = lines(tmp_path / "c.jsonl", *({"image": n, "caption": hashlib.sha256(pictures[n]).hexdigest()} for n in asked))
    rows = seen(file, "pmc_oa", archive)
    assert [hashlib.sha256(pictures_[0]).hexdigest() for _, pictures_, _, _ in rows] == [texts[1] for _, _, texts, _ in rows]
    assert [r[0] for r in rows] == asked


def test_shipped_maps_are_sound_and_survive_json() -> None:
    names = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
    assert len(names) == 16
    for name in names:
        found = load_map(name)
        assert found.name == name and found.about and FieldMap.model_validate(json.loads(found.model_dump_json())) == found
    assert load_map(None) == load_map("auto")
    assert load_map("mimic_cxr").deid.text is None and load_map("dicom").deid.text is None  # patients' own words and pictures


def own(folder: Path, text: str) -> FieldMap:
    (folder / "own.yaml").write_text(text)
    return load_map(folder / "own.yaml")


def test_a_map_of_ones_own(tmp_path: Path) -> None:
    pack(tmp_path, {"p1/s2/x.jpg": A}, "folder")
    found = own(
        tmp_path,
        """
id: study
images: dicom_id
paths: "p{subject}/s{study}/{path}.jpg"
talk:
  - turns: [{system: "Be {{brief}}.", user: "{a.b} {c[0]} {plain name}", assistant: "{n}"}]
where: {split: [train, val], n: 0}
keep: [split]
""",
    )
    row = {"study": 2, "subject": 1, "dicom_id": "x", "a.b": " dots ", "c[0]": 1.5, "plain name": "{n}", "n": 0, "split": "val", "other": 1}
    store = open_images([tmp_path / "pictures"])
    record = found.apply(row, "place", store, "source")
    assert isinstance(record, Record) and (record.id, record.source, dict(record.meta)) == ("2", "source", {"split": "val"})
    assert record.turns == (Turn("system", "Be {brief}."), Turn("user", "<image>\ndots 1.5 {n}"), Turn("assistant", "0"))
    assert image_files.read(record.images[0]) == A
    for change, why in (
        ({"split": "test"}, "left out by the map"),
        ({"n": 1}, "left out by the map"),
        ({"plain name": [1]}, "text is not a string"),
    ):
        reject = found.apply(row | change, "place", store, "source")
        assert isinstance(reject, Reject) and reject.reason == why
    for secret in ("../pictures/p1", "/etc"):
        reject = found.apply(row | {"subject": secret}, "place", store, "source")
        assert isinstance(reject, Reject) and reject.reason == "missing image file"
    reject = found.apply(row | {"dicom_id": "/../../../../../etc/passwd"}, "place", store, "source")
    assert isinstance(reject, Reject) and reject.reason == "image path leaves the folder"


def test_not_a_number_is_nothing(tmp_path: Path) -> None:
    """A table's empty cell, wherever a text may come from."""
    nan = float("nan")
    rows = [
        {"id": "1", "question": "q", "answer": nan},
        {"id": "2", "question": nan, "answer": "a"},
        {"id": nan, "conversations": [*talk("q", "a"), {"from": "human", "value": "q"}, {"from": "gpt", "value": nan}]},
        {"id": "4", "image": nan, "caption": nan},
        {"id": "5", "question": "q", "answer": nan, "conversations": talk("q", "a"), "source": nan},
        {"id": "6", "image": "a.jpg", "caption": [{"type": "text", "text": nan}]},
    ]
    pack(tmp_path, {"a.jpg": A}, "folder")
    found = seen(lines(tmp_path / "n.jsonl", *rows), "auto", tmp_path / "pictures")
    assert [r[:2] for r in found] == [
        ("1", "unknown row shape"),
        ("2", "unknown row shape"),
        ("n.jsonl:line 3", "text is not a string"),
        ("4", "unknown row shape"),
        ("5", []),
        ("6", "text is not a string"),
    ]
    map = own(tmp_path, 'talk: [{turns: [{user: "{q}", assistant: ["Answer: {a}. {b}", "{b}"]}]}]\nkeep: "*"')
    store = open_images([tmp_path])
    either = map.apply({"q": "q", "a": nan, "b": "yes", "c": nan}, "place", store, "s")
    assert isinstance(either, Record) and either.turns[1].text == "yes" and not either.meta
    assert isinstance(map.apply({"q": "q", "a": nan, "b": nan}, "place", store, "s"), Reject)


def test_a_reject_prints_no_text_of_the_row(tmp_path: Path) -> None:
    row = {"id": "1", "question": ["John Doe"], "answer": "John Doe", "q_lang": "John Doe", "conversations": "John Doe", "img_name": 5}
    for name in (p.stem for p in SHIPPED.glob("*.yaml")):
        reject = load_map(name).apply(row, "place", open_images([tmp_path]), "s")
        assert isinstance(reject, Reject) and "John" not in reject.reason + reject.detail


def test_what_is_wrong_with_a_map_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        own(tmp_path, "ids: x\nnull_image: maybe\ntalk: [{conversation: a, pairs: b}, {turns: [{user: '{a!r}', judge: '{b:>10}'}]}, {}]")
    text = str(error.value)
    assert text.startswith(f"{tmp_path}/own.yaml: 7 problems in the map")
    for words in (
        "ids: Extra inputs",
        "null_image: Input should be 'reject'",
        "talk.0: give one of",
        "'{a!r}': only plain {field}",
        "judge",
        "talk.2: give one",
    ):
        assert words in text
    for bad in ("", "[1]", "name: x\ntalk: [{pairs: a}]"):
        with pytest.raises(UserError, match="a field map is a mapping of about, id, images"):
            own(tmp_path, bad)
    for bad, words in (
        ("a: [", "not YAML"),
        ("about: x", "talk: Field required"),
        ("talk: []", "talk: "),
        ("talk: [{turns: [{user: '{'}]}]", "user"),
    ):
        with pytest.raises(UserError, match=words):
            own(tmp_path, bad)
    with pytest.raises(UserError, match=r"gone: no such field map; give a \.yaml file, or one of auto, dicom, finevision"):
        load_map("gone")
    with pytest.raises(UserError, match="no such field map"):
        load_map("../fieldmaps/auto")
