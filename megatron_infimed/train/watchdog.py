"""Says who is late when training hangs.

The trainer says where it is (`at`), which costs one assignment. A thread in each process looks now and then whether that has changed. Who
has made no progress for `minutes` writes RUN/hang/rank_N.json: the step, the place in it, since when, and the main thread's Python stack.
Such a report calls the roll: every process that still runs Python answers, the busy ones with answer_N.json. A grace time later one process
compares: who has not answered is stopped, dead or stuck outside Python; who is at an earlier step or place than the most is late; the others
wait for them. Who moves again takes its report back. Nothing is ended here: the collective's own time limit (guards.timeout_minutes) does that.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, get_args

log = logging.getLogger(__name__)

Place = Literal["data", "forward_backward", "update", "suspects", "save"]
"""In the order of a step."""
NAMED = 8
"""Ranks that the message names."""
_At = tuple[int, Place, float]
"""Step, place, since when."""


@dataclass(frozen=True)
class Report:
    """Where a process is."""

    rank: int
    host: str
    pid: int
    step: int
    place: Place
    seconds: float
    """For how long."""
    stack: list[str]
    """Of the main thread, innermost last: file:line function."""

    @property
    def position(self) -> tuple[int, int]:
        return self.step, get_args(Place).index(self.place)


class Watchdog:
    """Watches this process while it is entered; see the top of the file.

    Args:
        minutes: without progress for so long a process reports; 0 does not watch.
        main: whether this process's log goes to the terminal; else what it has to tell goes to stderr as well.
        hosts: of all ranks, to name those that do not answer.
    """

    def __init__(self, run_dir: Path, rank: int, world: int, minutes: float, main: bool = True, hosts: Sequence[str] = ()) -> None:
        self.folder, self.rank, self.world, self.main, self.hosts = run_dir / "hang", rank, world, main, hosts
        self.limit = 60 * minutes
        self.tick = min(max(self.limit / 20, 0.1), 30.0)
        self.grace = 2 + 2 * self.tick  # by then every thread has looked twice
        self._at: _At = (0, "data", time.monotonic())
        self._reported: tuple[str, _At] | None = None
        """The file written, and what it says."""
        self._tell_at = math.inf
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, place: Place, step: int) -> None:
        """Progress: now at this place of this step (counted from 1)."""
        self._at = (step, place, time.monotonic())

    def __enter__(self) -> Watchdog:
        if self.limit:
            for path in self.folder.glob("*.json" if self.rank == 0 else f"*_{self.rank}.json"):
                path.unlink(missing_ok=True)  # of an earlier start
            self._main_thread = threading.get_ident()
            self._at = (*self._at[:2], time.monotonic())
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.limit:
            self._end.set()
            self._thread.join()
            if kind is None:  # else the reports are evidence
                self._leave()

    def _watch(self) -> None:
        while not self._end.wait(self.tick):
            try:
                self._look()
            except OSError as e:
                log.warning("the watchdog cannot use %s: %s", self.folder, e)

    def _look(self) -> None:
        at, now = self._at, time.monotonic()
        stalled = self._stalled()
        name = None
        if now - at[2] > self.limit:
            name = f"rank_{self.rank}.json"
        elif any(rank != self.rank for rank in stalled):
            name = f"answer_{self.rank}.json"
        if name is None or (name, at) != self._reported:
            self._leave(but=name)
            if name is not None:
                self._report(name, at, now)
        elif now > self._tell_at and self.rank == min(stalled, default=None):
            self._tell_at = math.inf
            self._tell()

    def _stalled(self) -> list[int]:
        """Ranks that have reported that they are stuck."""
        return [int(path.stem.removeprefix("rank_")) for path in self.folder.glob("rank_*.json")]

    def _report(self, name: str, at: _At, now: float) -> None:
        step, place, since = at
        stack = _stack(sys._current_frames()[self._main_thread])
        host = self.hosts[self.rank] if self.hosts else socket.gethostname()
        report = Report(self.rank, host, os.getpid(), step, place, round(now - since, 1), stack)
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f"{name}.tmp"
        aside.write_text(json.dumps(asdict(report), indent=1))
        aside.replace(self.folder / name)
        self._reported, self._tell_at = (name, at), now + self.grace

    def _leave(self, but: str | None = None) -> None:
        """Takes the report back, unless its file will be written again."""
        if self._reported is None:
            return
        name, (step, place, since) = self._reported
        if name != but:
            (self.folder / name).unlink(missing_ok=True)
        if name.startswith("rank"):
            log.info("rank %d goes on, after %.0f s in %s of step %d", self.rank, self._at[2] - since, place, step)
        self._reported = None

    def _tell(self) -> None:
        reports = {}
        for path in self.folder.glob("*.json"):
            try:
                report = Report(**json.loads(path.read_text()))
            except FileNotFoundError:  # just taken back
                continue
            reports[report.rank] = report
        text = f"no progress for {self.limit:.0f} s: {who_is_late(reports, self.world, self.hosts)}; Python stacks in {self.folder}"
        log.error("%s", text)
        if not self.main:
            print(text, file=sys.stderr, flush=True)


def who_is_late(reports: Mapping[int, Report], world: int, hosts: Sequence[str] = ()) -> str:
    """The ranks that the others wait for, in one line. `reports` has those that answered."""

    def named(rank: int) -> str:
        host = reports[rank].host if rank in reports else hosts[rank] if hosts else ""
        return f"rank {rank} ({host})" if host else f"rank {rank}"

    parts = [f"{named(rank)} does not answer: it is stopped, dead or stuck outside Python" for rank in range(world) if rank not in reports]
    positions = Counter(report.position for report in reports.values())
    first = min(positions)
    late = first < max(positions, key=lambda position: (positions[position], position))
    if late:
        parts += [
            f"{named(r.rank)} is late: in {r.place} of step {r.step} for {r.seconds:.0f} s" for r in reports.values() if r.position == first
        ]
    if len(parts) > NAMED:
        parts = [*parts[:NAMED], f"and {len(parts) - NAMED} more"]
    for (step, place), number in sorted(positions.items()):
        if not late or (step, place) != first:
            who = f"{number} more{' waits' if number == 1 else ' wait'}" if parts else f"{number} wait"
            parts.append(f"{who} in {get_args(Place)[place]} of step {step}")
    return ", ".join(parts) if late or len(reports) < world else f"{', '.join(parts)}, none behind: look at the network"


def _stack(frame: FrameType | None) -> list[str]:
    out = []
    while frame is not None:
        out.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return out[::-1]
