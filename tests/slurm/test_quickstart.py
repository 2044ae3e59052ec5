"""The quickstart's whole chain by `stages submit`, against `stages run`: INFIMED_QUICKSTART=1 pytest tests/slurm/test_quickstart.py, 20 minutes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import chains
from tests.distributed import runs
from tests.slurm.conftest import ROOT, Slurm

CHAIN = Path("examples/quickstart/chain.yaml")


@pytest.mark.skipif(not os.environ.get("INFIMED_QUICKSTART"), reason="twenty minutes; INFIMED_QUICKSTART=1 runs it")
def test_submitted_it_ends_with_the_losses_of_run(slurm: Slurm, project: Path) -> None:
    (project / "examples").symlink_to(ROOT / "examples")
    chains.stages("submit", CHAIN, env=slurm.env, cwd=project, timeout=3600)
    there = project / "runs" / "quickstart"
    jobs = json.loads((there / "chain" / "jobs.json").read_text())["jobs"]
    ended = {stage: slurm.wait(number, 3600) for stage, (number, _) in jobs.items()}
    assert set(ended.values()) == {"COMPLETED"}, ended
    here = project.parent / "here"
    here.mkdir()
    for name in ("examples", "megatron_infimed", "tools"):
        (here / name).symlink_to(ROOT / name)
    chains.stages("run", CHAIN, cwd=here, timeout=3600)
    for stage in ("pretrain", "sft_general", "sft_medical", "sft_cross"):
        assert runs.figures(there / stage) == runs.figures(here / "runs" / "quickstart" / stage), stage
    scores = [json.loads((run / "summary.json").read_text()) for run in (there, here / "runs" / "quickstart")]
    assert scores[0]["held_out"] == scores[1]["held_out"] and scores[0]["by_kind"] == scores[1]["by_kind"]
