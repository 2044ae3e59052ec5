"""The training step. Start reading here.

A step is one global batch: `recipe.batch.rows` packed rows, shared by the data parallel ranks, each of which pushes its micro-batches through
Megatron-Core's schedule. The loss is a sum over target tokens and is divided once, by the number of target tokens in the whole global batch:
so a row with few targets, or a rank without images, weighs neither more nor less than in one process. What all processes need to know of
each other (loss, counts, times, memory) travels in one reduction before the update, and the guards judge by it: the same verdict everywhere.
"""

from __future__ import annotations

import itertools
import resource
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_infimed.config import Recipe
from megatron_infimed.counts import Counts
from megatron_infimed.data.batch import PackedBatch
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import cpu, groups
from megatron_infimed.parallel.groups import Ranks
from megatron_infimed.train.guards import Guards, Verdict
from megatron_infimed.train.optimizer import learning_rate
from megatron_infimed.train.watchdog import Place


class MicroBatches(Sized, Iterable[PackedBatch], Protocol):
    """This process's part of a global batch; a list, or what the loader yields while it still reads."""


@dataclass
class Run:
    """What a step works on."""

    recipe: Recipe
    ranks: Ranks
    pieces: list[DistributedDataParallel]
    """One; with virtual pipelining `parallel.virtual` of them."""
    optimizer: ChainedOptimizer
    total_steps: int
    guards: Guards
    waited: Callable[[], float] = lambda: 0.0
    """Seconds this process has waited for data, since the beginning."""
    at: Callable[[Place, int], None] = lambda place, step: None
    """Told where this process is."""
    stop: bool = False
    """Set by a signal; every process learns of it in the same step."""
    step: int = 0
    """The one that is being done, counted from 0."""
    clock: _Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = _Clock(self.ranks.device)
        self.pieces[0].config.finalize_model_grads_func = self._finalize

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        self.clock.arrived()
        self.at("update", self.step)
        finalize_model_grads(*args, **kwargs)

    @property
    def models(self) -> list[InfiMed]:
        """The pieces without Megatron's wrapper: what checkpoints hold."""
        return [cast(InfiMed, piece.module) for piece in self.pieces]


@dataclass(frozen=True)
class StepResult:
    """A global batch's figures, the same on every process. The lists have an entry for each rank."""

    loss: float
    """Mean over the target tokens of the global batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    verdict: Verdict
    """Whether the update was made."""
    counts: Counts
    stop: bool
    busy: list[float]
    """Seconds from the start of the step to the end of its own last backward pass, without waiting for data."""
    waits: list[float]
    """Seconds it waited for data."""
    memory: list[int]
    """Peak bytes: of the device with CUDA, resident in RAM without."""


def train_step(run: Run, step: int, batches: MicroBatches) -> StepResult:
    """One update from this process's micro-batches of global batch `step`."""
    run.step = step
    lr = learning_rate(step, run.total_steps, run.recipe.optimizer)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    zero_gradients(run)
    waited = run.waited()
    run.clock.start()
    sums, counts = forward_backward(run, step, batches)
    shared = _over_all_processes(run, sums, counts, run.waited() - waited)
    with cpu.cuda_means_cpu():
        run.optimizer.prepare_grads()
        grad_norm = float(run.optimizer.get_grad_norm())
        verdict = run.guards.judge(shared.loss, grad_norm)
        if verdict.action == "apply":
            if run.recipe.optimizer.clip > 0:
                clip_grad_by_total_norm_fp32(cast(list[Tensor], run.optimizer.get_parameters()), run.recipe.optimizer.clip, grad_norm)
            run.optimizer.step_with_ready_grads()
    return StepResult(grad_norm=grad_norm, lr=lr, verdict=verdict, **vars(shared))


def zero_gradients(run: Run) -> None:
    for piece in run.pieces:
        piece.zero_grad_buffer()
    run.optimizer.zero_grad()


def forward_backward(run: Run, step: int, batches: MicroBatches) -> tuple[list[dict[str, Tensor]], list[Counts]]:
    """Adds the micro-batches' gradients; each one's figures from the last stage (elsewhere none), and what each held."""
    counts: list[Counts] = []
    sums = through_pieces(run.recipe, run.pieces, _feed(run, step, batches, counts), len(batches), partial(forward_step, run, step))
    return sums, counts


