"""What a run would do, without doing it: the first rows of each input as far as a piece of them, all rows counted.

The piece is made beside the output, because that is the disk that a run would fill, and goes at the end.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from megatron_infimed.data.safe_files import disk_trouble
from megatron_infimed.data.shard_writer import Tally
from megatron_infimed.data.shards import read_manifest
from megatron_infimed.errors import UserError
from megatron_infimed.preprocess.engines import Engine
from megatron_infimed.preprocess.job import Job
from megatron_infimed.preprocess.pieces import PieceMaker


def try_out(job: Job, rows: int, engine: Engine) -> Table:
    """Does everything but write for the first `rows` rows of each input, counts all rows, and says what a run would do.

    Raises:
        UserError: what a run would stop at: an input that breaks off, at whatever row.
    """
    with _folder_beside(Path(job.output)) as folder, disk_trouble(Path(job.output)):
        trial = replace(job, output=str(Path(folder, "trial")))
        trial.prepare()
        tally, totals, size, sampled = Tally(), [], Counter[str](), 0
        with PieceMaker(trial) as maker:
            for f in range(len(trial.inputs)):
                wanted = maker.rows(f, lambda number: number < rows)
                maker.write(f, 0, wanted)
                totals.append(wanted.total)
                sampled += min(rows, wanted.total)
                manifest = read_manifest(trial.piece(f, 0) / "piece")
                tally.add_manifest(manifest)
                size.update({name: about["bytes"] for name, about in manifest["files"].items()})
    return _dry_summary(job, engine, tally, totals, sampled, size.total())


@contextlib.contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """A folder on the output's disk; it goes at the end, and so do the folders that had to be made for it."""
    made = [p for p in output.parents if not p.exists()]
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=f"{output.name}.dry-run-", dir=output.parent)
        except OSError as e:
            raise UserError(f"{output}: cannot write there ({e.strerror}); choose another output") from None
        with folder as name:
            yield Path(name)
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _dry_summary(job: Job, engine: Engine, tally: Tally, totals: list[int], sampled: int, size: int) -> Table:
    table = Table(title=f"dry run for {escape(job.output)}: nothing was written", show_header=False)
    total = sum(tally.sources.values(), Counter())
    pieces = sum(-(-n // job.piece_rows) for n in totals)
    table.add_row("inputs", f"{len(totals):,} with {sum(totals):,} rows; {sampled:,} were looked at")
    table.add_row("documents", f"{total['documents']:,}, {total['images']:,} images")
    table.add_row("text tokens", f"{total['text_tokens']:,} ({total['target_tokens']:,} with loss)")
    table.add_row("rejected", f"{sum(r['count'] for r in tally.rejects.values()):,}")
    for reason, entry in tally.rejects.items():
        first = (f"{e['id']} ({e['detail']})" if e["detail"] else e["id"] for e in entry["examples"][:3])
        table.add_row(f"  {escape(reason)}", escape(f"{entry['count']:,}: {'; '.join(first)}"))
    table.add_row("field map", escape(job.map["name"]))
    table.add_row("identifying text", job.deid["text"])
    for decision, n in sorted(tally.decisions.items()):
        table.add_row(f"  {escape(decision)}", f"{n:,}")
    table.add_row("plan", f"{engine.name}, {engine.tasks} tasks, {pieces:,} pieces of {job.piece_rows:,} rows")
    table.add_row("the shard", f"about {size / max(sampled, 1) * sum(totals) / 2**20:,.1f} MiB, and as much again while it is made")
    return table
