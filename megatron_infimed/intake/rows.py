"""Files to rows: one generator for each format, `rows(path, mine) -> (number, place, row)`, which returns how many rows the file has.

Only the rows that `mine(number)` wants come out, and the others cost as little as the format allows: a line of JSON is not parsed, a Parquet
row group not read, an archive member skipped. A row that is broken by itself comes out as a BadRow; what breaks the file raises. Memory is
bounded by one row: a line or an element of JSON, a batch of Parquet, a sample of a tar, a scan.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_infimed.errors import UserError
from megatron_infimed.intake.archives import FILE_LIMIT, Tar, is_plain, open_bytes, safe_name
from megatron_infimed.intake.records import BadImage, BadRow, Stored, quote, short_hash

Mine = Callable[[int], bool]
Rows = Generator[tuple[int, str, Any], None, int]

ROW_LIMIT = 64 << 20
"""Bytes (characters) of one row of JSON or CSV."""
MOST_MEMBERS = 1000
"""Of one sample of a tar; all its members together may be as large as one (FILE_LIMIT)."""
_DOTS = "a sample's key ends at the first dot of the file name: write 1_2_840.jpg for 1.2.840.jpg"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2", "ppm", "pgm", "dcm")
TEXT_SUFFIXES = ("txt", "caption", "text")
_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


def json_rows(path: Path, mine: Mine) -> Rows:
    with open_bytes(path) as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if _spread_out(head):
        raise UserError(f"{path}: one JSON object over several lines; write its rows as one array [...], or one row a line (.jsonl)")
    return (yield from (_json_array if head.startswith(b"[") else _json_lines)(path, mine))


def _spread_out(head: bytes) -> bool:
    """Whether the first line opens an object that goes on in the next one, as in pretty-printed {"data": [...]}."""
    first, line_break, _ = head.partition(b"\n")
    if not line_break or not first.startswith(b"{") or not first.rstrip().endswith((b"{", b"[", b",")):
        return False
    try:
        json.JSONDecoder().raw_decode(first.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return True
    return False  # whole rows with commas between them


def _json_lines(path: Path, mine: Mine) -> Rows:
    count = 0
    with open_bytes(path) as stream:
        for line_number, line in enumerate(_lines(stream), 1):
            if line is not None and not line.strip():
                continue
            if mine(count):
                row: Any
                try:
                    if line is None:
                        raise ValueError(f"a line of more than {ROW_LIMIT} bytes")
                    row = json.loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
                except (ValueError, RecursionError) as e:
                    row = BadRow("broken json", f"{e}"[:200])
                yield count, f"line {line_number}", row
            count += 1
    return count


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """The lines; None for one that is over ROW_LIMIT."""
    while line := stream.readline(ROW_LIMIT):
        if len(line) < ROW_LIMIT:
            yield line
            continue
        while not line.endswith(b"\n") and (line := stream.readline(ROW_LIMIT)):
            pass
        yield None


def _json_array(path: Path, mine: Mine) -> Rows:
    """One array, however large: the buffer holds what was read and not yet decoded, and grows only while an element is incomplete."""
    decode, buffer, at, number = json.JSONDecoder().raw_decode, "", 0, 0
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as text:

        def more() -> bool:
            nonlocal buffer, at
            if len(buffer) - at > ROW_LIMIT:
                raise broken(f"a row of more than {ROW_LIMIT} characters")
            new = text.read(max(_CHUNK, 2 * (len(buffer) - at)))
            buffer, at = buffer[at:] + new, 0
            return bool(new)

        def broken(why: str) -> UserError:
            return UserError(f"{path}: the array breaks off after {number} rows ({why}); mend the file, or write one row a line (.jsonl)")

        def next_sign() -> str:
            """The next character that is no space, "" at the end."""
            nonlocal at
            while True:
                at = _SPACE.match(buffer, at).end()  # pyright: ignore[reportOptionalMemberAccess]
                if at < len(buffer):
                    return buffer[at]
                if not more():
                    return ""

        def element() -> Any:
            nonlocal at
            while True:
                try:
                    row, at = decode(buffer, at)
                    return row
                except json.JSONDecodeError as e:
                    cut_short = e.pos > len(buffer) - 16 or e.msg.startswith("Unterminated string")
                    if not cut_short or not more():
                        raise broken(e.msg) from None

        try:
            if next_sign() == "[":
                at += 1
            while (sign := next_sign()) != "]":
                if not sign:
                    raise broken("no closing bracket")
                if number:
                    if sign != ",":
                        raise broken(f"a comma was expected, not {sign!r}")
                    at += 1
                    next_sign()
                row = element()
                if mine(number):
                    yield number, f"row {number}", row
                number += 1
            at += 1
            if next_sign():
                raise broken("there is text after the closing bracket")
        except UnicodeDecodeError as e:
            raise broken(f"not UTF-8: {e.reason}") from None
        except RecursionError:
            raise broken("nested too deeply") from None
        except ValueError as e:
            raise broken(str(e)[:100]) from None
    return number


def csv_rows(path: Path, mine: Mine) -> Rows:
    """Rows under a header line; broken UTF-8 stays in its cell as surrogates, which a text may not have. The last row must end with a line
    break or a closing quote: without one, nobody can tell whether its last cell was cut."""
    tabs = ".tsv" in path.suffixes
    csv.field_size_limit(ROW_LIMIT)
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        line, count = "", 0

        def lines() -> Iterator[str]:
            nonlocal line
            while line := text.readline(ROW_LIMIT):
                if len(line) == ROW_LIMIT:
                    raise csv.Error(f"a line of more than {ROW_LIMIT} characters")
                yield line

        reader = csv.reader(lines(), delimiter="\t" if tabs else ",", strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header) or (len(header) < 2 and header):
                raise UserError(
                    f"{path}: the first line must name the columns, each once ({len(header)} names, {len(set(header))} different)"
                )
            for cells in reader:
                if not cells:
                    continue
                if mine(count):
                    row: Any = BadRow("wrong number of columns", f"{len(cells)}, not {len(header)}")
                    if len(cells) == len(header):
                        row = dict(zip(header, cells, strict=True))
                        if not line.endswith(("\n", "\r", '"')):
                            row = BadRow("the file ends inside a row", "if the last row is whole, put a line break behind it")
                    yield count, f"row {count}", row
                count += 1
        except csv.Error as e:
            raise UserError(
                f"{path}: the rows cannot be told apart after row {count}, line {reader.line_num}: {e}; mend the quotes"
            ) from None
    return count


def parquet_rows(path: Path, mine: Mine) -> Rows:
    import pyarrow
    from pyarrow import parquet

    def broken(why: object) -> UserError:
        return UserError(f"{path}: not a readable Parquet file: {' '.join(str(why).split())[:200]}; get it again")

    try:
        with parquet.ParquetFile(path, buffer_size=_CHUNK, pre_buffer=False, page_checksum_verification=True) as file:
            groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows or sum(groups) > 1000 * path.stat().st_size:
                raise broken(f"{file.metadata.num_rows} rows declared, {groups} in its row groups")
            start = 0
            for group, rows in enumerate(groups):
                if any(mine(start + k) for k in range(rows)):
                    at = start
                    for batch in file.iter_batches(batch_size=64, row_groups=[group]):
                        yield from ((at + k, f"row {at + k}", _row(batch, k)) for k in range(batch.num_rows) if mine(at + k))
                        at += batch.num_rows
                    if at != start + rows:
                        raise broken(f"row group {group} declares {rows} rows and holds {at - start}")
                start += rows
            return start
    except (pyarrow.ArrowException, OSError) as e:
        raise broken(e) from None


def _row(batch: Any, k: int) -> Any:
    try:
        return batch.slice(k, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("text is not valid Unicode", "not UTF-8")
    except (ValueError, OverflowError) as e:  # a date out of range
        return BadRow("broken row", type(e).__name__)


def webdataset_rows(path: Path, mine: Mine) -> Rows:
    """Members key.ext that follow each other are one sample: the json's fields, `text`, `images` in the order of their names, `key`."""
    count, seen = 0, set()
    with open_bytes(path) as stream:
        tar = Tar(stream)
        for key, members in itertools.groupby((m for m in tar if not m.isdir()), key=lambda m: _split(m.name)[0]):
            wanted, sample = mine(count), _Sample(key)
            for member in members:
                sample.add(member, tar if wanted else None)
            if wanted:
                yield count, key, sample.row(again=key in seen)
            seen.add(key)
            count += 1
    return count


