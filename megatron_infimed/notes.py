"""What a launcher wants to know from the processes inside a job: why they gave up, and whether anything has been gained.

launch/common.sh and `stages` name a folder in INFIMED_NOTES, which outlives a restart of the job; without it nothing is written. Each note
is a small file: `why` (the user's mistake: starting again will not help), `crash` (anything else: it may), `progress` (changes with every
piece of work that a restart will not lose), `bad_nodes` (one a line: start again without them).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

AGAIN = 75
"""Exit code (EX_TEMPFAIL): a signal stopped it, all is saved, start it again to go on."""
BAD_NODE = 69
"""Exit code (EX_UNAVAILABLE): `bad_nodes` names nodes that the job must do without."""


def write(name: str, text: str) -> None:
    """Leaves a note, whole or not at all."""
    folder = os.environ.get("INFIMED_NOTES")
    if folder and not _superseded(Path(folder)):
        path = Path(folder) / name
        aside = path.with_name(f"{name}.{os.getpid()}.{time.time_ns()}.tmp")
        aside.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        aside.replace(path)


def _superseded(folder: Path) -> bool:
    """Whether the job has been started again meanwhile: processes of a lost node may live on, and have no say any more."""
    try:
        started = (folder / "starts").read_text().splitlines()[-1].split()[0]
    except (OSError, IndexError):
        return False
    return started != os.environ.get("SLURM_RESTART_COUNT", "0")
