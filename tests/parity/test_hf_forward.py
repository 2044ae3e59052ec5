"""Tower, language model and whole model against transformers on random tiny weights, float32: values and gradients of every weight.

Each tolerance stands beside the worst difference measured (torch 2.13.0+cpu, transformers 5.23.0, two cores). Values are of order 1 to 10.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_infimed.config import PhaseConfig
from megatron_infimed.convert.export import export
from megatron_infimed.data.shards import IMAGE
from tests.parity import hf

POSITIONS = "embeddings.position_embedding.weight"
PHASE = PhaseConfig(until=1.0, image_size=56, tokens_per_image=16)


@pytest.mark.parametrize("feature_layer", [-1, -2])
@pytest.mark.parametrize("size", [56, 84, 60])  # native; interpolated; not a multiple of the patch
def test_tower(tmp_path, size, feature_layer):
    model, recipe, _, siglip = hf.imported(tmp_path, feature_layer=feature_layer)
    images = hf.pixels(3, size)
    ours = model.vision_tower(images)
    theirs = siglip(hf.normalised(images), output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[feature_layer]
    assert ours.shape == theirs.shape and theirs.std() > 0.5
    forward = float((ours - theirs).detach().abs().max())
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    (ours * pull).sum().backward()
    (theirs * pull).sum().backward()
    backward = hf.worst_gradient(hf.gradients(model, recipe, "vision"), hf.their_gradients(siglip))
    assert forward < 1e-5  # 0: the same kernels in the same order
    assert backward < 5e-6  # 5.5e-7


@pytest.mark.parametrize("tied", [True, False])
def test_language_model(tmp_path, tied):
    """One packed row of five documents against one run a document."""
    model, recipe, qwen3, _ = hf.imported(tmp_path, tied=tied)
    row = hf.documents([0] * 5)
    packed = hf.batch(row, hf.pixels(0, 56), PHASE)
    logits = model(packed, with_loss=False)
    pieces, total = [], packed.loss_mask.sum()
    for document in row:
        out = qwen3(torch.from_numpy(document.values).long()[None]).logits[0]
        pieces.append(out)
        (_loss_sum(out, document) / total).backward()
    theirs = torch.cat(pieces)
    forward = float((logits[: len(theirs)] - theirs).detach().abs().max())
    (model(packed).sum() / total).backward()
    ours = hf.gradients(model, recipe, "language")
    backward = hf.worst_gradient(ours, hf.their_gradients(qwen3))
    assert ("lm_head.weight" in ours) is not tied
    assert forward < 1e-5  # 0
    assert backward < 5e-6  # 9.9e-7


@pytest.mark.parametrize(("size", "tokens"), [(56, 16), (84, 36)])
def test_whole_model(tmp_path, size, tokens):
    """Documents with 0 to 3 images in one packed row: against the stock Llava document by document, and against themselves one by one."""
    from transformers import LlavaForConditionalGeneration

    phase = PhaseConfig(until=1.0, image_size=size, tokens_per_image=tokens)
    model, recipe, _, _ = hf.imported(tmp_path)
    folder = export(hf.save(tmp_path / "run", model, recipe, phase).path, tmp_path / "export")
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    row = hf.documents([0, 3, 1, 2, 0])
    images = hf.pixels(6, size)
    packed = hf.batch(row, images, phase, capacity=384)
    total = packed.loss_mask.sum()
    logits = model(packed, with_loss=False)
    loss = model(packed).sum() / total
    loss.backward()

    theirs, alone, their_loss, taken = [], [], torch.zeros(()), 0
    for document in row:
        n = int((document.modes == IMAGE).sum())
        mine, taken = images[taken : taken + n], taken + n
        single = hf.batch([document], mine, phase, capacity=384)
        length = int(single.cu_seqlens[1])
        out = llava(input_ids=single.tokens[None, :length], pixel_values=hf.normalised(mine) if n else None).logits[0]
        part = F.cross_entropy(out, single.labels[:length], reduction="none") @ single.loss_mask[:length] / total
        part.backward()
        their_loss += part.detach()
        theirs.append(out.detach())
        alone.append(model(single, with_loss=False)[:length].detach())
    used = int(packed.counts.text_tokens + packed.counts.image_tokens)
    vision = hf.their_gradients(llava.model.vision_tower)
    if size != recipe.model.vision.image_size:
        # Their position embeddings are ours interpolated: the gradient goes back through that.
        tower = model.vision_tower
        (vision[POSITIONS],) = torch.autograd.grad(tower.positions(size // 14), tower.position_embedding, vision[POSITIONS])
    language = {n.removeprefix("model."): g for n, g in hf.gradients(model, recipe, "language").items()}
    figures = {
        "logits": float((logits[:used] - torch.cat(theirs)).detach().abs().max()),
        "loss": abs(float(loss.detach() - their_loss)),
        "packed against alone": float((logits[:used] - torch.cat(alone)).detach().abs().max()),
        "vision": hf.worst_gradient(hf.gradients(model, recipe, "vision"), vision),
        "projector": hf.worst_gradient(hf.gradients(model, recipe, "projector"), hf.their_gradients(llava.model.multi_modal_projector)),
        "language": hf.worst_gradient(language, hf.their_gradients(llava.model.language_model)),
    }
    limits = {
        "logits": 2e-5,  # 4.1e-6
        "loss": 1e-5,  # 1.9e-6
        "packed against alone": 1e-5,  # 0
        "vision": 1e-5,  # 8.2e-7
        "projector": 1e-5,  # 7.2e-7
        "language": 1e-5,  # 1.2e-6
    }
    assert {name: value for name, value in figures.items() if value > limits[name]} == {}


def _loss_sum(logits, document):
    targets = torch.from_numpy(document.modes[1:] == 1)
    labels = torch.from_numpy(document.values[1:]).long()
    return F.cross_entropy(logits[:-1][targets], labels[targets], reduction="sum")
