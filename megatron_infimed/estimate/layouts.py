"""Layouts that fit, quickest first.

Tried are all tensor, context and pipeline sizes that a node and the recipe allow (Recipe.problems), pipelines also interleaved; sequence
parallelism always goes with tensor parallelism, overlap with data parallelism. Each is given the mildest recomputation that fits, and more rows
a micro-batch only while its kernels are too small for their launch.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_infimed.config import Recipe, RecomputeConfig
from megatron_infimed.estimate.memory import Memory, memory
from megatron_infimed.estimate.timing import Cluster, StepTime, launch_bound, step_time
from megatron_infimed.estimate.trace import trace
from megatron_infimed.estimate.workload import Workload
from megatron_infimed.flops import step_flops

SIZES = (1, 2, 4, 8, 16)
MICRO_ROWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """A recipe on a cluster."""

    recipe: Recipe
    memory: Memory
    fits: bool
    steps: list[StepTime]
    """A step of each phase; empty where no time is estimated."""
    hours: float
    tokens_a_second: float
    """Text and image tokens, of all GPUs together."""
    mfu: float
    """Of the BF16 peak."""


def judge(recipe: Recipe, cluster: Cluster, load: Workload) -> Layout:
    """Memory and time of a recipe that suits the cluster."""
    needs = memory(recipe, cluster.gpus, cluster.gpu)
    fits = needs.total <= cluster.gpu.memory
    if cluster.gpu.peak is None:
        return Layout(recipe, needs, fits, [], 0.0, 0.0, 0.0)
    seen = trace(recipe, True)
    steps = [step_time(recipe, cluster, part, seen) for part in load.loads]
    seconds = sum(step.total * part.steps for step, part in zip(steps, load.loads, strict=True))
    work = sum(part.steps * sum(w.model for w in step_flops(recipe, part.counts, part.phase.image_size).values()) for part in load.loads)
    mfu = work / (seconds * cluster.gpus * cluster.gpu.peak.bf16)
    return Layout(recipe, needs, fits, steps, seconds / 3600, load.tokens / seconds, mfu)


def proposals(recipe: Recipe, cluster: Cluster, load: Workload) -> list[Layout]:
    """All that fit, quickest first; among equals the one that needs least memory."""
    found = [layout for candidate in _candidates(recipe, cluster) for layout in _fitting(candidate, cluster, load)]
    return sorted(found, key=lambda layout: (round(layout.hours, 6), layout.memory.total))


def _candidates(recipe: Recipe, cluster: Cluster) -> Iterator[Recipe]:
    tensors = [t for t in SIZES if t <= cluster.a_node]
    for tensor, context, pipeline, virtual in itertools.product(tensors, SIZES, SIZES, (1, 2, 3, 4)):
        alone = cluster.gpus == tensor * pipeline
        parallel = recipe.parallel.model_copy(
            update={
                "tensor": tensor, "context": context, "pipeline": pipeline, "virtual": virtual, "sequence": tensor > 1,
                "overlap": recipe.parallel.overlap or not alone, "first_stage_layers": _first_stage(recipe, pipeline, virtual),
            }
        )  # fmt: skip
        candidate = recipe.model_copy(update={"parallel": parallel})
        if not _with_rows(candidate, 1).problems(cluster.gpus):
            yield candidate


def _first_stage(recipe: Recipe, pipeline: int, virtual: int) -> int | None:
    """None where the layers divide evenly, else the most on the first stage that leaves the others more."""
    layers = recipe.model.language.num_layers
    if pipeline == 1 or layers % (pipeline * virtual) == 0:
        return None
    fits = [n for n in range(virtual, layers // pipeline + 1, virtual) if (layers - n) % ((pipeline - 1) * virtual) == 0]
    return max(fits, default=None)


def _fitting(recipe: Recipe, cluster: Cluster, load: Workload) -> Iterator[Layout]:
    for rows in MICRO_ROWS:
        candidate = _with_rows(recipe, rows)
        if candidate.problems(cluster.gpus):
            return
        layout = next((x for x in (judge(r, cluster, load) for r in recomputing(candidate)) if x.fits), None)
        if layout is None:
            return
        yield layout
        if not launch_bound(layout.recipe, cluster, load.loads[-1], trace(layout.recipe, True)):
            return


def _with_rows(recipe: Recipe, rows: int) -> Recipe:
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_rows": rows})})


def recomputing(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with every recomputation, mild ones first. A frozen tower keeps nothing anyway."""
    for language, tower in itertools.product(("none", "mlp", "full"), ("none", "full")):
        if not recipe.trainable.vision and (tower == "none") != (language == "none"):
            continue
        recompute = RecomputeConfig(language=language, vision=tower)
        yield recipe.model_copy(update={"precision": recipe.precision.model_copy(update={"recompute": recompute})})


def words(recipe: Recipe, other: Recipe) -> str:
    """The overrides that turn a recipe into another layout of it, ready for a shell."""
    out = []
    for section, names in (("parallel", list(type(recipe.parallel).model_fields)), ("batch", ["micro_rows"])):
        before, after = getattr(recipe, section), getattr(other, section)
        out += [f"{section}.{n}={_yaml(getattr(after, n))}" for n in names if getattr(before, n) != getattr(after, n)]
    again = other.precision.recompute
    if again != recipe.precision.recompute:
        both = again.language if again.language == again.vision else f"{{language: {again.language}, vision: {again.vision}}}"
        out.append(f"precision.recompute={both}")
    return " ".join(shlex.quote(word) for word in out)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()
