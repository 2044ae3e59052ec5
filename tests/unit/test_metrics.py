"""metrics.jsonl, the printed lines and TensorBoard: rates by hand under a clock of our own, late ranks by name, resumption."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_infimed.config import Recipe
from megatron_infimed.counts import Counts
from megatron_infimed.flops import PEAKS, Work, step_flops
from megatron_infimed.report.quickstart import Stage
from megatron_infimed.train import metrics
from megatron_infimed.train.metrics import Late, Metrics, late_ranks

COUNTS = Counts(documents=2, text_tokens=61, image_tokens=37, target_tokens=30, padding=2, images=1, pairs=2500)
PHASE: Any = SimpleNamespace(number=0, image_size=224, tokens_per_image=64)


def recipe(every: int = 10, tensorboard: bool = False, **more: Any) -> Recipe:
    schedule = [{"until": 1.0, "image_size": 224, "tokens_per_image": 64}]
    return Recipe.model_validate({"output": "x", "schedule": schedule, "log": {"every": every, "tensorboard": tensorboard}, **more})


def result(busy: list[float], waits: list[float] | None = None, memory: list[int] | None = None, loss: float = 2.1234) -> Any:
    return SimpleNamespace(
        loss=loss, grad_norm=0.812, lr=4.9e-5, verdict=SimpleNamespace(action="apply"), counts=COUNTS, stop=False,
        busy=busy, waits=waits or [0.0] * len(busy), memory=memory or [2**30] * len(busy),
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """What the clock says: [seconds]."""
    now = [100.0]
    monkeypatch.setattr(metrics, "perf_counter", lambda: now[0])
    return now


def lines(run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_each_step_once_after_a_kill(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    kept = Metrics(recipe(), tmp_path, first_step=2, total_steps=9, hosts=["a"])
    kept.record(3, PHASE, result([0.1], loss=1.5))
    kept.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert lines(tmp_path)[2]["loss"] == 1.5 and lines(tmp_path)[2]["fill"] == 0.98


def test_rates_of_a_step_and_of_a_resumed_run(tmp_path, clock, caplog):
    """Two processes, steps of 2 s, 4 s and 4 s, a minute of checkpoint between them."""
    caplog.set_level(logging.INFO, "megatron_infimed")
    settings = recipe(every=1)
    kept = Metrics(settings, tmp_path, first_step=500, total_steps=9999, hosts=["a", "b"])
    kept.peak = PEAKS["H100"]
    for step, seconds in ((501, 2.0), (502, 4.0), (503, 4.0)):
        clock[0] += seconds
        kept.record(step, PHASE, result([1.0, 1.1], [0.5, 0.1], [2**30, 3 * 2**30]))
        clock[0] += 30.0
        kept.pause()
    clock[0] += 30.0  # the last checkpoint
    kept.close()
    work = sum(step_flops(settings, COUNTS, 224).values(), Work())
    first, second, _ = lines(tmp_path)
    assert first["seconds"] == 2.0 and second["seconds"] == 4.0
    assert first["tokens_per_second"] == 49.0 and second["tokens_per_second"] == 24.5
    assert (first["text_tokens_per_second"], first["image_tokens_per_second"], first["padding_per_second"]) == (30.5, 18.5, 1.0)
    assert first["model_tflops_per_process"] == pytest.approx(work.model / 2.0 / 2 / 1e12, rel=1e-4)
    assert first["hardware_tflops_per_process"] == pytest.approx(work.hardware / 2.0 / 2 / 1e12, rel=1e-4)
    assert first["mfu_bf16"] == pytest.approx(work.model / 2.0 / 2 / 989e12, abs=1e-5)
    assert first["mfu_fp8"] == pytest.approx(work.model / 2.0 / 2 / 1979e12, abs=1e-5)
    assert first["data_wait"] == 0.5 and first["data_wait_rank"] == 0 and first["data_wait_median"] == 0.3
    assert (first["busy_min"], first["busy_median"], first["busy_max"], first["busy_rank"]) == (1.0, 1.05, 1.1, 1)
    assert (first["memory_bytes"], first["memory_rank"]) == (3 * 2**30, 1) and first["memory_now_bytes"] > 0
    assert sum(first["model_flops"].values()) == work.model
    last = caplog.records[-1].getMessage()
    assert last.startswith("pretrain: steps 501 to 503: 294 useful tokens in 0.00 hours (and 0.03 between steps), 29 tokens/s ")
    assert "waited 15 %" in last and "slowest rank 1 (b) 1.10x the median, peak memory 3.0 GiB on rank 1" in last


def test_no_mfu_where_the_peak_is_unknown(tmp_path):
    kept = Metrics(recipe(), tmp_path, 0, 1, ["a"])
    kept.peak = None
    kept.record(1, PHASE, result([0.1]))
    assert not [name for name in lines(tmp_path)[0] if name.startswith("mfu")] and lines(tmp_path)[0]["model_tflops_per_process"] > 0


def test_printed_line(tmp_path, clock, caplog):
    """It speaks of all steps since the line before, and fits a line at the sizes of a large run (the 4B model on 64 GPUs)."""
    caplog.set_level(logging.INFO, "megatron_infimed")
    kept = Metrics(recipe(every=2), tmp_path, 0, 12000, [f"node{rank // 8}" for rank in range(64)])
    kept.peak = PEAKS["H100"]
    one = result([0.9] * 64, [0.0] * 63 + [0.1])
    one.counts = Counts(
        text_tokens=610_000, image_tokens=370_000, padding=20_000, target_tokens=300_000, images=5_781, pairs=980_000 * 1024
    )
    for step, seconds in ((10001, 0.6), (10002, 1.4)):
        clock[0] += seconds
        kept.record(step, PHASE, one)
    (text,) = caplog.messages
    # By hand, 1e15 FLOPs a step: language 6 x 3.633e9 x 980,000 = 21.4, attention 12 x 36 x 32 x 128 x 1.0035e9 = 1.8, output layer
    # 6 x 2560 x 151936 x 300,000 = 0.7, frozen tower 2.11e11 x 5,781 = 1.2; 25.1 in all, by 64 processes in a second.
    assert text == (
        "pretrain 10002/12000  224px/64t  loss 2.1234  grad 0.812  lr 4.9e-05  980,000 tokens/s (text 61 image 37 pad 2 %)  "
        "392 TFLOP/s 39.6 % MFU  waited 10 %"
    )


def test_quickstart_reads_it(tmp_path, clock):
    kept = Metrics(recipe(), tmp_path, 0, 2, ["a"])
    for step in (1, 2):
        clock[0] += 0.5
        kept.record(step, PHASE, result([0.1]))
    kept.close()
    steps = lines(tmp_path)
    found = Stage("pretrain", recipe().model_dump(mode="json"), steps, True, steps[-1]["processes"], None, []).figures()
    assert found["tokens_per_second"] == 196.0 and found["fill"] == 0.98 and found["seconds"] == 1.0


def test_tensorboard_has_the_figures(tmp_path):
    kept = Metrics(recipe(tensorboard=True), tmp_path, 0, 1, ["a"])
    kept.peak = PEAKS["A100"]
    kept.record(1, PHASE, result([0.1]))
    kept.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names, line = board.Tags()["scalars"], lines(tmp_path)[0]
    assert {"loss", "model_tflops_per_process", "mfu_bf16", "busy_max", "data_wait", "memory_bytes"} <= set(
        names
    ) and "mfu_fp8" not in names
    assert all(board.Scalars(name)[0].value == pytest.approx(line[name], rel=1e-6) for name in names)


@pytest.mark.parametrize(
    ("stages", "busy", "named"),
    [
        (1, [0.40, 0.40, 0.40, 0.528], [3]),
        (1, [0.40, 0.40, 0.40, 0.47], []),  # 17 % above
        (1, [0.010, 0.010, 0.010, 0.019], []),  # 9 ms above
        (1, [0.40, 0.60, 0.41, 0.90], [3, 1]),
        (1, [0.60, 0.40], [0]),
        (2, [0.40, 0.41, 0.80, 0.81], []),  # the second stage has more to do
        (2, [0.40, 0.60, 0.80, 0.81], [1]),
        (1, [0.40], []),
    ],
)
def test_late_ranks(stages, busy, named):
    jitter = [[9.0 if step == rank else seconds for rank, seconds in enumerate(busy)] for step in range(9)]
    assert [late.rank for late in late_ranks(jitter, stages)] == named


def test_late_ranks_by_how_much():
    assert late_ranks([[0.4, 0.4, 0.4, 0.528]], 1) == [Late(3, 0.528, 0.4)]


def test_late_ranks_are_named_once_every_few_steps(tmp_path, caplog):
    kept = Metrics(recipe(every=5), tmp_path, 0, 99, ["gpu-1", "gpu-1", "gpu-2", "gpu-2"])
    for step in range(1, 12):
        kept.record(step, PHASE, result([0.4, 0.41, 0.4, 0.528], [0.0, 0.25, 0.001, 0.0]))
    wanted = ["rank 3 (gpu-2) slower: 1.32x the median", "rank 1 (gpu-1) waits longer for data: 0.250 s a step, median 0.000 s"]
    assert caplog.messages == wanted * 2
    by_step = {line["step"]: (line.get("slow_ranks"), line.get("waiting_ranks")) for line in lines(tmp_path)}
    assert by_step[5] == by_step[10] == ([3], [1]) and by_step[11] == (None, None)


def test_a_step_or_two_name_nobody(tmp_path, caplog):
    kept = Metrics(recipe(every=1), tmp_path, 0, 99, ["a", "b"])
    for step in range(1, 5):
        kept.record(step, PHASE, result([0.1, 0.9]))
    assert not caplog.messages


def test_many_late_ranks_are_counted(tmp_path, caplog):
    kept = Metrics(recipe(every=5), tmp_path, 0, 99, ["a"] * 16)
    for step in range(1, 6):
        kept.record(step, PHASE, result([0.1] * 9 + [0.2] * 7))
    assert caplog.messages[0].count("slower") == 4 and caplog.messages[0].endswith("; and 3 more")
