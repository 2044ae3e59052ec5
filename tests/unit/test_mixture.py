"""The stream: exact counts, whole passes, and an inner order that other sources do not touch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infimed.config import DataConfig, SourceConfig
from megatron_infimed.data.mixture import identities, mix, shares
from megatron_infimed.errors import UserError


def data(*sources, documents=None, seed=0):
    return DataConfig(sources=tuple(SourceConfig(**s) for s in sources), documents=documents, seed=seed)


def inner(stream, source):
    return stream.document[stream.source == source]


weights = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 50)), min_size=1, max_size=5)


@given(weights, st.integers(1, 500), st.integers(0, 3))
def test_weights_share_out_documents_exactly(spec, documents, seed):
    config = data(*({"prefix": f"p{i}", "weight": w} for i, (_, w) in enumerate(spec)), documents=documents, seed=seed)
    stream = mix(config, [n for n, _ in spec])
    assert len(stream) == documents
    counts, total = np.bincount(stream.source, minlength=len(spec)), sum(w for _, w in spec)
    for count, (_, weight) in zip(counts, spec, strict=True):
        assert abs(count - documents * weight / total) < 1


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=4), st.integers(0, 3))
def test_every_document_exactly_once_a_pass(spec, seed):
    config = data(*({"prefix": f"p{i}", "epochs": tenths / 10} for i, (_, tenths) in enumerate(spec)), seed=seed)
    sizes = [n for n, _ in spec]
    expected = [n * tenths // 10 for n, tenths in spec]
    if not sum(expected):
        with pytest.raises(UserError, match="0 documents"):
            mix(config, sizes)
        return
    stream = mix(config, sizes)
    for i, (size, count) in enumerate(zip(sizes, expected, strict=True)):
        order = inner(stream, i)
        assert len(order) == count
        for start in range(0, count, size):
            part = order[start : start + size]
            assert len(np.unique(part)) == len(part) and (len(part) == min(size, count - start))


@given(st.floats(0.1, 9), st.floats(0.1, 9), st.integers(0, 3))
def test_changing_a_weight_keeps_the_inner_order_of_all(first, second, seed):
    streams = []
    for w in (first, second):
        sources = [{"prefix": "x/a", "weight": 1.0}, {"prefix": "x/b", "weight": w}, {"prefix": "x/c", "epochs": 2.0}]
        streams.append(mix(data(*sources, documents=200, seed=seed), [37, 50, 20]))
    for i in range(3):
        one, two = (inner(s, i) for s in streams)
        shared = min(len(one), len(two))
        assert np.array_equal(one[:shared], two[:shared])


def test_adding_a_source_or_moving_the_data_keeps_the_inner_order():
    alone = mix(data({"prefix": "/old/a"}, seed=3), [100])
    after = mix(data({"prefix": "b"}, {"prefix": "/new/disk/a"}, seed=3), [30, 100])
    assert np.array_equal(inner(alone, 0), inner(after, 1))


@settings(max_examples=30)
@given(st.lists(st.integers(50, 400), min_size=2, max_size=4), st.integers(0, 5))
def test_sources_are_spread_evenly(sizes, seed):
    stream = mix(data(*({"prefix": f"p{i}"} for i in range(len(sizes))), seed=seed), sizes)
    seen = np.cumsum(stream.source[:, None] == np.arange(len(sizes)), axis=0)
    even = np.arange(1, len(stream) + 1)[:, None] * np.array(sizes) / len(stream)
    assert np.abs(seen - even).max() <= len(sizes)


def test_seed_and_pass_change_the_order():
    one, two = (mix(data({"prefix": "a", "epochs": 2}, seed=s), [500]) for s in (0, 1))
    assert not np.array_equal(one.document, two.document)
    assert not np.array_equal(one.document[:500], one.document[500:])
    assert np.array_equal(one.document, mix(data({"prefix": "a", "epochs": 2}), [500]).document)


def test_shares_by_largest_remainder():
    specs = [SourceConfig(prefix=p, weight=w) for p, w in (("a", 3), ("b", 2), ("c", 2))]
    assert shares(specs, [1, 1, 1], 10) == [4, 3, 3]
    assert shares([SourceConfig(prefix="a", epochs=0.1)], [30], 0) == [3]


def test_equal_names_are_told_apart():
    specs = [SourceConfig(prefix=p) for p in ("x/train", "y/train", "z")]
    assert identities(specs) == ["train", "train#1", "z"]


@pytest.mark.parametrize(
    "sources, sizes, text", [((), [], "data.sources is empty"), (({"prefix": "a"},), [0], "a: the shard holds no doc")]
)
def test_errors(sources, sizes, text):
    with pytest.raises(UserError, match=text):
        mix(data(*sources), sizes)
