"""Decoding: CPU milliseconds an image from JPEG to 224 and 384 pixels, and how near the pixels are to Hugging Face's SigLIP processor.

    python -m tests.benchmarks.decoding [--rounds 5] [--copies 4] [--threads 1]

The pictures are real ones of scikit-image and a chest film of pydicom-data, resized to 640 x 480, 1024 x 768 and the film's own 1955 x 1841 and
saved as JPEG (quality 90). Compared are TorchDecoder (simplejpeg and torch's antialiased bicubic filter), Pillow's decoder and bicubic
filter, and DaliDecoder on the CPU (cubic, antialiased; with its CPU operators also where there is a GPU). CPU time is that of all threads;
a cell is the median of the rounds, in which all take turns. The reference for PSNR and the largest difference is the slow (Pillow) SigLIP
image processor without its normalisation; levels are 0 to 255.
"""

from __future__ import annotations

import importlib.metadata
import io
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import typer
from PIL import Image

from megatron_infimed.data.decode import TorchDecoder
from megatron_infimed.optional import available

SIZES = (224, 384)
Decode = Callable[[Sequence[bytes], int], torch.Tensor]
"""(encoded images, S) -> uint8 [N, 3, S, S]."""


def jpeg(picture: Image.Image, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=90)
    return out.getvalue()


def film() -> Image.Image:
    """A chest film, to 8 bits; stored bright for air (MONOCHROME1), so inverted."""
    import pydicom
    from pydicom.data import get_testdata_file

    pixels = pydicom.dcmread(str(get_testdata_file("RG1_UNCR.dcm"))).pixel_array.astype(np.float64)
    return Image.fromarray((255 * (1 - pixels / pixels.max())).astype(np.uint8))


def pictures() -> dict[str, list[bytes]]:
    from skimage import data

    photos = [
        Image.fromarray(getattr(data, name)()[..., :3]) for name in ("astronaut", "coffee", "rocket", "immunohistochemistry", "retina")
    ]
    chest = film()
    small = {f"{w} x {h}": [jpeg(p, (w, h)) for p in (*photos, chest)] for w, h in ((640, 480), (1024, 768))}
    return {**small, f"{chest.width} x {chest.height}": [jpeg(chest, chest.size)]}


def pillow(images: Sequence[bytes], size: int) -> torch.Tensor:
    out = np.empty((len(images), size, size, 3), np.uint8)
    for i, data in enumerate(images):
        with Image.open(io.BytesIO(data)) as image:
            out[i] = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def reference(images: Sequence[bytes], size: int) -> torch.Tensor:
    from transformers import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": size, "width": size}, do_rescale=False, do_normalize=False, resample=3)
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
    return torch.as_tensor(np.stack(processor(opened)["pixel_values"])).to(torch.uint8)


def methods(threads: int) -> dict[str, Decode]:
    torch_decoder = TorchDecoder(threads)
    out: dict[str, Decode] = {"ours (torch)": lambda images, size: torch_decoder(images, size).pixels, "Pillow": pillow}
    if available("nvidia.dali"):
        from megatron_infimed.data.dali import DaliDecoder

        dali = DaliDecoder(threads, "cpu")
        out["DALI, CPU"] = lambda images, size: dali(images, size).pixels
    else:
        print("left out: DALI is not installed")
    return out


def psnr(pixels: torch.Tensor, wanted: torch.Tensor) -> float:
    error = (pixels.double() - wanted.double()).square().mean().item()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def main(rounds: int = 5, copies: int = 4, threads: int = 1) -> None:
    torch.set_num_threads(threads)
    names = ("torch", "simplejpeg", "pillow", "transformers", "nvidia-dali-cuda130")
    known = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    print(
        f"python {platform.python_version()},", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if name in known)
    )
    print(f"{threads} threads\n")
    heads = ["JPEG", "KB", "to", "decoder", "CPU ms an image", "of Pillow's", "PSNR dB", "largest difference", "mean"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    decoders = methods(threads)
    for shape, distinct in pictures().items():
        images = distinct * copies
        for size in SIZES:
            took: dict[str, list[float]] = {name: [] for name in decoders}
            for _ in range(rounds + 1):
                for name, decode in decoders.items():
                    begin = time.process_time()
                    decode(images, size)
                    took[name].append(1e3 * (time.process_time() - begin) / len(images))
            wanted = reference(distinct, size)
            for name, decode in decoders.items():
                pixels = decode(distinct, size)
                difference = (pixels.int() - wanted.int()).abs()
                ratio = statistics.median(a / b for a, b in zip(took[name][1:], took["Pillow"][1:], strict=True))
                cells = [
                    shape,
                    f"{sum(map(len, distinct)) / len(distinct) / 1e3:.0f}",
                    size,
                    name,
                    f"{statistics.median(took[name][1:]):.2f}",
                ]
                cells += [f"{ratio:.2f}", f"{psnr(pixels, wanted):.1f}", int(difference.max()), f"{difference.double().mean():.3f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
