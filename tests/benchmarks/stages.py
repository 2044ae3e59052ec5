"""What it costs to ask where a chain stands, by the number of files that a stage reads, against DVC on the same folder.

    python tests/benchmarks/stages.py [--files 1000 10000 100000] [--dvc DVC_EXECUTABLE] [--rounds 5]

CPU seconds and wall-clock seconds of whole processes, medians of alternating rounds; the files are small and in the page cache. DVC (`pip install
dvc` into an environment of its own) is asked `dvc status` for a pipeline of the same one stage. Both are first seen to notice one changed file.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml

OURS = [sys.executable, "-m", "megatron_infimed", "stages"]


def cost(words: list[str], folder: Path) -> tuple[float, float, str]:
    """CPU seconds (with children), wall-clock seconds, and what was printed."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - begun, done.stdout + done.stderr


def prepare(folder: Path, files: int, dvc: str | None) -> dict[str, list[str]]:
    """A folder of small files, and a stage over it that is done; the commands that ask where it stands."""
    for i in range(files):
        path = folder / "raw" / f"{i // 1000:04d}" / f"{i:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(64))
    chain = {
        "chain": "c",
        "output": "notes",
        "stages": {"a": {"run": "cp raw/0000/0000000.jpg out", "inputs": ["raw"], "outputs": ["out"]}},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(chain))
    cost([*OURS, "run", "c.yaml"], folder)
    asks = {"stages status": [*OURS, "status", "c.yaml"]}
    if dvc:
        stage = {"stages": {"a": {"cmd": "cp raw/0000/0000000.jpg copied", "deps": ["raw"], "outs": [{"copied": {"cache": False}}]}}}
        (folder / "dvc.yaml").write_text(yaml.safe_dump(stage))
        cost([dvc, "init", "--no-scm", "--quiet"], folder)
        cost([dvc, "repro", "--quiet"], folder)
        asks["dvc status"] = [dvc, "status"]
    return asks


def main(
    files: Annotated[tuple[int, int, int], typer.Option()] = (1_000, 10_000, 100_000),
    dvc: Annotated[str | None, typer.Option(help="DVC's executable; without it only ours is measured")] = None,
    rounds: int = 5,
) -> None:
    print("files    command         CPU s   wall s   against DVC")
    for number in files:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            asks = prepare(folder, number, dvc)
            seen: dict[str, list[tuple[float, float]]] = {name: [] for name in asks}
            for _ in range(rounds):
                for name, words in asks.items():
                    cpu, wall, said = cost(words, folder)
                    assert "1 of 1 stages done" in said or "up to date" in said, said
                    seen[name].append((cpu, wall))
            (folder / "raw" / "0000" / "0000001.jpg").write_bytes(b"changed")
            for words in asks.values():
                said = cost(words, folder)[2]
                assert "input raw changed" in said or "modified" in said, said
        medians = {name: tuple(statistics.median(column) for column in zip(*values, strict=True)) for name, values in seen.items()}
        for name, (cpu, wall) in medians.items():
            ratio = f"{cpu / medians['dvc status'][0]:.2f}" if dvc else ""
            print(f"{number:<8,d} {name:<14s} {cpu:6.2f}   {wall:6.2f}   {ratio}")


if __name__ == "__main__":
    typer.run(main)
