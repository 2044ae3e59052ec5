"""The optimizer's arithmetic, the learning rate, packed attention, pooling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_infimed.config import OptimizerConfig
from megatron_infimed.data.batch import context_positions, pack_rows
from megatron_infimed.data.shards import CONTEXT, IMAGE, TARGET, Document
from megatron_infimed.model.attention import _segments
from megatron_infimed.model.vision import pool
from megatron_infimed.train.optimizer import Adam, learning_rate


def test_adam_equals_torch_adamw_to_the_bit():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(11))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    a, b = Adam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
    assert set(a.state[ours[0]]) == {"exp_avg", "exp_avg_sq"} and a.param_groups[0]["step"] == 5


def test_learning_rate_rises_then_decays():
    settings = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(1e-4 + 0.5 * 9e-4) and 1e-4 < rates[99] < 1.1e-4
    assert learning_rate(0, 3, OptimizerConfig(lr=1.0, warmup=0.0, decay="constant")) == 1.0


@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [4, 1, 1, 10]])
def test_documents_do_not_see_each_other(lengths):
    """Against a masked softmax written out; gradients too."""
    torch.manual_seed(0)
    total, heads, groups, size = sum(lengths), 4, 2, 8
    q = torch.randn(total, heads, size, requires_grad=True)
    k, v = (torch.randn(total, groups, size, requires_grad=True) for _ in range(2))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (document[:, None] == document[None, :]).tril()
    scores = torch.einsum("qad,kad->aqk", q, k.repeat_interleave(2, 1)) / size**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    wanted = torch.einsum("aqk,kad->qad", weights, v.repeat_interleave(2, 1)).flatten(1)
    got = _segments(q, k, v, torch.tensor([0, *lengths]).cumsum(0))
    torch.testing.assert_close(got, wanted)
    noise = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), noise), torch.autograd.grad(wanted, (q, k, v), noise), strict=True):
        torch.testing.assert_close(a, b)


def test_pooling():
    features = torch.randn(2, 27 * 27, 4)
    assert pool(features, 729) is features
    grid = features.view(2, 27, 27, 4)
    assert torch.allclose(pool(features, 9)[0, 4], grid[0, 9:18, 9:18].mean((0, 1)), atol=1e-6)
    assert pool(features, 144).shape == (2, 144, 4)


@pytest.mark.parametrize("size", [2, 4])
def test_context_shares_hold_every_position_once(size):
    """The shares of all ranks, put back in place, are the row; and each sees as many pairs of positions as the others."""
    documents = [Document(np.arange(n, dtype=np.int32), np.array([CONTEXT, IMAGE, *[TARGET] * (n - 2)], np.int8)) for n in (5, 12, 3, 20)]
    whole = pack_rows(
        [documents, documents[:1]], capacity=96, tokens_per_image=4, image_size=28, pad_id=0, image_id=1, document_alignment=2 * size
    )
    back = torch.full_like(whole.tokens, -1)
    taken = []
    for rank in range(size):
        here, share = context_positions(whole.cu_seqlens, rank, size), whole.share(rank, size)
        assert len(here) == len(whole.tokens) // size and share.cu_seqlens is whole.cu_seqlens
        back[here] = share.tokens
        assert torch.equal(share.labels, whole.labels[here]) and torch.equal(share.loss_mask, whole.loss_mask[here])
        assert (share.tokens[share.slots] == 1).all() and torch.equal(here[share.slots], whole.slots[share.features])
        taken += share.features.tolist()
        starts = whole.cu_seqlens[:-1].long().repeat_interleave(whole.cu_seqlens.diff().long())[here]
        assert int((here - starts + 1).sum()) == sum(int(n) * (int(n) + 1) // 2 for n in whole.cu_seqlens.diff()) // size
    assert torch.equal(back, whole.tokens) and sorted(taken) == list(range(5 * 4))
    assert whole.share(0, 1) is whole
    with pytest.raises(ValueError, match=rf"set data.document_alignment {2 * size}"):
        pack_rows([documents], capacity=96, tokens_per_image=4, image_size=28, pad_id=0, image_id=1).share(0, size)
