"""What the facts mean: which nodes the job must do without, and what is the user's to mend. Pure functions of what was gathered and measured.

One rule runs through it: what is wrong on some nodes is those nodes' fault, what is wrong on all of them is the recipe's. Where nodes differ,
the majority is right; where there is none (two nodes), nobody can tell who is, and the user must look. A GPU that is broken is broken,
however many are. Of two nodes that are slow or stuck together both are left out: the job goes on, and somebody can look at them in peace.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_infimed.config import Recipe
from megatron_infimed.preflight.facts import Facts

CLOCK_SECONDS = 5.0
"""That a clock may be off."""
FREE_MEMORY = 0.8
"""Share of a GPU's memory that must be free."""
SLOWEST = 0.5
"""Share of the median bandwidth below which a node is bad."""


@dataclass(frozen=True)
class Clock:
    """A node's clock against rank 0's."""

    ahead: float
    """Seconds."""
    within: float
    """Half of the time that asking took: the measurement is no better."""


@dataclass
class Finding:
    """Nothing in it: all is well."""

    bad: dict[str, list[str]] = field(default_factory=dict)
    """Nodes to leave out, and why."""
    mistakes: list[str] = field(default_factory=list)
    """The user's to mend; leaving out nodes would not help."""

    def __bool__(self) -> bool:
        return bool(self.bad or self.mistakes)

    def blame(self, nodes: Iterable[str], why: str) -> None:
        for node in nodes:
            reasons = self.bad.setdefault(node, [])
            if why not in reasons:
                reasons.append(why)

    def lines(self) -> list[str]:
        return [f"bad node {node}: {'; '.join(reasons)}" for node, reasons in sorted(self.bad.items())]


def judge(recipe: Recipe, facts: Sequence[Facts], clocks: Mapping[str, Clock]) -> Finding:
    """Everything that can be told without a collective."""
    finding = Finding(mistakes=recipe.problems(len(facts)))
    _versions(facts, finding)
    _clocks(facts, clocks, finding)
    _gpus(facts, finding)
    _paths(facts, finding)
    _shared(recipe, facts, finding)
    _disk(recipe, facts, finding)
    return finding


def _versions(facts: Sequence[Facts], finding: Finding) -> None:
    for what in dict.fromkeys(name for f in facts for name in f.versions):
        has = _by_node(facts, lambda f, what=what: f.versions.get(what, "missing"))
        value, count = Counter(has.values()).most_common(1)[0]
        if 2 * count > len(has):
            for node in has:
                if has[node] != value:
                    finding.blame([node], f"{what} {has[node]} there, {value} on {count} other node{'s' * (count > 1)}")
        else:
            each = "; ".join(f"{v} on {_names(n for n in has if has[n] == v)}" for v in dict.fromkeys(has.values()))
            finding.mistakes.append(
                f"the nodes have different versions of {what}, and no majority has one: {each}: install the same everywhere"
            )


def _clocks(facts: Sequence[Facts], clocks: Mapping[str, Clock], finding: Finding) -> None:
    ahead = {node: clock.ahead for node, clock in clocks.items()}
    file_servers = [ahead[f.node] + f.file_clock for f in facts if f.local_rank == 0]
    right = _agreed(list(ahead.values()))
    if right is None:  # two nodes: a file server, if there is one, knows better
        right = _agreed([*ahead.values(), *file_servers])
    if right is None:
        each = ", ".join(f"{node} {seconds:+.1f} s" for node, seconds in ahead.items())
        finding.mistakes.append(
            f"the nodes' clocks differ, and no majority agrees on the time ({each}): set them (chronyc tracking), or leave out the wrong "
            "ones (sbatch --exclude=NODE)"
        )
        return
    for node, clock in clocks.items():
        off = clock.ahead - right
        if abs(off) - clock.within > CLOCK_SECONDS:
            side = "ahead" if off > 0 else "behind"
            finding.blame(
                [node], f"its clock is {abs(off):.1f} s {side} (measured to {1000 * clock.within:.1f} ms; {CLOCK_SECONDS:g} s may be)"
            )


def _agreed(times: Sequence[float]) -> float | None:
    """The time that more than half are near to."""
    middle = statistics.median_low(times)
    return middle if 2 * sum(abs(t - middle) <= CLOCK_SECONDS for t in times) > len(times) else None


