"""Input files -> one shard; `tools/preprocess_multimodal.py` is its command line.

There is one way, whatever the engine: the rows are cut into pieces (job.py), tasks make the pieces (pieces.py, run by engines.py), and the
pieces are merged (merge.py). Killed at any moment, the same command goes on from the finished pieces, and the shard is the same to the last
byte for every number of tasks, engine and piece size. A finished shard of the same inputs, settings, tokenizer and template is left alone;
images that lie in folders or archives are part of the inputs by name only: after changing those, use --force (which goes on from the pieces
of a killed --force, and from no others).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_infimed.data.chat import load_tokenizer
from megatron_infimed.data.safe_files import disk_trouble, lock
from megatron_infimed.data.shards import Shard, shard_file
from megatron_infimed.errors import UserError
from megatron_infimed.intake.deid import DeidPolicy
from megatron_infimed.intake.fieldmap import load_map
from megatron_infimed.intake.images import open_images
from megatron_infimed.intake.readers import inputs_of
from megatron_infimed.preprocess import engines
from megatron_infimed.preprocess.dry_run import try_out
from megatron_infimed.preprocess.engines import Engine
from megatron_infimed.preprocess.job import Input, Job, describe_inputs, tokenizer_prints
from megatron_infimed.preprocess.merge import complete, merge
from megatron_infimed.preprocess.pieces import run_task

TextPhi = Literal["reject", "redact", "flag", "off"]


@dataclass(frozen=True)
class Outcome:
    manifest: dict[str, Any]
    skipped: bool = False
    """The shard was there already and nothing was done."""
    submitted: str = ""
    """Where the shard is still to come: who makes it, and what will be where."""


def preprocess(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    *,
    map: str | Path | None = None,
    images: Sequence[str | Path] = (),
    source: str | None = None,
    max_text_tokens: int | None = None,
    text_phi: TextPhi | None = None,
    allow_burned_in: Sequence[str] = (),
    piece_rows: int = 8192,
    threads: int | None = None,
    force: bool = False,
    engine: Engine = Engine(),
    wait: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Makes shard `output` of the input files (or folders of them), in the order given.

    Args:
        tokenizer: as for load_tokenizer.
        map: field map (a shipped one's name, or a YAML file); None guesses by well-known field names.
        images: folders and archives that image names are looked up in; none: each input's own folder.
        source: data set name for the manifest; by default each input's name.
        max_text_tokens: documents with more text tokens (images not counted) are rejected.
        text_phi: what happens to identifying text; None: what the map says, else "reject".
        allow_burned_in: sources whose pixels may hold burned-in text.
        piece_rows: rows of a piece: how much is lost to a kill at most. The shard does not depend on it.
        threads: that read and check images, in each task.
        force: make it again although it is finished.
        wait: with SLURM, stay until the jobs are done.
        console: shows progress where it is a terminal.

    Raises:
        UserError: unreadable input, not one document left, a full disk, a dead worker.
    """
    engines.check(engine)
    make = partial(
        make_job,
        inputs, output, tokenizer, map=map, images=images, source=source, max_text_tokens=max_text_tokens, text_phi=text_phi,
        allow_burned_in=allow_burned_in, piece_rows=piece_rows, threads=threads or _threads(engine),
    )  # fmt: skip
    if engine.name == "ranks":
        if force:
            raise UserError(f"--force: several processes cannot agree on when it began; remove {shard_file(output, 'json')} first instead")
        return _as_one_of_several(make, Path(output), console)
    job = make()
    with _progress(console, job) as told:
        with lock(Path(output)):
            engines.refuse_busy(job)
            if not force and (manifest := _finished(job)):
                job.discard()
                return Outcome(manifest, skipped=True)
            job = job.taken_up(force)
            with disk_trouble(Path(output)):
                job.prepare()
            if engine.name != "slurm":
                engines.run_here(job, engine, told)
                return Outcome(merge(job))
            ids = engines.submit(job, engine)
        if wait:
            engines.wait(job, ids, told)
            merged = not (force and (job.work / "job.json").exists())  # else it is the older shard that is sound
            if merged and (manifest := _finished(job)):
                return Outcome(manifest)
            raise UserError(f"{output}: SLURM job {ids.array} or {ids.merge} failed; see {ids.log}, then run the same command again")
    text = (
        f"SLURM array {ids.array} ({engine.tasks} tasks) makes the pieces, job {ids.merge} merges them; logs in {ids.log}; "
        f"the shard is there when {shard_file(output, 'json')} is; if a job fails, run the same command again"
    )
    return Outcome({}, submitted=text)


