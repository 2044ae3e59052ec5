"""Attention inside a packed row on this CPU: one SDPA call a document, against the other ways to write it. Run by hand:
python tests/benchmarks/attention.py

CPU seconds of forward + backward, median of 9, one thread; every way gives the same numbers (checked)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_infimed.model.attention import _segments

HEADS, KV_HEADS, SIZE = 8, 4, 64


def three_dimensions(q, k, v, lengths):
    parts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in d), is_causal=True, enable_gqa=True)
        for d in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    return torch.cat([p.transpose(0, 1) for p in parts]).flatten(1)


def block_mask(q, k, v, lengths):
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document[None, :]).tril()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1).flatten(1)


def ours(q, k, v, lengths):
    return _segments(q, k, v, torch.tensor([0, *lengths]).cumsum(0))


def cpu_seconds(way: Callable, q, k, v, lengths) -> float:
    taken = []
    for _ in range(9):
        start = time.process_time()
        way(q, k, v, lengths).sum().backward()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'documents':>22} {'ours':>9} {'3-d, gqa':>9} {'mask':>9}   (ours in s, others as ratios)")
    for lengths in ([409] * 10 + [6], [64] * 64, [1024] * 4):
        total = sum(lengths)
        q = torch.randn(total, HEADS, SIZE, requires_grad=True)
        k, v = (torch.randn(total, KV_HEADS, SIZE, requires_grad=True) for _ in range(2))
        want = ours(q, k, v, lengths)
        for other in (three_dimensions, block_mask):
            torch.testing.assert_close(other(q, k, v, lengths), want, atol=1e-5, rtol=1e-4)
        base = cpu_seconds(ours, q, k, v, lengths)
        others = [cpu_seconds(way, q, k, v, lengths) / base for way in (three_dimensions, block_mask)]
        print(f"{len(lengths):>10} x {lengths[0]:<9} {base:9.3f} {others[0]:8.2f}x {others[1]:8.2f}x")


if __name__ == "__main__":
    main()
