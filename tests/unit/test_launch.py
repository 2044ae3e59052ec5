"""The shell scripts, by shellcheck (a Debian package; tests/run.sh installs it)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("launch/*.sh", "tools/*.sh", "tests/*.sh", "examples/*/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
)


def test_the_launchers_are_there() -> None:
    names = ("common", "stage", "pretrain_1p7b", "pretrain_4b", "sft_1p7b", "sft_4b", "evaluate", "validate", "preprocess_array")
    assert {f"launch/{name}.sh" for name in names} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script: str) -> None:
    assert shutil.which("shellcheck"), "no shellcheck here: apt-get install -y --no-install-recommends shellcheck"
    done = subprocess.run(["shellcheck", "--external-sources", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
