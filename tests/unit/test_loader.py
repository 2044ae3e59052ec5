"""Packed batches against a plain reference; the loader's arithmetic, resume, damage and thread."""

import itertools
import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infimed.config import ParallelConfig, SourceConfig
from megatron_infimed.data.batch import pack_rows
from megatron_infimed.data.chat import load_tokenizer
from megatron_infimed.data.decode import GRAY, TorchDecoder
from megatron_infimed.data.loader import Loader
from megatron_infimed.data.schedule import build_schedule
from megatron_infimed.data.shard_writer import ShardWriter
from megatron_infimed.data.shards import IMAGE, TARGET, Document, Shard
from megatron_infimed.errors import UserError
from tests.tiny import tiny_images, tiny_tokenizer
from tests.unit.test_schedule import MemoryShard, document, random_shard, recipe

PAD, PICTURE = 0, 7


def plain_reference(rows, capacity, t):
    """The definition, one token at a time."""
    tokens, labels, mask, cuts, slots = [], [], [], [0], []
    for row in rows:
        start = len(tokens)
        for d in row:
            here = []
            for value, mode in zip(d.values.tolist(), d.modes.tolist(), strict=True):
                here += [(PICTURE, mode)] * t if mode == IMAGE else [(value, mode)]
            for i, (token, mode) in enumerate(here):
                slots += [len(tokens)] if mode == IMAGE else []
                tokens.append(token)
                following = here[i + 1] if i + 1 < len(here) else (0, None)
                labels.append(following[0])
                mask.append(float(following[1] == TARGET))
            cuts.append(len(tokens))
        if len(tokens) < start + capacity:
            fill = start + capacity - len(tokens)
            tokens, labels, mask = tokens + [PAD] * fill, labels + [0] * fill, mask + [0.0] * fill
            cuts.append(len(tokens))
    return tokens, labels, mask, cuts, slots


contents = st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(10, 99)), min_size=1, max_size=8)
some_rows = st.lists(st.lists(contents, max_size=4), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(some_rows, st.sampled_from([1, 4, 9]), st.integers(0, 5))
def test_packed_rows_against_the_reference(raw, t, spare):
    rows = [[Document(np.array([v for _, v in d], np.int32), np.array([m for m, _ in d], np.int8)) for d in row] for row in raw]
    needed = max(sum(len(d.modes) + int((d.modes == IMAGE).sum()) * (t - 1) for d in row) for row in rows)
    capacity = max(needed + spare, 1)
    batch = pack_rows(rows, capacity=capacity, tokens_per_image=t, image_size=14, pad_id=PAD, image_id=PICTURE)
    tokens, labels, mask, cuts, slots = plain_reference(rows, capacity, t)
    assert batch.tokens.tolist() == tokens and batch.labels.tolist() == labels
    assert batch.loss_mask.tolist() == mask and batch.cu_seqlens.tolist() == cuts and batch.slots.tolist() == slots
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert (batch.cu_seqlens.dtype, batch.slots.dtype) == (torch.int32, torch.int64)
    assert all(b > a for a, b in itertools.pairwise(cuts)) and cuts[-1] == len(rows) * capacity
    assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(cuts))
    c = batch.counts
    assert c.text_tokens + c.image_tokens + c.padding == len(tokens) and c.target_tokens == sum(mask)
    assert c.image_tokens == c.images * t == len(slots) and c.documents == sum(len(r) for r in rows)
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens) and moved.pixels is None


def test_slots_that_do_not_match_images_say_so():
    d = MemoryShard([document("c2", "i0", "t2")]).document(0)
    batch = pack_rows([[d]], capacity=16, tokens_per_image=9, image_size=14, pad_id=PAD, image_id=PICTURE)
    with pytest.raises(ValueError, match="9 image slots but 2 images x 9 tokens = 18"):
        batch.with_pixels(torch.zeros(2, 3, 14, 14, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match="has 20 tokens but 16 fit"):
        pack_rows([[d]], capacity=16, tokens_per_image=16, image_size=14, pad_id=PAD, image_id=PICTURE)


def loader(config, shards, schedule=None, **options):
    options = {"decoder": TorchDecoder(1), **options}
    return Loader(config, shards, schedule or build_schedule(config, shards), pad_id=PAD, image_id=PICTURE, **options)


def same(a, b):
    pixels = (a.pixels is None) == (b.pixels is None) and (a.pixels is None or torch.equal(a.pixels, b.pixels))
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "labels", "loss_mask", "cu_seqlens", "slots"))
    return pixels and tensors and (a.documents, a.counts, a.phase) == (b.documents, b.counts, b.phase)


