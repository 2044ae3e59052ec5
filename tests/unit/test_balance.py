"""Which rows a rank takes: always the same global batch, equally many rows, nearly equal cost; and what a row is taken to cost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infimed.config import BatchConfig, ParallelConfig, PrecisionConfig, RecomputeConfig, TrainableConfig
from megatron_infimed.data.balance import row_costs, rows_of, spread
from megatron_infimed.data.loader import Loader
from megatron_infimed.data.schedule import build_schedule
from megatron_infimed.flops import step_flops
from tests.unit.test_schedule import random_shard, recipe

cost_lists = st.lists(st.floats(0, 1e18), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(cost_lists, st.integers(1, 9))
def test_every_row_once_equally_many_in_a_part_in_one_order(costs, parts):
    all_costs = np.array(costs * parts)
    chosen = spread(all_costs, parts)
    assert chosen.shape == (parts, len(costs)) and sorted(chosen.flat) == list(range(len(all_costs)))
    assert (np.diff(chosen, axis=1) > 0).all() and (np.diff(chosen[:, 0]) > 0).all()
    assert np.array_equal(chosen, spread(all_costs, parts))


@pytest.mark.parametrize("each", [2, 3, 4])
def test_near_the_best_split_there_is(each):
    worst, rng = 0.0, np.random.default_rng(0)
    for _ in range(100):
        costs = rng.lognormal(0, 0.5, 2 * each)
        best = min(
            max(costs[list(half)].sum(), costs.sum() - costs[list(half)].sum()) for half in itertools.combinations(range(2 * each), each)
        )
        worst = max(worst, costs[spread(costs, 2)].sum(1).max() / best - 1)
    assert worst <= 0.03  # measured: 0.021


@pytest.mark.parametrize("rows", [256, 512, 2048])
def test_64_ranks_are_done_together(rows):
    rng = np.random.default_rng(0)
    worst, plain = 0.0, np.inf
    for _ in range(20):
        costs = 100 + rng.lognormal(1, 0.7, rows) + 2.6 * rng.integers(0, 28, rows)  # attention and a tower that learns, at 384 px
        over = costs[spread(costs, 64)].sum(1).max() / costs.sum() * 64 - 1
        worst, plain = max(worst, over), min(plain, costs.reshape(-1, 64).sum(0).max() / costs.sum() * 64 - 1)
    assert worst < 0.005 and plain > 0.04  # measured: at most 0.003, at least 0.042


@pytest.fixture(scope="module")
def planned():
    config = recipe([(0.5, 28, 1), (1.0, 56, 4)], rows=16, capacity=48)
    shard = random_shard(130, 3)
    return config, shard, build_schedule(config, [shard])


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("ranks, micro_rows", itertools.product([1, 2, 4, 8], [1, 2]))
def test_the_global_batch_stays_the_same_rows(planned, ranks, micro_rows, balance):
    config, _, schedule = planned
    split = config.model_copy(update={"batch": BatchConfig(rows=16, micro_rows=micro_rows), "parallel": ParallelConfig(balance=balance)})
    for phase in schedule.phases:
        assert phase.rows % 16  # the last step has empty rows
        for first in range(0, phase.rows, 16):
            chosen = np.stack([rows_of(split, phase, first, rank, ranks) for rank in range(ranks)])
            assert chosen.shape == (ranks, 16 // (ranks * micro_rows), micro_rows)
            assert sorted(chosen.flat) == list(range(first, first + 16))
            if not balance:
                expected = [
                    [[first + (m * ranks + r) * micro_rows + i for i in range(micro_rows)] for m in range(chosen.shape[1])]
                    for r in range(ranks)
                ]
                assert chosen.tolist() == expected


def test_micro_batches_of_a_rank_are_alike_too(planned):
    config, _, schedule = planned
    split = config.model_copy(update={"batch": BatchConfig(rows=16, micro_rows=4)})
    phase = schedule.phases[1]
    costs = row_costs(split, phase, 0, phase.steps * 16)
    for first, rank in itertools.product(range(0, phase.rows, 16), (0, 1)):
        mine = rows_of(split, phase, first, rank, 2)
        best = min(abs(2 * costs[list(half)].sum() - costs[mine].sum()) for half in itertools.combinations(mine.flat, 4))
        assert np.ptp(costs[mine].sum(1)) <= best + 0.05 * np.ptp(costs[mine])  # measured: 0.012; in the order of the plan up to 1.93


@pytest.mark.parametrize(
    "vision, language, recompute", [(False, True, "none"), (True, True, "full"), (True, False, "mlp"), (False, False, "full")]
)
def test_a_row_costs_what_is_counted_when_it_is_trained_on(planned, vision, language, recompute):
    """The same as flops.step_flops of the packed row, but for the output layer; empty rows and padding included."""
    config, shard, schedule = planned
    again = RecomputeConfig(language=recompute, vision="none" if recompute == "mlp" else recompute)
    changes = {"trainable": TrainableConfig(vision=vision, language=language), "precision": PrecisionConfig(recompute=again)}
    config = config.model_copy(update=changes)
    loader = Loader(config, [shard], schedule, pad_id=0, image_id=1, decoder=None, with_images=False)
    for step in range(schedule.total_steps):
        for batch in loader.microbatches(step):
            work = step_flops(config, batch.counts, batch.image_size)
            counted = sum(part.hardware for name, part in work.items() if name != "output")
            (cost,) = row_costs(config, schedule.phases[batch.phase], batch.rows[0], 1)
            assert cost == pytest.approx(counted, rel=1e-12)
    whole = schedule.phases[0]
    assert len(row_costs(config, whole)) == whole.rows
