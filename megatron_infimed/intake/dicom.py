"""DICOM bytes -> one frame as an 8-bit PNG, pixels only; the de-identification gate is asked before anything is decoded.

header (pydicom) -> gate -> sizes checked against the bytes -> one frame decoded -> modality LUT -> display window -> 8 bits -> PNG.
Gray frames are shown as a viewer would: the modality LUT or rescale, then the first VOI LUT or window of the header (of the frame's own
functional group in enhanced files); where there is none, or it shows one flat gray, samples of up to 8 bits without a rescale are taken as
they are and all others between their 0.5th and 99.5th percentile (padding left out). MONOCHROME1 is inverted: bright means dense. Colour
(palette, RGB, YBR) becomes RGB; overlays, presentation states and the header stay behind.

Transfer syntaxes: native, deflated and RLE need pydicom alone; JPEG baseline, extended (8 and 12 bits) and lossless need imagecodecs (BSD;
libjpeg-turbo inside: gdcm ends the whole process on damaged JPEG, pylibjpeg-libjpeg is GPL); JPEG-LS pyjpegls (MIT); JPEG 2000 and HTJ2K
pylibjpeg-openjpeg (MIT). Which is used does not depend on what else is installed. Video and samples of more than 16 bits are refused.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from megatron_infimed.errors import UserError
from megatron_infimed.intake.deid import DeidPolicy, Gate
from megatron_infimed.intake.kept import Kept
from megatron_infimed.intake.records import BadImage
from megatron_infimed.optional import load

if TYPE_CHECKING:
    from pydicom import Dataset

PERCENTILES = (0.5, 99.5)
MAX_INFLATED = 1 << 30  # bytes a deflated data set may grow to

_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
_DEFLATED = "1.2.840.10008.1.2.1.99"
_RLE = "1.2.840.10008.1.2.5"
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_PLUGINS = (  # decoder in pydicom's words, and the module it needs
    dict.fromkeys(("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"), ("pyjpegls", "jpeg_ls"))
    | {f"1.2.840.10008.1.2.4.{n}": ("pylibjpeg", "openjpeg") for n in (90, 91, 201, 202, 203)}
    | {_RLE: ("pydicom", "pydicom")}
)
_GRAY = ("MONOCHROME1", "MONOCHROME2")
_CODES = {
    "modality": ("Modality",),
    "body_part": ("BodyPartExamined",),
    "view": ("ViewPosition",),
    "laterality": ("ImageLaterality", "Laterality"),
    "photometric": ("PhotometricInterpretation",),
}
_CODE = re.compile(r"[A-Z](?!.*\d{3})[A-Z0-9 _]{0,15}")


def is_dicom(data: bytes) -> bool:
    """A DICOM file: 128 bytes of preamble, then "DICM". Bare data sets without it cannot be told from anything else and are not taken."""
    return data[128:132] == b"DICM"


def frames(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(frame number, safe header fields) of every frame. No pixel is touched and the gate is not asked: which rows a file has does not
    depend on the policy, and a frame is judged and counted once, in `to_png`.

    Raises:
        BadImage: not a DICOM file, or one without pixels.
    """
    header, left = _read(data, pixels=False)
    if left <= 0 or "Rows" not in header:
        raise BadImage("DICOM without pixels", "no pixel data in the file")
    count = _guarded(_frame_count, header, left)
    fields = _guarded(_safe_fields, header, count)
    yield from ((k, dict(fields)) for k in range(count))


def to_png(data: bytes, frame: int | None, source: str, gate: Gate | None = None) -> bytes:
    """One frame (None: the middle one) as PNG, gray or RGB.

    Args:
        source: data set name, for the gate's list of allowed ones.
        gate: decides what may pass; without one, a closed one.

    Raises:
        BadImage: refused by the gate, damaged, too large, or of a kind that is not supported. The detail never quotes the header.
        UserError: a package that decodes this file's transfer syntax is not installed.
    """
    _, header = _parsed.get(id(data), lambda: (data, _shareable(_read(data, pixels=True)[0])))
    if "PixelData" not in header:
        raise BadImage("DICOM without pixels", "no pixel data in the file")
    _guarded((gate or Gate(DeidPolicy())).dicom, header, source)
    pixels, photometric, index = _guarded(_decode, header, frame)
    shown = _guarded(_show, header, pixels, photometric, index)
    out = io.BytesIO()
    Image.fromarray(shown).save(out, "PNG")
    return out.getvalue()