@pytest.fixture(scope="module")
def two_phases():
    shard = random_shard(70, 2)
    shard.encoded = tiny_images(5)
    config = recipe([(0.5, 14, 1), (1.0, 28, 4)], rows=8)
    return config, [shard], build_schedule(config, [shard])


def by_row(batches, schedule):
    """(phase, row) -> its documents, tokens, labels and pixels, whatever the micro-batches."""
    found = {}
    for b in batches:
        t, phase, place = b.tokens_per_image, schedule.phases[b.phase], 0
        for number, documents, tokens, labels in zip(b.rows, b.documents, b.tokens.split(32), b.labels.split(32), strict=True):
            images = int((tokens == PICTURE).sum()) // t
            assert documents == phase.row(number) and (b.phase, number) not in found
            pixels = b.pixels[place : place + images].tolist() if images else []
            found[b.phase, number] = documents, tokens.tolist(), labels.tolist(), pixels
            place += images
        assert place == b.counts.images == (0 if b.pixels is None else len(b.pixels))
    return found


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("dp_size, micro_rows", [(1, 1), (2, 1), (4, 1), (8, 1), (1, 4), (2, 2), (4, 2)])
def test_the_global_batch_is_the_same_for_every_layout(two_phases, dp_size, micro_rows, balance):
    config, shards, schedule = two_phases
    changes = {"batch": config.batch.model_copy(update={"micro_rows": micro_rows}), "parallel": ParallelConfig(balance=balance)}
    ranks = [loader(config.model_copy(update=changes), shards, schedule, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
    for step in range(schedule.total_steps):
        phase, first = schedule.locate(step)
        batches = [list(rank.microbatches(step)) for rank in ranks]
        assert {len(of_rank) for of_rank in batches} == {8 // (dp_size * micro_rows)}
        together = [b for parts in zip(*batches, strict=True) for b in parts]
        rows = by_row(together, schedule)
        assert rows == by_row(loader(config, shards, schedule).microbatches(step), schedule)
        assert sorted(rows) == [(phase, first + i) for i in range(8)]
        if not balance:  # micro-batch by micro-batch, rank by rank, the rows come in the order of the plan
            assert list(rows) == sorted(rows)


def test_every_document_once_and_the_last_batch_is_filled_with_empty_rows(two_phases):
    config, shards, schedule = two_phases
    seen, rows = [], 0
    for batches in loader(config, shards, schedule).iterate(0, schedule.total_steps):
        assert len(batches) == 8
        for b in batches:
            seen += [d for row in b.documents for _, d in row]
            rows += 1
            if not b.documents[0]:
                assert b.counts.padding == 32 and b.cu_seqlens.tolist() == [0, 32] and b.loss_mask.sum() == 0 and b.pixels is None
    assert sorted(seen) == list(range(70)) and rows == 8 * schedule.total_steps


def test_sizes_follow_the_phase(two_phases):
    config, shards, schedule = two_phases
    sizes = set()
    for step, batches in enumerate(loader(config, shards, schedule).iterate(0, schedule.total_steps)):
        want = (14, 1) if step < schedule.phases[0].steps else (28, 4)
        for b in batches:
            assert (b.image_size, b.tokens_per_image) == want
            if b.pixels is not None:
                sizes.add(tuple(b.pixels.shape[1:]))
                assert b.slots.numel() == b.pixels.shape[0] * want[1]
    assert sizes == {(3, 14, 14), (3, 28, 28)}


@pytest.mark.parametrize("start", [0, 2, 3])
def test_resume_goes_on_with_the_same_batches(two_phases, start):
    config, shards, schedule = two_phases
    whole, tail = ([list(step) for step in loader(config, shards, schedule).iterate(s, schedule.total_steps)] for s in (0, start))
    assert len(tail) == len(whole) - start
    for a, b in zip(whole[start:], tail, strict=True):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_without_images_tokens_and_labels_are_the_same(two_phases):
    config, shards, schedule = two_phases
    blind = loader(config, shards, schedule, with_images=False, decoder=None)
    full = loader(config, shards, schedule)
    for step in range(schedule.total_steps):
        for a, b in zip(blind.microbatches(step), full.microbatches(step), strict=True):
            assert a.pixels is None and torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
            assert a.counts.images == b.counts.images


def test_corrupt_images_are_gray_counted_and_told_once(caplog):
    good = tiny_images(1)[0]
    shard = MemoryShard([document("c2", "i0", "c1", "t2", "c1", "i1", "t1"), document("c1", "i1", "t2")], [good, good[:40]])
    config = recipe(rows=1, sources=(SourceConfig(prefix="m", epochs=2),), capacity=16)
    with caplog.at_level(logging.WARNING, "megatron_infimed.data"):
        batches = [b for step in loader(config, [shard]).iterate(0, build_schedule(config, [shard]).total_steps) for b in step]
    assert sum(b.counts.corrupt for b in batches) == 4 and sum(b.counts.images for b in batches) == 6
    assert sum(int((p == GRAY).all()) for b in batches for p in b.pixels) == 4
    assert [r.message.split(" (")[0] for r in caplog.records if "corrupt" in r.message] in (
        ["m m0: image 1 is corrupt"],
        ["m m1: image 1 is corrupt"],
    )


def test_too_many_corrupt_images_stop_the_run_with_names():
    shard = MemoryShard([document("i0", "i1", "c1", "t2"), document("i2", "c1", "t2")], [b"bad", b"worse", b"worst"])
    config = recipe(rows=1, max_corrupt=2)
    bad = loader(config, [shard])
    with pytest.raises(UserError, match=r"3 corrupt images in one row, more than data.max_corrupt 2, in m m[01], m m[01]: "):
        for batches in bad.iterate(0, 1):
            next(batches)
    fine = loader(recipe(rows=1, max_corrupt=3), [shard])
    assert [b.counts.corrupt for batches in fine.iterate(0, 1) for b in batches] == [3]
    for index in (0, 1):  # the limit is for what one process decodes
        shared = list(loader(config, [shard], share=(index, 2)).microbatches(0))
        assert [b.counts.corrupt for b in shared] == [(2, 1)[index]]


@pytest.mark.parametrize("of", [1, 2, 3, 20])
def test_processes_that_hold_the_same_rows_share_the_decoding(two_phases, of):
    config, shards, schedule = two_phases
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"micro_rows": 4})})
    whole = loader(config, shards, schedule)
    parts = [loader(config, shards, schedule, share=(i, of)) for i in range(of)]
    for step in range(schedule.total_steps):
        for full, *shared in zip(whole.microbatches(step), *(p.microbatches(step) for p in parts), strict=True):
            n, most = full.counts.images, -(-full.counts.images // of)
            blocks = [b.pixels for b in shared if b.pixels is not None]
            assert [0 if b.pixels is None else len(b.pixels) for b in shared] == [min(most, max(n - i * most, 0)) for i in range(of)]
            assert (full.pixels is None and not blocks) or torch.equal(torch.cat(blocks), full.pixels)
            assert all(same(replace(b, pixels=full.pixels), full) for b in shared)
    with pytest.raises(ValueError, match="share 2 of 2"):
        loader(config, shards, schedule, share=(2, 2))


class SlowShard(MemoryShard):
    def __init__(self, inner, fail_at=None):
        self.__dict__.update(inner.__dict__)
        self.reads, self.fail_at = 0, fail_at

    def document(self, i):
        self.reads += 1
        if self.reads == self.fail_at:
            raise OSError("the disk is gone")
        return super().document(i)


def test_an_error_in_the_thread_reaches_the_trainer(two_phases):
    config, shards, schedule = two_phases
    broken = SlowShard(shards[0], fail_at=30)
    steps = 0
    with pytest.raises(OSError, match="the disk is gone"):
        for batches in loader(config, [broken], schedule).iterate(0, schedule.total_steps):
            for _ in batches:
                pass
            steps += 1
    assert 0 < steps < schedule.total_steps and not _threads()


def test_an_error_is_raised_again_and_never_waited_for(two_phases):
    config, shards, schedule = two_phases
    steps = loader(config, [SlowShard(shards[0], fail_at=1)], schedule).iterate(0, 1)
    batches = next(steps)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)


