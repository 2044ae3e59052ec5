"""The plan on disk: the same as the one worked out, made once, waited for without a collective, refused when damaged."""

from __future__ import annotations

import json
import platform
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_infimed.data import saved_plan
from megatron_infimed.data.bound import Bound
from megatron_infimed.data.saved_plan import lines, plan_key, plan_of
from megatron_infimed.data.schedule import Schedule, build_schedule
from megatron_infimed.errors import UserError
from tests.unit.test_schedule import random_shard, recipe


def setup(tmp_path: Path, **data):
    made = recipe(phases=((0.5, 28, 4), (1.0, 28, 9)), capacity=48, max_images=4, **data)
    shard = random_shard(200)
    shard.manifest = {"files": {"docs": {"sha256": "one"}}}
    return made.model_copy(update={"output": str(tmp_path / "run")}), [shard]


def test_what_comes_back_is_what_was_planned(tmp_path: Path) -> None:
    settings, shards = setup(tmp_path)
    made, saved = build_schedule(settings, shards), plan_of(settings, shards)
    assert saved.fingerprint == made.fingerprint and saved.total_steps == made.total_steps
    for a, b in zip(made.phases, saved.phases, strict=True):
        assert isinstance(b.document, np.memmap)
        assert (a.fill, a.lost, a.cut, a.rejected, a.kept_values, a.bound) == (b.fill, b.lost, b.cut, b.rejected, b.kept_values, b.bound)
        assert a.row(0) == b.row(0) and np.array_equal(a.row_tokens, b.row_tokens) and np.array_equal(a.row_images, b.row_images)
        assert np.array_equal(a.row_pairs, b.row_pairs) and b.row_pairs.dtype == np.int64
        assert a.row_tokens.max() <= 48 and a.row_images.max() <= 4 and a.row_tokens.sum() == round(a.fill * 48 * a.rows)


def test_a_plan_is_made_once_and_kept_by_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, shards = setup(tmp_path)
    first = plan_of(settings, shards).fingerprint
    monkeypatch.setattr(saved_plan, "build_schedule", lambda *_: pytest.fail("planned again"))
    assert plan_of(settings, shards).fingerprint == first


def test_every_setting_that_decides_the_plan_is_in_its_key(tmp_path: Path) -> None:
    settings, shards = setup(tmp_path)
    keys = {plan_key(settings, shards)}
    for change in ({"capacity": 64}, {"max_images": 5}, {"seed": 1}, {"overlong": "reject"}, {"document_alignment": 2}):
        keys.add(plan_key(settings.model_copy(update={"data": settings.data.model_copy(update=change)}), shards))
    keys.add(plan_key(settings.model_copy(update={"schedule": settings.schedule[1:]}), shards))
    keys.add(plan_key(settings.model_copy(update={"batch": settings.batch.model_copy(update={"rows": 8})}), shards))
    shards[0].manifest = {"files": {"docs": {"sha256": "another"}}}
    keys.add(plan_key(settings, shards))
    assert len(keys) == 9
    other = settings.model_copy(update={"data": settings.data.model_copy(update={"prefetch": 7})})
    assert plan_key(other, shards) in keys


def test_others_wait_for_the_first_process(tmp_path: Path) -> None:
    settings, shards = setup(tmp_path)
    found = []
    waiting = threading.Thread(target=lambda: found.append(plan_of(settings, shards, builds=False).fingerprint))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive() and not found
    made = plan_of(settings, shards).fingerprint
    waiting.join(timeout=10)
    assert found == [made]


def test_a_damaged_plan_is_refused_and_made_again_on_request(tmp_path: Path) -> None:
    settings, shards = setup(tmp_path)
    good = plan_of(settings, shards).fingerprint
    (folder,) = (Path(settings.output) / "plan").iterdir()
    file = folder / "phase0.document.npy"
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged .*delete the folder"):
        plan_of(settings, shards)
    file.write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"cannot be read .*delete the folder"):
        plan_of(settings, shards)
    (folder.parent / f"{folder.name}.{platform.node()}.999999999.tmp").mkdir()  # of a process that was killed
    assert plan_of(settings, shards, prove_seconds=1.0).fingerprint == good
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_sound_plan_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stands on it, although today's packer would pack otherwise; only what is known of the bound gets better."""
    settings, shards = setup(tmp_path)
    first = plan_of(settings, shards)
    (folder,) = (Path(settings.output) / "plan").iterdir()
    before = (folder / "phase0.offsets.npy").stat()
    other = settings.model_copy(update={"data": settings.data.model_copy(update={"seed": 7})})
    better = build_schedule(other, shards)
    better = Schedule([replace(p, bound=Bound(old.bound.rows + 1, "better")) for p, old in zip(better.phases, first.phases, strict=True)])
    monkeypatch.setattr(saved_plan, "build_schedule", lambda *_: better)
    again = plan_of(settings, shards, prove_seconds=1.0)
    assert again.fingerprint == first.fingerprint != better.fingerprint
    assert (folder / "phase0.offsets.npy").stat() == before
    assert all(new.bound == Bound(old.bound.rows + 1, "better") for old, new in zip(first.phases, again.phases, strict=True))


def test_what_people_read(tmp_path: Path) -> None:
    settings, shards = setup(tmp_path)
    schedule = plan_of(settings, shards, prove_seconds=1.0)
    (folder,) = (Path(settings.output) / "plan").iterdir()
    for p, about in zip(schedule.phases, json.loads((folder / "plan.json").read_text())["phases"], strict=True):
        assert sum(about["rows_by_images"]) == sum(about["rows_by_fill"].values()) == p.rows == about["rows"]
        assert sum(n * k for k, n in enumerate(about["rows_by_images"])) == p.row_images.sum()
        assert about["rows_by_fill"]["1"] == (p.row_tokens == 48).sum()
        assert about["bound"]["rows"] <= p.rows
    text = "\n".join(lines(schedule, 48, 4))
    assert "lost 0" in text and "no plan needs fewer than" in text and "of at most 4" in text and "100 % full" in text
