"""What a step leaves behind: one JSON line in metrics.jsonl, the same figures in TensorBoard, every N steps a line for people, and one at the end.

Rates are of time in steps: what passes while a checkpoint is written belongs to none (`pause`). A stretch is a step, or several added up; a
step's JSON line, the printed line (all steps since the one before) and the closing line are three stretches under the same arithmetic.
After a resumption metrics.jsonl continues at the checkpoint's step: lines of steps that were lost and are done again are removed first, so
the file always has each step once.

A process that is late makes all others wait, so no clock of theirs shows who it was. Each therefore reports the seconds it was busy by
itself, and ranks that stand out from the others of their pipeline stage (other stages have other work) are named.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined] # made at import

from megatron_infimed.config import Recipe
from megatron_infimed.counts import Counts
from megatron_infimed.data.schedule import Phase
from megatron_infimed.flops import Peak, Work, peak_of, step_flops
from megatron_infimed.train.step import StepResult

log = logging.getLogger(__name__)

LATE_SHARE, LATE_SECONDS = 1.2, 0.010
"""A rank is named when it is this far above the median rank: both."""
LATE_STEPS = 5
"""Steps it must have been so for, in the median, at least: a single step's jitter names nobody."""
NAMED = 4
"""Ranks in one message."""


@dataclass(frozen=True)
class Stretch:
    """One step, or several together."""

    seconds: float
    waited: float
    """Seconds that the rank which waited longest for data did so."""
    counts: Counts
    work: Work

    def __add__(self, other: Stretch) -> Stretch:
        return Stretch(self.seconds + other.seconds, self.waited + other.waited, self.counts + other.counts, self.work + other.work)

    @property
    def tokens(self) -> int:
        """Useful ones."""
        return self.counts.text_tokens + self.counts.image_tokens

    def rates(self, processes: int, peak: Peak | None) -> dict[str, float]:
        """Tokens per second of all processes, TFLOP/s of one; MFU where the device is known, against the dense peak of either format."""
        model, hardware = (flops / self.seconds / processes for flops in (self.work.model, self.work.hardware))
        peaks = peak._asdict() if peak else {}
        return {
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "text_tokens_per_second": round(self.counts.text_tokens / self.seconds, 1),
            "image_tokens_per_second": round(self.counts.image_tokens / self.seconds, 1),
            "padding_per_second": round(self.counts.padding / self.seconds, 1),
            "model_tflops_per_process": float(f"{model / 1e12:.5g}"),
            "hardware_tflops_per_process": float(f"{hardware / 1e12:.5g}"),
            **{f"mfu_{format}": round(model / most, 5) for format, most in peaks.items() if most},
        }


NOTHING = Stretch(0.0, 0.0, Counts(), Work())


