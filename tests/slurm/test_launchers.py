"""launch/*.sh as they ship, on two SLURM nodes: training, words, containers, sites, neighbours on a node, jobs that cannot go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_infimed.recipe_files import load_recipe
from tests import jobs
from tests.distributed import runs
from tests.slurm.conftest import ROOT, Slurm
from tests.tiny import tiny_images

TWO = ("--nodes=2", "--gpus-per-node=1")
SHARED = ("--oversubscribe", "--mem=1G")  # instead of the launchers' --exclusive --mem=0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("data"))


def tiny(recipe: Path, output: Path, *more: str) -> list[str]:
    """Words that make a shipped recipe this tiny one."""
    tree = yaml.safe_load(recipe.read_text())
    words = []
    for section, value in tree.items():
        parts = {f"{section}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {section: value}
        words += [f"{name}={json.dumps(v)}" for name, v in parts.items()]
    return [*words, "trainable.projector=true", "init_from=null", f"output={output}", *more]


def write_launcher(project: Path, *lines: str) -> str:
    """A launcher of the test's own, like those that ship; its name."""
    head = "#!/usr/bin/env bash\n#SBATCH --job-name=own --requeue --output=launch/logs/%x-%j.log --open-mode=append\n. launch/common.sh || exit\n"
    (project / "launch" / "own.sh").write_text(head + "\n".join(lines) + "\n")
    return "own.sh"


def test_pretrain_4b_trains_over_two_nodes(slurm: Slurm, project: Path, recipe: Path, tmp_path: Path) -> None:
    words = tiny(recipe, tmp_path / "there", "max_steps=4")
    job = slurm.launch(project, "pretrain_4b.sh", *words, options=TWO)
    assert slurm.wait(job) == "COMPLETED", slurm.log(project, job)
    said = slurm.log(project, job)
    assert "start 1 of pretrain_4b" in said and "on n[1-2], 1 processes a node" in said
    assert "preflight: 2 nodes, 2 processes" in said and re.search(r"pretrain: \d+ steps \(0 done\), DP2 on 2 processes", said), said
    shipped = load_recipe(ROOT / "launch/recipes/pretrain_4b.yaml", [*tiny(recipe, tmp_path / "here", "max_steps=4")])
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(shipped.model_dump(mode="json")))
    runs.train(tmp_path / "same.yaml", tmp_path / "here", processes=2)
    assert runs.figures(tmp_path / "there") == runs.figures(tmp_path / "here"), "two nodes compute what two processes do"


def test_ft_launcher_restarts_processes_within_the_job(slurm: Slurm, project: Path, recipe: Path, tmp_path: Path) -> None:
    words = tiny(recipe, tmp_path / "run", "batch.rows=2", "checkpoint.every=1", "data.sources.0.epochs=2")
    ft = "--export=ALL,INFIMED_LAUNCHER=ft,INFIMED_PREFLIGHT=0"
    job = slurm.launch(project, "pretrain_4b.sh", *words, options=(*TWO, ft))
    saved = [0]

    def further() -> bool:
        steps = [int(path.name.removeprefix("step_")) for path in tmp_path.glob("run/checkpoints/step_????????")]
        return bool(steps) and max(steps) > saved[0] + 1 and not saved.__setitem__(0, max(steps))

    slurm.until(further, log=lambda: slurm.log(project, job))
    slurm.tasks_of(job, word="train")[-1].kill()
    slurm.until(further, log=lambda: slurm.log(project, job))
    assert slurm.field(job, "Restarts") == "0" and slurm.state(job) == "RUNNING", "the job has not noticed"
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.until(lambda: slurm.field(job, "Restarts") == "1", log=lambda: slurm.log(project, job))
    assert slurm.wait(job) == "COMPLETED", slurm.log(project, job)
    said = slurm.log(project, job)
    assert "exit code 75 after a signal, got to step_" in said and said.count("resumed from") == 2
    assert len(runs.figures(tmp_path / "run")) > 20


