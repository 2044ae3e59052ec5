"""The bandwidth of an all-reduce, between pairs of nodes and over all: NCCL with CUDA, gloo without.

Pairs are the edges of a ring (0-1, 2-3, ..., then 1-2, 3-0), so every node is measured with two different ones and the pairs of a round do
not share a node. A group has a process group of its own, made and destroyed here, so one that cannot connect holds up nobody else.
Bus bandwidth as nccl-tests defines it: bytes / seconds x 2 (n - 1) / n, which is comparable over different n.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

MESSAGE = {"nccl": 256 << 20, "gloo": 4 << 20}
"""Bytes."""
WARM, TIMES = 2, 5

Group = tuple[str, ...]
"""Nodes."""


def backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def rounds(nodes: Sequence[str], ranks: int) -> list[list[Group]]:
    """Groups that are measured at the same time; the last round is all nodes together."""
    n = len(nodes)
    if ranks == 1:
        return []
    if n <= 2:
        return [[tuple(nodes)]]
    edges = [(nodes[i], nodes[(i + 1) % n]) for i in range(n)]
    odd = [edges[-1:]] if n % 2 else []  # a ring of odd length needs a third round
    even = edges[: n - n % 2]
    return [even[::2], even[1::2], *odd, [tuple(nodes)]]


def bus_bandwidth(seconds: float, ranks: int, message: int) -> float:
    """GB/s."""
    return message / seconds * 2 * (ranks - 1) / ranks / 1e9


def measure(store: dist.Store, rank: int, ranks: int, local_rank: int, seconds: float) -> float:
    """Seconds of one all-reduce among `ranks` processes, the quickest of some; each calls it with the same store.

    Raises:
        RuntimeError: no connection, a wrong sum, or not done after `seconds`.
    """
    kind = backend()
    device = torch.device("cuda", local_rank) if kind == "nccl" else torch.device("cpu")
    if kind == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(kind, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    data = torch.ones(MESSAGE[kind] // 4, device=device)
    dist.all_reduce(data)
    if not bool((data == ranks).all()):
        raise RuntimeError(f"the sum of {ranks} ones is wrong")
    best = math.inf
    data.zero_()
    for i in range(WARM + TIMES):
        _wait(device)
        begun = time.perf_counter()
        dist.all_reduce(data)
        _wait(device)
        if i >= WARM:
            best = min(best, time.perf_counter() - begun)
    dist.destroy_process_group()  # not after a failure: a broken NCCL does not come back from it
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
