"""tools/convert_checkpoint.py as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.parity import hf


def tool(*words):
    return subprocess.run([sys.executable, "tools/convert_checkpoint.py", *map(str, words)], capture_output=True, text=True, check=False)


def test_import_export_and_an_error(tmp_path):
    hf.qwen3(tmp_path / "language")
    hf.siglip(tmp_path / "vision")
    done = tool("import", "--language", tmp_path / "language", "--vision", tmp_path / "vision", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/run/checkpoints/step_00000000: float32, 18 source tensors not needed\n"
    done = tool("export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    done = tool("import", "--language", tmp_path / "vision", "--vision", tmp_path / "vision", "--output", tmp_path / "other")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path}/vision/config.json: model_type is siglip_vision_model, this model has qwen3; "
        "give a Qwen3 folder, such as Qwen/Qwen3-1.7B or Qwen/Qwen3-4B\n"
    )
    assert not (tmp_path / "other").exists()