def _split(name: str) -> tuple[str, str]:
    """(key, suffix): the suffix begins at the first dot of the last part of the path."""
    folder, sign, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + sign + stem, suffix.lower()


class _Sample:
    def __init__(self, key: str) -> None:
        self._key = key
        self._parts: dict[str, bytes] = {}
        self._size = 0
        self._problem: BadRow | None = None

    def add(self, member: Any, tar: Tar | None) -> None:
        """Reads the member where `tar` is given."""
        suffix = _split(member.name)[1]
        self._size += max(0, member.size)
        if self._problem:
            return
        if safe_name(member.name) is None:
            self._problem = BadRow("unsafe name in the archive", quote(member.name))
        elif not is_plain(member):
            self._problem = BadRow("archive member is not a plain file", quote(suffix))
        elif suffix in self._parts:
            self._problem = BadRow("two archive members of one name", quote(suffix))
        elif member.size > FILE_LIMIT:
            self._problem = BadRow("archive member too large", f"{member.size} bytes, the limit is {FILE_LIMIT}")
        elif len(self._parts) == MOST_MEMBERS or self._size > FILE_LIMIT:
            self._problem = BadRow("sample too large", f"more than {MOST_MEMBERS} members or {FILE_LIMIT} bytes; {_DOTS}")
            self._parts.clear()
        elif tar is not None:
            known = suffix == "json" or suffix in TEXT_SUFFIXES or _is_image(suffix)
            self._parts[suffix] = tar.read(member) if known else b""

    def row(self, again: bool) -> dict[str, Any] | BadRow:
        if self._problem:
            return self._problem
        if again:
            return BadRow("sample is not in one piece", "its key was there before; sort the archive")
        texts = ("json", *TEXT_SUFFIXES)
        if not any(s in self._parts for s in texts) and any(s.rpartition(".")[2] in texts for s in self._parts):
            return BadRow("dots in the key", _DOTS)
        row: dict[str, Any] = {}
        try:
            if "json" in self._parts:
                row = json.loads(self._parts["json"])
                if not isinstance(row, dict):
                    return BadRow("broken json", f"not an object but {type(row).__name__}")
            for suffix in TEXT_SUFFIXES:
                if suffix in self._parts:
                    row["text"] = self._parts[suffix].decode()
        except UnicodeDecodeError:
            return BadRow("text is not valid Unicode", "not UTF-8")
        except (ValueError, RecursionError) as e:
            return BadRow("broken json", f"{e}"[:200])
        pictures = sorted(filter(_is_image, self._parts), key=_natural)
        return row | {"key": self._key} | ({"images": [self._parts[s] for s in pictures]} if pictures else {})


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def _natural(name: str) -> list[tuple[int, str]]:
    """9.jpg comes before 10.jpg."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def scan_rows(path: Path, mine: Mine) -> Rows:
    """A DICOM or NIfTI file, or a folder of them searched deep and sorted by name: a row for every frame or slice.
    A place names the file by a hash: in such folders the names are often patients."""
    from megatron_infimed.intake import images

    files = sorted(p for p in path.rglob("*") if p.is_symlink() or not p.is_dir()) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    store, count = images.open_images([root]), 0
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            for fragment, fields in _scans(images.read_scan(store.find(name))):
                if mine(count):
                    yield count, f"row {count}, file {short_hash(name)}#{fragment}", fields | {"image": Stored(str(root), name, fragment)}
                count += 1
        except BadImage as bad:
            if mine(count):
                yield count, f"row {count}, file {short_hash(name)}", bad
            count += 1
    return count


def _scans(data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    from megatron_infimed.intake import dicom, nifti

    if dicom.is_dicom(data):
        yield from ((str(k), fields) for k, fields in dicom.frames(data))
    elif nifti.is_nifti(data):
        yield from nifti.slices(data)
    else:
        raise BadImage("neither DICOM nor NIfTI", f"{len(data)} bytes")
