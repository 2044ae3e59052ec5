"""Recipes as files: YAML with `base:`, then `key.path=value` words, validated as a whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_infimed.config import Recipe
from megatron_infimed.errors import UserError


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overlays and validates a recipe.

    Args:
        path: YAML file; `base:` names another one, relative to it.
        overrides: words `a.b.c=value`; the value is YAML, so `data.sources=[{prefix: x}]` works.

    Raises:
        UserError: listing every problem with its path.
    """
    tree = _read(Path(path), ())
    for word in overrides:
        _override(tree, word)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as e:
        lines = [f"  {_where(err['loc'])}: {err['msg'].removeprefix('Value error, ')}" for err in e.errors()]
    else:
        lines = [f"  {line}" for line in recipe.problems()]
        if not lines:
            return recipe
    raise UserError("\n".join([f"{path}: {len(lines)} problem{'s' if len(lines) > 1 else ''} in the recipe", *lines]))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; load_recipe reads it back to an equal Recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


# What a run directory's checkpoints do not depend on: it may change when a run goes on.
_FREE = {
    "output": ..., "parallel": ..., "checkpoint": ..., "guards": ..., "log": ..., "max_steps": ..., "init_from": ...,
    "precision": {"layers", "recompute"},
    "data": {"decoder", "decode_threads", "prefetch", "sources", "tokenizer", "max_corrupt"},
    "batch": {"micro_rows", "vision_images", "loss_tokens"},
}  # fmt: skip


def what_decides(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide what training makes of its data; not the layout, not how often it logs or saves."""
    return recipe.model_dump(mode="json", exclude=_FREE)  # type: ignore[arg-type]


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: base refers back to itself: {' -> '.join(str(p) for p in (*seen, path.resolve()))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot read the recipe ({e.strerror}); launch/recipes/ holds those that ship") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, this is {type(tree).__name__}")
    base = tree.pop("base", None)
    return _overlay(_read(path.parent / str(base), (*seen, path.resolve())), tree) if base is not None else tree


def _overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(under)
    for key, value in over.items():
        out[key] = _overlay(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _override(tree: dict[str, Any], word: str) -> None:
    path, sign, text = word.partition("=")
    if not sign or not path:
        raise UserError(f"{word!r}: an override is key.path=value, for example optimizer.lr=2e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"{word!r}: the value is not YAML: {' '.join(str(e).split())}") from None
    *parents, leaf = path.split(".")
    node: Any = tree
    for i, key in enumerate(parents):
        node = _step(node, key, parents[: i + 1], word)
    if isinstance(node, list):
        node[_index(node, leaf, word)] = value
    else:
        node[leaf] = value


def _step(node: Any, key: str, path: list[str], word: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, word)]
    child = node.setdefault(key, {})
    if child is None:
        child = node[key] = {}
    if not isinstance(child, dict | list):
        raise UserError(f"{word!r}: {'.'.join(path)} is a value, it has no keys below it")
    return child


def _index(node: list[Any], key: str, word: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"{word!r}: {key!r} is not one of the list's places 0 to {len(node) - 1}")
    return int(key)


def _where(loc: tuple[int | str, ...]) -> str:
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc)
    return text.lstrip(".") or "recipe"
