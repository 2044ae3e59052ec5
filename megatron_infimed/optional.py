"""Optional packages: what is there, said in one place. Each is imported in one file, inside the function that needs it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

from megatron_infimed.errors import UserError

REMEDY = {
    "transformer_engine": "on a machine with CUDA, see docs/gpu.md",
    "flash_attn": "on a machine with CUDA, see docs/gpu.md",
    "apex": "take the NGC PyTorch container, or build NVIDIA's apex from source (PyPI's package of that name is another one)",
    "nvidia.dali": "pip install -e .[dali]",
    **dict.fromkeys(("pydicom", "imagecodecs", "jpeg_ls", "openjpeg", "nibabel"), "pip install -e .[formats]"),
    "datatrove": "pip install -e .[scale]",
    "ray": "pip install -e .[ray]",
}


@functools.cache
def available(package: str) -> bool:
    """Whether the package can be imported (it is looked for, not imported)."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(package: str, wanted_by: str) -> None:
    """Raises UserError naming the remedy where the package is missing."""
    if not available(package):
        raise UserError(f"{wanted_by} needs {package}, which is not installed: {REMEDY[package]}")


def load(package: str, wanted_by: str) -> Any:
    """The imported package; UserError naming the remedy where that fails."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{wanted_by} needs {package}, which is not installed: {REMEDY[package]}") from None


def use_transformer_engine(layers: str) -> bool:
    """What precision.layers comes to on this machine."""
    if layers == "local":
        return False
    if layers == "transformer_engine":
        require("transformer_engine", "precision.layers=transformer_engine")
        return True
    import torch  # the data tools ask for packages too, and have no use for it

    return torch.cuda.is_available() and available("transformer_engine")
