"""What happens when a step goes wrong: a loss or gradient that is not finite, a loss far above those before it.

`Guards.judge` sees the loss of the global batch and the norm of its gradient, before the update. Every process has the same two numbers and
the same past, so all decide alike without asking one another. What it remembers goes into the checkpoint: a resumed run decides alike too.

`name_culprits` then finds the documents that made a step non-finite. All processes together push each micro-batch through again by itself,
without reducing gradients; a bad one is halved, and its bad halves again, until single documents are left (`narrow`). What is left out of a
half keeps its place in the row but says nothing: its tokens become a token of the half, its images gray, its targets no targets. So the
shapes are those of the step, which pipeline stages count on, and a number format whose scale a bad document spoils for its whole row does
not blame its neighbours.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_infimed.config import GuardsConfig
from megatron_infimed.data.batch import PackedBatch, image_block
from megatron_infimed.errors import UserError
from megatron_infimed.parallel.groups import Ranks, gather

T = TypeVar("T")
_Document = tuple[int, int]
"""(source, document), as in PackedBatch.documents."""
NAMED = 20
"""Documents that a message names; suspects.jsonl has all."""
HALVED = 4
"""Bad micro-batches of one data parallel rank that are taken apart: where there are more, hardly their documents are to blame."""
FLAT = 0.01
"""A robust deviation is at least this share of the median: the noise of a flat loss is no spike."""


@dataclass(frozen=True)
class Verdict:
    action: Literal["apply", "skip", "stop"]
    reason: str | None = None
    """One line; also where a spike is applied after a warning."""
    kind: Literal["nonfinite", "spike"] | None = None


class Guards:
    """Decides about each step; see the top of the file.

    Args:
        recent: what `state()` gave when the checkpoint was saved.
    """

    def __init__(self, settings: GuardsConfig, recent: Sequence[float] = ()) -> None:
        self.settings = settings
        self.recent = deque(recent, maxlen=settings.window)
        self.in_a_row = 0
        """Steps left out since the last one that was applied."""

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """What to do with a step of this loss and gradient norm (before clipping); the same on every process."""
        verdict = self._judge(loss, grad_norm)
        if verdict.action == "apply":
            self.recent.append(loss)
            self.in_a_row = 0
            return verdict
        self.in_a_row += 1
        if verdict.action == "skip" and self.in_a_row > self.settings.max_skips:
            return replace(
                verdict, action="stop", reason=f"{verdict.reason}, one more than guards.max_skips {self.settings.max_skips} in a row"
            )
        return verdict

    def reset(self) -> None:
        """Forgets the losses so far: at a change of phase the loss rises for good reason."""
        self.recent.clear()

    def state(self) -> list[float]:
        """The losses of the last `window` steps that were applied, for the checkpoint."""
        return list(self.recent)

    def _judge(self, loss: float, grad_norm: float) -> Verdict:
        settings = self.settings
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            found = f"loss {loss:.4g}, grad_norm {grad_norm:.4g}: not finite"
            if settings.nonfinite == "skip":
                return Verdict("skip", f"{found}; step left out", "nonfinite")
            remedy = "start it again with guards.nonfinite=skip, or a new output from this one (init_from) with a lower optimizer.lr"
            return Verdict("stop", f"{found}; {remedy}", "nonfinite")
        if settings.spike is None or len(self.recent) < settings.window / 2:
            return Verdict("apply")
        median = statistics.median(self.recent)
        deviation = max(1.4826 * statistics.median(abs(x - median) for x in self.recent), FLAT * abs(median))
        if loss <= median + settings.spike * deviation:
            return Verdict("apply")
        found = (
            f"loss {loss:.4g} is {(loss - median) / max(deviation, 1e-12):.1f} robust deviations ({deviation:.3g}) above {median:.4g}, "
            f"the median of {len(self.recent)} steps (guards.spike {settings.spike:g})"
        )
        if settings.spike_action == "warn":
            return Verdict("apply", f"{found}; applied", "spike")
        if settings.spike_action == "skip":
            return Verdict("skip", f"{found}; step left out", "spike")
        remedy = "start it again with another guards.spike_action, or a new output from this one (init_from) with a lower optimizer.lr"
        return Verdict("stop", f"{found}; {remedy}", "spike")


def name_culprits(
    pieces: Sequence[DistributedDataParallel],
    batches: Iterable[PackedBatch],
    forward_backward: Callable[[Sequence[PackedBatch]], list[dict[str, Tensor]]],
    ranks: Ranks,
    name: Callable[[int, int], str],
    path: Path,
    step: int,
) -> str:
    """One line that says what made a step non-finite. All processes call it together, before the gradient buffers are used again.

    Weights and the optimizer stay as they are, and the gradient buffers are zero afterwards. (Random states nobody relies on: dropout masks
    are a function of their place, see step.forward_step.)

    Args:
        pieces: those of the model that this process holds.
        batches: this process's micro-batches of the step, rows whole (also under context parallelism).
        forward_backward: pushes micro-batches through; on the last stage each gives a dict with `loss_sum`.
        name: (source, document) -> what to call a document; never its text.
        path: one JSON line for each group of suspects is appended here: a single document is bad by itself, several
            only together, or they were not taken apart.
        step: counted from 1, as metrics.jsonl does.

    Raises:
        UserError: on all processes, where weights are not finite already.
    """
    for piece in pieces:
        piece.zero_grad_buffer()
        if piece.ddp_config.overlap_param_gather:
            piece.start_param_sync(force_sync=True)  # else the next forward would gather weights, whenever each process comes to it
    modules = [cast(torch.nn.Module, piece.module) for piece in pieces]
    mine = [f"rank {ranks.rank}: {n}" for module in modules for n, p in module.named_parameters() if not _finite(p.detach())]
    if weights := _from_all(mine):
        _append(path, ranks, [{"step": step, "weights": weights}])
        raise UserError(
            f"step {step}: weights are not finite ({', '.join(weights[:3])}{', ...' if len(weights) > 3 else ''}), so no document is to blame "
            "and no later step can go well: start a new output from an earlier checkpoint (init_from) with a lower optimizer.lr"
        )
    is_bad = partial(_is_bad, pieces, forward_backward, ranks)
    found: list[tuple[int, list[list[_Document]]]] = []
    number = 0
    for number, batch in enumerate(batches, 1):
        if groups := suspects(batch, is_bad, ranks.image_share, halve=len(found) < HALVED):
            found.append((number, groups))
    if not (ranks.first_stage and ranks.speaks):  # one process of those that hold the row
        found = []
    lines = _from_all(
        [
            {"step": step, "data_rank": ranks.data, "micro_batch": micro, "documents": [name(*document) for document in group]}
            for micro, groups in found
            for group in groups
        ]
    )
    _append(path, ranks, lines)
    return _in_words(lines, number * ranks.data_size, path)


@contextmanager
def no_reduction(pieces: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside, a backward pass leaves this process's own gradients in the buffers, and nothing travels between replicas.

    The buffers are zero at the beginning and after the end.
    """
    before = []
    for config in {id(piece.config): piece.config for piece in pieces}.values():
        # Megatron-Core's schedules leave a no_sync_func before their last micro-batch; ours below holds to the end.
        for hook in ("finalize_model_grads_func", "no_sync_func", "grad_sync_func", "param_sync_func"):
            before.append((config, hook, getattr(config, hook)))
            setattr(config, hook, None)
    try:
        with ExitStack() as stack:
            for piece in pieces:
                piece.zero_grad_buffer()  # before no_sync, which it would undo
                stack.enter_context(piece.no_sync())
            yield
    finally:
        for config, hook, value in before:
            setattr(config, hook, value)
        for piece in pieces:
            piece.zero_grad_buffer()