def test_it_reads_ahead_as_far_as_prefetch_and_stops_when_left(two_phases):
    config, shards, schedule = two_phases
    config = ahead(config, 10)
    shard = SlowShard(shards[0])
    mine = loader(config, [shard], schedule)
    steps = mine.iterate(0, schedule.total_steps)
    next(next(steps))
    time.sleep(0.5)
    built = [b for step in (0, 1) for b in loader(config, shards, schedule).microbatches(step)][:11]  # one in hand, ten ahead
    assert shard.reads == sum(b.counts.documents for b in built)
    steps.close()
    assert not _threads() and mine.wait_seconds > 0
    mine.close()


def ahead(config, prefetch):
    return config.model_copy(update={"data": config.data.model_copy(update={"prefetch": prefetch})})


def test_a_step_whose_loop_was_left_ends_in_an_error(two_phases):
    config, shards, schedule = two_phases
    steps = loader(ahead(config, 2), shards, schedule).iterate(0, 1)
    batches = next(steps)
    steps.close()
    with pytest.raises(RuntimeError, match="the loop over the loader's steps was left"):
        list(batches)


def test_a_step_begins_before_its_last_micro_batch_is_decoded(two_phases):
    config, shards, schedule = two_phases
    go = threading.Event()

    class Stuck(TorchDecoder):
        calls = 0

        def __call__(self, images, size):
            self.calls += 1
            if self.calls > 1:
                go.wait(30)
            return super().__call__(images, size)

    steps = loader(config, shards, schedule, decoder=Stuck(1)).iterate(0, 1)
    batches = next(steps)
    first = next(batches)
    assert not go.is_set() and same(first, next(loader(config, shards, schedule).microbatches(0)))
    go.set()
    assert len(list(batches)) == 7


