"""The optimizer's arithmetic, the learning rate, packed attention, pooling, and what metrics.jsonl survives."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_infimed.config import OptimizerConfig, Recipe
from megatron_infimed.data.batch import Counts
from megatron_infimed.model.attention import _segments
from megatron_infimed.model.vision import pool
from megatron_infimed.train.metrics import Metrics
from megatron_infimed.train.optimizer import Adam, learning_rate
from megatron_infimed.train.step import StepResult


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


def test_metrics_has_each_step_once_after_a_kill(tmp_path):
    recipe = Recipe.model_validate(
        {"output": "x", "schedule": [{"until": 1.0, "image_size": 56, "tokens_per_image": 4}], "log": {"tensorboard": False}}
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    metrics = Metrics(recipe, tmp_path, first_step=2, total_steps=9)
    phase = SimpleNamespace(number=0, image_size=56, tokens_per_image=4)
    counts = Counts(documents=2, text_tokens=90, image_tokens=6, target_tokens=30, padding=4, images=1)
    metrics.record(3, phase, StepResult(1.5, 0.5, 1e-3, True, counts, False), 0.0)  # type: ignore[arg-type]
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[2]["loss"] == 1.5 and lines[2]["fill"] == 0.96
