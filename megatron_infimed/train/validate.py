"""The held-out loss of a checkpoint: whether the next stage should start from it, and a figure to compare runs by.

Each held-out shard is packed like the recipe's last phase (its resolution, every document once) and goes forward, without dropout, through
the model in the recipe's layout, on any number of processes that the layout divides. Losses are summed in float64 over all target tokens and
divided once, so the figure does not depend on how rows were shared out; batch.rows plays no part. FP8 is left off: the figure is of the
weights, which FP8's scales would make depend on the order of the rows. The result names checkpoint and data by their hashes; when those have
not changed, nothing is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_infimed import log as logs
from megatron_infimed.config import Recipe, SourceConfig
from megatron_infimed.counts import Counts
from megatron_infimed.data.batch import PackedBatch
from megatron_infimed.data.loader import Loader
from megatron_infimed.data.safe_files import write_whole
from megatron_infimed.data.schedule import Phase, Schedule, build_schedule
from megatron_infimed.data.shards import Shard, read_manifest
from megatron_infimed.errors import UserError
from megatron_infimed.model.infimed import InfiMed, build_pieces
from megatron_infimed.parallel import groups
from megatron_infimed.parallel.groups import Ranks
from megatron_infimed.train import checkpoint as checkpoints
from megatron_infimed.train.step import MicroBatches, through_pieces
from megatron_infimed.train.trainer import make_loader, open_data

log = logging.getLogger(__name__)
_AT_ONCE = 32
"""Micro-batches that a process pushes through between two looks at the clock; enough to hide a pipeline's filling."""
_TOLD = 60.0  # seconds between two messages


