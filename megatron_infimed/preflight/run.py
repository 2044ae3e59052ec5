"""`preflight`: looks for what would stop or slow down a training job, before it costs an hour of every GPU. Started like training, before it.

Every rank has two threads. One takes part: it gathers facts, answers rank 0's question for the time, and joins the all-reduces. The main
thread waits for rank 0's verdict, so that a rank whose part hangs in a driver or a file system ends all the same. On rank 0 the main thread
conducts: it waits for each step's notes with a time limit, judges, and says what it found in one line. Exit codes: 0 all is well; 2 the
user's mistake; notes.BAD_NODE after naming nodes in the note `bad_nodes`.
    INFIMED_PREFLIGHT_SECONDS   limit of each step (180: importing torch from a cold network file system takes minutes)
    INFIMED_MIN_GBPS            bus bandwidth below which two nodes are bad (none)
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from megatron_infimed import notes
from megatron_infimed.config import Recipe
from megatron_infimed.errors import UserError
from megatron_infimed.parallel.groups import world_from_environment
from megatron_infimed.preflight import allreduce
from megatron_infimed.preflight.allreduce import Group
from megatron_infimed.preflight.board import Board, nodes_of_ranks, own_node
from megatron_infimed.preflight.facts import Facts, gather
from megatron_infimed.preflight.judge import Clock, Finding, disk_needed, judge, judge_absent, judge_speed, judge_stuck, size

AFTERMATH = 10.0
"""Seconds that the others still have for an all-reduce once a rank has failed in it: most of what follows is a consequence."""
ASKED = 5
"""Times that each node is asked for the time; the quickest answer counts."""


@dataclass(frozen=True)
class Limits:
    seconds: float
    """Of each step."""
    min_gbps: float
    """0: none."""

    @property
    def grace(self) -> float:
        """Seconds for a process that is alive to answer."""
        return min(5.0, self.seconds)


@dataclass(frozen=True)
class Place:
    """Where this process stands."""

    world: int
    rank: int
    local_rank: int
    node: str


def preflight(recipe: Recipe) -> None:
    """Checks the nodes of this job; returns where all is well.

    Raises:
        UserError: on rank 0, what the user must mend.
        SystemExit: notes.BAD_NODE after naming bad nodes; on other ranks also 2, where rank 0 says why.
    """
    limits = Limits(_number("INFIMED_PREFLIGHT_SECONDS", 180.0), _number("INFIMED_MIN_GBPS", 0.0))
    world, rank, local_rank = world_from_environment()
    here = Place(world, rank, local_rank, own_node(os.environ))
    patience = 5 * limits.seconds  # a stopped rank 0 leaves its clients waiting beyond any time limit of TCPStore
    overdue = threading.Timer(patience, _blame_rank_0, (here, f"no verdict within {patience:g} s"))
    overdue.daemon = True
    if rank:
        overdue.start()
    try:
        board = Board.of_job(world, rank, 2 * limits.seconds)
    except RuntimeError as e:
        if rank == 0:
            raise
        _blame_rank_0(here, str(e))
    part = threading.Thread(target=_take_part, args=(board.clone(), recipe, here, limits), daemon=True)
    part.start()
    code = _heed(board, rank) if rank else _lead(board, recipe, here, limits)
    overdue.cancel()
    _leave(code, part, limits)


# What every rank does


def _take_part(board: Board, recipe: Recipe, here: Place, limits: Limits) -> None:
    try:
        board.at("beginning")
        board.post(f"facts/{here.rank}", asdict(gather(recipe, here.rank, here.local_rank, here.node, board.at)))
        board.at(f"reading {recipe.output}")
        board.post(f"sees/{here.rank}", (Path(recipe.output) / board.read("look for", 10 * limits.seconds)).exists())
        if here.local_rank == 0:
            _tell_the_time(board, here.rank, limits.seconds)
        for number, ranks in enumerate(board.read(f"groups/{here.rank}", 10 * limits.seconds)):
            if ranks:
                board.at("an all-reduce")
                store = board.apart(f"{number} {ranks}")
                # Longer than the limit: rank 0 names those that hang, before torch ends them
                seconds = allreduce.measure(store, ranks.index(here.rank), len(ranks), here.local_rank, 2 * limits.seconds)
                board.post(f"seconds {number}/{here.rank}", seconds)
    except Exception as e:
        board.fail(f"{type(e).__name__}: {' '.join(str(e).split())}"[:300])


def _tell_the_time(board: Board, rank: int, seconds: float) -> None:
    for i in range(ASKED):
        if not board.read(f"ask {i}/{rank}", 10 * seconds):
            return
        board.post(f"now {i}/{rank}", time.time())


def _heed(board: Board, rank: int) -> int:
    """The exit code, from rank 0's verdict. RuntimeError where rank 0 has gone: it crashed, or the job is being cancelled."""
    forever = 24 * 3600.0
    board.read("roll call", forever)
    board.post(f"here/{rank}")
    code = board.read("verdict", forever)
    _ignore_term(code)
    board.post(f"heard/{rank}")
    return code


