"""Image references: found by name in folders and archives, read at random from any thread, checked to the last pixel.

A folder, a zip and a plain tar are read in place; of an archive one index (name -> place) is built once a process. A compressed tar has no
random access, so `open_images` decompresses it once into the job's spool folder, aside and then renamed. A name never leads out of its
folder or archive, whatever it or the archive says: not by `..`, not as an absolute path, not through a link. Every read has a size limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import threading
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import simplejpeg
from PIL import Image

from megatron_infimed.errors import UserError
from megatron_infimed.intake.archives import FILE_LIMIT, UNREADABLE, Tar, is_plain, open_bytes, safe_name
from megatron_infimed.intake.kept import Kept
from megatron_infimed.intake.records import BadImage, ImageRef, Stored, quote

if TYPE_CHECKING:
    from megatron_infimed.intake.deid import Gate

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst")
SCAN_LIMIT = 2 << 30
"""Bytes of a DICOM or NIfTI file of many images."""
_MOST_EXPANSION = 250
"""A compressed tar of images that grows by more is a decompression bomb."""
_CHUNK = 1 << 20
_opening = threading.Lock()


class ImageStore:
    """Folders and archives that image names are looked up in, in this order."""

    def __init__(self, roots: Mapping[str, _Root]) -> None:
        self._roots = roots

    def find(self, name: str) -> Stored:
        """Where the image lies; raises BadImage."""
        inside = safe_name(name)
        if inside is None and "\0" not in name:
            raise BadImage("image path leaves the folder", quote(name))
        for path, root in self._roots.items():
            if inside is not None and root.has(inside):
                return Stored(path, inside)
        raise BadImage("missing image file", f"{quote(name)} in {', '.join(Path(root).name for root in self._roots)}")


def open_images(paths: Sequence[str | Path], spool: Path | None = None) -> ImageStore:
    """A store over folders and archives (zip, tar, tar.gz, tgz, tar.zst).

    Args:
        spool: folder for the plain copies of compressed tars; the job removes it at the end.

    Raises:
        UserError: not there, not an archive, damaged, or no room for the plain copy.
    """
    roots: dict[str, _Root] = {}
    for path in map(Path, paths):
        suffix = next((s for s in ARCHIVES if path.name.lower().endswith(s)), None)
        if not path.is_dir() and (suffix is None or not path.is_file()):
            wanted = "image archive" if suffix else "image folder"
            raise UserError(f"{path}: no such {wanted}; images lie in a folder or in {', '.join(ARCHIVES)}")
        compressed = not path.is_dir() and suffix not in (".zip", ".tar")
        try:
            roots[str(path)] = _open(str(path), _unpack(path, spool) if compressed else path)
        except UNREADABLE as e:
            raise UserError(f"{path}: the archive is damaged: {e}; get it again") from None
    return ImageStore(roots)


def read(ref: ImageRef, limit: int = FILE_LIMIT) -> bytes:
    """The encoded file, whole. Thread-safe; a compressed tar must have been opened by open_images in this process. Raises BadImage."""
    if isinstance(ref, bytes):
        data = ref
    else:
        try:
            known = _opened.get(ref.root)
            root = known[1] if known else _open(ref.root, Path(ref.root))
            data = root.read(ref.name, limit)
        except (*UNREADABLE, NotImplementedError, RuntimeError, ValueError) as e:  # zipfile's words for an encrypted or odd member
            words = getattr(e, "strerror", None) or re.sub(r"""['"].*['"]""", "[name]", str(e))
            raise BadImage("unreadable image file", words[:200]) from None
    if len(data) > limit:
        raise BadImage("image file too large", f"the limit is {limit} bytes")
    return data


def load(ref: ImageRef, source: str, gate: Gate | None = None) -> bytes:
    """The bytes to store: a DICOM frame or NIfTI slice as PNG, any other file as it is, decoded once to be sure. Raises BadImage."""
    from megatron_infimed.intake import dicom, nifti

    fragment = "" if isinstance(ref, bytes) else ref.fragment
    data = read_scan(ref) if isinstance(ref, Stored) and ref.fragment else read(ref)
    if dicom.is_dicom(data):
        data = dicom.to_png(data, int(fragment) if fragment else None, source, gate)
    elif nifti.is_nifti(data):
        data = nifti.to_png(data, fragment)
    if problem := check_image(data):
        raise BadImage(*problem)
    return data


_scans: Kept[bytes] = Kept(2)


def read_scan(ref: Stored) -> bytes:
    """A file of many images, which is asked for once for each of them: read once, and the same object while it does not change."""
    with contextlib.suppress(OSError):
        about = os.stat(Path(ref.root) / ref.name if os.path.isdir(ref.root) else ref.root)
        key = ref.root, ref.name, about.st_ino, about.st_size, about.st_mtime_ns
        return _scans.get(key, lambda: read(ref, SCAN_LIMIT))
    return read(ref, SCAN_LIMIT)


