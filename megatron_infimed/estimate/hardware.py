"""The machines that can be estimated for, and the efficiencies taken for them.

Peaks are those of flops.py; memory, links and bandwidths are NVIDIA's data sheets. None of the efficiencies has been measured by this
project: Megatron-LM's published 41 % MFU (BF16, 2B model, H100; 47 to 48 % at best for larger ones), NeMo 24.12's 765 TFLOP/s a GPU (FP8,
GPT3-5B), and common rules for links and launches.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_infimed.flops import PEAKS, Peak

GIB = 2**30
EFFICIENCY = 0.41
"""Of the BF16 peak, while matrix products run."""
FP8_EFFICIENCY = 765 / 1979
LINK_EFFICIENCY = 0.8
"""Of a link's or the memory's bandwidth."""
LAUNCH = 6e-6
"""Seconds that a kernel needs at least, launched from Python."""
RESERVED = 2 * GIB
"""CUDA context, cuBLAS and NCCL's buffers."""
FRAGMENTED = 0.05
"""Of what is allocated, cannot be used."""


@dataclass(frozen=True)
class Gpu:
    """Rates in bytes a second and direction."""

    name: str
    memory: int
    peak: Peak | None = None
    """None: no time is estimated."""
    nvlink: float = 0.0
    network: float = 50e9
    """Of a GPU's own 400 Gbit/s adapter."""
    bandwidth: float = 0.0

    @property
    def is_cuda(self) -> bool:
        return self.peak is not None

    def allowance(self, used: int) -> int:
        """Bytes on top of what the model allocates."""
        return RESERVED + round(FRAGMENTED * used) if self.is_cuda else 0


GPUS = {
    "h100": Gpu("H100 80 GB SXM", round(79.1 * GIB), PEAKS["H100"], 450e9, bandwidth=3.35e12),
    "h800": Gpu("H800 80 GB SXM", round(79.1 * GIB), PEAKS["H100"], 200e9, bandwidth=3.35e12),
    "h200": Gpu("H200 141 GB SXM", round(139.8 * GIB), PEAKS["H200"], 450e9, bandwidth=4.8e12),
    "a100": Gpu("A100 80 GB SXM", round(79.1 * GIB), PEAKS["A100"], 300e9, 25e9, 2.04e12),
    "cpu": Gpu("CPU", 0),
}
