"""The house rules that a reader relies on: imports run one way, and heavy optional packages are imported in one place, when needed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_infimed"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each part may import itself and those named.
MAY_IMPORT = {
    "errors": set(),
    "counts": set(),
    "recipe_files": {"config", "errors"},
    "flops": {"config", "counts"},
    "config": {"errors"},
    "optional": {"errors"},
    "log": set(),
    "notes": set(),
    "parallel": {"config", "errors"},
    "intake": {"errors", "optional"},
    "data": {"config", "counts", "errors", "flops", "optional", "intake"},
    "preprocess": {"errors", "notes", "optional", "intake", "data"},
    "model": {"config", "errors", "optional", "data", "parallel"},
    "train": {
        "config",
        "counts",
        "flops",
        "recipe_files",
        "errors",
        "optional",
        "log",
        "notes",
        "data",
        "model",
        "parallel",
        "megatron_infimed",
    },
    "convert": {"config", "recipe_files", "errors", "optional", "log", "data", "model", "parallel", "train", "megatron_infimed", "cli"},
    "evaluate": {"config", "errors", "optional", "log", "notes", "intake", "data", "model", "parallel", "train"},
    "doctor": {"optional", "megatron_infimed"},
    "estimate": {"config", "counts", "errors", "flops", "data", "model", "parallel", "train", "optional"},
    "report": {"config", "errors", "intake", "data", "evaluate"},
    "stages": {"config", "recipe_files", "errors", "log", "notes", "data", "train", "evaluate"},
    "preflight": {"config", "recipe_files", "errors", "notes", "optional", "data", "model", "parallel", "train", "megatron_infimed"},
    "check": {"config", "errors", "optional", "data", "model", "parallel"},
    "cli": None,  # everything
    "__main__": None,
    "__init__": set(),
}
HEAVY = {"transformer_engine", "nvidia", "flash_attn", "apex", "ray", "vllm", "datatrove", "nibabel", "imagecodecs", "pydicom"}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path):
    """(module, whether the statement stands inside a function, or is for type checkers alone)"""
    tree = ast.parse(path.read_text())
    late = [
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) or (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    ]
    inside = {id(node) for part in late for node in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "megatron_infimed":
                yield from ((f"megatron_infimed.{alias.name}", id(node) in inside) for alias in node.names)
            else:
                yield node.module, id(node) in inside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    allowed = MAY_IMPORT[part_of(path)]
    if allowed is None:
        return
    for module, _ in imports(path):
        if module.startswith("megatron_infimed."):
            part = module.split(".")[1]
            part = "megatron_infimed" if part == "__version__" else part
            assert part in allowed | {part_of(path)}, f"{path.name} imports {module}; {part_of(path)} may import {sorted(allowed)}"


def test_parallel_state_and_transformer_config_have_one_place():
    for path in FILES:
        text = path.read_text()
        assert "parallel_state" not in text or path.name == "groups.py" or "import parallel_state" not in text, path
        assert "TransformerConfig(" not in text or path.name in ("presets.py",), path


def test_heavy_packages_are_imported_in_one_file_inside_a_function():
    where: dict[str, set[Path]] = {}
    for path in FILES:
        for module, inside in imports(path):
            name = module.split(".")[0]
            if name in HEAVY:
                assert inside, f"{path}: {module} is imported at the top"
                where.setdefault(name, set()).add(path)
    assert all(len(paths) == 1 for paths in where.values()), where
