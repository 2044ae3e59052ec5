"""Readers: every row shape that data sets use, and every awkward row as a reject with its reason."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from megatron_infimed.errors import UserError
from megatron_infimed.intake import images as image_files
from megatron_infimed.intake.deid import DeidPolicy, Gate
from megatron_infimed.intake.fieldmap import load_map
from megatron_infimed.intake.images import open_images
from megatron_infimed.intake.readers import inputs_of, read
from megatron_infimed.intake.records import Record, Reject, Stored, Turn, marks, short_hash
from tests.tiny import tiny_images
from tests.unit.test_images import DAMAGE, odd, pack, tar_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name, data in zip(("a.jpg", "b.jpg", "deep/c.png"), tiny_images(3), strict=True):
        (tmp_path / "images" / name).write_bytes(data)
    (tmp_path / "secret.jpg").write_bytes(tiny_images(1)[0])
    return tmp_path


def rows(file: Path, *images: Path, **more: Any) -> list[Record | Reject]:
    """What a file holds; the numbers must be those of the rows."""
    found = list(read(file, images=open_images(images) if images else None, **more))
    if "mine" not in more:
        assert [number for number, _ in found] == list(range(len(found)))
    return [item for _, item in found]


def one(folder: Path, row: Any) -> Record | Reject:
    file = folder / "set.jsonl"
    file.write_text(json.dumps(row))
    (found,) = rows(file, folder / "images")
    return found


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


GOOD = [
    ({"id": 7, "image": "a.jpg", "conversations": talk("<image>\nWhat?", "An X-ray.")}, "7", 1, ["<image>\nWhat?", "An X-ray."]),
    (
        {"image": ["a.jpg", "deep/c.png"], "conversations": talk("Compare.", "Same.")},
        "set.jsonl:line 1",
        2,
        ["<image>\n<image>\nCompare.", "Same."],
    ),
    ({"id": "t", "conversations": talk("Hi", "Hello", "And?", "Yes")}, "t", 0, ["Hi", "Hello", "And?", "Yes"]),
    ({"id": "x", "img_name": "b.jpg", "question": "Organ?", "answer": "Liver", "q_lang": "en"}, "x", 1, ["<image>\nOrgan?", "Liver"]),
    ({"id": "n", "question": "How many?", "answer": 0}, "n", 0, ["How many?", "0"]),
    ({"id": "\ud800", "question": "How?", "answer": "So"}, "?", 0, ["How?", "So"]),
    ({"image_id": "c", "image": "./deep/../b.jpg", "caption": "A CT."}, "c", 1, ["<image>\n", "A CT."]),
    ({"id": "l", "image": "a.jpg", "conversations": talk("<image> Tag?", "Write <image>.")}, "l", 1, ["<image> Tag?", "Write <image>."]),
    ({"id": "f", "images": [], "texts": [{"user": "Hi", "assistant": "Ho"}]}, "f", 0, ["Hi", "Ho"]),
    (
        {
            "id": "m",
            "image": "a.jpg",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "CT"},
            ],
        },
        "m",
        1,
        ["Be brief.", "<image>\nWhat?", "CT"],
    ),
]


@pytest.mark.parametrize(("row", "id", "images", "texts"), GOOD)
def test_shapes_of_rows(folder: Path, row: Any, id: str, images: int, texts: list[str]) -> None:
    record = one(folder, row)
    assert isinstance(record, Record)
    assert (record.id, len(record.images), [t.text for t in record.turns], record.source) == (id, images, texts, "set")
    assert marks(record.turns) == images and all(isinstance(p, Stored) and image_files.read(p) for p in record.images)


BAD = [
    ({"id": "1", "image": "gone.jpg", "caption": "x"}, "missing image file", "gone.jpg"),
    ({"id": "1", "image": None, "caption": "x"}, "null image", ""),
    ({"id": "1", "image": ["a.jpg", None], "conversations": talk("q", "a")}, "null image", ""),
    ({"id": "1", "image": "../secret.jpg", "caption": "x"}, "image path leaves the folder", "../secret.jpg"),
    ({"id": "1", "image": "deep/../../secret.jpg", "caption": "x"}, "image path leaves the folder", ""),
    ({"id": "1", "image": "/etc/passwd", "caption": "x"}, "image path leaves the folder", "/etc/passwd"),
    ({"id": "1", "image": "deep", "caption": "x"}, "missing image file", "deep"),
    ({"id": "1", "image": "a\0.jpg", "caption": "x"}, "missing image file", ""),
    ({"id": "1", "image": "a" * 5000, "caption": "x"}, "unusable image path", "too long"),
    ({"id": "1", "image": 5, "caption": "x"}, "image is neither bytes nor a path", "int"),
    ({"id": "1", "image": "a.jpg", "conversations": talk("<image><image>", "a")}, "more image marks than images", "2 marks, 1 images"),
    ({"id": "1", "conversations": talk("<image>", "a")}, "more image marks than images", "1 marks, 0 images"),
    ({"id": "1", "image": ["a.jpg", "b.jpg"], "conversations": talk("<image>", "a")}, "fewer image marks than images", "1 marks, 2 images"),
    ({"id": "1", "conversations": talk("q")}, "no assistant turn", ""),
    ({"id": "1", "conversations": talk("q", " \n")}, "empty assistant text", ""),
    ({"id": "1", "conversations": talk("q", "a", "q")}, "turns do not alternate user, assistant", ""),
    ({"id": "1", "conversations": [{"from": "robot", "value": "x"}]}, "broken conversation", "robot"),
    ({"id": "1", "conversations": []}, "broken conversation", "no turns"),
    ({"id": "1", "conversations": "hi"}, "broken conversation", "str"),
    ({"id": "1", "conversations": [*talk("q"), {"from": "gpt"}]}, "text is not a string", "NoneType"),
    ({"id": "1", "question": "q", "answer": "\ud800"}, "text is not valid Unicode", ""),
    ({"id": "1", "foo": 3}, "unknown row shape", "fields id, 1 more («foo»)"),
    ({"id": "1", "caption": "no picture"}, "unknown row shape", ""),
    ([1, 2], "row is not an object", "list"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), BAD)
def test_awkward_rows_are_rejects(folder: Path, row: Any, reason: str, detail: str) -> None:
    file = folder / "set.jsonl"
    good = json.dumps({"id": "first", "question": "q", "answer": "a"})
    file.write_text(f"{good}\n{json.dumps(row)}\n{good}\n")
    before, reject, after = rows(file, folder / "images")
    assert isinstance(before, Record) and isinstance(after, Record)
    assert isinstance(reject, Reject) and reject.reason == reason and detail in reject.detail and reject.source == "set"


def test_broken_lines_are_named_and_do_not_stop(folder: Path) -> None:
    file = folder / "set.jsonl"
    good = json.dumps({"id": "g", "question": "q", "answer": "a"}).encode()
    file.write_bytes(b"\xef\xbb\xbf" + good + b"\n{broken\n\n" + b'{"id": "\xff"}\n' + b"[" * 100_000 + b"\n" + good)
    found = rows(file)
    assert [type(r) for r in found] == [Record, Reject, Reject, Reject, Record]
    assert [(r.id, r.reason) for r in found[1:4] if isinstance(r, Reject)] == [(f"set.jsonl:line {n}", "broken json") for n in (2, 4, 5)]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_is_streamed(folder: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_infimed.intake.rows._CHUNK", 37)  # elements cut at every place
    talks = [{"id": i, "question": 'é "] },{ \\ .' * 5, "answer": f"{i / 7} true null 1e-5"} for i in range(40)]
    file = folder / "big.json"
    file.write_text(json.dumps(talks, indent=indent, ensure_ascii=bool(indent)) + "\n", encoding="utf-8")
    found = rows(file)
    assert [r.id for r in found] == [str(i) for i in range(40)]
    assert [r.turns for r in found if isinstance(r, Record)] == [
        (Turn("user", r["question"]), Turn("assistant", r["answer"])) for r in talks
    ]


def test_a_large_array_takes_little_memory(folder: Path) -> None:
    import tracemalloc

    file = folder / "big.json"
    with file.open("w") as out:
        out.write("[" + ",".join(json.dumps({"id": i, "question": "q" * 1700, "answer": "a"}) for i in range(5_000)) + "]")
    tracemalloc.start()
    assert sum(isinstance(r, Record) for _, r in read(file)) == 5_000
    assert tracemalloc.get_traced_memory()[1] < 8 << 20  # measured 5.0 MiB, of a file of 8.7 MB; one read chunk is 1 MiB
    tracemalloc.stop()


@pytest.mark.parametrize("ending", ["", ",", ', {"id": "b"', " x]", ', {"id": 1 2}, {"id": 3}]', "}", "] [", "]]", ", " + "9" * 5000 + "]"])
def test_a_broken_array_says_where(folder: Path, ending: str) -> None:
    file = folder / "a.json"
    file.write_text('[{"id": "a", "question": "q", "answer": "a"}' + ending)
    with pytest.raises(UserError, match=r"a\.json: the array breaks off after 1 rows .*mend the file"):
        list(read(file))


def test_empty_files(folder: Path) -> None:
    for name, text in (("e.jsonl", ""), ("e.json", "[ ]"), ("f.json", "\n")):
        (folder / name).write_text(text)
        assert rows(folder / name) == []


def test_parquet_with_bytes_in_any_layout(folder: Path) -> None:
    a, b, c = tiny_images(3)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    tables = {
        "struct": pa.table(
            {
                "image": pa.array([{"bytes": a, "path": "x"}, None, {"bytes": None, "path": "b.jpg"}], struct),
                "question": ["q"] * 3,
                "answer": ["1", "2", None],
            }
        ),
        "raw": pa.table({"image": pa.array([a, b, None], pa.binary()), "caption": ["x", "y", "z"], "image_id": ["i", "j", "k"]}),
        "list": pa.table(
            {
                "id": ["m"],
                "images": pa.array([[{"bytes": a, "path": None}, {"bytes": c, "path": None}]], pa.list_(struct)),
                "conversations": [talk("<image> and <image>", "ok")],
            }
        ),
    }
    found = {}
    for name, table in tables.items():
        parquet.write_table(table, folder / f"{name}.parquet")
        found[name] = rows(folder / f"{name}.parquet", folder / "images")
    assert [type(r) for r in found["struct"]] == [Record, Reject, Reject]
    assert found["struct"][0].images == (a,) and found["struct"][0].id == "struct.parquet:row 0"
    assert [r.reason for r in found["struct"][1:]] == ["null image", "unknown row shape"]
    assert [getattr(r, "images", None) for r in found["raw"]] == [(a,), (b,), None] and found["raw"][0].id == "i"
    assert found["list"][0].images == (a, c)


def test_a_broken_parquet_is_an_error(folder: Path) -> None:
    (folder / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"x\.parquet: not a readable Parquet file"):
        list(read(folder / "x.parquet"))


def test_which_files(folder: Path) -> None:
    with pytest.raises(UserError, match="no such input file"):
        inputs_of(folder / "gone.json")
    (folder / "x.xlsx").write_text("")
    with pytest.raises(UserError, match=r"cannot tell the format from \.xlsx; inputs are \.json"):
        inputs_of(folder / "x.xlsx")
    for name in ("b.parquet", "a.jsonl"):
        (folder / name).write_text("")
    assert [p.name for p in inputs_of(folder)] == ["a.jsonl", "b.parquet"]
    with pytest.raises(UserError, match="no such image folder"):
        open_images([folder / "pics"])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_tables_plain_and_compressed(folder: Path, kind: str, suffix: str) -> None:
    sign = "\t" if kind == "tsv" else ","
    text = {
        "jsonl": '{"id": "007", "question": "é,\\n", "answer": "a"}\n{"id": "8", "question": "q", "answer": "b"}',
        "json": '[{"id": "007", "question": "é,\\n", "answer": "a"}, {"id": "8", "question": "q", "answer": "b"}]',
    }.get(kind, f'\ufeffid{sign}question{sign}answer\r\n007{sign}"é,\n"{sign}a\r\n\r\n8{sign}q{sign}b\r\n')
    file = folder / f"t.{kind}{suffix}"
    file.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](text.encode()))
    found = rows(file)
    assert [(r.id, r.source) for r in found] == [("007", "t"), ("8", "t")]
    assert [[t.text.strip() for t in r.turns] for r in found if isinstance(r, Record)] == [["é,", "a"], ["q", "b"]]
    if suffix:
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(
            UserError, match=r"t\.\w+\.\w+: cannot be read (after row \d|from its first row) on: .*; mend the file or get it again"
        ):
            rows(file)


def test_a_broken_csv(folder: Path) -> None:
    file = folder / "t.csv"
    file.write_bytes(b"id,question,answer\n1,q,a\n2,q\n3,\xff,a\n\xff,q,a\n5,q,a,b\n")
    assert [getattr(r, "reason", r.id) for r in rows(file)] == [
        "1",
        "wrong number of columns",
        "text is not valid Unicode",
        "?",
        "wrong number of columns",
    ]
    for text, words in (
        ('id,question,answer\n1,q,a\n2,"q"x,a\n', "the rows cannot be told apart after row 1, line 3: .*; mend the quotes"),
        ('id,question,answer\n1,q,a\n2,"q,a\n' + "3,q,a\n" * 30_000, "after row 1, line .*unexpected end of data; mend the quotes"),
        ('id,question,answer\n1,q,a\n2,"q,a\n', "unexpected end of data"),
        ("id,question,id\n1,q,a\n", r"must name the columns, each once \(3 names, 2 different\)"),
        ("just text\nmore\n", r"must name the columns, each once \(1 names"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            rows(file)


def test_rows_over_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_infimed.intake.rows.ROW_LIMIT", 1000)
    monkeypatch.setattr("megatron_infimed.intake.rows._CHUNK", 100)
    good = json.dumps({"id": "g", "question": "q", "answer": "a"})
    big = json.dumps({"id": "b", "question": "q" * 5000, "answer": "a"})
    (folder / "t.jsonl").write_text(f"{good}\n{big}\n{good}\n{big}")
    assert [(type(r), r.id) for r in rows(folder / "t.jsonl")] == [
        (Record, "g"),
        (Reject, "t.jsonl:line 2"),
        (Record, "g"),
        (Reject, "t.jsonl:line 4"),
    ]
    (folder / "t.json").write_text(f"[{good}, {big}]")
    with pytest.raises(UserError, match=r"breaks off after 1 rows \(a row of more than 1000 characters\)"):
        rows(folder / "t.json")
    (folder / "t.csv").write_text(f"id,question,answer\n1,q,a\n2,{'q' * 5000},a\n")
    with pytest.raises(UserError, match="after row 1, line 2: a line of more than 1000 characters"):
        rows(folder / "t.csv")


def ten_rows(folder: Path, kind: str) -> Path:
    talks = [{"id": str(i), "question": f"q{i}", "answer": "a"} for i in range(10)]
    file = folder / f"ten.{kind}"
    if kind == "parquet":
        parquet.write_table(
            pa.Table.from_pylist(talks), file, row_group_size=4, write_page_checksum=True, compression="none", write_statistics=False
        )
    elif kind == "csv":
        file.write_text("id,question,answer\n" + "".join(f"{i},q{i},a\n" for i in range(10)))
    elif kind == "json":
        file.write_text(json.dumps(talks))
    elif kind == "jsonl":
        file.write_text("\n\n".join(map(json.dumps, talks)))
    else:
        return pack(folder, {f"{i}.json": json.dumps(t).encode() for i, t in enumerate(talks)}, kind)
    return file


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "tar", "tar.gz"])
def test_any_share_of_the_rows(folder: Path, kind: str) -> None:
    file = ten_rows(folder, kind)
    whole = list(read(file))
    assert [n for n, _ in whole] == list(range(10)) and {r.id for _, r in whole} == {str(i) for i in range(10)}
    for mine in (lambda n: n % 3 == 1, lambda n: n > 7, lambda n: False):
        part, share = read(file, mine=mine), []
        while True:
            try:
                share.append(next(part))
            except StopIteration as end:
                assert end.value == 10  # all rows are counted
                break
        assert share == [(n, r) for n, r in whole if mine(n)]


def test_parquet_row_groups_of_others_are_not_read(folder: Path) -> None:
    file = ten_rows(folder, "parquet")
    raw = file.read_bytes()
    assert raw.count(b"q5") == 1
    file.write_bytes(raw.replace(b"q5", b"Q5"))
    assert len(rows(file, mine=lambda n: n < 4 or n > 7)) == 6
    with pytest.raises(UserError, match=r"not a readable Parquet file: .*CRC checksum verification"):
        rows(file, mine=lambda n: n == 4)


def test_hostile_members_of_a_webdataset(folder: Path) -> None:
    a = tiny_images(1)[0]
    plain = tarfile.TarInfo
    file = folder / "w.tar"
    file.write_bytes(
        tar_bytes(
            (plain("good.jpg"), a),
            (plain("good.txt"), b"fine"),
            (plain("../up.jpg"), a),
            (plain("../up.txt"), b"text"),
            (plain("/root.jpg"), a),
            (plain("/root.txt"), b"text"),
            (odd("soft.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (plain("soft.txt"), b"text"),
            (odd("dev.jpg", tarfile.CHRTYPE), b""),
            (plain("dev.txt"), b"text"),
            (plain("twice.jpg"), a),
            (plain("twice.jpg"), tiny_images(2)[1]),
            (plain("twice.txt"), b"text"),
            (plain("list.json"), b"[1]"),
            (plain("code.pyd"), b"cos\nsystem\n"),
            (odd("folder", tarfile.DIRTYPE), b""),
            (plain("last.jpg"), a),
            (plain("last.txt"), b"fine"),
        )
    )
    found = rows(file, map=load_map("webdataset"))
    assert [getattr(r, "reason", r.id) for r in found] == [
        "good",
        "unsafe name in the archive",
        "unsafe name in the archive",
        "archive member is not a plain file",
        "archive member is not a plain file",
        "two archive members of one name",
        "broken json",
        "unknown row shape",
        "last",
    ]


@pytest.mark.parametrize(("kind", "damage"), [(kind, d) for kind, all_ in DAMAGE.items() if kind != "zip" for d in all_])
def test_a_damaged_webdataset_is_one_error(folder: Path, kind: str, damage: Any) -> None:
    file = pack(folder, {f"{k}.{e}": d for k, data in enumerate(tiny_images(9)) for e, d in (("jpg", data), ("txt", b"t"))}, kind)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"pictures\.\S+: cannot be read (after row \d|from its first row) on: "):
        rows(file, map=load_map("webdataset"))


@pytest.mark.parametrize("size", [-512, -10240, 1 << 40])
def test_a_tar_that_lies_about_sizes_ends(folder: Path, size: int) -> None:
    info = tarfile.TarInfo("a.txt")
    info.size = size
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE):
        info.type = kind
        head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        file = folder / "w.tar"
        file.write_bytes(tar_bytes((tarfile.TarInfo("0.txt"), b"x" * 600))[:1536] + bytes(head) + bytes(20 * 512))
        with pytest.raises(UserError, match=r"cannot be read (after row 0|from its first row) on"):
            rows(file)


def test_a_folder_of_dicom_files(folder: Path) -> None:
    pydicom_data = pytest.importorskip("pydicom.data")
    scans = folder / "scans"
    (scans / "deep").mkdir(parents=True)
    for name, to in (("CT_small.dcm", "b.dcm"), ("MR_small.dcm", "deep/without_suffix")):
        (scans / to).write_bytes(Path(pydicom_data.get_testdata_file(name)).read_bytes())
    (scans / "notes.txt").write_text("not a picture")
    (scans / "out.dcm").symlink_to(folder / "secret.jpg")
    assert inputs_of(scans) == [scans] == inputs_of(scans, load_map("dicom"))
    (scans / "labels.csv").write_text("id,question,answer\n")
    assert inputs_of(scans) == [scans / "labels.csv"] and inputs_of(scans, load_map("dicom")) == [scans]
    found = rows(scans, map=load_map("dicom"))
    names = [short_hash(n) for n in ("b.dcm", "deep/without_suffix", "labels.csv", "notes.txt", "out.dcm")]
    assert [(r.id, getattr(r, "reason", None)) for r in found] == [
        (f"scans:row 0, file {names[0]}#0", None),
        (f"scans:row 1, file {names[1]}#0", None),
        (f"scans:row 2, file {names[2]}", "neither DICOM nor NIfTI"),
        (f"scans:row 3, file {names[3]}", "neither DICOM nor NIfTI"),
        (f"scans:row 4, file {names[4]}", "image path leaves the folder"),
    ]
    record = found[0]
    assert isinstance(record, Record) and record.source == "scans" and record.meta["modality"] == "CT"
    assert isinstance(found[1], Record) and [t.text for t in found[1].turns] == ["<image>\nWhich modality is this image?", "MR"]
    gate = Gate(DeidPolicy())
    assert image_files.load(record.images[0], record.source, gate).startswith(b"\x89PNG") and gate.counts
    assert rows(scans, map=load_map("dicom"), mine=lambda n: n == 2) == found[2:3]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_volumes(folder: Path, suffix: str) -> None:
    nibabel = pytest.importorskip("nibabel")
    import numpy as np

    voxels = np.random.default_rng(0).integers(0, 1000, (20, 24, 16)).astype(np.int16)
    file = folder / f"brain{suffix}"
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), file)
    assert inputs_of(file) == [file]
    found = rows(file, map=load_map("nifti"))
    assert len(found) == 60 and all(isinstance(r, Record) and r.source == "brain" for r in found)
    record = next(r for r in found if r.id.endswith(f", file {short_hash(f'brain{suffix}')}#z3"))
    assert isinstance(record, Record) and record.turns[1].text == "axial"
    assert image_files.load(record.images[0], "brain").startswith(b"\x89PNG")


def test_the_gate_sees_every_record(folder: Path) -> None:
    file = folder / "t.jsonl"
    file.write_text('{"id": "1", "question": "q", "answer": "Seen on 12/03/2019."}\n{"id": "2", "question": "q", "answer": "Clear."}')
    gate = Gate(DeidPolicy())
    assert [type(r) for r in rows(file, gate=gate)] == [Reject, Record] and sum(gate.counts.values()) == 2


WITHHELD = [  # (row, its id with the gate on, what its reject's detail is)
    ({"id": "MRN 483920 Dr. Smith 12/03/2019", "question": "q", "answer": "a"}, "t.jsonl:row 0", None),
    ({"id": "DOE_JOHN_19700101/IM1", "question": "q", "answer": "a"}, "t.jsonl:row 0", None),
    ({"id": "PMC2935873_f1", "question": "q", "answer": "a"}, "PMC2935873_f1", None),
    ({"id": "20260-1", "question": "q", "answer": "Dr. Smith called"}, "20260-1", "name in turn 1"),
    (
        {"id": "5", "conversations": [{"from": "Dr. Smith of 12/03/2019", "value": "x"}]},
        "5",
        "unknown speaker [withheld]; known are human, user, gpt, assistant, system",
    ),
    ({"id": "5", "Dr. John Smith": 1, "Jane": 2}, "5", "fields id, 2 more ([withheld])"),
    ({"id": "5", "image": "DOE_JOHN.png", "caption": "x"}, "5", "[withheld] in images"),
    ({"id": "5", "image": "../DOE_JOHN.png", "caption": "x"}, "5", "[withheld]"),
    ({"id": "5", "image": "DOE" * 2000, "caption": "x"}, "5", "[withheld]: File name too long"),
]


@pytest.mark.parametrize(("row", "id", "detail"), WITHHELD)
def test_the_gate_lets_no_row_speak_through_ids_and_details(folder: Path, row: Any, id: str, detail: str | None) -> None:
    file = folder / "t.jsonl"
    file.write_text(json.dumps(row))
    gate = Gate(DeidPolicy())
    (found,) = rows(file, folder / "images", gate=gate)
    assert (found.id, getattr(found, "detail", None)) == (id, detail)
    assert any(k.startswith("id ") and k.endswith(": redacted") for k in gate.counts) == (found.id != row["id"])
    (off,) = rows(file, folder / "images", gate=Gate(DeidPolicy(text="off")))
    assert off.id == row["id"] and "withheld" not in getattr(off, "detail", "")


def test_names_of_archive_members_are_withheld(folder: Path) -> None:
    file = folder / "w.tar"
    file.write_bytes(
        tar_bytes(
            (tarfile.TarInfo("../DOE_JOHN.jpg"), b"x"),
            (tarfile.TarInfo("DOE_JOHN_19700101.txt"), b"fine"),
            (odd("a.DOE.jpg", tarfile.SYMTYPE, "x"), b""),
        )
    )
    found = [(r.id, getattr(r, "detail", "")) for r in rows(file, gate=Gate(DeidPolicy()))]
    assert [detail.partition(";")[0] for _, detail in found] == ["[withheld]", "fields text, 1 more ([withheld])", "[withheld]"]
    assert [id for id, _ in found[1:]] == ["w.tar:row 1", "w.tar:a"]


def test_names_of_scans_are_never_shown(folder: Path) -> None:
    pydicom_data = pytest.importorskip("pydicom.data")
    scans = folder / "scans"
    (scans / "DOE_JOHN").mkdir(parents=True)
    (scans / "DOE_JOHN" / "IM1.dcm").write_bytes(Path(pydicom_data.get_testdata_file("CT_small.dcm")).read_bytes())
    (record,) = rows(scans, map=load_map("dicom"))
    assert isinstance(record, Record) and isinstance(record.images[0], Stored)
    assert record.id == f"scans:row 0, {record.images[0].label}" and "DOE" not in record.id


def test_a_csv_cell_may_be_long(folder: Path) -> None:
    file = folder / "t.csv"
    file.write_text(f"id,question,answer\n1,q,{'a' * 200_000}\n2,q,b\n")
    assert [r.id for r in rows(file)] == ["1", "2"]


@pytest.mark.parametrize(
    ("end", "whole"), [("2,q,b", False), ("2,q,", False), ('2,q,"b"', True), ("2,q,b\n", True), ("2,q,b\r", True), ("2,q,b\r\n\r\n", True)]
)
def test_a_csv_cut_inside_its_last_cell(folder: Path, end: str, whole: bool) -> None:
    file = folder / "t.csv"
    file.write_bytes(f"id,question,answer\n1,q,a\n{end}".encode())
    first, last = rows(file)
    assert isinstance(first, Record) and getattr(last, "reason", None) == (None if whole else "the file ends inside a row")


def test_dots_in_the_keys_of_a_webdataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = tiny_images(1)[0]
    few = {f"img_v1.0_{k:03}.{e}": d for k in range(3) for e, d in (("jpg", a), ("txt", b"t"))}
    (reject,) = rows(pack(folder, few, "tar"))
    assert isinstance(reject, Reject) and reject.reason == "dots in the key" and "first dot" in reject.detail
    many = {f"1.2.{k:04}.{e}": d for k in range(600) for e, d in (("jpg", b"x"), ("txt", b"t"))}
    (reject,) = rows(pack(folder, many, "tar"))
    assert isinstance(reject, Reject) and reject.reason == "sample too large" and "first dot" in reject.detail
    monkeypatch.setattr("megatron_infimed.intake.rows.FILE_LIMIT", 1000)
    big = {"a.txt": b"t", "a.0.jpg": bytes(600), "a.1.jpg": bytes(600), "b.txt": b"t"}
    assert [getattr(r, "reason", "") for r in rows(pack(folder, big, "tar"))] == ["sample too large", "unknown row shape"]


@pytest.mark.parametrize("indent", [2, "\t"])
def test_an_object_over_several_lines_is_one_error(folder: Path, indent: Any) -> None:
    talks = [{"id": "1", "question": "q", "answer": "a"}] * 3
    for name, tree in (("t.json", {"data": talks}), ("t.jsonl", talks[0])):
        (folder / name).write_text(json.dumps(tree, indent=indent))
        with pytest.raises(UserError, match=rf"{name}: one JSON object over several lines; write its rows as one array"):
            rows(folder / name)
    (folder / "t.jsonl").write_text(",\n".join(map(json.dumps, talks)))
    assert [getattr(r, "reason", None) for r in rows(folder / "t.jsonl")] == ["broken json", "broken json", None]
