"""What a rank finds out about its node by looking, cheapest first: versions, its GPU, the run directory, the data, the weights to begin with.

Nothing is judged here: judge.py compares the facts of all ranks. What cannot be used is told in the words of the error that training would
die of. Before each look the rank says what it is about to do, because a broken disk or GPU does not fail, it hangs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from megatron_infimed import __version__
from megatron_infimed.config import Recipe
from megatron_infimed.errors import UserError
from megatron_infimed.train import checkpoint
from megatron_infimed.train.trainer import open_data

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy")
"""That must be the same everywhere, or the ranks compute different things or wait for each other in vain."""


@dataclass(frozen=True)
class Gpu:
    """The GPU of one rank; all zero on a machine without."""

    visible: int = 0
    """GPUs that this process could use."""
    name: str = ""
    free: float = 1.0
    """Share of its memory, before this process has taken any."""
    wrong: str = ""
    """Why it cannot be used."""


@dataclass(frozen=True)
class Facts:
    """What one rank has seen."""

    rank: int
    local_rank: int
    node: str
    versions: dict[str, str]
    gpu: Gpu = Gpu()
    trouble: dict[str, str] = field(default_factory=dict)
    """Of data, init_from and output: why they cannot be used from here."""
    left: str = ""
    """Name of the file that was left in the run directory for the other nodes to see."""
    sees_output: bool = True
    """The file that rank 0 left in the run directory. Asked later."""
    file_clock: float = 0.0
    """Seconds that the run directory's file system is ahead of this node's clock (a file server has a clock of its own)."""
    disk_free: int = 0
    """Bytes, where the run directory is."""
    checkpoints: int = 0
    """That the run directory holds already."""

    @classmethod
    def read(cls, note: dict[str, Any]) -> Facts:
        return cls(**{**note, "gpu": Gpu(**note["gpu"])})


def gather(recipe: Recipe, rank: int, local_rank: int, node: str, at: Callable[[str], None]) -> Facts:
    """Looks around; `at` is told what comes next."""
    trouble: dict[str, str] = {}

    def attempt(what: str, words: str, look: Callable[..., Any], *args: Any) -> Any:
        at(words)
        try:
            return look(*args)
        except (UserError, OSError) as e:
            trouble[what] = str(e)
        except Exception as e:  # a damaged file makes libraries raise what they like
            trouble[what] = f"{words}: {type(e).__name__}: {' '.join(str(e).split())[:200]}"

    at("reading the versions of what is installed")
    versions = {**_versions(), "code": code_version(Path(__file__).parents[1])}
    at(f"computing on GPU {local_rank}")
    gpu = _gpu(local_rank)
    run, name = Path(recipe.output), f".preflight-{secrets.token_hex(4)}"
    ahead = attempt("output", f"writing to {run}", _write, run / name, rank == 0)
    free = attempt("output", f"reading {run}", lambda: shutil.disk_usage(run).free)
    held = attempt("output", f"reading {run}", checkpoint.in_run, run)
    attempt("data", "reading the shards and the tokenizer", _read_data, recipe)
    if recipe.init_from and not held:  # a run that has checkpoints of its own does without
        attempt("init_from", f"reading {recipe.init_from}", _read_checkpoint, recipe.init_from)
    return Facts(
        rank, local_rank, node, versions, gpu, trouble,
        left=name if rank == 0 and "output" not in trouble else "",
        file_clock=ahead or 0.0,
        disk_free=free or 0,
        checkpoints=len(held or ()),
    )  # fmt: skip


def code_version(package: Path) -> str:
    """Version and hash of our own source as it lies there."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return f"{__version__} {digest.hexdigest()[:12]}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, nccl.version()))
    if driver := _driver():
        found["NVIDIA driver"] = driver
    return found


def _driver() -> str:
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _gpu(local_rank: int) -> Gpu:
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        return Gpu(wrong="torch cannot use it, although its driver is loaded" if torch.version.cuda and _driver() and not hidden else "")
    visible = torch.cuda.device_count()
    if local_rank >= visible:
        return Gpu(visible)
    name, free = "", 1.0
    try:
        name = torch.cuda.get_device_name(local_rank)
        left, whole = torch.cuda.mem_get_info(local_rank)
        free = left / whole
        _multiply(torch.device("cuda", local_rank))
    except RuntimeError as e:
        return Gpu(visible, name, free, str(e).strip().splitlines()[0])
    return Gpu(visible, name, free)


def _multiply(device: torch.device) -> None:
    """A product whose every entry is known: sums of 256 times -1, 0 or 1, which bfloat16 holds without rounding in whatever order."""
    a, b = (torch.randint(-1, 2, (1024, 256), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    wanted = a.float() @ b.float().T
    for kind in (torch.bfloat16, torch.float32):
        found = (a.to(device, kind) @ b.to(device, kind).T).float().cpu()
        if wrong := int((found != wanted).sum()):
            raise RuntimeError(f"it computes wrongly: {wrong} of {wanted.numel()} entries of a product in {kind}")


def _write(path: Path, leave: bool) -> float:
    """Makes a small file; seconds that the file system's clock is ahead of ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as file:
            now = time.time()
            file.write(b"preflight\n")
            file.flush()
            os.fsync(file.fileno())
        return path.stat().st_mtime - now
    finally:
        if not leave:
            path.unlink(missing_ok=True)


def _read_data(recipe: Recipe) -> None:
    """What training opens, and the first and last document and image."""
    for shard in open_data(recipe)[1]:
        for i in {0, len(shard) - 1} if len(shard) else ():
            shard.document(i)
            shard.record_id(i)
        for i in {0, shard.images - 1} if shard.images else ():
            shard.image(i)


def _read_checkpoint(path: str) -> None:
    found = checkpoint.find(path)
    for name in ("state.json", *json.loads((found.path / "sha256.json").read_bytes())):
        with (found.path / name).open("rb") as file:
            file.read(4096)
