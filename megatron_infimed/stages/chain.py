"""A chain of stages as a YAML file: what runs after what, with which recipe, inputs and resources.

A stage is one of our commands over a recipe (`train`, `plan`, `evaluate`, `validate`) or any command lines (`run`). It comes after the stage
above it, or after those that `after` names. What it reads and leaves is known for our commands and declared (`inputs`, `outputs`) for others.
`let` gives names to texts that stand in the file as ${name}; words on the command line replace them, and words STAGE.key.path=value are
settings over that stage's recipe, behind its own `set`; those of training are also settings of the stages that plan, validate and evaluate with
the same recipe. Paths are relative to the folder that the commands run in, as in recipes. The same file runs here (execute.py) and on SLURM
(slurm.py).
"""

from __future__ import annotations

import os
import shlex
import string
from collections.abc import Callable, Sequence
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
        found += {"evaluate": [f"{output or 'evaluation'}/scores.json"], "validate": [output or "validation.json"]}.get(self.kind, [])
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

    def before(self, name: str) -> set[str]:
        """All stages that are done when it starts."""
        found: set[str] = set()
        waiting = list(self.after(name))
        while waiting:
            other = waiting.pop()
            if other not in found and other in self.stages:
                found.add(other)
                waiting += self.after(other)
        return found

    def problems(self, to_run: bool = True) -> list[str]:
        """What cannot work although every value is legal by itself; `to_run`: also inputs that nothing makes."""
        out: list[str] = []
        made: dict[str, str] = {}
        names = list(self.stages)
        for i, (name, stage) in enumerate(self.stages.items()):
            if name == "jobs" or name.endswith(".begun"):
                out.append(f"stages.{name}: the chain's own notes are called so, take another name")
            out += [f"stages.{name}.after: {other} does not stand above it" for other in self.after(name) if other not in names[:i]]
            before = self.before(name)
            for path in (*stage.reads, *(gate.file for gate in stage.gates)):
                makers = [maker for what, maker in made.items() if _within(path, what)]
                if not before.issuperset(makers):
                    out.append(f"stages.{name}: {path} is made by {' and '.join(makers)}, which its `after` does not name")
                elif to_run and not makers and path in stage.reads and not Path(path).exists():
                    out.append(f"stages.{name}: {path} is not there, and no stage above it makes it")
            if stage.kind == "train" and stage.recipe is not None and _within(self.output, stage.recipe.output):
                out.append(f"output: {self.output} lies in {name}'s own folder, which a redo sets aside: take another")
            for path in stage.leaves:
                if path in made:
                    out.append(f"stages.{name}: {path} is left by {made[path]} too: give one of them another output")
                made[path] = name
        return out


def load_chain(path: Path, words: Sequence[str] = (), to_run: bool = True) -> Chain:
    """Reads a chain and its recipes.

    Args:
        words: name=text for what `let` names, STAGE.key.path=value over that stage's recipe.
        to_run: from its beginning: what the first stages read must be there.

    Raises:
        UserError: listing every problem with its path.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as e:
        raise UserError(f"{path}: cannot read the chain ({e.strerror}); launch/chains/ holds those that ship") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
        raise UserError(f"{path}: a chain is a mapping with chain, output and stages")
    for key in ("let", "resources"):
        if not isinstance(tree.get(key) or {}, dict):
            raise UserError(f"{path}: {key} is a mapping")
    names, settings = _take(words, tree.get("let") or {}, list(tree["stages"]), path)
    tree = {**_fill_in(tree, names, path), "let": names}
    shared = tree.get("resources") or {}
    for name, stage in tree["stages"].items():
        if isinstance(stage, dict):
            if more := [word for other, word in settings if other == name or _of_its_training(stage, tree["stages"][other])]:
                stage["set"] = [*(stage.get("set") or []), *more]
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


def _take(words: Sequence[str], let: dict[str, Any], stages: list[str], path: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """What words on the command line say: texts by name, beside those of `let`, and settings with their stages."""
    names, settings = {str(name): str(value) for name, value in let.items()}, []
    for word in words:
        name, sign, value = word.partition("=")
        stage = max((one for one in stages if name.startswith(f"{one}.")), key=len, default=None)
        if sign and name in names:
            names[name] = value
        elif sign and stage:
            settings.append((stage, word.removeprefix(f"{stage}.")))
        else:
            have = ", ".join([*(f"{n}=..." for n in names), f"STAGE.key.path=... with STAGE one of {', '.join(stages)}"])
            raise UserError(f"{word!r}: {path} has no such name to set; it has {have}")
    return names, settings


def _of_its_training(stage: dict[str, Any], other: Any) -> bool:
    """Whether a stage plans, validates or evaluates with the recipe that the other one trains."""
    recipe = other.get("train") if isinstance(other, dict) else None
    return recipe is not None and recipe in (stage.get("plan"), stage.get("validate"), stage.get("evaluate"))


class _Loader(yaml.SafeLoader):
    """As YAML 1.2 reads it: 4:00:00 is a text, not a number to the base of 60."""


def _plain(kind: str) -> Callable[[_Loader, yaml.ScalarNode], Any]:
    usual = getattr(yaml.SafeLoader, f"construct_yaml_{kind}")
    return lambda loader, node: node.value if ":" in node.value else usual(loader, node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _plain(_kind))


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
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(made))
