"""Every setting of the system: one frozen tree, the Recipe.

A recipe is YAML. `base: other.yaml` (relative to the file) is loaded first and overlaid, mappings merged key by key, lists replaced;
`key.path=value` words from the command line come last. `load_recipe` then validates the whole tree at once and reports every problem with its
path. Nothing here reads data, imports torch or knows about processes: derived numbers (steps, rows) belong to the parts that compute them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megatron_infimed.errors import UserError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class VisionConfig(_Section):
    """A SigLIP tower. Defaults: SO400M/14-384."""

    image_size: int = Field(default=384, gt=0)
    """The size the position embeddings were trained at; other sizes interpolate them."""
    patch_size: int = Field(default=14, gt=0)
    hidden_size: int = Field(default=1152, gt=0)
    num_layers: int = Field(default=27, gt=1)
    num_heads: int = Field(default=16, gt=0)
    ffn_hidden_size: int = Field(default=4304, gt=0)
    layernorm_eps: float = Field(default=1e-6, gt=0)
    feature_layer: int = Field(default=-2, le=-1)
    """-1 takes the output of the last block, before the final norm; -2 that of the block before it. Later blocks are not built."""

    @property
    def built_layers(self) -> int:
        return self.num_layers + 1 + self.feature_layer

    @property
    def grid(self) -> int:
        """Patches along one side at the native size."""
        return self.image_size // self.patch_size


class LanguageConfig(_Section):
    """A Qwen3 decoder. Defaults: Qwen3-4B."""

    hidden_size: int = Field(default=2560, gt=0)
    num_layers: int = Field(default=36, gt=0)
    num_heads: int = Field(default=32, gt=0)
    num_kv_heads: int = Field(default=8, gt=0)
    head_dim: int = Field(default=128, gt=0)
    ffn_hidden_size: int = Field(default=9728, gt=0)
    vocab_size: int = Field(default=151936, gt=0)
    rope_theta: float = Field(default=1e6, gt=0)
    norm_eps: float = Field(default=1e-6, gt=0)
    max_positions: int = Field(default=40960, gt=0)
    """Written to the exported config; RoPE has no table to outgrow."""
    tied_embeddings: bool = True


class ModelConfig(_Section):
    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of fresh weights; null takes width ** -0.5 for each part (what small models from scratch need)."""


class TrainableConfig(_Section):
    """Which parts learn. A frozen part keeps its weights bit for bit and costs no gradient memory."""

    vision: bool = False
    projector: bool = True
    language: bool = True


class ParallelConfig(_Section):
    """Sizes of the parallel groups; data parallelism is what the number of processes leaves over."""

    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    sequence: bool = False
    """Megatron's sequence parallelism inside the tensor parallel group."""
    first_stage_layers: int | None = Field(default=None, gt=0)
    """Language layers on the first pipeline stage, which also holds the tower; null divides evenly."""

    @property
    def model_parallel(self) -> int:
        return self.tensor * self.pipeline