class Metrics:
    """Kept by the main process alone.

    Args:
        first_step: steps already done.
        hosts: the machine each rank runs on, by rank; their number is that of the processes.
    """

    def __init__(self, recipe: Recipe, run: Path, first_step: int, total_steps: int, hosts: Sequence[str]) -> None:
        self.recipe, self.total, self.hosts = recipe, total_steps, hosts
        self.peak = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.process = psutil.Process()
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
        self.busy: deque[Sequence[float]] = deque(maxlen=max(recipe.log.every, LATE_STEPS))
        self.waits: deque[Sequence[float]] = deque(maxlen=self.busy.maxlen)
        self.since_line = self.whole = NOTHING
        self.first_step = self.step = first_step
        self.busy_sum = np.zeros(len(hosts))
        self.memory = (0, 0)
        self.paused = 0.0
        self.clock = perf_counter()

    def record(self, step: int, phase: Phase, result: StepResult) -> None:
        """`step` counts from 1."""
        now = perf_counter()
        parts = step_flops(self.recipe, result.counts, phase.image_size)
        stretch = Stretch(now - self.clock, max(result.waits), result.counts, sum(parts.values(), Work()))
        self.clock, self.step = now, step
        self.since_line, self.whole = self.since_line + stretch, self.whole + stretch
        self.busy.append(result.busy)
        self.waits.append(result.waits)
        self.busy_sum += result.busy
        self.memory = max((peak, rank) for rank, peak in enumerate(result.memory))
        line = self._line(step, phase, result, stretch) | {"model_flops": {name: work.model for name, work in parts.items()}}
        if step % self.recipe.log.every == 0 or step == self.total:
            line |= self._print(step, phase, result)
        self.file.write(json.dumps(line) + "\n")
        if self.board is not None:
            values = [Summary.Value(tag=name, simple_value=line[name]) for name in _ON_BOARD if name in line]
            self.board._get_file_writer().add_summary(Summary(value=values), step)  # add_scalar for each takes four times as long

    def _line(self, step: int, phase: Phase, result: StepResult, stretch: Stretch) -> dict[str, Any]:
        c, busy, waits = result.counts, np.array(result.busy), np.array(result.waits)
        return {
            "step": step,
            "of_steps": self.total,
            "stage": self.recipe.stage,
            "processes": len(self.hosts),
            "phase": phase.number,
            "image_size": phase.image_size,
            "tokens_per_image": phase.tokens_per_image,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "applied": result.verdict.action == "apply",
            "documents": c.documents,
            "images": c.images,
            "corrupt": c.corrupt,
            "text_tokens": c.text_tokens,
            "image_tokens": c.image_tokens,
            "target_tokens": c.target_tokens,
            "padding": c.padding,
            "pairs": c.pairs,
            "fill": round(stretch.tokens / max(stretch.tokens + c.padding, 1), 5),
            "seconds": round(stretch.seconds, 4),
            **stretch.rates(len(self.hosts), self.peak),
            "data_wait": round(stretch.waited, 4),
            "data_wait_median": round(float(np.median(waits)), 4),
            "data_wait_rank": int(waits.argmax()),
            "busy_min": round(float(busy.min()), 4),
            "busy_median": round(float(np.median(busy)), 4),
            "busy_max": round(float(busy.max()), 4),
            "busy_rank": int(busy.argmax()),
            "memory_bytes": self.memory[0],
            "memory_rank": self.memory[1],
            "memory_now_bytes": torch.cuda.memory_allocated() if torch.cuda.is_available() else self.process.memory_info().rss,
        }

    def _print(self, step: int, phase: Phase, result: StepResult) -> dict[str, list[int]]:
        stretch, self.since_line = self.since_line, NOTHING
        log.info(
            "%s %d/%d  %dpx/%dt  loss %.4f  grad %.3f  lr %.1e  %s",
            self.recipe.stage, step, self.total, phase.image_size, phase.tokens_per_image, result.loss, result.grad_norm, result.lr,
            self._speed(stretch),
        )  # fmt: skip
        if len(self.busy) < LATE_STEPS:
            return {}
        slow, waiting = (late_ranks(steps, self.recipe.parallel.pipeline) for steps in (self.busy, self.waits))
        self._name(slow, "slower: {0.ratio:.2f}x the median")
        self._name(waiting, "waits longer for data: {0.seconds:.3f} s a step, median {0.usual:.3f} s")
        return {"slow_ranks": [late.rank for late in slow], "waiting_ranks": [late.rank for late in waiting]}

    def _name(self, ranks: Sequence[Late], how: str) -> None:
        texts = [f"rank {late.rank} ({self.hosts[late.rank]}) {how.format(late)}" for late in ranks]
        if texts:
            log.warning("; ".join(texts[:NAMED]) + f"; and {len(texts) - NAMED} more" * (len(texts) > NAMED))

    def _speed(self, stretch: Stretch) -> str:
        c, rates = stretch.counts, stretch.rates(len(self.hosts), self.peak)
        text, image, padding = (100 * n / max(stretch.tokens + c.padding, 1) for n in (c.text_tokens, c.image_tokens, c.padding))
        tflops = rates["model_tflops_per_process"]
        speed = (f"{tflops:,.0f}" if tflops >= 10 else f"{tflops:.2g}") + " TFLOP/s"  # of one process, like MFU
        if "mfu_bf16" in rates:
            speed += f" {100 * rates['mfu_bf16']:.1f} % MFU"
        if self.recipe.precision.fp8 != "off" and "mfu_fp8" in rates:
            speed += f" ({100 * rates['mfu_fp8']:.1f} % of fp8)"
        waited = 100 * stretch.waited / stretch.seconds
        tokens = f"{rates['tokens_per_second']:,.0f} tokens/s (text {text:.0f} image {image:.0f} pad {padding:.0f} %)"
        return f"{tokens}  {speed}  waited {waited:.0f} %"

    def pause(self) -> None:
        """What passed since the last step (a checkpoint being written) is not the next step's time."""
        now = perf_counter()
        self.paused += now - self.clock
        self.clock = now

    def close(self) -> None:
        """Prints the closing line: the steps since this start, not those before a resumption."""
        self.pause()
        if self.step > self.first_step:
            log.info(
                "%s: steps %d to %d: %s useful tokens in %.2f hours (and %.2f between steps), %s, %speak memory %.1f GiB on rank %d",
                self.recipe.stage, self.first_step + 1, self.step, f"{self.whole.tokens:,}", self.whole.seconds / 3600, self.paused / 3600,
                self._speed(self.whole), self._slowest(), self.memory[0] / 2**30, self.memory[1],
            )  # fmt: skip
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board is not None:
            self.board.close()

    def _slowest(self) -> str:
        ratios = self.busy_sum.reshape(self.recipe.parallel.pipeline, -1) / _usual(self.busy_sum, self.recipe.parallel.pipeline)
        rank = int(ratios.argmax())
        return f"slowest rank {rank} ({self.hosts[rank]}) {ratios.max():.2f}x the median, " if len(self.hosts) > 1 else ""


