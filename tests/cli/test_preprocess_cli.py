"""tools/preprocess_multimodal.py and tools/inspect_data.py as a user runs them."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_infimed.data.shards import Shard
from tests.tiny import tiny_images, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def run(tool: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "tools" / tool), *map(str, words)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny_tokenizer(folder / "tok")
    (folder / "images").mkdir()
    for i, data in enumerate(tiny_images(6)):
        (folder / "images" / f"{i}.img").write_bytes(data)
    rows = [
        {"id": f"<u>{i}</u>", "image": f"{i % 6}.img", "question": "Which <script>organ</script>?", "answer": f"No. {i}"} for i in range(20)
    ]
    rows.append({"id": "[bold]gone", "image": "gone.img", "question": "q", "answer": "a"})
    (folder / "set.json").write_text(json.dumps(rows))
    return folder


def test_preprocess_then_inspect(work: Path) -> None:
    words = ("--input", work / "set.json", "--images", work / "images", "--tokenizer", work / "tok", "--output", work / "out" / "set")
    done = run("preprocess_multimodal.py", *words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"documents\s+│\s+20", done.stdout) and "missing image file" in done.stdout and "[bold]gone" in done.stdout
    assert len(Shard(work / "out" / "set")) == 20
    assert "left alone" in run("preprocess_multimodal.py", *words).stdout

    page = work / "rows.html"
    shown = run(
        "inspect_data.py",
        work / "out" / "set",
        "--tokenizer",
        work / "tok",
        "--rows",
        2,
        "--capacity",
        128,
        "--tokens-per-image",
        16,
        "--html",
        page,
    )
    assert shown.returncode == 0, shown.stderr
    assert "<|im_start|>" in shown.stdout and "No. " in shown.stdout and "16 x <|image_pad|>" in shown.stdout
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;organ" in text and "<script>organ" not in text and "<u>" not in text and "&lt;u&gt;1" in text
    assert text.count("data:image/") >= 4 and not re.search(r"(src|href)=.?https?:", text)
    assert text.count('class="row"') == 2
    html.parser.HTMLParser().feed(text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--input": "gone.json"}, "gone.json: no such input file"),
        ({"--tokenizer": "nowhere"}, "nowhere: no tokenizer there"),
        ({"--images": "nowhere"}, "nowhere: no such image folder"),
        ({"--map": "nowhere"}, "nowhere: no such field map"),
        ({"--slurm-arg": "account"}, "--slurm-arg account: write KEY=VALUE"),
        ({"--engine": "slurm"}, "--slurm-partition" if shutil.which("sbatch") else "needs sbatch"),
        ({"--output": "/proc/x/y"}, "cannot write there"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(work: Path, change: dict[str, str], text: str) -> None:
    words = {"--input": work / "set.json", "--images": work / "images", "--tokenizer": work / "tok", "--output": work / "bad", **change}
    done = run("preprocess_multimodal.py", *[w for pair in words.items() for w in pair])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and text in done.stderr and done.stderr.count("\n") == 1
    assert not list(work.glob("bad.*"))


def test_dry_run(work: Path) -> None:
    words = ("--input", work / "set.json", "--images", work / "images", "--tokenizer", work / "tok", "--output", work / "dry" / "set")
    done = run("preprocess_multimodal.py", *words, "--dry-run", 100, "--tasks", 4, "--piece-rows", 6)
    assert done.returncode == 0 and done.stderr == "" and not (work / "dry").exists()
    said = " ".join(done.stdout.split())
    for text in ("1 with 21 rows; 21 were looked at", "[bold]gone", "local, 4 tasks, 4 pieces of 6 rows", "nothing was written"):
        assert text in said, done.stdout


def test_inspect_without_a_shard(work: Path) -> None:
    done = run("inspect_data.py", work / "gone", "--tokenizer", work / "tok")
    assert done.returncode == 2 and "there is no shard" in done.stderr and done.stderr.count("\n") == 1
