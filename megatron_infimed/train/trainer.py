"""A training stage from recipe to DONE.

`fit` joins the processes, plans the data, builds or resumes the model, and then walks the schedule step by step. Where it stands is one pair
of integers, the position, which means the same in every layout; so a run may be killed anywhere and continued with other sizes. A run
directory belongs to one recipe: what would change the documents or the arithmetic of a half-done run is refused, by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron_infimed import __version__
from megatron_infimed import log as logs
from megatron_infimed.config import Recipe
from megatron_infimed.data.chat import Tokenizer, load_tokenizer
from megatron_infimed.data.decode import make_decoder
from megatron_infimed.data.loader import Loader
from megatron_infimed.data.saved_plan import plan_of
from megatron_infimed.data.schedule import Position, Schedule
from megatron_infimed.data.shards import Shard
from megatron_infimed.errors import UserError
from megatron_infimed.model.infimed import build_pieces
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.optional import REMEDY, use_transformer_engine
from megatron_infimed.parallel import groups
from megatron_infimed.parallel.groups import Ranks
from megatron_infimed.recipe_files import dump_recipe, what_decides
from megatron_infimed.train import checkpoint
from megatron_infimed.train.checkpoint import Checkpoint
from megatron_infimed.train.guards import Guards, Verdict, name_culprits
from megatron_infimed.train.metrics import Metrics
from megatron_infimed.train.optimizer import wrap_and_optimize
from megatron_infimed.train.saver import Saver
from megatron_infimed.train.step import Run, forward_backward, train_step
from megatron_infimed.train.watchdog import Watchdog

log = logging.getLogger(__name__)


def fit(recipe: Recipe) -> bool:
    """Trains the stage, or what is left of it. True when it is done, False when a signal stopped it (saved; start it again).

    Raises:
        UserError: the recipe does not suit the processes, the data or what the run directory already holds; or training diverged.
    """
    ranks = groups.initialize(recipe.parallel, recipe.seed, recipe.guards.timeout_minutes)
    run_dir = Path(recipe.output)
    logs.set_up(ranks.main, run_dir / "log", ranks.rank)
    if problems := recipe.problems(ranks.world):
        raise UserError("; ".join(problems))
    if recipe.precision.fp8 != "off" and not use_transformer_engine(recipe.precision.layers):
        raise UserError(
            f"precision.fp8={recipe.precision.fp8} needs a GPU and Transformer Engine ({REMEDY['transformer_engine']}), or set it off"
        )
    tokenizer, shards = open_data(recipe)
    schedule = plan_of(recipe, shards, builds=ranks.rank == 0)
    start_from, fingerprint = _start(recipe, run_dir, ranks)
    identity = _identity(recipe, schedule, shards, fingerprint)
    last_step = min(schedule.total_steps, recipe.max_steps or schedule.total_steps)
    if _is_done(run_dir, identity, last_step, ranks):
        log.info("%s: done before, nothing to do", run_dir)
        return True

    newest = checkpoint.newest_sound(run_dir, ranks)
    if newest is not None:
        _refuse_other(run_dir, newest.state.get("identity", {}), identity)
    elif recipe.init_from and start_from is None:  # all of this run's checkpoints were damaged
        start_from = checkpoint.find_sound(recipe.init_from, recipe.model, ranks)
    first_step = schedule.step_at(Position(*newest.state["position"])) if newest else 0
    run = _build(recipe, ranks, schedule.total_steps, newest, start_from)
    if ranks.rank == 0:
        (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    _announce(recipe, ranks, schedule, first_step, newest, start_from)
    loader = make_loader(recipe, ranks, tokenizer, shards, schedule)
    run.waited = lambda: loader.wait_seconds
    about = {
        "format": 1,
        "version": __version__,
        "recipe": recipe.model_dump(mode="json"),
        "identity": identity,
        "data": {s.prefix: _counts(shard) for s, shard in zip(recipe.data.sources, shards, strict=True)},
    }
    try:
        step, saved = _walk(run, loader, schedule, first_step, last_step, Saver(run_dir, ranks, recipe.checkpoint, newest), about)
    finally:
        loader.close()
    if step < last_step:
        log.info("%s: stopped by a signal after step %d, saved in %s; start it again to continue", run_dir, step, saved.path)
        return False
    if ranks.rank == 0:
        checkpoint.mark_done(run_dir, saved, identity=identity)
    log.info("%s: done after step %d, weights in %s", run_dir, step, saved.path)
    return True


def _walk(
    run: Run, loader: Loader, schedule: Schedule, first_step: int, last_step: int, saver: Saver, about: dict[str, Any]
) -> tuple[int, Checkpoint]:
    """Trains the steps from `first_step` on, until `last_step` or a signal; how many are done, and the checkpoint of that."""
    recipe, ranks, run_dir = run.recipe, run.ranks, Path(run.recipe.output)
    hosts = groups.gather(platform.node())
    metrics = Metrics(recipe, run_dir, first_step, schedule.total_steps, hosts) if ranks.main else None
    step, saved_at = first_step, saver.newest.step if saver.newest else None

    def save() -> None:
        nonlocal saved_at
        run.at("save", step - 1)
        position = list(schedule.position_after(step - 1))
        saver.save({**about, "step": step, "position": position, "recent_losses": run.guards.state()}, run.models, run.optimizer)
        saved_at = step
        if metrics:
            metrics.pause()

    with Watchdog(run_dir, ranks.rank, ranks.world, recipe.guards.hang_minutes, ranks.main, hosts) as watchdog, _stop_on_signal(run):
        run.at = lambda place, at: watchdog.at(place, at + 1)
        for batches in loader.iterate(first_step, last_step):
            phase = schedule.phases[schedule.locate(step)[0]]
            if phase.number != schedule.locate(max(step - 1, 0))[0]:
                run.guards.reset()
            result = train_step(run, step, batches)
            if metrics:
                metrics.record(step + 1, phase, result)
            _heed(run, result.verdict, step, loader)
            step += 1
            saver.poll()
            if result.stop:
                break
            if recipe.checkpoint.every and step % recipe.checkpoint.every == 0 and step < last_step:
                save()
        if saved_at != step:
            save()
        saved = saver.finish()
    if metrics:
        metrics.close()
    return step, saved


def _heed(run: Run, verdict: Verdict, step: int, loader: Loader) -> None:
    """Says what the guards have found in a step, and stops where they say so."""
    reason = verdict.reason
    if reason and verdict.kind == "nonfinite":
        run.at("suspects", step)
        path = Path(run.recipe.output) / "suspects.jsonl"
        again = partial(forward_backward, run, step)
        reason += "; " + name_culprits(run.pieces, loader.microbatches(step), lambda b: again(b)[0], run.ranks, loader.name, path, step + 1)
    if verdict.action == "stop":
        raise UserError(f"step {step + 1}: {reason}")
    if reason:
        log.warning("step %d: %s", step + 1, reason)


def make_loader(recipe: Recipe, ranks: Ranks, tokenizer: Tokenizer, shards: list[Shard], schedule: Schedule) -> Loader:
    return Loader(
        recipe,
        shards,
        schedule,
        pad_id=tokenizer.special.pad,
        image_id=tokenizer.special.image_pad,
        decoder=make_decoder(recipe.data.decoder, recipe.data.decode_threads, ranks.device) if ranks.first_stage else None,
        dp_rank=ranks.data,
        dp_size=ranks.data_size,
        with_images=ranks.first_stage,
        share=ranks.image_share,
        pin_memory=ranks.device.type == "cuda",
    )


def _start(recipe: Recipe, run_dir: Path, ranks: Ranks) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint whose weights a fresh run takes, and its fingerprint. A run that has checkpoints of its own needs it no more."""
    if recipe.init_from is None:
        return None, None
    if not (own := groups.from_first(lambda: checkpoint.in_run(run_dir))):
        groups.from_first(partial(_refuse_unfinished, Path(recipe.init_from)))
        found = checkpoint.find_sound(recipe.init_from, recipe.model, ranks)
        if recipe.init_optimizer and (theirs := found.state["recipe"]["trainable"]) != recipe.trainable.model_dump():
            raise UserError(
                f"init_optimizer: {found.path} has moments of other parts ({theirs}) than trainable says: set it false, or train the same"
            )
        return found, found.fingerprint
    try:
        return None, groups.from_first(partial(checkpoint.find, recipe.init_from)).fingerprint
    except UserError:
        return None, own[-1].state["identity"]["init_from"]


