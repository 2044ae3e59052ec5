"""Checkpoints pass between Megatron-Core's local layers and Transformer Engine's, proven where Transformer Engine cannot be installed.

This file, run as a program, puts a stand-in for the package into sys.modules before Megatron-Core is imported. Megatron-Core then takes it for
Transformer Engine 2.11 and builds its TE* classes and their checkpoint entries for real; the stand-in has Transformer Engine's constructors,
parameter names, extra state and arithmetic, in plain PyTorch. So a run may begin with local layers, go on with "Transformer Engine", and end
with local layers; its losses and gradient norms must be those of a run that never changed. It shows the mapping of weights and of optimizer
state, not the kernels: tests/gpu/test_cuda.py does that with the real package.

    python -m tests.unit.test_te_mapping names FOLDER | train RECIPE '[["output=a"], ...]'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed import runs

# Names and signatures are those of NVIDIA/TransformerEngine v2.11, transformer_engine/pytorch: module/linear.py, module/layernorm_linear.py
# (layer_norm_weight, layer_norm_bias, weight, bias), module/layernorm.py and module/rmsnorm.py with ops/basic/ (weight, bias),
# attention/rope.py, attention/dot_product_attention/ (no parameters). Extra state: module/base.py and ops/op.py, a uint8 tensor that is
# empty where FP8 was never used; set_extra_state takes None and empty for nothing.


class ExtraState(nn.Module):
    calls = 0
    """Stands for FP8's scales: what a module learns by running and must still know after a restart."""

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.calls] if self.calls else [], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and state.numel():
            self.calls = int(state.item())


class Linear(ExtraState):
    made: list[Linear] = []  # noqa: RUF012

    def __init__(self, in_features, out_features, *, bias, return_bias, parallel_mode, tp_size, params_dtype, device, **_unused):
        super().__init__()
        self.return_bias, self.use_bias, self.parallel_mode = return_bias, bias, parallel_mode
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=params_dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=params_dtype)) if bias else torch.empty(0)
        self.made.append(self)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        self.calls += 1
        out = F.linear(x, self.weight, self.bias if self.use_bias and not self.return_bias else None)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, eps, normalization, params_dtype, device, **rest):
        super().__init__(in_features, out_features, params_dtype=params_dtype, device=device, **rest)
        self.eps, self.rms = eps, normalization == "RMSNorm"
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, device=device, dtype=params_dtype))
        self.layer_norm_bias = None if self.rms else nn.Parameter(torch.zeros(in_features, device=device, dtype=params_dtype))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        size = x.shape[-1:]
        if self.rms:
            return super().forward(F.rms_norm(x, size, self.layer_norm_weight, self.eps))
        return super().forward(F.layer_norm(x, size, self.layer_norm_weight, self.layer_norm_bias, self.eps))


class LayerNorm(ExtraState, nn.LayerNorm):
    def __init__(self, hidden_size, eps, sequence_parallel, params_dtype, zero_centered_gamma, device):
        super().__init__(hidden_size, eps=eps, dtype=params_dtype, device=device)


class RMSNorm(ExtraState, nn.RMSNorm):
    def __init__(self, hidden_size, eps, sequence_parallel, params_dtype, zero_centered_gamma, device):
        super().__init__(hidden_size, eps=eps, dtype=params_dtype, device=device)


class DotProductAttention(ExtraState):
    def __init__(self, num_attention_heads, kv_channels, **_unused):
        super().__init__()

    def forward(self, query, key, value, attention_mask, *, attn_mask_type, qkv_format="sbhd", cu_seqlens_q=None, **_unused) -> Tensor:
        from megatron_infimed.model.attention import _segments

        if qkv_format == "thd":
            assert attn_mask_type == "padding_causal"
            return _segments(query, key, value, cu_seqlens_q)
        assert attn_mask_type == "no_mask"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(2)


