"""Every setting of the system: one frozen tree, the Recipe. recipe_files.py reads it from YAML.

Nothing here reads data, imports torch or knows about processes: derived numbers (steps, rows) belong to the parts that compute them.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


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
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what each language layer adds to the residual, in training. SigLIP and Qwen3 have none."""


class TrainableConfig(_Section):
    """Which parts learn. A frozen part keeps its weights bit for bit and costs no gradient memory."""

    vision: bool = False
    projector: bool = True
    language: bool = True


class ParallelConfig(_Section):
    """Sizes of the parallel groups; data parallelism is what the number of processes leaves over."""

    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    virtual: int = Field(default=1, gt=0)
    """Pieces of the model on each pipeline rank, visited in turn (interleaved 1F1B): a smaller pipeline bubble."""
    context: int = Field(default=1, gt=0)
    """Ranks that share the tokens of a row (and its images)."""
    sequence: bool = False
    """Megatron's sequence parallelism inside the tensor parallel group."""
    first_stage_layers: int | None = Field(default=None, gt=0)
    """Language layers on the first pipeline stage, which also holds the tower; null divides evenly."""
    overlap: bool = False
    """Gradients are reduced and weights gathered while the layers compute."""
    balance: bool = True
    """Rows of a global batch go to the data parallel ranks by what they cost, not by their number."""

    @property
    def model_parallel(self) -> int:
        """Processes that together hold one copy of the model and of a row."""
        return self.tensor * self.pipeline * self.context


class RecomputeConfig(_Section):
    """What each part computes again in the backward pass instead of keeping it."""

    language: Literal["none", "mlp", "full"] = "none"
    vision: Literal["none", "full"] = "none"


class PrecisionConfig(_Section):
    params: Literal["float32", "bfloat16"] = "bfloat16"
    fp8: Literal["off", "delayed", "tensorwise", "blockwise"] = "off"
    """FP8 recipe of Transformer Engine (tensorwise: current scaling); needs the h100 extra."""
    fp8_parts: tuple[Literal["language", "vision"], ...] = Field(default=("language",), min_length=1)
    fp8_first: int = Field(default=0, ge=0)
    """Language layers at the beginning that stay in bfloat16."""
    fp8_last: int = Field(default=0, ge=0)
    """Language layers at the end that stay in bfloat16."""
    layers: Literal["auto", "transformer_engine", "local"] = "auto"
    """auto: Transformer Engine where it and a GPU are there."""
    recompute: RecomputeConfig = RecomputeConfig()
    """A single word, none or full, holds for both parts."""

    @field_validator("fp8", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false

    @field_validator("recompute", mode="before")
    @classmethod
    def _both(cls, value: Any) -> Any:
        return {"language": value, "vision": value} if isinstance(value, str) else value


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
    prefetch: int = Field(default=8, gt=0)
    """Micro-batches read and decoded ahead of the training."""
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
    vision_images: int = Field(default=32, gt=0)
    """Images the tower takes at once; more go through it in turns."""
    loss_tokens: int = Field(default=512, gt=0)
    """Logits held at once are no more than those of this many target positions; fewer cost no extra communication."""

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
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints of steps that are a multiple of this are kept for good."""
    background: bool = False
    """Written by a thread while training goes on; the last one is waited for."""


class GuardsConfig(_Section):
    """What happens when training goes wrong."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop, or leave the step out. The documents are named either way."""
    spike: float | None = Field(default=None, gt=0)
    """A loss this many robust deviations above the median of the last `window` steps is a spike; null does not look."""
    spike_action: Literal["warn", "skip", "stop"] = "warn"
    window: int = Field(default=64, ge=8)
    max_skips: int = Field(default=10, gt=0)
    """Steps left out in a row before the run stops."""
    hang_minutes: float = Field(default=10.0, ge=0)
    """Without progress for so long, every process says where it is, and the late one is named; 0 does not watch."""
    timeout_minutes: float = Field(default=30.0, gt=0)
    """A collective that takes longer ends the run."""


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
    """A checkpoint, or a run directory whose newest checkpoint gives the weights. null: fresh weights."""
    init_optimizer: bool = False
    """Take the optimizer's moments from init_from too; the same parts must be trainable there."""
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
    guards: GuardsConfig = GuardsConfig()
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
            not p.sequence or d.capacity % (p.tensor * p.context) == 0,
            f"data.capacity: {d.capacity} is not divisible by parallel.tensor {p.tensor} x context {p.context} (parallel.sequence)",
        )
        require(
            p.context == 1 or d.document_alignment % (2 * p.context) == 0,
            f"data.document_alignment: {d.document_alignment} is not a multiple of {2 * p.context}, twice parallel.context",
        )
        if p.pipeline > 1:
            rest = lm.num_layers - (p.first_stage_layers or 0)
            stages = p.pipeline - (p.first_stage_layers is not None)
            require(
                rest > 0 and rest % (stages * p.virtual) == 0 and (p.first_stage_layers or 0) % p.virtual == 0,
                f"parallel.pipeline: {rest} language layers do not divide over {stages} stages"
                + (f" of parallel.virtual {p.virtual} pieces (nor may first_stage_layers {p.first_stage_layers})" if p.virtual > 1 else ""),
            )
        require(p.pipeline > 1 or p.virtual == 1, "parallel.virtual: only with parallel.pipeline > 1")
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
        require(
            self.precision.fp8 != "delayed" or not (self.precision.fp8_first or self.precision.fp8_last),
            "precision.fp8_first: Megatron-Core keeps layers in bfloat16 with fp8 tensorwise or blockwise alone, not with delayed",
        )
        ends = max(self.precision.fp8_first, self.precision.fp8_last)
        require(
            ends <= lm.num_layers // p.pipeline,
            f"precision.fp8_first, fp8_last: {ends} are more than the {lm.num_layers // p.pipeline} layers of a pipeline stage",
        )
        if self.precision.fp8 != "off" and "vision" in self.precision.fp8_parts:
            require(
                self.precision.fp8 != "blockwise",
                f"precision.fp8_parts: the tower's {v.ffn_hidden_size} and its patches are no multiples of 128, which blockwise needs",
            )
            require(
                self.precision.fp8 != "delayed" or self.trainable.vision,
                "precision.fp8_parts: a frozen tower never updates the scales of fp8 delayed; take tensorwise, or language alone",
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
        require(self.init_from is not None or not self.init_optimizer, "init_optimizer: needs init_from")
        require(any((self.trainable.vision, self.trainable.projector, self.trainable.language)), "trainable: nothing is")
        if world_size is not None:
            require(
                world_size % p.model_parallel == 0,
                f"parallel: tensor {p.tensor} x pipeline {p.pipeline} x context {p.context} does not divide {world_size} processes",
            )
            data_parallel = max(1, world_size // p.model_parallel)
            require(
                self.batch.rows % (self.batch.micro_rows * data_parallel) == 0,
                f"batch.rows: {self.batch.rows} is not a multiple of micro_rows {self.batch.micro_rows} x {data_parallel} data parallel processes",
            )
            micro = self.batch.rows // (self.batch.micro_rows * data_parallel)
            require(
                p.virtual == 1 or micro % p.pipeline == 0,
                f"parallel.virtual: {micro} micro-batches a process are not a multiple of parallel.pipeline {p.pipeline}",
            )
        return out
