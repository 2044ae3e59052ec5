"""Phases, what does not fit, steps and positions."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infimed.config import BatchConfig, DataConfig, PhaseConfig, Recipe, SourceConfig
from megatron_infimed.data.schedule import Position, build_schedule
from megatron_infimed.data.shards import CONTEXT, IMAGE, TARGET, Document
from megatron_infimed.errors import UserError


class MemoryShard:
    """As Shard, from (values, modes) lists."""

    def __init__(self, documents, images=(), name="m"):
        self.documents = [Document(np.array(v, np.int32), np.array(m, np.int8)) for v, m in documents]
        self.text_lengths = np.array([int((d.modes != IMAGE).sum()) for d in self.documents], np.int64)
        self.image_counts = np.array([len(d.images) for d in self.documents], np.int64)
        self.encoded, self.name = list(images), name

    def __len__(self):
        return len(self.documents)

    def document(self, i):
        return self.documents[i]

    def runs(self, i):
        pieces = self.documents[i].pieces
        return np.array([len(p.ids) or 1 for p in pieces], np.int32), np.array([p.mode for p in pieces], np.int8)

    def image(self, number):
        return self.encoded[number]

    def record_id(self, i):
        return f"{self.name}{i}"


def document(*pieces):
    """document("c5", "i0", "t3"): 5 context tokens, image 0, 3 target tokens."""
    values, modes = [], []
    for piece in pieces:
        kind, n = {"c": CONTEXT, "t": TARGET, "i": IMAGE}[piece[0]], int(piece[1:])
        values += [n] if kind == IMAGE else [10 + kind] * n
        modes += [kind] * (1 if kind == IMAGE else n)
    return values, modes


def recipe(phases=((1.0, 28, 4),), rows=4, micro_rows=1, sources=None, **data):
    sources = sources or (SourceConfig(prefix="m"),)
    data = {"capacity": 32, "alignment": 1, **data}
    return Recipe(
        output="unused",
        data=DataConfig(sources=sources, **data),
        schedule=tuple(PhaseConfig(until=u, image_size=s, tokens_per_image=t) for u, s, t in phases),
        batch=BatchConfig(rows=rows, micro_rows=micro_rows),
    )


def random_shard(n, seed=0, images=5):
    rng = np.random.default_rng(seed)
    docs = []
    for _ in range(n):
        pieces = []
        for _ in range(rng.integers(1, 4)):
            pieces += [f"i{rng.integers(images)}"] * rng.integers(0, 2) + [f"c{rng.integers(1, 7)}", f"t{rng.integers(1, 5)}"]
        docs.append(document(*pieces))
    return MemoryShard(docs)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(0, 9), st.integers(1, 5), st.sampled_from([None, 1, 2, 3]), st.sampled_from(["cut", "reject"]))
def test_every_document_is_in_a_row_or_rejected(n, seed, rows, max_images, overlong):
    shard = random_shard(n, seed)
    config = recipe([(0.5, 14, 1), (1.0, 28, 9)], rows=rows, max_images=max_images, overlong=overlong)
    if round(0.5 * n) in (0, n):
        with pytest.raises(UserError, match="none of the mixture's"):
            build_schedule(config, [shard])
        return
    try:
        schedule = build_schedule(config, [shard])
    except UserError as e:
        assert "fits a row" in str(e)
        return
    seen = []
    for p in schedule.phases:
        assert p.lost == 0 and p.bound.rows <= p.rows and 0 < p.fill <= 1
        assert p.steps == -(-p.rows // rows)
        seen += [r.document for r in p.rejected]
        for number in range(p.rows):
            row, used, pictures, pairs = p.row(number), 0, 0, 0
            assert row
            for source, i in row:
                d = shard.document(i)
                kept = p.kept_values.get((source, i), len(d.modes))
                modes = d.modes[:kept]
                assert kept == len(d.modes) or (modes[-1] == TARGET and d.modes[kept] == CONTEXT)
                tokens = len(modes) + int((modes == IMAGE).sum()) * (p.tokens_per_image - 1)
                used, pairs = used + tokens, pairs + tokens * (tokens + 1) // 2
                pictures += int((modes == IMAGE).sum())
                seen.append(i)
            assert (used, pictures, pairs) == (p.row_tokens[number], p.row_images[number], p.row_pairs[number])
            assert used <= 32 and (max_images is None or pictures <= max_images)
        assert p.row(p.rows) == [] and p.row(p.rows + 7) == []
    assert sorted(seen) == list(range(n))


def test_cut_keeps_whole_exchanges_and_drops_images_with_their_turn():
    shard = MemoryShard([document("c4", "i0", "c2", "t3", "c4", "i1", "c1", "t5", "c4", "t20"), document("c3", "t2")])
    phase = build_schedule(recipe(capacity=30), [shard]).phases[0]  # 4+4+2+3 = 13, +4+4+1+5 = 27, +24 = 51
    assert phase.kept_values == {(0, 0): 4 + 1 + 2 + 3 + 4 + 1 + 1 + 5} and phase.cut == ["m0"] and phase.rejected == []
    phase = build_schedule(recipe(capacity=30, max_images=1), [shard]).phases[0]
    assert phase.kept_values == {(0, 0): 10}
    phase = build_schedule(recipe(capacity=12), [shard]).phases[0]
    assert [(r.id, r.times) for r in phase.rejected] == [("m0", 1)]
    assert phase.rejected[0].reason == "51 tokens with 2 images x 4 are more than data.capacity 12, even with its first exchange alone"


def test_the_same_document_fits_one_phase_and_not_the_other():
    shard = MemoryShard([document("c2", "i0", "c1", "t5")] * 8)
    schedule = build_schedule(recipe([(0.5, 14, 4), (1.0, 28, 16)], sources=(SourceConfig(prefix="m", epochs=2),)), [shard])
    assert [len(p.rejected) for p in schedule.phases] == [0, 0]
    with pytest.raises(UserError, match=r"schedule\[1\]: none of 8 documents fits a row of 32 tokens"):
        build_schedule(recipe([(0.5, 14, 4), (1.0, 28, 36)], sources=(SourceConfig(prefix="m", epochs=2),)), [shard])


def test_a_repeated_misfit_is_counted_and_cut_every_time():
    shard = MemoryShard([document("c4", "t3", "c4", "t40"), document("c40", "t1"), document("c1", "t1")])
    phase = build_schedule(recipe(sources=(SourceConfig(prefix="m", epochs=3),)), [shard]).phases[0]
    assert phase.kept_values == {(0, 0): 7}
    assert [(r.document, r.times) for r in phase.rejected] == [(1, 3)]
    assert sorted(phase.document.tolist()) == [0, 0, 0, 2, 2, 2]


def test_reject_and_error(caplog):
    shard = MemoryShard([document("c4", "t3", "c4", "t40"), document("c1", "t1")])
    with caplog.at_level(logging.INFO, "megatron_infimed.data"):
        phase = build_schedule(recipe(overlong="reject"), [shard]).phases[0]
    assert [r.id for r in phase.rejected] == ["m0"] and phase.document.tolist() == [1]
    assert "leaves out m0: 51 tokens with 0 images x 4 are more than data.capacity 32" in caplog.text
    with pytest.raises(UserError, match=r"m m0 does not fit a row: 51 tokens .* raise the limit, or set data.overlong to cut or reject"):
        build_schedule(recipe(overlong="error"), [shard])


def test_steps_and_positions():
    schedule = build_schedule(recipe([(0.4, 14, 1), (1.0, 28, 9)], rows=3), [random_shard(90, 1)])
    a, b = schedule.phases
    assert schedule.total_steps == a.steps + b.steps
    assert schedule.position_after(-1) == Position(0, 0)
    for step in range(schedule.total_steps):
        phase, first = schedule.locate(step)
        assert schedule.step_at(Position(phase, first)) == step
        after = schedule.position_after(step)
        assert after.phase == phase and after.packs == min(first + 3, schedule.phases[phase].rows)
        assert schedule.step_at(after) == step + 1
    for step in (-1, schedule.total_steps):
        with pytest.raises(ValueError, match="outside the schedule"):
            schedule.locate(step)
    with pytest.raises(UserError, match=r"not a whole step of batch.rows 3"):
        schedule.step_at(Position(0, 1))
    for bad in (Position(2, 0), Position(0, 10**6)):
        with pytest.raises(UserError, match="outside this schedule's rows"):
            schedule.step_at(bad)


def test_fingerprint_and_determinism():
    shard = random_shard(60)
    prints = [
        build_schedule(recipe(**o), [shard]).fingerprint for o in ({}, {}, {"seed": 1}, {"capacity": 33}, {"phases": ((1.0, 28, 9),)})
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 4
