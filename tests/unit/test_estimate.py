"""`estimate` against what training steps really allocate on the CPU, against sums done by hand, and against the recipes it proposes.

`python -m torch.distributed.run --nproc-per-node N -m tests.unit.test_estimate SHAPE JSON...` prints what each process of a layout allocates.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from megatron_infimed.check import count_parameters
from megatron_infimed.config import ParallelConfig, Recipe
from megatron_infimed.data.batch import PackedBatch, image_block, pack_rows
from megatron_infimed.data.saved_plan import plan_of
from megatron_infimed.data.shards import IMAGE, TARGET, Document
from megatron_infimed.errors import UserError
from megatron_infimed.estimate import report, workload
from megatron_infimed.estimate.hardware import GPUS
from megatron_infimed.estimate.layouts import judge, proposals, recomputing, words
from megatron_infimed.estimate.memory import in_flight, memory
from megatron_infimed.estimate.timing import Cluster
from megatron_infimed.estimate.trace import LiveBytes
from megatron_infimed.estimate.workload import Described
from megatron_infimed.model.infimed import build_pieces
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.parallel import groups
from megatron_infimed.recipe_files import load_recipe
from megatron_infimed.train.guards import Guards
from megatron_infimed.train.optimizer import wrap_and_optimize
from megatron_infimed.train.step import Run, train_step
from tests.unit.test_schedule import random_shard

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU path")
ROOT = Path(__file__).parents[2]
LAST = 1
"""The step that is measured; step 0 makes the optimizer's moments."""


def recipe(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    capacity: int,
    *,
    tower: tuple[int, int] = (96, 4),
    **settings: Any,
) -> Recipe:
    width, blocks = tower
    base = {
        "output": "unused",
        "schedule": [{"until": 1.0, "image_size": 112, "tokens_per_image": 16}],
        "model": {
            "vision": {"image_size": 112, "hidden_size": width, "num_layers": blocks + 1, "num_heads": 4, "ffn_hidden_size": 3 * width},
            "language": {
                "hidden_size": hidden, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 32,
                "ffn_hidden_size": 3 * hidden, "vocab_size": vocabulary,
            },
        },
        "precision": {"params": "float32", **settings.pop("precision", {})},
        "data": {"capacity": capacity, "max_images": 16, "document_alignment": 4},
        "batch": {"rows": 8, **settings.pop("batch", {})},
        **settings,
    }  # fmt: skip
    return Recipe.model_validate(base)


SHAPES = {
    "narrow, long rows": (recipe(128, 6, 4, 2, 1024, 512), 4, 4),
    "wide vocabulary": (recipe(256, 2, 8, 2, 16384, 256, batch={"loss_tokens": 128, "rows": 4}), 4, 4),
    "trained tower": (recipe(192, 3, 6, 6, 2048, 512, tower=(128, 6), trainable={"vision": True}), 16, 16),
    "full recomputation": (recipe(192, 5, 6, 2, 2048, 1024, precision={"recompute": "full"}, batch={"rows": 2}), 4, 4),
    "all recomputed, bfloat16": (
        recipe(128, 3, 4, 2, 2048, 512, tower=(128, 6), precision={"recompute": "full", "params": "bfloat16"}, trainable={"vision": True}), 16, 16,
    ),
    "language frozen": (recipe(256, 4, 8, 4, 4096, 256, trainable={"language": False}), 8, 8),
    "MLP recomputed, two rows": (recipe(192, 4, 6, 6, 4096, 256, precision={"recompute": {"language": "mlp"}}, batch={"micro_rows": 2}), 8, 4),
}  # fmt: skip
"""Recipe, documents in a row, and how many of those have an image."""


