"""How a checkpoint is written while training goes on.

Saving has two halves. The first holds training up: Megatron-Core plans which process writes which tensors (a like share of the bytes each),
and every process copies its share into memory of its own. The second writes, hashes and fsyncs that copy, in a thread: it dies with its
process, and what it does leaves the interpreter to training. When all have written, the processes come together once more, and the first one
adds what joins the parts and renames the folder. Whatever fails on one process fails on all, with the same words.

Megatron-Core's own background saving is not used: it forks processes that outlive a killed trainer, and has no answer where one of those dies
or a single process meets a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import distribute_main_replicas_with_precomputed_distribution
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from megatron_infimed import notes
from megatron_infimed.config import CheckpointConfig
from megatron_infimed.data.safe_files import HashedFile, sync
from megatron_infimed.errors import FORBIDDEN, FULL, MENDABLE, UserError
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import cpu
from megatron_infimed.parallel.groups import Ranks, gather
from megatron_infimed.train.checkpoint import Checkpoint, in_run, sha256, sharded_state

log = logging.getLogger(__name__)
_REMEDIES = {
    **dict.fromkeys(FULL, "free or add space, or lower checkpoint.keep"),
    **dict.fromkeys(FORBIDDEN, "make the folder writable"),
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
}


def save(run: Path, state: dict[str, Any], pieces: Sequence[InfiMed], optimizer: MegatronOptimizer | None, ranks: Ranks) -> Checkpoint:
    """One checkpoint by itself, as Saver.save writes it; nothing older is removed."""
    saver = Saver(run, ranks)
    saver.save(state, pieces, optimizer)
    return saver.finish()


class Saver:
    """Writes a run's checkpoints. All processes call each method together.

    Args:
        settings: whether in the background, and which checkpoints are kept. None: at once, and all.
        newest: the checkpoint that the run goes on from.
    """

    def __init__(self, run: Path, ranks: Ranks, settings: CheckpointConfig | None = None, newest: Checkpoint | None = None) -> None:
        self.newest = newest
        """The newest complete checkpoint."""
        self._run, self._ranks, self._settings = run, ranks, settings
        self._owner = f"{platform.node()} {os.getpid()} {time.time_ns()}\n"
        if ranks.rank == 0:
            self._claim()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._shares: Any = None
        self._pending: _Pending | None = None

    def save(self, state: dict[str, Any], pieces: Sequence[InfiMed], optimizer: MegatronOptimizer | None) -> None:
        """Writes checkpoints/step_N, N = state["step"], as everything stands now; in the background it returns before the files are there.

        Raises:
            UserError: the disk does not take it, or did not take the one before.
        """
        begun = time.perf_counter()
        if self._pending is not None:
            before = self.finish()
            log.info("waited %.1f s for %s: writing takes longer than checkpoint.every steps", time.perf_counter() - begun, before.path)
        path = self._run / "checkpoints" / f"step_{state['step']:08d}"
        with self._together(path):
            if self._ranks.rank == 0:
                self._refuse_if_taken_over()
                shutil.rmtree(_aside(path), ignore_errors=True)
                _aside(path).mkdir(parents=True)
        share, metadata, files = self._take(_aside(path), pieces, optimizer)
        files["state.json"] = json.dumps(state, indent=1).encode()
        written = self._thread.submit(share.write, files if self._ranks.rank == 0 else {})
        background = self._settings is not None and self._settings.background
        held = f", training stood for {time.perf_counter() - begun:.1f} s" if background else ""
        self._pending = _Pending(path, share, metadata, written, begun, held)
        if not background:
            self.finish()

    def poll(self) -> Checkpoint | None:
        """After each step: completes what is being saved in the background, once every process has written its share.

        Returns:
            The checkpoint, when it has just become complete.

        Raises:
            UserError: the disk did not take it.
        """
        if self._pending is None:
            return None
        done = torch.tensor(int(self._pending.written.done()), device=self._ranks.device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return self._complete(self._pending) if done.item() else None

    def finish(self) -> Checkpoint:
        """Waits until what is being saved is complete; the newest complete checkpoint. Raises like `poll`."""
        if self._pending is not None:
            self._complete(self._pending)
        assert self.newest is not None, "nothing was saved"
        return self.newest

    def _take(
        self, aside: Path, pieces: Sequence[InfiMed], optimizer: MegatronOptimizer | None
    ) -> tuple[_Share, Metadata | None, dict[str, bytes]]:
        """A copy of this process's share; on the first process also what describes the whole, and the small files."""
        for wrapped in getattr(optimizer, "model_chunks", ()):
            wrapped.start_param_sync(force_sync=True)  # under overlap, what others have updated would come in the next forward pass
        world: Any = dist.group.WORLD
        with cpu.cuda_means_cpu():
            mine: Any = sharded_state(pieces, optimizer, loading=False)
            mine, common = save_preprocess(mine, validate_access_integrity=self._shares is None)
            self._shares = self._shares or determine_main_replica_uniform_distribution(mine, world)
            distribute_main_replicas_with_precomputed_distribution(mine, world, self._shares)
            named, _, _ = _replace_state_dict_keys_with_sharded_keys(mine, keep_only_main_replica=True)
            share = _Share(aside)
            planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
            (_, metadata, _), *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(named, False), share, planner=planner)
        rest = io.BytesIO()
        torch.save(common, rest)
        backend = json.dumps(asdict(CheckpointingConfig("torch_dist", 1)))
        return share, metadata, {"common.pt": rest.getvalue(), "metadata.json": backend.encode()}

    def _complete(self, pending: _Pending) -> Checkpoint:
        written = None
        with self._together(pending.path):
            written = pending.written.result()
        parts = gather(written)
        with self._together(pending.path):
            if self._ranks.rank == 0:
                self._publish(pending, parts)
        self._pending, self.newest = None, Checkpoint(pending.path)
        level = logging.INFO if self._settings else logging.DEBUG  # who saves one checkpoint says so himself
        log.log(level, "saved %s in %.1f s%s", pending.path, time.perf_counter() - pending.begun, pending.held)
        return self.newest

    def _publish(self, pending: _Pending, parts: list[_Written]) -> None:
        path, aside = pending.path, _aside(pending.path)
        self._refuse_if_taken_over()
        assert pending.metadata is not None
        pending.share.finish(pending.metadata, [part.places for part in parts])
        hashes = {name: digest for part in parts for name, digest in part.hashes.items()} | {".metadata": sha256(aside / ".metadata")}
        with _whole(aside / "sha256.json") as out:
            out.write(json.dumps(hashes, indent=1, sort_keys=True).encode())
        sync(aside)
        if path.exists():
            shutil.rmtree(path)  # damaged, or training would not have come by here again
        aside.rename(path)
        sync(path.parent)
        notes.write("progress", path.name)
        if self._settings is not None:
            self._remove_old(path, self._settings.keep, self._settings.keep_every)

    def _claim(self) -> None:
        """A process on a node that the cluster gave up may live on while the run already goes on elsewhere: the last to start has it."""
        path, aside = self._run / "owner", self._run / f"owner.{platform.node()}.{os.getpid()}.tmp"
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            aside.write_text(self._owner)
            aside.replace(path)
        except OSError:  # the first save will say what is wrong with the disk
            with contextlib.suppress(OSError):
                path.unlink()

    def _owner_now(self) -> str:
        try:
            return (self._run / "owner").read_text()
        except OSError:
            return self._owner

    def _owns(self) -> bool:
        return self._owner_now() == self._owner

    def _refuse_if_taken_over(self) -> None:
        if (owner := self._owner_now()) != self._owner:
            host, pid, _ = owner.split()
            raise UserError(f"{self._run} was taken over by a later start (process {pid} on {host}): this one ends and saves nothing")

    def _remove_old(self, newest: Path, keep: int, keep_every: int | None) -> None:
        others = [c for c in in_run(self._run) if c.path != newest]
        later = [c for c in others if c.path.name > newest.name]  # damaged, passed over on resumption: they must not push good ones out
        before = [c for c in others if c.path.name < newest.name]
        old = [c for c in before[: max(0, len(before) - (keep - 1))] if not keep_every or c.step % keep_every]
        for c in (*later, *old):
            shutil.rmtree(c.path.rename(c.path.with_name(c.path.name + ".old.tmp")))  # a kill must not leave half of it under its name

    @contextlib.contextmanager
    def _together(self, path: Path) -> Iterator[None]:
        """What fails on one process fails on all, and leaves no half checkpoint. What the user can mend is a UserError; what may pass by itself,
        or with another node (an I/O error, a lost mount), a RuntimeError."""
        trouble = None
        try:
            yield
        except Exception as e:
            trouble = self._said(path, e)
        if told := [said for said in gather(trouble) if said]:
            self._pending = None
            if self._ranks.rank == 0 and self._owns():
                shutil.rmtree(_aside(path), ignore_errors=True)
            words, final = max(told, key=lambda said: said[1])
            raise UserError(words) if final else RuntimeError(words)

    def _said(self, path: Path, error: BaseException) -> tuple[str, bool]:
        """In words, and whether the user has to do something about it."""
        if isinstance(error, UserError):
            return str(error), True
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # torch raises errors of its own over it
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            log.error("%s was not saved", path, exc_info=error)
            return f"{path}: process {self._ranks.rank} did not save it: {type(error).__name__}: {error}", False
        return (
            f"{path}: process {self._ranks.rank} cannot write it ({cause.strerror}{_free(path)}): "
            f"{_REMEDIES.get(cause.errno or 0, 'see to the disk')}, and start again; "
            f"{self.newest.path.name if self.newest else 'no checkpoint'} is the newest complete one"
        ), cause.errno in MENDABLE


