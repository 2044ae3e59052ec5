"""The output layer and its cross-entropy as one function, so that the logits [N, V] never exist, forward or backward.

Forward goes through the rows of the output weight in blocks, each of which gives logits [N, W]; what stays of them is, for each position, the
running maximum, the sum of exp (rescaled when the maximum rises) and the logit of the label. Backward makes the logits of each block again
and turns them in place into their gradient. Blocks are of the vocabulary, not of positions, because then
  - each block's part of the weight's gradient is one finished product over all N. With blocks of positions the sum over blocks would need a
    float32 accumulator [V, H], for bfloat16 twice the gradient's size; here only hidden's gradient [N, H] is summed over blocks;
  - the processes of a tensor group exchange [N] numbers twice and hidden's gradient once, however many blocks there are.
Making gradients in the forward pass instead would save one product of four, but they are then right for one upstream gradient only. The last
block of the forward pass is kept and is the first of the backward pass: where all fits in one block nothing is computed twice.
Suffixes as in docs/architecture.md: N positions with a target, H hidden, V rows of the weight held here, W rows in a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, chunk: int, group: dist.ProcessGroup | None) -> Tensor:
    """-log softmax(hidden @ weight.T)[label] of each position: [N], float32 (float64 for float64).

    Args:
        hidden_NH: the same on every process of `group`; so is its gradient, which is summed over `group`.
        weight_VH: of hidden's dtype; process r of `group` holds rows r * V to (r + 1) * V of the whole. Its gradient stays here.
        labels_N: int64, rows of the whole weight.
        chunk: the logits held at once are no more than those of `chunk` positions: chunk * V numbers of float32, and during backward of
            bfloat16 hidden as many of that.
        group: the tensor group; None for one process.
    """
    return _LinearCrossEntropy.apply(hidden_NH, weight_VH, labels_N, chunk, group)  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, chunk: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group if group is not None and group.size() > 1 else None
        ctx.blocks = _blocks(len(weight_VH), len(hidden_NH), chunk)
        own_N = labels_N - (ctx.group.rank() * len(weight_VH) if ctx.group else 0)
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        top_N = hidden_NH.new_full(labels_N.shape, float("-inf"), dtype=dtype)
        sum_N, label_N = torch.zeros_like(top_N), torch.zeros_like(top_N)
        block_NW = None
        for rows in ctx.blocks:
            block_NW = None  # gone before the next is made
            block_NW = _product(hidden_NH, weight_VH[rows].t(), dtype)
            here_N, place = _place(own_N, rows)
            label_N = torch.where(here_N, block_NW[place], label_N)
            before_N, top_N = top_N, torch.maximum(top_N, block_NW.amax(1))
            sum_N = sum_N * (before_N - top_N).exp() + block_NW.sub_(top_N[:, None]).exp_().sum(1)
        assert block_NW is not None
        if ctx.group:
            before_N, top_N = top_N, top_N.clone()
            dist.all_reduce(top_N, dist.ReduceOp.MAX, ctx.group)
            fall_N = (before_N - top_N).exp()
            both_2N = torch.stack((sum_N * fall_N, label_N))
            dist.all_reduce(both_2N, group=ctx.group)
            sum_N, label_N = both_2N
            block_NW *= fall_N[:, None]
        ctx.kept_NW = block_NW
        ctx.save_for_backward(hidden_NH, weight_VH, own_N, top_N, sum_N)
        return sum_N.log() + (top_N - label_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, own_N, top_N, sum_N = ctx.saved_tensors
        block_NW, ctx.kept_NW = ctx.kept_NW, None  # changed in place below, so a second backward makes it again
        grad_hidden = torch.zeros_like(hidden_NH, dtype=top_N.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_VH) if ctx.needs_input_grad[1] else None
        for rows in reversed(ctx.blocks):
            if block_NW is None:
                block_NW = _product(hidden_NH, weight_VH[rows].t(), top_N.dtype).sub_(top_N[:, None]).exp_()
            here_N, place = _place(own_N, rows)
            block_NW[place] -= torch.where(here_N, sum_N, 0)  # before rounding: softmax - 1 is small where the model is sure
            # (exp - [label] * sum) * grad / sum, in the dtype of the products
            scaled_NW = block_NW if block_NW.dtype == hidden_NH.dtype else torch.empty_like(block_NW, dtype=hidden_NH.dtype)
            torch.mul(block_NW, (grad_N / sum_N)[:, None], out=scaled_NW)
            block_NW = None
            if grad_hidden is not None:
                grad_hidden += _product(scaled_NW, weight_VH[rows], grad_hidden.dtype)
            if grad_weight is not None:
                torch.mm(scaled_NW.t(), hidden_NH, out=grad_weight[rows])
            del scaled_NW
        if grad_hidden is not None:
            if ctx.group:
                dist.all_reduce(grad_hidden, group=ctx.group)
            grad_hidden = grad_hidden.to(hidden_NH.dtype)
        return grad_hidden, grad_weight, None, None, None


def _blocks(vocabulary: int, positions: int, chunk: int) -> list[slice]:
    """Rows of the weight such that a block's logits for all positions are no more than those of `chunk` positions for all rows."""
    count = max(1, -(-positions // chunk))
    width = -(-vocabulary // count)
    width += -width % 8  # 16 bytes of bfloat16: what tensor cores take without a slower kernel
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _place(own_N: Tensor, rows: slice) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Whether each label is in the block, and its index there (some column where it is not: a selection would make the host wait)."""
    here_N = (own_N >= rows.start) & (own_N < rows.stop)
    return here_N, (torch.arange(len(own_N), device=own_N.device), (own_N - rows.start).clamp(0, rows.stop - rows.start - 1))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`. CUDA hands out the float32 sums of a bfloat16 product as they are; elsewhere they are rounded first."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda and a.dtype != dtype else torch.mm(a, b).to(dtype)
