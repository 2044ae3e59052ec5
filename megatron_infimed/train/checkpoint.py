"""Checkpoints that survive kill -9, flipped bytes, a full disk and a change of layout.

A checkpoint is a folder `step_00001000`: Megatron-Core's torch_dist files (weights, and the distributed optimizer where it was saved),
`state.json` (step, position, the resolved recipe, what the data was) and `sha256.json` (a hash of every other file). It is written beside its
place as `.tmp` and renamed when whole (saver.py), so a folder with a right name is complete, and its hashes tell whether it still is what was
written: Megatron-Core itself loads flipped bytes without a word.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_infimed.config import ModelConfig
from megatron_infimed.data.safe_files import write_whole
from megatron_infimed.errors import MENDABLE, MISSING, UserError
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import cpu
from megatron_infimed.parallel.groups import Ranks, from_first, gather

log = logging.getLogger(__name__)
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step_"))

    @property
    def state(self) -> dict[str, Any]:
        """state.json: step, position, recipe, data. UserError where it is missing or damaged."""
        try:
            return json.loads((self.path / "state.json").read_bytes())
        except (OSError, ValueError) as e:
            if isinstance(e, OSError) and e.errno not in MENDABLE:
                raise
            raise UserError(f"{self.path}/state.json cannot be read ({e}): take another checkpoint of that run") from e

    @property
    def model(self) -> ModelConfig:
        """The model whose weights these are."""
        return ModelConfig.model_validate(self.state["recipe"]["model"])

    @property
    def fingerprint(self) -> str:
        """Hash of the hashes: the identity of the checkpoint's content."""
        return hashlib.sha256((self.path / "sha256.json").read_bytes()).hexdigest()

    def damaged(self, ranks: Ranks) -> list[str]:
        """Names of files that are missing or not what was written; the processes share the reading. Called by all of them together.

        Raises:
            UserError: a file may not be read.
            RuntimeError: one cannot be read, on some process; that is no damage, and another start may read it.
        """
        bad, trouble = [], None
        try:
            wanted: dict[str, str] = json.loads((self.path / "sha256.json").read_bytes())
            bad = [n for n in sorted(wanted)[ranks.rank :: ranks.world] if sha256(self.path / n) != wanted[n]]
        except ValueError:
            bad = ["sha256.json"]
        except OSError as e:
            if e.errno in MISSING:
                bad = ["sha256.json"]
            else:
                trouble = f"{e.filename}: process {ranks.rank} cannot read it ({e.strerror})", e.errno in MENDABLE
        told = gather((bad, trouble))
        if troubles := [one for _, one in told if one]:
            words, final = max(troubles, key=lambda one: one[1])
            raise UserError(f"{words}: make it readable") if final else RuntimeError(words)
        return sorted({name for part, _ in told for name in part})


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
    found = from_first(lambda: find(path))
    if damaged := found.damaged(ranks):
        raise UserError(f"{found.path} is damaged ({', '.join(damaged)}): take an older checkpoint of that run, or train on from one")
    theirs, ours = _flat(found.model), _flat(model)
    if other := [f"{name} {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name]]:
        raise UserError(f"{found.path} holds another model than the recipe describes: {'; '.join(other)}")
    return found


def _flat(model: ModelConfig) -> dict[str, Any]:
    parts = model.model_dump(exclude={"init_std": True, "dropout": True, "language": {"max_positions"}})
    return {f"model.{part}.{name}": value for part, values in parts.items() for name, value in values.items()}


def in_run(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run directory, sound or not, oldest first."""
    return [Checkpoint(p) for p in sorted(run.glob("checkpoints/step_*")) if re.fullmatch(r"step_\d+", p.name)]


def mark_done(run: Path, checkpoint: Checkpoint, **more: Any) -> None:
    """Writes DONE into a run directory: this checkpoint is what it was for."""
    done = {**more, "step": checkpoint.step, "checkpoint": checkpoint.path.name, "checkpoint_sha256": checkpoint.fingerprint}
    write_whole(run / "DONE", json.dumps(done, indent=1))


def read_done(run: Path) -> dict[str, Any] | None:
    """What DONE says; null where the run is not done."""
    try:
        return json.loads((run / "DONE").read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{run}/DONE is damaged: delete it, and the run goes on from its newest checkpoint") from None


def newest_sound(run: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint whose hashes hold; damaged ones are passed over with a warning, half-written ones removed."""
    for checkpoint in reversed(from_first(lambda: _tidied(run))):
        damaged = checkpoint.damaged(ranks)
        if not damaged:
            return checkpoint
        log.warning("%s is damaged (%s): going back to the checkpoint before it", checkpoint.path, ", ".join(damaged))
    return None


def _tidied(run: Path) -> list[Checkpoint]:
    for half in run.glob("checkpoints/*.tmp"):
        shutil.rmtree(half, ignore_errors=True)
    return in_run(run)


def load_weights(checkpoint: Checkpoint, pieces: Sequence[InfiMed]) -> None:
    """Reads the weights into this process's pieces of the model, in any layout; all processes together.

    Raises:
        UserError: the checkpoint is of another model, or cannot be read.
    """
    _load(checkpoint, pieces, None)


def load_all(checkpoint: Checkpoint, pieces: Sequence[InfiMed], optimizer: MegatronOptimizer) -> None:
    """Reads weights and optimizer, resharding both where the layout is another one; all processes together. Raises like `load_weights`."""
    _load(checkpoint, pieces, optimizer)


def load_moments(checkpoint: Checkpoint, pieces: Sequence[InfiMed], optimizer: MegatronOptimizer) -> None:
    """Like `load_all`, from another stage: weights, moments and their age come; learning rate, decay and betas stay this stage's."""
    own = [{name: group[name] for name in group if name not in ("params", "step")} for group in optimizer.param_groups]
    _load(checkpoint, pieces, optimizer)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _load(checkpoint: Checkpoint, pieces: Sequence[InfiMed], optimizer: MegatronOptimizer | None) -> None:
    try:
        with cpu.cuda_means_cpu():
            wanted = sharded_state(pieces, optimizer, loading=True)
            found: Any = dist_checkpointing.load(wanted, str(checkpoint.path), strict=StrictHandling.RETURN_UNEXPECTED)
            loaded, _, absent = found
            for name, piece in _named(pieces).items():
                absent |= set(piece.load_state_dict(loaded[name], strict=False).missing_keys)
            # Transformer Engine's FP8 figures are not in what local layers saved: they stay as they are. All else must be there.
            if lacking := sorted(name for name in absent if not name.endswith("._extra_state")):
                raise KeyError(f"it lacks {', '.join(lacking)}")
            if optimizer is not None:
                optimizer.load_state_dict(loaded["optimizer"])
    except (CheckpointingException, KeyError, RuntimeError, CheckpointException) as e:
        reason = " ".join(str(e).split())[:300]
        if not _of_its_content(e):
            raise RuntimeError(f"{checkpoint.path} could not be loaded: {reason}") from e
        raise UserError(f"{checkpoint.path}: does not load into this model ({reason}): is it of another recipe?") from e


def _of_its_content(error: BaseException) -> bool:
    """Whether it is the checkpoint that does not suit: not a process that died meanwhile, a disk that did not answer, a device without memory."""
    if isinstance(error, CheckpointException):  # torch's, over what went wrong on each rank
        return all(_of_its_content(e) for e, _ in error.failures.values())
    return not isinstance(error, OSError) and (not isinstance(error, RuntimeError) or "loading state_dict" in str(error))


def sharded_state(pieces: Sequence[InfiMed], optimizer: MegatronOptimizer | None, loading: bool) -> dict[str, Any]:
    """What this process holds (or wants) of a checkpoint, in Megatron-Core's terms."""
    state: dict[str, Any] = {name: piece.sharded_state_dict() for name, piece in _named(pieces).items()}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=_RESHARDABLE)
    return state


def _named(pieces: Sequence[InfiMed]) -> dict[str, InfiMed]:
    """Names for this process alone: in the files a tensor goes by its global name, whichever piece holds it."""
    return {"model": pieces[0]} if len(pieces) == 1 else {f"model{i}": piece for i, piece in enumerate(pieces)}


def sha256(path: Path) -> str:
    """Hash of a file; "missing" where there is none. OSError where it cannot be read."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        if e.errno in MISSING:
            return "missing"
        raise
