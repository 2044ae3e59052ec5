"""Megatron-Core's distributed AdamW, with or without Transformer Engine and apex.

The distributed optimizer keeps each process's share of the float32 weights and moments; its checkpoints reshard over any layout only when the
inner Adam has the shape of Transformer Engine's FusedAdam (step in the parameter group, exp_avg and exp_avg_sq as the only state). Where
neither Transformer Engine nor apex is installed, `Adam` below is that shape around torch's own AdamW arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, distrib_optimizer
from torch.optim.adam import adam

from megatron_infimed import config
from megatron_infimed.model import presets
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import cpu


class Adam(torch.optim.Optimizer):
    """AdamW with FusedAdam's state layout; equal to torch.optim.AdamW to the last bit."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
                 bias_correction: bool = True, **_unused: Any) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def begin(self) -> None:
        """Makes the moments that are not there yet, zero: a checkpoint may come before the first update."""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        self.begin()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in params],  # adam() counts it up itself
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=True,
            )


def _bind_adam() -> None:
    if core_optimizer.USING_PYTORCH_OPTIMIZER:
        core_optimizer.Adam = distrib_optimizer.Adam = Adam  # type: ignore[assignment]
        core_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def wrap_and_optimize(pieces: Sequence[InfiMed], recipe: config.Recipe) -> tuple[list[DistributedDataParallel], ChainedOptimizer]:
    """The model's pieces with Megatron's gradient buffers around them, and the optimizer over all."""
    _bind_adam()
    settings, overlap = recipe.optimizer, recipe.parallel.overlap
    with cpu.cuda_means_cpu():
        wrapped = [
            DistributedDataParallel(
                config=piece.config,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=overlap,
                    overlap_param_gather=overlap,
                ),
                module=piece,
                disable_bucketing=number > 0,  # a stage's later pieces have time enough to be reduced whole
            )
            for number, piece in enumerate(pieces)
        ]
        for one in wrapped:
            one.broadcast_params()
        if overlap:  # gradients travel in the last micro-batch alone
            no_sync = [one.no_sync for one in wrapped]
            pieces[0].config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]  # type: ignore[assignment]
        optimizer: Any = core_optimizer.get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.betas[0],
                adam_beta2=settings.betas[1],
                adam_eps=settings.eps,
                clip_grad=settings.clip,
                bf16=recipe.precision.params == "bfloat16",
                params_dtype=presets.params_dtype(recipe),
                use_distributed_optimizer=True,
                overlap_param_gather=overlap,
            ),
            wrapped,  # type: ignore[arg-type] # a list of its subclass
            use_gloo_process_groups=torch.cuda.is_available(),
        )
        for one in optimizer.chained_optimizers:
            if isinstance(one.optimizer, Adam):
                one.optimizer.begin()
    return wrapped, optimizer


def learning_rate(step: int, total_steps: int, settings: config.OptimizerConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then the decay down to min_lr. A function of the step alone, so nothing to resume."""
    warmup = round(settings.warmup * total_steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    keep = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[settings.decay]
    return settings.min_lr + (settings.lr - settings.min_lr) * keep
