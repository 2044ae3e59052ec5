"""The quickstart corpus at a twentieth of its size: balanced answers, splits without common pixels, same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
pytest.importorskip("pydicom")
pytest.importorskip("tifffile")


def build(folder: Path, *extra: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(QUICKSTART / "corpus.py"), "--output", str(folder), "--scale", "0.05", *extra]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "corpus"
    result = build(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_same_seed_gives_the_same_bytes_and_a_finished_corpus_is_skipped(corpus: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert build(again).returncode == 0
    assert tree(again) == tree(corpus)
    assert "nothing to do" in build(again).stdout


def test_a_folder_that_is_not_a_corpus_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = build(tmp_path)
    assert result.returncode == 2
    assert "not a corpus" in result.stdout
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("split", ["dev", "test"])
def test_answers_are_balanced_and_true(corpus: Path, split: str) -> None:
    facts = {row["path"]: row["facts"] for row in rows(corpus / "pictures.jsonl")}
    by_kind: dict[str, Counter] = defaultdict(Counter)
    first = Counter()
    for row in rows(corpus / f"{split}.jsonl"):
        by_kind[row["kind"]][row["answer"]] += 1
        if row["kind"] == "either_or":
            first[row["choices"][0] == row["answer"]] += 1
        if row["kind"] not in ("yes_no", "knowledge"):
            assert row["answer"] in facts[row["image"]].values()
        if row["choices"]:
            assert row["answer"] in row["choices"]
            assert len(set(row["choices"]) & set(facts[row["image"]].values())) == 1
    assert by_kind["yes_no"]["yes"] == by_kind["yes_no"]["no"] > 5
    assert by_kind["colour"]["colour"] == by_kind["colour"]["grey"] > 0
    assert first[True] == first[False] > 0
    for kind in ("modality", "organ", "plane", "stain"):
        assert max(by_kind[kind].values()) - min(by_kind[kind].values()) <= 1


@pytest.mark.parametrize("split", ["dev", "test"])
def test_yes_means_the_named_value_is_a_fact(corpus: Path, split: str) -> None:
    facts = {row["path"]: row["facts"] for row in rows(corpus / "pictures.jsonl")}
    words = {value for known in facts.values() for name, value in known.items() if name != "colour"}
    checked = 0
    for row in rows(corpus / f"{split}.jsonl"):
        question = row["question"].replace("in the photo", "")
        named = max((word for word in words if f" {word}" in question), key=len, default=None)
        if row["kind"] == "yes_no" and named:
            assert (named in facts[row["image"]].values()) == (row["answer"] == "yes"), row
            checked += 1
    assert checked > 5


def test_held_out_pictures_share_no_source_or_no_area_with_training(corpus: Path) -> None:
    sources = {row["source"]: row for row in json.loads((corpus / "sources.json").read_text())}
    per_kind: dict[str, set[str]] = defaultdict(set)
    for row in sources.values():
        per_kind[row["kind"]].add(row["source"])
    used: dict[str, set[str]] = defaultdict(set)
    for row in rows(corpus / "pictures.jsonl"):
        used[row["source"]].add(row["split"])
        assert row["source_seen"] == (row["split"] != "train" and "train" in sources[row["source"]]["areas"])
    for name, source in sources.items():
        if len(per_kind[source["kind"]]) > 1:
            assert used[name] == {"train"} or "train" not in used[name]
        boxes = list((source["frames"] or source["areas"]).values())
        for number, box in enumerate(boxes):
            for other in boxes[:number]:
                half = len(box) // 2
                assert any(box[i] >= other[i + half] or other[i] >= box[i + half] for i in range(half)), name


def test_every_picture_opens_and_every_mention_exists(corpus: Path) -> None:
    from PIL import Image

    modes = Counter()
    for row in rows(corpus / "pictures.jsonl"):
        with Image.open(corpus / row["path"]) as image:
            image.load()
            modes[image.mode] += 1
            if row["facts"]["colour"] == "colour":
                assert image.mode == "RGB"
    assert set(modes) == {"L", "RGB"}
    for name in ("captions", "questions_pretrain", "general", "cross"):
        for row in rows(corpus / f"{name}.jsonl"):
            images = row.get("image", [])
            images = [images] if isinstance(images, str) else images
            assert row["conversations"][0]["value"].count("<image>") == len(images)
            assert all((corpus / path).is_file() and path.startswith("images/train/") for path in images)
            assert all(turn["value"].isascii() and turn["value"] == turn["value"].lower() for turn in row["conversations"])


def test_parquet_rows_carry_their_image(corpus: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(corpus / "medical.parquet").to_pylist()
    assert len(table) > 50
    for row in table:
        assert row["image"]["bytes"] == (corpus / row["image"]["path"]).read_bytes()
        assert row["question"] and row["answer"] and row["modality"] != "photo"
