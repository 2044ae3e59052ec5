"""transformers 4.52.4, the version MedEvalKit pins, in a folder of its own: fetched by pip on first use, used by PYTHONPATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "4.52.4"
# Without dependencies, or pip would bring its own torch. requests and what it needs: no longer a dependency of transformers 5.
PACKAGES = (
    f"transformers=={VERSION}", "tokenizers==0.21.*", "huggingface-hub<1", "requests", "urllib3", "idna", "certifi", "charset-normalizer",
)  # fmt: skip


def folder() -> Path:
    """$MEGATRON_INFIMED_HF452, else ~/.cache/megatron_infimed/transformers-4.52.4; filled if it is not there."""
    default = Path.home() / ".cache" / "megatron_infimed" / f"transformers-{VERSION}"
    path = Path(os.environ.get("MEGATRON_INFIMED_HF452", default))
    complete = "\n".join(PACKAGES)
    marker = "complete.txt"
    if (path / marker).is_file() and (path / marker).read_text() == complete:
        return path
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(aside)]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"transformers {VERSION} could not be installed into {path}; set MEGATRON_INFIMED_HF452:\n{done.stderr[-2000:]}"
    )
    (aside / marker).write_text(complete)
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)
    return path


def run(script: Path, *arguments: str | Path) -> str:
    """Runs a script with that version; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(folder()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
