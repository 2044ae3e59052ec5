"""A chain of stages as a YAML file: what runs after what, with which recipe, inputs and resources.

A stage is one of our commands over a recipe (`train`, `plan`, `evaluate`, `validate`) or any command lines (`run`). It comes after the stage
above it, or after those that `after` names. What it reads and leaves is known for our commands and declared (`inputs`, `outputs`) for others.
`let` gives names to texts that stand in the file as ${name}; words on the command line replace them. Paths are relative to the folder that
the commands run in, as in recipes. The same file runs here (execute.py) and on SLURM (slurm.py).
"""

from __future__ import annotations

import shlex
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_infimed.config import Recipe
from megatron_infimed.errors import UserError
from megatron_infimed.recipe_files import load_recipe

Kind = Literal["run", "train", "plan", "evaluate", "validate"]
KINDS: tuple[Kind, ...] = ("run", "train", "plan", "evaluate", "validate")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Resources(_Section):
    """What a stage runs with. Here only `processes` counts."""

    processes: int | None = Field(default=None, gt=0)
    """In all. null: one for each GPU, or one a node without GPUs."""
    nodes: int = Field(default=1, gt=0)
    gpus: int = Field(default=0, ge=0)
    """On each node."""
    cpus: int | None = Field(default=None, gt=0)
    """For each process. null: as the launcher or the site says."""
    time: str | int | None = None
    """Limit for one start of the job: minutes, or SLURM's d-hh:mm:ss. It goes on after it (launch/common.sh)."""
    sbatch: tuple[str, ...] = ()
    """Further options, such as --partition=long."""

    @model_validator(mode="after")
    def _evenly(self) -> Resources:
        if self.ranks % self.nodes:
            raise ValueError(f"processes {self.processes} do not divide over nodes {self.nodes}")
        return self

    @property
    def ranks(self) -> int:
        return self.processes or self.nodes * max(self.gpus, 1)


class Gate(_Section):
    """A number in a JSON file that must be good enough for the stage to start."""

    file: str
    value: str
    """Path of keys: loss, needs_image.accuracy."""
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bound(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least or at_most")
        return self


class Stage(_Section):
    run: tuple[str, ...] = ()
    """Command lines, one after another; no shell reads them (write bash -c '...' where you want one)."""
    train: str | None = None
    plan: str | None = None
    evaluate: str | None = None
    validate_: str | None = Field(default=None, alias="validate")
    set: tuple[str, ...] = ()
    """Words key.path=value over the recipe."""
    options: dict[str, str | int | float | bool | list[str]] = {}
    """Of the command: {questions: q.jsonl, gray: true} is --questions q.jsonl --gray."""
    after: tuple[str, ...] | None = None
    """null: the stage above."""
    inputs: tuple[str, ...] = ()
    """Files and folders it reads, beside those that our commands are known to read."""
    outputs: tuple[str, ...] = ()
    resources: Resources = Resources()
    gates: tuple[Gate, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> Stage:
        given = [kind for kind in KINDS if self.of(kind)]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}" + (f", not {' and '.join(given)}" if given else ""))
        if self.kind == "run" and (self.set or self.options):
            raise ValueError("set and options belong to a recipe's command; write them into run")
        for line in self.run:
            try:
                words = shlex.split(line)
            except ValueError as e:
                raise ValueError(f"{line!r} is no command line: {e}") from None
            if not words:
                raise ValueError("an empty command line")
        return self

    def of(self, kind: Kind) -> Any:
        return self.validate_ if kind == "validate" else getattr(self, kind)

    @property
    def kind(self) -> Kind:
        return next(kind for kind in KINDS if self.of(kind))

    @cached_property
    def recipe(self) -> Recipe | None:
        """Resolved. UserError where it is not a good one."""
        return None if self.kind == "run" else load_recipe(self.of(self.kind), self.set)

    @property
    def commands(self) -> list[Command]:
        """What is started, in order; `python` is the one of the place where it runs."""
        if self.kind == "run":
            return [Command(tuple(shlex.split(line)), self.resources.ranks) for line in self.run]
        options: list[str] = []
        for name, value in self.options.items():
            option = f"--{name.replace('_', '-')}"
            given = value if isinstance(value, list) else [value]
            options += [option] * (value is True) if isinstance(value, bool) else [w for v in given for w in (option, str(v))]
        words = ("python", "-m", "megatron_infimed", self.kind, self.of(self.kind), *self.set, *options)
        return [Command(words, 1 if self.kind == "plan" else self.resources.ranks)]

    @property
    def reads(self) -> list[str]:
        """Files and folders that decide its result."""
        found, recipe = list(self.inputs), self.recipe
        if recipe is not None and self.kind in ("train", "plan"):
            found += [f"{source.prefix}.json" for source in recipe.data.sources]
        if recipe is not None and self.kind == "train" and recipe.init_from:
            found.append(_weights(recipe.init_from))
        if recipe is not None and self.kind in ("evaluate", "validate"):
            found.append(_weights(str(self.options.get("checkpoint", recipe.output))))
            found += [str(self.options[name]) for name in ("questions", "images") if name in self.options]
            data = self.options.get("data", [])
            found += [f"{prefix}.json" for prefix in (data if isinstance(data, list) else [data])]
        return list(dict.fromkeys(found))

    @property
    def leaves(self) -> list[str]:
        """Files and folders that are there when it is done."""
        found, output = list(self.outputs), str(self.options.get("output", ""))
        if self.kind == "train" and self.recipe is not None:
            found.append(f"{self.recipe.output}/DONE")
        found += {"evaluate": [f"{output or 'evaluation'}/scores.json"], "validate": [output]}.get(self.kind, [])
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]
    ranks: int
    """Processes that are started with these words, and know of each other."""


