"""Files in, Records and Rejects out; nothing else in the package knows a file format.

`read` picks the reader by suffix: JSON (one array, streamed, or an object a line) with images in a folder, or Parquet with images inside.
Both hand each row to `to_record`, the one place that knows how data sets name their fields. A bad row is a Reject with its place and
reason; only a file that cannot be read any further is a UserError. Memory is bounded by one row (JSON) or one batch of rows (Parquet).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_infimed.data.records import IMAGE_MARK, ImageRef, Record, Reject, Role, Turn, make_record
from megatron_infimed.errors import UserError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")

_IMAGE_FIELDS = ("images", "image", "image_path", "image_file", "img_name", "file_name", "img")
_ID_FIELDS = ("id", "image_id", "question_id", "qid", "pmcid", "uid")
_TALK_FIELDS = ("conversations", "messages")
_QUESTION_FIELDS, _ANSWER_FIELDS = ("question", "prompt"), ("answer", "response")
_CAPTION_FIELDS = ("caption", "text", "report")
_ROLES: dict[Any, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


class _Bad(Exception):
    """reason, detail of a Reject."""


def inputs_of(path: str | Path) -> list[Path]:
    """The file itself, or the readable files of a folder, sorted by name.

    Raises:
        UserError: nothing there that can be read.
    """
    path = Path(path)
    known = (*JSON_SUFFIXES, *PARQUET_SUFFIXES)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in known and p.is_file())
        if not files:
            raise UserError(f"{path}: no {' '.join(known)} file in this folder")
        return files
    if not path.is_file():
        raise UserError(f"{path}: no such input file")
    if path.suffix.lower() not in known:
        raise UserError(f"{path}: cannot tell the format from {path.suffix or 'a name without suffix'}; inputs are {' '.join(known)}")
    return [path]


def read(path: str | Path, images: str | Path | None = None, source: str | None = None) -> Iterator[Record | Reject]:
    """Every row of a file, in order.

    Args:
        images: folder that image paths are relative to; the file's own folder where it is not given.
        source: name of the data set; the file's stem where it is not given.

    Raises:
        UserError: the file, or the rest of it, cannot be read.
    """
    path = Path(path)
    folder = Path(images) if images is not None else path.parent
    if not folder.is_dir():
        raise UserError(f"{folder}: no such image folder")
    source = source or path.stem
    rows = _parquet_rows(path) if path.suffix.lower() in PARQUET_SUFFIXES else _json_rows(path)
    for place, row in rows:
        name = f"{path.name}:{place}"
        if isinstance(row, _Bad):
            yield Reject(name, *map(str, row.args), source=source)
        else:
            yield to_record(row, name, folder, source)


def to_record(row: Any, name: str, folder: Path, source: str) -> Record | Reject:
    """One row of any known shape as a Record; `name` is its id where it has none of its own."""
    if not isinstance(row, Mapping):
        return Reject(name, "row is not an object", type(row).__name__, source)
    id_field = next((f for f in _ID_FIELDS if isinstance(row.get(f), str | int) and row[f] != ""), None)
    id = str(row[id_field]).encode("utf-8", "replace").decode() if id_field else name  # an id is printed: no lone surrogates
    image_field = next((f for f in _IMAGE_FIELDS if f in row), None)
    try:
        turns, text_fields = _turns(row, has_images=image_field is not None)
        images = _images(row[image_field], folder) if image_field else []
    except _Bad as bad:
        return Reject(id, *map(str, bad.args), source=source)
    taken = {id_field, image_field, *text_fields}
    return make_record(id, images, turns, source, {k: v for k, v in row.items() if k not in taken and not isinstance(v, bytes)})


def _first(row: Mapping[str, Any], fields: tuple[str, ...]) -> str | None:
    return next((f for f in fields if row.get(f) is not None), None)


def _turns(row: Mapping[str, Any], has_images: bool) -> tuple[list[Turn], tuple[str, ...]]:
    """(turns, the fields they came from): LLaVA conversations, FineVision texts, question and answer, or an image's caption."""
    if talk := _first(row, _TALK_FIELDS):
        return _conversation(row[talk]), (talk,)
    if isinstance(pairs := row.get("texts"), list):
        if not all(isinstance(p, Mapping) and {"user", "assistant"} <= set(p) for p in pairs):
            raise _Bad("unknown row shape", "texts is not a list of {user, assistant}")
        return [Turn(r, _text(p[r])) for p in pairs for r in ("user", "assistant")], ("texts",)
    question, answer = _first(row, _QUESTION_FIELDS), _first(row, _ANSWER_FIELDS)
    if question and answer:
        return [Turn("user", _text(row[question])), Turn("assistant", _text(row[answer]))], (question, answer)
    caption = _first(row, _CAPTION_FIELDS)
    if caption and has_images:  # the picture alone asks for its caption
        return [Turn("user", ""), Turn("assistant", _text(row[caption]))], (caption,)
    raise _Bad("unknown row shape", f"fields {', '.join(map(str, row))[:150]}")