def _refuse_unfinished(run: Path) -> None:
    """A stage that starts too early would take what the one before it has so far. An import is whole as it is."""
    there, done = checkpoint.in_run(run), checkpoint.read_done(run)
    if there and (done or {}).get("checkpoint") != there[-1].path.name and "imported" not in there[-1].state:
        raise UserError(
            f"init_from: {run} is not done, its newest checkpoint is {there[-1].path.name}: wait until it is (sbatch --dependency=afterok:JOB), "
            f"or take what is there by its own name, init_from={there[-1].path}"
        )


def open_data(recipe: Recipe) -> tuple[Tokenizer, list[Shard]]:
    """The recipe's tokenizer and shards, which must belong together.

    Raises:
        UserError: a missing or damaged shard, or one made with another tokenizer.
    """
    if not recipe.data.sources or not recipe.data.tokenizer:
        raise UserError("the recipe names no data: set data.tokenizer and data.sources")
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    if tokenizer.vocab_size > recipe.model.language.vocab_size:
        raise UserError(
            f"{recipe.data.tokenizer} has {tokenizer.vocab_size} tokens but model.language.vocab_size is {recipe.model.language.vocab_size}: "
            "take the model's own tokenizer, or raise vocab_size for a model trained from scratch"
        )
    shards = [Shard(source.prefix) for source in recipe.data.sources]
    for shard in shards:
        shard.check_tokenizer(tokenizer)
    return tokenizer, shards


