"""Real training runs of a tiny model on real gloo processes, by the command a user types; the figures come from metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet
import yaml

from tests.tiny import tiny_images, tiny_tokenizer

RECIPE = {
    "output": "set by each run",
    "model": {
        "vision": {"image_size": 56, "patch_size": 14, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "ffn_hidden_size": 48},
        "language": {
            "hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_hidden_size": 64, "vocab_size": 512,
        },
    },
    "trainable": {"vision": True},
    "precision": {"params": "float32"},
    "data": {"capacity": 128, "max_images": 4, "decode_threads": 1, "document_alignment": 4},  # 4: for context parallelism over two
    "schedule": [{"until": 0.5, "image_size": 28, "tokens_per_image": 4}, {"until": 1.0, "image_size": 56, "tokens_per_image": 16}],
    "batch": {"rows": 4},
    "optimizer": {"lr": 2e-3, "clip": 0.3},
    "checkpoint": {"every": 0, "keep": 2},
    "log": {"every": 1, "tensorboard": False},
}  # fmt: skip


def make_data(folder: Path) -> Path:
    """Shards of 60 documents with 0 to 2 images, and a recipe over them."""
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    images = tiny_images(40, seed=0)
    rows = []
    for i in range(60):
        n = i % 3
        words = " ".join(["chest", "film", "normal", "effusion"][(i + k) % 4] for k in range(3 + i % 5))
        rows.append(
            {"images": [{"bytes": images[(i + k) % 40], "path": None} for k in range(n)], "question": words + "?", "answer": words[::-1]}
        )
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    subprocess.run(
        [sys.executable, "tools/preprocess_multimodal.py", "--input", folder / "rows.parquet",
         "--tokenizer", tokenizer, "--output", folder / "shard"],
        check=True, capture_output=True,
    )  # fmt: skip
    recipe = {
        **RECIPE,
        "data": {**RECIPE["data"], "tokenizer": str(tokenizer), "sources": [{"prefix": str(folder / "shard"), "epochs": 1}]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def start(recipe: Path, output: Path, *overrides: str, processes: int = 1, **environment: str) -> subprocess.Popen[str]:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "megatron_infimed", "train", str(recipe), f"output={output}", *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def train(recipe: Path, output: Path, *overrides: str, processes: int = 1, code: int = 0, **environment: str) -> str:
    """Runs to the end; the printed text."""
    process = start(recipe, output, *overrides, processes=processes, **environment)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text[-4000:]
    return text


def train_all(recipe: Path, runs: list[tuple[Path, list[str]]], processes: int = 1) -> str:
    """Several runs in the same processes, one after another; the printed text."""
    words = json.dumps([[f"output={output}", *overrides] for output, overrides in runs])
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "tests.distributed.worker", str(recipe), words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def figures(output: Path) -> list[tuple[float, float]]:
    """(loss, grad_norm) of each step; every step must be there once, in order."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(line["loss"], line["grad_norm"]) for line in lines]


def worst(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Largest relative difference over all losses and gradient norms."""
    assert len(one) == len(other) > 0
    return max(abs(a - b) / abs(b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool], number: int = signal.SIGKILL, timeout: float = 120) -> str:
    """Sends a signal to the process and all below it once the condition holds; what was printed until its end."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < end, "the moment to kill never came"
        time.sleep(0.002)
    top = psutil.Process(process.pid)
    for one in (top, *top.children(recursive=True)):  # torchrun's workers are in sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(number)
    return process.communicate(timeout=120)[0]