def _as_one_of_several(make: Callable[[], Job], output: Path, console: Console | None) -> Outcome:
    """This process is a task of its own, started beside others with the same words; whoever finds all pieces made merges them."""
    rank, world = engines.place()
    with lock(output, wait=True):
        job = make()  # the first to come hashes the inputs, the others find the hashes
        if manifest := _finished(job):
            job.discard()
            return Outcome(manifest, skipped=True)
        engines.refuse_busy(job)
        job = job.taken_up(force=False)
        left = job.left_over()
        if left is None or left.fingerprint != job.fingerprint:
            with disk_trouble(output):
                job.prepare()
    with _progress(console, job) as told:
        run_task(job, rank, world, told)
    with lock(output, wait=True):
        if manifest := _finished(job):
            return Outcome(manifest)
        if complete(job):
            return Outcome(merge(job))
    return Outcome({}, submitted=f"{output}: task {rank} of {world} is done; the last one merges")


def make_job(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    *,
    map: str | Path | None,
    images: Sequence[str | Path],
    source: str | None,
    max_text_tokens: int | None,
    text_phi: TextPhi | None,
    allow_burned_in: Sequence[str],
    piece_rows: int,
    threads: int,
    hashed: bool = True,
) -> Job:
    """Everything that can be known and refused before the first row is read."""
    prints = tokenizer_prints(load_tokenizer(tokenizer))
    field_map = load_map(map)
    open_images([p for p in images if Path(p).is_dir()])
    for path in images:
        if not Path(path).exists():
            open_images([path])  # says what is wrong
    files = [f for name in inputs for f in inputs_of(name, field_map)]
    if not files:
        raise UserError("no input: give at least one file")
    entries = describe_inputs(files, source, _hashed_before(output), hashed=hashed)
    allowed = {*allow_burned_in, *((e.source for e in entries) if field_map.deid.allow_burned_in else ())}
    policy = DeidPolicy(text_phi or field_map.deid.text or "reject", tuple(sorted(allowed)))
    return Job(
        output=str(Path(output).absolute()),
        tokenizer_path=str(Path(tokenizer).absolute()),
        inputs=entries,
        map=field_map.model_dump(mode="json"),
        deid={**asdict(policy), "allow_burned_in": list(policy.allow_burned_in)},
        images=tuple(str(Path(p).absolute()) for p in images),
        max_text_tokens=max_text_tokens,
        piece_rows=piece_rows,
        threads=threads,
        prints=prints,
    )


def _hashed_before(output: str | Path) -> tuple[Input, ...]:
    try:
        return Job.load(f"{output}.work").inputs
    except UserError:
        return ()


