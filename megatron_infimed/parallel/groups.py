"""Processes and their groups: one frozen value, Ranks, made once and handed down.

This is the only file that touches torch.distributed's start-up and Megatron-Core's `parallel_state`. A process learns its place from
torchrun's variables, else from srun's, else it is alone (and then needs no network at all).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_infimed.config import ParallelConfig
from megatron_infimed.errors import UserError
from megatron_infimed.parallel import cpu

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. Groups are torch.distributed process groups."""

    world: int
    rank: int
    tensor: int
    tensor_size: int
    pipeline: int
    pipeline_size: int
    context: int
    context_size: int
    data: int
    data_size: int
    """Groups of processes that each hold a row of their own (context parallel ones share theirs)."""
    device: torch.device
    data_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    tensor_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    virtual_size: int = 1

    @property
    def first_stage(self) -> bool:
        return self.pipeline == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline == self.pipeline_size - 1

    @property
    def main(self) -> bool:
        """The one process that writes logs and manifests: it holds the loss."""
        return self.last_stage and self.tensor == 0 and self.context == 0 and self.data == 0

    @property
    def image_share(self) -> tuple[int, int]:
        """(index, of): the part of a row's images that this process decodes, of those that hold the row."""
        return self.context * self.tensor_size + self.tensor, self.context_size * self.tensor_size

    @property
    def speaks(self) -> bool:
        """One process of each row's processes on the first and on the last stage: what it counts is counted once."""
        return self.tensor == 0 and self.context == 0


def world_from_environment() -> tuple[int, int, int]:
    """(world size, rank, local rank) as torchrun or srun say; (1, 0, 0) for a process started alone."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["WORLD_SIZE"]), int(env["RANK"]), int(env.get("LOCAL_RANK", "0"))
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:  # of srun's step: the batch script itself is alone
        # The first node as an address, which needs no name resolution: the batch script runs there and calls srun.
        first = env.get("SLURM_LAUNCH_NODE_IPADDR") or env.get("SLURM_SRUN_COMM_HOST")
        if not env.setdefault("MASTER_ADDR", first or "") or "MASTER_PORT" not in env:
            raise UserError(
                "MASTER_ADDR and MASTER_PORT not set: start it by launch/*.sh, or export the first node's address and a free port"
            )
        return int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", "0"))
    return 1, 0, 0


def initialize(parallel: ParallelConfig, first_seed: int = 0, timeout_minutes: float = 30) -> Ranks:
    """Joins the processes (NCCL with CUDA, gloo without) and builds the parallel groups.

    Raises:
        UserError: tensor x pipeline x context does not divide the number of processes.
    """
    world, rank, local_rank = world_from_environment()
    if world % parallel.model_parallel:
        raise UserError(
            f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} needs a multiple of "
            f"{parallel.model_parallel} processes, there are {world}: start it with torchrun --nproc-per-node {parallel.model_parallel}, "
            "or set parallel.tensor, parallel.pipeline and parallel.context"
        )
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local process {local_rank} has no GPU, there are {torch.cuda.device_count()}: start fewer processes on this machine, "
            "or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if parallel.tensor > 1:  # Megatron-Core orders a layer's communication before its computation by having one queue (up to Hopper)
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
    else:
        cpu.install()
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        wait = timedelta(minutes=timeout_minutes)
        if world == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
        else:
            dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world, timeout=wait)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=timeout_minutes,  # type: ignore[arg-type] # only a timedelta is made of it
        create_gloo_process_groups=cuda,  # on the CPU every group is a gloo group already
    )
    seed(first_seed)
    data_group: Any = parallel_state.get_data_parallel_group()
    context_group: Any = parallel_state.get_context_parallel_group()
    pipeline_group: Any = parallel_state.get_pipeline_model_parallel_group()
    tensor_group: Any = parallel_state.get_tensor_model_parallel_group()
    return Ranks(
        world=world,
        rank=rank,
        tensor=dist.get_rank(tensor_group),
        tensor_size=parallel.tensor,
        pipeline=dist.get_rank(pipeline_group),
        pipeline_size=parallel.pipeline,
        context=dist.get_rank(context_group),
        context_size=parallel.context,
        data=dist.get_rank(data_group),
        data_size=dist.get_world_size(data_group),
        device=device,
        data_group=data_group,
        pipeline_group=pipeline_group,
        tensor_group=tensor_group,
        context_group=context_group,
        virtual_size=parallel.virtual,
    )


def gather(mine: T) -> list[T]:
    """What each process holds, by rank; all processes together."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def from_first(look: Callable[[], T]) -> T:
    """What process 0 finds, say on disk; all follow it, for another node's view of a shared folder may be older. All processes together.

    Raises:
        UserError: process 0 met one; the same on all.
    """
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = look()
        except UserError as e:
            told[1] = str(e)
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]


def seed(number: int) -> None:
    """Sets the random states that layers draw from: one for all of a tensor parallel group, one for each process of it."""
    model_parallel_cuda_manual_seed(number, force_reset_rng=True)


def shut_down() -> None:
    """Leaves the groups; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
