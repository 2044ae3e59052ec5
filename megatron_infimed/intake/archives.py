"""Files that hold files, read with distrust: byte streams that may be compressed, and the members of a tar.

`open_bytes` decompresses by suffix through Arrow, which checks the checksums of gzip and zstd and takes a stream that breaks off for an error.
`Tar` walks the headers forwards. The standard library ends quietly at the first bad header, goes round in circles on a negative size and reads
as much as a header asks for; here each of these is an error, and the archive must end as one does, with zeros and nothing behind them.
Nothing is ever unpacked under a name from an archive.
"""

from __future__ import annotations

import io
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

COMPRESSION = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
FILE_LIMIT = 256 << 20
"""Bytes of one image or other member."""
UNREADABLE = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
"""What a damaged file raises, here and in the standard library."""
_CHUNK = 1 << 20


def open_bytes(path: Path) -> BinaryIO:
    """The (decompressed) content; OSError where the compressed stream is damaged or breaks off."""
    kind = COMPRESSION.get(path.suffix.lower())
    if kind is None:
        return path.open("rb")
    import pyarrow

    if not path.stat().st_size:
        raise OSError(f"empty, not even a {kind} header")
    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression=kind), _CHUNK))  # pyright: ignore[reportArgumentType]


def safe_name(name: str) -> str | None:
    """The name in its shortest form; None if it is absolute, leaves the folder, or names none of its files."""
    inside = posixpath.normpath(name)
    return None if inside.startswith(("/", "../")) or inside in ("..", ".") or "\0" in inside else inside


def is_plain(member: tarfile.TarInfo | zipfile.ZipInfo) -> bool:
    """Whether it is a file with content of its own: no link, device, pipe or sparse file."""
    if isinstance(member, tarfile.TarInfo):
        return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and not member.issparse()
    kind = stat.S_IFMT(member.external_attr >> 16)
    return kind in (0, stat.S_IFREG)


class _Strict(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise
        except (tarfile.HeaderError, ValueError, RecursionError) as e:
            raise tarfile.ReadError(f"{e} at byte {tarfile_.offset}") from None


class _Forward:
    """A stream as TarFile wants it, that only goes forwards and reads no more at a time than a member may have."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._at = stream, 0

    def tell(self) -> int:
        return self._at

    def seek(self, to: int) -> None:
        if to < self._at:
            raise tarfile.ReadError(f"a header points back to byte {to}")
        if self._stream.seekable():
            self._stream.seek(to)
        else:
            left = to - self._at
            while left and (chunk := self._stream.read(min(left, _CHUNK))):
                left -= len(chunk)
        self._at = to

    def read(self, size: int) -> bytes:
        if not 0 <= size <= FILE_LIMIT + tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"a header asks for {size} bytes at byte {self._at}")
        data = self._stream.read(size)
        self._at += len(data)
        return data


class Tar:
    """The members of a tar stream in order; iterating raises TarError or OSError where the archive is damaged."""

    def __init__(self, stream: BinaryIO) -> None:
        self._file = _Forward(stream)

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        tar = tarfile.TarFile(fileobj=self._file, tarinfo=_Strict, errors="surrogateescape")  # pyright: ignore[reportArgumentType]
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= member.offset:  # pyright: ignore[reportAttributeAccessIssue]
                raise tarfile.ReadError(f"a member of {member.size} bytes at byte {member.offset}")
            yield member
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        while tail := self._file.read(_CHUNK):
            if tail.strip(b"\0"):
                raise tarfile.ReadError(f"data after the end of the archive, before byte {self._file.tell()}")

    def read(self, member: tarfile.TarInfo) -> bytes:
        """Content of the member that was yielded last; its size must be within FILE_LIMIT."""
        self._file.seek(member.offset_data)
        data = self._file.read(member.size)
        if len(data) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return data
