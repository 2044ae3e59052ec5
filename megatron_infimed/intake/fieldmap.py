"""How the rows of a data set become Records: a short YAML, one for each known data set in fieldmaps/ (vocabulary: FieldMap below).

Where a map gives several choices (fields of the id, of the image, shapes of the talk, wordings of a turn) one law picks: the first whose
fields all say something, failing that the first whose fields are at least there. A template is text with {field} in it: the value of that
field of the row, stripped of white space around it; no attributes, no formats, `{{` for a brace. The map `auto` guesses by the well-known
field names and is written in the same words.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from megatron_infimed.errors import UserError
from megatron_infimed.intake.images import ImageStore
from megatron_infimed.intake.records import (
    IMAGE_MARK,
    BadImage,
    BadRow,
    ImageRef,
    Record,
    Reject,
    Role,
    Stored,
    Turn,
    make_record,
    marks,
    printable,
    quote,
)

SHIPPED = Path(__file__).parent / "fieldmaps"
SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
T = TypeVar("T")


def _many(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


@functools.cache
def _parts(template: str) -> list[tuple[str, str | None]]:
    """(text, field after it) pairs of a template; ValueError if it is none."""
    parts = []
    for text, name, form, conversion in string.Formatter().parse(template):
        if form or conversion or name == "":
            raise ValueError(f"{template!r}: only plain {{field}}, no formats; a brace itself is written {{{{")
        parts.append((text, name))
    return parts


def _template(value: str) -> str:
    _parts(value)
    return value


def _some(value: tuple[T, ...]) -> tuple[T, ...]:
    if not value:
        raise ValueError("give at least one")
    return value


Template = Annotated[str, AfterValidator(_template)]
Templates = Annotated[tuple[Template, ...], BeforeValidator(_many), AfterValidator(_some)]
Fields = Annotated[tuple[str, ...], BeforeValidator(_many)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Shape(_Part):
    """One way in which a row holds its talk; exactly one of the three."""

    conversation: str | None = None
    """Field with a list of {from, value} or {role, content} turns."""
    pairs: str | None = None
    """Field with a list of {user, assistant} exchanges (FineVision)."""
    turns: tuple[dict[Role, Templates], ...] = ()
    """The turns written as templates. A talk in which the user says nothing (a caption) needs an image."""

    @model_validator(mode="after")
    def _one(self) -> Shape:
        if sum(map(bool, (self.conversation, self.pairs, self.turns))) != 1:
            raise ValueError("give one of conversation, pairs, turns")
        return self

    @functools.cached_property
    def fields(self) -> frozenset[str]:
        lists = [f for f in (self.conversation, self.pairs) if f]
        return frozenset((*lists, *(f for turn in self.turns for choices in turn.values() for c in choices for f in _fields_of(c))))

    @functools.cached_property
    def silent(self) -> bool:
        """The user says nothing."""
        return bool(self.turns) and not any(text for turn in self.turns for text in turn.get("user", ()))

    def fits(self, has: Set[str]) -> bool:
        """Whether the row has what this shape cannot do without: of each turn, the fields of one wording."""
        if self.turns:
            return all(any(_fields_of(c) <= has for c in choices) for turn in self.turns for choices in turn.values())
        return self.fields <= has

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        if self.conversation:
            return _conversation(row[self.conversation])
        if self.pairs:
            return _pairs(row[self.pairs], self.pairs)
        return [Turn(role, _fill(choices, row)) for turn in self.turns for role, choices in turn.items()]


class Deid(_Part):
    """What the de-identification gate does for this data set where the user does not say otherwise."""

    text: Literal["reject", "redact", "flag", "off"] | None = None
    allow_burned_in: bool = False
    """Pixels of modalities that usually burn text in are taken; the publisher has cleaned them."""


class FieldMap(_Part):
    """A data set's rows, field by field."""

    name: str = ""
    """The file's stem; set by load_map."""
    about: str = ""
    """The data set, and what to give as input and images."""
    id: Fields = ()
    """Field of the record's id; the row's place in its file where it has none."""
    images: Fields = ()
    """Field with one image or a list: bytes, {bytes, path}, or names of files."""
    paths: Templates = ("{path}",)
    """Where a named image lies in the image folder or archive, tried in this order; {path} is the name that the row gives."""
    null_image: Literal["reject", "text_only"] = "reject"
    """What a null image is where the text has no <image> mark."""
    talk: Annotated[tuple[Shape, ...], AfterValidator(_some)]
    where: dict[str, Annotated[tuple[Any, ...], BeforeValidator(_many)]] = {}
    """Field -> values; rows with another value are left out, and counted."""
    keep: Literal["*"] | tuple[str, ...] = ()
    """Fields that go into Record.meta; "*" is every scalar that was not used."""
    scans: bool = False
    """An input folder is one data set of DICOM or NIfTI files, whatever their names, also where tables lie among them."""
    deid: Deid = Deid()

    def apply(self, row: Any, name: str, store: ImageStore, source: str) -> Record | Reject:
        """The row as a Record; `name` is its id where it has none."""
        if not isinstance(row, Mapping):
            return Reject(name, "row is not an object", type(row).__name__, source)
        id_field = next((f for f in self.id if _filled(row.get(f)) and isinstance(row[f], str | int)), None)
        id = printable(str(row[id_field])) if id_field else name
        try:
            for field, values in self.where.items():
                if row.get(field) not in values:
                    raise BadRow("left out by the map", f"{field} is not {' or '.join(map(str, values))}")
            image_field = _choose(row, self.images, lambda field, has: field in has) or next((f for f in self.images if f in row), None)
            shape = self._shape(row, has_image=image_field is not None)
            turns = shape.read(row)
            images = self._images(row, image_field, turns, store) if image_field else []
        except BadRow as bad:
            return Reject(id, bad.args[0], printable(str(bad.args[1])), source)
        return make_record(id, images, turns, source, self._kept(row, {id_field, image_field, *shape.fields}))

    def _shape(self, row: Mapping[str, Any], has_image: bool) -> Shape:
        shape = _choose(row, [s for s in self.talk if has_image or not s.silent], Shape.fits)
        if shape is None:
            wanted = " or ".join("+".join(sorted(s.fields)) for s in self.talk) if len(self.talk) < 4 else ""
            known = {*self.id, *self.images, *self.keep, *self.where, *(f for s in self.talk for f in s.fields)} & row.keys()
            other = ", ".join(str(f) for f in row if f not in known)  # a table without its header line names columns by their first cells
            fields = ", ".join(
                (*(str(f) for f in row if f in known), *([f"{len(row) - len(known)} more ({quote(other)})"] if other else []))
            )
            raise BadRow("unknown row shape", f"fields {fields}" + (f"; the map wants {wanted}" if wanted else ""))
        return shape

    def _images(self, row: Mapping[str, Any], field: str, turns: Sequence[Turn], store: ImageStore) -> list[ImageRef]:
        value = row[field]
        if _null(value) and self.null_image == "text_only" and not marks(turns):
            return []
        return [self._image(v, row, store) for v in (value if isinstance(value, list | tuple) else [value])]

    def _image(self, value: Any, row: Mapping[str, Any], store: ImageStore) -> ImageRef:
        if _null(value):
            raise BadImage("null image", "")
        if isinstance(value, Mapping):  # Hugging Face's Image feature
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if isinstance(value, Stored):
            return value
        if not isinstance(value, str):
            raise BadImage("image is neither bytes nor a path", type(value).__name__)
        missing = None
        for template in self.paths:
            try:
                return store.find(_fill((template,), {**row, "path": value}))
            except BadImage as bad:
                if bad.args[0] != "missing image file":
                    raise
                missing = missing or bad
        assert missing is not None
        raise missing

    def _kept(self, row: Mapping[str, Any], used: set[str | None]) -> dict[str, Any]:
        if self.keep == "*":
            return {k: v for k, v in row.items() if k not in used and isinstance(v, str | int | float) and not _nan(v)}
        return {k: row[k] for k in self.keep if not _null(row.get(k)) and not isinstance(row[k], bytes)}


