"""What each step trains on, worked out before the first one.

The stream of the mixture is split into the phases of the resolution schedule. Inside a phase every document has one length, text tokens +
images x tokens_per_image, known from the index alone; documents that cannot fit a row are cut or left out, with a reason; `packing.plan`
then puts the rest into rows, and steps are rows / batch.rows rounded up (the last batch of a phase is filled with empty rows, so nothing
is dropped and every batch has one resolution). All of it is a pure function of recipe and shards; saved_plan.py keeps it on disk, so that one
process works it out and all share it, and `fingerprint` says whether a run and its resumption agree. A Position (phase, packs consumed)
does not depend on the layout.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_infimed.config import DataConfig, PhaseConfig, Recipe
from megatron_infimed.data import packing
from megatron_infimed.data.bound import Bound, prove
from megatron_infimed.data.mixture import Stream, mix
from megatron_infimed.data.shards import CONTEXT, IMAGE, TARGET, Shard
from megatron_infimed.errors import UserError

log = logging.getLogger("megatron_infimed.data")
_SHOWN = 20  # ids written to the log for each phase; Phase.rejected and Phase.cut have them all


class Position(NamedTuple):
    """Where training stands: `packs` rows of phase `phase` are done. Before the first step: (0, 0)."""

    phase: int
    packs: int


class Rejected(NamedTuple):
    """A document left out of a phase, and why; `times` counts how often the mixture had asked for it."""

    source: int
    document: int
    id: str
    reason: str
    times: int


@dataclass(frozen=True)
class Phase:
    """One entry of the resolution schedule, packed.

    Attributes:
        source, document: int32 [documents], in the order of the rows.
        offsets: int64 [rows + 1]; row r holds the documents offsets[r] to offsets[r + 1].
        kept_values: (source, document) -> leading values of the Document kept, where it was cut to fit.
        rejected: documents left out. cut: ids of the documents cut, once each.
        row_tokens, row_images: int32 [rows], what each row holds. row_pairs: int64 [rows], what its attention looks at: the sum of
            l (l + 1) / 2 over its documents of l tokens.
        fill: share of the rows' tokens that is not padding. bound: what no plan can do better than.
        lost: documents that are neither in a row nor rejected; 0, or planning has a bug.
    """

    number: int
    image_size: int
    tokens_per_image: int
    source: NDArray[np.int32]
    document: NDArray[np.int32]
    offsets: NDArray[np.int64]
    batch_rows: int
    row_tokens: NDArray[np.int32]
    row_images: NDArray[np.int32]
    row_pairs: NDArray[np.int64]
    fill: float
    bound: Bound
    lost: int
    kept_values: dict[tuple[int, int], int] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def steps(self) -> int:
        return -(-self.rows // self.batch_rows)

    def row(self, number: int) -> list[tuple[int, int]]:
        """(source, document) of each document in a row; none past the last row."""
        if number >= self.rows:
            return []
        span = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return list(zip(self.source[span].tolist(), self.document[span].tolist(), strict=True))


@dataclass(frozen=True)
class Schedule:
    phases: list[Phase]

    @cached_property
    def total_steps(self) -> int:
        return sum(p.steps for p in self.phases)

    @cached_property
    def fingerprint(self) -> str:
        """The same for two schedules only if every step trains on the same documents at the same resolution."""
        digest = hashlib.blake2b(digest_size=16)
        for p in self.phases:
            digest.update(repr((p.image_size, p.tokens_per_image, p.batch_rows, sorted(p.kept_values.items()))).encode())
            for array in (p.source, p.document, p.offsets):
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def locate(self, step: int) -> tuple[int, int]:
        """(phase, first row) of a step, counted from 0."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside the schedule's {self.total_steps} steps")
        for p in self.phases:
            if step < p.steps:
                return p.number, step * p.batch_rows
            step -= p.steps
        raise AssertionError("unreachable")

    def position_after(self, step: int) -> Position:
        """The position once steps 0 to `step` are done; -1 gives the start."""
        if step < 0:
            return Position(0, 0)
        phase, first = self.locate(step)
        return Position(phase, min(first + self.phases[phase].batch_rows, self.phases[phase].rows))

    def step_at(self, position: Position) -> int:
        """The step that comes next at a position: the inverse of `position_after`, plus one. total_steps when all is done.

        Raises:
            UserError: when no step begins there, because batch.rows or the data have changed.
        """
        phase, packs = position
        if not 0 <= phase < len(self.phases) or not 0 <= packs <= self.phases[phase].rows:
            sizes = [p.rows for p in self.phases]
            raise UserError(
                f"position (phase {phase}, packs {packs}) is outside this schedule's rows {sizes}: its data or schedule changed"
            )
        p = self.phases[phase]
        if packs % p.batch_rows and packs != p.rows:
            raise UserError(
                f"position (phase {phase}, packs {packs}) is not a whole step of batch.rows {p.batch_rows}: batch.rows has changed"
            )
        return sum(q.steps for q in self.phases[:phase]) + -(-packs // p.batch_rows)


def build_schedule(recipe: Recipe, shards: Sequence[Shard], prove_seconds: float = 0.0) -> Schedule:
    """Mixes, splits and packs; logs one line a phase, and every document left out or cut.

    Args:
        recipe: data, schedule and batch are read.
        shards: one for each of `recipe.data.sources`, in that order.
        prove_seconds: spent for each phase to prove how near the best plan it is; 0 only compares the sums.

    Raises:
        UserError: an empty mixture or phase, or an overlong document under `overlong: error`.
    """
    stream = mix(recipe.data, [len(s) for s in shards])
    bounds = [0, *(round(p.until * len(stream)) for p in recipe.schedule)]
    catalogue = _Catalogue(shards)
    phases = []
    for number, phase in enumerate(recipe.schedule):
        span = slice(bounds[number], bounds[number + 1])
        part = Stream(stream.source[span], stream.document[span])
        if not len(part):
            raise UserError(f"schedule[{number}]: until {phase.until} gives the phase none of the mixture's {len(stream)} documents")
        phases.append(_pack(number, phase, part, catalogue, recipe.data, recipe.batch.rows, prove_seconds))
        _report(phases[-1], len(part))
    return Schedule(phases)


class _Catalogue:
    """Text tokens and images of every document of every shard, end to end."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards
        self.base = np.cumsum([0, *(len(s) for s in shards)])[:-1]
        self.text = np.concatenate([np.asarray(s.text_lengths) for s in shards], dtype=np.int32)
        self.images = np.concatenate([np.asarray(s.image_counts) for s in shards], dtype=np.int32)


def _pack(
    number: int, phase: PhaseConfig, part: Stream, catalogue: _Catalogue, data: DataConfig, batch_rows: int, prove_seconds: float
) -> Phase:
    place = catalogue.base[part.source] + part.document
    images = catalogue.images[place]
    lengths = catalogue.text[place] + images * phase.tokens_per_image
    fits = lengths <= data.capacity
    if data.max_images is not None:
        fits &= images <= data.max_images
    misfits = _Misfits()
    where = np.flatnonzero(~fits)
    if len(where):
        _, first, which, times = np.unique(place[where], return_index=True, return_inverse=True, return_counts=True)
        once = where[first]  # a document that the mixture repeats is looked at once
        for i, n in zip(once.tolist(), times.tolist(), strict=True):
            source, document = int(part.source[i]), int(part.document[i])
            shard, reason = catalogue.shards[source], _too_big(int(lengths[i]), int(images[i]), phase, data)
            if data.overlong == "error":
                more = f", nor do {len(once) - 1} others" if len(once) > 1 else ""
                raise UserError(
                    f"{data.sources[source].prefix} {shard.record_id(document)} does not fit a row: {reason}{more}; "
                    "raise the limit, or set data.overlong to cut or reject"
                )
            fit = _cut(*shard.runs(document), phase.tokens_per_image, data) if data.overlong == "cut" else None
            if fit is not None:
                misfits.kept_values[source, document], lengths[i], images[i] = fit
                misfits.cut.append(shard.record_id(document))
                fits[i] = True
            else:
                even = ", even with its first exchange alone" if data.overlong == "cut" else ""
                misfits.rejected.append(Rejected(source, document, shard.record_id(document), reason + even, n))
        for array in (lengths, images, fits):
            array[where] = array[once][which]
    kept = np.flatnonzero(fits)
    if not len(kept):
        raise UserError(f"schedule[{number}]: none of {len(part)} documents fits a row of {data.capacity} tokens; raise data.capacity")
    del place, fits
    lengths, images = lengths[kept], images[kept]
    padded = -(-lengths // data.document_alignment) * data.document_alignment
    plan = packing.plan(padded, images, capacity=data.capacity, max_images=data.max_images, seed=data.seed + number)
    order = kept[plan.order]
    placed = np.zeros(len(part), bool)
    placed[order] = True
    laid = lengths[plan.order]
    return Phase(
        number=number,
        image_size=phase.image_size,
        tokens_per_image=phase.tokens_per_image,
        source=part.source[order],
        document=part.document[order],
        offsets=plan.offsets,
        batch_rows=batch_rows,
        row_tokens=np.add.reduceat(laid, plan.offsets[:-1], dtype=np.int32),
        row_images=np.add.reduceat(images[plan.order], plan.offsets[:-1], dtype=np.int32),
        row_pairs=np.add.reduceat(np.multiply(laid, laid + 1, dtype=np.int64), plan.offsets[:-1]) // 2,
        fill=packing.fill(lengths, plan, data.capacity),
        bound=prove(padded, images, data.capacity, data.max_images, rows=len(plan), seconds=prove_seconds),
        lost=len(kept) - int(placed.sum()),
        kept_values=misfits.kept_values,
        cut=misfits.cut,
        rejected=misfits.rejected,
    )


@dataclass
class _Misfits:
    kept_values: dict[tuple[int, int], int] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def _too_big(length: int, images: int, phase: PhaseConfig, data: DataConfig) -> str:
    parts = []
    if length > data.capacity:
        parts.append(f"{length} tokens with {images} images x {phase.tokens_per_image} are more than data.capacity {data.capacity}")
    if data.max_images is not None and images > data.max_images:
        parts.append(f"{images} images are more than data.max_images {data.max_images}")
    return " and ".join(parts)


def _cut(values: np.ndarray, modes: np.ndarray, tokens_per_image: int, data: DataConfig) -> tuple[int, int, int] | None:
    """The longest run of whole exchanges from the beginning that fits: (values kept, length, images), or None.

    An exchange ends where target tokens are followed by context tokens (an image there would still belong to the answer).

    Args:
        values, modes: of the document, as Shard.runs gives them.
    """
    is_image = modes == IMAGE
    lengths, images = np.cumsum(np.where(is_image, tokens_per_image, values)), np.cumsum(is_image)
    followed_by = np.append(modes[1:], CONTEXT)
    fits = (modes == TARGET) & (followed_by == CONTEXT) & (lengths <= data.capacity)
    if data.max_images is not None:
        fits &= images <= data.max_images
    if not fits.any():
        return None
    last = int(np.flatnonzero(fits)[-1])
    return int(values[: last + 1].sum()), int(lengths[last]), int(images[last])


def _report(phase: Phase, documents: int) -> None:
    left_out = sum(r.times for r in phase.rejected)
    log.info(
        "phase %d: %d px, %d tokens an image: %d documents in %d rows (at least %d), fill %.2f %%, %d steps, %d cut, %d left out",
        *(phase.number, phase.image_size, phase.tokens_per_image, documents - left_out, phase.rows, phase.bound.rows),
        *(100 * phase.fill, phase.steps, len(phase.cut), left_out),
    )
    for r in phase.rejected[:_SHOWN]:
        log.warning("phase %d leaves out %s: %s", phase.number, r.id, r.reason)
    if len(phase.rejected) > _SHOWN:
        log.warning("phase %d leaves out %d more documents", phase.number, len(phase.rejected) - _SHOWN)
    if phase.cut:
        more = f" and {len(phase.cut) - _SHOWN} more" if len(phase.cut) > _SHOWN else ""
        log.warning(
            "phase %d cuts %d documents to whole exchanges: %s%s", phase.number, len(phase.cut), ", ".join(phase.cut[:_SHOWN]), more
        )
