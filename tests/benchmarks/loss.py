"""The loss: memory and time of forward and backward, chunked against Megatron-Core's on materialised logits.

    python -m tests.benchmarks.loss [--hidden 1024] [--tokens 4096] [--vocabulary 151936] [--chunks 1024 --chunks 512] [--dtype float32] [--threads 1]

Every way runs in a process of its own, on the GPU where there is one. Memory is what is added to hidden, weight and labels:
  - "beyond gradients": the most bytes alive at once of the storages that operations make (tests/unit/test_loss.LiveStorages), the losses and
    the two gradients not counted. Exact, but blind to what an operation allocates within itself;
  - "in all": the gradients with it, and everything that the first column does not see. On a GPU torch.cuda.max_memory_allocated, else the
    kernel's high-water mark of the process's resident memory (VmHWM, reset before) less what was resident before.
Time is CPU seconds of all threads, or on a GPU elapsed seconds: the median of the rounds (a GPU has one more, to warm up). Losses, hidden's
gradient and the weight's gradient times a random vector are compared with those of materialised logits: norm of the difference by the norm.
Following the storages costs microseconds an operation, so it is done in the timed rounds.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor

from megatron_infimed.config import ParallelConfig
from megatron_infimed.model.loss import linear_cross_entropy
from megatron_infimed.parallel import groups
from tests.unit.test_loss import LiveStorages, errors


def materialised(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The output layer and the loss as Megatron-Core has them: the loss works in place in the float32 logits."""
    logits = linear_with_grad_accumulation_and_async_allreduce(hidden.unsqueeze(1), weight, None, False, False, False)
    return vocab_parallel_cross_entropy(logits.float(), labels.unsqueeze(1)).squeeze(1)


def step(chunk: int | None, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Losses and the gradients of hidden and weight of their sum; chunk None is materialised logits."""
    losses = materialised(hidden, weight, labels) if chunk is None else linear_cross_entropy(hidden, weight, labels, chunk, None)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), (hidden, weight))]


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def measure(chunk: int | None, tokens: int, vocabulary: int, size: int, dtype: torch.dtype, threads: int, rounds: int):
    """(bytes beyond gradients, bytes in all, seconds, what to compare); runs in a fresh process."""
    torch.set_num_threads(threads)
    device = groups.initialize(ParallelConfig()).device
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, size) / size**0.5).to(device, dtype).requires_grad_()
    labels, probe = torch.randint(vocabulary, (tokens,)).to(device), torch.randn(size)
    cuda = device.type == "cuda"
    step(chunk, hidden[:8], weight[:64], labels[:8] % 64)  # libraries load and allocate on first use
    seconds = []
    for _ in range(rounds + cuda):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            before, start = resident("VmRSS"), time.process_time()
        with LiveStorages() as storages:
            made = step(chunk, hidden, weight, labels)
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() if cuda else time.process_time()) - start)
        in_all = (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before
        beyond = storages.peak(*made)
        compared = [x.double().cpu() for x in (*made[:2], made[2].cpu().double() @ probe.double())]
        del made
    groups.shut_down()
    return beyond, in_all, statistics.median(seconds[cuda:]), compared


def main(
    hidden: int = 1024,
    tokens: int = 4096,
    vocabulary: int = 151_936,
    chunks: Annotated[list[int], typer.Option()] = [1024, 512, 256],  # noqa: B006 # typer copies it
    dtype: str = "float32",
    threads: int = 1,
    rounds: int = 1,
) -> None:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} threads"
    print(f"python {platform.python_version()}, torch {torch.__version__}, {where}")
    print(f"vocabulary {vocabulary}, {tokens} tokens, hidden {hidden}, {dtype}\n")
    heads = ["chunk", "MB beyond gradients", "of materialised", "MB in all", "of materialised", "seconds", "of materialised"]
    print("| " + " | ".join([*heads, "difference: losses", "hidden", "weight"]) + " |\n|" + "---|" * (len(heads) + 3))
    first = None
    for chunk in (None, *chunks):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            got = pool.submit(measure, chunk, tokens, vocabulary, hidden, getattr(torch, dtype), threads, rounds).result()
        first = first or got
        cells: list[object] = ["materialised" if chunk is None else chunk]
        for mine, plain, scale in zip(got[:3], first[:3], (1e6, 1e6, 1), strict=True):
            cells += [f"{mine / scale:.1f}", f"{mine / plain:.3f}"]
        print("| " + " | ".join(map(str, [*cells, *(f"{x:.1e}" for x in errors(got[3], first[3]))])) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
