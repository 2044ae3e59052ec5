"""The notice board: what the ranks of a job tell each other before any collective is trusted.

It is torch's TCPStore, held by rank 0 at MASTER_ADDR:MASTER_PORT (or torchrun's own, where it has one). A note on it needs no other rank to
be there, so whoever does not write can be named, with the node that SLURM gave it. Each rank keeps a note of what it is doing; one that
cannot go on leaves a note of why. A connection serves one thread: `Board.clone` gives another.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

TICK = 0.05


class Board:
    """One thread's connection."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._rank = store, rank

    @classmethod
    def of_job(cls, world: int, rank: int, seconds: float) -> Board:
        """The job's board; waits `seconds` for rank 0 to hold it. RuntimeError where it does not."""
        if world == 1:
            return cls(dist.HashStore(), rank)
        env = os.environ
        holds = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        wait = timedelta(seconds=seconds)
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world, holds, wait, wait_for_workers=False)
        return cls(dist.PrefixStore(f"preflight {env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank)

    def clone(self) -> Board:
        return Board(self._store.clone(), self._rank)  # type: ignore[attr-defined] # missing in the stubs

    def apart(self, name: str) -> dist.Store:
        """A store of its own, for a process group."""
        return dist.PrefixStore(name, self._store.clone())  # type: ignore[attr-defined] # missing in the stubs

    def post(self, key: str, value: Any = None) -> None:
        self._store.set(key, json.dumps(value))

    def read(self, key: str, seconds: float) -> Any:
        """Waits for the note; RuntimeError where it does not come in time, or rank 0 is gone."""
        self._store.wait([key], timedelta(seconds=seconds))
        return json.loads(self._store.get(key))

    def at(self, words: str) -> None:
        """What this rank is doing from now on."""
        self.post(f"at/{self._rank}", words)

    def fail(self, why: str) -> None:
        self.post(f"failed/{self._rank}", why)

    def answering(self, what: str, ranks: Iterable[int], seconds: float) -> set[int]:
        """Those of the ranks whose note `what/RANK` comes within `seconds`."""
        missing, end = set(ranks), time.monotonic() + seconds
        asked = set(missing)
        while (missing := {rank for rank in missing if not self._has(f"{what}/{rank}")}) and time.monotonic() < end:
            time.sleep(TICK)
        return asked - missing

    def collect(
        self, what: str, ranks: Iterable[int], seconds: float, after_failure: float = math.inf
    ) -> tuple[dict[int, Any], dict[int, str]]:
        """(the ranks' notes `what/RANK`, why there is none of some); it waits for all, or `seconds`, or so long after one has failed."""
        found, failed, missing = {}, {}, set(ranks)
        end = time.monotonic() + seconds
        while missing:
            for rank in sorted(missing):
                if self._has(key := f"{what}/{rank}"):
                    found[rank] = self.read(key, 1)
                elif self._has(key := f"failed/{rank}"):
                    failed[rank] = self.read(key, 1)
                    end = min(end, time.monotonic() + after_failure)
            missing -= {*found, *failed}
            if time.monotonic() > end:
                break
            time.sleep(TICK if missing else 0)
        return found, failed | {rank: self._where(rank, seconds) for rank in sorted(missing)}

    def _has(self, key: str) -> bool:
        return self._store.check([key])

    def _where(self, rank: int, seconds: float) -> str:
        if self._has(f"at/{rank}"):
            return f"not done with {self.read(f'at/{rank}', 1)} after {seconds:g} s"
        return f"not heard of within {seconds:g} s"


def own_node(env: Mapping[str, str]) -> str:
    """This node's name, as SLURM knows it."""
    return env.get("SLURMD_NODENAME") or os.uname().nodename


def nodes_of_ranks(world: int, env: Mapping[str, str]) -> list[str]:
    """Each rank's node, from srun's variables (srun deals ranks to nodes in blocks); empty where srun did not start the ranks."""
    if env.get("SLURM_STEP_NUM_TASKS") != str(world):
        return []
    nodes = expand(env.get("SLURM_STEP_NODELIST", ""))
    counts = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):  # such as 2(x3),1
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks or 0)] * int(times or 1)
    out = [node for node, tasks in zip(nodes, counts, strict=False) for _ in range(tasks)]
    return out if len(out) == world else []


def expand(nodes: str) -> list[str]:
    """SLURM's short form of a list of nodes: n[1-2,07],login -> n1, n2, n07, login."""
    out = []
    for one in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        parts = [_range(p[1:-1]) if p.startswith("[") else [p] for p in re.findall(r"\[[^\]]*\]|[^\[]+", one)]
        out += ["".join(p) for p in itertools.product(*parts)]
    return out


def _range(inside: str) -> list[str]:
    out = []
    for part in inside.split(","):
        first, _, last = part.partition("-")
        out += [f"{i:0{len(first)}d}" for i in range(int(first), int(last or first) + 1)]
    return out