def test_two_jobs_on_a_node_do_not_collide(slurm: Slurm, project: Path, recipe: Path, tmp_path: Path) -> None:
    one_node = ("--nodes=1", "--gpus-per-node=2", "--nodelist=n1", *SHARED)
    ids = [slurm.launch(project, f"sft_{size}.sh", "general", *tiny(recipe, tmp_path / size), options=one_node) for size in ("4b", "1p7b")]
    slurm.until(lambda: all(slurm.state(job) == "RUNNING" for job in ids))
    assert [slurm.wait(job) for job in ids] == ["COMPLETED"] * 2, "".join(slurm.log(project, job) for job in ids)
    assert runs.figures(tmp_path / "4b") == runs.figures(tmp_path / "1p7b")
    assert all(set(slurm.notes(project, job)) == {"progress", "starts"} for job in ids)


def test_container_and_mounts_from_the_site_or_the_command_line(slurm: Slurm, project: Path) -> None:
    own = write_launcher(
        project, """supervise ranks sh -c 'echo "$STUB_CONTAINER_IMAGE|$STUB_CONTAINER_MOUNTS|$STUB_CONTAINER_WORKDIR"' "$@" """
    )
    (project / "launch" / "site.sh").write_text("export INFIMED_CONTAINER=site.sqsh INFIMED_MOUNTS=/data:/data\n")
    job = slurm.launch(project, own)
    assert slurm.wait(job) == "COMPLETED" and f"site.sqsh|/data:/data|{project}" in slurm.log(project, job), slurm.log(project, job)
    job = slurm.launch(project, own, "--container-image=mine.sqsh", "--container-mounts=/a:/b")
    assert slurm.wait(job) == "COMPLETED" and f"mine.sqsh|/a:/b|{project}" in slurm.log(project, job), slurm.log(project, job)


def test_ranks_are_one_for_each_gpu_and_know_each_other(slurm: Slurm, project: Path) -> None:
    show = """sh -c 'echo "$SLURM_PROCID of $SLURM_STEP_NUM_TASKS at $MASTER_PORT"'"""
    own = write_launcher(project, "both() {", f"ranks {show} && alone {show}", "}", "supervise both")
    job = slurm.launch(project, own, options=("--nodes=2", "--gpus-per-node=3", "--cpus-per-gpu=2"))
    assert slurm.wait(job) == "COMPLETED", slurm.log(project, job)
    told = re.findall(r"(\d) of (\d) at (\d+)", slurm.log(project, job))
    assert len(told) == 7 and {(rank, of) for rank, of, _ in told} == {*((str(k), "6") for k in range(6)), ("0", "1")}
    assert len({port for _, _, port in told}) == 2 and all(20000 <= int(port) < 32768 for _, _, port in told)


def test_a_job_that_gets_nowhere_is_given_up(slurm: Slurm, project: Path) -> None:
    own = write_launcher(project, """supervise ranks sh -c 'echo "so far, 3 parts" >"$INFIMED_NOTES/progress"; exit 7'""")
    job = slurm.launch(project, own, options=("--export=ALL,INFIMED_MAX_IDLE_STARTS=2",))
    assert slurm.wait(job) == "FAILED", slurm.log(project, job)
    assert slurm.field(job, "Restarts") == "2", "the first start has gained something"
    assert slurm.notes(project, job)["why"] == "no progress in 2 starts, all from so far, 3 parts; the last ended with exit code 7\n"
    assert slurm.log(project, job).count("== ") == 6, "each start has its own heading in the log"


