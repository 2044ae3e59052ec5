"""Who runs the tasks: this process, processes of this machine, a SLURM array, or Ray; the last three through datatrove's executors. Or
somebody else has started several of us already (`ranks`): then this process is one task, as `place` says.

A task knows only the work folder, so every engine does the same thing. Local pools and Ray run in a child process that is watched: each
task notes its pid in PREFIX.work/running while it works, and when one is gone (out of memory, kill -9) everything is ended with one clear
error; a multiprocessing pool would wait for it for ever. What a task has to say to the user it leaves in PREFIX.work/errors; datatrove's own
log is in PREFIX.work/log. Its completion markers are not used: finished pieces are what a rerun skips.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_infimed.data.safe_files import disk_trouble, lock
from megatron_infimed.errors import UserError
from megatron_infimed.optional import require
from megatron_infimed.preprocess.job import Job
from megatron_infimed.preprocess.merge import merge
from megatron_infimed.preprocess.pieces import run_task

_STALL = 120.0
"""Seconds without a running task after which a local pool is given up."""
_POLL = 0.1
_CHILD = """
import sys
from megatron_infimed.preprocess.follow import follow
follow(int(sys.argv[1]))
from megatron_infimed.preprocess.engines import child
child(*sys.argv[2:])
"""


@dataclass(frozen=True)
class Engine:
    name: Literal["local", "ranks", "slurm", "ray"] = "local"
    tasks: int = 1
    workers: int | None = None
    """Tasks at a time; None: all on a cluster, one a core here."""
    partition: str = ""
    time: str = "24:00:00"
    slurm_args: tuple[tuple[str, str], ...] = ()
    """More options of sbatch, without their dashes."""

    @property
    def at_a_time(self) -> int:
        """Tasks that run at once where it is this machine that runs them."""
        return min(self.tasks, self.workers or (os.cpu_count() or 1))


def check(engine: Engine) -> None:
    """UserError where this engine cannot run here."""
    if engine.name == "ranks":
        place()
        if engine.tasks != 1 or engine.workers:
            raise UserError("--engine ranks: as many tasks run as processes were started; leave out --tasks and --workers")
        return
    if engine.name == "local" and engine.tasks == 1:
        return
    for package in ("datatrove", "ray")[: 1 + (engine.name == "ray")]:
        require(package, f"--engine {engine.name} with {engine.tasks} tasks")
    if engine.name == "slurm" and not shutil.which("sbatch"):
        raise UserError("--engine slurm needs sbatch, which is not on the PATH: go to a login node of the cluster, or take --engine local")
    if engine.name == "slurm" and not engine.partition:
        raise UserError("--engine slurm needs --slurm-partition NAME (`sinfo` lists them)")


def place() -> tuple[int, int]:
    """(rank, world) among the processes that torchrun, a SLURM array or srun has started; UserError where none of them has."""
    env = os.environ
    if "SLURM_ARRAY_TASK_ID" in env:  # first: NVIDIA's containers set RANK and WORLD_SIZE by the step
        rank, world = int(env["SLURM_ARRAY_TASK_ID"]), int(env["SLURM_ARRAY_TASK_COUNT"])
        if rank >= world:
            raise UserError(f"array task {rank} of {world}: number them from 0, as in sbatch --array=0-{world - 1}")
        return rank, world
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    if "SLURM_PROCID" in env:
        return int(env["SLURM_PROCID"]), int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    raise UserError("--engine ranks: neither torchrun nor a SLURM array nor srun has started this process; take --engine local")


class Task:
    """datatrove's pipeline of one step: this rank's pieces."""

    def __init__(self, work: str) -> None:
        self.work = work

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        note = Path(self.work, "running", str(rank))
        with _errors_kept(self.work, str(rank)):
            job = Job.load(self.work)
            with disk_trouble(Path(job.output)):
                aside = note.with_suffix(".tmp")
                aside.write_text(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
                aside.replace(note)
            run_task(job, rank, world_size)
        note.unlink(missing_ok=True)


class Merge:
    """datatrove's pipeline of the job that ends a SLURM run."""

    def __init__(self, work: str) -> None:
        self.work = work

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        with _errors_kept(self.work, "merge"):
            job = Job.load(self.work)
            with lock(Path(job.output)):
                merge(job)
            atexit.register(_tidy, job)  # datatrove logs into it once more


