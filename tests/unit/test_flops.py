"""flops.py against what torch counts while a small model runs: torch.utils.flop_counter.FlopCounterMode.

It counts attention as if every token saw every other of its document, l x l, causal or not; so for these comparisons `pairs` is that square
(as the layers really see it: every segment, padding too), and that Counts.pairs is l (l + 1) / 2 is tested by itself. It does not know
torch's flash kernel for CPUs; the test gives it torch's own formulas for the CUDA one, which compute the scores again in the backward. With
the plain kernel ("math") nothing is computed again. Measured over all cases: worst difference 0 operations.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from megatron_infimed import flops
from megatron_infimed.config import Recipe
from megatron_infimed.counts import Counts
from megatron_infimed.data.batch import PackedBatch, pack_rows
from megatron_infimed.data.shards import Document
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.parallel import groups

WITHIN = 0.01  # the promise; measured 0
FLASH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}
ALL = {"vision": True, "projector": True, "language": True}


def recipe(trainable: dict[str, bool], recompute: object = "none", loss_tokens: int = 32) -> Recipe:
    return Recipe.model_validate(
        {
            "output": "unused",
            "schedule": [{"until": 1.0, "image_size": 56, "tokens_per_image": 4}],
            "model": {
                "vision": {"image_size": 56, "hidden_size": 96, "num_layers": 3, "num_heads": 4, "ffn_hidden_size": 160},
                "language": {
                    "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 24, "ffn_hidden_size": 112,
                    "vocab_size": 512,
                },
            },
            "trainable": trainable,
            "precision": {"params": "float32", "layers": "local", "recompute": recompute},
            "batch": {"rows": 1, "loss_tokens": loss_tokens, "vision_images": 2},
        }
    )  # fmt: skip


def batch(image_size: int, tokens_per_image: int, lengths: list[int], images: bool = True, spare: int = 0) -> PackedBatch:
    """A row of one document for each length, with an image each or none, and `spare` tokens of padding."""
    documents = []
    for number, length in enumerate(lengths):
        modes = np.ones(length, np.int8)
        modes[: length // 3] = 0
        if images:
            modes[length // 3] = 2
        documents.append(Document(np.full(length, 7 + number, np.int32), modes))
    capacity = sum(lengths) + images * len(lengths) * (tokens_per_image - 1) + spare
    packed = pack_rows([documents], capacity=capacity, tokens_per_image=tokens_per_image, image_size=image_size, pad_id=0, image_id=1)
    return packed.with_pixels(torch.full((packed.counts.images, 3, image_size, image_size), 9, dtype=torch.uint8), 0)


def counted(settings: Recipe, row: PackedBatch, backend: SDPBackend = SDPBackend.FLASH_ATTENTION) -> int:
    """What torch counts in a forward and backward pass."""
    ranks = groups.initialize(settings.parallel)
    try:
        model = InfiMed(settings, ranks)
        initialize_weights(model, settings)
        with sdpa_kernel(backend), FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
            model(row).sum().backward()
        return counter.get_total_flops()
    finally:
        groups.shut_down()


def squares(row: PackedBatch) -> Counts:
    """The row's counts with l x l pairs, as torch counts; padding is a segment of its own at the end."""
    sizes = row.cu_seqlens.diff().tolist()
    own = sizes[: row.counts.documents]
    return replace(row.counts, pairs=sum(n * n for n in own), padding_pairs=sum(n * n for n in sizes[len(own) :]))


def total(parts: dict[str, flops.Work]) -> flops.Work:
    return sum(parts.values(), flops.Work())


MIXED = {"lengths": [40, 90, 33], "image_size": 56, "tokens_per_image": 4}
CASES = {
    "all trained": (ALL, "none", MIXED),
    "more pixels": (ALL, "none", {**MIXED, "image_size": 84, "tokens_per_image": 9}),
    "text only": (ALL, "none", {**MIXED, "images": False}),
    "frozen tower": ({**ALL, "vision": False}, "none", MIXED),
    "projector alone": ({"vision": False, "projector": True, "language": False}, "none", MIXED),
    "language alone": ({"vision": False, "projector": False, "language": True}, "none", MIXED),
    "tower alone": ({"vision": True, "projector": False, "language": False}, "none", MIXED),
    "recompute all": (ALL, "full", MIXED),
    "recompute all, frozen tower": ({**ALL, "vision": False}, "full", {**MIXED, "image_size": 84, "tokens_per_image": 9}),
    "recompute mlp": (ALL, {"language": "mlp"}, MIXED),
    "recompute the tower": (ALL, {"vision": "full"}, MIXED),
}


@pytest.mark.parametrize("name", CASES)
def test_executed(name):
    trainable, recompute, row = CASES[name]
    settings, packed = recipe(trainable, recompute), batch(**row, spare=29)
    work = total(flops.step_flops(settings, squares(packed), row["image_size"]))
    assert work.hardware == pytest.approx(counted(settings, packed), rel=WITHIN)
    assert work.model < work.hardware


@pytest.mark.parametrize(
    "name", ["all trained", "more pixels", "text only", "frozen tower", "projector alone", "language alone", "tower alone"]
)
def test_useful(name):
    """Where nothing is padding and nothing computed again, the useful FLOPs are the executed ones."""
    trainable, _, row = CASES[name]
    settings, packed = recipe(trainable, loss_tokens=1024), batch(**row)
    parts = flops.step_flops(settings, squares(packed), row["image_size"])
    wanted = counted(settings, packed, SDPBackend.MATH)
    wanted -= int(parts["projector"].hardware - parts["projector"].model)  # an input gradient Megatron-Core computes for nobody
    assert total(parts).model == pytest.approx(wanted, rel=WITHIN)


def test_pairs_are_the_causal_half():
    """Attention of documents of 40 and 7 tokens, counted pair by pair: 2 products of 24 multiply-adds, 4 heads, 2 layers, 3 passes."""
    packed = batch(56, 4, [40, 7], images=False, spare=13)
    seen = sum(1 for length in (40, 7) for i in range(length) for j in range(length) if j <= i)
    work = flops.step_flops(recipe(ALL), packed.counts, 56)["attention"]
    assert work.model == seen * 2 * (2 * 24) * 4 * 2 * 3


def test_six_flops_a_parameter_and_token():
    """The language layers of Qwen3-4B, which has 3.6 billion parameters besides its embeddings (its model card), all trained."""
    settings = Recipe.model_validate({"output": "x", "schedule": [{"until": 1.0, "image_size": 224, "tokens_per_image": 64}]})
    work = flops.step_flops(settings, Counts(text_tokens=900, image_tokens=100, padding=50), 224)["language"]
    assert work.model / (6 * 1000) == pytest.approx(3.6e9, rel=0.02)  # 3.633e9
    assert work.hardware / work.model == 1.05


def test_peaks():
    assert flops.peak_of("NVIDIA H100 80GB HBM3") == (989e12, 1979e12) == flops.peak_of("NVIDIA H200")
    assert flops.peak_of("NVIDIA H100 PCIe") == (756e12, 1513e12)
    assert flops.peak_of("NVIDIA A100-SXM4-80GB") == (312e12, None)
    assert flops.peak_of("Quadro P400") is None
