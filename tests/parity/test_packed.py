"""Packed equals unpacked: three steps on documents sharing a row, against the same documents each in a row of its own, clipping on.

Reviewers of packing ask this first. The global batch is the same, so loss and gradient norm must be; only the order of sums differs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_infimed.config import Recipe
from megatron_infimed.data.batch import PackedBatch, length, pack_rows
from megatron_infimed.data.shards import Document
from megatron_infimed.model import attention
from megatron_infimed.model.infimed import build_pieces
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.parallel import groups
from megatron_infimed.train.guards import Guards
from megatron_infimed.train.optimizer import wrap_and_optimize
from megatron_infimed.train.step import Run, train_step

# Measured worst relative difference over three steps of loss and grad_norm: 2.6e-7
TOLERANCE = 2e-6
PIXELS, TOKENS, CLIP = 56, 4, 0.3


def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "output": "unused",
            "schedule": [{"until": 1.0, "image_size": PIXELS, "tokens_per_image": TOKENS}],
            "model": {
                "vision": {"image_size": 56, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "ffn_hidden_size": 64},
                "language": {
                    "hidden_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_hidden_size": 96,
                    "vocab_size": 256,
                },
            },
            "trainable": {"vision": True},
            "precision": {"params": "float32", "layers": "local"},
            "optimizer": {"lr": 3e-3, "clip": CLIP},
        }
    )  # fmt: skip


def documents(step: int) -> list[tuple[Document, torch.Tensor]]:
    """Seven documents with 0 to 3 images and their pixels."""
    rng, made = np.random.default_rng(step), []
    for i in range(7):
        asked, said, n = int(rng.integers(2, 9)), int(rng.integers(1, 12)), i % 4
        values = np.concatenate([rng.integers(2, 256, asked), np.arange(n), rng.integers(2, 256, said)]).astype(np.int32)
        modes = np.array([0] * asked + [2] * n + [1] * said, np.int8)
        made.append((Document(values, modes), torch.from_numpy(rng.integers(0, 256, (n, 3, PIXELS, PIXELS), np.uint8))))
    return made


def lay(rows: list[list[tuple[Document, torch.Tensor]]], capacity: int, document_alignment: int = 1) -> PackedBatch:
    sizes = {"capacity": capacity, "tokens_per_image": TOKENS, "image_size": PIXELS, "document_alignment": document_alignment}
    batch = pack_rows([[d for d, _ in row] for row in rows], pad_id=0, image_id=1, **sizes)
    return batch.with_pixels(torch.cat([pixels for row in rows for _, pixels in row]), 0)


def packed(made: list) -> list[PackedBatch]:
    return [lay([made[:3], made[3:]], 128)]


def aligned(made: list) -> list[PackedBatch]:
    batch = lay([made[:3], made[3:]], 128, document_alignment=8)
    assert not (batch.cu_seqlens % 8).any()
    return [batch]


def unpacked(made: list) -> list[PackedBatch]:
    return [lay([[one]], length(one[0].modes, TOKENS)) for one in made]


def train(way) -> list[tuple[float, float]]:
    settings = recipe()
    ranks = groups.initialize(settings.parallel)
    try:
        models = build_pieces(settings, ranks)
        initialize_weights(models[0], settings)
        run = Run(settings, ranks, *wrap_and_optimize(models, settings), total_steps=10, guards=Guards(settings.guards))
        results = [train_step(run, step, way(documents(step))) for step in range(3)]
        return [(r.loss, r.grad_norm) for r in results]
    finally:
        groups.shut_down()


@pytest.mark.parametrize("way", [packed, aligned])
def test_packed_equals_unpacked(way):
    together, alone = train(way), train(unpacked)
    assert min(norm for _, norm in alone) > CLIP, "clipping must be at work"
    worst = max(abs(a - b) / b for x, y in zip(together, alone, strict=True) for a, b in zip(x, y, strict=True))
    print(f"worst relative difference {worst:.2e}")
    assert worst < TOLERANCE


def test_a_leak_between_documents_would_show(monkeypatch):
    """The comparison above is able to fail: attention over the whole row changes the loss."""
    whole = train(unpacked)
    monkeypatch.setattr(attention, "_segments", _over_the_whole_row)
    assert abs(train(packed)[0][0] - whole[0][0]) / whole[0][0] > 10 * TOLERANCE


def _over_the_whole_row(q, k, v, _cu_seqlens):
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(0).transpose(0, 1).flatten(1)
