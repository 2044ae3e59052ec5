"""torchrun -m tests.parity.reshard SOURCE OUTPUT: loads a checkpoint in TP2 (and PP2), doubles every weight, saves OUTPUT/TP2 (and PP2)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megatron_infimed.config import ParallelConfig, Recipe
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import cpu, groups
from megatron_infimed.train import checkpoint, saver


def main(source: str, output: str, tensor: int, pipeline: int) -> None:
    found = checkpoint.find(source)
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=tensor > 1)
    recipe = Recipe.model_validate(found.state["recipe"]).model_copy(update={"parallel": parallel})
    ranks = groups.initialize(parallel)
    with cpu.cuda_means_cpu():
        model = InfiMed(recipe, ranks)
    checkpoint.load_weights(found, [model])
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    state = {**found.state, "step": 1, "recipe": recipe.model_dump(mode="json")}
    state.pop("imported", None)
    saver.save(Path(output), state, [model], None, ranks)


if __name__ == "__main__":
    main(sys.argv[1], f"{sys.argv[2]}/TP2", tensor=2, pipeline=1)
    main(sys.argv[1], f"{sys.argv[2]}/PP2", tensor=1, pipeline=2)
    groups.shut_down()