def _ignore_term(code: int) -> None:
    """srun ends all ranks when the first has failed, and would show 143 for those that were about to leave with a code that says more."""
    if code:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _leave(code: int, part: threading.Thread, limits: Limits) -> None:
    """Ends the process, unless all is well."""
    part.join(limits.grace)
    sys.stdout.flush()
    sys.stderr.flush()
    if part.is_alive():  # stuck for good: nothing of Python's own way out can be trusted
        os._exit(code)
    if code:
        sys.exit(code)


def _blame_rank_0(here: Place, why: str) -> NoReturn:
    """Ends this process, whatever its threads wait for."""
    node, said = next(iter(nodes_of_ranks(here.world, os.environ)), ""), f"rank 0 does not answer: {' '.join(why.split())[:200]}"
    print(f"bad node {node}: {said}" if node else f"error (rank {here.rank}): {said}", file=sys.stderr, flush=True)
    notes.write(*(("bad_nodes", node) if node else ("crash", said)))
    os._exit(notes.BAD_NODE if node else 1)


# What rank 0 does besides


def _lead(board: Board, recipe: Recipe, here: Place, limits: Limits) -> int:
    """The exit code; UserError for the user's mistakes."""
    code = 1  # should this fail
    try:
        finding, line = _conduct(board, recipe, here, limits)
        code = 2 if finding.mistakes else notes.BAD_NODE if finding.bad else 0
        for text in [line] if not finding else finding.lines():
            print(text, file=sys.stderr if finding else sys.stdout, flush=True)
        if code == notes.BAD_NODE:
            notes.write("bad_nodes", "\n".join(sorted(finding.bad)))
        if code == 2:
            raise UserError("; ".join(finding.mistakes))
    finally:
        _ignore_term(code)
        _dismiss(board, here.world, code, limits)
    return code


def _dismiss(board: Board, world: int, code: int, limits: Limits) -> None:
    """Everybody who still waits for something gets it, and the verdict."""
    board.post("look for", "")
    for rank in range(world):
        for key in (*(f"ask {i}/{rank}" for i in range(ASKED)), f"groups/{rank}"):
            board.post(key, [])
    board.post("roll call")
    board.post("verdict", code)
    board.answering("heard", range(1, world), limits.grace)


def _conduct(board: Board, recipe: Recipe, here: Place, limits: Limits) -> tuple[Finding, str]:
    """What was found, and the line that says what was measured where all is well."""
    told, trouble = board.collect("facts", range(here.world), limits.seconds)
    facts = [Facts.read(told[rank]) for rank in sorted(told)]
    nodes = dict(enumerate(nodes_of_ranks(here.world, os.environ))) | {f.rank: f.node for f in facts}
    if not trouble:
        facts, trouble = _shared(board, recipe, facts, limits.seconds)
    clocks: dict[str, Clock] = {}
    if not trouble:
        clocks, trouble = _clocks(board, facts, limits.seconds)
    if trouble:
        return judge_absent(nodes, trouble), ""
    if finding := judge(recipe, facts, clocks):
        return finding, ""
    speeds: dict[Group, float] = {}
    finding = _measure(board, nodes, limits, speeds)
    pairs = {group: speed for group, speed in speeds.items() if len(group) <= 2}
    finding = finding or judge_speed(pairs, limits.min_gbps, relative=allreduce.backend() == "nccl")
    return finding, "" if finding else _summary(recipe, facts, clocks, speeds)