def _null(value: Any) -> bool:
    """None, an empty text, a NaN (a table's empty cell), or Hugging Face's image of nothing."""
    if isinstance(value, Mapping):
        return value.get("bytes") is None and value.get("path") in (None, "")
    return value is None or value == "" or _nan(value)


def _nan(value: Any) -> bool:
    """A table's empty cell, the same as None."""
    return isinstance(value, float) and value != value


def _filled(value: Any) -> bool:
    return not _null(value) and (not isinstance(value, str) or bool(value.strip())) and value != []


def _choose(row: Mapping[str, Any], options: Sequence[T], fits: Callable[[T, Set[str]], bool]) -> T | None:
    """The law of the module's first lines."""
    for has in ({k for k, v in row.items() if _filled(v)}, {k for k, v in row.items() if v is not None and not _nan(v)}):
        for option in options:
            if fits(option, has):
                return option
    return None


@functools.cache
def _fields_of(template: str) -> frozenset[str]:
    return frozenset(name for _, name in _parts(template) if name is not None)


def _fill(templates: Sequence[str], row: Mapping[str, Any]) -> str:
    """The chosen template, filled in; nothing at all where it has fields and every one of them is blank."""
    template = templates[0] if len(templates) == 1 else _choose(row, templates, lambda t, has: _fields_of(t) <= has) or templates[-1]
    values = {field: _text(row.get(field)).strip() for field in _fields_of(template)}
    if values and not any(values.values()):
        return ""
    return "".join(text + (values[field] if field is not None else "") for text, field in _parts(template))


