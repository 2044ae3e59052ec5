"""Time of a step, modelled: nothing here has been measured on a GPU. The efficiencies are in hardware.py.

    compute     executed FLOPs (flops.py) of the slowest pipeline stage over an efficiency of the peak, or launching its kernels if that is longer
    tensor      gathers, scatters and reductions of hidden states around each layer, not hidden behind anything
    context     keys and values gathered, their gradients scattered, not hidden
    pipeline    hidden states from stage to stage
    bubble      (p - 1) / v micro-batches that a stage waits
    data        gradients scattered (float32) and weights gathered; with parallel.overlap what the last micro-batch's backward and the first
                one's forward do not hide
    optimizer   reading and writing its state
Rows are taken to be balanced over the ranks, and data to be there in time.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from megatron_infimed.config import Recipe
from megatron_infimed.estimate.hardware import EFFICIENCY, FP8_EFFICIENCY, LAUNCH, LINK_EFFICIENCY, Gpu
from megatron_infimed.estimate.memory import micro_batches, stage_layers, stage_weights
from megatron_infimed.estimate.trace import Trace
from megatron_infimed.estimate.workload import Load
from megatron_infimed.flops import step_flops
from megatron_infimed.model import presets


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    gpus: int
    a_node: int

    def link(self, ranks: int) -> float:
        """Bytes a second between neighbours of so many consecutive ranks."""
        return LINK_EFFICIENCY * (self.gpu.nvlink if ranks <= self.a_node else self.gpu.network)


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    compute: float
    tensor: float
    context: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def step_time(recipe: Recipe, cluster: Cluster, load: Load, seen: Trace) -> StepTime:
    """Of an average step of the load. The recipe must suit the cluster."""
    p, micro = recipe.parallel, micro_batches(recipe, cluster.gpus)
    layers = stage_layers(recipe)
    stages = [_compute(recipe, cluster, load, seen, s) for s in range(p.pipeline)]
    slowest = max(range(p.pipeline), key=stages.__getitem__)
    compute = stages[slowest]
    tensor = layers[slowest] * _tensor(recipe, cluster) + (_tower_tensor(recipe, cluster, load) if slowest == 0 else 0.0)
    context = layers[slowest] * _context(recipe, cluster)
    pipeline = 2 * p.virtual * seen.hidden / cluster.link(cluster.gpus) if p.pipeline > 1 else 0.0
    one = compute + tensor + context + pipeline
    return StepTime(
        compute=micro * compute,
        tensor=micro * tensor,
        context=micro * context,
        pipeline=micro * pipeline,
        bubble=(p.pipeline - 1) / p.virtual * one,
        data=_data(recipe, cluster, seen, one),
        optimizer=_optimizer(recipe, cluster, seen),
    )


def launch_bound(recipe: Recipe, cluster: Cluster, load: Load, seen: Trace) -> bool:
    """Whether a layer's kernels take longer to launch than to run."""
    return _layer(recipe, cluster, load) < seen.kernels * LAUNCH


def _rates(recipe: Recipe, cluster: Cluster, part: str) -> float:
    """FLOP/s of a part's linear layers."""
    peak = cluster.gpu.peak
    assert peak is not None
    if recipe.precision.fp8 != "off" and part in recipe.precision.fp8_parts and peak.fp8 is not None:
        return FP8_EFFICIENCY * peak.fp8
    return EFFICIENCY * peak.bf16


def _work(recipe: Recipe, cluster: Cluster, load: Load) -> dict[str, float]:
    """Seconds of each part on one rank for one micro-batch, were a stage to hold all of it."""
    shared = recipe.batch.rows / recipe.batch.micro_rows * recipe.parallel.tensor * recipe.parallel.context
    rates = {"language": _rates(recipe, cluster, "language"), "tower": _rates(recipe, cluster, "vision")}
    return {
        part: work.hardware / shared / rates.get(part, _rates(recipe, cluster, ""))
        for part, work in step_flops(recipe, load.counts, load.phase.image_size).items()
    }