_parsed: Kept[tuple[bytes, Dataset]] = Kept(2)
"""By the identity of the bytes, which are kept with it so that no others can have it."""


def _shareable(header: Dataset) -> Dataset:
    """pydicom turns an element's bytes into a value at the first look; for a file whose frames are shown by several threads, that is now."""
    for tag in list(header.keys()) if header.get("NumberOfFrames") else ():
        with contextlib.suppress(Exception):  # whoever needs this element will meet it again
            header[tag]
    return header


@functools.cache
def _pydicom() -> Any:
    """pydicom with its warnings off: they quote the header. Once a process, since warning filters are not safe to change in threads."""
    pydicom = _optional("pydicom")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"pydicom|megatron_infimed\.intake\.dicom")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


def _optional(module: str) -> Any:
    return load(module, "this DICOM file")


def _guarded(step: Any, *args: Any) -> Any:
    """A step whose library may raise anything on a damaged file; only the kind of error is told, its text may quote the header."""
    try:
        return step(*args)
    except (BadImage, UserError):
        raise
    except NotImplementedError as e:
        raise BadImage("unsupported DICOM", f"{step.__name__.strip('_')}: {type(e).__name__}") from None
    except Exception as e:
        raise BadImage("corrupt DICOM", f"{step.__name__.strip('_')}: {type(e).__name__}") from None


def _read(data: bytes, pixels: bool) -> tuple[Dataset, int]:
    """The data set, and with `pixels=False` how many bytes follow its header."""
    if not is_dicom(data):
        raise BadImage("not a DICOM file", "no DICM after the preamble")
    return _guarded(_parse, data, pixels)


def _parse(data: bytes, pixels: bool) -> tuple[Dataset, int]:
    pydicom = _pydicom()
    stream = io.BytesIO(data)
    stream.seek(132)
    meta = pydicom.filereader.read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    inflated = 0
    if meta.get("TransferSyntaxUID") == _DEFLATED:
        inflated = len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[stream.tell() :], MAX_INFLATED + 1))
        if inflated > MAX_INFLATED:
            raise BadImage("image too large", f"deflated data set of more than {MAX_INFLATED} bytes")
    stream.seek(0)
    header = pydicom.dcmread(stream, stop_before_pixels=not pixels)
    return header, inflated or len(data) - stream.tell()


def _integer(header: Dataset, keyword: str, default: int) -> int:
    value = header.get(keyword)
    return default if value is None or value == "" else int(value)


