"""What `estimate` says: the recipe's own layout first, then those that fit, quickest first; for people or as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from megatron_infimed.config import ParallelConfig, Recipe
from megatron_infimed.errors import UserError
from megatron_infimed.estimate.hardware import EFFICIENCY, FP8_EFFICIENCY, FRAGMENTED, GIB, GPUS, LAUNCH, LINK_EFFICIENCY, RESERVED
from megatron_infimed.estimate.layouts import Layout, judge, proposals, recomputing, words
from megatron_infimed.estimate.memory import Memory, memory
from megatron_infimed.estimate.timing import Cluster
from megatron_infimed.estimate.trace import hardest, trace
from megatron_infimed.estimate.workload import Described, Workload, workload

SHOWN = 8
"""Proposals."""
MEMORY_IS = (
    "Memory: modelled, by running the real model without numbers; on the CPU that is within 2 % of what torch allocates in a training step",
    f"(tests/unit/test_estimate.py), on a GPU nothing was measured. Taken: {RESERVED / GIB:g} GiB for CUDA, NCCL and libraries, "
    f"{FRAGMENTED:.0%} for fragmentation.",
)
TIME_IS = (
    f"Time: modelled, not measured. Taken: {EFFICIENCY:.0%} of the BF16 peak (Megatron-LM, published for 2B on H100; 47-48 % at best),",
    f"{FP8_EFFICIENCY:.0%} of the FP8 peak (NeMo, published), {LINK_EFFICIENCY:.0%} of links and memory, {1e6 * LAUNCH:g} us a kernel, "
    "balanced rows, data in time.",
)


@dataclass(frozen=True)
class Disk:
    checkpoint: int
    """Bytes."""
    kept: int
    """Checkpoints at the end, and one more while it is written."""

    @property
    def total(self) -> int:
        return self.checkpoint * (self.kept + 1)


@dataclass(frozen=True)
class Estimate:
    recipe: Recipe
    cluster: Cluster
    load: Workload
    own: Layout | None
    """None where the recipe's layout does not suit the cluster."""
    problem: str
    """Why."""
    by_recompute: dict[str, Memory]
    """The own layout with each recomputation."""
    proposals: list[Layout]
    disk: Disk


