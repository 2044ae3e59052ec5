"""A small chain over real tiny data: two training stages of two processes, the second behind a gate, and a command at either end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.distributed import runs

ROOT = Path(__file__).parents[1]
SHORT = ["batch.rows=2", "checkpoint.every=1", "max_steps=6"]


def make_chain(folder: Path, recipe: Path, **changes: Any) -> Path:
    """Writes FOLDER/chain.yaml; `changes` are laid over its stages (None leaves one out)."""
    two = {"processes": 2}
    first, second = folder / "first", folder / "second"
    stages: dict[str, Any] = {
        "note": {"run": f"{sys.executable} -c \"print('begun')\"", "inputs": [str(recipe)]},
        "first": {"train": str(recipe), "set": [*SHORT, f"output={first}", "stage=first"], "resources": two},
        "measure": {"run": f"{sys.executable} -m tests.chains {first} ${{measured}}", "outputs": ["${measured}"]},
        "second": {
            "train": str(recipe),
            "set": [*SHORT, "max_steps=3", f"output={second}", f"init_from={first}", "stage=second"],
            "resources": two,
            "gates": [{"file": "${measured}", "value": "last.loss", "at_most": 50}],
        },
    }
    stages = {name: stage for name, stage in {**stages, **changes}.items() if stage is not None}
    chain = {"chain": folder.name, "output": str(folder / "chain"), "let": {"measured": str(folder / "measured.json")}, "stages": stages}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain, sort_keys=False))
    return folder / "chain.yaml"


def stages(
    command: str, chain: Path, *words: str, code: int | None = 0, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = 400
) -> str:
    """`python -m megatron_infimed stages COMMAND CHAIN ...`; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_infimed", "stages", command, str(chain), *words],
        capture_output=True, text=True, timeout=timeout, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert code is None or done.returncode == code, text[-4000:]
    assert "Traceback" not in text, text[-4000:]
    return text


def states(chain: Path, *words: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> dict[str, str]:
    """stage -> its state, of `stages status`."""
    return {line["stage"]: line["state"] for line in json.loads(stages("status", chain, *words, "--json", env=env, cwd=cwd))}


def figures(chain: Path) -> dict[str, list[tuple[float, float]]]:
    """(loss, grad_norm) of each step of both training stages."""
    return {name: runs.figures(chain.parent / name) for name in ("first", "second")}


if __name__ == "__main__":  # measures a run: its last loss
    last = (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()[-1]
    Path(sys.argv[2]).write_text(json.dumps({"last": json.loads(last)}))
