"""What a preprocessing run is to do, as one JSON file that every task, on whatever machine, reads: PREFIX.work/job.json.

The rows of each input are cut into pieces of `piece_rows`, counted from the input's start; piece (f, k) is rows [k*R, (k+1)*R) of input f
and a small finished shard of its own in PREFIX.work/pieces, published by one rename of its folder. A piece is a pure function of its rows, so
who makes it, when and how often does not matter. `fingerprint` is everything a piece depends on; what bears another one (a piece, a count
of rows, the whole folder) is not of this job. The folder is removed by a rename first, so that a kill leaves all of it or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_infimed.data.chat import TEMPLATE_FINGERPRINT, Tokenizer, load_tokenizer
from megatron_infimed.data.safe_files import sync
from megatron_infimed.data.shard_writer import about
from megatron_infimed.data.shards import VERSION, check_sizes, hash_file, read_manifest, shard_file
from megatron_infimed.errors import UserError
from megatron_infimed.intake.readers import source_of

_FOLDERS = ("pieces", "rows", "log", "running", "errors")
_NAMES = {*_FOLDERS, "spool", "job.json", "job.tmp", "slurm.json", "rejects.jsonl", "rejects.jsonl.tmp"}
"""All that a work folder may hold."""


@dataclass(frozen=True)
class Input:
    path: str
    source: str
    bytes: int
    sha256: str
    """Of the file; of a folder, over the names and hashes of its files."""
    mtime_ns: int = 0
    """A file that has still this size and time need not be hashed again; a folder's is a number made of all its files' names, sizes and times."""

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
    prints: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the tokenizer and the chat template."""
    forced: str = ""
    """Made up anew for a forced run, which must not use what other runs made."""

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
        parts = [VERSION, self.settings, self.input_entries, self.images, self.piece_rows, self.prints, self.forced]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """UserError where it is not the one the job was made with."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        if self.prints and tokenizer_prints(tokenizer) != self.prints:
            raise UserError(f"{self.tokenizer_path}: changed since the job was started (or other code runs here); start the job again")
        return tokenizer

    def about(self) -> dict[str, Any]:
        """The part of the manifest that says what the shard is made of and how."""
        return about(self.tokenizer, self.input_entries, self.settings)

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
            fingerprint, rows = (self.work / "rows" / f"f{f:06d}").read_text().split()
            return int(rows) if fingerprint == self.fingerprint else None
        except (FileNotFoundError, ValueError):
            return None

    def agree_on_rows(self, f: int, rows: int) -> None:
        """Notes the rows of input f; UserError where another task saw another number."""
        path = self.work / "rows" / f"f{f:06d}"
        aside = path.with_name(f"{path.name}.{os.getpid()}.{os.uname().nodename}.tmp")
        aside.write_text(f"{self.fingerprint} {rows}")
        try:
            os.link(aside, path)  # unlike a rename, it does not replace
        except FileExistsError:
            if (known := self.rows(f)) is None:
                os.replace(aside, path)  # of another job
            elif known != rows:
                raise UserError(
                    f"{self.inputs[f].path}: {rows} rows now, {known} rows before: it changed while being read; start again"
                ) from None
        finally:
            aside.unlink(missing_ok=True)

    def taken_up(self, force: bool) -> Job:
        """The unfinished job of the work folder where it is this one, else a new one; a forced run goes on from a forced one only."""
        left = self.left_over()
        if left and left.fingerprint == replace(self, forced=left.forced).fingerprint and (left.forced or not force):
            return replace(self, forced=left.forced)
        return replace(self, forced=uuid.uuid4().hex if force else "")

    def left_over(self) -> Job | None:
        """The job that the work folder is of, if one can be told."""
        try:
            return Job.load(self.work)
        except UserError:
            return None

    def discard(self) -> None:
        """Removes the work folder; UserError where it is not one."""
        if self.work.is_symlink() or self.work.exists():
            self._refuse_foreign()
            aside = Path(f"{self.work}.{os.getpid()}.old")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                os.rename(self.work, aside)
            except OSError as e:
                raise UserError(f"{self.work}: cannot be removed ({e.strerror}); remove it, or choose another output") from None
        for path in self.work.parent.iterdir():
            if re.fullmatch(re.escape(self.work.name) + r"\.\d+\.old", path.name):  # also those of killed runs
                shutil.rmtree(path, ignore_errors=True)

    def _refuse_foreign(self) -> None:
        if self.work.is_symlink() or not self.work.is_dir():
            raise UserError(
                f"{self.work}: the pieces go into a folder of this name, but it is a file or a link; move it, or choose another output"
            )
        if self.left_over() is None:
            foreign = sorted(p.name for p in self.work.iterdir() if p.name not in _NAMES and not p.name.startswith(".nfs"))
            if foreign:
                raise UserError(
                    f"{self.work}: the pieces go into a folder of this name, but it holds other things ({', '.join(foreign[:3])}); "
                    "move it, or choose another output"
                )

    def prepare(self) -> None:
        """Makes the work folder; what is not of this very job is removed first."""
        path, left = self.work / "job.json", self.left_over()
        if left is None or left.fingerprint != self.fingerprint:
            self.discard()
        for name in ("pieces", "rows", "log"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        for part in (*self.work.glob("pieces/*.tmp"), *self.work.glob("rows/*.tmp")):  # of a killed task
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        for name in ("running", "errors"):
            shutil.rmtree(self.work / name, ignore_errors=True)
            (self.work / name).mkdir()
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(self), indent=1))
        os.replace(aside, path)
        sync(self.work)

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


def describe_inputs(paths: Sequence[Path], source: str | None, known: Sequence[Input] = (), *, hashed: bool = True) -> tuple[Input, ...]:
    """Sizes and hashes, taken in threads; a folder counts as one input. `known`: inputs that were hashed before."""
    hashes = {(i.path, i.bytes, i.mtime_ns): i.sha256 for i in known}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        contents = list(pool.map((lambda p: _content(p, hashes)) if hashed else (lambda p: (0, "", 0)), paths))
    return tuple(Input(str(p.absolute()), source or source_of(p), *c) for p, c in zip(paths, contents, strict=True))


def _content(path: Path, known: Mapping[tuple[str, int, int], str]) -> tuple[int, str, int]:
    """(bytes, sha256, mtime_ns) of an Input."""
    try:
        if not path.is_dir():
            stat = path.stat()
            key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns)
            return stat.st_size, known.get(key) or hash_file(path), stat.st_mtime_ns
        files = sorted(p for p in path.rglob("*") if p.is_file())
        about = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        size, listing = sum(entry[1] for entry in about), int(hashlib.sha256(repr(about).encode()).hexdigest()[:15], 16)
        if before := known.get((str(path.absolute()), size, listing)):
            return size, before, listing
        whole = hashlib.sha256()
        for file in files:
            whole.update(f"{file.relative_to(path)}\0{hash_file(file)}\n".encode("utf-8", "surrogateescape"))
        return size, whole.hexdigest(), listing
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror})") from None
