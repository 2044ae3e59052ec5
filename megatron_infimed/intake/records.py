"""What a reader yields: a Record (images, turns of a conversation) or a Reject (why not).

`<image>` in the text of a user or system turn says where an image goes; in an assistant turn it is only text. `make_record` is the one
place that holds this law: images without a mark are put before the first user turn, and whatever cannot be a training document comes back
as a Reject whose `reason` is one of few (so that rejects can be counted) with the particulars in `detail`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

IMAGE_MARK = "<image>"

Role = Literal["system", "user", "assistant"]


class BadRow(Exception):
    """args (reason, detail): the Reject that a row comes to."""


class BadImage(BadRow):
    """args (reason, detail): an image that cannot be had, or not be used."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where an encoded image lies; images.py knows how it is read."""

    root: str
    """A folder or an archive."""
    name: str
    """The file in the folder, the member of the archive."""
    fragment: str = ""
    """A DICOM frame or a NIfTI slice inside the file."""

    @property
    def label(self) -> str:
        """What logs may say of it, the same on every machine: a hash for the name, since files are often named after patients."""
        return f"file {short_hash(self.name)}{'#' if self.fragment else ''}{self.fragment}"

    def __str__(self) -> str:
        return f"{self.root}/{self.name}{'#' if self.fragment else ''}{self.fragment}"


ImageRef = bytes | Stored
"""The encoded file (JPEG, PNG, ...) or where it lies."""


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One training document: `marks(turns) == len(images)`, the k-th mark is images[k]."""

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    source: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reject:
    id: str
    reason: str
    """A short category, the same words for the same fault."""
    detail: str = ""
    source: str = ""


def short_hash(name: str) -> str:
    """Eight hexadecimal digits that stand for a name."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]


_QUOTE = re.compile("«[^»]*»")


def quote(text: str) -> str:
    """Marks what a detail takes from the row or from a file's name, so that the gate can withhold it."""
    return f"«{text[:200].replace('»', '?')}»"


def without_quotes(detail: str) -> str:
    """The detail without what `quote` marked."""
    return _QUOTE.sub("[withheld]", detail)


def printable(text: str) -> str:
    """Ids, names and details end up in logs and terminals: no control characters, no lone surrogates."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def marks(turns: Sequence[Turn]) -> int:
    """Image slots in the conversation."""
    return sum(t.text.count(IMAGE_MARK) for t in turns if t.role != "assistant")


def make_record(
    id: str, images: Sequence[ImageRef], turns: Sequence[Turn], source: str, meta: Mapping[str, Any] | None = None
) -> Record | Reject:
    """A valid Record, or why there is none."""

    def reject(reason: str, detail: str = "") -> Reject:
        return Reject(id, reason, detail, source)

    talk = list(turns)
    spoken = talk[1:] if talk and talk[0].role == "system" else talk
    if not any(t.role == "assistant" for t in talk):
        return reject("no assistant turn", f"roles {[t.role for t in talk]}")
    if len(spoken) % 2 or any(t.role != ("user", "assistant")[i % 2] for i, t in enumerate(spoken)):
        return reject("turns do not alternate user, assistant", f"roles {[t.role for t in talk]}"[:200])
    if any(t.role == "assistant" and not t.text.strip() for t in talk):
        return reject("empty assistant text")
    found = marks(talk)
    if images and not found:
        first = len(talk) - len(spoken)
        talk[first] = Turn("user", f"{IMAGE_MARK}\n" * len(images) + talk[first].text)
    elif found > len(images):
        return reject("more image marks than images", f"{found} marks, {len(images)} images")
    elif found < len(images):
        return reject("fewer image marks than images", f"{found} marks, {len(images)} images")
    return Record(id, tuple(images), tuple(talk), source, dict(meta or {}))
