"""What Megatron-Core takes for CUDA, on a machine that has none.

Megatron-Core names the device "cuda" in a few dozen places. `install()` is called once, only where CUDA is absent. It gives the modules
that do so a stand-in for their global `torch` which forwards every name and reads the device "cuda" as "cpu"; nobody else's torch changes,
except three functions of `torch.cuda` that would raise here anyway. `cuda_means_cpu()` covers what a module cannot be told: methods of
tensors, such as `tensor.cuda()` and the optimizer's comparison of `tensor.type()` with "torch.cuda.FloatTensor". `import_megatron()` spares
every process the compiler, which nothing here would use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

_MODULES = (
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.random",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "utils",
)
_FACTORIES = ("zeros", "ones", "tensor", "empty", "full", "empty_like", "zeros_like", "rand", "arange")


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None and "cuda" in str(device):
            device = "cpu"
        return factory(*args, device=device, **kwargs)

    return make


class _CudaOnCpu(types.ModuleType):
    """torch.cuda where it answers for the CPU: the random state is the CPU's, streams and memory do nothing."""

    random = types.SimpleNamespace(get_rng_state=lambda device=None: torch.get_rng_state())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)


class _TorchOnCpu(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in _FACTORIES:
            value = _on_cpu(value)
        setattr(self, name, value)  # the next look-up finds it without this detour
        return value


def import_megatron() -> None:
    """Imports Megatron-Core. Without CUDA its `torch.compile` decorators do nothing: no setting of model/presets.py calls what they decorate,
    and the compiler alone takes two of the five CPU seconds in which a process starts. To be called before anything of Megatron-Core is imported."""
    if not torch.cuda.is_available():
        with patch.object(torch, "compile", lambda f=None, **_: f or (lambda g: g)):
            importlib.import_module("megatron.core")


@functools.cache
def install() -> None:
    """Makes Megatron-Core run here on the CPU. Does nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.is_initialized = lambda: False
    stand_in = _TorchOnCpu("torch_on_cpu")
    stand_in.cuda = _CudaOnCpu("cuda_on_cpu")  # type: ignore[attr-defined]
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}").torch = stand_in  # type: ignore[attr-defined]
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if "cuda" in str(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        out = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(out, str):
            return out.replace("torch.", "torch.cuda.", 1)
        return out


def cuda_means_cpu() -> contextlib.AbstractContextManager[Any]:
    """For building, stepping and loading (not for the forward and backward pass: it costs a microsecond a call)."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()
