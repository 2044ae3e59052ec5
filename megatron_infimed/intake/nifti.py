"""NIfTI volumes (.nii, .nii.gz; versions 1 and 2) as slices: 8-bit PNGs, voxels only.

The volume is turned to the closest canonical orientation (RAS: x to the Right, y to the Anterior, z to the Superior) and a slice is named by
axis and index in it: "z12" (axial), "y80" (coronal), "x95" (sagittal), with "t3" behind it for the fourth volume of a series, "" for the
middle axial slice. **Display is radiological**: the patient's right is on the picture's left in axial and coronal slices, anterior is on the
left in sagittal ones; anterior, or superior, is up. A file without orientation (qform and sform codes 0) is taken as nibabel does, x leftwards.

Black is the volume's 0.5th percentile, white the 99.5th of its foreground (voxels more than a tenth of the way from the 0.5th to the 99.5th
percentile of all), one window for the whole volume so that neighbours compare; what is not finite is black. A slice whose pixels are not
square is stretched along its coarser side (bilinear), since anatomy must not look squashed. The header's free text is never read.

A volume is read once for its neighbouring slices: the last two stay in memory as 8 bits. Only the bytes a volume needs are decompressed.
"""

from __future__ import annotations

import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from megatron_infimed.intake.kept import Kept
from megatron_infimed.intake.records import BadImage
from megatron_infimed.optional import load

MAX_BYTES = 1 << 30  # of a volume, uncompressed, with what precedes it in the file
MAX_DIMENSION = 8192
PERCENTILES = (0.5, 99.5)
FOREGROUND = 0.1  # of the range between the percentiles
LEAST_FOREGROUND = 0.05  # of a slice's voxels, below which `slices` passes it over
MAX_ANISOTROPY = 2.0  # of a plane's pixels, beyond which `slices` passes the whole plane over
_SAMPLE = 1 << 20  # voxels the window is computed from
_AXES = {"x": "sagittal", "y": "coronal", "z": "axial"}
_SPEC = re.compile(r"([xyz])(\d{1,5})(?:t(\d{1,5}))?")


@dataclass(frozen=True)
class _Volume:
    voxels: np.ndarray
    """uint8 [x, y, z], RAS, windowed"""
    spacing: tuple[float, float, float]
    """Millimetres between voxels along x, y, z."""
    foreground: int
    """Levels above this one are foreground."""


def is_nifti(data: bytes) -> bool:
    """A single-file NIfTI-1 or -2, plain or in gzip; a header without its voxels (.hdr of a pair) is none."""
    head = data[:544]
    if data[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(31).decompress(data[:8192], 544)
        except zlib.error:
            return False
    return head[344:348] == b"n+1\0" or head[4:12] == b"n+2\0\r\n\x1a\n"


def slices(data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """(spec, safe fields) of the slices worth looking at in the first volume: in planes whose pixels are at most MAX_ANISOTROPY off square,
    those with at least LEAST_FOREGROUND of foreground.

    Raises:
        BadImage: damaged, too large, or nothing in it.
    """
    volume = _load(data, 0)
    inside = volume.voxels > volume.foreground
    for axis, (name, plane) in enumerate(_AXES.items()):
        across = [s for k, s in enumerate(volume.spacing) if k != axis]
        if max(across) > MAX_ANISOTROPY * min(across):
            continue
        shares = inside.mean(axis=tuple(k for k in range(3) if k != axis))
        for index in np.flatnonzero(shares >= LEAST_FOREGROUND).tolist():
            yield f"{name}{index}", {"plane": plane, "slice": index, "slices": len(shares)}


def to_png(data: bytes, spec: str = "") -> bytes:
    """One slice as gray PNG.

    Raises:
        BadImage: damaged, too large, of a kind that is not supported, or without that slice.
    """
    match = _SPEC.fullmatch(spec or "z0")
    if match is None:
        raise BadImage("not a NIfTI slice", f"{spec[:20]!r}; a slice is written like z12, x95 or z12t3")
    volume = _load(data, int(match[3] or 0))
    axis = "xyz".index(match[1])
    index, count = int(match[2]) if spec else volume.voxels.shape[2] // 2, volume.voxels.shape[axis]
    if index >= count:
        raise BadImage("NIfTI slice out of range", f"{spec}: {count} slices")
    picture = Image.fromarray(np.ascontiguousarray(volume.voxels.take(index, axis).T[::-1, ::-1]))
    wide, high = (s for k, s in enumerate(volume.spacing) if k != axis)
    finest = min(wide, high)
    size = round(picture.width * wide / finest), round(picture.height * high / finest)
    limit = Image.MAX_IMAGE_PIXELS or sys.maxsize
    if size[0] * size[1] > limit:
        raise BadImage("image too large", f"{size[0]} x {size[1]} pixels after making them square, the limit is {limit}")
    out = io.BytesIO()
    picture.resize(size, Image.Resampling.BILINEAR).save(out, "PNG")  # a copy where the size stays
    return out.getvalue()


# --- the volume --------------------------------------------------------------------------------------------------------------------

_volumes: Kept[tuple[bytes, _Volume]] = Kept(2)
"""By the identity of the bytes, which are kept with it so that no others can have it."""


def _load(data: bytes, time: int) -> _Volume:
    return _volumes.get((id(data), time), lambda: (data, _read(data, time)))[1]


def _read(data: bytes, time: int) -> _Volume:
    load("nibabel", "a NIfTI volume")
    if not is_nifti(data):
        raise BadImage("not a NIfTI file", "no n+1 or n+2 in its header")
    try:
        return _parse(data, time)
    except BadImage:
        raise
    except Exception as e:  # nibabel, zlib and numpy on damaged files; the text of the error may quote the header
        raise BadImage("corrupt NIfTI", type(e).__name__) from None


def _parse(data: bytes, time: int) -> _Volume:
    from nibabel.orientations import apply_orientation, io_orientation

    header = _header(data)
    shape, count = _shape(header)
    if time >= count:
        raise BadImage("NIfTI slice out of range", f"volume {time} of {count}")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise BadImage("unsupported NIfTI", "voxels are neither integers nor floats of up to 64 bits")
    size = shape[0] * shape[1] * shape[2] * dtype.itemsize
    start = int(header.get_data_offset()) + time * size
    if start < 0 or start + size > MAX_BYTES:
        raise BadImage("image too large", f"{start + size} bytes up to the end of the volume, the limit is {MAX_BYTES}")
    raw = _bytes(data, start + size)
    if len(raw) < start + size:
        raise BadImage("corrupt NIfTI", f"the header says {start + size} bytes, there are {len(raw)}")
    stored = np.frombuffer(raw, dtype, size // dtype.itemsize, start).reshape(shape, order="F")

    affine = header.get_best_affine()
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if not (np.isfinite(affine).all() and (spacing > 0).all() and spacing.max() / spacing.min() < 1000):
        raise BadImage("corrupt NIfTI", "no usable voxel sizes in the header")
    orientation = io_orientation(affine)
    if not np.isfinite(orientation).all():
        raise BadImage("corrupt NIfTI", "no usable orientation in the header")
    voxels, foreground = _window(stored, *(1.0 if v is None else float(v) for v in header.get_slope_inter()))
    return _Volume(apply_orientation(voxels, orientation), tuple(spacing[np.argsort(orientation[:, 0])].tolist()), foreground)


def _header(data: bytes) -> Any:
    from nibabel import Nifti1Header, Nifti2Header, imageglobals

    imageglobals.logger.setLevel("CRITICAL")
    head = _bytes(data, 544)
    kind = Nifti2Header if head[4:8] == b"n+2\0" else Nifti1Header
    return kind(head[: kind.template_dtype.itemsize], check=False)


def _shape(header: Any) -> tuple[tuple[int, int, int], int]:
    """((x, y, z), volumes)"""
    dims = [int(n) for n in header["dim"]]
    if not 2 <= dims[0] <= 7 or not all(1 <= n <= MAX_DIMENSION for n in dims[1 : dims[0] + 1]):
        raise BadImage("corrupt NIfTI", f"dimensions {dims}; 2 to 7 of 1 to {MAX_DIMENSION} are read")
    sizes = (dims[1 : dims[0] + 1] + [1] * 5)[:7]
    if any(n != 1 for n in sizes[4:]):
        raise BadImage("unsupported NIfTI", f"{len(sizes)} dimensions, more than a series of volumes")
    return (sizes[0], sizes[1], sizes[2]), sizes[3]


def _bytes(data: bytes, count: int) -> bytes:
    """The first `count` bytes, decompressed if need be, or what there is of them."""
    if data[:2] != b"\x1f\x8b":
        return data[:count]
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
        return stream.read(count)


def _window(stored: np.ndarray, slope: float, intercept: float) -> tuple[np.ndarray, int]:
    """The volume as uint8, and the level that foreground lies above."""
    picks = np.random.default_rng(0).integers(0, stored.size, _SAMPLE) if stored.size > _SAMPLE else slice(None)
    sample = stored.reshape(-1, order="F")[picks].astype(np.float64) * slope + intercept
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        raise BadImage("empty NIfTI volume", "not one finite voxel")
    low, high = np.percentile(sample, PERCENTILES)
    edge = low + FOREGROUND * (high - low)
    if (inside := sample[sample > edge]).size:
        high = np.percentile(inside, PERCENTILES[1])
    if not high > low:
        raise BadImage("empty NIfTI volume", "all its voxels have the same value")
    out = np.empty(stored.shape, np.uint8)
    for k in range(stored.shape[2]):  # by slice: the volume as floats may be many times its size
        levels = (stored[..., k] * slope + (intercept - low)) * (255 / (high - low))
        out[..., k] = np.rint(np.clip(np.nan_to_num(levels, nan=0.0, posinf=0.0, neginf=0.0), 0, 255))
    return out, int(255 * (edge - low) / (high - low))
