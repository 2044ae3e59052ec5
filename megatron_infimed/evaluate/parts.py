"""Answers kept as they are given: an evaluation that is stopped or killed goes on with the questions that are left.

OUTPUT/parts/HASH/ holds a JSON-lines file for each batch of questions that a process has answered, whole or not there. HASH names what the
evaluation is of, so that another checkpoint's answers are not taken for its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_infimed import notes
from megatron_infimed.data.safe_files import write_whole

Row = dict[str, Any]
"""An answered question; `id` is the question's."""


class Parts:
    """Of one evaluation.

    Args:
        output: folder of the evaluation.
        inputs: all that its answers depend on, JSON values.
    """

    def __init__(self, output: Path, inputs: dict[str, Any]) -> None:
        self.all = output / "parts"
        self.folder = self.all / hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]

    def read(self) -> dict[str, Row]:
        """What is there, by id."""
        rows: dict[str, Row] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                with path.open(encoding="utf-8") as file:
                    rows |= {row["id"]: row for row in map(json.loads, file)}
            except (OSError, ValueError, KeyError, TypeError):
                continue  # cut by a power failure: these are asked again
        return rows

    def write(self, name: str, rows: Sequence[Row]) -> None:
        """One process's, of one batch; `name` is no other's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / f"{name}.jsonl", lines(rows))
        notes.write("progress", f"{self.folder.name}, {len(list(self.folder.glob('*.jsonl')))} batches of questions")

    def remove(self) -> None:
        """All, also what other evaluations into this folder have left half done."""
        shutil.rmtree(self.all, ignore_errors=True)


def lines(rows: Sequence[Row]) -> str:
    """As JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