class Late(NamedTuple):
    """A rank that stands out."""

    rank: int
    seconds: float
    """Of a step, in the median."""
    usual: float
    """The same of the median rank of its pipeline stage."""

    @property
    def ratio(self) -> float:
        return self.seconds / self.usual


def late_ranks(steps: Iterable[Sequence[float]], stages: int) -> list[Late]:
    """Ranks that in the median of the steps take far longer than the median rank of their pipeline stage; the latest first.

    Processes that share a row (tensor, context, pipeline parallel) meet within the step too, so they may stand out together.

    Args:
        steps: for each step, seconds by rank.
    """
    by_rank = np.median(np.array(list(steps)), axis=0)
    usual = _usual(by_rank, stages).repeat(len(by_rank) // stages)
    found = np.flatnonzero((by_rank > LATE_SHARE * usual) & (by_rank > usual + LATE_SECONDS))
    late = [Late(int(rank), float(by_rank[rank]), float(usual[rank])) for rank in found]
    return sorted(late, key=lambda one: one.usual - one.seconds)


def _usual(by_rank: NDArray[np.float64], stages: int) -> NDArray[np.float64]:
    """[stages, 1], the median of each stage's ranks; the lower one of two, so that of two ranks the late one stands out too."""
    by_stage = np.sort(by_rank.reshape(stages, -1), axis=1)  # Megatron-Core counts ranks stage by stage
    middle = (by_stage.shape[1] - 1) // 2
    return by_stage[:, middle : middle + 1]


def _lines(path: Path) -> list[str]:
    """Whole lines only: a killed process may have left half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


_ON_BOARD = (
    "loss", "grad_norm", "lr", "fill", "image_size", "tokens_per_image", "images",
    "seconds", "tokens_per_second", "text_tokens_per_second", "image_tokens_per_second", "padding_per_second",
    "model_tflops_per_process", "hardware_tflops_per_process", "mfu_bf16", "mfu_fp8",
    "data_wait", "busy_min", "busy_median", "busy_max", "memory_bytes", "memory_now_bytes",
)  # fmt: skip
