"""torchrun ... -m tests.distributed.encoder FILE [overlap]: one global batch of four rows, of which only the even ones have images; writes the
gradients of tower and projector, summed over all processes. With two processes every row of the second one is text alone."""

from __future__ import annotations

import sys

import numpy as np
import torch
from megatron.core.pipeline_parallel import schedules

from megatron_infimed.config import Recipe
from megatron_infimed.data.batch import PackedBatch, pack_rows
from megatron_infimed.data.shards import CONTEXT, IMAGE, TARGET, Document
from megatron_infimed.model.infimed import build_pieces
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.parallel import groups
from megatron_infimed.train import step
from megatron_infimed.train.guards import Guards
from megatron_infimed.train.optimizer import wrap_and_optimize
from tests.distributed.runs import RECIPE

SIZE, TOKENS, ROWS = 56, 16, 4


def row(number: int) -> PackedBatch:
    rng = np.random.default_rng(number)
    documents = []
    for length in (40, 9, 25):
        modes = np.array([CONTEXT] * 5 + [TARGET] * (length - 5), np.int8)
        modes[2] = IMAGE if number % 2 == 0 else CONTEXT
        documents.append(Document(rng.integers(10, 512, length).astype(np.int32), modes))
    batch = pack_rows([documents], capacity=128, tokens_per_image=TOKENS, image_size=SIZE, pad_id=0, image_id=1)
    pixels = rng.integers(0, 256, (batch.counts.images, 3, SIZE, SIZE), dtype=np.uint8)
    return batch.with_pixels(torch.from_numpy(pixels), 0)


def main(file: str, overlap: bool) -> None:
    recipe = Recipe.model_validate({**RECIPE, "parallel": {"overlap": overlap}})
    ranks = groups.initialize(recipe.parallel)
    models = build_pieces(recipe, ranks)
    initialize_weights(models[0], recipe)
    pieces, optimizer = wrap_and_optimize(models, recipe)
    run = step.Run(recipe, ranks, pieces, optimizer, 1, Guards(recipe.guards))
    whole = schedules.forward_backward_no_pipelining
    step.get_forward_backward_func = lambda: lambda **words: whole(**words, force_all_reduce=True)  # gradients whole on every process
    step.zero_gradients(run)
    step.forward_backward(run, 0, [row(number) for number in range(ranks.data, ROWS, ranks.data_size)])
    if ranks.main:
        parts = (models[0].vision_tower, models[0].projector)
        gradients = {f"{type(p).__name__}.{name}": w.main_grad.clone() for p in parts if p is not None for name, w in p.named_parameters()}
        torch.save(gradients, file)
    groups.shut_down()


if __name__ == "__main__":
    main(sys.argv[1], "overlap" in sys.argv)
