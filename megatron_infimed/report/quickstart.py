"""The quickstart's report: one report.html that opens anywhere, and summary.json with every figure in it.

It only reads what the stages left behind (recipe.yaml, metrics.jsonl, DONE, the evaluation's scores.json and answers.jsonl) and the corpus's own
account of its pictures. Text that judges the result, such as which pictures come from a file the model was trained on, is made from those
figures. quickstart.html sets the page; charts.py draws the curves.
"""

from __future__ import annotations

import base64
import io
import json
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from PIL import Image
from rich.console import Console
from rich.table import Table

from megatron_infimed.errors import UserError
from megatron_infimed.report import charts

GALLERY, GALLERY_SEED, THUMBNAIL = 24, 0, 232


@dataclass(frozen=True)
class Stage:
    """What one stage left behind."""

    name: str
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    done: bool
    processes: int
    scores: dict[str, Any] | None
    answers: list[dict[str, Any]]

    @property
    def layout(self) -> str:
        p = self.recipe["parallel"]
        data = max(1, self.processes // (p["tensor"] * p["pipeline"]))
        named = (("TP", p["tensor"]), ("PP", p["pipeline"]), ("DP", data))
        words = [f"{name}{size}" for name, size in named if size > 1] + (["SP"] if p["sequence"] else [])
        return " ".join(words) or "1 process"

    @property
    def phases(self) -> list[tuple[int, int]]:
        """(pixels, tokens an image) in the order they came."""
        return list(dict.fromkeys((s["image_size"], s["tokens_per_image"]) for s in self.steps))

    def figures(self) -> dict[str, Any]:
        """The stage's line in summary.json."""
        losses, ends = [s["loss"] for s in self.steps], max(1, min(10, len(self.steps) // 2))
        seconds = sum(s["seconds"] for s in self.steps)
        tokens = sum(s["text_tokens"] + s["image_tokens"] for s in self.steps)
        return {
            "stage": self.name,
            "done": self.done,
            "steps": len(self.steps),
            "seconds": round(seconds, 1),
            "layout": self.layout,
            "phases": [{"image_size": size, "tokens_per_image": t} for size, t in self.phases],
            "first_loss": round(statistics.fmean(losses[:ends]), 4),
            "last_loss": round(statistics.fmean(losses[-ends:]), 4),
            "fill": round(tokens / max(1, tokens + sum(s["padding"] for s in self.steps)), 5),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
            "documents": sum(s["documents"] for s in self.steps),
            "images": sum(s["images"] for s in self.steps),
            "corrupt_images": sum(s["corrupt"] for s in self.steps),
            "evaluation": self.scores["needs_image"] if self.scores else None,
            "new_sources": self.scores["by_source"].get("new") if self.scores else None,
        }


def write_report(run: Path, stages: Sequence[str], *, corpus: Path, split: str = "test", title: str = "") -> dict[str, Any]:
    """Writes report.html and summary.json into the run directory, prints the table, returns the summary.

    Args:
        run: holds a folder per stage.
        stages: in training order; `run/STAGE/eval_SPLIT` is its evaluation, where there is one.
        corpus: the folder that image paths start from; its pictures.jsonl and sources.json are used where they are there.

    Raises:
        UserError: a stage has not run, or none was evaluated on the split.
    """
    read = [_stage(run / name, split) for name in stages]
    evaluated = [s for s in read if s.scores]
    if not evaluated:
        raise UserError(f"{run}: no stage has eval_{split}/scores.json; run `evaluate` with --output {run}/{stages[-1]}/eval_{split} first")
    summary = summarise(read, evaluated[-1], corpus, split)
    html = _page(read, evaluated[-1], summary, corpus, title)
    for name, text in (("summary.json", json.dumps(summary, indent=1) + "\n"), ("report.html", html)):
        aside = run / f"{name}.tmp"
        aside.write_text(text, encoding="utf-8")
        aside.replace(run / name)
    _print(summary)
    return summary


def summarise(stages: Sequence[Stage], last: Stage, corpus: Path, split: str) -> dict[str, Any]:
    """Every figure of the report."""
    scores = last.scores or {}
    figures, steps = [s.figures() for s in stages], [step for s in stages for step in s.steps]
    used = sum(x["text_tokens"] + x["image_tokens"] for x in steps)
    return {
        "split": split,
        "last_stage": last.name,
        "held_out": scores["needs_image"],
        "new_sources": scores["by_source"].get("new"),
        "seen_sources": scores["by_source"].get("seen"),
        "by_kind": scores["by_kind"],
        "by_domain": scores["by_domain"],
        "seconds": round(sum(f["seconds"] for f in figures), 1),
        "steps": sum(f["steps"] for f in figures),
        "fill": round(used / max(1, used + sum(x["padding"] for x in steps)), 5),
        "stages": figures,
        "checkpoint": scores["checkpoint"],
        "evaluation_inputs": scores["inputs"],
        "unreadable_images": scores["unreadable_images"],
        "corpus": _corpus(corpus, split),
    }


def gallery(answers: Sequence[dict[str, Any]], count: int = GALLERY, seed: int = GALLERY_SEED) -> list[dict[str, Any]]:
    """A drawn sample: every kind of question, and within it right and wrong answers, has the places its share earns (largest remainder)."""
    pools: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
    for row in answers:
        if row["images"] and row["needs_image"]:
            pools[row["kind"], row["correct"]].append(row)
    total = sum(map(len, pools.values()))
    count = min(count, total)
    dice = random.Random(seed)
    share = {key: count * len(pool) / total for key, pool in sorted(pools.items())}
    places = {key: int(s) for key, s in share.items()}
    by_remainder = sorted(share, key=lambda key: (places[key] - share[key], dice.random()))
    for key in by_remainder[: count - sum(places.values())]:
        places[key] += 1
    drawn, shown = [], set()
    for key, n in places.items():
        pool = dice.sample(pools[key], len(pools[key]))
        pool.sort(key=lambda row: row["images"][0] in shown)  # stable: another picture where there is one
        drawn += pool[:n]
        shown.update(row["images"][0] for row in pool[:n])
    dice.shuffle(drawn)
    return drawn


def _stage(folder: Path, split: str) -> Stage:
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise UserError(f"{folder}: the stage has not run ({e.strerror}: {e.filename}); train it first") from None
    steps = [json.loads(line) for line in lines]
    if not steps:
        raise UserError(f"{folder}/metrics.jsonl holds no step yet")
    scores, answers, out = None, [], folder / f"eval_{split}"
    if (out / "scores.json").exists():
        scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
        answers = [json.loads(line) for line in (out / "answers.jsonl").open(encoding="utf-8")]
    processes = steps[-1].get("processes", 1) if steps else 1
    return Stage(folder.name, recipe, steps, (folder / "DONE").exists(), processes, scores, answers)


def _corpus(corpus: Path, split: str) -> dict[str, Any] | None:
    """Which held-out kinds of picture are cut from a file that training pictures come from too."""
    if not (corpus / "pictures.jsonl").exists():
        return None
    pictures = [json.loads(line) for line in (corpus / "pictures.jsonl").open(encoding="utf-8")]
    held_out = [p for p in pictures if p["split"] == split]
    seen = {kind: any(p["source_seen"] for p in held_out if p["kind"] == kind) for kind in dict.fromkeys(p["kind"] for p in held_out)}
    sources = json.loads((corpus / "sources.json").read_text(encoding="utf-8")) if (corpus / "sources.json").exists() else []
    files = Counter(s["kind"] for s in sources)
    trained = {p["kind"] for p in pictures if p["split"] == "train"}
    return {
        "training_pictures": sum(p["split"] == "train" for p in pictures),
        "held_out_pictures": len(held_out),
        "kinds": len({p["kind"] for p in pictures}),
        "kinds_from_seen_sources": sorted(k for k, s in seen.items() if s),
        "kinds_from_new_sources": sorted(k for k, s in seen.items() if not s),
        "kinds_without_training_pictures": sorted(k for k in seen if k not in trained),
        "kinds_seen_though_another_file_is_there": sorted(k for k, s in seen.items() if s and files[k] > 1),
        "sources": len(sources),
        "packages": sorted({s["package"] for s in sources}),
        "licences": dict(sorted(Counter(s["licence"] for s in sources).items())),
    }


def _page(stages: Sequence[Stage], last: Stage, summary: dict[str, Any], corpus: Path, title: str) -> str:
    n = sum(len(s.steps) for s in stages)
    steps = [step for s in stages for step in s.steps]
    bands, at = [], 0
    for s in stages:
        bands.append({"left": 100 * at / n, "width": 100 * len(s.steps) / n, "name": s.name})
        at += len(s.steps)
    rows = [s.steps for s in stages]
    tracks = [
        charts.loss_track([[x["loss"] for x in part] for part in rows]),
        charts.step_track("pixels a side", [x["image_size"] for x in steps]),
        charts.step_track("tokens an image", [x["tokens_per_image"] for x in steps]),
        charts.share_track("row fill", [[x["fill"] for x in part] for part in rows], f"{_percent(summary['fill'])} of all rows' places"),
    ]
    groups = [("by kind of question", _bars(summary["by_kind"])), ("by domain", _bars(summary["by_domain"]))]
    names = {"seen": "another area of a file seen in training", "new": "a file never seen in training"}
    groups.append(("by where the picture comes from", _bars((last.scores or {})["by_source"], names)))
    drawn = gallery(last.answers)
    environment = Environment(loader=PackageLoader("megatron_infimed", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "points": _points, "clock": _clock, "count": lambda v: f"{v:,}".replace(",", "\u202f")}
    return environment.get_template("quickstart.html").render(
        title=title or "From real medical pictures to a checkpoint",
        summary=summary,
        model=last.recipe["model"],
        bands=bands,
        tracks=tracks,
        resolutions=list(dict.fromkeys(f"{size} px in {t} tokens" for s in stages for size, t in s.phases)),
        x_ticks=charts.step_ticks(n),
        groups=groups,
        gallery=[{**row, "thumbnails": [_thumbnail(corpus / name) for name in row["images"]]} for row in drawn],
        gallery_right=sum(row["correct"] for row in drawn),
        seed=GALLERY_SEED,
        candidates=sum(bool(row["images"]) and row["needs_image"] for row in last.answers),
        processes=max(s.processes for s in stages),
    )


def _bars(cells: dict[str, Any], names: dict[str, str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    return [
        ((names or {}).get(name, name.replace("_", " ")), cell) for name, cell in sorted(cells.items(), key=lambda c: -c[1]["accuracy"])
    ]


def _thumbnail(path: Path) -> str:
    """A data: address; empty where the picture does not decode."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _percent(value: Any, digits: int = 1) -> str:
    """A share as per cent; a dash for None, and for what the template does not find."""
    return "–" if not isinstance(value, int | float) else f"{100 * value:.{digits}f}\u202f%"


def _points(value: Any) -> str:
    return "–" if not isinstance(value, int | float) else f"{100 * value:+.1f}".replace("-", "−")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _print(summary: dict[str, Any]) -> None:
    table = Table(
        title=f"held-out questions that need the picture, split {summary['split']}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("stage", no_wrap=True)
    for name in ("steps", "min", "layout", "px", "loss", "right %", "gray %", "majority %", "new files %"):
        table.add_column(name, justify="right", no_wrap=True)

    def share(cell: dict[str, Any] | None, name: str) -> str:
        return f"{100 * cell[name]:.1f}" if cell and name in cell else "-"

    for f in summary["stages"]:
        table.add_row(
            f["stage"] if f["done"] else f["stage"] + " (not done)",
            str(f["steps"]),
            f"{f['seconds'] / 60:.1f}",
            f["layout"],
            "-".join(dict.fromkeys(str(p["image_size"]) for p in f["phases"])),
            f"{f['last_loss']:.2f}",
            *(share(f["evaluation"], name) for name in ("accuracy", "gray", "majority")),
            share(f["new_sources"], "accuracy"),
        )
    console = Console()
    Console(width=max(console.width, 88)).print(table)
