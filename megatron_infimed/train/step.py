"""The training step. Start reading here.

A step is one global batch: `recipe.batch.rows` packed rows, shared by the data parallel ranks, each of which pushes its micro-batches through
Megatron-Core's schedule. The loss is a sum over target tokens and is divided once, by the number of target tokens in the whole global batch:
so a row with few targets, or a rank without images, weighs neither more nor less than in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_infimed.config import Recipe
from megatron_infimed.data.batch import Counts, PackedBatch
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import cpu
from megatron_infimed.parallel.groups import Ranks
from megatron_infimed.train.optimizer import learning_rate


@dataclass
class Run:
    """What a step works on."""

    recipe: Recipe
    ranks: Ranks
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    total_steps: int
    stop: bool = False
    """Set by a signal; every process learns of it in the same step."""

    @property
    def bare_model(self) -> InfiMed:
        """The model without Megatron's wrapper: what checkpoints hold."""
        return cast(InfiMed, self.model.module)


@dataclass(frozen=True)
class StepResult:
    """A global batch's figures, the same on every process."""

    loss: float
    """Mean over the target tokens of the global batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    applied: bool
    """False where the gradient was not finite and the update was skipped."""
    counts: Counts
    stop: bool


def train_step(run: Run, step: int, batches: Sequence[PackedBatch]) -> StepResult:
    """One update from this process's micro-batches of global batch `step`."""
    lr = learning_rate(step, run.total_steps, run.recipe.optimizer)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.model.zero_grad_buffer()
    run.optimizer.zero_grad()
    forward_backward: Any = get_forward_backward_func()
    sums = forward_backward(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=run.model,
        num_microbatches=len(batches),
        seq_length=run.recipe.batch.micro_rows * run.recipe.data.capacity,
        micro_batch_size=1,
        forward_only=False,
    )
    with cpu.cuda_means_cpu():
        applied, grad_norm, _ = cast(tuple[bool, float, Any], run.optimizer.step())
    loss, counts, stop = _over_all_processes(run, sums, batches)
    return StepResult(loss, float(grad_norm), lr, bool(applied), counts, stop)


def forward_step(batches: Iterator[PackedBatch], model: torch.nn.Module):
    """Megatron-Core's forward step: the stage's output, and how the last stage makes a loss of it."""
    batch = next(batches)
    device = next(model.parameters()).device
    return model(batch.to(device)), partial(sum_loss, batch.counts.target_tokens)


def sum_loss(target_tokens: int, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss to differentiate, tokens to divide by, what to log): with these three Megatron-Core divides once, globally."""
    total = losses.sum()
    return total, torch.tensor(target_tokens, dtype=torch.int, device=losses.device), {"loss_sum": total.detach()}


def _over_all_processes(run: Run, sums: list[dict[str, Tensor]], batches: Sequence[PackedBatch]) -> tuple[float, Counts, bool]:
    ranks = run.ranks
    loss_sum = sum(float(s["loss_sum"]) for s in sums) if ranks.last_stage and ranks.tensor == 0 else 0.0
    counts = sum((b.counts for b in batches), Counts()) if ranks.first_stage and ranks.tensor == 0 else Counts()
    figures = [getattr(counts, f.name) for f in fields(Counts)]
    packed = torch.tensor([loss_sum, float(run.stop), *figures], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(packed)
    total, stops, *figures = packed.tolist()
    counts = Counts(*(int(f) for f in figures))
    return total / max(counts.target_tokens, 1), counts, stops > 0