def suspects(
    batch: PackedBatch, is_bad: Callable[[PackedBatch], bool], share: tuple[int, int], halve: bool = True
) -> list[list[_Document]]:
    """Groups of documents that make a micro-batch bad, as small as can be; none where it is not bad."""
    if not is_bad(batch):
        return []
    whole = list(zip(spans_of(batch), itertools.chain(*batch.documents), strict=True))
    groups = narrow(lambda part: is_bad(only(batch, [span for span, _ in part], share)), whole) if halve else [whole]
    return [[document for _, document in group] for group in groups]


def narrow(is_bad: Callable[[list[T]], bool], parts: list[T]) -> list[list[T]]:
    """The smallest groups of `parts`, known to be bad together, that are still bad: single parts, or such as are bad only together."""
    if len(parts) < 2:
        return [parts]
    half = len(parts) // 2
    halves = parts[:half], parts[half:]
    return [group for part in halves if is_bad(part) for group in narrow(is_bad, part)] or [parts]


def spans_of(batch: PackedBatch) -> list[tuple[int, int]]:
    """[first position, end) of each document, in the order of `batch.documents`; padding at the end of a row is no document."""
    capacity, out = int(batch.cu_seqlens[-1]) // len(batch.documents), []
    cuts = batch.cu_seqlens.tolist()
    for row, documents in enumerate(batch.documents):
        first = cuts.index(row * capacity)
        out += [(cuts[i], cuts[i + 1]) for i in range(first, first + len(documents))]
    return out