def through_pieces(
    recipe: Recipe,
    pieces: Sequence[torch.nn.Module],
    feed: Iterator[PackedBatch],
    micro_batches: int,
    forward_step: Callable[[Iterator[PackedBatch], Any], Any],
    forward_only: bool = False,
) -> list[dict[str, Tensor]]:
    """Pushes micro-batches through this process's pieces by Megatron-Core's schedule; what the last stage logs of each."""
    feeds = itertools.tee(feed, len(pieces))  # each piece sees every micro-batch
    one = len(pieces) == 1
    schedule: Any = get_forward_backward_func()
    return schedule(
        forward_step_func=forward_step,
        data_iterator=feeds[0] if one else list(feeds),
        model=pieces[0] if one else list(pieces),
        num_microbatches=micro_batches,
        seq_length=recipe.batch.micro_rows * recipe.data.capacity,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _feed(run: Run, step: int, batches: MicroBatches, counts: list[Counts]) -> Iterator[PackedBatch]:
    run.at("data", step)
    for batch in batches:
        counts.append(batch.counts)
        run.at("forward_backward", step)
        yield batch.share(run.ranks.context, run.ranks.context_size).to(run.ranks.device)
        run.at("data", step)


def forward_step(run: Run, step: int, batches: Iterator[PackedBatch], piece: DistributedDataParallel):
    """Megatron-Core's forward step: the piece's output, and how the last one makes a loss of it."""
    batch = next(batches)
    if run.recipe.model.dropout:
        # Masks are a function of what they fall on, like everything else: nothing to save, and the same rows get the same masks.
        place = (run.recipe.seed, step, batch.rows, run.ranks.pipeline, piece.module.piece, run.ranks.context)
        groups.seed(zlib.crc32(repr(place).encode()))
    return piece(batch), sum_loss


def sum_loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss to differentiate, tokens to divide by, what to log): with these three Megatron-Core divides once, globally."""
    total = losses.sum()
    return total, torch.tensor(losses.numel(), dtype=torch.int, device=losses.device), {"loss_sum": total.detach()}


@dataclass(frozen=True)
class _Shared:
    loss: float
    counts: Counts
    stop: bool
    busy: list[float]
    waits: list[float]
    memory: list[int]


def _over_all_processes(run: Run, sums: list[dict[str, Tensor]], counts: list[Counts], waited: float) -> _Shared:
    ranks = run.ranks
    loss_sum = sum(float(s["loss_sum"]) for s in sums) if ranks.last_stage and ranks.tensor == 0 else 0.0
    held = sum(counts, Counts()) if ranks.first_stage else Counts()
    held = held if ranks.speaks else Counts(corrupt=held.corrupt)  # each process decodes images of its own
    by_rank = torch.zeros(3, ranks.world, dtype=torch.float64)
    by_rank[:, ranks.rank] = torch.tensor([run.clock.seconds() - waited, waited, _peak_memory()], dtype=torch.float64)
    figures = [loss_sum, float(run.stop), *(getattr(held, f.name) for f in fields(Counts))]
    packed = torch.cat([torch.tensor(figures, dtype=torch.float64), by_rank.flatten()]).to(ranks.device)
    dist.all_reduce(packed)
    loss_sum, stops, *figures = packed[: len(figures)].tolist()
    busy, waits, memory = packed[-by_rank.numel() :].view_as(by_rank).tolist()
    total = Counts(*(int(f) for f in figures))
    return _Shared(loss_sum / max(total.target_tokens, 1), total, stops > 0, busy, waits, [int(m) for m in memory])


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Clock:
    """How long a process computes before it has to meet the others; with CUDA by events, which cost no synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self.times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def arrived(self) -> None:
        self._mark(1)

    def seconds(self) -> float:
        if self.events is None:
            return self.times[1] - self.times[0]
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1000

    def _mark(self, which: int) -> None:
        if self.events is None:
            self.times[which] = time.perf_counter()
        else:
            self.events[which].record()
