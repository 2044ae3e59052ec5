"""Which stages of a chain are done, and which were done with something that has changed since.

When a stage has ended, OUTPUT/STAGE.json records what it was made of, each part by name: the settings that decide (recipe or command lines),
its inputs, the code, what the stages before it left; and fingerprints of what it left itself. A stage is done when all of that still holds.
Of the code only those source files count that the stage's command can reach through imports, without their comments.
Files up to 64 MiB are known by their content, larger ones by size and time of change, folders by names, sizes and times.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_infimed.errors import UserError
from megatron_infimed.recipe_files import what_decides
from megatron_infimed.stages.chain import Chain, Stage

PACKAGE = Path(__file__).parents[1]
ENTRY = {"train": "train.trainer", "plan": "data.saved_plan", "evaluate": "evaluate.run", "validate": "train.validate"}
"""Modules that our commands begin with."""
BY_CONTENT = 64 * 2**20
MISSING = "missing"


@dataclass(frozen=True)
class Standing:
    """Where a stage stands."""

    done: bool
    seconds: float | None = None
    """It took, when it was done; null where it never was."""
    changed: tuple[str, ...] = ()
    """Parts that are no longer what it was done with."""

    @property
    def stale(self) -> bool:
        return not self.done and self.seconds is not None


def standings(chain: Chain) -> dict[str, Standing]:
    """Every stage's, in the order of the file."""
    out: dict[str, Standing] = {}
    for name in chain.stages:
        out[name] = standing_of(chain, name, [other for other in chain.after(name) if not out[other].done])
    return out


def standing_of(chain: Chain, name: str, not_done: Sequence[str] = ()) -> Standing:
    """A stage's; `not_done`: those of the stages before it that are not."""
    record = read(chain, f"{name}.json")
    if record is None:
        return Standing(False)
    changed = [f"{other} before it" for other in not_done]
    changed += differences(record["made_of"], made_of(chain, name)) if not changed else []
    changed += [f"its output {path}" for path, was in record["outputs"].items() if fingerprint(Path(path)) != was]
    return Standing(not changed, record["seconds"], tuple(changed))


def made_of(chain: Chain, name: str) -> dict[str, str]:
    """What a stage's result depends on: names of parts and their fingerprints."""
    stage = chain.stages[name]
    recipe = stage.recipe
    if recipe is None:
        parts = {"its commands": _hash([c.words for c in stage.commands])}
    else:
        deciding = what_decides(recipe)
        if stage.kind in ("train", "plan"):  # what may change while a run goes on, but not behind a finished one's back
            deciding |= {"max_steps": recipe.max_steps, "data.sources": [s.model_dump(mode="json") for s in recipe.data.sources]}
        parts = {f"recipe.{part}": _hash(value) for part, value in deciding.items()}
        parts["its options"] = _hash(stage.options)
    parts |= {f"input {path}": fingerprint(Path(path)) for path in stage.reads}
    parts |= {f"code {path}": text for path, text in code(_entries(stage)).items()}
    for other in chain.after(name):
        if chain.stages[other].kind == "plan":
            continue  # it saves time and changes nothing
        record = read(chain, f"{other}.json") or {}
        parts[f"what {other} left"] = _hash(record.get("outputs") or record.get("finished"))
    return parts


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(part for part in {*before, *now} if before.get(part) != now.get(part))


def record(chain: Chain, name: str, parts: dict[str, str], seconds: float) -> None:
    """Writes down that a stage is done.

    Raises:
        UserError: something it should have left is not there.
    """
    outputs = {path: fingerprint(Path(path)) for path in chain.stages[name].leaves}
    if missing := [path for path, text in outputs.items() if text == MISSING]:
        raise UserError(f"{name} ended without {', '.join(missing)}: correct `outputs` in the chain, or the command")
    write(chain, f"{name}.json", {"made_of": parts, "outputs": outputs, "seconds": round(seconds, 1), "finished": time.time()})


KEYS = {"jobs.json": {"jobs"}, "begun.json": {"made_of", "at"}, "json": {"made_of", "outputs", "seconds", "finished"}}
"""Of each kind of note, by the end of its name; the first that fits."""


def read(chain: Chain, file: str) -> Any:
    """A note of the chain's folder; null where there is none. UserError where it is not one of ours."""
    wanted = next(keys for end, keys in KEYS.items() if file.endswith(end))
    try:
        value = json.loads((Path(chain.output) / file).read_text())
        if not isinstance(value, dict) or not wanted <= value.keys():
            raise ValueError(file)
        return value
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{chain.output}/{file} is damaged: delete it, and what it was about is done again") from None


def write(chain: Chain, file: str, value: Any) -> None:
    path = Path(chain.output) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{file}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(value, indent=1))
    aside.replace(path)


def fingerprint(path: Path) -> str:
    """See the top of the file."""
    try:
        about = path.stat()
    except OSError:
        return MISSING
    if path.is_dir():
        return _hash(list(_listed(path)))
    if about.st_size > BY_CONTENT:
        return f"{about.st_size} bytes, changed {about.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _listed(folder: Path) -> Iterator[tuple[str, int, int]]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            about = (Path(place) / file).lstat()
            yield str((Path(place) / file).relative_to(folder)), about.st_size, about.st_mtime_ns


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _entries(stage: Stage) -> tuple[Path, ...]:
    """The source files that a stage's commands begin with."""
    found = []
    for words in (command.words for command in stage.commands):
        found += [Path(word) for word in words if word.endswith(".py") and Path(word).is_file()]
        if "megatron_infimed" in words[:-1]:
            found.append(PACKAGE / f"{ENTRY.get(words[words.index('megatron_infimed') + 1], 'cli').replace('.', '/')}.py")
    return tuple(found)


@cache
def code(entries: tuple[Path, ...]) -> dict[str, str]:
    """Hashes of the files of ours that these reach through imports, wherever an import stands. cli.py reaches all, so it is not followed."""
    hashes: dict[str, str] = {}
    waiting = list(entries)
    while waiting:
        path = waiting.pop()
        name = str(path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else path)
        if name not in hashes and path.name != "cli.py":
            hashes[name], imported = _source(path)
            waiting += imported
    return hashes


@cache
def _source(path: Path) -> tuple[str, tuple[Path, ...]]:
    """A file's hash, and the files of ours that it imports: of the package, or beside a script."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    files = [base / f"{module.replace('.', '/')}.py" for module in modules for base in (PACKAGE.parent, path.parent)]
    return _hash(ast.unparse(tree)), tuple(
        file for file in files if file.is_file() and (file.is_relative_to(PACKAGE) or file.parent == path.parent)
    )
