"""Scoring answers: normalised exact match, and what it is worth.

An answer is right when it equals the expected one after normalisation: Unicode NFKC, lower case, punctuation removed (a decimal point and
a minus sign before a digit stay), the articles a, an, the removed (unless nothing else is there), white space collapsed. There is no
partial credit: "yes, it is" is wrong where "yes" is expected, and so is an empty answer.

Beside the accuracy stand what needs no picture: `gray`, the same model shown gray images; `majority`, always saying the most frequent
answer of the question's kind (found in the evaluated questions themselves, which flatters it); `guess`, the same but picking one of the
named choices where that is better. `gap` is accuracy minus gray. Intervals are 95 %: Wilson's for an accuracy, of paired differences for
the gap; both take questions as independent, which pictures cut from one file are not.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

VERSION = 1
"""Goes up when the same answers would be scored otherwise."""
_Z = 1.959964
_ARTICLES = {"a", "an", "the"}
_KEPT = re.compile(r"(?<=\d)\.(?=\d)|(?<!\w)-(?=\d)")


def normalise(text: str) -> str:
    """See the top of the file."""
    text = unicodedata.normalize("NFKC", text).lower()
    kept = {m.start() for m in _KEPT.finditer(text)}
    plain = "".join(c if i in kept or not unicodedata.category(c).startswith("P") else " " for i, c in enumerate(text))
    words = plain.split()
    return " ".join([w for w in words if w not in _ARTICLES] or words)


def is_right(prediction: str, answer: str) -> bool:
    return bool(normalise(prediction)) and normalise(prediction) == normalise(answer)


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    if not n:
        return 0.0, 1.0
    p, z2 = right / n, _Z * _Z
    middle = p + z2 / (2 * n)
    reach = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (middle - reach) / (1 + z2 / n) if right else 0.0, (middle + reach) / (1 + z2 / n) if right < n else 1.0


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of answered questions, as shares from 0 to 1.

    Args:
        rows: question and its answers: answer, prediction, kind, needs_image; gray_prediction, domain, source_seen, choices where known.

    Returns:
        `all`, `needs_image` (the questions that cannot be answered without it), `by_kind`, and of those that need the image `by_domain` and
        `by_source` ("seen": the picture is cut from a file that also gave training pictures, "new": it is not). Each is n, right, accuracy,
        low, high, majority, guess, and with gray predictions gray, gap, gap_low, gap_high.
    """
    blind = _blind_answers(rows)
    needing = [r for r in rows if r.get("needs_image", True)]
    source = {True: "seen", False: "new"}
    return {
        "all": _cell(rows, blind),
        "needs_image": _cell(needing, blind),
        "by_kind": _groups(rows, lambda r: r["kind"], blind),
        "by_domain": _groups(needing, lambda r: r.get("domain"), blind),
        "by_source": _groups(needing, lambda r: source.get(r.get("source_seen")), blind),  # type: ignore[arg-type]
    }


def _groups(rows: Iterable[dict[str, Any]], key, blind: dict) -> dict[str, Any]:
    groups = defaultdict(list)
    for row in rows:
        if (name := key(row)) is not None:
            groups[str(name)].append(row)
    return {name: _cell(members, blind) for name, members in groups.items()}


def _blind_answers(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    """kind -> (most frequent answer, does picking one of the named choices do better?)"""
    answers, luck = defaultdict(Counter), defaultdict(float)
    for row in rows:
        answers[row["kind"]][normalise(row["answer"])] += 1
        luck[row["kind"]] += 1 / len(row["choices"]) if row.get("choices") else 0.0
    out = {}
    for kind, counter in answers.items():
        answer, often = min(counter.items(), key=lambda item: (-item[1], item[0]))
        out[kind] = (answer, luck[kind] > often)
    return out


def _cell(rows: Sequence[dict[str, Any]], blind: dict[str, tuple[str, bool]]) -> dict[str, Any]:
    n, right = len(rows), sum(is_right(r["prediction"], r["answer"]) for r in rows)
    if not n:
        return {"n": 0, "right": 0}
    low, high = wilson(right, n)
    majority = [float(normalise(r["answer"]) == blind[r["kind"]][0]) for r in rows]
    guess = [
        (1 / len(r["choices"]) if r.get("choices") else 0.0) if blind[r["kind"]][1] else m for r, m in zip(rows, majority, strict=True)
    ]
    cell: dict[str, Any] = {"n": n, "right": right, "accuracy": right / n, "low": low, "high": high}
    cell |= {"majority": sum(majority) / n, "guess": sum(guess) / n}
    if all(r.get("gray_prediction") is not None for r in rows):
        gray = [is_right(r["gray_prediction"], r["answer"]) for r in rows]
        gains = [is_right(r["prediction"], r["answer"]) - g for r, g in zip(rows, gray, strict=True)]
        gap = sum(gains) / n
        reach = _Z * math.sqrt(max(sum(g * g for g in gains) / n - gap * gap, 0) / n)
        cell |= {"gray": sum(gray) / n, "gap": gap, "gap_low": gap - reach, "gap_high": gap + reach}
    return {name: round(value, 5) for name, value in cell.items()}