class PrecisionConfig(_Section):
    params: Literal["float32", "bfloat16"] = "bfloat16"
    fp8: Literal["off", "delayed", "tensorwise", "blockwise"] = "off"
    """FP8 recipe of Transformer Engine; needs the h100 extra."""
    layers: Literal["auto", "transformer_engine", "local"] = "auto"
    """auto: Transformer Engine where it and a GPU are there."""
    recompute: Literal["none", "full"] = "none"
    """full: recompute every layer's activations in the backward pass (tower and language model)."""

    @field_validator("fp8", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false


class SourceConfig(_Section):
    """One shard set of the mixture."""

    prefix: str
    """Path without suffix: PREFIX.text.bin, PREFIX.image.bin, PREFIX.json."""
    name: str | None = None
    """Seeds the order of its documents; null takes the prefix's last part, numbered where two sources share it."""
    weight: float | None = Field(default=None, gt=0)
    """Share of `data.documents` among the weighted sources. Give this or epochs."""
    epochs: float | None = Field(default=None, gt=0)
    """Times each document is seen (fractions allowed). Default 1 where weight is not given."""

    @model_validator(mode="after")
    def _one_of(self) -> SourceConfig:
        if self.weight is not None and self.epochs is not None:
            raise ValueError("give weight or epochs, not both")
        return self


class DataConfig(_Section):
    sources: tuple[SourceConfig, ...] = ()
    documents: int | None = Field(default=None, gt=0)
    """Documents drawn from the weighted sources together; needed when a source has a weight."""
    tokenizer: str = ""
    """Hugging Face folder or SentencePiece .model; its fingerprint must be that of the shards."""
    capacity: int = Field(default=4096, gt=0)
    """Tokens in a row, image tokens included."""
    max_images: int | None = Field(default=None, gt=0)
    """Images in a row at most: bounds the tower's memory."""
    alignment: int = Field(default=16, gt=0)
    """capacity must be a multiple; 16 suits FP8 (delayed, tensorwise), 128 its blockwise recipe."""
    document_alignment: int = Field(default=1, gt=0)
    """Documents begin at multiples of this in a row and are padded up to it; context parallelism needs 2 x its size."""
    overlong: Literal["cut", "reject", "error"] = "cut"
    """A document longer than a row: cut at a turn boundary, left out with a reason, or refused before training."""
    decoder: Literal["auto", "torch", "dali"] = "auto"
    """auto: DALI where it and a GPU are there, else simplejpeg + torch."""
    decode_threads: int = Field(default=2, gt=0)
    prefetch: int = Field(default=2, gt=0)
    """Batches read and decoded ahead of the step."""
    max_corrupt: int = Field(default=4, ge=0)
    """Corrupt images in one row that become gray before the run stops."""
    seed: int = 0

    @model_validator(mode="after")
    def _sources(self) -> DataConfig:
        if self.capacity % self.alignment:
            raise ValueError(
                f"capacity {self.capacity} is not a multiple of alignment {self.alignment}: "
                f"take {self.capacity // self.alignment * self.alignment or self.alignment}"
            )
        if self.capacity % self.document_alignment:
            raise ValueError(f"capacity {self.capacity} is not a multiple of document_alignment {self.document_alignment}")
        if any(s.weight is not None for s in self.sources) and self.documents is None:
            raise ValueError("a source has a weight, so data.documents must say how many documents the weights share out")
        names = [s.prefix for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("a prefix is listed twice: raise its weight or epochs instead")
        return self


class PhaseConfig(_Section):
    """One entry of the resolution schedule."""

    until: float = Field(gt=0, le=1)
    """Fraction of the mixture's documents at which the phase ends."""
    image_size: int = Field(gt=0)
    tokens_per_image: int = Field(gt=0)

    @field_validator("tokens_per_image")
    @classmethod
    def _square(cls, value: int) -> int:
        side = round(value**0.5)
        if side * side != value:
            raise ValueError(f"{value} is not a square: pooling makes a square grid, take {side * side} ({side}x{side})")
        return value


class OptimizerConfig(_Section):
    lr: float = Field(default=5e-5, gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, ge=0)
    """Global gradient norm is clipped to this; 0 does not clip (the norm is logged all the same)."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Fraction of the steps with linearly rising learning rate."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"

    @model_validator(mode="after")
    def _order(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class BatchConfig(_Section):
    rows: int = Field(default=256, gt=0)
    """Rows in a global batch; the same for every layout."""
    micro_rows: int = Field(default=1, gt=0)
    """Rows a process pushes through at once (they are laid end to end; documents stay isolated)."""

    @model_validator(mode="after")
    def _divides(self) -> BatchConfig:
        if self.rows % self.micro_rows:
            raise ValueError(f"rows {self.rows} is not a multiple of micro_rows {self.micro_rows}")
        return self


class CheckpointConfig(_Section):
    every: int = Field(default=500, ge=0)
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = Field(default=2, gt=0)
    """Newest checkpoints kept."""


class LogConfig(_Section):
    every: int = Field(default=10, gt=0)
    """Steps between printed lines; metrics.jsonl has every step."""
    tensorboard: bool = True


class Recipe(_Section):
    stage: str = "pretrain"
    """Name of the stage, for logs and the run directory."""
    output: str
    """Run directory."""
    init_from: str | None = None
    """A checkpoint, or a run directory whose newest checkpoint gives the weights (not the optimizer). null: fresh weights."""
    seed: int = 1234
    model: ModelConfig = ModelConfig()
    trainable: TrainableConfig = TrainableConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    schedule: tuple[PhaseConfig, ...] = Field(min_length=1)
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many steps although the schedule is not done (the learning rate still follows the whole schedule)."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, phases: tuple[PhaseConfig, ...]) -> tuple[PhaseConfig, ...]:
        ends = [p.until for p in phases]
        if any(b <= a for a, b in itertools.pairwise(ends)):
            raise ValueError(f"until must rise from phase to phase, got {ends}")
        if ends[-1] != 1.0:
            raise ValueError(f"the last phase must end at until: 1.0, got {ends[-1]}")
        return phases

    def problems(self, world_size: int | None = None) -> list[str]:
        """What cannot work although every value is legal by itself: one line each, with the path first. Empty when all is well."""
        v, lm, p, d, out = self.model.vision, self.model.language, self.parallel, self.data, []

        def require(ok: bool, text: str) -> None:
            if not ok:
                out.append(text)

        for name, value in (
            ("model.language.num_heads", lm.num_heads),
            ("model.language.num_kv_heads", lm.num_kv_heads),
            ("model.language.ffn_hidden_size", lm.ffn_hidden_size),
            ("model.language.vocab_size", lm.vocab_size),
            ("model.vision.num_heads", v.num_heads),
            ("model.vision.ffn_hidden_size", v.ffn_hidden_size),
        ):
            require(value % p.tensor == 0, f"{name}: {value} is not divisible by parallel.tensor {p.tensor}")
        require(
            lm.num_heads % lm.num_kv_heads == 0,
            f"model.language.num_heads: {lm.num_heads} is not a multiple of num_kv_heads {lm.num_kv_heads}",
        )
        require(lm.head_dim % 2 == 0, f"model.language.head_dim: {lm.head_dim} is odd; RoPE turns pairs")
        require(
            v.hidden_size % v.num_heads == 0,
            f"model.vision.hidden_size: {v.hidden_size} is not a multiple of num_heads {v.num_heads}",
        )
        require(v.built_layers >= 1, f"model.vision.feature_layer: {v.feature_layer} leaves none of {v.num_layers} layers")
        require(not p.sequence or p.tensor > 1, "parallel.sequence: needs parallel.tensor > 1")
        require(
            not p.sequence or d.capacity % p.tensor == 0,
            f"data.capacity: {d.capacity} is not divisible by parallel.tensor {p.tensor} (parallel.sequence)",
        )
        if p.pipeline > 1:
            rest = lm.num_layers - (p.first_stage_layers or 0)
            stages = p.pipeline - (p.first_stage_layers is not None)
            require(
                rest > 0 and rest % stages == 0,
                f"parallel.pipeline: {rest} language layers do not divide over {stages} stages",
            )
        require(
            p.pipeline > 1 or p.first_stage_layers is None,
            "parallel.first_stage_layers: only with parallel.pipeline > 1",
        )
        wanted = {"off": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128}[self.precision.fp8]
        require(
            d.alignment % wanted == 0,
            f"data.alignment: {d.alignment} is not a multiple of {wanted}, which precision.fp8={self.precision.fp8} needs",
        )
        require(
            self.precision.fp8 == "off" or self.precision.layers != "local",
            "precision.fp8: needs precision.layers transformer_engine, not local",
        )
        for i, phase in enumerate(self.schedule):
            grid, side = phase.image_size // v.patch_size, round(phase.tokens_per_image**0.5)
            require(
                grid >= side,
                f"schedule[{i}].tokens_per_image: {phase.tokens_per_image} needs {side}x{side} patches, {phase.image_size} px give {grid}x{grid}",
            )
            require(
                phase.tokens_per_image < d.capacity,
                f"schedule[{i}].tokens_per_image: {phase.tokens_per_image} does not fit data.capacity {d.capacity}",
            )
        require(any((self.trainable.vision, self.trainable.projector, self.trainable.language)), "trainable: nothing is")
        if world_size is not None:
            require(
                world_size % p.model_parallel == 0,
                f"parallel: tensor {p.tensor} x pipeline {p.pipeline} does not divide {world_size} processes",
            )
            data_parallel = max(1, world_size // p.model_parallel)
            require(
                self.batch.rows % (self.batch.micro_rows * data_parallel) == 0,
                f"batch.rows: {self.batch.rows} is not a multiple of micro_rows {self.batch.micro_rows} x {data_parallel} data parallel processes",
            )
        return out


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overlays and validates a recipe.

    Args:
        path: YAML file; `base:` names another one, relative to it.
        overrides: words `a.b.c=value`; the value is YAML, so `data.sources=[{prefix: x}]` works.

    Raises:
        UserError: listing every problem with its path.
    """
    tree = _read(Path(path), ())
    for word in overrides:
        _override(tree, word)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as e:
        lines = [f"  {_where(err['loc'])}: {err['msg'].removeprefix('Value error, ')}" for err in e.errors()]
    else:
        lines = [f"  {line}" for line in recipe.problems()]
        if not lines:
            return recipe
    raise UserError("\n".join([f"{path}: {len(lines)} problem{'s' if len(lines) > 1 else ''} in the recipe", *lines]))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; load_recipe reads it back to an equal Recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: base refers back to itself: {' -> '.join(str(p) for p in (*seen, path.resolve()))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot read the recipe ({e.strerror}); launch/recipes/ holds those that ship") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, this is {type(tree).__name__}")
    base = tree.pop("base", None)
    return _overlay(_read(path.parent / str(base), (*seen, path.resolve())), tree) if base is not None else tree


def _overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(under)
    for key, value in over.items():
        out[key] = _overlay(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _override(tree: dict[str, Any], word: str) -> None:
    path, sign, text = word.partition("=")
    if not sign or not path:
        raise UserError(f"{word!r}: an override is key.path=value, for example optimizer.lr=2e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"{word!r}: the value is not YAML: {' '.join(str(e).split())}") from None
    *parents, leaf = path.split(".")
    node: Any = tree
    for i, key in enumerate(parents):
        node = _step(node, key, parents[: i + 1], word)
    if isinstance(node, list):
        node[_index(node, leaf, word)] = value
    else:
        node[leaf] = value


def _step(node: Any, key: str, path: list[str], word: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, word)]
    child = node.setdefault(key, {})
    if child is None:
        child = node[key] = {}
    if not isinstance(child, dict | list):
        raise UserError(f"{word!r}: {'.'.join(path)} is a value, it has no keys below it")
    return child


def _index(node: list[Any], key: str, word: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"{word!r}: {key!r} is not one of the list's places 0 to {len(node) - 1}")
    return int(key)


def _where(loc: tuple[int | str, ...]) -> str:
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc)
    return text.lstrip(".") or "recipe"
