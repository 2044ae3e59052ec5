"""Encoded images in, one uint8 tensor of square pictures out.

TorchDecoder is the exact and, on a CPU, the fast route: simplejpeg decodes JPEG in full, Pillow everything else, and torch's uint8
bicubic filter with antialiasing squashes the picture to S x S as Hugging Face's SigLIP processor does (within two levels of PIL).
DaliDecoder (dali.py) does the same with NVIDIA DALI, on the GPU where there is one. Both honour EXIF orientation, and both return gray
for an image that cannot be decoded and report its place: bad data must neither kill a run nor pass silently.

Suffixes: N images, C = 3 colours (RGB), S pixels along a side; HWC and CHW name the axes of one picture.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from megatron_infimed.optional import available, require

GRAY = 127  # nearest below 127.5, SigLIP's mean: close to zero after normalisation
_ORIENTATION = 0x0112


class Decoded(NamedTuple):
    pixels: torch.Tensor
    """uint8 [N, 3, S, S], RGB."""
    corrupt: list[int]
    """Places of the images that could not be decoded; their pixels are GRAY."""


class Decoder(Protocol):
    def __call__(self, images: Sequence[bytes], size: int) -> Decoded:
        """Decodes encoded images and squashes each to size x size. Never raises for what an image contains."""
        ...

    def close(self) -> None:
        """Ends the decoder's threads; it is not used afterwards."""
        ...


def decoder_name(name: str, device: torch.device | str | None = None) -> Literal["torch", "dali"]:
    """What data.decoder comes to: auto is DALI where the device (default: what this machine has) is a GPU and DALI is installed.

    Raises:
        UserError: `dali` is asked for and not installed.
    """
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if name == "dali":
        require("nvidia.dali", "data.decoder=dali")
        return "dali"
    return "dali" if name == "auto" and on_gpu and available("nvidia.dali") else "torch"


def make_decoder(name: str, threads: int, device: torch.device | str) -> Decoder:
    """The decoder of a recipe.

    Args:
        name: `torch`, `dali` or `auto`, see `decoder_name`.
        threads: CPU threads that decode.
        device: where the model runs; DALI leaves its pixels there.
    """
    if decoder_name(name, device) == "dali":
        from megatron_infimed.data.dali import DaliDecoder

        return DaliDecoder(threads, device)
    return TorchDecoder(threads)


class TorchDecoder:
    """simplejpeg or Pillow, then torch's antialiased bicubic filter; `threads` images at a time."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None

    def __call__(self, images: Sequence[bytes], size: int) -> Decoded:
        # NumPy's copy keeps to this thread; torch's would wake a team of OpenMP threads that spin against training.
        pixels_NCSS = np.empty((len(images), 3, size, size), np.uint8)

        def one(i: int) -> bool:
            try:
                pixels_NCSS[i] = squash(decode_rgb(images[i]), size).numpy()
            except Exception:  # a decoder fed with garbage raises what it likes: ValueError, OSError, SyntaxError, struct.error, ...
                pixels_NCSS[i] = GRAY
                return False
            return True

        good = (self._pool.map if self._pool else map)(one, range(len(images)))
        return Decoded(torch.from_numpy(pixels_NCSS), [i for i, ok in enumerate(good) if not ok])

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()


def squash(image_HWC: NDArray[np.uint8], size: int) -> torch.Tensor:
    """A picture of any shape as uint8 [3, size, size]: bicubic, antialiased, aspect ratio not kept (as SigLIP was trained)."""
    image_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)
    if image_CHW.shape[1:] == (size, size):
        return image_CHW
    return torch.nn.functional.interpolate(image_CHW[None], size=(size, size), mode="bicubic", antialias=True)[0]


def decode_rgb(data: bytes) -> NDArray[np.uint8]:
    """One encoded image as RGB, uint8 [H, W, 3]. Raises whatever the decoders raise when it cannot be decoded."""
    if data[:2] == b"\xff\xd8":
        # simplejpeg reads no EXIF. Headers come first, so an image with no such mark up front is not rotated.
        if b"Exif" in data[:65536]:
            with Image.open(io.BytesIO(data)) as image:
                upright = image.getexif().get(_ORIENTATION, 1) == 1
            if not upright:
                return _pillow(data)
        try:
            if simplejpeg.decode_jpeg_header(data)[2] != "CMYK":
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # simplejpeg also refuses what libjpeg only warns about: Pillow has the last word
    return _pillow(data)


def _pillow(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as opened:
        opened.seek(0)  # the first frame of a GIF or page of a TIFF
        image = ImageOps.exif_transpose(opened)
        if image.mode[0] in "IF":  # more than 8 bits a pixel: I;16, I;16B, I, F
            return np.repeat(_to_8_bits(np.asarray(image))[..., None], 3, axis=2)
        if image.has_transparency_data:
            # White, as vLLM and paper have it: drawings with a transparent ground are meant for a white page.
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return np.array(image.convert("RGB"))


def _to_8_bits(values: NDArray) -> NDArray[np.uint8]:
    """Deep gray to 8 bits. Medical files keep 10, 12 or 14 bits in a 16-bit word, so the range is the smallest number of whole bits that
    holds the picture's maximum; negative and floating-point pictures are stretched from their minimum to their maximum."""
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high >= 1 and np.array_equal(values, np.rint(values)):
        low, high = 0.0, float(2 ** max(8, int(high).bit_length()) - 1)
    return np.rint((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)
