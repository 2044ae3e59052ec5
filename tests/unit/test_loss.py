"""The chunked loss against float64, in float32 and bfloat16, and what it allocates against materialised logits."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_infimed.model.loss import linear_cross_entropy

N, V, H = 37, 203, 24  # 203: not a multiple of anything; with a chunk of 1 the blocks are 8 rows wide, the last 3
CHUNKS = [1, 5, 36, 37, 1000]


class LiveStorages(TorchDispatchMode):
    """Follows every storage that operations inside make, from its making until it is freed; the same on every machine.

    What an operation allocates and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        """(number of the storage, bytes made or, negative, freed) in order."""
        self.alive: dict[int, int] = {}  # address of the storage -> its number
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            self._meet(given, new=False)
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            self._meet(made, new=True)
        return out

    def _meet(self, tensor: Any, new: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.untyped_storage()._cdata in self.alive:
            return
        storage = tensor.untyped_storage()
        self.made += 1
        self.alive[storage._cdata] = self.made
        size = storage.nbytes() if new else 0  # what comes from outside counts nothing
        self.events.append((self.made, size))
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, address: int, size: int) -> None:
        self.events.append((self.alive.pop(address), -size))

    def peak(self, *without: Tensor | None) -> int:
        """The most bytes alive at once, not counting the tensors named, which must be alive still."""
        left_out = {self.alive.get(t.untyped_storage()._cdata) for t in without if t is not None}
        return max(accumulate((size for number, size in self.events if number not in left_out), initial=0))


def data(dtype: torch.dtype = torch.float32, n: int = N, v: int = V, h: int = H) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels, upstream gradient (of both signs, one of them zero)"""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator).mul(0.3).to(dtype).requires_grad_()
    grad = torch.randn(n, generator=generator)
    grad[:1] = 0
    return hidden, weight, torch.randint(v, (n,), generator=generator), grad


def materialised(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def with_gradients(losses: Tensor, grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [losses.detach(), *torch.autograd.grad(losses, inputs, grad.to(losses.dtype))]


def in_float64(hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> list[Tensor]:
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    return with_gradients(materialised(hidden, weight, labels), grad, hidden, weight)


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Norm of the difference by the norm, of the losses, hidden's and weight's gradient."""
    assert [x.shape for x in got] == [x.shape for x in want]
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_equals_float64(chunk):
    hidden, weight, labels, grad = data()
    losses = linear_cross_entropy(hidden, weight, labels, chunk, None)
    assert losses.dtype == torch.float32
    worst = errors(with_gradients(losses, grad, hidden, weight), in_float64(hidden, weight, labels, grad))
    assert max(worst) < 5e-7, worst  # measured: 2.3e-7


@pytest.mark.parametrize("chunk", CHUNKS)
def test_bfloat16_is_as_exact_as_materialised_logits(chunk):
    hidden, weight, labels, grad = data(torch.bfloat16, n=256, v=2048, h=64)
    want = in_float64(hidden, weight, labels, grad)
    plain = errors(with_gradients(materialised(hidden, weight, labels), grad, hidden, weight), want)
    got = with_gradients(linear_cross_entropy(hidden, weight, labels, chunk, None), grad, hidden, weight)
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    ours = errors(got, want)
    assert ours[0] < 1.001 * plain[0]
    assert ours[2] < 1.001 * plain[2]  # the weight's gradient is rounded once, whatever the chunk
    assert ours[1] < 1.3 * plain[1]  # measured: 1.16; a CPU rounds each block's product before they are added in float32, CUDA does not


@pytest.mark.parametrize("chunk", [2, 7])
def test_gradients_by_finite_differences(chunk):
    hidden, weight, labels, _ = data(torch.float64, n=7, v=19, h=5)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, chunk, None), (hidden, weight))


def test_no_targets():
    hidden, weight, labels, _ = data(n=0)
    losses = linear_cross_entropy(hidden, weight, labels, 4, None)
    assert losses.shape == (0,) and losses.requires_grad
    losses.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, H)
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("chunk", [5, 37])
@pytest.mark.parametrize("spread", ["far apart", "close"])
def test_logits_of_ten_thousand(chunk, spread):
    hidden, weight, labels, grad = data()
    with torch.no_grad():
        if spread == "close":  # 1e4 in common, and the differences as ever
            hidden[:, 0], weight[:, 0] = 1e3, 10
        else:
            hidden *= 1e4 / (hidden @ weight.t()).abs().max()
    want = in_float64(hidden, weight, labels, grad)
    plain = errors(with_gradients(materialised(hidden, weight, labels), grad, hidden, weight), want)
    got = errors(with_gradients(linear_cross_entropy(hidden, weight, labels, chunk, None), grad, hidden, weight), want)
    assert got[0] < 1e-3, "the loss itself, where float32 holds 1e4 to 5e-4"  # measured: 1.8e-4 (close), 8.2e-8 (far apart)
    assert all(a < 1.2 * b for a, b in zip(got, plain, strict=True)), (got, plain)  # measured: 1.00


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("chunk, rows_made_again", [(5, 192), (37, 0)])  # 203 rows in blocks of 32, the last of which is kept
def test_a_frozen_input_gets_no_gradient_and_costs_no_product(chunk, rows_made_again, frozen):
    hidden, weight, labels, grad = data()
    both = with_gradients(linear_cross_entropy(hidden, weight, labels, chunk, None), grad, hidden, weight)
    stays, learns, want = (hidden, weight, both[2]) if frozen == "hidden" else (weight, hidden, both[1])
    stays.requires_grad_(False)
    with FlopCounterMode(display=False) as flops:
        linear_cross_entropy(hidden, weight, labels, chunk, None).backward(grad)
    assert stays.grad is None and learns.grad is not None and torch.equal(learns.grad, want)
    assert flops.get_total_flops() == 2 * N * H * (V + V + rows_made_again)
    learns.requires_grad_(False)
    assert not linear_cross_entropy(hidden, weight, labels, chunk, None).requires_grad


def test_backward_twice():
    hidden, weight, labels, grad = data()
    losses = linear_cross_entropy(hidden, weight, labels, 5, None)
    first, second = (torch.autograd.grad(losses, (hidden, weight), grad, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_chunk(dtype):
    n, v, chunk = 512, 4096, 64
    hidden, weight, labels, grad = data(dtype, n=n, v=v, h=16)

    def peak(loss: Callable[..., Tensor], *more: Any) -> int:
        with LiveStorages() as storages:
            losses, *gradients = with_gradients(loss(hidden, weight, labels, *more), grad, hidden, weight)
        return storages.peak(losses, *gradients)

    a_logit = 4 if dtype == torch.float32 else 6  # bfloat16 and float32 are both there while one becomes the other
    plain, ours = peak(materialised), peak(linear_cross_entropy, chunk, None)
    assert plain >= n * v * a_logit
    rest = 2 * 4 * n * 16 + 20 * 8 * n  # hidden's gradient and a term of it in float32; vectors of a number a position
    assert ours <= chunk * v * a_logit + rest
    assert ours < n * v * a_logit / 4  # Megatron-Core's loss, which works in place, holds n * v * a_logit