def test_what_a_step_leaves_is_passed_over(two_phases):
    config, shards, schedule = two_phases
    firsts = [next(batches) for batches in loader(config, shards, schedule).iterate(0, schedule.total_steps)]
    assert len(firsts) == schedule.total_steps
    for step, first in enumerate(firsts):
        assert same(first, next(loader(config, shards, schedule).microbatches(step)))


def _threads():
    return [t for t in threading.enumerate() if t.name == "loader"]


def test_rows_that_do_not_divide_over_the_ranks(two_phases):
    config, shards, schedule = two_phases
    with pytest.raises(UserError, match=r"batch.rows 8 is not a multiple of micro_rows 1 x 3 data parallel processes"):
        loader(config, shards, schedule, dp_size=3)


def test_a_real_shard_from_disk(tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path / "tokenizer"))
    images = tiny_images(6)
    with ShardWriter(tmp_path / "a", tokenizer) as writer:
        for i in range(20):
            number = writer.add_image(images[i % 6])
            writer.add_document(
                f"doc-{i}", "tiny", [("context", [50, 51]), ("image", 0), ("context", [52]), ("target", [60 + i, 61])], [number]
            )
        writer.finish()
    config = recipe([(0.5, 28, 4), (1.0, 56, 16)], rows=2, capacity=64, sources=(SourceConfig(prefix=str(tmp_path / "a")),))
    shard = Shard(tmp_path / "a")
    schedule = build_schedule(config, [shard])
    found, decoder = {}, TorchDecoder(2)
    for batches in loader(config, [shard], schedule, decoder=decoder).iterate(0, schedule.total_steps):
        for b in batches:
            for k, (_, d) in enumerate(b.documents[0] if b.documents else []):
                begin = int(b.cu_seqlens[k])
                assert b.tokens[begin : begin + 2].tolist() == [50, 51]
                assert b.labels[begin + 2 + b.tokens_per_image].item() == 60 + d
                found[d] = torch.equal(b.pixels[k], decoder([images[d % 6]], b.image_size).pixels[0])
    assert found == dict.fromkeys(range(20), True)
