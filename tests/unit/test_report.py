"""The quickstart's report from a small made-up run: it stands alone, escapes what it shows, and its figures are those of the inputs."""

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from megatron_infimed.config import Recipe
from megatron_infimed.errors import UserError
from megatron_infimed.evaluate.score import is_right, score
from megatron_infimed.report import charts
from megatron_infimed.report.quickstart import gallery, write_report
from tests.tiny import tiny_images

EVIL = "<script>alert('x')</script>"


def answer_row(i, right, **more):
    answer = ("ct", "mr", "yes")[i % 3]
    row = {"id": f"q{i}", "images": [f"images/{i % 4}.jpg"], "question": f"which one? {EVIL}", "answer": answer, "needs_image": True}
    row |= {"prediction": answer if right else EVIL, "gray_prediction": "mr", "kind": ("modality", "yes_no")[i % 3 == 2]}
    row |= {"domain": "medical", "source_seen": i % 5 != 0, "picture_kind": EVIL, "choices": None, **more}
    return row | {"correct": is_right(row["prediction"], row["answer"])}


@pytest.fixture
def run(tmp_path):
    """Two stages of 12 and 8 steps, the second evaluated; a corpus of four pictures, one of them broken."""
    corpus = tmp_path / "corpus"
    (corpus / "images").mkdir(parents=True)
    for i, data in enumerate(tiny_images(4)):
        (corpus / f"images/{i}.jpg").write_bytes(data if i != 3 else data[:30])
    kinds = (
        ("chest", "train", False),
        ("chest", "test", True),
        ("head", "train", False),
        ("head", "test", False),
        ("spine", "test", False),
    )
    pictures = [{"kind": k, "split": s, "source_seen": seen} for k, s, seen in kinds]
    (corpus / "pictures.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pictures))
    sources = [{"kind": k, "package": "some-package", "licence": f"MIT {EVIL}"} for k in ("chest", "head", "head", "spine")]
    (corpus / "sources.json").write_text(json.dumps(sources))
    for name, steps, tensor in (("pretrain", 12, 2), ("sft_cross", 8, 1)):
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        recipe = Recipe.model_validate({"output": "x", "schedule": [{"until": 1, "image_size": 56, "tokens_per_image": 16}]})
        tree = recipe.model_dump(mode="json")
        tree["parallel"]["tensor"] = tensor
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
        lines = [
            {
                "step": i + 1, "processes": 2, "loss": 4.0 / (i + 1), "image_size": 56 if i < 9 else 112, "tokens_per_image": 16,
                "fill": 0.9, "seconds": 0.5,
                "text_tokens": 50, "image_tokens": 40, "padding": 10, "documents": 3, "images": 3, "corrupt": int(i == 0),
            }
            for i in range(steps)
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (folder / "DONE").write_text("{}")
    rows = [answer_row(i, right=i % 4 != 0) for i in range(40)]
    evaluation = tmp_path / "run/sft_cross/eval_test"
    evaluation.mkdir()
    (evaluation / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    inputs = {"checkpoint": "a" * 64, "questions": "b" * 64}
    scores = {**score(rows), "unreadable_images": ["images/3.jpg"], "checkpoint": f"run/{EVIL}", "inputs": inputs}
    (evaluation / "scores.json").write_text(json.dumps(scores))
    return tmp_path / "run", corpus


class Page(HTMLParser):
    """What a reader of the page must be able to rely on."""

    VOID = ("meta", "img", "rect", "line", "path", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids, self.links, self.bad = [], [], set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        self.ids.add(values.get("id"))
        self.links += [v for k, v in attrs if k in ("href", "src", "srcset", "action", "data") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.bad.append(tag)


def test_one_page_that_stands_alone(run, capsys):
    folder, corpus = run
    summary = write_report(folder, ["pretrain", "sft_cross"], corpus=corpus)
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.bad and not page.open  # well-formed
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in page.tags)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import", text)
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert all(values.get("alt") for tag, values in page.tags if tag == "img")
    assert all(values.get("scope") for tag, values in page.tags if tag == "th")
    assert "prefers-color-scheme: dark" in text and "✓" in text and "✗" in text and "not readable" in text
    assert "because the corpus has one file of each: chest." in text
    assert summary == json.loads((folder / "summary.json").read_text())
    assert "sft_cross" in capsys.readouterr().out
    assert not list(folder.glob("*.tmp"))


def test_figures_are_those_of_the_run(run):
    folder, corpus = run
    summary = write_report(folder, ["pretrain", "sft_cross"], corpus=corpus)
    assert (summary["steps"], summary["seconds"], summary["last_stage"], summary["fill"]) == (20, 10.0, "sft_cross", 0.9)
    first, last = summary["stages"]
    assert (first["layout"], last["layout"]) == ("TP2", "DP2") and first["evaluation"] is None
    assert first["phases"] == [{"image_size": 56, "tokens_per_image": 16}, {"image_size": 112, "tokens_per_image": 16}]
    assert (first["corrupt_images"], first["tokens_per_second"]) == (1, 180.0)
    assert summary["held_out"]["n"] == 40 and summary["held_out"]["right"] == 30 and summary["new_sources"]["n"] == 8
    c = summary["corpus"]
    assert (c["kinds_from_seen_sources"], c["kinds_from_new_sources"]) == (["chest"], ["head", "spine"])
    assert c["kinds_without_training_pictures"] == ["spine"] and c["kinds_seen_though_another_file_is_there"] == []


def test_without_gray_answers_or_corpus_notes_the_page_is_made_all_the_same(run):
    folder, corpus = run
    rows = [{k: v for k, v in answer_row(i, True).items() if k not in ("gray_prediction", "source_seen")} for i in range(3)]
    (folder / "sft_cross/eval_test/answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    scores = json.loads((folder / "sft_cross/eval_test/scores.json").read_text())
    (folder / "sft_cross/eval_test/scores.json").write_text(json.dumps({**scores, **score(rows)}))
    (corpus / "pictures.jsonl").unlink()
    summary = write_report(folder, ["sft_cross"], corpus=corpus)
    assert summary["new_sources"] is None and summary["corpus"] is None and "gap" not in summary["held_out"]


def test_refusals(run):
    folder, corpus = run
    with pytest.raises(UserError, match=r"sft_medical: the stage has not run"):
        write_report(folder, ["pretrain", "sft_medical"], corpus=corpus)
    with pytest.raises(UserError, match=r"no stage has eval_dev/scores.json"):
        write_report(folder, ["pretrain", "sft_cross"], corpus=corpus, split="dev")


def test_the_gallery_is_in_proportion():
    rows = [answer_row(i, right=i % 4 != 0) for i in range(120)]
    drawn = gallery(rows, count=24)
    assert len(drawn) == 24 == len({r["id"] for r in drawn})
    assert sum(r["correct"] for r in drawn) == 18 and sum(r["kind"] == "yes_no" for r in drawn) == 8
    assert [r["id"] for r in gallery(rows, count=24)] == [r["id"] for r in drawn]
    assert [r["id"] for r in gallery(rows, count=24, seed=1)] != [r["id"] for r in drawn]
    assert len(gallery(rows[:5], count=24)) == 5 and gallery([]) == []
    assert gallery([answer_row(1, True, needs_image=False)]) == []


def test_curves():
    track = charts.step_track("pixels", [56, 56, 112, 112])
    assert track.line.count("V") == 1 and [label for *_, label in track.notes] == ["56", "112"] and track.notes[1][0] == 50
    assert charts.smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert charts.loss_track([[1.0], [1.0, 0.0]]).raw.count("M") == 2  # a loss of 0 has a place too
    assert [label for _, label in charts.step_ticks(2130)] == ["0", "500", "1 000", "1 500", "2 000"]
    assert charts.step_ticks(1)[0] == (0.0, "0")
    assert len(charts.loss_track([[1.0 + i for i in range(50_000)]]).raw) < 40_000


def test_the_command(run, monkeypatch, capsys):
    folder, corpus = run
    path = Path(__file__).parents[2] / "examples/quickstart/report.py"
    spec = importlib.util.spec_from_file_location("quickstart_report", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = ["report.py", "--run", str(folder), "--corpus", str(corpus), "--stages", "pretrain", "sft_cross"]
    monkeypatch.setattr("sys.argv", words)
    assert module.main() == 0
    monkeypatch.setattr("sys.argv", [*words, "--split", "dev"])
    assert module.main() == 2 and "error: " in capsys.readouterr().err