def _gpus(facts: Sequence[Facts], finding: Finding) -> None:
    most, nodes = max(f.gpu.visible for f in facts), {f.node for f in facts}
    if len(nodes) == len({f.node for f in facts if f.gpu.wrong}) > 1:
        finding.mistakes += dict.fromkeys(f"no node can use its GPUs: {f.gpu.wrong}" for f in facts if f.gpu.wrong)
        return
    for f in facts:
        gpu, name = f.gpu, f"GPU {f.local_rank}" + f" ({f.gpu.name})" * bool(f.gpu.name)
        if gpu.wrong:
            finding.blame([f.node], f"{name}: {gpu.wrong}")
        elif gpu.visible < most:
            finding.blame([f.node], f"{gpu.visible} GPU{'s' * (gpu.visible != 1)} there, {most} elsewhere")
        elif 0 < gpu.visible <= f.local_rank:
            finding.mistakes.append(
                f"process {f.local_rank} of {f.node} has no GPU, it sees {gpu.visible}: start {gpu.visible} processes a node"
            )
        elif gpu.free < FREE_MEMORY:
            finding.blame([f.node], f"{name}: {1 - gpu.free:.0%} of its memory is taken by another process")


def _paths(facts: Sequence[Facts], finding: Finding) -> None:
    nodes = {f.node for f in facts}
    for what in dict.fromkeys(name for f in facts for name in f.trouble):
        hit = {f.node: f.trouble[what] for f in facts if what in f.trouble}
        if len(hit) == len(nodes):
            finding.mistakes += [f"{what}: {text}" for text in dict.fromkeys(hit.values())]
        else:
            for node, text in hit.items():
                finding.blame([node], f"{what}, which {len(nodes) - len(hit)} of {len(nodes)} nodes can use: {text}")


def _shared(recipe: Recipe, facts: Sequence[Facts], finding: Finding) -> None:
    nodes, blind = {f.node for f in facts}, {f.node for f in facts if not f.sees_output}
    if 2 * len(blind) < len(nodes):
        finding.blame(
            sorted(blind), f"{recipe.output} is another folder there: it lacks what {facts[0].node} has just written (not mounted?)"
        )
    elif blind:
        finding.mistakes.append(
            f"{recipe.output} is not one folder for all: what {facts[0].node} writes there, {_names(sorted(blind))} cannot see: "
            "set output to a file system that all nodes share"
        )


def _disk(recipe: Recipe, facts: Sequence[Facts], finding: Finding) -> None:
    least = min((f for f in facts if "output" not in f.trouble), key=lambda f: f.disk_free, default=None)
    if least is not None and least.disk_free < (need := disk_needed(recipe, least.checkpoints)):
        finding.mistakes.append(
            f"{recipe.output} has {size(least.disk_free)} free, but needs {size(need)} for checkpoints of {size(checkpoint_bytes(recipe))} each "
            f"(checkpoint.keep {recipe.checkpoint.keep}, and one being written): free space, set output to another disk, or lower checkpoint.keep"
        )


def disk_needed(recipe: Recipe, there: int) -> int:
    """Bytes for the checkpoints that will be there at once, less those that are. checkpoint.keep_every's are not foreseen."""
    at_once = recipe.checkpoint.keep + 1 if recipe.checkpoint.every else 1
    return max(1, at_once - there) * checkpoint_bytes(recipe)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Weights, and the optimizer's 12 bytes for each parameter that learns."""
    lm, v, learns = recipe.model.language, recipe.model.vision, recipe.trainable
    H, C, F = lm.hidden_size, v.hidden_size, v.ffn_hidden_size
    heads = lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    layer = 2 * H * (heads[0] + heads[1]) + 2 * lm.head_dim + 3 * H * lm.ffn_hidden_size + 2 * H
    language = lm.vocab_size * H * (1 if lm.tied_embeddings else 2) + lm.num_layers * layer + H
    tower = 3 * v.patch_size**2 * C + C + v.grid**2 * C + v.built_layers * (4 * C * C + 2 * C * F + F + 9 * C)
    projector = C * H + H * H + 2 * H
    parts = ((language, learns.language), (tower, learns.vision), (projector, learns.projector))
    weight = 4 if recipe.precision.params == "float32" else 2
    return sum(number * (weight + 12 * learns) for number, learns in parts)