def test_what_does_not_end_goes_back_into_the_queue_before_its_time_limit(fragile: Slurm, project: Path) -> None:
    """At the limit itself SLURM would end it for good. What it says after the signal is not the user's mistake."""
    (project / "launch" / "site.sh").write_text('[ "$NOWHERE_TO_BE_FOUND" ] || true\n')  # what a site sources need not suit set -u
    hangs = (
        """sh -c 'trap "echo asked; echo left alone >$INFIMED_NOTES/why" USR1; while [ "$SLURM_RESTART_COUNT" != 1 ]; do sleep 1; done'"""
    )
    own = write_launcher(project, f"supervise ranks {hangs}")
    job = fragile.launch(project, own, options=("--time=1", "--signal=B:USR1@58"))
    assert fragile.wait(job) == "COMPLETED", fragile.log(project, job)
    said = fragile.log(project, job)
    assert fragile.field(job, "Restarts") == "1" and "asked" in said
    assert "it does not end, and the time limit is near: back into the queue from nothing" in said and "failed" not in said


def test_under_ft_launcher_a_mistake_ends_all_processes(slurm: Slurm, project: Path) -> None:
    """One of two finds it; the other would wait for it for ever."""
    own = write_launcher(
        project, """supervise training sh -c 'if [ "$RANK" = 1 ]; then echo "so it is" >$INFIMED_NOTES/why; exit 2; fi; sleep 300'"""
    )
    job = slurm.launch(project, own, options=(*TWO, "--export=ALL,INFIMED_LAUNCHER=ft"))
    slurm.until(lambda: slurm.state(job) == "FAILED", log=lambda: slurm.log(project, job))
    assert slurm.field(job, "ExitCode") == "2:0" and slurm.field(job, "Restarts") == "0" and "failed: so it is" in slurm.log(project, job)


def test_a_mistake_is_final(slurm: Slurm, project: Path, recipe: Path, tmp_path: Path) -> None:
    job = slurm.launch(project, "pretrain_1p7b.sh", *tiny(recipe, tmp_path / "run", "optimizer.lr=-1"), options=TWO)
    assert slurm.wait(job) == "FAILED" and slurm.field(job, "Restarts") == "0" and slurm.field(job, "ExitCode") == "2:0"
    assert "optimizer.lr" in slurm.notes(project, job)["why"] and "Traceback" not in slurm.log(project, job)
    job = slurm.launch(project, "sft_4b.sh", "optimizer.lr=1")
    assert slurm.wait(job) == "FAILED" and "which stage? sbatch launch/sft_4b.sh general|medical|cross" in slurm.log(project, job)
    job = slurm.launch(project, "evaluate.sh", options=("--export=ALL,INFIMED_SITE=/nowhere.sh",))
    assert slurm.wait(job) == "FAILED" and "INFIMED_SITE=/nowhere.sh is not there" in slurm.log(project, job)
    done = subprocess.run(["bash", "launch/pretrain_4b.sh"], cwd=ROOT, capture_output=True, text=True, env=slurm.env)
    assert done.returncode == 2 and "this is a batch script: sbatch" in done.stderr


def test_a_cancelled_job_stays_cancelled(slurm: Slurm, project: Path) -> None:
    own = write_launcher(project, "supervise ranks sh -c 'echo started; sleep 100'")
    for full in ((), ("--full",)):
        job = slurm.launch(project, own)
        slurm.until(lambda job=job: "started" in slurm.log(project, job))
        slurm.run("scancel", *full, job)
        assert slurm.wait(job) == "CANCELLED", slurm.log(project, job)


def test_a_bad_node_is_left_out(fragile: Slurm, project: Path, recipe: Path, tmp_path: Path) -> None:
    """n2 lacks what n1 can read; the job needs one node at least."""
    wrapped = tmp_path / "bin"
    wrapped.mkdir()
    (wrapped / "python").write_text(f'#!/bin/sh\ncd "{tmp_path}/$SLURMD_NODENAME" && exec {shutil.which("python")} "$@"\n')
    (wrapped / "python").chmod(0o755)
    for node in ("n1", "n2"):
        shutil.copytree(recipe.parent, tmp_path / node)
        (tmp_path / node / "launch").symlink_to(project / "launch")
    (tmp_path / "n2" / "shard.text.bin").unlink()
    words = tiny(recipe, tmp_path / "run", 'data.sources=[{"prefix": "shard"}]', "data.tokenizer=tokenizer", "max_steps=2")
    path = f"--export=ALL,PATH={wrapped}:{os.environ['PATH']}"
    job = fragile.launch(project, "pretrain_4b.sh", *words, options=("--nodes=1-2", "--gpus-per-node=1", path))
    fragile.until(lambda: fragile.field(job, "Restarts") == "1")
    assert fragile.wait(job) == "COMPLETED", fragile.log(project, job)
    said = fragile.log(project, job)
    assert "bad node n2: data, which 1 of 2 nodes can use" in said and "back into the queue, without n2" in said
    assert "job " + job + ", on n1, 1 processes" in said and fragile.field(job, "ExcNodeList") == "n2"
    assert len(runs.figures(tmp_path / "run")) == 2


