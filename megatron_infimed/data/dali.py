"""Decoding with NVIDIA DALI: the only file that imports it.

One pipeline, fed by hand: encoded bytes and, as a second input, the target size, so a change of resolution needs no new pipeline. On a
GPU `mixed` decodes JPEG in hardware and resizes there; with no GPU the same graph runs on the CPU (slower than TorchDecoder: it is there
to compare pixels). DALI gets JPEG and plain PNG; all else (GIF, AVIF, palettes, transparency, 16 bits, ...) goes through TorchDecoder,
which gives those one meaning. One bad sample fails a whole DALI batch: the batch is then halved until the sample is alone, and
TorchDecoder has the last word on it, so what the other images look like does not depend on their neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_infimed.data.decode import Decoded, TorchDecoder
from megatron_infimed.errors import UserError


class DaliDecoder:
    """Decoder on DALI; pixels are left on `device`.

    Args:
        threads: CPU threads of the pipeline.
        device: a CUDA device, or cpu.
        max_batch: images handed to the pipeline at once; bounds its memory.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, threads: int, device: torch.device | str = "cpu", max_batch: int = 64):
        self.device = torch.device(device)
        self.max_batch = max_batch
        self._threads = threads
        self._others = TorchDecoder(threads)
        self._pipeline = self._build()

    def __call__(self, images: Sequence[bytes], size: int) -> Decoded:
        pixels_NCSS = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=self.device)
        mine, rest = [], []
        for i, data in enumerate(images):
            (mine if suits_dali(data) else rest).append(i)
        for start in range(0, len(mine), self.max_batch):
            rest += self._decode(images, mine[start : start + self.max_batch], size, pixels_NCSS)
        corrupt = []
        if rest:
            others, bad = self._others([images[i] for i in rest], size)
            pixels_NCSS[rest] = others.to(self.device)
            corrupt = sorted(rest[i] for i in bad)
        return Decoded(pixels_NCSS, corrupt)

    def close(self) -> None:
        self._pipeline = None
        self._others.close()

    def _decode(self, images: Sequence[bytes], places: list[int], size: int, pixels_NCSS: torch.Tensor) -> list[int]:
        """Fills the pixels at `places`; returns those places that DALI cannot decode."""
        try:
            pixels_NCSS[places] = self._run([images[i] for i in places], size)
            return []
        except RuntimeError as e:
            if "no longer valid" in str(e):  # the dynamic executor survives a bad sample; an error of the device itself it does not
                self._pipeline = self._build()
        if len(places) == 1:
            return places
        half = len(places) // 2
        return self._decode(images, places[:half], size, pixels_NCSS) + self._decode(images, places[half:], size, pixels_NCSS)

    def _run(self, images: list[bytes], size: int) -> torch.Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        if self._pipeline is None:
            raise ValueError("the decoder is closed")
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in images])
        self._pipeline.feed_input("size", [np.full(2, size, np.float32)] * len(images))
        (pictures,) = self._pipeline.run()
        out_NHWC = torch.empty(len(images), size, size, 3, dtype=torch.uint8, device=self.device)
        feed_ndarray(pictures.as_tensor(), out_NHWC, cuda_stream=torch.cuda.current_stream(self.device) if out_NHWC.is_cuda else None)
        return out_NHWC.permute(0, 3, 1, 2)

    def _build(self) -> Any:
        try:
            from nvidia.dali import fn, pipeline, types
        except ImportError as e:
            raise UserError(f"data.decoder: dali needs NVIDIA DALI ({e}): pip install -e .[dali], or set data.decoder=torch") from None
        gpu = self.device.type == "cuda"
        index = (self.device.index if self.device.index is not None else torch.cuda.current_device()) if gpu else None
        # The loader's thread already runs ahead of training, so the pipeline itself need not.
        pipe = pipeline.Pipeline(self.max_batch, self._threads, index, prefetch_queue_depth=1, exec_dynamic=True)
        with pipe:
            encoded = fn.external_source(name="encoded")
            size = fn.external_source(name="size")
            picture = fn.decoders.image(
                encoded,
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,  # pyright: ignore[reportAttributeAccessIssue]
                jpeg_fancy_upsampling=True,  # as libjpeg-turbo, and so Pillow, does by default
            )
            picture = fn.resize(picture, size=size, interp_type=types.INTERP_CUBIC, antialias=True)  # pyright: ignore
            pipe.set_outputs(picture)
        pipe.build()
        return pipe


def suits_dali(data: bytes) -> bool:
    """Whether DALI reads it as TorchDecoder does: JPEG, or PNG of 8 bits in gray or RGB with no transparent colour."""
    if data[:2] == b"\xff\xd8":
        return True
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 33:
        return False
    depth, colour = data[24], data[25]
    return depth == 8 and colour in (0, 2) and b"tRNS" not in data[:4096]  # tRNS comes before the pixels
