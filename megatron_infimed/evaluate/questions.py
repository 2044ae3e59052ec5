"""Held-out questions: one JSON object a line.

`question` and `answer` are needed. `id` (default: the line's number), `image` or `images` (a path or a list of paths below the image
folder; none is a text question), `kind`, `domain`, `choices`, `source_seen` (is the picture cut from a file that training pictures come
from too?) and `needs_image` (default: whether there is an image) sort the questions for scoring. Every other key is kept and handed on to
the answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_infimed.errors import UserError
from megatron_infimed.intake.records import IMAGE_MARK, Turn


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    answer: str
    images: tuple[str, ...] = ()
    """Paths below the image folder."""
    kind: str = "question"
    needs_image: bool = True
    more: dict[str, Any] = field(default_factory=dict)
    """domain, source_seen, choices and whatever else the line says."""

    @property
    def turns(self) -> list[Turn]:
        """As training saw it: images that have no mark in the text come first."""
        text = self.text if IMAGE_MARK in self.text else f"{IMAGE_MARK}\n" * len(self.images) + self.text
        return [Turn("user", text)]


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, in its order.

    Raises:
        UserError: the file or a line of it is not what the top of this module says, or an id comes twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(): texts may hold other line ends, such as U+2028
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot read the questions ({e}); a JSON object a line with question and answer is wanted") from None
    out = [_question(f"{path}:{n}", n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not out:
        raise UserError(f"{path}: holds no question")
    seen: set[str] = set()
    for question in out:
        if question.id in seen:
            raise UserError(f"{path}: the id {question.id!r} comes twice: answers could not be told apart")
        seen.add(question.id)
    return out


def _question(place: str, number: int, line: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise UserError(f"{place}: not JSON: {e}") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) and row[k].strip() for k in ("question", "answer")):
        raise UserError(f"{place}: needs the texts question and answer")
    text, answer = row.pop("question"), row.pop("answer")
    images = row.pop("images", None) or row.pop("image", None) or []
    row.pop("image", None)
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        raise UserError(f"{place}: image is a path or a list of paths below the image folder")
    marks = text.count(IMAGE_MARK)
    if marks and marks != len(images):
        raise UserError(f"{place}: {marks} {IMAGE_MARK} marks but {len(images)} images")
    kind, needs_image = str(row.pop("kind", None) or "question"), bool(row.pop("needs_image", bool(images)))
    return Question(str(row.pop("id", number)), text, answer, tuple(images), kind, needs_image, row)
