"""Tiny Qwen3 and SigLIP folders with no weight at its default value, and our model with the same weights (through the real import)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megatron_infimed.config import PhaseConfig, Recipe, TrainableConfig
from megatron_infimed.convert.export import load
from megatron_infimed.convert.start import import_checkpoint, weights_of
from megatron_infimed.convert.table import Part, entries
from megatron_infimed.data.batch import PackedBatch, pack_rows
from megatron_infimed.data.shards import Document
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import groups
from megatron_infimed.train import checkpoint, saver
from tests.tiny import tiny_tokenizer

VOCABULARY, IMAGE_ID, PAD_ID, END_ID = 512, 398, 392, 394
CAPACITY = 256


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Every weight random, norms and biases too, so that a swapped or forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        if weight.dim() == 1:
            weight.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
        else:
            weight.copy_(noise * (0.3 if "embed" in name else weight[0].numel() ** -0.5))


def qwen3(folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 1):
    """A saved Qwen3ForCausalLM with its tokenizer; returns the model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=VOCABULARY, tie_word_embeddings=tied, rms_norm_eps=1e-6, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    randomise(model, seed)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer(folder)
    return model


def siglip(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 2):
    """A saved SiglipVisionModel; returns the model."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )
    model = SiglipVisionModel(config).eval()
    randomise(model, seed)
    model.to(dtype).save_pretrained(folder)
    return model


def imported(folder: Path, *, tied: bool = True, feature_layer: int = -2):
    """(our model, its recipe, the Qwen3, the SigLIP), float32, every part trainable, projector random too."""
    language, vision = qwen3(folder / "language", tied=tied), siglip(folder / "vision")
    found = import_checkpoint(folder / "language", folder / "vision", folder / "imported", feature_layer=feature_layer)
    recipe = Recipe.model_validate(found.state["recipe"]).model_copy(update={"trainable": TrainableConfig(vision=True)})
    model = load(found, recipe)
    assert model.projector is not None
    randomise(model.projector, seed=3)
    return model, recipe, language, vision


def save(folder: Path, model: InfiMed, recipe: Recipe, phase: PhaseConfig, step: int = 7) -> checkpoint.Checkpoint:
    """The model as a checkpoint of a run whose last phase is `phase`."""
    recipe = recipe.model_copy(update={"schedule": (phase,), "stage": "sft_medical"})
    state = {"step": step, "position": [0, step], "recipe": recipe.model_dump(mode="json"), "data": {}}
    return saver.save(folder, state, [model], None, groups.initialize(recipe.parallel))


def documents(images: list[int], seed: int = 0) -> list[Document]:
    """One document per entry, with so many images: context, images between text, targets, a second turn."""
    rng = np.random.default_rng(seed)
    out = []
    for n in images:
        pieces, modes = [], []
        for _ in range(n):
            pieces += [rng.integers(1, 390, 3), [0]]
            modes += [0, 0, 0, 2]
        for mode, count in ((0, int(rng.integers(2, 6))), (1, int(rng.integers(2, 8))), (0, 3), (1, int(rng.integers(1, 5)))):
            pieces.append(rng.integers(1, 390, count))
            modes += [mode] * count
        out.append(Document(np.concatenate(pieces).astype(np.int32), np.array(modes, np.int8)))
    return out


def pixels(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def batch(row: list[Document], images: Tensor, phase: PhaseConfig, capacity: int = CAPACITY) -> PackedBatch:
    packed = pack_rows(
        [row], capacity=capacity, tokens_per_image=phase.tokens_per_image, image_size=phase.image_size, pad_id=PAD_ID, image_id=IMAGE_ID
    )
    return packed.with_pixels(images, 0)


def normalised(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def gradients(model: InfiMed, recipe: Recipe, part: Part) -> dict[str, Tensor]:
    """Our gradients under the names of the part's Hugging Face model."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights_of(model).keys()
    table = [e for e in entries(recipe.model) if e.part == part]
    found = {e: parameters[e.ours].grad for e in table}
    return {name: g for e, grad in found.items() if grad is not None for name, g in zip(e.theirs, e.split(grad), strict=True)}


def their_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst_gradient(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of a tensor, relative to that tensor's largest gradient (or 1/1000 of the largest of all, if that is more)."""
    assert theirs.keys() == ours.keys(), sorted(theirs.keys() ^ ours.keys())
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 0

    def scale(name: str, gradient: Tensor) -> float:
        # Softmax does not see a key's bias: its gradient is zero but for rounding, so its own size means nothing.
        return largest if name.endswith("k_proj.bias") else max(float(gradient.abs().max()), 1e-3 * largest)

    return max(float((ours[name] - g).abs().max()) / scale(name, g) for name, g in theirs.items())