def _layer(recipe: Recipe, cluster: Cluster, load: Load) -> float:
    work = _work(recipe, cluster, load)
    return (work["language"] + work["attention"]) / recipe.model.language.num_layers


def _compute(recipe: Recipe, cluster: Cluster, load: Load, seen: Trace, stage: int) -> float:
    work = _work(recipe, cluster, load)
    seconds = stage_layers(recipe)[stage] * max(_layer(recipe, cluster, load), seen.kernels * LAUNCH)
    if stage == 0:
        seconds += work["tower"] + work["projector"]
    if stage == recipe.parallel.pipeline - 1:
        seconds += work["output"]
    return seconds


def _tensor(recipe: Recipe, cluster: Cluster) -> float:
    """A language layer's, for a micro-batch: two gathers and two scatters (or as many halves of all-reduces) each way."""
    p = recipe.parallel
    again = {"none": 0, "mlp": 2, "full": 4}[recipe.precision.recompute.language]
    times = 4 + 4 + again + 2 * p.sequence  # the inputs of both column-parallel layers are gathered once more for the weights' gradients
    tokens = recipe.batch.micro_rows * recipe.data.capacity // p.context
    return times * _exchange(recipe, cluster, tokens * recipe.model.language.hidden_size)


def _tower_tensor(recipe: Recipe, cluster: Cluster, load: Load) -> float:
    v = recipe.model.vision
    passes = 1 if not recipe.trainable.vision else 2 + (recipe.precision.recompute.vision == "full")
    images = load.counts.images * recipe.batch.micro_rows / recipe.batch.rows / recipe.parallel.context
    patches = (load.phase.image_size // v.patch_size) ** 2
    return 4 * passes * v.built_layers * _exchange(recipe, cluster, images * patches * v.hidden_size)


def _exchange(recipe: Recipe, cluster: Cluster, numbers: float) -> float:
    """One gather or scatter within the tensor parallel group."""
    tensor = recipe.parallel.tensor
    return (tensor - 1) / tensor * numbers * presets.params_dtype(recipe).itemsize / cluster.link(tensor)


def _context(recipe: Recipe, cluster: Cluster) -> float:
    p, lm = recipe.parallel, recipe.model.language
    numbers = recipe.batch.micro_rows * recipe.data.capacity * 2 * lm.num_kv_heads * lm.head_dim / p.tensor
    times = 3 + (recipe.precision.recompute.language == "full")
    moved = (p.context - 1) / p.context * numbers * presets.params_dtype(recipe).itemsize
    return times * moved / cluster.link(p.tensor * p.context)


def _data(recipe: Recipe, cluster: Cluster, seen: Trace, micro_batch: float) -> float:
    p, gpu = recipe.parallel, cluster.gpu
    ranks = cluster.gpus // (p.tensor * p.pipeline)
    trained = max(stage_weights(recipe, seen, s).trained for s in range(p.pipeline))
    neighbours = max(1, cluster.a_node // (p.tensor * p.context))  # of a node in the same group: each brings its adapter
    across = p.tensor * ranks > cluster.a_node
    speed = LINK_EFFICIENCY * (min(gpu.nvlink, gpu.network * neighbours) if across else gpu.nvlink)
    scattered = (ranks - 1) / ranks * trained * 4 / speed
    gathered = (ranks - 1) / ranks * trained * presets.params_dtype(recipe).itemsize / speed
    if not p.overlap:
        return scattered + gathered
    return max(0.0, scattered - micro_batch * 2 / 3) + max(0.0, gathered - micro_batch / 3)


def _optimizer(recipe: Recipe, cluster: Cluster, seen: Trace) -> float:
    p = recipe.parallel
    trained = max(stage_weights(recipe, seen, s).trained for s in range(p.pipeline))
    touched = 4 + 2 * 4 + 4 * 4 + 2  # gradient, float32 weight and moments there and back, weight
    return trained / (cluster.gpus // (p.tensor * p.pipeline)) * touched / (LINK_EFFICIENCY * cluster.gpu.bandwidth)