def _conversation(value: Any) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise BadRow("broken conversation", "no turns" if isinstance(value, list) else f"not a list of turns but {type(value).__name__}")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise BadRow("broken conversation", f"a turn is {type(turn).__name__}")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role.lower() not in SPEAKERS:
            raise BadRow("broken conversation", f"unknown speaker {quote(str(role))}; known are {', '.join(SPEAKERS)}")
        turns.append(Turn(SPEAKERS[role.lower()], _text(turn.get("value", turn.get("content")))))
    return turns


def _pairs(value: Any, field: str) -> list[Turn]:
    if not isinstance(value, list) or not all(isinstance(p, Mapping) and {"user", "assistant"} <= set(p) for p in value):
        raise BadRow("unknown row shape", f"{field} is not a list of {{user, assistant}}")
    return [Turn(role, _text(p[role])) for p in value for role in ("user", "assistant")]


def _text(value: Any) -> str:
    if isinstance(value, list):  # OpenAI's content parts
        if not all(isinstance(p, Mapping) for p in value):
            raise BadRow("text is not a string", "list")
        return "".join(IMAGE_MARK if "image" in str(p.get("type")) else _text(p.get("text")) for p in value)
    if isinstance(value, bool) or _nan(value) or not isinstance(value, str | int | float):
        raise BadRow("text is not a string", "NaN" if _nan(value) else type(value).__name__)
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("text is not valid Unicode", "a lone surrogate") from None
    return text


def load_map(name_or_path: str | Path | None) -> FieldMap:
    """A shipped map by name, or a YAML file; None is `auto`.

    Raises:
        UserError: no such map, or all that is wrong with it.
    """
    wanted = str(name_or_path) if name_or_path is not None else "auto"
    shipped = {p.stem: p for p in sorted(SHIPPED.glob("*.yaml"))}
    path = Path(wanted) if wanted.endswith((".yaml", ".yml")) else shipped.get(wanted)
    if path is None or not path.is_file():
        raise UserError(f"{wanted}: no such field map; give a .yaml file, or one of {', '.join(shipped)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())[:300]}") from None
    if not isinstance(tree, dict) or "name" in tree:
        raise UserError(f"{path}: a field map is a mapping of {', '.join(k for k in FieldMap.model_fields if k != 'name')}")
    try:
        return FieldMap.model_validate({**tree, "name": path.stem})
    except ValidationError as e:
        lines = [f"  {'.'.join(map(str, err['loc'])) or 'map'}: {err['msg'].removeprefix('Value error, ')}" for err in e.errors()]
        raise UserError("\n".join([f"{path}: {len(lines)} problem{'s' if len(lines) > 1 else ''} in the map", *lines])) from None
