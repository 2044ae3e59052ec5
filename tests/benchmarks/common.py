"""What the training benchmarks share: a recipe, documents of mixed lengths, rows of them, our model ready to train, a clock.

Without a GPU a small float32 model, with one a larger in bfloat16. Both keep the proportions of the 4B model: the tower's work on an image's
patches and the output layer's on a target are each about a tenth of the language layers' on a token.
"""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_infimed.config import Recipe
from megatron_infimed.data.batch import PackedBatch, pack_rows
from megatron_infimed.data.packing import plan
from megatron_infimed.data.shards import CONTEXT, IMAGE, TARGET, Document
from megatron_infimed.model.infimed import InfiMed, build_pieces
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.parallel import groups
from megatron_infimed.parallel.groups import Ranks
from megatron_infimed.train.guards import Guards
from megatron_infimed.train.optimizer import wrap_and_optimize
from megatron_infimed.train.step import Run
from tests.parity import hf
from tests.tiny import tiny_tokenizer
from tests.unit.test_packing import mixture

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PAD, PICTURE = hf.PAD_ID, hf.IMAGE_ID
MODELS: dict[str, dict[str, Any]] = {  
    "cpu": {
        "vision": {"image_size": 112, "hidden_size": 128, "num_layers": 5, "num_heads": 2, "ffn_hidden_size": 512},
        "language": {
            "hidden_size": 256, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ffn_hidden_size": 768,
            "vocab_size": 2048,
        },
    },
    "cuda": {  # SigLIP SO400M at 168 px (144 patches), Qwen3-1.7B's layers, half as many
        "vision": {"image_size": 168},
        "language": {"hidden_size": 2048, "num_layers": 14, "num_heads": 16, "num_kv_heads": 8, "ffn_hidden_size": 6144, "vocab_size": 32768},
    },
}  # fmt: skip


class Sample(NamedTuple):
    document: Document
    pixels: torch.Tensor
    """uint8 [N, 3, S, S]."""
    length: int


def settings(folder: Path, capacity: int, rows: int = 1, model: dict[str, Any] = MODELS[DEVICE]) -> Recipe:
    """A recipe whose data are in memory: `rows` rows of `capacity` tokens a step, everything learns, as many tokens an image as patches."""
    side = model["vision"]["image_size"] // 14
    return Recipe.model_validate(
        {
            "output": str(folder),
            "model": model,
            "trainable": {"vision": True},
            "precision": {"params": "bfloat16" if CUDA else "float32"},
            "data": {"capacity": capacity, "sources": [{"prefix": "memory"}], "tokenizer": str(tiny_tokenizer(folder / "tokenizer"))},
            "schedule": [{"until": 1.0, "image_size": model["vision"]["image_size"], "tokens_per_image": side**2}],
            "optimizer": {"lr": 1e-4, "warmup": 0.0, "decay": "constant"},
            "batch": {"rows": rows},
        }
    )


def make_samples(recipe: Recipe, n: int, longest: int, seed: int = 0) -> list[Sample]:
    """Captions, VQA turns and reports with 0 to 2 images; a quarter of the text is context, the rest is trained on. Longer ones are left out."""
    phase, rng = recipe.schedule[0], np.random.default_rng(seed)
    lengths, images = mixture(2 * n, phase.tokens_per_image, seed)
    kept = np.flatnonzero(lengths <= longest)[:n]
    made = []
    for total, count in zip(lengths[kept].tolist(), images[kept].tolist(), strict=True):
        text = total - count * phase.tokens_per_image
        values = np.concatenate([np.arange(count), rng.integers(1, PAD, text)]).astype(np.int32)
        modes = np.array([IMAGE] * count + [CONTEXT] * (text // 4) + [TARGET] * (text - text // 4), np.int8)
        pixels = torch.from_numpy(rng.integers(0, 256, (count, 3, phase.image_size, phase.image_size), np.uint8))
        made.append(Sample(Document(values, modes), pixels, total))
    return made


def pack(rows: list[list[Sample]], recipe: Recipe, capacity: int) -> PackedBatch:
    phase = recipe.schedule[0]
    batch = pack_rows(
        [[s.document for s in row] for row in rows],
        capacity=capacity, tokens_per_image=phase.tokens_per_image, image_size=phase.image_size, pad_id=PAD, image_id=PICTURE,
    )  # fmt: skip
    return batch.with_pixels(torch.cat([s.pixels for row in rows for s in row]), 0)


def planned(samples: list[Sample], capacity: int) -> list[list[Sample]]:
    """The samples of each row."""
    p = plan(np.array([s.length for s in samples]), np.array([len(s.pixels) for s in samples]), capacity=capacity)
    return [[samples[i] for i in p.row(r)] for r in range(len(p))]


def build(recipe: Recipe) -> tuple[Ranks, list[InfiMed]]:
    """Our model with fresh weights, the same every time."""
    ranks = groups.initialize(recipe.parallel, recipe.seed)
    pieces = build_pieces(recipe, ranks)
    for piece in pieces:
        initialize_weights(piece, recipe)
    return ranks, pieces


def start(recipe: Recipe) -> Run:
    """Our model wrapped, and its optimizer."""
    ranks, pieces = build(recipe)
    return Run(recipe, ranks, *wrap_and_optimize(pieces, recipe), total_steps=1_000_000, guards=Guards(recipe.guards))


def seconds() -> float:
    """CPU seconds of all threads; with a GPU wall seconds."""
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def machine(threads: int) -> str:
    """Limits torch to so many threads; says what ran."""
    torch.set_num_threads(threads)
    where = torch.cuda.get_device_name() if CUDA else f"{threads} CPU thread{'s' * (threads > 1)}"
    return f"python {platform.python_version()}, torch {torch.__version__}, megatron-core {version('megatron-core')}, {where}"
