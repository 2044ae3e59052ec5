"""What the mixture promises is what the ranks see: every document exactly as often, in any layout, however often the run is resumed."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infimed.config import SourceConfig
from megatron_infimed.data.loader import Loader
from megatron_infimed.data.mixture import mix, shares
from megatron_infimed.data.schedule import build_schedule
from tests.unit.test_schedule import MemoryShard, document, recipe


def text_shard(size: int, seed: int) -> MemoryShard:
    rng = np.random.default_rng(seed)
    return MemoryShard([document(f"c{rng.integers(1, 12)}", f"t{rng.integers(1, 12)}") for _ in range(size)], name=f"s{seed}-")


def seen_by(setup, shards, schedule, dp_size: int, start: int, end: int) -> Counter[tuple[int, int]]:
    seen: Counter[tuple[int, int]] = Counter()
    for rank in range(dp_size):
        loader = Loader(setup, shards, schedule, pad_id=0, image_id=1, decoder=None, dp_rank=rank, dp_size=dp_size, with_images=False)
        for step in range(start, end):
            for batch in loader.microbatches(step):
                seen.update(d for row in batch.documents for d in row)
    return seen


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_document_is_seen_exactly_as_often_as_promised(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    weighted = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    amounts = [data.draw(st.floats(0.1, 3.0)) for _ in sizes]
    sources = tuple(
        SourceConfig(prefix=f"s{i}", **({"weight": a} if w else {"epochs": a}))
        for i, (a, w) in enumerate(zip(amounts, weighted, strict=True))
    )
    documents = data.draw(st.integers(1, 80)) if any(weighted) else None
    counts = shares(sources, sizes, documents or 0)
    if sum(counts) < 3:
        return
    setup = recipe(
        phases=((0.4, 28, 4), (1.0, 28, 4)), rows=8, micro_rows=data.draw(st.sampled_from([1, 2])), sources=sources,
        capacity=64, document_alignment=data.draw(st.sampled_from([1, 8])), documents=documents, seed=data.draw(st.integers(0, 3)),
    )  # fmt: skip
    shards = [text_shard(size, i) for i, size in enumerate(sizes)]
    schedule = build_schedule(setup, shards)  # type: ignore[arg-type]

    seen: Counter[tuple[int, int]] = Counter()
    stops = sorted(data.draw(st.lists(st.integers(0, schedule.total_steps), max_size=3)))
    for start, end in zip([0, *stops], [*stops, schedule.total_steps], strict=True):  # killed at each stop, resumed in another layout
        assert schedule.step_at(schedule.position_after(start - 1)) == start
        seen += seen_by(setup, shards, schedule, data.draw(st.sampled_from([1, 2, 4])), start, end)

    assert sum(seen.values()) == sum(counts)
    for i, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        times = np.array([seen[i, d] for d in range(size)])
        assert times.sum() == count
        assert set(times.tolist()) <= {count // size, -(-count // size)}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=4),
    before=st.floats(0.1, 3.0), after=st.floats(0.1, 3.0), seed=st.integers(0, 5),
)  # fmt: skip
def test_another_weight_does_not_reshuffle_the_other_sources(sizes: list[int], before: float, after: float, seed: int) -> None:
    def orders(epochs: float) -> list[list[int]]:
        sources = tuple(SourceConfig(prefix=f"s{i}", epochs=epochs if i == 0 else 1.5) for i in range(len(sizes)))
        stream = mix(recipe(sources=sources, seed=seed).data, sizes)
        return [stream.document[stream.source == i].tolist() for i in range(len(sizes))]

    if sum(shares((SourceConfig(prefix="x", epochs=min(before, after)),), sizes[:1], 0)):
        first, second = orders(before), orders(after)
        assert first[1:] == second[1:]
        shorter = min(len(first[0]), len(second[0]))
        assert first[0][:shorter] == second[0][:shorter]
