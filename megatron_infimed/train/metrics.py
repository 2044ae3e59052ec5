"""What a step leaves behind: one JSON line in metrics.jsonl, the same figures in TensorBoard, and every N steps one line for people.

After a resumption metrics.jsonl continues at the checkpoint's step: lines of steps that were lost and are done again are removed first, so
the file always has each step once.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch

from megatron_infimed.config import Recipe
from megatron_infimed.data.schedule import Phase
from megatron_infimed.train.step import StepResult

log = logging.getLogger(__name__)


class Metrics:
    """Kept by the main process alone."""

    def __init__(self, recipe: Recipe, run: Path, first_step: int, total_steps: int, processes: int = 1) -> None:
        self.every, self.total, self.stage, self.processes = recipe.log.every, total_steps, recipe.stage, processes
        path = run / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first_step]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(kept))
        aside.replace(path)
        self.file = path.open("a", buffering=1)
        self.board = None
        if recipe.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self.clock = time.perf_counter()

    def record(self, step: int, phase: Phase, result: StepResult, waited: float) -> None:
        """`step` counts from 1; `waited` is what this process waited for data, in seconds."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        c = result.counts
        used = c.text_tokens + c.image_tokens
        line: dict[str, Any] = {
            "step": step,
            "stage": self.stage,
            "processes": self.processes,
            "phase": phase.number,
            "image_size": phase.image_size,
            "tokens_per_image": phase.tokens_per_image,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "documents": c.documents,
            "images": c.images,
            "corrupt": c.corrupt,
            "text_tokens": c.text_tokens,
            "image_tokens": c.image_tokens,
            "target_tokens": c.target_tokens,
            "padding": c.padding,
            "fill": round(used / max(used + c.padding, 1), 5),
            "seconds": round(seconds, 4),
            "data_wait": round(waited, 4),
            "tokens_per_second": round(used / seconds, 1),
            "memory_bytes": _memory(),
        }
        self.file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name in ("loss", "grad_norm", "lr", "fill", "tokens_per_second", "image_size", "tokens_per_image", "images", "data_wait"):
                self.board.add_scalar(name, line[name], step)
        if step % self.every == 0 or step == self.total:
            log.info(
                "%s %d/%d  %dpx/%dt  loss %.4f  grad_norm %.3f  lr %.2e  %.0f tokens/s  fill %.1f %%  waited %.0f %%",
                self.stage, step, self.total, phase.image_size, phase.tokens_per_image, result.loss, result.grad_norm, result.lr,
                line["tokens_per_second"], 100 * line["fill"], 100 * waited / seconds,
            )  # fmt: skip

    def pause(self) -> None:
        """What passed since the last step (a checkpoint being written) is not the next step's time."""
        self.clock = time.perf_counter()

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board is not None:
            self.board.close()


def _lines(path: Path) -> list[str]:
    """Whole lines only: a killed process may have left half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _memory() -> int:
    """Peak bytes: of the device with CUDA, resident in RAM without."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