def apply_rotary_pos_emb(t, freqs, tensor_format, fused, cu_seqlens, cp_size, cp_rank) -> Tensor:
    assert tensor_format == "thd" and fused and cp_size == 1
    angles = freqs[torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])].squeeze(1)
    first, second = t.chunk(2, -1)
    return t * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class _Anything(types.ModuleType):
    """Parts that Megatron-Core names when it is imported and that our models never use."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def install() -> None:
    """The stand-in. What it does not have (its Adam, say) Megatron-Core replaces, as it does for an old Transformer Engine."""

    def module(name: str, kind: type = types.ModuleType, **members: object) -> None:
        made = kind(name)
        made.__spec__, made.__path__ = ModuleSpec(name, None, is_package=True), []
        vars(made).update(members)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, made)
        sys.modules[name] = made

    module("transformer_engine", __version__="2.11.0")
    module("transformer_engine.common")
    module("transformer_engine.common.recipe", _Anything)
    parts = (Linear, LayerNormLinear, LayerNorm, RMSNorm, DotProductAttention)
    module("transformer_engine.pytorch", GroupedLinear=nn.Module, **{part.__name__: part for part in parts})
    module("transformer_engine.pytorch.attention")
    module("transformer_engine.pytorch.attention.rope", apply_rotary_pos_emb=apply_rotary_pos_emb)
    for name in ("ops", "distributed", "fp8", "router", "tensor"):
        module(f"transformer_engine.pytorch.{name}", _Anything)


def names(folder: Path) -> None:
    """FOLDER/RANK.json: what local layers and the stand-in's write, tied and untied: [key, whole shape, place, own shape]."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    from megatron_infimed.config import Recipe
    from megatron_infimed.model.infimed import InfiMed
    from megatron_infimed.parallel import cpu, groups

    def entries(value: object) -> list:
        if isinstance(value, ShardedTensorFactory):
            value = value.build()
        if isinstance(value, dict | list | tuple):
            return [found for item in (value.values() if isinstance(value, dict) else value) for found in entries(item)]
        if isinstance(value, ShardedObject):
            return [(value.key, value.global_shape, value.global_offset)]
        return [(value.key, value.global_shape, value.global_offset, value.local_shape)]  # type: ignore[attr-defined]

    out: dict[str, list] = {}
    for tied in (True, False):
        for layers in ("local", "transformer_engine"):
            model = {**runs.RECIPE["model"], "language": {**runs.RECIPE["model"]["language"], "tied_embeddings": tied}}
            settings = Recipe.model_validate(
                {**runs.RECIPE, "model": model, "precision": {"layers": layers}, "parallel": {"tensor": groups.world_from_environment()[0]}}
            )
            ranks = groups.initialize(settings.parallel)
            with cpu.cuda_means_cpu():
                built = InfiMed(settings, ranks)
            fused = sum(isinstance(part, TELayerNormColumnParallelLinear) for part in built.modules())
            assert fused == (0 if layers == "local" else 2 * (2 + 4)), fused  # before attention and MLP of 2 vision and 4 language layers
            out[f"{layers} {tied}"] = sorted(entries(built.sharded_state_dict()))
    (folder / f"{ranks.rank}.json").write_text(json.dumps(out))
    groups.shut_down()


def train(recipe: str, all_overrides: list[list[str]]) -> None:
    from megatron_infimed.parallel import groups
    from megatron_infimed.recipe_files import load_recipe
    from megatron_infimed.train.trainer import fit

    for overrides in all_overrides:
        Linear.made.clear()
        fit(load_recipe(recipe, overrides))
        print("extra state", max(one.calls for one in Linear.made))
    groups.shut_down()


def as_program(*words: str, processes: int = 1) -> str:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "tests.unit.test_te_mapping", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_same_names_shapes_and_places_on_two_tensor_parallel_processes(tmp_path):
    as_program("names", str(tmp_path), processes=2)
    for rank in (json.loads((tmp_path / name).read_text()) for name in ("0.json", "1.json")):
        for tied in (True, False):
            local, te = ({tuple(map(str, entry)) for entry in rank[f"{layers} {tied}"]} for layers in ("local", "transformer_engine"))
            # Local linear layers write an empty extra state too, Transformer Engine's norms one more.
            assert {key for key, *_ in local ^ te} == {
                f"language_model.decoder.{norm}._extra_state"
                for norm in ("final_layernorm", "layers.self_attention.q_layernorm", "layers.self_attention.k_layernorm")
            }
            keys = {key for key, *_ in te}
            assert {f"vision_tower.decoder.layers.{at}.layer_norm_{what}" for what in ("weight", "bias")
                    for at in ("self_attention.linear_qkv", "mlp.linear_fc1")} <= keys  # fmt: skip
            assert ("language_model.output_layer.weight" in keys) == (not tied)


def test_a_run_changes_its_layers_twice(tmp_path):
    recipe, kinds = runs.make_data(tmp_path), {"tied": "true", "untied": "false"}

    def both(name: str, steps: int, layers: str) -> list[tuple[Path, list[str]]]:
        settings = [f"max_steps={steps}", f"precision.layers={layers}"]
        return [(tmp_path / f"{name}_{kind}", [*settings, f"model.language.tied_embeddings={value}"]) for kind, value in kinds.items()]

    runs.train_all(recipe, [*both("whole", 8, "local"), *both("changed", 2, "local")])
    te = [[f"output={output}", *words] for steps in (4, 6) for output, words in both("changed", steps, "transformer_engine")]
    told = as_program("train", str(recipe), json.dumps(te))
    assert told.count("resumed from") == 4
    # 4 micro-batches a step: what Transformer Engine's modules have learnt in two steps is not forgotten when the run goes on.
    assert [line for line in told.splitlines() if line.startswith("extra")] == ["extra state 8"] * 2 + ["extra state 16"] * 2
    assert runs.train_all(recipe, both("changed", 8, "local")).count("resumed from") == 2
    for kind in kinds:
        assert runs.worst(runs.figures(tmp_path / f"changed_{kind}"), runs.figures(tmp_path / f"whole_{kind}")) < 2e-6  # worst seen: 1.9e-7


if __name__ == "__main__":
    install()
    if sys.argv[1] == "names":
        names(Path(sys.argv[2]))
    else:
        train(sys.argv[2], json.loads(sys.argv[3]))