def batch(name: str) -> PackedBatch:
    """A micro-batch without its pixels; a quarter of the text has no target."""
    settings, documents, images = SHAPES[name]
    phase, capacity = settings.schedule[0], settings.data.capacity
    row = []
    for n in range(documents):
        image = [IMAGE] * (n < images)
        text = capacity // documents - len(image) * phase.tokens_per_image
        modes = np.array(image + [0] * (text // 4) + [TARGET] * (text - text // 4), np.int8)
        row.append(Document(np.zeros(len(modes), np.int32), modes))
    sizes = {"capacity": capacity, "tokens_per_image": phase.tokens_per_image, "image_size": phase.image_size}
    return pack_rows([row] * settings.batch.micro_rows, pad_id=0, image_id=0, **sizes)


def steps(settings: Recipe, whole: PackedBatch):
    """Trains; yields the number of each step before it is done. The processes stay joined."""
    ranks = groups.initialize(settings.parallel)
    if ranks.first_stage:
        images = len(image_block(whole.counts.images, ranks.image_share))
        pixels = torch.zeros(images, 3, whole.image_size, whole.image_size, dtype=torch.uint8)
        whole = whole.with_pixels(pixels, 0, ranks.image_share)
    pieces = build_pieces(settings, ranks)
    for piece in pieces:
        initialize_weights(piece, settings)
    run = Run(settings, ranks, *wrap_and_optimize(pieces, settings), total_steps=10, guards=Guards(settings.guards))
    for step in range(LAST + 1):
        yield step
        train_step(run, step, [whole] * (settings.batch.rows // settings.batch.micro_rows // ranks.data_size))


def allocated(settings: Recipe, whole: PackedBatch) -> int:
    """The most bytes that torch's own allocator had handed out at once during the last step, model and optimizer included."""
    plain = torch.backends.mkldnn.flags(
        enabled=False
    )  # oneDNN takes scratch memory as the processor likes: 4 % in bfloat16 on one with AMX
    with plain, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        for step in steps(settings, whole):
            with record_function(f"step {step}"):
                pass
    groups.shut_down()
    raw: Any = events.profiler
    alive = peak = 0
    for event in sorted(raw.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
        elif event.name() == f"step {LAST}":
            peak = alive
    return peak


class Storages(LiveBytes):
    """The same from the storages of real tensors: gloo frees in threads that the profiler does not see."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        return out


def stored(settings: Recipe, whole: PackedBatch) -> int:
    with Storages() as live:
        for _ in steps(settings, whole):
            gc.collect()
            live.peak = live.bytes
    return live.peak


@pytest.fixture(scope="module")
def warm():
    """The first pass under the profiler in a process now and then shows 5 MB that no later one does (seen twice)."""
    name = "narrow, long rows"
    allocated(SHAPES[name][0], batch(name))


@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_what_a_step_allocates(name, warm):
    settings, one = SHAPES[name][0], batch(name)
    modelled, real = memory(settings, 1, GPUS["cpu"], one), allocated(settings, one)
    print(
        f"{name}: modelled {modelled.total / 1e6:.2f} MB ({modelled.highest}), measured {real / 1e6:.2f} MB, {modelled.total / real - 1:+.2%}"
    )
    assert modelled.total == pytest.approx(real, rel=0.02)  # measured worst 0.8 %


LAYOUTS = [
    {"overlap": True}, {"tensor": 2, "sequence": True}, {"context": 2}, {"pipeline": 2, "virtual": 3}, {"pipeline": 2, "first_stage_layers": 2},
]  # fmt: skip


def test_memory_is_that_of_the_fullest_process_of_a_layout():
    name, wanted = "narrow, long rows", [json.dumps(x) for x in LAYOUTS]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.unit.test_estimate"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, name, *wanted], cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [(int(place), int(size)) for place, size in re.findall(r"<layout (\d+): (\d+) bytes>", done.stdout)]
    for number, parallel in enumerate(LAYOUTS):
        real = max(size for place, size in printed if place == number)
        modelled = memory(laid_out(name, parallel), 2, GPUS["cpu"], batch(name)).total
        print(f"{parallel}: modelled {modelled / 1e6:.2f} MB, measured {real / 1e6:.2f} MB, {modelled / real - 1:+.2%}")
        assert modelled == pytest.approx(real, rel=0.03), parallel  # measured worst 1.5 %


def laid_out(name: str, parallel: dict[str, Any]) -> Recipe:
    return SHAPES[name][0].model_copy(update={"parallel": ParallelConfig(**parallel)})


def ship(name: str, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "launch" / "recipes" / f"{name}.yaml", overrides)


def test_the_4b_model_counts_as_it_is():
    settings = ship("pretrain_4b", "parallel.overlap=false")
    counted, found = count_parameters(settings), memory(settings, 64, GPUS["h100"])
    learns = counted.language + counted.projector
    assert found.weights == 2 * (learns + counted.vision)
    assert found.gradients == 4 * learns
    assert found.optimizer == 12 * math.ceil(learns / 64)
    split = memory(ship("pretrain_4b", "parallel={tensor: 4, sequence: true}"), 64, GPUS["h100"])
    assert split.gradients == pytest.approx(found.gradients / 4, rel=1e-3)  # norms are on every rank
    whole, quarter = (
        memory(ship("pretrain_4b", "precision.recompute=none", *more), 64, GPUS["h100"]).activations
        for more in ((), ("parallel={tensor: 4, sequence: true}",))
    )
    assert quarter == pytest.approx(whole / 4, rel=0.05)  # image features are whole on every rank
    frozen = memory(ship("pretrain_4b", "trainable.language=false"), 64, GPUS["h100"])
    assert frozen.gradients == 4 * counted.projector and frozen.weights == found.weights


def test_recomputing_keeps_less_and_takes_longer():
    settings, cluster = ship("pretrain_4b"), Cluster(GPUS["h100"], 8, 8)
    load = workload.workload(settings, Described())
    none, mlp, full = (judge(r, cluster, load) for r in recomputing(settings))
    assert none.memory.activations > mlp.memory.activations > 4 * full.memory.activations
    assert none.hours < mlp.hours < full.hours
    assert full.hours / none.hours == pytest.approx(4 / 3, rel=0.06)  # a forward more; frozen tower and output layer do without


@pytest.mark.parametrize(
    ("parallel", "stage", "micro", "pieces"),
    [
        ({}, 0, 9, (1, 1)),
        ({"pipeline": 4}, 0, 9, (4, 4)),
        ({"pipeline": 4}, 3, 9, (1, 1)),
        ({"pipeline": 4}, 0, 2, (2, 2)),
        ({"pipeline": 2, "virtual": 3}, 0, 8, (7, 3)),  # 2 x 1 + 2 x 2 warm up, one more; micro-batches 0, 1 and 2 went through piece 0
        ({"pipeline": 2, "virtual": 3}, 1, 8, (5, 2)),
        ({"pipeline": 4, "virtual": 2}, 0, 4, (8, 4)),
    ],
)
def test_micro_batches_in_flight(parallel, stage, micro, pieces):
    assert in_flight(ParallelConfig(**parallel), stage, micro) == pieces


def test_time_adds_up():
    cluster = Cluster(GPUS["h100"], 16, 8)

    def step(*overrides: str, on: Cluster = cluster):
        settings = ship("pretrain_4b", "parallel.overlap=false", *overrides)
        return judge(settings, on, workload.workload(settings, Described())).steps[-1]

    plain = step()
    assert plain.tensor == plain.context == plain.pipeline == plain.bubble == 0
    assert step(on=Cluster(GPUS["h100"], 32, 8)).compute == pytest.approx(plain.compute / 2)
    piped = step("parallel.pipeline=2", "parallel.virtual=3")
    micro = 256 // 8
    assert piped.bubble == pytest.approx((piped.compute + piped.pipeline) / micro / 3)
    near, far = (step("parallel.tensor=8", on=Cluster(GPUS["h100"], 16, a_node)).tensor for a_node in (8, 4))
    assert far == pytest.approx(near * 450 / 50)  # over the network
    assert step("parallel.overlap=true").data < plain.data


def test_proposals_fit_and_can_be_typed():
    settings, cluster = ship("pretrain_1p7b", "data.document_alignment=4"), Cluster(GPUS["h100"], 4, 4)
    load = workload.workload(settings, Described())
    found = proposals(settings, cluster, load)
    assert len(found) > 10 and {x.recipe.parallel.context for x in found} == {1, 2}
    assert [x.hours for x in found] == sorted(x.hours for x in found)
    for x in found:
        assert x.fits and x.memory.total <= cluster.gpu.memory and not x.recipe.problems(4)
    for x in found[:5]:
        typed = ship("pretrain_1p7b", "data.document_alignment=4", *shlex.split(words(settings, x.recipe)))
        assert (typed.parallel, typed.batch, typed.precision) == (x.recipe.parallel, x.recipe.batch, x.recipe.precision)


def test_what_does_not_fit_a_gpu_is_split_or_recomputed():
    settings, cluster = ship("pretrain_4b", "data.capacity=32768", "batch.rows=32", "precision.recompute=none"), Cluster(GPUS["h100"], 4, 4)
    load = workload.workload(settings, Described())
    best = proposals(settings, cluster, load)[0].recipe
    assert not judge(settings, cluster, load).fits
    assert best.parallel.tensor > 1 or best.precision.recompute.language != "none"


def test_numbers_of_gpus_that_do_not_suit_are_one_line():
    for gpus, more, text in (
        (12, {}, "--gpus 12: not a whole number of nodes of 8"),
        (8, {"gpu": "b300"}, "--gpu b300: not known, take one of h100"),
        (24, {}, "24 GPUs: no layout suits or fits (batch.rows: 256 is not a multiple of micro_rows 1 x 24"),
    ):
        with pytest.raises(UserError) as error:
            report.estimate(ship("pretrain_4b"), gpus, **more)
        assert text in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"longer than data.capacity 4096: lower --tokens-a-document"):
        report.estimate(ship("pretrain_4b"), 8, described=Described(text_tokens=5000))


def test_a_layout_that_does_not_suit_or_fit_is_said_and_others_are_proposed():
    text = report.estimate(ship("pretrain_4b", "parallel.tensor=8", "parallel.sequence=true"), 4)
    assert "own layout does not suit: parallel: tensor 8 x pipeline 1 x context 1 does not divide 4 processes" in text
    assert "  1  parallel.tensor=" in text
    text = report.estimate(ship("pretrain_4b", "batch.micro_rows=16", "precision.recompute=none"), 1)
    assert "DOES NOT FIT" in text and "batch.micro_rows=1" in text


def test_the_work_comes_from_plan_then_shards_then_description(tmp_path, monkeypatch):
    shard: Any = random_shard(400, images=2)
    text, images = int(shard.text_lengths.sum()), int(shard.image_counts.sum())
    shard.manifest = {"files": {"docs": {"sha256": "one"}}, "text_tokens": text, "target_tokens": text // 2}
    settings = recipe(64, 2, 2, 2, 512, 64, output=str(tmp_path / "run"))
    data = {"capacity": 96, "max_images": 4, "alignment": 16, "sources": [{"prefix": str(tmp_path / "s")}]}
    settings = Recipe.model_validate(settings.model_dump() | {"data": data})
    assumed = workload.workload(settings, Described(images=0.5, text_tokens=30))
    assert assumed.source.startswith("assumed: 26,315,789 documents, a billion tokens,")
    assert assumed.tokens == pytest.approx(1e9, rel=1e-3)

    (tmp_path / "s.json").touch()
    monkeypatch.setattr(workload, "Shard", lambda _prefix: shard)
    measured = workload.workload(settings, Described())
    assert "shards" in measured.source
    plan = plan_of(settings, [shard])
    planned = workload.workload(settings, Described())
    assert "saved plan" in planned.source and planned.steps == plan.total_steps
    assert planned.tokens == pytest.approx(text + 16 * images, rel=0.01) and measured.tokens == pytest.approx(planned.tokens, rel=0.01)
    assert measured.steps == pytest.approx(planned.steps, rel=0.1)
    exact, near = planned.loads[0].counts, measured.loads[0].counts
    assert (exact.target_tokens, exact.pairs) == pytest.approx((near.target_tokens, near.pairs), rel=0.1)
    stopped = settings.model_copy(update={"max_steps": 3})
    assert workload.workload(stopped, Described()).steps == 3


def test_json_has_what_the_text_has():
    settings = ship("sft_medical_4b")
    plain = json.loads(report.estimate(settings, 8, as_json=True))
    own, best = plain["own"], plain["proposals"][0]
    assert plain["measured"] == [] and "not measured" in plain["notes"][1]
    assert own["memory"]["total"] == memory(settings, 8, GPUS["h100"]).total and own["fits"]
    assert best["hours"] <= own["hours"] and best["gpu_hours"] == pytest.approx(8 * best["hours"])
    assert plain["disk"]["total"] == plain["disk"]["checkpoint"] * (plain["disk"]["kept"] + 1)


def test_more_images_at_once_need_more():
    few, many = (memory(replace_batch(ship("sft_medical_4b", "data.max_images=5"), n), 8, GPUS["h100"]) for n in (1, 5))
    assert few.moments["tower and embedding forward"] < many.moments["tower and embedding forward"]


def replace_batch(settings: Recipe, images: int) -> Recipe:
    return settings.model_copy(update={"batch": settings.batch.model_copy(update={"vision_images": images})})


def main() -> None:
    warnings.simplefilter("ignore")
    name, *layouts = sys.argv[1:]
    for number, parallel in enumerate(layouts):
        size = stored(laid_out(name, json.loads(parallel)), batch(name))
        print(f"<layout {number}: {size} bytes>", flush=True)
    groups.shut_down()


if __name__ == "__main__":
    main()
