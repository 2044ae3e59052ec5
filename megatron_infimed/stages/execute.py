"""Stages executed on this machine, one after another.

`begin` and `end` frame a stage wherever it runs: the first looks whether it is to run at all and may (inputs, gates), the second records that it
is done. Commands of several processes are started by torch's elastic launcher, called as a library: under the command torchrun a user's
mistake would end in a traceback of torchrun's own. A stage that was stopped or killed goes on where it can: training, preprocessing and
evaluation all do.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_infimed import notes
from megatron_infimed.errors import UserError
from megatron_infimed.stages.chain import Chain, Command, Gate, Stage
from megatron_infimed.stages.standing import differences, made_of, read, record, standing_of, standings, write

log = logging.getLogger(__name__)


class StageFailed(UserError):
    """A stage's command did not end well; with its exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def to_do(chain: Chain, redo: bool) -> list[str]:
    """The stages that are not done, in order.

    Raises:
        UserError: some were done with something that has changed since, and redo is not said.
    """
    found = standings(chain)
    if not redo and (stale := [f"  {name}: {few(one.changed)} changed" for name, one in found.items() if one.stale]):
        raise UserError(
            "\n".join([f"{len(stale)} stages are done, but of something else than now", *stale])
            + "\n--redo does them again (what they left is kept beside, as *.before-TIME); --accept takes their results as they are"
        )
    return [name for name, one in found.items() if not one.done]


def accept(chain: Chain) -> list[str]:
    """Records stages that were done with something else as if it had been with what is there now; their names."""
    taken = [name for name, one in standings(chain).items() if one.stale]
    for name in taken:
        record(chain, name, made_of(chain, name), read(chain, f"{name}.json")["seconds"])
    return taken


def run_here(chain: Chain, redo: bool = False, processes: int | None = None, until: str | None = None) -> None:
    """Runs what is to do.

    Args:
        processes: for every command that takes several, whatever the chain says.
        until: the last stage to run.

    Raises:
        StageFailed, UserError: nothing after it is run.
    """
    if until is not None and until not in chain.stages:
        raise UserError(f"--until {until}: the chain has {', '.join(chain.stages)}")
    with locked(chain):
        waiting = to_do(chain, redo)
        for name in chain.stages:
            os.environ["INFIMED_NOTES"] = str(_fresh_notes(chain, name))
            if name not in waiting or not begin(chain, name, redo):
                log.info("%s: done before", name)
            else:
                log.info("%s: begins", name)
                for command in chain.stages[name].commands:
                    _execute(name, command, processes)
                log.info("%s: done in %.0f s", name, end(chain, name))
            if name == until:
                return


def begin(chain: Chain, name: str, redo: bool = False) -> bool:
    """Whether the stage is to run now. If so its beginning is noted, and what an earlier, different run of it has left is set aside.

    It looks at this stage alone: all GPUs of a job wait for it, and those before it were looked at when the chain was started.

    Raises:
        UserError: an input is missing, a gate is closed, or it was done with something else and redo is not said.
    """
    stage, standing = chain.stages[name], standing_of(chain, name)
    if standing.done:
        return False
    if missing := [path for path in stage.reads if not Path(path).exists()]:
        raise UserError(f"{name} reads {', '.join(missing)}, which no stage before it has left")
    for gate in stage.gates:
        _pass(name, gate)
    parts, begun = made_of(chain, name), read(chain, f"{name}.begun.json")
    goes_on = begun is not None and all(part.startswith("code ") for part in differences(begun["made_of"], parts))
    if begun is None or begun["made_of"] != parts:
        if standing.stale and not redo:
            raise UserError(f"{name} was done, but {few(standing.changed)} changed since: --redo does it again, --accept takes it as it is")
        if standing.stale and not goes_on:
            _set_aside(stage)
        write(chain, f"{name}.begun.json", {"made_of": parts, "at": time.time()})
    return True


def end(chain: Chain, name: str) -> float:
    """Records that the stage is done, where it was begun; the seconds since its beginning."""
    begun = read(chain, f"{name}.begun.json")
    if begun is None:
        return 0.0
    seconds = time.time() - begun["at"]
    record(chain, name, begun["made_of"], seconds)
    (Path(chain.output) / f"{name}.begun.json").unlink()
    return seconds