def _frame_count(header: Dataset, available: int) -> int:
    """Frames declared, if `available` bytes can hold them: whole frames where not compressed, else at least an item header each."""
    count = _integer(header, "NumberOfFrames", 1)
    size = (
        8 if _syntax(header) not in _UNCOMPRESSED else max(1, _pixels(header) * _integer(header, "SamplesPerPixel", 1) * _bits(header) // 8)
    )
    if header.get("PhotometricInterpretation") == "YBR_FULL_422":
        size = size * 2 // 3
    if count < 1 or count * size > available:
        raise BadImage("corrupt DICOM", f"{count} frames of at least {size} bytes, {available} bytes of pixels")
    return count


def _syntax(header: Dataset) -> str:
    return str(header.file_meta.TransferSyntaxUID)


def _pixels(header: Dataset) -> int:
    rows, columns, limit = _integer(header, "Rows", 0), _integer(header, "Columns", 0), Image.MAX_IMAGE_PIXELS or sys.maxsize
    if rows * columns > limit:
        raise BadImage("image too large", f"{columns} x {rows} pixels, the limit is {limit}")
    if rows < 1 or columns < 1:
        raise BadImage("corrupt DICOM", f"{columns} x {rows} pixels")
    return rows * columns


def _bits(header: Dataset) -> int:
    bits = _integer(header, "BitsAllocated", 0)
    if bits not in (1, 8, 16) or not 1 <= _integer(header, "BitsStored", 0) <= bits:
        raise BadImage("unsupported DICOM", f"{bits} bits a sample, {_integer(header, 'BitsStored', 0)} of them used")
    return bits


def _safe_fields(header: Dataset, count: int) -> dict[str, Any]:
    """What may leave the header: sizes, and code strings (CS) of a closed form. Free text and everything else stays."""
    fields: dict[str, Any] = {"rows": _integer(header, "Rows", 0), "columns": _integer(header, "Columns", 0), "frames": count}
    for name, keywords in _CODES.items():
        for keyword in keywords:
            value = str(header.get(keyword) or "").strip().upper()
            if name not in fields and _CODE.fullmatch(value):
                fields[name] = value
    return fields


# --- one frame ---------------------------------------------------------------------------------------------------------------------


def _decode(header: Dataset, frame: int | None) -> tuple[np.ndarray, str, int]:
    """(samples [rows, columns] or [rows, columns, 3], what they mean, frame number)"""
    count = _frame_count(header, len(header.PixelData))
    index = count // 2 if frame is None else frame
    if not 0 <= index < count:
        raise BadImage("DICOM frame out of range", f"frame {index} of {count}")
    _pixels(header)
    _bits(header)
    syntax, photometric = _syntax(header), str(header.PhotometricInterpretation)
    if syntax not in _UNCOMPRESSED + _JPEG and syntax not in _PLUGINS:
        raise BadImage("unsupported DICOM", "no decoder for its transfer syntax")
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder

    if syntax not in (*_UNCOMPRESSED, _RLE):
        stream = get_frame(header.PixelData, index, number_of_frames=count)
        said, wanted = _codestream_size(stream), tuple(_integer(header, k, 1) for k in ("Rows", "Columns", "SamplesPerPixel"))
        if said != wanted:  # a decoder allocates what the stream says
            raise BadImage("corrupt DICOM", f"the compressed frame is {said}, the header says {wanted} (rows, columns, samples)")
        if syntax in _JPEG:
            return _jpeg(header, stream, photometric), "RGB" if photometric.startswith("YBR") else photometric, index
    plugin, module = _PLUGINS.get(syntax, ("", "pydicom"))
    _optional(module)
    samples, about = get_decoder(syntax).as_array(header, index=index, decoding_plugin=plugin)
    return samples, str(about["photometric_interpretation"]), index


def _jpeg(header: Dataset, stream: bytes, photometric: str) -> np.ndarray:
    imagecodecs = _optional("imagecodecs")
    if b"\xff\xd9" not in stream[-16:]:
        raise BadImage("corrupt DICOM", "the compressed frame has no end")
    stored_as = "YCBCR" if photometric.startswith("YBR") else photometric if photometric == "RGB" else "GRAYSCALE"
    samples = imagecodecs.jpeg8_decode(stream, colorspace=stored_as, outcolorspace="GRAYSCALE" if stored_as == "GRAYSCALE" else "RGB")
    if _integer(header, "PixelRepresentation", 0) == 1:
        unused = samples.dtype.itemsize * 8 - _integer(header, "BitsStored", 0)
        samples = np.left_shift(samples, unused).view(f"i{samples.dtype.itemsize}") >> unused
    return samples


def _codestream_size(stream: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, components) of a JPEG, JPEG-LS or JPEG 2000 code stream, from its SOF or SIZ marker."""
    at = 0
    while stream[4:8] == b"jP  " and stream[at + 4 : at + 8] != b"jp2c" and at < len(stream):  # in boxes, against PS3.5, but it occurs
        at += max(8, int.from_bytes(stream[at : at + 4], "big"))
    at += 8 * (at > 0)
    if stream[at : at + 4] == b"\xff\x4f\xff\x51":
        x, y, x0, y0 = (int.from_bytes(stream[at + k : at + k + 4], "big") for k in (8, 12, 16, 20))
        return y - y0, x - x0, int.from_bytes(stream[at + 40 : at + 42], "big")
    at = 2
    while stream[:2] == b"\xff\xd8" and at + 10 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(stream[at + 5 : at + 7], "big"), int.from_bytes(stream[at + 7 : at + 9], "big"), stream[at + 9]
        else:
            at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None


def _show(header: Dataset, samples: np.ndarray, photometric: str, index: int) -> np.ndarray:
    """8-bit gray [rows, columns] or RGB [rows, columns, 3]"""
    from pydicom.pixels import apply_color_lut

    stored = _integer(header, "BitsStored", 0)
    if photometric in _GRAY:
        gray = _gray(header, samples, stored, index)
        return 255 - gray if photometric == "MONOCHROME1" else gray
    if photometric == "PALETTE COLOR":
        samples = apply_color_lut(samples, header)
        stored = 16 if samples.max() > 255 else 8  # 8-bit palettes are often kept in 16-bit entries
    elif photometric != "RGB":
        raise BadImage("unsupported DICOM", "its photometric interpretation is neither gray, palette, RGB nor YBR")
    return _to_8_bits(samples, 0, (1 << stored) - 1)


def _gray(header: Dataset, samples: np.ndarray, stored: int, index: int) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut, apply_voi

    rescale, voi = _group(header, index, "PixelValueTransformationSequence"), _group(header, index, "FrameVOILUTSequence")
    values = apply_modality_lut(samples, rescale).astype(np.float32)
    if "VOILUTSequence" in voi:
        bits = int(voi.VOILUTSequence[0].LUTDescriptor[2])
        return _to_8_bits(apply_voi(values.astype(np.int32), voi), 0, (1 << bits) - 1)
    if (limits := _window(voi)) is not None:
        low, high, sigmoid = limits
        shown = _to_8_bits(1 / (1 + np.exp(-4 * ((values - low) / (high - low) - 0.5))), 0, 1) if sigmoid else _to_8_bits(values, low, high)
        if shown.min() < shown.max():
            return shown
    if stored <= 8 and rescale.get("RescaleSlope") is None and "ModalityLUTSequence" not in rescale:
        return _to_8_bits(samples, 0, (1 << stored) - 1)
    padding = header.get("PixelPaddingValue")
    inside = values if padding is None else values[samples != int(padding)]
    return _to_8_bits(values, *np.percentile(inside if inside.size else values, PERCENTILES))


def _group(header: Dataset, index: int, name: str) -> Dataset:
    """The item of a functional group that holds for this frame; the header itself where there is none (not an enhanced file)."""
    for groups in (
        (header.get("PerFrameFunctionalGroupsSequence") or ())[index : index + 1],
        header.get("SharedFunctionalGroupsSequence") or (),
    ):
        for item in groups:
            if item.get(name):
                return item[name][0]
    return header


def _window(voi: Dataset) -> tuple[float, float, bool] | None:
    """(value shown black, value shown white, sigmoid) of the first window of the header, PS3.3 C.11.2.1.2; None without a usable one."""
    centre, width = (_first_number(voi.get(k)) for k in ("WindowCenter", "WindowWidth"))
    function = str(voi.get("VOILUTFunction") or "LINEAR").upper()
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if not (np.isfinite(centre) and np.isfinite(width) and width > 0):
        return None
    return centre - width / 2, centre + width / 2, function == "SIGMOID"


def _first_number(value: Any) -> float:
    if value in (None, ""):
        return 0.0
    return float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)


def _to_8_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` and below become 0, `high` and above 255; where they are the same, all black."""
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low) if high > low else 0)
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