def judge_speed(speeds: Mapping[tuple[str, ...], float], minimum: float, relative: bool) -> Finding:
    """The bandwidths of node pairs (or of one node's GPUs), in GB/s.

    A node counts by its best pair: a slow one spoils its neighbours' other pair, not their best.

    Args:
        minimum: absolute, 0 for none.
        relative: whether a node far below the others is bad. Gloo on busy CPUs says little about the network.
    """
    finding = Finding()
    best = {node: max(speed for pair, speed in speeds.items() if node in pair) for pair in speeds for node in pair}
    if not best:
        return finding
    usual = statistics.median(best.values())
    slow = {node for node, speed in best.items() if speed < max(minimum, usual * SLOWEST if relative else 0)}
    if len(slow) == len(best) > 2:
        finding.mistakes.append(
            f"all-reduce is slow between all {len(best)} nodes: {max(best.values()):.3g} GB/s at best, INFIMED_MIN_GBPS is {minimum:g}: "
            "see to NCCL's network settings in launch/site.sh, or lower it"
        )
        return finding
    for node in sorted(slow):
        if len(best) == 2:
            (pair, speed), *_ = speeds.items()
            why = f"all-reduce between {' and '.join(pair)} reaches {speed:.3g} GB/s, INFIMED_MIN_GBPS is {minimum:g}; either may be the cause"
        elif len(best) == 1:
            why = f"all-reduce among its processes reaches {best[node]:.3g} GB/s, INFIMED_MIN_GBPS is {minimum:g}"
        else:
            why = f"all-reduce with its neighbours reaches {best[node]:.3g} GB/s at best, the usual node {usual:.3g}"
        finding.blame([node], why)
    return finding


def judge_stuck(nodes: Mapping[int, str], groups: Iterable[tuple[str, ...]], trouble: Mapping[int, str], answer: set[int]) -> Finding:
    """An all-reduce in groups of nodes that did not come to its end.

    Args:
        nodes: of the ranks.
        trouble: what the ranks say that did not get through.
        answer: ranks that are alive.

    Raises:
        RuntimeError: it worked in none of several groups although all answer: that is the settings or the network, not a node.
    """
    finding, groups = Finding(), list(groups)
    if len(groups) > 1 and answer >= nodes.keys() and all(any(nodes[rank] in group for rank in trouble) for group in groups):
        told = "; ".join(dict.fromkeys(trouble.values()))
        raise RuntimeError(
            f"all-reduce worked nowhere, so no node is left out: {told}; see to NCCL's network settings in launch/site.sh (NCCL_SOCKET_IFNAME, "
            "GLOO_SOCKET_IFNAME), and to /dev/shm in a container"
        )
    for group in groups:
        stuck = {rank: text for rank, text in trouble.items() if nodes[rank] in group}
        gone = [rank for rank, node in nodes.items() if node in group and rank not in answer]
        for rank in gone:
            finding.blame([nodes[rank]], f"rank {rank} does not answer any more: it is stopped, dead or cut off in an all-reduce")
        if stuck and not gone and len(group) <= 2:
            among = " and ".join(group)
            told = "; ".join(dict.fromkeys(stuck.values()))
            finding.blame(group, f"all-reduce {'between' if len(group) > 1 else 'on'} {among} did not work: {told}")
    return finding


def judge_absent(nodes: Mapping[int, str], trouble: Mapping[int, str]) -> Finding:
    """Ranks that have not said what they were asked.

    Raises:
        RuntimeError: nobody knows their nodes; or they are most nodes, and the fault lies rather with what is between them and rank 0.
    """
    if unknown := {rank: why for rank, why in trouble.items() if rank not in nodes}:
        raise RuntimeError(f"ranks of unknown nodes: {'; '.join(f'rank {rank} {why}' for rank, why in unknown.items())}")
    finding, silent = Finding(), dict.fromkeys(nodes[rank] for rank in trouble)
    if 2 * len(silent) > len(every := set(nodes.values())):
        raise RuntimeError(
            f"{len(silent)} of {len(every)} nodes did not get through to rank 0 on {nodes[0]}, so none of them is left out: "
            f"{_names(silent)} ({'; '.join(dict.fromkeys(trouble.values()))})"
        )
    for node in silent:
        ranks = [rank for rank in trouble if nodes[rank] == node]
        finding.blame(
            [node], f"rank{'s' * (len(ranks) > 1)} {_names(map(str, ranks))} {'; '.join(dict.fromkeys(trouble[r] for r in ranks))}"
        )
    return finding


def _by_node(facts: Sequence[Facts], value: Callable[[Facts], str]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for f in facts:
        found.setdefault(f.node, {})[value(f)] = None
    return {node: " and ".join(values) for node, values in found.items()}


def _names(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def size(count: float) -> str:
    """Bytes for people."""
    power = min(3, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}" if power < 3 else f"{count / 1e9:,.1f} GB"
