"""1,008 mutated inputs through every reader: no crash, no hang, no silent acceptance.

A case is one mutation of a sound file of 24 rows: bytes overwritten, cut, taken out, doubled; values of wrong types; archives with members that
lead out, link, repeat themselves, lie about their size or blow up. Each must end within LIMIT seconds in Records and Rejects, numbered without a
gap and as many as the reader says there are rows, or in one UserError, which means that nothing of the file is used. What may come out:

- Containers with checksums (Parquet pages, gzip, zstd, zip): every Record is the sound file's Record of that row, images and text, byte for
  byte. Only its id may be the row's place instead, since Parquet's footer, where columns have their names, has no checksum.
- Formats without (JSON, CSV, plain tar): what changed inside a text, or inside a picture that still decodes, nobody can tell. Every picture
  decodes to the last pixel, every line of JSON that is still whole gives its sound Record, and a cut array or tar is a UserError.
- Hostile members beside sound ones, in any container: the sound ones come out unchanged, the hostile ones not at all.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from megatron_infimed.errors import UserError
from megatron_infimed.intake import archives
from megatron_infimed.intake import images as image_files
from megatron_infimed.intake.fieldmap import FieldMap
from megatron_infimed.intake.images import open_images
from megatron_infimed.intake.readers import read
from megatron_infimed.intake.records import BadImage, Record
from tests.tiny import tiny_images
from tests.unit.test_images import tar_bytes

CASES, LIMIT, ROWS = int(os.environ.get("INFIMED_FUZZ", 112)), 5, 24  # cases of each format; INFIMED_FUZZ=1000 takes over a minute
MAP = FieldMap.model_validate(
    {"id": "id", "images": ["images", "image"], "talk": [{"turns": [{"user": "{question}", "assistant": "{answer}"}]}]}
)
PICTURES = tiny_images(ROWS)
TALKS = [
    {"id": f"r{k}", "question": f'What is number {k}, "é"?', "answer": f"It is {hashlib.sha256(bytes([k])).hexdigest()}."}
    for k in range(ROWS)
]
FORMATS = ("json", "jsonl", "csv", "parquet", "tar", "tar.gz", "tar.zst", "images.zip", "images.tar")
CHECKED = ("parquet", "tar.gz", "tar.zst", "images.zip")
PRESS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tar.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
Item = tuple[str, tuple[bytes, ...], tuple[str, ...]]


def json_bytes(rows: list[Any], format: str) -> bytes:
    return (json.dumps(rows) if format == "json" else "\n".join(map(json.dumps, rows))).encode()


def csv_bytes(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", "image", "question", "answer"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet_bytes(columns: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table(columns), out, row_group_size=10, write_page_checksum=True)
    return out.getvalue()


def parquet_columns() -> dict[str, Any]:
    return {"image": pa.array(PICTURES, pa.binary())} | {k: [t[k] for t in TALKS] for k in ("id", "question", "answer")}


def samples() -> list[tuple[tarfile.TarInfo, bytes]]:
    parts = ((f"{k:03}.{e}", d) for k in range(ROWS) for e, d in (("jpg", PICTURES[k]), ("json", json.dumps(TALKS[k]).encode())))
    return [(tarfile.TarInfo(name), data) for name, data in parts]


def with_images(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "image": f"{k:03}.jpg"} for k, row in enumerate(rows)]


def image_members() -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(tarfile.TarInfo(f"{k:03}.jpg"), data) for k, data in enumerate(PICTURES)]


def zip_bytes(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, data in members:
            entry = zipfile.ZipInfo(info.name.encode("utf-8", "replace").decode())
            entry.external_attr = ((0o120777 if info.issym() else 0o100644) << 16) if info.type != tarfile.DIRTYPE else 0
            archive.writestr(entry, info.linkname if info.issym() else data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def sound(format: str) -> bytes:
    """The file that is mutated: rows, or the archive that a sound jsonl takes its pictures from."""
    if format in ("json", "jsonl"):
        return json_bytes(with_images(TALKS), format)
    if format == "csv":
        return csv_bytes(with_images(TALKS))
    if format == "parquet":
        return parquet_bytes(parquet_columns())
    if format.startswith("images"):
        return (zip_bytes if format == "images.zip" else lambda m: tar_bytes(*m))(image_members())
    return PRESS[format](tar_bytes(*samples()))


# --- mutations ---------------------------------------------------------------------------------------------------------------------


def overwrite(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4, 32))):
        out[rng.randrange(len(out))] ^= rng.randrange(1, 256)
    return bytes(out)


def overwrite_end(data: bytes, rng: random.Random) -> bytes:
    """Where indexes and footers are."""
    out = bytearray(data)
    out[-rng.randrange(1, min(len(out), 2000))] ^= rng.randrange(1, 256)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) - 1)]


def take_out(data: bytes, rng: random.Random) -> bytes:
    a = rng.randrange(len(data))
    return data[:a] + data[a + rng.randrange(1, 600) :]


def double(data: bytes, rng: random.Random) -> bytes:
    a = rng.randrange(len(data))
    b = a + rng.randrange(1, 600)
    return data[:b] + data[a:b] + data[b:]


def blank(data: bytes, rng: random.Random) -> bytes:
    a = rng.randrange(len(data))
    return data[:a] + bytes(len(data[a : a + 512])) + data[a + 512 :]


WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e308,
    "",
    " ",
    "\ud800",
    "\0",
    [],
    [[]],
    {},
    {"bytes": 5},
    {"path": "../x"},
    ["a", None],
    "../../etc/passwd",
    "x" * 5000,
    10**30,
)


def wrong_types(format: str, rng: random.Random) -> bytes:
    rows: list[Any] = with_images(TALKS)
    for _ in range(rng.randrange(1, 6)):
        k = rng.randrange(ROWS)
        if rng.random() < 0.2:
            rows[k] = rng.choice(WRONG)
        elif isinstance(rows[k], dict):
            rows[k] = {**rows[k], rng.choice(("id", "image", "question", "answer")): rng.choice(WRONG)}
    if format == "csv":
        return csv_bytes([{f: str(v).encode("utf-8", "replace").decode() for f, v in r.items()} for r in rows if isinstance(r, dict)])
    return json_bytes(rows, format)


def wrong_columns(_: str, rng: random.Random) -> bytes:
    columns = parquet_columns()
    odd: list[Any] = [
        pa.nulls(ROWS),
        pa.array(range(ROWS)),
        pa.array([1.5, None] * (ROWS // 2)),
        pa.array([[b"x"]] * ROWS),
        pa.array([{"bytes": None, "path": "../x"}] * ROWS),
        pa.array([b"\xff"] * ROWS).view(pa.string()),
        pa.array([10**6] * ROWS, pa.timestamp("us")),
        pa.array([2**62] * ROWS, pa.timestamp("us")),
        pa.array([True] * ROWS),
    ]
    columns[rng.choice(tuple(columns))] = rng.choice(odd)
    return parquet_bytes(columns)


def hostile_members(format: str, rng: random.Random) -> bytes:
    """Sound members and, between them, some that must not be read."""
    groups = [[m] for m in image_members()] if format.startswith("images") else [samples()[k : k + 2] for k in range(0, 2 * ROWS, 2)]
    if rng.random() < 0.5:  # one sound name twice, with another picture
        k = rng.randrange(ROWS)
        groups[k].insert(0, (tarfile.TarInfo(f"{k:03}.jpg"), PICTURES[-1]))
    for _ in range(rng.randrange(1, 5)):
        info = tarfile.TarInfo(
            rng.choice(("../000.jpg", "/001.jpg", "a/../../002.jpg", "link.jpg", "x" * 300 + ".jpg", "\udcff.jpg", "..", "a/."))
        )
        if rng.random() < 0.5:
            info.type, info.linkname = (
                rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)),
                rng.choice(("/etc/passwd", "000.jpg")),
            )
        groups.insert(rng.randrange(len(groups) + 1), [(info, b"" if info.type != tarfile.REGTYPE else PICTURES[0])])
    members = [m for group in groups for m in group]
    return zip_bytes(members) if format == "images.zip" else PRESS[format.removeprefix("images.")](tar_bytes(*members))


def lying_sizes(format: str, rng: random.Random) -> bytes:
    """A member's declared size is not its size."""
    if format == "images.zip":
        data = bytearray(sound(format))
        at = data.rindex(b"PK\1\2", 0, rng.randrange(data.index(b"PK\1\2") + 4, len(data)))
        field = at + rng.choice((20, 24))
        data[field : field + 4] = rng.choice((0, 1, 100, 1 << 28, (1 << 32) - 2)).to_bytes(4, "little")
        return bytes(data)
    members = image_members() if format.startswith("images") else samples()
    data, at = bytearray(tar_bytes(*members)), 0
    for _ in range(rng.randrange(len(members))):
        at += 512 + -(-int(data[at + 124 : at + 135], 8) // 512) * 512
    size = int(data[at + 124 : at + 135], 8)
    lie = rng.choice((-512, -1, 0, size // 2, size + 512, 1 << 20, 1 << 34, 1 << 62))
    info = tarfile.TarInfo(bytes(data[at : at + 7]).decode().rstrip("\0"))
    info.size, info.type = (
        lie,
        rng.choice((tarfile.REGTYPE, tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE)),
    )
    data[at : at + 512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
    return PRESS[format.removeprefix("images.")](bytes(data))


def bomb(format: str, rng: random.Random) -> bytes:
    """Small here, larger than the limit (lowered for this test) when read."""
    huge = (tarfile.TarInfo(rng.choice(("bomb.jpg", "bomb.txt", "bomb.json"))), bytes(4 << 20))
    members = image_members() if format.startswith("images") else samples()
    members.insert(rng.randrange(0, len(members) + 1, 2), huge)
    return zip_bytes(members) if format == "images.zip" else PRESS[format.removeprefix("images.")](tar_bytes(*members))


BYTES: tuple[Any, ...] = (overwrite, overwrite, overwrite_end, cut, take_out, double, blank)


def mutate(format: str, rng: random.Random) -> tuple[str, bytes]:
    own: list[Any] = {"json": [wrong_types] * 3, "jsonl": [wrong_types] * 3, "csv": [wrong_types] * 2, "parquet": [wrong_columns] * 2}.get(
        format, [hostile_members, hostile_members, lying_sizes, bomb]
    )
    how = rng.choice((*BYTES, *own))
    return how.__name__, how(sound(format) if how in BYTES else format, rng)


# --- what comes out ----------------------------------------------------------------------------------------------------------------


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(folder: Path, format: str, data: bytes) -> dict[int, Item] | None:
    """Row number -> what its Record holds, for the rows that give a training document; None after a UserError."""
    if format.startswith("images"):
        rows, pictures = folder / "rows.jsonl", folder / f"pictures.{format.removeprefix('images.')}"
        rows.write_bytes(json_bytes(with_images(TALKS), "jsonl"))
        pictures.write_bytes(data)
    else:
        rows, pictures = folder / f"rows.{format}", folder / "pictures"
        rows.write_bytes(data)
    items: dict[int, Item] = {}
    count = 0
    try:
        found = read(rows, map=MAP, images=open_images([pictures], folder / "spool"))
        while True:
            try:
                number, item = next(found)
            except StopIteration as end:
                assert end.value == count, "a row is missing"
                return items
            assert number == count
            count += 1
            if isinstance(item, Record):
                try:
                    images = tuple(image_files.load(image, "x") for image in item.images)
                except BadImage as bad:
                    assert len(bad.args) == 2 and all(isinstance(a, str) for a in bad.args)
                    continue
                items[number] = (item.id, images, tuple(t.text for t in item.turns))
            else:
                assert item.reason and f"{item.id}{item.detail}".isprintable()
    except UserError as e:
        assert str(folder) in str(e) and len(str(e)) < 1000
        return None


def fit(got: Item, number: int, format: str, want: dict[int, Item]) -> bool:
    id, images, texts = want[number]
    return got[1:] == (images, texts) and got[0] in (id, f"rows.{format}:row {number}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "pictures").mkdir()
    for info, data in image_members():
        (folder / "pictures" / info.name).write_bytes(data)
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_inputs(folder: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (archives, image_files):
        monkeypatch.setattr(module, "FILE_LIMIT", 1 << 20)
    monkeypatch.setattr("megatron_infimed.intake.rows.FILE_LIMIT", 1 << 20)
    want = outcome(folder, format, sound(format))
    assert want is not None and len(want) == ROWS
    by_id = {item[0]: item for item in want.values()}
    lines = sound(format).split(b"\n")
    ends: dict[str, int] = {"error": 0, "rows": 0}
    for case in range(CASES):
        how, data = mutate(format, random.Random(f"{format} {case}"))
        what = f"{format}, case {case}: {how}"
        with time_limit():
            got = outcome(folder, format, data)
        shutil.rmtree(folder / "spool", ignore_errors=True)
        ends["error" if got is None else "rows"] += 1
        if got is None:
            continue
        if how in ("hostile_members", "bomb"):
            assert all(item == by_id.get(item[0]) for item in got.values()), what
            assert len(got) >= ROWS - 1, what  # all but the one that was doubled
        elif format in CHECKED and how not in ("wrong_columns", "lying_sizes"):
            assert all(fit(item, number, format, want) for number, item in got.items()), what
        elif how == "cut":
            assert format in ("jsonl", "csv") or got == want, what  # of a tar, the padding
            assert all(item == want[number] for number, item in got.items()), what  # no cell or line is cut short unnoticed
        if format == "jsonl":
            whole = {by_id[f"r{k}"] for k, line in enumerate(lines) if line in data.split(b"\n")}
            assert whole <= set(got.values()), what
    assert ends["rows"] > 5 and (ends["error"] > 5 or format == "jsonl"), ends  # of jsonl a line breaks, never the file
