"""torchrun ... -m tests.distributed.culprits FOLDER '{"NAME": {"pipeline": 2}, ...}': for each layout, and each way a document can spoil a
step, name_culprits over a global batch of eight rows, and between them steps over clean ones; FOLDER/NAME.json has what was said, and the
figures of the clean steps with and without all this.

What spoils a step is put into the model by hooks of this script: infinite embeddings of one token, an undefined gradient of another, features
of a picture that begins with a certain pixel, two tokens that only together in a row are bad, a weight.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_infimed.config import Recipe
from megatron_infimed.data.batch import PackedBatch, image_block, pack_rows
from megatron_infimed.data.shards import CONTEXT, IMAGE, TARGET, Document
from megatron_infimed.errors import UserError
from megatron_infimed.model.infimed import build_pieces
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.parallel import groups
from megatron_infimed.parallel.groups import Ranks
from megatron_infimed.train import step
from megatron_infimed.train.guards import Guards, name_culprits
from megatron_infimed.train.optimizer import wrap_and_optimize
from tests.distributed.runs import RECIPE

SIZE, TOKENS, ROWS = 28, 4, 8
LOSS, GRADIENT, ONE, OTHER, PIXEL = 500, 501, 502, 503, 251
SPOILED = {
    "loss": {(2, 1): LOSS, (5, 0): LOSS, (5, 3): LOSS},
    "gradient": {(0, 2): GRADIENT},
    "image": {(6, 1): PIXEL},
    "together": {(3, 2): ONE, (3, 3): OTHER, (4, 2): ONE, (7, 3): OTHER},
    "weights": {},
}
"""(row, document of the row): the token that it holds, or the first pixel of its picture."""
LENGTHS = (28, 12, 36, 20)


def row(number: int, spoiled: dict[tuple[int, int], int], share: tuple[int, int]) -> PackedBatch:
    """Four documents, of which the second has a picture, and padding."""
    rng = np.random.default_rng(number)
    documents = []
    for i, length in enumerate(LENGTHS):
        modes = np.array([CONTEXT] * 5 + [TARGET] * (length - 5), np.int8)
        values = rng.integers(10, 500, length).astype(np.int32)
        modes[2] = IMAGE if i == 1 else CONTEXT
        if spoiled.get((number, i), PIXEL) != PIXEL:
            values[3] = spoiled[number, i]
        documents.append(Document(values, modes))
    names = [[(0, 10 * number + i) for i in range(len(LENGTHS))]]
    batch = pack_rows(
        [documents], capacity=128, tokens_per_image=TOKENS, image_size=SIZE, pad_id=0, image_id=1, document_alignment=4, documents=names
    )
    pixels = rng.integers(0, 200, (1, 3, SIZE, SIZE), dtype=np.uint8)
    pixels[0, 0, 0, 0] = PIXEL if spoiled.get((number, 1)) == PIXEL else 0
    return batch.with_pixels(torch.from_numpy(pixels)[[*image_block(1, share)]], 0, share)


def spoil_embeddings(module: Any, inputs: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    tokens = inputs[0].unsqueeze(-1)
    if bool((tokens == ONE).any()) and bool((tokens == OTHER).any()):
        out = out * float("nan")
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient.masked_fill(tokens == GRADIENT, float("nan")))
    return out.masked_fill(tokens == LOSS, float("inf"))


def spoil_features(module: Any, inputs: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    return out.masked_fill((inputs[0][:, 0, 0, 0] == PIXEL).view(-1, 1, 1), float("inf"))


def build(parallel: dict[str, Any]) -> step.Run:
    recipe = Recipe.model_validate({**RECIPE, "parallel": parallel, "model": {**RECIPE["model"], "dropout": 0.1}})
    ranks = groups.initialize(recipe.parallel)
    models = build_pieces(recipe, ranks)
    for model in models:
        initialize_weights(model, recipe)
        if model.pre_process:
            model.language_model.embedding.word_embeddings.register_forward_hook(spoil_embeddings)
            model.vision_tower.register_forward_hook(spoil_features)
    pieces, optimizer = wrap_and_optimize(models, recipe)
    return step.Run(recipe, ranks, pieces, optimizer, 10, Guards(recipe.guards))


def mine(ranks: Ranks, spoiled: dict[tuple[int, int], int]) -> list[PackedBatch]:
    return [row(number, spoiled, ranks.image_share) for number in range(ranks.data, ROWS, ranks.data_size)]


def snapshot(run: step.Run) -> list[torch.Tensor]:
    """All that naming must leave as it is."""
    held = [p.detach().clone() for piece in run.pieces for p in piece.parameters()]
    for inner in run.optimizer.chained_optimizers:
        held += [tensor.detach().clone() for p, moments in inner.optimizer.state.items() for tensor in (p, *moments.values())]
    return held


def spoil_and_name(run: step.Run, number: int, spoiled: str, folder: Path) -> dict[str, Any]:
    """A step over the spoiled rows, and what is said about it; all else must be as before."""
    batches = mine(run.ranks, SPOILED[spoiled])
    result = step.train_step(run, number, batches)
    hooks, before = [vars(piece.config).copy() for piece in run.pieces], snapshot(run)
    push = partial(step.forward_backward, run, number)
    path = folder / f"{spoiled}.jsonl"
    try:
        said = name_culprits(run.pieces, iter(batches), lambda some: push(some)[0], run.ranks, "doc {}:{}".format, path, number + 1)
    except UserError as e:
        said = f"{type(e).__name__}: {e}"
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True)), "something was changed"
    assert hooks == [vars(piece.config) for piece in run.pieces]
    assert not any(bool(buffer.grad_data.any()) for piece in run.pieces for buffer in piece.buffers), "gradients are left"
    return {"kind": result.verdict.kind, "said": said}


def main(folder: Path, layouts: dict[str, dict[str, Any]]) -> None:
    for name, parallel in layouts.items():
        (folder / name).mkdir(exist_ok=True)
        out: dict[str, Any] = {"figures": [], "undisturbed": []}
        run = build(parallel)
        for number, spoiled in enumerate(SPOILED):
            result = step.train_step(run, 2 * number, mine(run.ranks, {}))
            out["figures"].append((result.loss, result.grad_norm))
            if spoiled == "weights":
                weight = next(p for n, p in run.models[-1].named_parameters() if "linear_fc1.weight" in n)
                weight.detach().view(-1)[7] = float("inf")
            out[spoiled] = spoil_and_name(run, 2 * number + 1, spoiled, folder / name)
        run = build(parallel)
        for number in range(len(SPOILED)):
            result = step.train_step(run, 2 * number, mine(run.ranks, {}))
            out["undisturbed"].append((result.loss, result.grad_norm))
        if run.ranks.main:
            (folder / f"{name}.json").write_text(json.dumps(out))
    groups.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
