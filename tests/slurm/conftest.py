"""A real SLURM for the tests: slurmctld and two slurmd on this host, in a temporary folder, gone at the end. Needs root (it makes device files).

Nodes n1 and n2 claim 64 CPUs and 8 GPUs each, so that the launchers' own requests fit; the GPUs are stand-ins, containers are taken by
pyxis_stub.c. What a test breaks, `Slurm.heal` mends: each slurmd can be killed and started, each node set down, and each can be given
environment variables that only its tasks see (by a TaskProlog), so that two nodes on one host can differ.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

INSTALL = "apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge gcc libc6-dev faketime"
NODES = ("n1", "n2")
ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("pyxis_stub.c")
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmctldParameters=preempt_send_user_signal
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={d}/munge.socket,cred_expire=5
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
KillWait=8
SlurmdTimeout=3
MessageTimeout=5
TCPTimeout=2
TaskProlog={d}/task_prolog
PlugStackConfig={d}/plugstack.conf
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
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=24000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=24000 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL PriorityTier=9
"""


class Slurm:
    """The running cluster: partitions `main` and `urgent` (which pre-empts), nodes n1 and n2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        """munged, slurmctld, and a slurmd under each node's name."""
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        for name in [k for k in self.env if k.startswith(("SLURM_", "SBATCH_", "SRUN_", "INFIMED_")) and k != "SLURM_CONF"]:
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

    def launch(self, project: Path, script: str, *words: object, options: Sequence[str] = (), partition: str = "main") -> str:
        """Submits launch/`script` of the project as its user would; the job's id."""
        command = ["sbatch", "--parsable", "-p", partition, f"--chdir={project}", *options, project / "launch" / script, *words]
        return self.run(*command).split(";")[0].strip()

    def log(self, project: Path, job: str) -> str:
        """What a launcher's job has said."""
        return "".join(path.read_text(errors="replace") for path in project.glob(f"launch/logs/*-{job}.log"))

    def notes(self, project: Path, job: str) -> dict[str, str]:
        return {path.name: path.read_text() for path in project.glob(f"launch/logs/*-{job}.notes/*")}

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

    def until(self, condition: Callable[[], object], timeout: float = 60, log: Callable[[], str] = str) -> None:
        """Returns once the condition holds; where it never does, `log` says more."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, (
                f"in {timeout} s never: {inspect.getsource(condition).strip()}\n{self.run('squeue')}{self.nodes()}\n{log()}"
            )
            time.sleep(0.1)

    def output(self, job: str) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as Restarts, Reason or ExcNodeList; "" where there is none."""
        found = re.search(rf"(?:^|\s){name}=(\S*)", self.run("scontrol", "show", "job", "-o", job, check=False))
        return found[1] if found and found[1] != "(null)" else ""

    def nodes(self) -> dict[str, str]:
        """State of each node as sinfo shows it: idle, mix, alloc, comp, down, drain, with a * where it does not answer."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines())

    @contextlib.contextmanager
    def node_env(self, node: str, **variables: object) -> Iterator[None]:
        """Tasks that start on `node` (the batch script as well) see these variables; nothing else does."""
        path = self.folder / f"env.{node}"
        path.write_text("".join(f"export {name}={value}\n" for name, value in variables.items()))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def start(self, name: str) -> None:
        """Starts munged, slurmctld, or a node's slurmd, unless it runs. A slurmctld that is started again knows what it knew."""
        again = name in self.daemons
        if again and self.daemons[name].poll() is None:
            return
        conf = str(self.folder / "slurm.conf")
        files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        munged = ["munged", "--foreground", "--force", *(f"--{option}={self.folder}/munge.{option}" for option in files)]
        command = {"munged": munged, "slurmctld": ["slurmctld", "-D", *["-c"] * (not again), "-f", conf]}.get(
            name, ["slurmd", "-D", "-N", name, "-f", conf]
        )
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
        while name == "munged" and not (self.folder / "munge.socket").exists() and self.daemons[name].poll() is None:
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """As if slurmctld or a node's slurmd had crashed (kill -9). A node's slurmstepd and tasks live on, as they do in real life:
        `kill_tasks` ends them."""
        self.daemons[name].kill()
        self.daemons[name].wait(10)

    def kill_tasks(self, node: str) -> None:
        """kill -9 for whatever runs on `node`, and first the slurmstepd above it, which else would tell of it: with `kill` this is a
        node that lost power."""
        tasks, above = [], set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environ = process.environ()
                if environ.get("SLURM_CONF") == self.env["SLURM_CONF"] and environ.get("SLURMD_NODENAME") == node:
                    tasks.append(process)
                    above |= {p for p in process.parents() if p.name().startswith("slurmstepd")}
        for process in (*above, *tasks):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def tasks_of(self, job: str, ranks: str = "", word: str = "") -> list[psutil.Process]:
        """The python processes of a job (of an array: of all its tasks), of these ranks, with this word in their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environ = process.environ()
                ours = environ.get("SLURM_CONF") == self.env["SLURM_CONF"]
                ours &= job in (environ.get("SLURM_JOB_ID"), environ.get("SLURM_ARRAY_JOB_ID"))
                ours &= not ranks or environ.get("SLURM_PROCID", "none") in ranks
                if ours and process.name().startswith("python") and (not word or word in process.cmdline()):
                    found.append(process)
        return found

    def set_node(self, node: str, state: str) -> None:
        """down, drain, resume."""
        self.run("scontrol", "update", f"NodeName={node}", f"State={state}", *(() if state == "resume" else ("Reason=test",)))

    def heal(self, timeout: float = 60) -> None:
        """No jobs, no tasks left behind, both slurmd running, both nodes idle."""
        self.start("slurmctld")
        self.run("scancel", "--full", "-u", "root", check=False)
        self.run("scancel", "-u", "root", "--signal=KILL", check=False)
        for node in NODES:
            (self.folder / f"env.{node}").unlink(missing_ok=True)
            if self.daemons[node].poll() is not None:
                self.kill_tasks(node)
            self.start(node)
        end = time.monotonic() + timeout
        while set((nodes := self.nodes()).values()) != {"idle"} or self.run("squeue", "-h").strip():
            assert time.monotonic() < end and self.daemons["slurmctld"].poll() is None, f"{nodes}\n{self.run('squeue')}{self.logs()}"
            for node, state in nodes.items():
                if state.rstrip("*") in ("down", "drain", "drng"):
                    self.run("scontrol", "update", f"NodeName={node}", "State=resume", check=False)
            time.sleep(0.1)

    def logs(self) -> str:
        return "".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}\n" for path in sorted(self.folder.glob("*.out")))


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as open_:
        sockets = [open_.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _configure(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool.{node}").mkdir()
    for k in range(8):
        os.mknod(folder / f"gpu{k}", 0o666 | 0o020000, os.makedev(1, 3))  # stand-ins must be character devices
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "slurm.conf").write_text(CONF.format(host=host, ports=_free_ports(3), d=folder))
    (folder / "munge.key-file").write_bytes(os.urandom(128))
    (folder / "munge.key-file").chmod(0o400)
    (folder / "task_prolog").write_text(f'#!/bin/sh\n[ ! -e {folder}/env."$SLURMD_NODENAME" ] || cat {folder}/env."$SLURMD_NODENAME"\n')
    (folder / "task_prolog").chmod(0o755)
    version = re.findall(r"\d+", subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout)
    number = "0x" + "".join(f"{int(n):02x}" for n in version[:3])
    words = ["gcc", "-shared", "-fPIC", "-Wall", f"-DSLURM_VERSION={number}", "-o", str(folder / "pyxis.so"), str(STUB)]
    built = subprocess.run(words, capture_output=True, text=True)
    assert built.returncode == 0, f"{shlex.join(words)}: {built.stderr}; {INSTALL}"
    (folder / "plugstack.conf").write_text(f"required {folder}/pyxis.so\n")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "gcc") if not shutil.which(name)]
    assert not missing, f"no {', '.join(missing)} here: {INSTALL}"
    assert os.geteuid() == 0, "a SLURM of one's own needs root"
    folder = Path(os.path.realpath(tmp_path_factory.mktemp("slurm")))
    _configure(folder)
    cluster = Slurm(folder)
    try:
        for name in ("munged", "slurmctld", *NODES):
            cluster.start(name)
        end = time.monotonic() + 30
        while cluster.run("sinfo", "-h", "-p", "main", "-o", "%t %D", check=False).strip() != "idle 2":
            assert time.monotonic() < end and all(p.poll() is None for p in cluster.daemons.values()), cluster.logs()
            time.sleep(0.1)
        yield cluster
    finally:
        cluster.run("scancel", "-u", "root", "--signal=KILL", check=False)
        cluster.run("scancel", "-u", "root", check=False)
        for node in NODES:
            cluster.kill_tasks(node)  # also those of a slurmd that a test killed
        for name, process in reversed(cluster.daemons.items()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM if name == "slurmctld" else signal.SIGKILL)
        for process in cluster.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


@pytest.fixture
def fragile(slurm: Slurm) -> Iterator[Slurm]:
    """The cluster for a test that breaks it: mended afterwards, whatever came of the test."""
    yield slurm
    slurm.heal()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's folder with launch/ as it ships, and logs of its own."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("*.log", "*.notes", "site.sh"))
    for name in ("megatron_infimed", "tools", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder
