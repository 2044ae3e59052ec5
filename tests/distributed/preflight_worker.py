"""Runs `preflight` on ranks that misbehave. Ranks are forked from one process, because importing torch costs more than all they do.

Reads one line of JSON a job from stdin: a list of ranks {"env": {}, "cwd": "", "fault": "", "words": [recipe, key=value, ...]}; answers with one
line: a list of [exit code, what was printed].
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from megatron_infimed.cli import run
from megatron_infimed.preflight import allreduce
from megatron_infimed.preflight import run as command
from megatron_infimed.recipe_files import load_recipe

measure, gather = allreduce.measure, command.gather


def send_itself(number: int) -> Callable[..., Any]:
    def send(*args: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(600)  # the signal may come in another thread, and this one run on for a moment

    return send


def lose_connection(*args: Any) -> float:
    raise RuntimeError("connection refused")


def hang_before_facts(recipe: Any, rank: int, local_rank: int, node: str, at: Callable[[str], None]) -> Any:
    at("reading a disk that does not answer")
    time.sleep(600)


def stop_before_facts(*args: Any) -> Any:
    send_itself(signal.SIGSTOP)()


def late_clock(*args: Any) -> Any:
    facts = gather(*args)
    real = time.time
    command.time.time = lambda: real() - 3600
    return facts


FAULTS = {
    "": {},
    "dies": {"measure": send_itself(signal.SIGKILL)},
    "stops": {"measure": send_itself(signal.SIGSTOP)},
    "loses": {"measure": lose_connection},
    "hangs": {"gather": hang_before_facts},
    "stops early": {"gather": stop_before_facts},
    "late": {"gather": late_clock},
}


def be_a_rank(rank: dict[str, Any], out: Any) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    os.environ.update(rank["env"])
    os.chdir(rank["cwd"])
    faults = FAULTS[rank["fault"]]
    allreduce.measure, command.gather = faults.get("measure", measure), faults.get("gather", gather)
    code: Any = 0
    try:
        run(lambda: command.preflight(load_recipe(rank["words"][0], rank["words"][1:])))  # type: ignore[arg-type]
    except SystemExit as e:
        code = e.code
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def job(ranks: list[dict[str, Any]]) -> list[tuple[int, str]]:
    with contextlib.ExitStack() as open_:
        outs = [open_.enter_context(tempfile.TemporaryFile()) for _ in ranks]
        pids = []
        for rank, out in zip(ranks, outs, strict=True):
            pids.append(os.fork())
            if pids[-1] == 0:
                be_a_rank(rank, out)
        codes = codes_of(pids)
        for out in outs:
            out.seek(0)
        return [(codes[pid], out.read().decode()) for pid, out in zip(pids, outs, strict=True)]


def codes_of(pids: list[int]) -> dict[int, Any]:
    """Waits for all; one that has stopped itself stays so until the others have ended."""
    codes: dict[int, Any] = {}
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WUNTRACED)
        codes[pid] = "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    for pid, code in codes.items():
        if code == "stopped":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return codes


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(job(json.loads(line))), flush=True)