class _Share(FileSystemWriterAsync):
    """What one process writes: a copy of its tensors. Megatron-Core's writer, which stops where that would start processes of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder, self.name, self.items = folder, "", []

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Called by Megatron-Core at the end of its planning."""
        self.name = f"{plan.storage_data.prefix}0.distcp"
        self.items = [(item, _copy(planner.resolve_data(item))) for item in plan.items]

    def write(self, files: dict[str, bytes]) -> _Written:
        """Small files by name, and the tensors. Touches nothing that training touches."""
        hashes, places = {}, []
        for name, content in files.items():
            with _whole(self.folder / name) as out:
                out.write(content)
            hashes[name] = out.sha256
        if self.items:
            with _whole(self.folder / self.name) as out:
                places = [
                    _write_item(self.transforms, out, data, item, self.name, SerializationFormat.TORCH_SAVE)  # type: ignore[arg-type]
                    for item, data in self.items
                ]
            hashes[self.name] = out.sha256
        return _Written(hashes, places)


@dataclass(frozen=True)
class _Written:
    hashes: dict[str, str]
    """SHA-256 by file name."""
    places: list[WriteResult]
    """Where in its file each tensor lies."""


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    path: Path
    share: _Share
    metadata: Metadata | None
    written: Future[_Written]
    begun: float
    held: str


class _Stream(HashedFile):
    """As torch.save wants a file."""

    sha256 = ""

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[_Stream]:
    out = _Stream(path)
    try:
        yield out
        out.sha256 = out.close()["sha256"]
        out.publish()
    finally:
        out.discard()


def _copy(data: torch.Tensor | io.BytesIO) -> torch.Tensor | io.BytesIO:
    """Host memory of its own: the weights go on changing, and a slice would be saved with all that it is a slice of."""
    return data.detach().to("cpu", copy=True) if isinstance(data, torch.Tensor) else data


def _free(path: Path) -> str:
    """How much space there is, where that can be told."""
    try:
        folder = next(p for p in path.parents if p.exists())
        return f", {shutil.disk_usage(folder).free / 2**20:,.1f} MiB free"
    except OSError:
        return ""


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
