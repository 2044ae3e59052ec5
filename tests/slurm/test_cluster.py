"""The test cluster itself: jobs run, fail and wait for each other."""

from __future__ import annotations

import pytest

from tests.slurm.conftest import Slurm


def test_jobs_run_fail_and_depend(slurm: Slurm) -> None:
    good, bad = slurm.sbatch("srun hostname"), slurm.sbatch("exit 3")
    after = slurm.sbatch("true", f"--dependency=afterok:{bad}", "--kill-on-invalid-dep=yes")
    assert slurm.wait(good) == "COMPLETED", slurm.output(good)
    assert slurm.wait(bad) == "FAILED"
    assert slurm.wait(after) == "CANCELLED"


def test_stand_in_gpus_are_handed_out(slurm: Slurm) -> None:
    job = slurm.sbatch("echo gpus $CUDA_VISIBLE_DEVICES", "--gres=gpu:3")
    assert slurm.wait(job) == "COMPLETED" and "gpus 0,1,2" in slurm.output(job)


def test_one_node_can_be_given_variables(slurm: Slurm) -> None:
    with slurm.node_env("n2", ODD="yes"):
        job = slurm.sbatch("srun sh -c 'echo $SLURMD_NODENAME:$ODD'", "--nodes=2")
        assert slurm.wait(job) == "COMPLETED", slurm.output(job)
    assert sorted(slurm.output(job).split()) == ["n1:", "n2:yes"]


def test_container_words_are_taken(slurm: Slurm) -> None:
    job = slurm.sbatch("srun --container-image=a.sqsh --container-mounts=/d:/d sh -c 'echo $STUB_CONTAINER_IMAGE $STUB_CONTAINER_MOUNTS'")
    assert slurm.wait(job) == "COMPLETED" and slurm.output(job).strip() == "a.sqsh /d:/d", slurm.output(job)


@pytest.mark.parametrize("power", [True, False])
def test_a_lost_node_is_noticed_and_mended(fragile: Slurm, power: bool) -> None:
    job = fragile.sbatch("srun sleep 100 & sleep 100", "--nodes=2", "--requeue")
    fragile.until(lambda: fragile.state(job) == "RUNNING")
    fragile.kill("n2")
    if power:
        fragile.kill_tasks("n2")
    fragile.until(lambda: fragile.field(job, "Restarts") == "1", 30)
    assert fragile.nodes()["n2"] == "down*"
    fragile.heal()
    assert fragile.nodes() == {"n1": "idle", "n2": "idle"} and not fragile.run("squeue", "-h")