def estimate(
    recipe: Recipe, gpus: int, gpus_a_node: int = 8, gpu: str = "h100", described: Described = Described(), as_json: bool = False
) -> str:
    """Text, or JSON with bytes and seconds.

    Raises:
        UserError: an unknown GPU, or a number of GPUs that suits no layout.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is here has nothing to do with it, and must not be taken
    made = make(recipe, _cluster(gpus, gpus_a_node, gpu), described)
    return json.dumps(_plain(made), indent=1) if as_json else "\n".join(_lines(made))


def make(recipe: Recipe, cluster: Cluster, described: Described) -> Estimate:
    """Everything that `estimate` prints."""
    load = workload(recipe, described)
    problems = recipe.problems(cluster.gpus)
    own = None if problems else judge(recipe, cluster, load)
    found = proposals(recipe, cluster, load) if cluster.gpu.is_cuda else []
    if own is None and not found:
        raise UserError(f"{cluster.gpus} GPUs: no layout suits or fits ({problems[0]}): take another --gpus, or change batch.rows")
    by_recompute = {} if own is None else {_recompute(r): memory(r, cluster.gpus, cluster.gpu) for r in recomputing(recipe)}
    return Estimate(recipe, cluster, load, own, "; ".join(problems), by_recompute, found, _disk(recipe, load))


def _cluster(gpus: int, a_node: int, gpu: str) -> Cluster:
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: not known, take one of {', '.join(GPUS)}")
    if gpus < 1 or a_node < 1 or (gpus > a_node and gpus % a_node):
        raise UserError(f"--gpus {gpus}: not a whole number of nodes of {a_node}; take a multiple, or say --gpus-a-node")
    return Cluster(GPUS[gpu], gpus, min(gpus, a_node))


def _disk(recipe: Recipe, load: Workload) -> Disk:
    seen = trace(recipe.model_copy(update={"parallel": ParallelConfig()}), False)
    weights = seen.embedding + seen.tower + seen.norm + seen.output
    weights += seen.tower_layer * recipe.model.vision.built_layers + seen.layer * recipe.model.language.num_layers
    size = weights.all * (4 if recipe.precision.params == "float32" else 2) + weights.trained * 12
    for_good = load.steps // recipe.checkpoint.keep_every if recipe.checkpoint.keep_every else 0
    saved = load.steps // recipe.checkpoint.every + 1 if recipe.checkpoint.every else 1
    return Disk(size, min(saved, recipe.checkpoint.keep + for_good))


def _lines(e: Estimate) -> list[str]:
    c = e.cluster
    nodes = f"{c.gpus // c.a_node} node{'s' * (c.gpus > c.a_node)} of {c.a_node}"
    out = [f"{e.recipe.stage} on {c.gpus} x {c.gpu.name} ({nodes})", "", *MEMORY_IS, *(TIME_IS if c.gpu.is_cuda else ()), ""]
    out += _own(e) if e.own else [f"The recipe's own layout does not suit: {e.problem}", ""]
    if c.gpu.is_cuda:
        out += [*_describe(e.load), "", *_table(e), ""]
    kept = f"{e.disk.kept} kept and one being written: {e.disk.total / 1e9:,.0f} GB"
    return [*out, f"Disk: {e.disk.checkpoint / 1e9:,.1f} GB a checkpoint, {kept} (modelled; weights, and 12 bytes a trained parameter)"]


def _own(e: Estimate) -> list[str]:
    assert e.own is not None
    m, recipe = e.own.memory, e.recipe
    ranks = e.cluster.gpus // (recipe.parallel.tensor * recipe.parallel.pipeline)
    on_top = m.moments[m.highest] - m.activations
    rows = [
        ("weights", m.weights, f"{recipe.precision.params}, frozen parts too"),
        *([("FP8 copies", m.fp8_copies, "of the weights, and transposed")] if m.fp8_copies else []),
        ("gradients", m.gradients, "float32, of what learns"),
        ("optimizer", m.optimizer, f"shared by {ranks} rank{'s' * (ranks > 1)}"),
        ("batch", m.batch, "tokens and images of a micro-batch"),
        ("activations", m.activations, f"kept for the backward pass; recompute {_recompute(recipe)}"),
        ("working", on_top, f"above them in the highest moment, {m.highest}"),
        *([("allowance", m.allowance, "CUDA, NCCL, libraries, fragmentation")] if m.allowance else []),
    ]
    moments = ", ".join(f"{name} {_gib(n)}" for name, n in m.moments.items())
    has = f" of {_gib(e.cluster.gpu.memory)}: {'fits' if e.own.fits else 'DOES NOT FIT'}" if e.cluster.gpu.is_cuda else ""
    phase, images = hardest(recipe)
    where = f" (pipeline stage {m.stage})" if recipe.parallel.pipeline > 1 else ""
    again = ", ".join(f"{name} {_gib(x.total)}" for name, x in e.by_recompute.items())
    return [
        f"The recipe's own layout: {_layout(recipe)}",
        f"Memory in GiB of the rank that needs most{where}; a row has {images} images of {phase.image_size} px, all else are targets:",
        *(f"  {name:<12}{_gib(n):>6}   {text}" for name, n, text in rows),
        f"  {'total':<12}{_gib(m.total):>6}{has}",
        f"  activations + working: {moments}",
        f"  total by recompute mode: {again}",
        "",
    ]


def _describe(load: Workload) -> list[str]:
    phases = [
        f"  {x.phase.image_size} px: {x.steps:,} steps of {(x.counts.text_tokens + x.counts.image_tokens) / 1e6:.2f} M tokens and "
        f"{x.counts.images:,} images"
        for x in load.loads
    ]
    return [f"Work, {load.tokens / 1e9:,.2f} B tokens ({load.source}):", *phases]


def _table(e: Estimate) -> list[str]:
    out = [f"{'':3}{'layout':<44}{'GiB':>6}{'s/step':>8}{'bubble':>8}{'comm':>6}{'MFU':>7}{'tokens/s':>12}{'hours':>8}{'GPU-hours':>11}"]
    if e.own:
        out.append(_row("own", e.own, e.cluster) + ("" if e.own.fits else "   DOES NOT FIT"))
    out += [_row(str(i + 1), layout, e.cluster) for i, layout in enumerate(e.proposals[:SHOWN])]
    if not e.proposals:
        return [*out, f"No layout fits {e.cluster.gpus} x {_gib(e.cluster.gpu.memory)} GiB: take more GPUs, or a smaller data.capacity"]
    best = [f"{i + 1:>3}  {words(e.recipe, x.recipe) or '(the recipe as it is)'}" for i, x in enumerate(e.proposals[:SHOWN])]
    return [*out, f"{len(e.proposals)} layouts fit. To use one, add its words to train, check or estimate:", *best]


def _row(name: str, x: Layout, cluster: Cluster) -> str:
    step = max(x.steps, key=lambda s: s.total)
    moved = step.tensor + step.context + step.pipeline + step.data
    return (
        f"{name:<3} {_layout(x.recipe):<43}{_gib(x.memory.total):>6}{step.total:>8.2f}{step.bubble / step.total:>8.1%}{moved / step.total:>6.0%}"
        f"{x.mfu:>7.1%}{x.tokens_a_second:>12,.0f}{x.hours:>8.1f}{x.hours * cluster.gpus:>11,.0f}"
    )


def _layout(recipe: Recipe) -> str:
    p = recipe.parallel
    sizes = [f"TP{p.tensor}" + "+SP" * p.sequence, f"PP{p.pipeline}" + (f"x{p.virtual}" if p.virtual > 1 else ""), f"CP{p.context}"]
    parts = [s for s in sizes if not s.endswith("1")] or ["DP"]
    return f"{' '.join(parts)}, {recipe.batch.micro_rows} row{'s' * (recipe.batch.micro_rows > 1)}, recompute {_recompute(recipe)}"


def _recompute(recipe: Recipe) -> str:
    again = recipe.precision.recompute
    return f"{again.language}/{again.vision}" if recipe.trainable.vision else again.language


def _gib(n: int) -> str:
    return f"{n / GIB:.1f}"


def _plain(e: Estimate) -> dict[str, Any]:
    return {
        "measured": [],
        "modelled": ["memory", "time", "disk"],
        "notes": [" ".join(MEMORY_IS), " ".join(TIME_IS)],
        "stage": e.recipe.stage,
        "cluster": asdict(e.cluster),
        "work": asdict(e.load) | {"loads": [{**asdict(x.counts), **x.phase.model_dump(), "steps": x.steps} for x in e.load.loads]},
        "own": _plain_layout(e.recipe, e.own, e.cluster) if e.own else {"problem": e.problem},
        "memory_by_recompute": {name: x.total for name, x in e.by_recompute.items()},
        "proposals": [_plain_layout(e.recipe, x, e.cluster) for x in e.proposals],
        "disk": asdict(e.disk) | {"total": e.disk.total},
    }


def _plain_layout(recipe: Recipe, x: Layout, cluster: Cluster) -> dict[str, Any]:
    p = x.recipe.parallel.model_dump(mode="json")
    return {
        "words": words(recipe, x.recipe),
        "parallel": p,
        "micro_rows": x.recipe.batch.micro_rows,
        "recompute": x.recipe.precision.recompute.model_dump(mode="json"),
        "memory": asdict(x.memory) | {"total": x.memory.total, "highest": x.memory.highest},
        "fits": x.fits,
        "step_seconds": [asdict(s) | {"total": s.total} for s in x.steps],
        "hours": x.hours,
        "gpu_hours": x.hours * cluster.gpus,
        "tokens_a_second": x.tokens_a_second,
        "mfu": x.mfu,
    }
