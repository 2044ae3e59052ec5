"""Preprocessing: rows and megabytes a second of one core, our `preprocess` against the script that one would write without it.

    python -m tests.benchmarks.preprocessing [--rows 3000] [--images 600] [--rounds 3] [--folder /tmp]

The input is a LLaVA json over JPEGs of 640 x 480 (crops of scikit-image's photographs with a little grain, about 86 KB each), every image
used by rows / images neighbours. The plain script does the same job row by row: json, Pillow decodes the image, `tokenizers` encodes,
Megatron-Core's IndexedDatasetBuilder writes text (with the loss mask) and image; once it does so for every row, and once it remembers the
images it has seen. That they make the same text.bin is checked (but for the forgetful script, whose image numbers are its own). Ours also
hashes, looks for identifying text, and can be killed and goes on. CPU time is that of all threads and processes, so a rate is one of a
core; a cell is the median of the rounds, in which all take turns. The second table says where the CPU time of one process goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import typer
from PIL import Image

from megatron_infimed.data.shard_writer import ShardWriter
from megatron_infimed.intake import images as images_module
from megatron_infimed.preprocess import pieces
from megatron_infimed.preprocess import preprocess as preprocess_module
from megatron_infimed.preprocess.engines import Engine
from tests.tiny import TEXTS, tiny_tokenizer

PR_SET_CHILD_SUBREAPER = 36
PICTURES = ("astronaut", "coffee", "chelsea", "rocket", "retina", "immunohistochemistry")


def make_images(folder: Path, count: int) -> int:
    """Writes NUMBER.jpg; returns their bytes."""
    from skimage import data

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(getattr(data, name)()[..., :3]) for name in PICTURES]
    folder.mkdir()
    size = 0
    for i in range(count):
        picture = pictures[i % len(pictures)]
        width = int(rng.integers(picture.width // 2, picture.width))
        height = min(width * 3 // 4, picture.height)
        left, top = int(rng.integers(picture.width - width + 1)), int(rng.integers(picture.height - height + 1))
        crop = np.asarray(picture.resize((640, 480), Image.Resampling.BICUBIC, (left, top, left + width, top + height)))
        grain = rng.normal(0, 4, crop.shape[:2])[..., None]
        out = folder / f"{i}.jpg"
        Image.fromarray(np.clip(crop + grain, 0, 255).astype(np.uint8)).save(out, quality=90)
        size += out.stat().st_size
    return size


def make_rows(file: Path, rows: int, images: int) -> int:
    """Writes a LLaVA json of two exchanges a row; returns its bytes."""
    rng = np.random.default_rng(0)
    words = sorted({word for text in TEXTS for word in text.split()})

    def say(count: int) -> str:
        return " ".join(rng.choice(words, count).tolist())

    def talk(i: int) -> dict[str, Any]:
        said = (f"<image>\n{say(12)}?", say(60), f"{say(8)}?", say(30))
        turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
        return {"id": f"row-{i}", "image": f"{i * images // rows}.jpg", "conversations": turns}

    return file.write_text(json.dumps([talk(i) for i in range(rows)]))


def plain(folder: Path, output: Path, remember: bool) -> None:
    """The script without us."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tok" / "tokenizer.json"))
    text = IndexedDatasetBuilder(f"{output}.text.bin", np.int32, multimodal=True)
    image = IndexedDatasetBuilder(f"{output}.image.bin", np.uint8)
    seen: dict[str, int] = {}
    stored = 0

    def add(words: str, mode: int) -> None:
        text.add_item(torch.tensor(tokenizer.encode(words, add_special_tokens=False).ids, dtype=torch.int32), mode)

    for row in json.loads((folder / "rows.json").read_text()):
        number = seen.get(row["image"]) if remember else None
        if number is None:
            data = (folder / "images" / row["image"]).read_bytes()
            try:
                with Image.open(io.BytesIO(data)) as picture:
                    picture.load()
            except OSError:
                continue
            image.add_item(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            image.end_document()
            number = seen[row["image"]] = stored
            stored += 1
        context = "<|im_start|>user\n"
        for turn in row["conversations"]:
            if turn["from"] == "gpt":
                add(f"{context}<|im_end|>\n<|im_start|>assistant\n", 0)
                add(f"{turn['value']}<|im_end|>", 1)
                context = "\n<|im_start|>user\n"
            elif turn["value"].startswith("<image>\n"):
                add(f"{context}<|vision_start|>", 0)
                text.add_item(torch.tensor([number], dtype=torch.int32), 2)
                context = f"<|vision_end|>{turn['value'].removeprefix('<image>').strip()}"
            else:
                context += turn["value"]
        add("\n", 0)
        text.end_document()
    text.finalize(f"{output}.text.idx")
    image.finalize(f"{output}.image.idx")


def ours(folder: Path, output: Path, tasks: int) -> None:
    preprocess_module.preprocess(
        [folder / "rows.json"], output, folder / "tok", images=[folder / "images"], threads=1, piece_rows=512, engine=Engine(tasks=tasks)
    )


@contextlib.contextmanager
def watched(spent: Counter[str]) -> Iterator[None]:
    """Adds the CPU time of the parts of a task to `spent`. Images are handled in a thread; all else while that one waits."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.thread_time if "images" in name else time.process_time  # `tokenizers` has threads of its own

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += clock() - begin  # type: ignore[assignment]

        return call

    def timed_rows(self: Any) -> Iterator[Any]:
        rows = iter_rows(self)
        step = timed("read rows, map fields, look for identifying text", lambda: next(rows, None))
        while (row := step()) is not None:
            yield row

    iter_rows = pieces.Rows.__iter__
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(pieces.Rows, "__iter__", timed_rows))
        for name, place, function in (
            ("read images", images_module, "read"),
            ("decode images to check them", images_module, "check_image"),
            ("tokenise", pieces, "encode_batch"),
            ("write pieces", ShardWriter, "add_image"),
            ("write pieces", ShardWriter, "add_document"),
            ("write pieces", ShardWriter, "finish"),
            ("merge", preprocess_module, "merge"),
        ):
            stack.enter_context(mock.patch.object(place, function, timed(name, getattr(place, function))))
        yield


def adopt() -> None:
    """Makes this process the parent of processes whose own parent ends, so that `cpu` counts them (datatrove's fork server)."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def cpu() -> float:
    """Seconds of this process and of all that it started, once they have ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main(rows: int = 3000, images: int = 600, rounds: int = 3, folder: Path = Path(tempfile.gettempdir())) -> None:
    names = ("numpy", "pillow", "simplejpeg", "tokenizers", "megatron-core", "datatrove")
    print(f"python {platform.python_version()},", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    adopt()
    spent: list[Counter[str]] = []

    def one_task(work: Path, output: Path) -> None:
        spent.append(Counter())
        with watched(spent[-1]):
            ours(work, output, 1)

    ways: dict[str, Callable[[Path, Path], None]] = {
        "ours, one process": one_task,
        "ours, --tasks 2": lambda work, output: ours(work, output, 2),
        "plain script, remembers images": lambda work, output: plain(work, output, True),
        "plain script": lambda work, output: plain(work, output, False),
    }
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=folder, prefix="preprocessing-") as scratch:
        work = Path(scratch)
        tiny_tokenizer(work / "tok")
        size = make_images(work / "images", images)
        megabytes = (size + make_rows(work / "rows.json", rows, images)) / 1e6
        print(f"{rows} rows, {images} images, {megabytes:.1f} MB of input, {size / images / 1e3:.0f} KB an image\n")
        plain(work, work / "warm", True)  # imports
        made: dict[str, bytes] = {}
        for _ in range(rounds):
            for name, way in ways.items():
                output = work / "out" / "set"
                output.parent.mkdir()
                begin, begin_cpu = time.perf_counter(), cpu()
                way(work, output)
                took[name].append((time.perf_counter() - begin, cpu() - begin_cpu))
                made[name] = Path(f"{output}.text.bin").read_bytes()
                shutil.rmtree(output.parent)
    assert len({text for name, text in made.items() if name != "plain script"}) == 1, "they do not make the same text"

    heads = ["", "CPU s", "wall s", "rows / CPU s", "MB / CPU s", "CPU against ours"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for name, times in took.items():
        seconds, wall = statistics.median(c for _, c in times), statistics.median(w for w, _ in times)
        ratio = statistics.median(c / o for (_, c), (_, o) in zip(times, took["ours, one process"], strict=True))
        print(f"| {name} | {seconds:.2f} | {wall:.2f} | {rows / seconds:,.0f} | {megabytes / seconds:.1f} | {ratio:.2f} |")
    print("\n| one process | CPU µs a row | % |\n|---|---|---|")
    total = statistics.median(c for _, c in took["ours, one process"])
    parts = {name: statistics.median(s[name] for s in spent) for name in spent[0]}
    for name, seconds in (*parts.items(), ("the rest: SHA-256 of images, hashing of the input, threads", total - sum(parts.values()))):
        print(f"| {name} | {seconds / rows * 1e6:.0f} | {100 * seconds / total:.0f} |")


if __name__ == "__main__":
    typer.run(main)
