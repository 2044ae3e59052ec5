"""Readers: every row shape that data sets use, and every awkward row as a reject with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_infimed.data.readers import inputs_of, read
from megatron_infimed.data.records import Record, Reject, Turn, marks
from megatron_infimed.errors import UserError
from tests.tiny import tiny_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name, data in zip(("a.jpg", "b.jpg", "deep/c.png"), tiny_images(3), strict=True):
        (tmp_path / "images" / name).write_bytes(data)
    (tmp_path / "secret.jpg").write_bytes(tiny_images(1)[0])
    return tmp_path


def one(folder: Path, row: Any) -> Record | Reject:
    file = folder / "set.jsonl"
    file.write_text(json.dumps(row))
    (found,) = read(file, folder / "images")
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
    assert marks(record.turns) == images and all(isinstance(p, Path) and p.is_file() for p in record.images)


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
    ({"id": "1", "foo": 3}, "unknown row shape", "id, foo"),
    ({"id": "1", "caption": "no picture"}, "unknown row shape", ""),
    ([1, 2], "row is not an object", "list"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), BAD)
def test_awkward_rows_are_rejects(folder: Path, row: Any, reason: str, detail: str) -> None:
    file = folder / "set.jsonl"
    good = json.dumps({"id": "first", "question": "q", "answer": "a"})
    file.write_text(f"{good}\n{json.dumps(row)}\n{good}\n")
    before, reject, after = read(file, folder / "images")
    assert isinstance(before, Record) and isinstance(after, Record)
    assert isinstance(reject, Reject) and reject.reason == reason and detail in reject.detail and reject.source == "set"


def test_broken_lines_are_named_and_do_not_stop(folder: Path) -> None:
    file = folder / "set.jsonl"
    good = json.dumps({"id": "g", "question": "q", "answer": "a"}).encode()
    file.write_bytes(b"\xef\xbb\xbf" + good + b"\n{broken\n\n" + b'{"id": "\xff"}\n' + b"[" * 100_000 + b"\n" + good)
    rows = list(read(file))
    assert [type(r) for r in rows] == [Record, Reject, Reject, Reject, Record]
    assert [(r.id, r.reason) for r in rows[1:4] if isinstance(r, Reject)] == [(f"set.jsonl:line {n}", "broken json") for n in (2, 4, 5)]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_is_streamed(folder: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_infimed.data.readers._CHUNK", 37)  # elements cut at every place
    rows = [{"id": i, "question": 'é "] },{ \\ ' * 5, "answer": f"{i / 7} true null 1e-5"} for i in range(40)]
    file = folder / "big.json"
    file.write_text(json.dumps(rows, indent=indent, ensure_ascii=bool(indent)) + "\n", encoding="utf-8")
    found = list(read(file))
    assert [r.id for r in found] == [str(i) for i in range(40)]
    assert [r.turns for r in found if isinstance(r, Record)] == [
        (Turn("user", r["question"]), Turn("assistant", r["answer"])) for r in rows
    ]


def test_a_large_array_takes_little_memory(folder: Path) -> None:
    import tracemalloc

    file = folder / "big.json"
    with file.open("w") as out:
        out.write("[" + ",".join(json.dumps({"id": i, "question": "q" * 400, "answer": "a"}) for i in range(20_000)) + "]")
    tracemalloc.start()
    assert sum(isinstance(r, Record) for r in read(file)) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 8 << 20  # measured 5.0 MiB, of a file of 8.9 MB; one read chunk is 1 MiB
    tracemalloc.stop()


@pytest.mark.parametrize("ending", ["", ",", ', {"id": "b"', " x]", ', {"id": 1 2}, {"id": 3}]', "}"])
def test_a_broken_array_says_where(folder: Path, ending: str) -> None:
    file = folder / "a.json"
    file.write_text('[{"id": "a", "question": "q", "answer": "a"}' + ending)
    with pytest.raises(UserError, match=r"a\.json: the array breaks off after 1 rows .*mend the file"):
        list(read(file))


def test_empty_files(folder: Path) -> None:
    for name, text in (("e.jsonl", ""), ("e.json", "[ ]"), ("f.json", "\n")):
        (folder / name).write_text(text)
        assert list(read(folder / name)) == []


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
        found[name] = list(read(folder / f"{name}.parquet", folder / "images"))
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
    (folder / "x.csv").write_text("")
    with pytest.raises(UserError, match=r"cannot tell the format from \.csv; inputs are \.json"):
        inputs_of(folder / "x.csv")
    for name in ("b.parquet", "a.jsonl"):
        (folder / name).write_text("")
    assert [p.name for p in inputs_of(folder)] == ["a.jsonl", "b.parquet"]
    with pytest.raises(UserError, match="no such image folder"):
        list(read(folder / "a.jsonl", folder / "pics"))
