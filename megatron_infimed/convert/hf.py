"""Hugging Face folders as a source: their sizes from config.json, their tensors from safetensors files.

What our model cannot express (another activation, a sliding window, attention biases, scaled RoPE, another architecture) is refused by
name; nothing is guessed. Both ways of writing `rope_theta` (top level, and transformers 5's `rope_parameters`) and both ways of storing
SigLIP (the whole model, or its vision half with or without the `vision_model.` prefix) are read. Pickled weights are never opened: they
can run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_infimed.config import LanguageConfig, VisionConfig
from megatron_infimed.errors import UserError

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# What SiglipVisionConfig takes where the file is silent; published files leave defaults out.
_SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}


class Folder:
    """The tensors of a Hugging Face folder, read one at a time."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: no readable safetensors there.
        """
        self.path = path
        index = path / "model.safetensors.index.json"
        if index.is_file():
            self.files = sorted({path / name for name in _json(index)["weight_map"].values()})
        else:
            self.files = sorted(path.glob("model*.safetensors"))
        if not self.files:
            pickled = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
            raise UserError(
                f"{path}: the weights are pickled ({', '.join(pickled[:3])}), which can run code when opened: convert them with "
                "AutoModel.from_pretrained(DIR).save_pretrained(DIR) in a place you trust"
                if pickled
                else f"{path}: no model.safetensors and no model.safetensors.index.json there; give the folder of a Hugging Face model"
            )
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            with _opened(file) as f:
                for name in f.keys():  # noqa: SIM118 (not a mapping)
                    piece = f.get_slice(name)
                    if piece.get_dtype() not in _DTYPES and name.rpartition(".")[2] in ("weight", "bias"):
                        raise UserError(
                            f"{file}: {name} is stored as {piece.get_dtype()}; only F32, BF16 and F16 are read: convert the weights first"
                        )
                    self._file_of[name] = file
                    self.shapes[name] = tuple(piece.get_shape())
                    self.dtypes[name] = _DTYPES.get(piece.get_dtype(), torch.float32)

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        with _opened(self._file_of[name]) as f:
            return f.get_tensor(name)


def language_config(path: Path) -> LanguageConfig:
    """Sizes of a Qwen3 folder.

    Raises:
        UserError: it is not a Qwen3 that our model expresses.
    """
    file, tree = _config(path)
    _refuse_unless(file, tree, "model_type", ("qwen3",), "give a Qwen3 folder, such as Qwen/Qwen3-1.7B or Qwen/Qwen3-4B")
    _refuse_unless(file, tree, "hidden_act", ("silu",))
    _refuse_unless(file, tree, "attention_bias", (False, None))
    _refuse_unless(file, tree, "use_sliding_window", (False, None))
    rope = {"rope_type": "default", **(tree.get("rope_scaling") or {}), **(tree.get("rope_parameters") or {})}
    _refuse_unless(file, rope, "rope_type", ("default",), "take the checkpoint without RoPE scaling")
    _refuse_unless(file, rope, "partial_rotary_factor", (1, 1.0, None))
    heads = _needed(file, tree, "num_attention_heads")
    return LanguageConfig(
        hidden_size=_needed(file, tree, "hidden_size"),
        num_layers=_needed(file, tree, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_needed(file, tree, "num_key_value_heads"),
        head_dim=_needed(file, tree, "head_dim"),
        ffn_hidden_size=_needed(file, tree, "intermediate_size"),
        vocab_size=_needed(file, tree, "vocab_size"),
        rope_theta=_needed(file, {**tree, **rope}, "rope_theta"),
        norm_eps=_needed(file, tree, "rms_norm_eps"),
        max_positions=_needed(file, tree, "max_position_embeddings"),
        tied_embeddings=bool(tree.get("tie_word_embeddings", False)),
    )


def vision_config(path: Path, feature_layer: int) -> VisionConfig:
    """Sizes of a SigLIP folder (SiglipModel or SiglipVisionModel).

    Raises:
        UserError: it is not a SigLIP, or has no such layer.
    """
    file, tree = _config(path)
    remedy = "give a SigLIP folder, such as google/siglip-so400m-patch14-384 (SigLIP 2 with fixed resolution is stored as SigLIP)"
    _refuse_unless(file, tree, "model_type", ("siglip", "siglip_vision_model"), remedy)
    tree = {**_SIGLIP, **tree.get("vision_config", tree if tree["model_type"] == "siglip_vision_model" else {})}
    _refuse_unless(file, tree, "hidden_act", ("gelu_pytorch_tanh",))
    _refuse_unless(file, tree, "num_channels", (3,))
    layers = tree["num_hidden_layers"]
    if not -layers <= feature_layer <= -1:
        raise UserError(f"--feature-layer {feature_layer}: the tower of {path} has {layers} layers; take one of -1 to -{layers}")
    return VisionConfig(
        image_size=tree["image_size"],
        patch_size=tree["patch_size"],
        hidden_size=tree["hidden_size"],
        num_layers=layers,
        num_heads=tree["num_attention_heads"],
        ffn_hidden_size=tree["intermediate_size"],
        layernorm_eps=tree["layer_norm_eps"],
        feature_layer=feature_layer,
    )


def _config(path: Path) -> tuple[Path, dict[str, Any]]:
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path}: no config.json there; give the folder of a Hugging Face model (its name on the Hub is not enough)")
    return file, _json(file)


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{file}: not JSON ({e}); copy the file again") from None


def _needed(file: Path, tree: dict[str, Any], key: str) -> Any:
    if tree.get(key) is None:
        raise UserError(f"{file}: {key} is missing; save the model again with save_pretrained, which writes it")
    return tree[key]


def _refuse_unless(file: Path, tree: dict[str, Any], key: str, allowed: tuple[Any, ...], remedy: str = "") -> None:
    if tree.get(key) not in allowed:
        wanted = " or ".join(str(a) for a in allowed if a is not None)
        raise UserError(f"{file}: {key} is {tree.get(key)}, this model has {wanted}; {remedy or 'take a checkpoint that has it so'}")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: not readable as safetensors ({' '.join(str(e).split())}); copy the file again") from None