def check_image(data: bytes) -> tuple[str, str] | None:
    """None if the file decodes to the last pixel, else (reason, detail)."""
    limit = Image.MAX_IMAGE_PIXELS or sys.maxsize
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limit:
                return "image too large", f"{width} x {height} pixels, the limit is {limit}"
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                try:
                    simplejpeg.decode_jpeg(data)
                    return None
                except ValueError:
                    pass  # Pillow has the last word
            image.load()
    except Image.DecompressionBombError as e:
        return "image too large", str(e)[:200]
    except Exception as e:  # decoders raise all sorts of things on damaged files
        return "corrupt image", re.sub(r" ?<_io\.[^>]*>", "", f"{len(data)} bytes: {type(e).__name__}: {e}")[:200]
    return None


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path, self._real = path, os.path.realpath(path)

    def has(self, name: str) -> bool:
        path = self._path / name
        try:
            if not path.is_file():
                return False
        except (OSError, ValueError) as e:
            raise BadImage("unusable image path", f"{quote(name)}: {getattr(e, 'strerror', None) or type(e).__name__}") from None
        if os.path.commonpath([os.path.realpath(path), self._real]) != self._real:
            raise BadImage("image path leaves the folder", f"{quote(name)} is a link out of {self._path}")
        return True

    def read(self, name: str, limit: int) -> bytes:
        with (self._path / name).open("rb") as file:
            return file.read(limit + 1)


class _Archive:
    """Name -> place in the file; None for what must not be read under its name."""

    def __init__(self) -> None:
        self._places: dict[str, Any] = {}
        self._unusable: dict[str, str] = {}

    def _add(self, member: tarfile.TarInfo | zipfile.ZipInfo, name: str, size: int, place: Any) -> None:
        inside = safe_name(name)
        if inside is None:
            return  # nobody can ask for it
        if inside in self._places:
            self._unusable[inside] = "two archive members of one name"
        elif not is_plain(member):
            self._unusable[inside] = "archive member is not a plain file"
        elif size > FILE_LIMIT:
            self._unusable[inside] = "image file too large"
        self._places[inside] = place

    def has(self, name: str) -> bool:
        if name in self._unusable:
            raise BadImage(self._unusable[name], quote(name))
        return name in self._places


class _Unmoved(io.RawIOBase):
    """A file whose position is ours, not the operating system's, so that forked processes do not move each other's."""

    def __init__(self, path: Path) -> None:
        self._file, self._at = path.open("rb"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (0, self._at, os.fstat(self._file.fileno()).st_size)[whence]
        if start + offset < 0:
            raise OSError("before the beginning of the file")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        got = os.preadv(self._file.fileno(), [buffer], self._at)
        self._at += got
        return got


class _Zip(_Archive):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._lock = threading.Lock()
        try:
            self._zip = zipfile.ZipFile(cast(BinaryIO, _Unmoved(path)))
        except (NotImplementedError, ValueError) as e:  # an odd version, a name that is no UTF-8
            raise zipfile.BadZipFile(str(e)) from None
        for member in self._zip.infolist():
            if not member.is_dir():
                self._add(member, member.filename, member.file_size, member)

    def read(self, name: str, limit: int) -> bytes:
        member: zipfile.ZipInfo = self._places[name]
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others decompress without bound
            raise NotImplementedError(f"compression method {member.compress_type}; zip it again with deflate")
        with self._lock:  # opening counts handles; reading has zipfile's own lock
            file = self._zip.open(member)
        try:
            return file.read(limit + 1)
        finally:
            with self._lock:
                file.close()


class _Tar(_Archive):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("rb")
        for member in Tar(self._file):
            if not member.isdir():
                self._add(member, member.name, member.size, (member.offset_data, member.size))

    def read(self, name: str, limit: int) -> bytes:
        offset, size = self._places[name]
        data = os.pread(self._file.fileno(), min(size, limit + 1), offset)
        if len(data) < min(size, limit + 1):
            raise OSError("unexpected end of data")
        return data


_Root = _Folder | _Zip | _Tar
_opened: dict[str, tuple[tuple[Any, ...], _Root]] = {}
"""Of this process: root of a Stored -> which version of which file is open, and the open file."""


def _open(root: str, at: Path) -> _Root:
    """What is read under the name `root`: the folder or archive itself, or the plain copy of a compressed tar."""
    about = at.stat()
    version = (at, about.st_ino, about.st_size, about.st_mtime_ns)
    with _opening:
        if root not in _opened or _opened[root][0] != version:
            _opened[root] = version, _Folder(at) if at.is_dir() else _Zip(at) if at.name.lower().endswith(".zip") else _Tar(at)
        return _opened[root][1]


def _unpack(path: Path, spool: Path | None) -> Path:
    """The plain tar in the spool folder, made if it is not there yet."""
    if spool is None:
        raise UserError(f"{path}: a compressed tar of images has no random access: give a folder for its plain copy, or decompress it")
    about = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:16]
    final = spool / f"{key}.tar"
    spool.mkdir(parents=True, exist_ok=True)
    with (spool / f"{key}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: some work is done twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            aside = spool / f"{key}.{os.uname().nodename}.{os.getpid()}.part"
            try:
                _decompress(path, aside)
                aside.replace(final)
            finally:
                aside.unlink(missing_ok=True)
    return final


def _decompress(path: Path, to: Path) -> None:
    most, written = _MOST_EXPANSION * max(path.stat().st_size, _CHUNK), 0
    with to.open("wb") as out:
        try:
            with open_bytes(path) as stream:
                while chunk := stream.read(_CHUNK):
                    written += len(chunk)
                    if written > most:
                        raise UserError(f"{path}: grows to more than {_MOST_EXPANSION} times its size, a decompression bomb")
                    free = shutil.disk_usage(to.parent).free
                    if free < len(chunk) + _CHUNK:
                        raise UserError(
                            f"{path}: its plain copy does not fit into {to.parent}: {written >> 20} MiB of it are made, {free >> 20} MiB are free"
                        )
                    out.write(chunk)
        except UNREADABLE as e:
            raise UserError(f"{path}: cannot be decompressed after {written} bytes: {e}; get it again") from None
