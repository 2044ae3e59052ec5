"""Checkpoints that survive kill -9, flipped bytes and a change of layout.

A checkpoint is a folder `step_00001000`: Megatron-Core's torch_dist files (weights, and the distributed optimizer where it was saved),
`state.json` (step, position, the resolved recipe, what the data was) and `sha256.json` (a hash of every other file). It is written beside its
place as `.tmp` and renamed when whole, so a folder with a right name is complete, and its hashes tell whether it still is what was written:
Megatron-Core itself loads flipped bytes without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_infimed.config import ModelConfig
from megatron_infimed.data.safe_files import sync
from megatron_infimed.errors import UserError
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import cpu
from megatron_infimed.parallel.groups import Ranks

log = logging.getLogger(__name__)
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path

    @property
    def state(self) -> dict[str, Any]:
        """state.json: step, position, recipe, data."""
        return json.loads((self.path / "state.json").read_text())

    @property
    def model(self) -> ModelConfig:
        """The model whose weights these are."""
        return ModelConfig.model_validate(self.state["recipe"]["model"])

    @property
    def fingerprint(self) -> str:
        """Hash of the hashes: the identity of the checkpoint's content."""
        return hashlib.sha256((self.path / "sha256.json").read_bytes()).hexdigest()

    def damaged(self, ranks: Ranks) -> list[str]:
        """Names of files that are not what was written; the processes share the reading. Called by all of them together."""
        wanted: dict[str, str] = json.loads((self.path / "sha256.json").read_text())
        names = sorted(wanted)
        bad = [n for n in names[ranks.rank :: ranks.world] if _sha256(self.path / n) != wanted[n]]
        found: list[list[str]] = [[] for _ in range(ranks.world)]
        dist.all_gather_object(found, bad)
        return sorted(name for part in found for name in part)


def find(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint folder, or the newest checkpoint of a run directory.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / "sha256.json").exists():
        return Checkpoint(path)
    found = in_run(path)
    if not found:
        there = "does not exist" if not path.exists() else "holds no checkpoint"
        raise UserError(f"{path} {there}: name a checkpoint folder (step_...) or a run directory whose checkpoints/ has one")
    return found[-1]


def find_sound(path: str | os.PathLike[str], model: ModelConfig, ranks: Ranks) -> Checkpoint:
    """Like `find`, for weights that are to be read: checked against their hashes and the model. Called by all processes together.

    Raises:
        UserError: there is none, it is damaged, or of another model.
    """
    found = find(path)
    if damaged := found.damaged(ranks):
        raise UserError(f"{found.path} is damaged ({', '.join(damaged)}): take an older checkpoint of that run, or train on from one")
    theirs, ours = _flat(found.model), _flat(model)
    if other := [f"{name} {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name]]:
        raise UserError(f"{found.path} holds another model than the recipe describes: {'; '.join(other)}")
    return found


def _flat(model: ModelConfig) -> dict[str, Any]:
    parts = model.model_dump(exclude={"init_std": True, "language": {"max_positions"}})
    return {f"model.{part}.{name}": value for part, values in parts.items() for name, value in values.items()}


def in_run(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run directory, oldest first."""
    return [Checkpoint(p.parent) for p in sorted(run.glob("checkpoints/step_*[0-9]/sha256.json"))]


def save(
    run: Path, state: dict[str, Any], model: InfiMed, optimizer: MegatronOptimizer | None, ranks: Ranks, keep: int | None = None
) -> Checkpoint:
    """Writes checkpoints/step_N of the run directory, N = state["step"]; all processes together. Older ones beyond `keep` go."""
    path = run / "checkpoints" / f"step_{state['step']:08d}"
    aside = path.with_name(path.name + ".tmp")
    if ranks.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    with cpu.cuda_means_cpu():
        dist_checkpointing.save(_sharded_state(model, optimizer, loading=False), str(aside), ("torch_dist", 1))
    dist.barrier()
    if ranks.rank == 0:
        (aside / "state.json").write_text(json.dumps(state, indent=1))
        names = sorted(p.name for p in aside.iterdir())
        (aside / "sha256.json").write_text(json.dumps({name: _sha256(aside / name) for name in names}, indent=1))
        for name in (*names, "sha256.json"):
            sync(aside / name)
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
        sync(path.parent)
        if keep is not None:
            others = [c.path for c in in_run(run) if c.path != path]
            later = [p for p in others if p.name > path.name]  # damaged, passed over on resumption: they must not push good ones out
            before = [p for p in others if p.name < path.name]
            for old in (*later, *before[: max(0, len(before) - (keep - 1))]):
                shutil.rmtree(old)
    dist.barrier()
    return Checkpoint(path)


def load_weights(checkpoint: Checkpoint, model: InfiMed) -> None:
    """Reads the weights into a model of any layout; all processes together.

    Raises:
        UserError: the checkpoint is of another model, or cannot be read.
    """
    with _readable(checkpoint), cpu.cuda_means_cpu():
        sharded = _sharded_state(model, None, loading=True)
        loaded: Any = dist_checkpointing.load(sharded, str(checkpoint.path))
        model.load_state_dict(loaded["model"])


def load_all(checkpoint: Checkpoint, model: InfiMed, optimizer: MegatronOptimizer) -> None:
    """Reads weights and optimizer, resharding both where the layout is another one; all processes together."""
    with _readable(checkpoint), cpu.cuda_means_cpu():
        sharded = _sharded_state(model, optimizer, loading=True)
        loaded: Any = dist_checkpointing.load(sharded, str(checkpoint.path))
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])


def newest_sound(run: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint whose hashes hold; damaged ones are passed over with a warning, half-written ones removed."""
    if ranks.rank == 0:
        for half in run.glob("checkpoints/*.tmp"):
            shutil.rmtree(half, ignore_errors=True)
    dist.barrier()
    for checkpoint in reversed(in_run(run)):
        damaged = checkpoint.damaged(ranks)
        if not damaged:
            return checkpoint
        log.warning("%s is damaged (%s): going back to the checkpoint before it", checkpoint.path, ", ".join(damaged))
    return None


def _sharded_state(model: InfiMed, optimizer: MegatronOptimizer | None, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"model": model.sharded_state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=_RESHARDABLE)
    return state


@contextlib.contextmanager
def _readable(checkpoint: Checkpoint):
    try:
        yield
    except (CheckpointingException, KeyError, RuntimeError, CheckpointException) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{checkpoint.path}: does not load into this model ({reason}): is it of another recipe?") from e


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        return f"unreadable: {e.strerror}"