def validate(recipe: Recipe, data: Sequence[str], output: Path, *, checkpoint: str | None = None) -> dict[str, Any]:
    """Computes the loss and writes `output`; all processes together. Returns what the file holds.

    Args:
        data: prefixes of held-out shards.
        output: the JSON file.
        checkpoint: a checkpoint or a run directory; null takes the newest of recipe.output.

    Raises:
        UserError: no or another model's checkpoint; a shard that is not there, was trained on or is named twice; a loss that is not finite.
    """
    if not data:
        raise UserError("no held-out data: name at least one shard, --data PREFIX")
    if output.is_dir():
        raise UserError(f"{output} is a folder: --output names the JSON file to write")
    ranks = groups.initialize(recipe.parallel, recipe.seed, recipe.guards.timeout_minutes)
    logs.set_up(ranks.main)
    contents = _held_out(recipe, data)
    source = checkpoints.find_sound(checkpoint or recipe.output, recipe.model, ranks)
    recipe = _as_one_phase(recipe, data)
    tokenizer, shards = open_data(recipe)
    inputs = {
        "checkpoint": source.fingerprint,
        "data": contents,
        "tokenizer": tokenizer.fingerprint,
        **recipe.schedule[0].model_dump(include={"image_size", "tokens_per_image"}),
        **recipe.data.model_dump(include={"capacity", "max_images", "overlong"}),
        "params": recipe.precision.params,
    }
    if before := groups.from_first(lambda: _done_before(output, inputs)):
        log.info("%s: done before with this checkpoint and these shards: %s", output, summary(before))
        return before

    started = time.perf_counter()
    models = build_pieces(recipe, ranks)
    checkpoints.load_weights(source, models)
    for model in models:
        model.eval()
    sources: dict[str, dict[str, Any]] = {}
    for shard in shards:
        one = _as_one_phase(recipe, [shard.prefix])
        schedule = _plan(one, shard, ranks)
        one = one.model_copy(update={"batch": one.batch.model_copy(update={"rows": schedule.phases[0].batch_rows})})
        loader = make_loader(one, ranks, tokenizer, [shard], schedule)
        try:
            sources[shard.prefix] = _figures(*_walk(one, ranks, models, loader, schedule), schedule.phases[0])
        finally:
            loader.close()
    total = {name: sum(figures[name] for figures in sources.values()) for name in next(iter(sources.values()))}
    if not math.isfinite(total["loss_sum"]) or not total["target_tokens"]:
        raise UserError(
            f"{source.path}: the held-out loss is {total['loss_sum']} over {total['target_tokens']} target tokens, which says nothing: "
            "look at the checkpoint (metrics.jsonl of its run) and at the shards (python -m megatron_infimed verify PREFIX)"
        )
    result = {
        **_mean(total),
        "sources": {prefix: _mean(figures) for prefix, figures in sources.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "checkpoint": str(source.path),
        "inputs": inputs,
    }
    if ranks.main:
        _write(output, result)
        log.info("%s: %s", output, summary(result))
    dist.barrier()
    return result


def summary(result: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"held-out loss {result['loss']:.4f}, perplexity {result['perplexity']:.3f}, over {result['target_tokens']:,} target tokens of "
        f"{result['documents']:,} documents, {result['checkpoint']}"
    )


def _held_out(recipe: Recipe, data: Sequence[str]) -> dict[str, str]:
    """A hash of each held-out shard's files. UserError where that is also what a shard of the recipe has, or another one given."""
    trained: dict[str, str] = {}
    for source in recipe.data.sources:
        with contextlib.suppress(UserError):  # the recipe's own data need not be here
            trained[_content(source.prefix)] = source.prefix
    held: dict[str, str] = {}
    for prefix in data:
        content = _content(prefix)
        if twin := trained.get(content):
            same = "" if twin == prefix else f" (as {twin})"
            raise UserError(f"{prefix}: the recipe trains on it{same}, so it is not held out: name shards that are not in data.sources")
        if content in held:
            raise UserError(f"{prefix}: the same shard as {held[content]}, its documents would count twice: name it once")
        held[content] = prefix
    return {prefix: content for content, prefix in held.items()}


def _content(prefix: str) -> str:
    return hashlib.sha256(json.dumps(read_manifest(prefix)["files"], sort_keys=True).encode()).hexdigest()


def _as_one_phase(recipe: Recipe, prefixes: Sequence[str]) -> Recipe:
    """The recipe over these shards: one epoch at the last phase's resolution."""
    sources = tuple(SourceConfig(prefix=prefix, epochs=1) for prefix in prefixes)
    changed = {
        "data": recipe.data.model_copy(update={"sources": sources}),
        "schedule": recipe.schedule[-1:],
        "precision": recipe.precision.model_copy(update={"fp8": "off"}),
    }
    return recipe.model_copy(update=changed)


def _plan(recipe: Recipe, shard: Shard, ranks: Ranks) -> Schedule:
    """The shard's rows, in steps that leave as few empty rows as the layout allows. Every process works it out for itself."""
    unit = recipe.batch.micro_rows * ranks.data_size * (ranks.pipeline_size if ranks.virtual_size > 1 else 1)
    (phase,) = build_schedule(recipe, [shard]).phases
    return Schedule([replace(phase, batch_rows=unit * min(-(-phase.rows // unit), _AT_ONCE))])


def _walk(recipe: Recipe, ranks: Ranks, models: list[InfiMed], loader: Loader, schedule: Schedule) -> tuple[float, Counts]:
    """(sum of the losses, what the rows held), of all processes together."""
    started = told = time.perf_counter()
    loss_sum, held = 0.0, Counts()
    for step, batches in enumerate(loader.iterate(0, schedule.total_steps)):
        counts: list[Counts] = []
        with torch.no_grad():
            sums = through_pieces(recipe, models, _feed(ranks, batches, counts), len(batches), _forward_step, forward_only=True)
        loss_sum += sum(float(s["loss_sum"]) for s in sums)
        held = sum(counts, held)
        if time.perf_counter() - told > _TOLD:
            told = time.perf_counter()
            log.info("%s: %d of %d steps, %.0f s", recipe.data.sources[0].prefix, step + 1, schedule.total_steps, told - started)
    speaks = ranks.speaks and ranks.first_stage
    figures = torch.tensor(
        [
            loss_sum if ranks.last_stage and ranks.tensor == 0 else 0.0,
            held.documents if speaks else 0,
            held.target_tokens if speaks else 0,
            held.corrupt if ranks.first_stage else 0,  # each process decodes images of its own
        ],
        dtype=torch.float64,
        device=ranks.device,
    )
    dist.all_reduce(figures)
    total, *numbers = figures.tolist()
    return total, Counts(**dict(zip(("documents", "target_tokens", "corrupt"), map(int, numbers), strict=True)))


def _feed(ranks: Ranks, batches: MicroBatches, counts: list[Counts]) -> Iterator[PackedBatch]:
    for batch in batches:
        counts.append(batch.counts)
        yield batch.share(ranks.context, ranks.context_size).to(ranks.device)


def _forward_step(batches: Iterator[PackedBatch], piece: InfiMed):
    return piece(next(batches)), _sum_loss


def _sum_loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The three that Megatron-Core asks for; only the last one matters without gradients."""
    total = losses.sum(dtype=torch.float64)
    return total, torch.tensor(losses.numel(), dtype=torch.int, device=losses.device), {"loss_sum": total}


def _figures(loss_sum: float, held: Counts, phase: Phase) -> dict[str, Any]:
    return {
        "loss_sum": loss_sum,
        "target_tokens": held.target_tokens,
        "documents": held.documents,
        "rows": phase.rows,
        "cut": len(phase.cut),
        "left_out": len(phase.rejected),
        "corrupt_images": held.corrupt,
    }


def _mean(figures: dict[str, Any]) -> dict[str, Any]:
    loss = figures["loss_sum"] / max(figures["target_tokens"], 1)
    perplexity = math.exp(min(loss, 700.0))  # beyond, float64 ends
    return {"loss": loss, "perplexity": perplexity, **{name: n for name, n in figures.items() if name != "loss_sum"}}


def _done_before(output: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The result that is there, if it is of the same inputs."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        result = json.loads(output.read_text())
        return result if result["inputs"] == inputs else None
    return None


def _write(output: Path, result: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, json.dumps(result, indent=1))
