"""Files in, Records and Rejects out; nothing else in the package knows a file format.

The name's suffix picks the format (rows.py), the format makes rows, a field map (fieldmap.py) makes Records of them. A bad row is a Reject
with its place and reason; only a file that cannot be read any further is a UserError, with the place. What comes out of a row depends on
that row alone, so it does not matter which process reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_infimed.errors import UserError
from megatron_infimed.intake import rows
from megatron_infimed.intake.archives import UNREADABLE
from megatron_infimed.intake.fieldmap import FieldMap, load_map
from megatron_infimed.intake.images import ImageStore, open_images
from megatron_infimed.intake.records import BadRow, Record, Reject, printable

if TYPE_CHECKING:
    from megatron_infimed.intake.deid import Gate

_COMPRESSED = ("", ".gz", ".zst")
_ROWS: dict[str, Callable[[Path, rows.Mine], rows.Rows]] = {
    **{s + c: rows.json_rows for s in (".json", ".jsonl", ".ndjson") for c in _COMPRESSED},
    **{s + c: rows.csv_rows for s in (".csv", ".tsv") for c in _COMPRESSED},
    **dict.fromkeys((".parquet", ".pq"), rows.parquet_rows),
    **{".tar" + c: rows.webdataset_rows for c in _COMPRESSED},
    ".tgz": rows.webdataset_rows,
}
_SCANS = (".dcm", ".nii", ".nii.gz")
KNOWN = ".json .jsonl .csv .tsv (each also .gz or .zst) .parquet .tar .tar.gz .tar.zst .dcm .nii .nii.gz"


def inputs_of(path: str | Path, map: FieldMap | None = None) -> list[Path]:
    """The file itself, or the readable files of a folder, sorted by name; a folder of DICOM or NIfTI files is one input.

    Raises:
        UserError: nothing there that can be read.
    """
    path = Path(path)
    if path.is_dir():
        files = [] if map is not None and map.scans else sorted(p for p in path.iterdir() if _suffix(p, _ROWS) and p.is_file())
        if not files and any(p.is_file() and (_suffix(p, _SCANS) or (map is not None and map.scans)) for p in path.rglob("*")):
            return [path]
        if not files:
            raise UserError(f"{path}: no {KNOWN} file in this folder")
        return files
    if not path.is_file():
        raise UserError(f"{path}: no such input file")
    if not _suffix(path, (*_ROWS, *_SCANS)):
        raise UserError(f"{path}: cannot tell the format from {path.suffix or 'a name without suffix'}; inputs are {KNOWN}")
    return [path]


def read(
    path: str | Path,
    *,
    map: FieldMap | None = None,
    images: ImageStore | None = None,
    source: str | None = None,
    gate: Gate | None = None,
    mine: Callable[[int], bool] | None = None,
) -> Generator[tuple[int, Record | Reject], None, int]:
    """(row number, Record or Reject) of the rows that `mine(row number)` wants, in order; returns how many rows there are.

    Args:
        map: how rows become Records; a guess by well-known field names where it is not given.
        images: where named images lie; the folder of the input where it is not given.
        source: name of the data set; the input's name without its suffix where it is not given.
        gate: judges every Record's text, every id and every Reject's detail.

    Raises:
        UserError: the file, or the rest of it, cannot be read.
    """
    path = Path(path)
    map = map or load_map(None)
    store = images or open_images([path if path.is_dir() else path.parent])
    source = source or source_of(path)
    suffix = _suffix(path, _ROWS)
    found = (rows.scan_rows if suffix is None else _ROWS[suffix])(path, mine or (lambda number: True))
    number = -1
    while True:
        try:
            number, place, row = next(found)
        except StopIteration as end:
            return end.value
        except UNREADABLE as e:
            after = f"after row {number}" if number >= 0 else "from its first row"
            raise UserError(
                f"{path}: cannot be read {after} on: {getattr(e, 'strerror', None) or e}; mend the file or get it again"
            ) from None
        name = printable(f"{path.name}:{place}")
        if isinstance(row, BadRow):
            item = Reject(name, *(printable(str(word)) for word in row.args), source=source)
        else:
            item = map.apply(row, name, store, source)
        yield number, item if gate is None else gate.row(item, printable(f"{path.name}:row {number}"))


def source_of(path: Path) -> str:
    """The data set's name where none is given."""
    suffix = None if path.is_dir() else _suffix(path, (*_ROWS, *_SCANS))
    return path.name[: -len(suffix)] if suffix else path.name


def _suffix(path: Path, known: Iterable[str]) -> str | None:
    """The longest known suffix of the name (.tar.gz, not .gz)."""
    return next((s for s in sorted(known, key=len, reverse=True) if path.name.lower().endswith(s)), None)
