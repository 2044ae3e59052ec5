"""What the guards decide, how documents are singled out, and what the watchdog says and writes."""

from __future__ import annotations

import json
import random
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infimed.config import GuardsConfig
from megatron_infimed.data.batch import image_block, pack_rows
from megatron_infimed.data.shards import CONTEXT, IMAGE, TARGET, Document
from megatron_infimed.train.guards import NAMED, Guards, _in_words, narrow, only, spans_of, suspects
from megatron_infimed.train.watchdog import Report, Watchdog, who_is_late

NAN, INF = float("nan"), float("inf")


def actions(guards, losses, norm=1.0):
    return [guards.judge(loss, norm).action for loss in losses]


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (2.0, NAN), (2.0, INF)])
def test_what_is_not_finite_is_never_applied(loss, norm):
    for policy in ("stop", "skip"):
        guards = Guards(GuardsConfig(nonfinite=policy))
        verdict = guards.judge(loss, norm)
        assert (verdict.action, verdict.kind) == (policy, "nonfinite")
        assert f"loss {loss:.4g}, grad_norm {norm:.4g}" in verdict.reason and "\n" not in verdict.reason
        assert guards.state() == []
    assert Guards(GuardsConfig()).judge(2.0, 1.0).reason is None


def test_after_max_skips_in_a_row_it_stops():
    guards = Guards(GuardsConfig(nonfinite="skip", max_skips=3))
    assert actions(guards, [NAN, NAN, NAN, 2.0, NAN, NAN, NAN, NAN]) == ["skip"] * 3 + ["apply"] + ["skip"] * 3 + ["stop"]
    assert guards.state() == [2.0]
    guards = Guards(GuardsConfig(nonfinite="skip", max_skips=1))
    guards.judge(NAN, 1.0)
    assert "max_skips 1" in guards.judge(NAN, 1.0).reason


def noisy(n, seed=0):
    rng = random.Random(seed)
    return [3.0 - 0.01 * i + rng.gauss(0, 0.05) for i in range(n)]


def test_a_spike_stands_out_from_the_window():
    config = GuardsConfig(spike=6.0, spike_action="skip", window=16)
    guards = Guards(config)
    assert actions(guards, [2.0, 9.0, 2.0, 9.0, 2.0, 9.0, 2.0]) == ["apply"] * 7, "seven losses of sixteen are too few to tell"
    guards.reset()
    assert actions(guards, noisy(200)) == ["apply"] * 200, "noise and a slow fall are no spikes"
    assert len(guards.state()) == 16
    before = guards.state()
    verdict = guards.judge(before[-1] + 2.0, 1.0)
    assert (verdict.action, verdict.kind) == ("skip", "spike") and guards.state() == before
    assert "robust deviations" in verdict.reason and "guards.spike 6" in verdict.reason
    assert guards.judge(0.1, 1.0).action == "apply", "a fall is no spike"
    guards.reset()
    assert guards.judge(50.0, 1.0).action == "apply", "a new phase starts anew"
    assert actions(Guards(GuardsConfig(window=8)), [2.0] * 20 + [50.0]) == ["apply"] * 21, "spike: null does not look"


def test_a_flat_loss_does_not_make_noise_a_spike():
    guards = Guards(GuardsConfig(spike=6.0, spike_action="stop", window=8))
    assert actions(guards, [2.0] * 8 + [2.1]) == ["apply"] * 9  # 6 deviations of at least 1 % of the median: from 2.12 on
    assert guards.judge(2.13, 1.0).action == "stop"
    guards = Guards(GuardsConfig(spike=6.0, spike_action="stop", window=8), recent=[0.0] * 8)
    assert guards.judge(0.5, 1.0).action == "stop"


def test_a_warning_is_applied_and_remembered():
    guards = Guards(GuardsConfig(spike=3.0, window=8), recent=[2.0, 2.1] * 4)
    verdict = guards.judge(9.0, 1.0)
    assert (verdict.action, verdict.kind) == ("apply", "spike") and "applied" in verdict.reason
    assert guards.state()[-1] == 9.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(0, 1000))
def test_a_resumed_run_decides_the_same(at, seed):
    config = GuardsConfig(spike=2.0, spike_action="skip", window=8, max_skips=100)
    losses = noisy(60, seed)
    whole, before = Guards(config), Guards(config)
    wanted = actions(whole, losses)
    got = actions(before, losses[:at])
    after = Guards(config, json.loads(json.dumps(before.state())))
    assert got + actions(after, losses[at:]) == wanted and after.state() == whole.state()


def test_the_spikes_of_that_test_exist():
    guards = Guards(GuardsConfig(spike=2.0, spike_action="skip", window=8, max_skips=100))
    assert "skip" in actions(guards, noisy(60))