def _tidy(job: Job) -> None:
    with contextlib.suppress(UserError, OSError), lock(Path(job.output)):  # another run may have started here
        if not (job.work / "job.json").exists():
            job.discard()


@contextlib.contextmanager
def _errors_kept(work: str, name: str):
    try:
        yield
    except UserError as e:
        with contextlib.suppress(OSError):  # the disk may be full
            Path(work, "errors", name).write_text(str(e))
        raise


def _raise_errors(job: Job) -> None:
    errors = sorted((job.work / "errors").glob("*"), key=lambda p: (len(p.name), p.name))
    texts = [text for p in errors if (text := p.read_text())]
    if texts:
        more = sum(t != texts[0] for t in texts)
        raise UserError(texts[0] + (f" (and {more} more tasks failed, see {job.work / 'errors'})" if more else ""))


def run_here(job: Job, engine: Engine, told: Callable[[int, int], None]) -> None:
    """Runs all tasks, in this process or in watched ones; `told` as in run_task (with 0, 0 as a sign of life from processes).

    Raises:
        UserError: what a task says, or that one died.
    """
    if engine.name == "local" and engine.tasks == 1:
        run_task(job, 0, 1, told)
        return
    log = job.work / "log" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    words = [str(os.getpid()), engine.name, str(job.work), str(engine.tasks), str(engine.at_a_time), str(log)]
    with disk_trouble(Path(job.output)):
        log.mkdir(parents=True)
        chatter = (log / "engine.log").open("ab")
    with chatter, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *words],
            stdin=subprocess.DEVNULL, stdout=said, stderr=chatter, start_new_session=True, env=_environment(job),
        )  # fmt: skip
        try:
            _watch(process, job, engine, told)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        last = [line for line in said.read().splitlines() if line.startswith("error: ")]
    _raise_errors(job)
    if last:
        raise UserError(last[-1].removeprefix("error: "))
    if process.returncode < 0:
        raise UserError(f"{job.output}: the process that runs the tasks was killed (signal {-process.returncode}); {_REMEDY}")
    if process.returncode:
        text = (log / "engine.log").read_text(errors="replace")
        raise RuntimeError(f"the tasks failed, see {log}:\n{text[-3000:]}")


_REMEDY = "if memory ran out take fewer --workers; run the same command again, finished pieces are kept"


def _environment(job: Job) -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAYON_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "true"}


def _watch(process: subprocess.Popen[Any], job: Job, engine: Engine, told: Callable[[int, int], None]) -> None:
    quiet_since = time.monotonic()
    while process.poll() is None:
        notes = {p: text for p in (job.work / "running").glob("*") if p.suffix != ".tmp" and (text := _text(p))}
        for path, text in notes.items():
            note = json.loads(text)
            if note["host"] == os.uname().nodename and not _alive(note["pid"]) and _text(path) == text and process.poll() is None:
                time.sleep(_POLL)  # an error of its own is told first
                _raise_errors(job)
                raise UserError(f"{job.output}: a worker died (task {path.name}, process {note['pid']}); {_REMEDY}")
        quiet_since = time.monotonic() if notes or engine.name != "local" else quiet_since
        if time.monotonic() - quiet_since > _STALL:
            raise UserError(f"{job.output}: no task has run for {_STALL:.0f} s, a worker must have died; {_REMEDY}")
        told(0, 0)
        time.sleep(_POLL)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def child(name: str, work: str, tasks: str, workers: str, log: str) -> None:
    """Main of the watched process."""
    job = Job.load(work)
    try:
        with disk_trouble(Path(job.output)):  # datatrove's own files
            (_ray if name == "ray" else _pool)(Task(work), int(tasks), int(workers), log)
    except UserError as e:
        print(f"error: {e}", flush=True)
        sys.exit(2)


