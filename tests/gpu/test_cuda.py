"""What only a GPU can show: run by hand on one with `python -m pytest tests/gpu -m gpu`. Not run in CI, and not yet run anywhere."""

from __future__ import annotations

import pytest
import torch

from megatron_infimed.config import Recipe
from megatron_infimed.data.batch import PackedBatch, pack_rows
from megatron_infimed.data.shards import Document
from megatron_infimed.model.attention import _segments, _varlen
from megatron_infimed.model.infimed import InfiMed, packed_seq_params
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.parallel import groups
from megatron_infimed.train.optimizer import wrap_and_optimize
from megatron_infimed.train.step import Run, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def recipe(**precision) -> Recipe:
    return Recipe.model_validate(
        {
            "output": "unused",
            "schedule": [{"until": 1.0, "image_size": 56, "tokens_per_image": 16}],
            "model": {
                "vision": {"image_size": 56, "hidden_size": 256, "num_layers": 3, "num_heads": 4, "ffn_hidden_size": 512},
                "language": {
                    "hidden_size": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ffn_hidden_size": 512,
                    "vocab_size": 1024,
                },
            },
            "trainable": {"vision": True},
            "precision": precision,
            "data": {"capacity": 512, "alignment": 128},
            "batch": {"rows": 2, "micro_rows": 2},
        }
    )  # fmt: skip


def batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in (40, 90, 33):
        ids = torch.randint(10, 1024, (length,), generator=generator, dtype=torch.int32)
        modes = torch.tensor([0] * 10 + [2] + [1] * (length - 11), dtype=torch.int8)
        ids[10] = len(documents)
        documents.append(Document(ids.numpy(), modes.numpy()))
    built = pack_rows([documents, documents[::-1]], capacity=512, tokens_per_image=16, image_size=56, pad_id=0, image_id=1)
    pixels = torch.randint(0, 256, (built.counts.images, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return built.with_pixels(pixels, 0)


def losses(settings: Recipe, steps: int = 3) -> list[tuple[float, float]]:
    ranks = groups.initialize(settings.parallel)
    try:
        model = InfiMed(settings, ranks).to(ranks.device)
        initialize_weights(model, settings)
        run = Run(settings, ranks, *wrap_and_optimize(model, settings), total_steps=10)
        results = [train_step(run, step, [batch()]) for step in range(steps)]
        return [(r.loss, r.grad_norm) for r in results]
    finally:
        groups.shut_down()


def test_varlen_attention_equals_one_call_a_document():
    b = batch().to("cuda")
    q, k, v = (torch.randn(1024, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    torch.testing.assert_close(_varlen(q, k, v, packed_seq_params(b)), _segments(q, k, v, b.cu_seqlens), atol=2e-2, rtol=2e-2)


def test_transformer_engine_equals_local_layers():
    local, te = losses(recipe(layers="local")), losses(recipe(layers="transformer_engine"))
    for (loss_a, norm_a), (loss_b, norm_b) in zip(local, te, strict=True):
        assert loss_b == pytest.approx(loss_a, rel=2e-2) and norm_b == pytest.approx(norm_a, rel=5e-2)


@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise"])
def test_fp8_trains_near_bf16(fp8):
    bf16, low = losses(recipe(layers="transformer_engine")), losses(recipe(layers="transformer_engine", fp8=fp8))
    assert low != bf16, "FP8 was not used"
    for (loss_a, norm_a), (loss_b, norm_b) in zip(bf16, low, strict=True):
        assert loss_b == pytest.approx(loss_a, rel=5e-2) and norm_b == pytest.approx(norm_a, rel=2e-1)
