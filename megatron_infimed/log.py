"""Logging: one plain line at a time, to the terminal from the main process, to log/rank_N.log of the run directory from every process."""

from __future__ import annotations

import logging
import sys
from pathlib import Path


def set_up(main: bool = True, directory: Path | None = None, rank: int = 0) -> None:
    """Called once by a command. Megatron-Core's and torch's own chatter is kept to warnings, and to the file."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("megatron_infimed").setLevel(logging.INFO)
    plain = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    if main:
        terminal = logging.StreamHandler(sys.stdout)
        terminal.setFormatter(plain)
        terminal.addFilter(logging.Filter("megatron_infimed"))
        root.addHandler(terminal)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(directory / f"rank_{rank}.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)