@given(st.integers(1, 40), st.data())
def test_narrow_finds_exactly_the_bad_ones(n, data):
    bad = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    asked = []
    groups = narrow(lambda part: asked.append(part) or bool(bad & set(part)), list(range(n)))
    assert groups == [[i] for i in sorted(bad)]
    assert len(asked) <= 2 * len(bad) * n.bit_length()


@given(st.sets(st.integers(0, 15), min_size=2, max_size=2))
def test_narrow_keeps_together_what_is_bad_only_together(pair):
    (group,) = narrow(lambda part: pair <= set(part), list(range(16)))
    assert pair <= set(group) and set(group) <= set(range(16))


def batch(images=(1, 0, 2), lengths=(9, 14, 20), capacity=64, rows=2):
    """Rows of the same shape: documents of text with images at their third place, then padding."""
    rng = np.random.default_rng(0)
    content = []
    for _ in range(rows):
        documents = []
        for n, length in zip(images, lengths, strict=True):
            modes = np.array([CONTEXT] * 6 + [TARGET] * (length - 6), np.int8)
            modes[2 : 2 + n] = IMAGE
            documents.append(Document(rng.integers(10, 500, length).astype(np.int32), modes))
        content.append(documents)
    names = [[(0, 10 * r + i) for i in range(len(lengths))] for r in range(rows)]
    out = pack_rows(
        content, capacity=capacity, tokens_per_image=4, image_size=8, pad_id=0, image_id=1, document_alignment=4, documents=names
    )
    return out, torch.from_numpy(rng.integers(1, 256, (out.counts.images, 3, 8, 8), dtype=np.uint8))


def test_spans_are_those_of_the_documents():
    whole, _ = batch()
    assert spans_of(whole) == [(0, 12), (12, 28), (28, 56), (64, 76), (76, 92), (92, 120)]  # aligned to 4, then padding
    full, _ = batch(images=(0, 0), lengths=(8, 24), capacity=32)
    assert spans_of(full) == [(0, 8), (8, 32), (32, 40), (40, 64)]


@pytest.mark.parametrize("of", [1, 2, 4])
def test_only_silences_all_else(of):
    whole, pixels = batch()
    spans = spans_of(whole)
    for kept in ([0], [2, 3], [1]):
        inside = torch.zeros(128, dtype=torch.bool)
        for i in kept:
            inside[slice(*spans[i])] = True
        grays = []
        for index in range(of):
            block = image_block(6, (index, of))
            mine = whole.with_pixels(pixels[block.start : block.stop], 0, (index, of))
            alone = only(mine, [spans[i] for i in kept], (index, of))
            assert torch.equal(alone.tokens[inside], whole.tokens[inside])
            assert set(alone.tokens[~inside].tolist()) == {int(whole.tokens[inside][0])}
            assert torch.equal(alone.loss_mask, whole.loss_mask * inside) and alone.loss_mask.sum() > 0
            assert torch.equal(alone.cu_seqlens, whole.cu_seqlens) and torch.equal(alone.slots, whole.slots)
            if alone.pixels is not None:
                assert alone.pixels.dtype == torch.uint8
                grays += [not bool(image.any()) for image in alone.pixels]
                assert all(bool((a == b).all()) or not bool(a.any()) for a, b in zip(alone.pixels, mine.pixels, strict=True))
        owner = [0, 2, 2, 3, 5, 5]
        assert grays == [document not in kept for document in owner]


def test_suspects_of_a_row_without_documents_and_of_one_not_taken_apart():
    whole, _ = batch()
    assert suspects(whole, lambda b: False, (0, 1)) == []
    assert suspects(whole, lambda b: True, (0, 1), halve=False) == [[(0, d) for d in (0, 1, 2, 10, 11, 12)]]
    empty = pack_rows([[]], capacity=32, tokens_per_image=4, image_size=8, pad_id=0, image_id=1, documents=[[]])
    assert suspects(empty, lambda b: True, (0, 1)) == [[]]


def test_the_message_names_twenty_documents_at_most(tmp_path):
    lines = [{"data_rank": 0, "micro_batch": i, "documents": [f"d{i}"]} for i in range(25)]
    text = _in_words(lines, 100, tmp_path / "suspects.jsonl")
    assert "25 of 100" in text and f"d{NAMED - 1}" in text and f"d{NAMED}" not in text and "all 25 are in" in text
    assert "weights have diverged" not in text and "weights have diverged" in _in_words(lines, 25, tmp_path)
    assert "none of the 8" in _in_words([], 8, tmp_path)


def report(rank, step, place, seconds=612.0):
    return Report(rank, f"node{rank}", 1, step, place, seconds, [])