def _pool(task: Task, tasks: int, workers: int, log: str) -> None:
    from datatrove.executor import LocalPipelineExecutor

    LocalPipelineExecutor([task], tasks=tasks, workers=workers, logging_dir=log, skip_completed=False).run()


def _ray(task: Task, tasks: int, workers: int, log: str) -> None:
    import ray
    from datatrove.executor import RayPipelineExecutor

    alone = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False, "num_cpus": max(workers, os.cpu_count() or 1)}
    ray.init(log_to_driver=False, **alone)
    try:
        RayPipelineExecutor([task], tasks=tasks, workers=workers, logging_dir=log, skip_completed=False, mem_per_cpu_gb=1).run()
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Submitted:
    array: str
    merge: str
    log: Path


def submit(job: Job, engine: Engine) -> Submitted:
    """An array of tasks and the merge that waits for all of them to succeed, in SLURM.

    Raises:
        UserError: no sbatch here, or it refuses.
    """
    import loguru
    from datatrove.executor import SlurmPipelineExecutor

    log = job.work / "log" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    log.mkdir(parents=True)
    loguru.logger.remove()
    loguru.logger.add(log / "submit.log")
    env = _environment(job)
    keep = " ".join(f"{k}={shlex.quote(env[k])}" for k in ("PYTHONPATH", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"))
    common: dict[str, Any] = {
        "time": engine.time, "partition": engine.partition, "qos": None, "requeue_signals": None, "skip_completed": False,
        "env_command": f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH {keep}", "with_srun": False,
    }  # fmt: skip
    more = dict(engine.slurm_args)
    array = SlurmPipelineExecutor(
        [Task(str(job.work))], engine.tasks, workers=engine.workers or -1, cpus_per_task=job.threads, job_name="infimed-pieces",
        logging_dir=str(log / "tasks"), sbatch_args=more, **common,
    )  # fmt: skip
    merging = SlurmPipelineExecutor(
        [Merge(str(job.work))], 1, job_name="infimed-merge", depends=array, logging_dir=str(log / "merge"), mem_per_cpu_gb=4,
        sbatch_args={"kill-on-invalid-dep": "yes", **more}, **common,
    )  # fmt: skip
    for executor in (array, merging):
        executor.launch_merge_stats = _nothing  # type: ignore[method-assign]
    try:
        array.launch_job()
        merging.launch_job()
    except (subprocess.CalledProcessError, OSError) as e:
        raise UserError(
            f"sbatch did not take the job ({e}); its own message stands above, see --slurm-partition, --slurm-time, --slurm-arg"
        ) from None
    ids = Submitted(str(array.job_id), str(merging.job_id), log)
    (job.work / "slurm.json").write_text(json.dumps([ids.array, ids.merge]))
    return ids


def _nothing() -> None: ...


def refuse_busy(job: Job) -> None:
    """UserError while an earlier submission for this output is in SLURM's queue."""
    try:
        ids = json.loads((job.work / "slurm.json").read_text())
    except (OSError, ValueError):
        return
    if shutil.which("squeue") and (left := _queued(ids)):
        raise UserError(f"{job.output}: SLURM jobs {', '.join(left)} are at it; wait for them, or `scancel {' '.join(left)}` and run again")


def wait(job: Job, ids: Submitted, told: Callable[[int, int], None]) -> None:
    """Returns when the merge job has left the queue, whatever came of it; UserError with what a task said."""
    while _queued([ids.merge]):
        told(0, 0)
        time.sleep(1)
    _raise_errors(job)


def _queued(ids: list[str]) -> list[str]:
    done = subprocess.run(["squeue", "-h", "-j", ",".join(ids), "-o", "%F"], capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue failed: {done.stderr.strip()[:200]}")
    return sorted(set(done.stdout.split()))