def _threads(engine: Engine) -> int:
    return max(1, min(8, (os.cpu_count() or 1) // engine.at_a_time)) if engine.name == "local" else 2


def _finished(job: Job) -> dict[str, Any] | None:
    """The manifest of a sound shard made of the same things; None otherwise."""
    if not shard_file(job.output, "json").exists():
        return None
    try:
        manifest = Shard(job.output).manifest
    except UserError:
        return None
    wanted = job.about()
    return manifest if {name: manifest.get(name) for name in wanted} == wanted else None


@contextlib.contextmanager
def _progress(console: Console | None, job: Job) -> Iterator[Callable[[int, int], None]]:
    """What engines tell, as a line on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    quiet = console is None or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        line, documents, rejected = bar.add_task("", total=None), 0, 0

        def told(more_documents: int, more_rejected: int) -> None:
            nonlocal documents, rejected
            documents, rejected = documents + more_documents, rejected + more_rejected
            if quiet:
                return
            made = sum(1 for _ in (job.work / "pieces").glob("f*[0-9]"))
            counts = f", {documents:,} documents, {rejected:,} rejected in this run" if documents or rejected else ""
            bar.update(line, description=f"{made:,} pieces{counts}")

        yield told


def summary(prefix: str | Path, outcome: Outcome) -> Table:
    """What the shard holds and what was left out, for people."""
    m = outcome.manifest
    table = Table(
        title=f"{escape(str(prefix))}{' (finished before, left alone; --force makes it again)' if outcome.skipped else ''}",
        show_header=False,
    )
    rows = (
        ("documents", f"{m['documents']:,}"),
        ("images", f"{m['images']:,} ({m['distinct_images']:,} distinct, {m['image_bytes'] / 2**20:,.1f} MiB)"),
        ("text tokens", f"{m['text_tokens']:,} ({m['target_tokens']:,} with loss)"),
        ("rejected", f"{m['rejected']:,}"),
    )
    for row in rows:
        table.add_row(*row)
    for reason, entry in m["rejects"].items():
        table.add_row(f"  {escape(reason)}", f"{entry['count']:,}, for example {escape(entry['examples'][0]['id'])}")
    for decision, n in m["deid"]["counts"].items():
        table.add_row(escape(decision), f"{n:,}")
    return table


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def command(
    input: Annotated[list[str], typer.Option(help="file, or folder of files (json, jsonl, csv, parquet, tar, DICOM, NIfTI); repeatable")],
    tokenizer: Annotated[str, typer.Option(help="Hugging Face folder, or SentencePiece .model")],
    output: Annotated[str, typer.Option(help="PREFIX of the shard's files")],
    map: Annotated[str | None, typer.Option(help="field map: a shipped one's name or a .yaml (default: guess by well-known names)")] = None,
    images: Annotated[list[str] | None, typer.Option(help="folder or archive of images (default: the input's folder); repeatable")] = None,
    source: Annotated[str | None, typer.Option(help="name of the data set (default: the input's name)")] = None,
    max_text_tokens: Annotated[int | None, typer.Option(min=1, help="reject documents with more text tokens")] = None,
    text_phi: Annotated[TextPhi | None, typer.Option(help="identifying text (default: as the map says, else reject)")] = None,
    allow_burned_in: Annotated[list[str] | None, typer.Option(help="source whose DICOM pixels may hold burned-in text; repeatable")] = None,
    engine: Annotated[
        Literal["local", "ranks", "slurm", "ray"], typer.Option(help="who runs the tasks; ranks: this is one of several (srun, an array)")
    ] = "local",
    tasks: Annotated[int, typer.Option(min=1, help="into how many tasks the work is divided")] = 1,
    workers: Annotated[int | None, typer.Option(min=1, help="tasks at a time (default: one a core; on a cluster all)")] = None,
    piece_rows: Annotated[int, typer.Option(min=1, help="rows of a piece; the shard does not depend on it")] = 8192,
    threads: Annotated[
        int | None, typer.Option(min=1, help="threads of a task that check images (default: its share of the cores)")
    ] = None,
    force: Annotated[bool, typer.Option(help="make the shard again although it is finished")] = False,
    slurm_partition: Annotated[str, typer.Option(help="partition of the array")] = "",
    slurm_time: Annotated[str, typer.Option(help="time limit of a task")] = "24:00:00",
    slurm_arg: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, another option of sbatch; repeatable")] = None,
    wait: Annotated[bool, typer.Option(help="with slurm, stay until the shard is there")] = False,
    dry_run: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="only try the first N rows of each input and say what would be done")
    ] = None,
) -> None:
    """Turns image-text data into a shard: checked, de-identified, tokenised, every distinct image stored once."""
    if bad := [a for a in slurm_arg or () if "=" not in a]:
        raise UserError(f"--slurm-arg {bad[0]}: write KEY=VALUE, as in --slurm-arg account=radiology")
    pairs = tuple((k.lstrip("-"), v) for k, _, v in (a.partition("=") for a in slurm_arg or ()))
    who = Engine(engine, tasks, workers, slurm_partition, slurm_time, pairs)
    settings: dict[str, Any] = {
        "map": map, "images": images or (), "source": source, "max_text_tokens": max_text_tokens, "text_phi": text_phi,
        "allow_burned_in": allow_burned_in or (), "piece_rows": piece_rows, "threads": threads,
    }  # fmt: skip
    if dry_run:
        engines.check(who)
        job = make_job(input, output, tokenizer, **{**settings, "threads": threads or _threads(Engine())}, hashed=False)
        Console().print(try_out(job, dry_run, who))
        return
    outcome = preprocess(input, output, tokenizer, **settings, force=force, engine=who, wait=wait, console=Console(stderr=True))
    Console().print(escape(outcome.submitted) if outcome.submitted else summary(output, outcome))
