"""The test cluster itself: jobs run, fail and wait for each other."""

from __future__ import annotations

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