class Chain(_Section):
    chain: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Its name: jobs are called NAME.STAGE."""
    output: str
    """Folder for what the chain remembers: what is done, and of what; jobs; logs of stages that ran here."""
    let: dict[str, str] = {}
    resources: Resources = Resources()
    """Of stages that say nothing else, key by key."""
    stages: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], Stage] = Field(min_length=1)

    def after(self, name: str) -> tuple[str, ...]:
        """The stages that must be done before it."""
        names = list(self.stages)
        above = names[: names.index(name)][-1:]
        given = self.stages[name].after
        return tuple(above) if given is None else given

    def problems(self, to_run: bool = True) -> list[str]:
        """What cannot work although every value is legal by itself; `to_run`: also inputs that nothing makes."""
        out: list[str] = []
        made: dict[str, str] = {}
        names = list(self.stages)
        for i, (name, stage) in enumerate(self.stages.items()):
            if name == "jobs" or name.endswith(".begun"):
                out.append(f"stages.{name}: the chain's own notes are called so, take another name")
            out += [f"stages.{name}.after: {other} does not stand above it" for other in self.after(name) if other not in names[:i]]
            missing = [p for p in stage.reads if not Path(p).exists() and not any(_within(p, q) for q in made)] if to_run else []
            out += [f"stages.{name}: {path} is not there, and no stage above it makes it" for path in missing]
            for path in stage.leaves:
                if path in made:
                    out.append(f"stages.{name}: {path} is left by {made[path]} too: give one of them another output")
                made[path] = name
        return out


def load_chain(path: Path, words: Sequence[str] = (), to_run: bool = True) -> Chain:
    """Reads a chain and its recipes.

    Args:
        words: name=text for what `let` names.
        to_run: from its beginning: what the first stages read must be there.

    Raises:
        UserError: listing every problem with its path.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot read the chain ({e.strerror}); launch/chains/ holds those that ship") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
        raise UserError(f"{path}: a chain is a mapping with chain, output and stages")
    for key in ("let", "resources"):
        if not isinstance(tree.get(key) or {}, dict):
            raise UserError(f"{path}: {key} is a mapping")
    names = _names(tree.get("let") or {}, words, path)
    tree = {**_fill_in(tree, names, path), "let": names}
    shared = tree.get("resources") or {}
    for stage in tree["stages"].values():
        if isinstance(stage, dict):
            own = stage.get("resources") or {}
            stage["resources"] = {**shared, **own} if isinstance(own, dict) else own
            if isinstance(stage.get("run"), str):
                stage["run"] = [stage["run"]]
    try:
        chain = Chain.model_validate(tree)
    except ValidationError as e:
        raise _told(path, [f"{'.'.join(map(str, err['loc']))}: {err['msg'].removeprefix('Value error, ')}" for err in e.errors()]) from None
    if problems := chain.problems(to_run):
        raise _told(path, problems)
    return chain


def _told(path: Path, problems: list[str]) -> UserError:
    return UserError("\n".join([f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)} in the chain", *(f"  {p}" for p in problems)]))


def _names(let: dict[str, Any], words: Sequence[str], path: Path) -> dict[str, str]:
    names = {str(name): str(value) for name, value in let.items()}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or name not in names:
            raise UserError(f"{word!r}: {path} has no such name to set; it has {', '.join(f'{n}=...' for n in names) or 'none'}")
        names[name] = value
    return names


def _fill_in(node: Any, names: dict[str, str], path: Path) -> Any:
    if isinstance(node, dict):
        return {key: _fill_in(value, names, path) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill_in(value, names, path) for value in node]
    if not isinstance(node, str):
        return node
    try:
        return string.Template(node).substitute(names)
    except KeyError as e:
        raise UserError(f"{path}: ${{{e.args[0]}}} in {node!r} is not among `let`: {', '.join(names) or 'it names nothing'}") from None
    except ValueError:
        raise UserError(f"{path}: {node!r} has a $ that begins no ${{name}}; write $$ for the sign itself") from None


def _weights(path: str) -> str:
    """The file that says which weights a run directory or a checkpoint folder holds."""
    return f"{path}/sha256.json" if (Path(path) / "sha256.json").exists() else f"{path}/DONE"


def _within(path: str, made: str) -> bool:
    return Path(path).is_relative_to(made)
