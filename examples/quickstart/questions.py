"""Texts about pictures: captions, questions, conversations; every answer is a fact of the picture.

Balance is kept by construction, so that neither the majority answer nor the wording gives anything away. A `Deck` deals
pictures so that each value of a fact (ct, mr, ...) comes up equally often. An `Author` asks: yes and no alternate, and
each "no" question names the value that has had most "yes" answers without a "no"; either/or pairs are chosen so that
both members win equally often, in both orders; the right option of a multiple choice moves through all places.
Answers are words, never letters. All text is lower-case ASCII from a small vocabulary.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from pictures import Picture

OPEN_WORDINGS = {
    "modality": ["which modality is this?", "how was this picture made?", "what type of picture is this?"],
    "organ": ["which part of the body is shown?", "what body part is this?", "which organ or part does it show?"],
    "plane": ["which plane is this?", "what is the view?", "in which plane is the picture?"],
    "stain": ["which stain is this?", "how was the tissue stained?", "what is the stain?"],
    "subject": ["what is in the photo?", "what does the photo show?", "what can be seen here?"],
    "colour": ["is the picture in colour or grey?", "is the picture grey or in colour?"],
}
YES_NO_WORDINGS = {
    "modality": ["is this {}?", "is the modality {}?"],
    "organ": ["is this the {}?", "does it show the {}?", "is the body part the {}?"],
    "plane": ["is the plane {}?", "is this the {} view?"],
    "stain": ["is the stain {}?", "is this {} stain?"],
    "subject": ["does it show {}?", "is there {} in the photo?"],
    "colour": ["is the picture {}?", "is this {}?"],
}
EITHER_OR_WORDINGS = ["is this {} or {}?", "which is it, {} or {}?", "{} or {}?"]
CHOICE_WORDINGS = ["choose one: {}.", "which of these is right: {}?", "pick the right one: {}."]
CHOICE_TOPICS = {"modality": "modality", "organ": "body part", "subject": "photo"}
DESCRIBE_WORDINGS = ["describe the picture.", "what is shown?", "write a caption.", "describe this in short."]
SAME_WORDINGS = {
    "modality": ["do both pictures have the same modality?", "were both pictures made the same way?"],
    "subject": ["do both photos show the same thing?", "is the same thing in both photos?"],
    "organ": ["do both pictures show the same body part?", "is it the same body part in both?"],
}
NTH_WORDINGS = {
    "modality": ["which modality is the {} picture?", "how was the {} picture made?"],
    "subject": ["what is in the {} photo?", "what does the {} photo show?"],
    "organ": ["which part of the body is in the {} picture?", "what body part is the {} picture?"],
}
KNOWLEDGE = [
    ("what does mr use, magnets or x-rays?", "magnets"),
    ("what does ct use, magnets or x-rays?", "x-rays"),
    ("what does ultrasound use, sound or light?", "sound"),
    ("what does a fundus photo use, sound or light?", "light"),
    ("which organ does a fundus photo show?", "eye"),
    ("what does nuclear medicine use?", "a tracer"),
    ("what is the short name of computed tomography?", "ct"),
    ("what is the short name of magnetic resonance?", "mr"),
    ("which stain is pink and purple?", "h&e"),
    ("which stain is brown and blue?", "ihc"),
    ("which modality shows tissue with a stain?", "microscopy"),
    ("which plane divides left from right?", "sagittal"),
]
_ARTICLE = {name: f"a {name}" for name in ("cat", "flower", "temple", "motorcycle", "person")}
_COLOUR_WORDS = {"colour": "in colour"}


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    kind: str
    choices: tuple[str, ...] | None = None


class Deck:
    """Deals pictures so that every value of a fact is equally frequent, and within a value every kind."""

    def __init__(self, pictures: Iterable[Picture], rng: np.random.Generator):
        self._rng = rng
        self._piles: dict[str, dict[str, dict[str, list[Picture]]]] = defaultdict(lambda: defaultdict(dict))
        for picture in pictures:
            for fact, value in picture.facts.items():
                self._piles[fact][value].setdefault(picture.kind, []).append(picture)
        self._dealt: Counter[tuple[str, ...]] = Counter()

    def values(self, fact: str) -> list[str]:
        return sorted(self._piles[fact])

    def _least_dealt(self, names: list[str], *path: str) -> str:
        order = self._rng.permutation(len(names))
        chosen = min((names[i] for i in order), key=lambda name: self._dealt[(*path, name)])
        self._dealt[(*path, chosen)] += 1
        return chosen

    def deal(self, fact: str, value: str | None = None, purpose: str = "") -> Picture:
        value = value or self._least_dealt(self.values(fact), purpose, fact)
        kind = self._least_dealt(sorted(self._piles[fact][value]), purpose, fact, value)
        pile = {picture.id: picture for picture in self._piles[fact][value][kind]}
        return pile[self._least_dealt(sorted(pile), "picture")]


class Author:
    """Writes questions about given pictures and keeps the books that balance the answers."""

    def __init__(self, values: dict[str, list[str]], rng: np.random.Generator):
        self._values = values
        self._rng = rng
        self._answers: Counter[tuple[str, ...]] = Counter()

    def _pick(self, wordings: list[str]) -> str:
        return wordings[self._rng.integers(len(wordings))]

    def _shuffled(self, names: list[str]) -> list[str]:
        return [names[i] for i in self._rng.permutation(len(names))]

    def _others(self, picture: Picture, fact: str) -> list[str]:
        return self._shuffled([value for value in self._values[fact] if value != picture.facts[fact]])

    def open(self, picture: Picture, fact: str) -> Question:
        return Question(self._pick(OPEN_WORDINGS[fact]), picture.facts[fact], fact)

    def yes_no(self, picture: Picture, fact: str) -> Question:
        true = picture.facts[fact]
        answer = self.alternate("yes", "no", fact, true)
        value = true
        if answer == "no":
            owed = self._answers
            value = max(self._others(picture, fact), key=lambda name: owed["owed", fact, name])
        self._answers["owed", fact, value] += 1 if answer == "yes" else -1
        words = _COLOUR_WORDS.get(value, _ARTICLE.get(value, value))
        return Question(self._pick(YES_NO_WORDINGS[fact]).format(words), answer, "yes_no")

    def either_or(self, picture: Picture, fact: str) -> Question:
        true, wins = picture.facts[fact], self._answers
        other = min(self._others(picture, fact), key=lambda name: wins["win", fact, true, name] - wins["win", fact, name, true])
        wins["win", fact, true, other] += 1
        pair = (true, other) if self.alternate("first", "second", fact, true) == "first" else (other, true)
        return Question(self._pick(EITHER_OR_WORDINGS).format(*pair), true, "either_or", pair)

    def multiple_choice(self, picture: Picture, fact: str) -> Question:
        others = self._others(picture, fact)
        others.sort(key=lambda name: self._answers["distractor", fact, name])
        options = others[:2]
        for name in options:
            self._answers["distractor", fact, name] += 1
        place = self._answers["place", fact] % 3
        self._answers["place", fact] += 1
        options.insert(place, picture.facts[fact])
        topic = f"{CHOICE_TOPICS[fact]}? "
        text = topic + self._pick(CHOICE_WORDINGS).format(", ".join(options))
        return Question(text, picture.facts[fact], "multiple_choice", tuple(options))

    def knowledge(self) -> Question:
        number = self._answers["knowledge",]
        self._answers["knowledge",] += 1
        return Question(*KNOWLEDGE[number % len(KNOWLEDGE)], kind="knowledge")

    def same(self, first: Picture, second: Picture, fact: str) -> Question:
        answer = "yes" if first.facts[fact] == second.facts[fact] else "no"
        return Question(self._pick(SAME_WORDINGS[fact]), answer, "same")

    def nth(self, pictures: tuple[Picture, Picture], fact: str, place: str) -> Question:
        picture = pictures[0 if place == "first" else 1]
        return Question(self._pick(NTH_WORDINGS[fact]).format(place), picture.facts[fact], f"nth_{fact}")

    def alternate(self, one: str, other: str, fact: str, value: str) -> str:
        """Whichever of two answers is behind for this fact; when level, whichever is behind for this value."""
        books = self._answers
        behind = books[fact, one] - books[fact, other] or books[fact, value, one] - books[fact, value, other]
        answer = one if behind < 0 or (behind == 0 and self._rng.random() < 0.5) else other
        books[fact, answer] += 1
        books[fact, value, answer] += 1
        return answer

    def caption(self, picture: Picture) -> tuple[str, str]:
        """A request to describe, and the description."""
        facts = picture.facts
        if "subject" in facts:
            shown = _ARTICLE.get(facts["subject"], facts["subject"])
            words = "grey" if facts["colour"] == "grey" else "colour"
            texts = [f"a {words} photo of {shown}.", f"this is a photo. it shows {shown}. it is {facts['colour']}."]
            return self._pick(DESCRIBE_WORDINGS), self._pick(texts)
        named = {"modality": "modality", "organ": "body part", "plane": "plane", "stain": "stain"}
        known = {name: facts[name] for name in named if name in facts}
        short = [known["modality"]]
        short += [f"the {known['organ']}"] if "organ" in known else []
        short += [f"{known['plane']} plane"] if "plane" in known else []
        short += [f"{known['stain']} stain"] if "stain" in known else []
        sentences = [f"this is {known['modality']}."]
        sentences += [f"it shows the {known['organ']}."] if "organ" in known else []
        sentences += [f"the plane is {known['plane']}."] if "plane" in known else []
        sentences += [f"the stain is {known['stain']}."] if "stain" in known else []
        table = " ".join(f"{named[name]}: {value}." for name, value in known.items())
        return self._pick(DESCRIBE_WORDINGS), self._pick([", ".join(short) + ".", " ".join(sentences), table])