def only(batch: PackedBatch, spans: Sequence[tuple[int, int]], share: tuple[int, int]) -> PackedBatch:
    """The same row in which only these spans [first position, end) say anything; see the top of the file. `share`: as the loader has it."""
    kept_T = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for start, end in spans:
        kept_T[start:end] = True
    pixels = batch.pixels
    if pixels is not None:
        kept_N = kept_T[batch.slots[:: batch.tokens_per_image][image_block(batch.counts.images, share)]]
        pixels = pixels * kept_N.to(pixels).view(-1, 1, 1, 1)
    tokens = torch.where(kept_T, batch.tokens, batch.tokens[kept_T][0])
    return replace(batch, tokens=tokens, loss_mask=batch.loss_mask * kept_T, pixels=pixels)


def _is_bad(
    pieces: Sequence[DistributedDataParallel],
    forward_backward: Callable[[Sequence[PackedBatch]], list[dict[str, Tensor]]],
    ranks: Ranks,
    batch: PackedBatch,
) -> bool:
    """Whether a micro-batch gives a loss or gradient that is not finite; all that hold its row ask together, and agree."""
    with no_reduction(pieces):  # interleaved schedules want whole turns of the pipeline: the same micro-batch as often
        sums = forward_backward([batch] * (ranks.pipeline_size if ranks.virtual_size > 1 else 1))
        buffers = [buffer for piece in pieces for buffer in cast(Any, piece).buffers]  # Megatron-Core's, which hide those of torch
        fine = all(_finite(s["loss_sum"]) for s in sums) and all(_finite(buffer.grad_data) for buffer in buffers)
    flag = torch.tensor(float(not fine), device=ranks.device)
    for group in (ranks.tensor_group, ranks.context_group, ranks.pipeline_group):
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return bool(flag)


def _finite(values: Tensor) -> bool:
    """aminmax passes NaN on, and makes no tensor as large as the gradients."""
    return not values.numel() or all(map(math.isfinite, torch.stack(torch.aminmax(values)).tolist()))


def _from_all(mine: list[Any]) -> list[Any]:
    """What all processes have, in the order of their ranks."""
    return [one for part in gather(mine) for one in part]


def _append(path: Path, ranks: Ranks, lines: list[dict[str, Any]]) -> None:
    if ranks.main and lines:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _in_words(lines: list[dict[str, Any]], micro_batches: int, path: Path) -> str:
    bad = len({(group["data_rank"], group["micro_batch"]) for group in lines})
    if not bad:
        return (
            f"none of the {micro_batches} micro-batches gives it again by itself: their gradients overflow only together, or a device erred; "
            "lower optimizer.lr, or look at the node's health"
        )
    alone = [group["documents"][0] for group in lines if len(group["documents"]) == 1]
    together = [document for group in lines if len(group["documents"]) > 1 for document in group["documents"]]
    parts = [f"{bad} of {micro_batches} micro-batches gave it"]
    parts += [f"{what} {', '.join(names[:NAMED])}" for what, names in (("bad by themselves:", alone), ("suspected:", together)) if names]
    if len(alone) > NAMED or len(together) > NAMED:
        parts.append(f"all {len(alone) + len(together)} are in {path}")
    if bad == micro_batches > 1:
        parts.append("as every one is, rather the weights have diverged: lower optimizer.lr")
    return "; ".join(parts)