def _counts(shard: Shard) -> dict[str, int]:
    return {name: shard.manifest[name] for name in ("documents", "text_tokens", "target_tokens", "images", "distinct_images")}


def _build(recipe: Recipe, ranks: Ranks, total_steps: int, newest: Checkpoint | None, start_from: Checkpoint | None) -> Run:
    models = build_pieces(recipe, ranks)
    if newest is None and start_from is not None:
        checkpoint.load_weights(start_from, models)  # before the optimizer copies them
    elif newest is None:
        for model in models:
            initialize_weights(model, recipe)
    pieces, optimizer = wrap_and_optimize(models, recipe)
    if newest is not None:
        checkpoint.load_all(newest, models, optimizer)
    elif start_from is not None and recipe.init_optimizer:
        checkpoint.load_moments(start_from, models, optimizer)
    guards = Guards(recipe.guards, newest.state["recent_losses"] if newest else ())
    return Run(recipe, ranks, pieces, optimizer, total_steps, guards)


def _identity(recipe: Recipe, schedule: Schedule, shards: list[Shard], init_from: str | None) -> dict[str, Any]:
    return {
        **{f"recipe.{name}": value for name, value in what_decides(recipe).items()},
        "documents and rows": schedule.fingerprint,
        "data files": [hashlib.sha256(json.dumps(s.manifest["files"], sort_keys=True).encode()).hexdigest() for s in shards],
        "init_from": init_from,
    }


def _refuse_other(run_dir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise UserError(
            f"{run_dir} holds a run that differs in {', '.join(changed)}: set output to a new directory, or delete this one to start again"
        )


def _is_done(run_dir: Path, identity: dict[str, Any], last_step: int, ranks: Ranks) -> bool:
    done = groups.from_first(partial(checkpoint.read_done, run_dir))
    if done is None:
        return False
    _refuse_other(run_dir, done.get("identity", {}), identity)
    final = Checkpoint(run_dir / "checkpoints" / done["checkpoint"])
    return done["step"] >= last_step and not final.damaged(ranks)


def _announce(
    recipe: Recipe, ranks: Ranks, schedule: Schedule, first_step: int, newest: Checkpoint | None, start: Checkpoint | None
) -> None:
    sizes = {"TP": ranks.tensor_size, "PP": ranks.pipeline_size, "VPP": ranks.virtual_size, "CP": ranks.context_size, "DP": ranks.data_size}
    layout = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one copy"
    layout += " SP" * recipe.parallel.sequence
    taken = "weights and moments" if recipe.init_optimizer else "weights"
    weights = f"resumed from {newest.path}" if newest else f"{taken} of {start.path}" if start else "fresh weights"
    log.info(
        "%s: %d steps (%d done), %s on %d process%s, %s",
        recipe.stage, schedule.total_steps, first_step, layout, ranks.world, "es" if ranks.world > 1 else "", weights,
    )  # fmt: skip


@contextmanager
def _stop_on_signal(run: Run) -> Iterator[None]:
    """SIGTERM and SIGUSR1 (which SLURM sends before the time limit) end the run after the current step, saved. Once stopped it heeds none:
    a launcher ends all processes when the first has left, and would take those still on their way out for killed."""

    def stop(_number: int, _frame: Any) -> None:
        run.stop = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if run.stop else handler)
