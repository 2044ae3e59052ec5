"""The plan of a run on disk: worked out once, mapped by every process.

OUTPUT/plan/KEY/ holds the arrays of each phase as .npy files and plan.json, which is also what people and scripts read: fill, bound,
histograms, what was cut and left out. KEY names all that decides the plan (shards by content, mixture, budgets, schedule), so a plan that
is there is the right one; a run goes on with its plan even if the packer has learned better since. `plan` makes it ahead of the job;
otherwise the first process does, in seconds, while the others wait for the folder to appear: no collective, so nothing can time out. The
folder is written aside and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infimed.config import Recipe
from megatron_infimed.data.bound import Bound
from megatron_infimed.data.mixture import identities
from megatron_infimed.data.schedule import Phase, Rejected, Schedule, build_schedule
from megatron_infimed.data.shards import Shard
from megatron_infimed.errors import UserError

log = logging.getLogger("megatron_infimed.data")
_ARRAYS = ("source", "document", "offsets", "row_tokens", "row_images")
_PLAIN = ("number", "image_size", "tokens_per_image", "batch_rows", "fill", "lost", "cut")
_LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
_TOLD = 60.0  # seconds between two messages of a process that waits


def plan_of(recipe: Recipe, shards: Sequence[Shard], *, builds: bool = True, prove_seconds: float | None = None) -> Schedule:
    """The recipe's schedule, from disk if it is there.

    Args:
        builds: whether this process makes a missing plan; the others wait for it.
        prove_seconds: make the plan anew, and spend so long for each phase on proving how good it is.

    Raises:
        UserError: what `build_schedule` raises; a damaged plan; a folder that cannot be written.
    """
    folder = Path(recipe.output) / "plan" / plan_key(recipe, shards)
    if not builds:
        _wait(folder)
    elif prove_seconds is not None or not (folder / "plan.json").exists():
        schedule = build_schedule(recipe, shards, prove_seconds or 0.0)
        try:
            _save(folder, schedule, recipe)
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
    return hashlib.sha256(json.dumps([sources, budgets, phases, recipe.batch.rows], sort_keys=True).encode()).hexdigest()[:16]


def _save(folder: Path, schedule: Schedule, recipe: Recipe) -> None:
    aside, old = (folder.with_name(f"{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for phase in schedule.phases:
            for name in _ARRAYS:
                np.save(aside / f"phase{phase.number}.{name}.npy", getattr(phase, name))
        head = {
            "fingerprint": schedule.fingerprint,
            "capacity": recipe.data.capacity,
            "max_images": recipe.data.max_images,
            "phases": [_describe(p, recipe.data.capacity) for p in schedule.phases],
        }
        (aside / "plan.json").write_text(json.dumps(head, indent=1))
        for path in aside.iterdir():
            _sync(path)
        if folder.exists():  # the same plan once more, or a damaged one; who has it mapped keeps it
            folder.rename(old)
        aside.rename(folder)
        _sync(folder.parent)
    finally:
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _describe(phase: Phase, capacity: int) -> dict[str, Any]:
    images = np.bincount(phase.row_images)
    cuts = [0, *(int(np.ceil(level * capacity)) for level in _LEVELS), capacity + 1]
    tokens = np.histogram(phase.row_tokens, cuts)[0]
    return {
        **{name: getattr(phase, name) for name in _PLAIN},
        "documents": len(phase.document),
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
        out += [
            f"phase {p.number}: {p.image_size} px, {p.tokens_per_image} tokens an image: {len(p.document):,} documents in {p.rows:,} rows, "
            f"{p.steps:,} steps; lost {p.lost}, cut {len(p.cut):,}, left out {len(p.rejected):,}",
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
