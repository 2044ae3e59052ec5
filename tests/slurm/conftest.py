"""A real SLURM for the tests: slurmctld and two slurmd on this host, in a temporary folder, gone at the end. Needs root (it makes device files)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

INSTALL = "apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmctldParameters=preempt_send_user_signal
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={d}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool.%n
SlurmdPidFile={d}/%n.pid
SlurmctldPidFile={d}/slurmctld.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/%n.log
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=24000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=24000 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL PriorityTier=9
"""


class Slurm:
    """The running cluster: partitions `main` and `urgent`, nodes n1 and n2 with 2 CPUs and 8 stand-in GPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [k for k in self.env if k.startswith(("SLURM_", "SBATCH_")) and k != "SLURM_CONF"]:
            del self.env[name]

    def run(self, *words: object, check: bool = True) -> str:
        """A SLURM command's output."""
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, env=self.env, timeout=120)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Submits a script (text) to `main`; the job's id."""
        path = self.folder / f"job-{time.monotonic_ns()}.sh"
        path.write_text(script if script.startswith("#!") else f"#!/bin/bash\n{script}\n")
        return self.run("sbatch", "--parsable", "-p", "main", "-o", self.folder / "%j.out", *options, path).split(";")[0].strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ... of a job (of an array: of each task, by spaces); "" once SLURM forgot it."""
        shown = self.run("scontrol", "show", "job", "-o", job, check=False)
        return " ".join(
            word.removeprefix("JobState=") for line in shown.splitlines() for word in line.split() if word.startswith("JobState=")
        )

    def wait(self, job: str, timeout: float = 120) -> str:
        """The state in which the job ends."""
        end = time.monotonic() + timeout
        while (state := self.state(job)) and any(s in state for s in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")):
            assert time.monotonic() < end, f"job {job} is still {state}: {self.run('squeue')}"
            time.sleep(0.2)
        return state

    def output(self, job: str) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as open_:
        sockets = [open_.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _start(folder: Path) -> list[subprocess.Popen[bytes]]:
    host = socket.gethostname().split(".")[0]
    (folder / "state").mkdir()
    for n in ("n1", "n2"):
        (folder / f"spool.{n}").mkdir()
    for k in range(8):
        os.mknod(folder / f"gpu{k}", 0o666 | 0o020000, os.makedev(1, 3))  # stand-ins must be character devices
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "slurm.conf").write_text(CONF.format(host=host, ports=_free_ports(3), d=folder))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
    commands = [
        ["munged", "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())],
        ["slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf")],
        *(["slurmd", "-D", "-N", n, "-f", str(folder / "slurm.conf")] for n in ("n1", "n2")),
    ]
    started = []
    for command in commands:
        with (folder / f"{command[0]}.out").open("ab") as out:
            started.append(subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True))
        while command[0] == "munged" and not (folder / "munge.sock").exists() and started[-1].poll() is None:
            time.sleep(0.05)
    return started


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    assert not missing, f"no {', '.join(missing)} here: {INSTALL}"
    assert os.geteuid() == 0, "a SLURM of one's own needs root"
    folder = Path(os.path.realpath(tmp_path_factory.mktemp("slurm")))
    cluster, started = Slurm(folder), _start(folder)
    try:
        end = time.monotonic() + 30
        while cluster.run("sinfo", "-h", "-p", "main", "-o", "%t %D", check=False).strip() != "idle 2":
            logs = "".join(p.read_text(errors="replace")[-1500:] for p in folder.glob("*.out"))
            assert time.monotonic() < end and all(p.poll() is None for p in started), logs
            time.sleep(0.1)
        yield cluster
    finally:
        cluster.run("scancel", "-u", "root", "--signal=KILL", check=False)
        for process in reversed(started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL if process.args[0] != "slurmctld" else signal.SIGTERM)  # type: ignore[index]
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