@pytest.mark.parametrize(
    ("where", "world", "wanted"),
    [
        (
            {3: (17, "data"), **dict.fromkeys((0, 1, 2, 4, 5, 6, 7), (17, "forward_backward"))}, 8,
            "rank 3 (node3) is late: in data of step 17 for 612 s, 7 more wait in forward_backward of step 17",
        ),
        (
            {0: (17, "save"), 1: (18, "forward_backward"), 2: (18, "forward_backward")}, 3,
            "rank 0 (node0) is late: in save of step 17 for 612 s, 2 more wait in forward_backward of step 18",
        ),
        (
            {0: (5, "forward_backward"), 1: (5, "data")}, 2,
            "rank 1 (node1) is late: in data of step 5 for 612 s, 1 more waits in forward_backward of step 5",
        ),
        (
            {0: (5, "update")}, 2,
            "rank 1 (host1) does not answer: it is stopped, dead or stuck outside Python, 1 more waits in update of step 5",
        ),
        (
            {0: (5, "update"), 1: (5, "forward_backward"), 2: (5, "data"), 3: (5, "update"), 4: (5, "update")}, 5,
            "rank 2 (node2) is late: in data of step 5 for 612 s, 1 more waits in forward_backward of step 5, 3 more wait in update of step 5",
        ),
        (
            {0: (5, "update"), 1: (5, "update"), 2: (6, "data")}, 3,
            "2 wait in update of step 5, 1 more waits in data of step 6, none behind: look at the network",
        ),
    ],
)  # fmt: skip
def test_who_is_late(where, world, wanted):
    reports = {rank: report(rank, *at) for rank, at in where.items()}
    assert who_is_late(reports, world, [f"host{r}" for r in range(world)]) == wanted


def test_many_that_do_not_answer_are_counted():
    text = who_is_late({0: report(0, 5, "update")}, 64)
    assert text.count("does not answer") == 8 and "and 55 more" in text and "rank 1 does" in text


LIMIT = 0.6  # seconds


def test_the_busy_answer_and_the_late_one_is_named(tmp_path, caplog):
    """Three watchdogs in one process: rank 0 is stuck with the data, rank 1 waits for it, rank 2 goes on for a while, rank 3 is not there."""
    end = threading.Event()
    dogs = [Watchdog(tmp_path, rank, 4, LIMIT / 60, main=rank != 0, hosts=list("abcd")) for rank in range(3)]

    def busy():
        step = 5
        while not end.wait(0.05):
            step += 1
            dogs[2].at("forward_backward", step)

    thread = threading.Thread(target=busy)
    with caplog.at_level("INFO"), dogs[0], dogs[1], dogs[2]:
        dogs[0].at("data", 5)
        dogs[1].at("forward_backward", 5)
        thread.start()
        wait_for(lambda: "no progress" in caplog.text)
        text = next(r.getMessage() for r in caplog.records if "no progress" in r.getMessage())
        assert sorted(p.name for p in tmp_path.glob("hang/*.json")) == ["answer_2.json", "rank_0.json", "rank_1.json"]
        said = json.loads((tmp_path / "hang/rank_0.json").read_text())
        assert (said["step"], said["place"], said["host"]) == (5, "data", "a") and said["seconds"] >= LIMIT
        assert any("wait_for" in line and "test_guards.py:" in line for line in said["stack"])
        assert "rank 3 (d) does not answer" in text and "rank 0 (a) is late: in data of step 5" in text and "rank 2" not in text
        time.sleep(3 * LIMIT)
        assert caplog.text.count("no progress") == 1, "said once"
        for dog in dogs[:2]:
            dog.at("data", 6)
        wait_for(lambda: not list(tmp_path.glob("hang/*.json")))
        assert "rank 0 goes on, after" in caplog.text and "rank 2 goes on" not in caplog.text
        end.set()
        thread.join()


def test_what_is_left_of_an_earlier_start_is_removed_and_an_error_leaves_evidence(tmp_path):
    (tmp_path / "hang").mkdir()
    for name in ("rank_1.json", "rank_7.json", "answer_0.json"):
        (tmp_path / "hang" / name).write_text("{}")
    with pytest.raises(RuntimeError), Watchdog(tmp_path, 0, 1, LIMIT / 60) as dog:
        assert not list(tmp_path.glob("hang/*.json"))
        dog.at("update", 3)
        wait_for(lambda: (tmp_path / "hang/rank_0.json").exists())
        raise RuntimeError("the collective's time is up")
    assert (tmp_path / "hang/rank_0.json").exists()
    with Watchdog(tmp_path, 0, 1, LIMIT / 60):
        wait_for(lambda: (tmp_path / "hang/rank_0.json").exists())
    assert not list(tmp_path.glob("hang/*.json"))


def test_zero_minutes_watch_nothing_and_a_full_disk_is_a_warning(tmp_path, caplog):
    with Watchdog(tmp_path / "none", 0, 1, 0) as dog:
        dog.at("data", 1)
        time.sleep(0.3)
    assert not (tmp_path / "none").exists()
    (tmp_path / "hang").write_text("a file where the folder should be")
    with Watchdog(tmp_path, 0, 1, LIMIT / 60):
        wait_for(lambda: "cannot use" in caplog.text)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