def _conversation(value: Any) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise _Bad("broken conversation", f"not a list of turns but {type(value).__name__}" if not isinstance(value, list) else "no turns")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise _Bad("broken conversation", f"a turn is {type(turn).__name__}")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise _Bad("broken conversation", f"unknown speaker {role!r}")
        turns.append(Turn(_ROLES[role.lower()], _text(turn.get("value", turn.get("content")))))
    return turns


def _text(value: Any) -> str:
    if isinstance(value, list):  # OpenAI's content parts
        if not all(isinstance(p, Mapping) for p in value):
            raise _Bad("text is not a string", "list")
        return "".join(IMAGE_MARK if "image" in str(p.get("type")) else _text(p.get("text")) for p in value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _Bad("text is not a string", type(value).__name__)
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Bad("text is not valid Unicode", "a lone surrogate") from None
    return text


def _images(value: Any, folder: Path) -> list[ImageRef]:
    return [_image(v, folder) for v in (value if isinstance(value, list | tuple) else [value])]


def _image(value: Any, folder: Path) -> ImageRef:
    if isinstance(value, Mapping):  # Hugging Face's Image feature
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if value is None or value == "":
        raise _Bad("null image")
    if not isinstance(value, str):
        raise _Bad("image is neither bytes nor a path", type(value).__name__)
    inside = os.path.normpath(value)
    if os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
        raise _Bad("image path leaves the folder", value[:200])
    path = folder / inside
    try:
        if path.is_file():
            return path
    except (OSError, ValueError) as e:
        raise _Bad("unusable image path", f"{value[:100]!r}: {e}") from None
    raise _Bad("missing image file", str(path))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a readable Parquet file: {' '.join(str(e).split())[:200]}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as probe:
            head = probe.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        yield from _json_array(path) if head.startswith(b"[") else _json_lines(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as e:
                row = _Bad("broken json", f"{e}"[:200])
            yield f"line {number}", row


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    """One array, however large: the buffer holds what was read and not yet decoded, and grows only while an element is incomplete."""
    decode, buffer, at, number = json.JSONDecoder().raw_decode, "", 0, 0
    with path.open(encoding="utf-8-sig") as text:

        def more() -> bool:
            nonlocal buffer, at
            new = text.read(max(_CHUNK, 2 * (len(buffer) - at)))
            buffer, at = buffer[at:] + new, 0
            return bool(new)

        def broken(why: str) -> UserError:
            return UserError(f"{path}: the array breaks off after {number} rows ({why}); mend the file, or write one row a line (.jsonl)")

        def next_sign() -> str:
            nonlocal at
            while True:
                at = _SPACE.match(buffer, at).end()  # pyright: ignore[reportOptionalMemberAccess]
                if at < len(buffer):
                    return buffer[at]
                if not more():
                    raise broken("no closing bracket")

        try:
            if next_sign() == "[":
                at += 1
            while next_sign() != "]":
                if number:
                    if buffer[at] != ",":
                        raise broken(f"a comma was expected, not {buffer[at]!r}")
                    at += 1
                    next_sign()
                while True:
                    try:
                        row, at = decode(buffer, at)
                        break
                    except json.JSONDecodeError as e:
                        cut_short = e.pos > len(buffer) - 16 or e.msg.startswith("Unterminated string")
                        if not cut_short or not more():
                            raise broken(e.msg) from None
                yield f"row {number}", row
                number += 1
        except UnicodeDecodeError as e:
            raise broken(f"not UTF-8: {e.reason}") from None
        except RecursionError:
            raise broken("nested too deeply") from None