def _shared(board: Board, recipe: Recipe, facts: list[Facts], seconds: float) -> tuple[list[Facts], dict[int, str]]:
    """The facts with whether each rank sees what rank 0 has written."""
    board.post("look for", facts[0].left)
    sees, trouble = board.collect("sees", [f.rank for f in facts], seconds)
    if facts[0].left:
        (Path(recipe.output) / facts[0].left).unlink(missing_ok=True)
    return [replace(f, sees_output=sees.get(f.rank, True) or "output" in f.trouble) for f in facts], trouble


def _clocks(board: Board, facts: list[Facts], seconds: float) -> tuple[dict[str, Clock], dict[int, str]]:
    clocks, trouble = {}, {}
    for f in facts:
        if f.local_rank == 0:
            try:
                clocks[f.node] = _clock(board, f.rank, seconds)
            except RuntimeError:
                trouble[f.rank] = f"did not answer within {seconds:g} s when asked for the time"
    return clocks, trouble


def _clock(board: Board, rank: int, seconds: float) -> Clock:
    """Asks a rank for the time; the truth lies between question and answer."""
    answers = []
    for i in range(ASKED):
        asked = time.time()
        board.post(f"ask {i}/{rank}", True)
        told = board.read(f"now {i}/{rank}", seconds)
        took = time.time() - asked
        answers.append(Clock(told - asked - took / 2, took / 2))
    return min(answers, key=lambda clock: clock.within)


def _measure(board: Board, nodes: Mapping[int, str], limits: Limits, speeds: dict[Group, float]) -> Finding:
    """Lets all nodes reduce in pairs and together; fills in the bandwidth of each group in GB/s."""
    plan = allreduce.rounds(list(dict.fromkeys(nodes.values())), len(nodes))
    ranks = {group: [r for r in sorted(nodes) if nodes[r] in group] for groups in plan for group in groups}
    for rank, node in nodes.items():
        board.post(f"groups/{rank}", [next((ranks[g] for g in groups if node in g), []) for groups in plan])
    for number, groups in enumerate(plan):
        waited = [rank for group in groups for rank in ranks[group]]
        took, trouble = board.collect(f"seconds {number}", waited, limits.seconds, AFTERMATH)
        if trouble:
            board.post("roll call")
            answer = {0} | board.answering("here", [rank for rank in nodes if rank], limits.grace)
            if not (finding := judge_stuck(nodes, groups, trouble, answer)):
                raise RuntimeError(f"all pairs of nodes can all-reduce, all nodes together cannot: {trouble}")
            return finding
        message = allreduce.MESSAGE[allreduce.backend()]
        for group in groups:
            seconds = max(took[rank] for rank in ranks[group])
            speeds[group] = allreduce.bus_bandwidth(seconds, len(ranks[group]), message)
    return Finding()


def _summary(recipe: Recipe, facts: Sequence[Facts], clocks: Mapping[str, Clock], speeds: Mapping[Group, float]) -> str:
    first, versions = facts[0], facts[0].versions
    parts = [f"preflight: {len(clocks)} node{'s' * (len(clocks) > 1)}, {len(facts)} process{'es' * (len(facts) > 1)}"]
    if first.gpu.visible:
        parts.append(f"{first.gpu.name}, {min(f.gpu.free for f in facts):.0%} of its memory free")
    parts.append(", ".join(f"{name} {version}" for name, version in versions.items() if name in ("torch", "megatron-core", "NCCL", "code")))
    if len(clocks) > 1:
        middle = statistics.median(c.ahead for c in clocks.values())
        off = max(abs(c.ahead - middle) for c in clocks.values())
        parts.append(f"clocks within {1000 * off:.1f} ms (measured to {1000 * max(c.within for c in clocks.values()):.1f} ms)")
    if speeds:
        kind = allreduce.backend()
        slowest = min(speeds, key=lambda group: (len(group) > 2, speeds[group]))
        widest = max(speeds, key=len)
        between = " and ".join(slowest) if len(slowest) < 3 else "all"
        whole = f", {speeds[widest]:.3g} over all" if widest != slowest else ""
        parts.append(f"all-reduce of {allreduce.MESSAGE[kind] >> 20} MiB by {kind} {speeds[slowest]:.3g} GB/s ({between}){whole}")
    free, need = min(f.disk_free for f in facts), disk_needed(recipe, first.checkpoints)
    return "; ".join([*parts, f"disk {size(free)} free, {size(need)} needed"])


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        return float(text or default)
    except ValueError:
        raise UserError(f"{name}={text}: not a number") from None
