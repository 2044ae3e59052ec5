"""What a preprocessing run is to do, as one JSON file that every task, on whatever machine, reads: PREFIX.work/job.json.

The rows of each input are cut into pieces of `piece_rows`, counted from the input's start; piece (f, k) is rows [k*R, (k+1)*R) of input f
and a small finished shard of its own in PREFIX.work/pieces, published by one rename of its folder. A piece is a pure function of its rows, so
who makes it, when and how often does not matter. `fingerprint` is everything a piece depends on; a piece of another fingerprint is not one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_infimed.data.chat import TEMPLATE_FINGERPRINT, Tokenizer, load_tokenizer
from megatron_infimed.data.safe_files import sync_folder
from megatron_infimed.data.shard_writer import about
from megatron_infimed.data.shards import VERSION, check_sizes, hash_file, read_manifest, shard_file
from megatron_infimed.errors import UserError
from megatron_infimed.intake.readers import source_of


@dataclass(frozen=True)
class Input:
    path: str
    source: str
    bytes: int
    sha256: str
    """Of the file; of a folder, over the names and hashes of its files."""

    @property
    def name(self) -> str:
        return Path(self.path).name


@dataclass(frozen=True)
class Job:
    output: str
    tokenizer_path: str
    inputs: tuple[Input, ...]
    map: dict[str, Any]
    """The field map, whole."""
    deid: dict[str, Any]
    """The de-identification policy."""
    images: tuple[str, ...] = ()
    """Folders and archives of images, searched in order; none: each input's own folder."""
    max_text_tokens: int | None = None
    piece_rows: int = 8192
    threads: int = 2
    """That read and check images, in each task."""
    extra: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the tokenizer and the chat template."""

    @property
    def work(self) -> Path:
        return Path(f"{self.output}.work")

    @property
    def settings(self) -> dict[str, Any]:
        """For the manifest: what decided the content, without where things lie on this machine."""
        names = [Path(p).name + (f" ({Path(p).stat().st_size} bytes)" if Path(p).is_file() else "") for p in self.images]
        return {"map": self.map, "deid": self.deid, "max_text_tokens": self.max_text_tokens, "images": names}

    @property
    def input_entries(self) -> list[dict[str, Any]]:
        return [{"name": i.name, "bytes": i.bytes, "sha256": i.sha256, "source": i.source} for i in self.inputs]

    @cached_property
    def fingerprint(self) -> str:
        parts = [VERSION, self.settings, self.input_entries, self.images, self.piece_rows, self.extra]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """UserError where it is not the one the job was made with."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        if self.extra and tokenizer_prints(tokenizer) != self.extra:
            raise UserError(f"{self.tokenizer_path}: changed since the job was started (or other code runs here); start the job again")
        return tokenizer

    def about(self, tokenizer: Tokenizer) -> dict[str, Any]:
        return about(tokenizer, self.input_entries, self.settings)

    def piece(self, f: int, k: int) -> Path:
        """Folder of a piece; the shard in it has the prefix `piece`."""
        return self.work / "pieces" / f"f{f:06d}-k{k:07d}"

    def finished(self, f: int, k: int) -> bool:
        """Whether the piece is there, of this job, and whole."""
        prefix = self.piece(f, k) / "piece"
        if not shard_file(prefix, "json").exists():
            return False
        try:
            manifest = read_manifest(prefix)
            check_sizes(prefix, manifest)
        except UserError:
            return False
        return manifest["settings"].get("job") == self.fingerprint

    def rows(self, f: int) -> int | None:
        """Rows of input f, once a task has read it to its end."""
        try:
            return int((self.work / "rows" / f"f{f:06d}").read_text())
        except FileNotFoundError:
            return None

    def agree_on_rows(self, f: int, rows: int) -> None:
        """Notes the rows of input f; UserError where another task saw another number."""
        path = self.work / "rows" / f"f{f:06d}"
        aside = path.with_name(f"{path.name}.{os.getpid()}.{os.uname().nodename}.tmp")
        aside.write_text(str(rows))
        try:
            os.link(aside, path)  # unlike a rename, it does not replace
        except FileExistsError:
            if (known := self.rows(f)) != rows:
                raise UserError(
                    f"{self.inputs[f].path}: {rows} rows now, {known} rows before: it changed while being read; start again"
                ) from None
        finally:
            aside.unlink(missing_ok=True)

    def prepare(self) -> None:
        """Makes the work folder; what an earlier job of another fingerprint left there is removed."""
        path = self.work / "job.json"
        if path.exists() and Job.load(self.work).fingerprint != self.fingerprint:
            shutil.rmtree(self.work)
        for name in ("pieces", "rows", "log"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        for left in (*self.work.glob("pieces/*.tmp"), *self.work.glob("rows/*.tmp")):  # of a killed task
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for name in ("running", "errors"):
            shutil.rmtree(self.work / name, ignore_errors=True)
            (self.work / name).mkdir()
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(self), indent=1))
        os.replace(aside, path)
        sync_folder(self.work)

    @staticmethod
    def load(work: str | Path) -> Job:
        """UserError where no job is there."""
        try:
            about = json.loads((Path(work) / "job.json").read_text())
            inputs = tuple(Input(**i) for i in about.pop("inputs"))
            return Job(**{**about, "inputs": inputs, "images": tuple(about["images"])})
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"{work}: no readable job there ({type(e).__name__}); delete this folder and start again") from None


def tokenizer_prints(tokenizer: Tokenizer) -> dict[str, str]:
    return {"tokenizer": tokenizer.fingerprint, "chat_template": TEMPLATE_FINGERPRINT}


def describe_inputs(paths: Sequence[Path], source: str | None, *, hashed: bool = True) -> tuple[Input, ...]:
    """Sizes and hashes, taken in threads; a folder counts as one input."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        contents = list(pool.map(_content if hashed else lambda p: (0, ""), paths))
    return tuple(Input(str(p.absolute()), source or source_of(p), *c) for p, c in zip(paths, contents, strict=True))


def _content(path: Path) -> tuple[int, str]:
    try:
        if not path.is_dir():
            return path.stat().st_size, hash_file(path)
        files = sorted(p for p in path.rglob("*") if p.is_file())
        whole = hashlib.sha256()
        for file in files:
            whole.update(f"{file.relative_to(path)}\0{hash_file(file)}\n".encode("utf-8", "surrogateescape"))
        return sum(p.stat().st_size for p in files), whole.hexdigest()
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror})") from None
