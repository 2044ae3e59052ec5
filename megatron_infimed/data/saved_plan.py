"""The plan of a run on disk: worked out once, mapped by every process.

OUTPUT/plan/KEY/ holds the arrays of each phase as .npy files and plan.json, which is also what people and scripts read: fill, bound,
histograms, what was cut and left out. KEY names all that decides the plan (shards by content, mixture, budgets, schedule), so a plan that
is there is the right one; a run goes on with its plan even if the packer has learned better since. `plan` makes it ahead of the job;
otherwise the first process does, in seconds, while the others wait for the folder to appear: no collective, so nothing can time out. The
folder is written aside and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_infimed.config import Recipe
from megatron_infimed.data.bound import Bound
from megatron_infimed.data.mixture import identities
from megatron_infimed.data.safe_files import sync
from megatron_infimed.data.schedule import Phase, Rejected, Schedule, build_schedule
from megatron_infimed.data.shards import Shard
from megatron_infimed.errors import UserError

log = logging.getLogger("megatron_infimed.data")
_ARRAYS = ("source", "document", "offsets", "row_tokens", "row_images", "row_pairs")
_FORMAT = 2  # of the folder: a run whose plan is of an older one plans again, to the same rows
_PLAIN = ("number", "image_size", "tokens_per_image", "batch_rows", "fill", "lost", "cut")
_LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
_TOLD = 60.0  # seconds between two messages of a process that waits


def plan_of(recipe: Recipe, shards: Sequence[Shard], *, builds: bool = True, prove_seconds: float = 0.0) -> Schedule:
    """The recipe's schedule, from disk if it is there.

    Args:
        builds: whether this process makes a missing plan; the others wait for it.
        prove_seconds: spent for each phase on proving how good the plan is; a damaged plan is then made again too.

    Raises:
        UserError: what `build_schedule` raises; a damaged plan; a folder that cannot be written.
    """
    folder = Path(recipe.output) / "plan" / plan_key(recipe, shards)
    if not builds:
        _wait(folder)
    elif prove_seconds or not (folder / "plan.json").exists():
        made = build_schedule(recipe, shards, prove_seconds)
        try:
            _save(folder, made, recipe)
        except OSError as e:
            raise UserError(f"{folder}: the plan cannot be written there ({e.strerror}); choose another output") from None
    return _load(folder)


def plan_key(recipe: Recipe, shards: Sequence[Shard]) -> str:
    data = recipe.data
    sources = [
        (name, spec.weight, spec.epochs, shard.manifest["files"]["docs"]["sha256"])
        for name, spec, shard in zip(identities(data.sources), data.sources, shards, strict=True)
    ]
    budgets = data.model_dump(mode="json", include={"documents", "capacity", "max_images", "document_alignment", "overlong", "seed"})
    phases = [p.model_dump(mode="json") for p in recipe.schedule]
    return hashlib.sha256(json.dumps([_FORMAT, sources, budgets, phases, recipe.batch.rows], sort_keys=True).encode()).hexdigest()[:16]


def _save(folder: Path, made: Schedule, recipe: Recipe) -> None:
    """A plan that is there and sound stays, with what is now known of its bounds (they hold for every plan of these documents)."""
    with contextlib.suppress(UserError):
        kept = _load(folder)
        phases = [
            replace(old, bound=max(old.bound, new.bound, key=lambda b: b.rows)) for old, new in zip(kept.phases, made.phases, strict=True)
        ]
        aside = folder / f"plan.json.{os.getpid()}.tmp"
        aside.write_text(_head(Schedule(phases), recipe))
        sync(aside)
        aside.rename(folder / "plan.json")
        return
    aside = folder.with_name(f"{folder.name}.{platform.node()}.{os.getpid()}.tmp")
    for left in folder.parent.glob(f"{folder.name}.{platform.node()}.*.tmp"):  # of a process that was killed
        if left == aside or not psutil.pid_exists(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for phase in made.phases:
            for name in _ARRAYS:
                np.save(aside / f"phase{phase.number}.{name}.npy", getattr(phase, name))
        (aside / "plan.json").write_text(_head(made, recipe))
        for path in aside.iterdir():
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        aside.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _head(schedule: Schedule, recipe: Recipe) -> str:
    data = recipe.data
    head = {
        "fingerprint": schedule.fingerprint,
        "capacity": data.capacity,
        "max_images": data.max_images,
        "phases": [_describe(p, data.capacity) for p in schedule.phases],
    }
    return json.dumps(head, indent=1)


def _describe(phase: Phase, capacity: int) -> dict[str, Any]:
    images = np.bincount(phase.row_images)
    cuts = [0, *(int(np.ceil(level * capacity)) for level in _LEVELS), capacity + 1]
    tokens = np.histogram(phase.row_tokens, cuts)[0]
    return {
        **{name: getattr(phase, name) for name in _PLAIN},
        "documents": len(phase.document),
        "left_out": sum(r.times for r in phase.rejected),
        "rows": phase.rows,
        "steps": phase.steps,
        "bound": {"rows": phase.bound.rows, "method": phase.bound.method},
        "rows_by_images": images.tolist(),
        "rows_by_fill": {f"{low:g}": int(n) for low, n in zip((0.0, *_LEVELS), tokens, strict=True)},
        "kept_values": [[*where, n] for where, n in phase.kept_values.items()],
        "rejected": [list(r) for r in phase.rejected],
    }


def _load(folder: Path) -> Schedule:
    try:
        head = json.loads((folder / "plan.json").read_text())
        phases = []
        for about in head["phases"]:
            arrays = {name: np.load(folder / f"phase{about['number']}.{name}.npy", mmap_mode="r") for name in _ARRAYS}
            plain = {name: about[name] for name in _PLAIN}
            kept = {(source, document): n for source, document, n in about["kept_values"]}
            rejected = [Rejected(*r) for r in about["rejected"]]
            phases.append(Phase(**plain, **arrays, bound=Bound(**about["bound"]), kept_values=kept, rejected=rejected))
        schedule = Schedule(phases)
        sound = schedule.fingerprint == head["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: the saved plan cannot be read ({type(e).__name__}: {e}); delete the folder, it is made again") from None
    if not sound:
        raise UserError(f"{folder}: the saved plan is damaged (its fingerprint is another); delete the folder, it is made again")
    return schedule


def _wait(folder: Path) -> None:
    begin = told = time.monotonic()
    while not (folder / "plan.json").exists():
        time.sleep(0.1)
        if time.monotonic() - told > _TOLD:
            told = time.monotonic()
            log.warning("waiting for the first process to write the plan %s, %.0f s so far", folder, told - begin)


def lines(schedule: Schedule, capacity: int, max_images: int | None) -> list[str]:
    """What `plan` prints."""
    out = []
    for p in schedule.phases:
        about = _describe(p, capacity)
        images, limit = p.row_images, f" of at most {max_images}" if max_images is not None else ""
        asked = len(p.document) + about["left_out"]
        out += [
            f"phase {p.number}: {p.image_size} px, {p.tokens_per_image} tokens an image: {len(p.document):,} of {asked:,} documents in "
            f"{p.rows:,} rows, {p.steps:,} steps; lost {p.lost}, left out {about['left_out']:,}; {len(p.cut):,} were cut to fit",
            f"  fill       {100 * p.fill:.2f} % of {capacity:,} tokens",
            f"  bound      no plan needs fewer than {p.bound.rows:,} rows ({p.bound.method}): "
            f"at most {100 * (1 - p.bound.rows / p.rows):.2f} % could be saved",
            f"  images     {images.min()} to {images.max()} a row, median {int(np.median(images))}{limit}",
            "  rows       " + _bars({f"{100 * float(low):g} % full and more": n for low, n in about["rows_by_fill"].items()}),
        ]
    return [*out, f"{schedule.total_steps:,} steps in all"]


def _bars(counts: dict[str, int]) -> str:
    total, widest = max(sum(counts.values()), 1), max(map(len, counts))
    shown = [f"{name:>{widest}}  {'█' * round(40 * n / total):<40} {n:,}" for name, n in counts.items() if n]
    return "\n             ".join(shown)
