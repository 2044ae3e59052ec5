"""What a recipe will train on: for each phase of the schedule how many steps, and what an average global batch holds.

From the saved plan where there is one, exactly. Else from the lengths in the shards, taking rows to be 99 % full. Else from a
document that the user describes, as many as they say or as make a billion tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_infimed.config import PhaseConfig, Recipe
from megatron_infimed.counts import Counts
from megatron_infimed.data.mixture import shares
from megatron_infimed.data.saved_plan import plan_key, plan_of
from megatron_infimed.data.shards import Shard, shard_file
from megatron_infimed.errors import UserError

FILL = 0.99
"""Share of the rows' tokens that documents fill, where no plan says it."""
BILLION = 10**9


@dataclass(frozen=True)
class Described:
    """Documents nobody has seen yet. All text is trained on."""

    documents: int | None = None
    """None: as many as make a billion tokens."""
    text_tokens: int = 256
    images: float = 1.0


@dataclass(frozen=True)
class Load:
    phase: PhaseConfig
    steps: int
    counts: Counts
    """Of an average global batch."""

    @property
    def tokens(self) -> int:
        """Text and image tokens of all steps."""
        return self.steps * (self.counts.text_tokens + self.counts.image_tokens)


@dataclass(frozen=True)
class Workload:
    loads: list[Load]
    source: str
    """Where the figures are from, in words."""

    @property
    def steps(self) -> int:
        return sum(load.steps for load in self.loads)

    @property
    def tokens(self) -> int:
        return sum(load.tokens for load in self.loads)


def workload(recipe: Recipe, described: Described) -> Workload:
    """From the plan, the shards, or the description, in this order."""
    sources = recipe.data.sources
    if sources and all(shard_file(s.prefix, "json").exists() for s in sources) and described.documents is None:
        shards = [Shard(s.prefix) for s in sources]
        saved = Path(recipe.output) / "plan" / plan_key(recipe, shards)
        found = _planned(recipe, shards) if (saved / "plan.json").exists() else _packed(recipe, shards)
    else:
        found = _described(recipe, described)
    return replace(found, loads=list(_stopped(found.loads, recipe.max_steps)))


@dataclass(frozen=True)
class _Sums:
    """Of a phase's documents."""

    documents: float
    tokens: float
    images: float
    pairs: float
    target_share: float
    """Of text tokens."""


def _planned(recipe: Recipe, shards: Sequence[Shard]) -> Workload:
    share = _target_share(shards)
    loads = [
        _load(recipe, phase, _Sums(len(p.document), p.row_tokens.sum(), p.row_images.sum(), p.row_pairs.sum(), share), p.rows)
        for phase, p in zip(recipe.schedule, plan_of(recipe, shards).phases, strict=True)
    ]
    return Workload(loads, "exact, from the saved plan")


def _packed(recipe: Recipe, shards: Sequence[Shard]) -> Workload:
    data, loads = recipe.data, []
    drawn = shares(data.sources, [len(s) for s in shards], data.documents or 0)
    for phase, part in _parts(recipe):
        sums = np.zeros(4)
        for shard, documents in zip(shards, drawn, strict=True):
            images = np.asarray(shard.image_counts, np.int64)
            length = np.minimum(np.asarray(shard.text_lengths, np.int64) + images * phase.tokens_per_image, data.capacity)
            sums += documents * part * np.array([1, length.mean(), images.mean(), (length * (length + 1) // 2).mean()])
        loads.append(_load(recipe, phase, _Sums(*sums.tolist(), target_share=_target_share(shards))))
    return Workload(loads, f"from the lengths in the shards; rows taken to be {FILL:.0%} full (`plan` makes it exact)")


def _described(recipe: Recipe, described: Described) -> Workload:
    text, images = described.text_tokens, described.images
    lengths = [text + images * p.tokens_per_image for p in recipe.schedule]
    if max(lengths) > recipe.data.capacity:
        raise UserError(
            f"a document of {text} text tokens and {images:g} images x {recipe.schedule[-1].tokens_per_image} tokens is longer than "
            f"data.capacity {recipe.data.capacity}: lower --tokens-a-document or --images-a-document"
        )
    parts = [part for _, part in _parts(recipe)]
    documents = described.documents or BILLION / sum(n * part for n, part in zip(lengths, parts, strict=True))
    loads = [
        _load(
            recipe, phase, _Sums(documents * part, documents * part * n, documents * part * images, documents * part * n * (n + 1) / 2, 1)
        )
        for phase, part, n in zip(recipe.schedule, parts, lengths, strict=True)
    ]
    how_many = f"{documents:,.0f} documents" + ("" if described.documents else ", a billion tokens,")
    return Workload(loads, f"assumed: {how_many} of {text} text tokens and {images:g} images; rows taken to be {FILL:.0%} full")


def _parts(recipe: Recipe) -> Iterable[tuple[PhaseConfig, float]]:
    """Each phase and its share of the documents."""
    begin = 0.0
    for phase in recipe.schedule:
        yield phase, phase.until - begin
        begin = phase.until


def _target_share(shards: Sequence[Shard]) -> float:
    return sum(s.manifest["target_tokens"] for s in shards) / max(1, sum(s.manifest["text_tokens"] for s in shards))


def _load(recipe: Recipe, phase: PhaseConfig, sums: _Sums, rows: float | None = None) -> Load:
    data, batch = recipe.data, recipe.batch
    if rows is None:
        rows = max(sums.tokens / (data.capacity * FILL), sums.images / (data.max_images or float("inf")))
    steps = max(1, -int(-rows // batch.rows))
    image_tokens = sums.images * phase.tokens_per_image
    text, padding = sums.tokens - image_tokens, max(0, batch.rows * data.capacity - round(sums.tokens / steps))
    counts = Counts(
        documents=round(sums.documents / steps),
        text_tokens=round(text / steps),
        image_tokens=round(image_tokens / steps),
        target_tokens=round(text * sums.target_share / steps),
        padding=padding,
        images=round(sums.images / steps),
        pairs=round(sums.pairs / steps),
        padding_pairs=round(padding * (padding / batch.rows + 1) / 2),
    )
    return Load(phase, steps, counts)


def _stopped(loads: list[Load], max_steps: int | None) -> Iterable[Load]:
    left = max_steps if max_steps is not None else sum(load.steps for load in loads)
    for load in loads:
        if left > 0:
            yield replace(load, steps=min(load.steps, left))
        left -= load.steps