@contextmanager
def locked(chain: Chain) -> Iterator[None]:
    """One `stages run` or `submit` of a chain at a time; the lock goes with the process that holds it."""
    path = Path(chain.output) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{chain.chain} is being run or submitted by process {file.read().strip()}: wait for it, or stop it") from None
        except OSError as e:  # a file system without locks
            log.warning("%s cannot be locked (%s): see to it that the chain is run or submitted once at a time", path, e.strerror)
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _pass(name: str, gate: Gate) -> None:
    try:
        value = json.loads(Path(gate.file).read_text())
        for key in gate.value.split("."):
            value = value[key]
        found = float(value)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{name} does not start: its gate finds no number {gate.value} in {gate.file} ({type(e).__name__})") from None
    low, high = gate.at_least, gate.at_most
    if not ((low is None or found >= low) and (high is None or found <= high)):
        wanted = " and ".join(f"{words} {limit:g}" for words, limit in (("at least", low), ("at most", high)) if limit is not None)
        raise UserError(f"{name} does not start: {gate.value} is {found:g} in {gate.file}, its gate asks for {wanted}")


def _set_aside(stage: Stage) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    recipe = stage.recipe
    for path in [Path(recipe.output)] if stage.kind == "train" and recipe is not None else [Path(p) for p in stage.leaves]:
        if not path.exists():
            continue
        aside = path.with_name(f"{path.name}.before-{stamp}")
        if files := _of_shard(path):
            aside.mkdir()
            for file in files:
                file.rename(aside / file.name)
        else:
            path.rename(aside)
        log.info("%s is now %s", path, aside)


def _of_shard(path: Path) -> list[Path]:
    """All files of a shard, the manifest first, where the path is that: apart from each other they are worth nothing."""
    from megatron_infimed.data.shards import DATA_FILES, shard_file

    files = [path, *(shard_file(path.with_suffix(""), name) for name in DATA_FILES)]
    return files if path.suffix == ".json" and all(file.is_file() for file in files) else []


def _fresh_notes(chain: Chain, name: str) -> Path:
    folder = (Path(chain.output) / f"{name}.notes").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for note in folder.iterdir():
        note.unlink()
    return folder


def _execute(name: str, command: Command, processes: int | None) -> None:
    words = [sys.executable, *command.words[1:]] if command.words[0] == "python" else list(command.words)
    ranks = processes if processes and command.ranks > 1 else command.ranks
    try:
        code = _together(words, ranks) if ranks > 1 else _alone(words)
    except OSError as e:
        raise UserError(f"{name}: cannot run {words[0]} ({e.strerror})") from None
    if code == notes.AGAIN:
        raise StageFailed(f"{name} was stopped by a signal; run the chain again to go on from what it has saved", code)
    if code:
        text = f"{name} failed (exit code {code}): {shlex.join(command.words)}"
        if not any((Path(os.environ["INFIMED_NOTES"]) / note).exists() for note in ("why", "crash")):
            notes.write("crash", text)
        raise StageFailed(text, code)


def _alone(words: Sequence[str]) -> int:
    """Starts the words as one process, which hears of the signals that stop us; its exit code, or AGAIN after such a signal."""
    stopped = False

    def pass_on(number: int, _frame: Any) -> None:
        nonlocal stopped
        stopped = True
        process.send_signal(number)

    process = subprocess.Popen(words)
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = process.wait()
    except BaseException:  # Ctrl-C, which the process has been given too
        process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return notes.AGAIN if stopped else code


def _together(words: Sequence[str], ranks: int) -> int:
    """Starts the words as processes that know of each other; the first exit code that is not 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun and launch/common.sh: the same losses to the last bit
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes have said it themselves
    config = LaunchConfig(
        1, 1, ranks, run_id=f"stage-{os.getpid()}", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1
    )
    try:
        elastic_launch(config, words[0])(*words[1:])
    except ChildFailedError as e:
        return e.get_first_failure()[1].exitcode
    except SignalException:
        return notes.AGAIN
    return 0


def few(parts: Sequence[str]) -> str:
    """The first four, and how many more."""
    return ", ".join(parts[:4]) + f" and {len(parts) - 4} more" * (len(parts) > 4)