def test_evaluate_goes_on_after_a_kill(slurm: Slurm, project: Path, recipe: Path, tmp_path: Path) -> None:
    runs.train(recipe, tmp_path / "run", "max_steps=1")
    rows = ({"id": f"q{i}", "image": "p.png", "question": "chest? " * (1 + i % 7), "answer": "yes"} for i in range(1500))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "p.png").write_bytes(tiny_images(4)[2])

    words = [recipe, f"output={tmp_path}/run", "--questions", tmp_path / "q.jsonl", "--images", tmp_path, "--max-new-tokens", 2]
    job = slurm.launch(project, "evaluate.sh", *words, "--output", tmp_path / "same", options=TWO)
    assert slurm.wait(job) == "COMPLETED", slurm.log(project, job)
    job = slurm.launch(project, "evaluate.sh", *words, "--output", tmp_path / "eval", options=TWO)
    slurm.until(lambda: list((tmp_path / "eval").rglob("*.jsonl")), log=lambda: slurm.log(project, job))
    slurm.tasks_of(job, word="evaluate")[-1].kill()
    assert slurm.wait(job) == "COMPLETED", slurm.log(project, job)
    said = slurm.log(project, job)
    assert re.search(r"got to \S+, [1-6] batches of questions: back into the queue", said), said
    assert re.search(r"\d+ of 1500 questions were answered before", said)
    assert (tmp_path / "eval" / "answers.jsonl").read_bytes() == (tmp_path / "same" / "answers.jsonl").read_bytes()
    assert json.loads((tmp_path / "eval" / "scores.json").read_text())["all"]["n"] == 1500


def test_preprocess_array_makes_the_same_bytes_and_survives_a_kill(slurm: Slurm, project: Path, tmp_path: Path) -> None:
    corpus = jobs.make_corpus(tmp_path)
    jobs.run(corpus, tmp_path / "local" / "set")
    (tmp_path / "there").mkdir()
    words = [*jobs.words(corpus, tmp_path / "there" / "set")[2:], "--piece-rows", "16"]
    threads = words.index("--threads")
    del words[threads : threads + 2]
    job = slurm.launch(project, "preprocess_array.sh", *words, options=("--array=0-2", "--mem-per-cpu=100M", "--cpus-per-task=1"))
    pieces = tmp_path / "there" / "set.work" / "pieces"
    slurm.until(lambda: list(pieces.glob("f*[0-9]")))
    tasks = slurm.tasks_of(job)
    assert tasks
    for task in tasks:
        task.kill()
    assert slurm.wait(job) == "COMPLETED COMPLETED COMPLETED"
    said = "".join(path.read_text() for path in project.glob("launch/logs/preprocess-*.log"))
    assert "back into the queue" in said and jobs.hashes(tmp_path / "there" / "set") == jobs.hashes(tmp_path / "local" / "set")
    job = slurm.launch(project, "preprocess_array.sh", *words, options=("--array=3-4", "--mem-per-cpu=100M", "--cpus-per-task=1"))
    assert "FAILED FAILED" in slurm.wait(job)
    assert "number them from 0, as in sbatch --array=0-1" in "".join(p.read_text() for p in project.glob("launch/logs/preprocess-*.log"))
