"""Files that are whole or not there: written aside, hashed on the way, fsynced and renamed; one writer a prefix; a full disk told clearly."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_infimed.data.shards import shard_file
from megatron_infimed.errors import UserError

_BUFFER, _DIRECT = 1 << 20, 1 << 14


class HashedFile:
    """NAME.tmp, hashed (unless told not to) while it is written, renamed by `publish`."""

    def __init__(self, path: Path, hashed: bool = True) -> None:
        self.path, self.tmp = path, Path(f"{path}.tmp")
        self.bytes, self._pending, self._digest = 0, bytearray(), hashlib.sha256() if hashed else None
        self._out = os.open(self.tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | bytearray) -> None:
        self.bytes += len(data)
        if len(data) >= _DIRECT:  # an image: not worth a copy
            self._flush()
            self._put(data)
            return
        self._pending += data
        if len(self._pending) >= _BUFFER:
            self._flush()

    def copy(self, handle: int, start: int, count: int) -> None:
        """Appends bytes of another open file, inside the kernel where it can (sharing the blocks on XFS and Btrfs); unhashed files only."""
        self._flush()
        self.bytes += count
        while count:
            try:
                done = os.copy_file_range(handle, self._out, min(count, 1 << 30), start)
            except OSError as e:
                if e.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                block = os.pread(handle, min(count, _BUFFER), start)
                self._put(block)
                done = len(block)
            if not done:
                raise OSError(errno.EIO, "the file ends too early")
            start, count = start + done, count - done

    def close(self) -> dict[str, Any]:
        self._flush()
        os.fsync(self._out)
        os.close(self._out)
        self._out = -1
        return {"bytes": self.bytes, **({"sha256": self._digest.hexdigest()} if self._digest else {})}

    def publish(self) -> None:
        os.replace(self.tmp, self.path)

    def discard(self) -> None:
        if self._out >= 0:
            os.close(self._out)
            self._out = -1
        self.tmp.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._pending:
            self._put(self._pending)
            self._pending = bytearray()

    def _put(self, data: bytes | bytearray) -> None:
        if self._digest:
            self._digest.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._out, rest) :]


def write_whole(path: Path, text: str) -> None:
    """A small text file is there whole or not at all, also if several processes write it; not fsynced."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.{time.time_ns()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


@contextlib.contextmanager
def lock(prefix: Path, wait: bool = False) -> Iterator[None]:
    """One writer a prefix: PREFIX.lock, held by flock, so that it ends with its process.

    Args:
        wait: for another one that holds it, as long as it takes. Otherwise that is a UserError.
    """
    path = shard_file(prefix, "lock")
    handle = None
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        while handle is None:
            try:
                handle = _locked(path)
            except BlockingIOError:
                if not wait:
                    raise UserError(f"{prefix}: another process is writing this shard; wait for it or choose another output") from None
                time.sleep(0.2)
    except OSError as e:
        raise UserError(f"{path}: cannot write there ({e.strerror}); choose another output") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path) -> int | None:
    """The open, locked file; None where its last owner removed it in between."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):  # a file system without locks: we go on without
            return handle
        os.close(handle)
        if e.errno == errno.ESTALE:
            return None
        raise
    try:
        if os.fstat(handle).st_ino == path.stat().st_ino:
            return handle
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ESTALE):
            raise
    os.close(handle)
    return None


def sync(path: Path) -> None:
    """A file's content, or the names in a folder, are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_trouble(prefix: Path) -> Iterator[None]:
    """A full disk, a quota or a file size limit as a UserError with the numbers."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(prefix.parent).free
        raise UserError(
            f"{prefix}: {e.strerror} ({free / 2**20:,.1f} MiB free in {prefix.parent}; pieces and the merged shard need twice the shard's size); "
            "free or add space and run the same command again (finished pieces are kept), or choose another output"
        ) from None
