"""Recipes: inheritance, overrides, and every problem of a bad one at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_infimed.config import Recipe
from megatron_infimed.errors import UserError
from megatron_infimed.recipe_files import dump_recipe, load_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*ROOT.glob("launch/recipes/*.yaml"), *ROOT.glob("examples/quickstart/recipes/*.yaml")])
PLAIN = "output: x\nschedule: [{until: 1.0, image_size: 384, tokens_per_image: 144}]\n"


def write(folder: Path, text: str = PLAIN, name: str = "r.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_recipes_load_and_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_base_overlays_key_by_key_and_overrides_come_last(tmp_path):
    write(tmp_path, PLAIN + "optimizer: {lr: 3e-4, weight_decay: 0.2}\ndata: {capacity: 512}\n", "base.yaml")
    child = write(tmp_path, "base: base.yaml\noptimizer: {lr: 1e-5}\n")
    recipe = load_recipe(child, ["data.capacity=1024", "schedule.0.tokens_per_image=64", "optimizer.betas=[0.8, 0.9]", "precision.fp8=off"])
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.data.capacity) == (1e-5, 0.2, 1024)
    assert recipe.schedule[0].tokens_per_image == 64 and recipe.optimizer.betas == (0.8, 0.9)


def test_all_problems_are_reported_at_once(tmp_path):
    text = "output: x\nschedule: [{until: 0.5, image_size: 384, tokens_per_image: 100}]\nlearning_rate: 1\noptimizer: {lr: -1}\n"
    with pytest.raises(UserError) as e:
        load_recipe(write(tmp_path, text))
    message = str(e.value)
    for part in ("3 problems", "until: 1.0, got 0.5", "learning_rate", "optimizer.lr"):
        assert part in message


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("parallel.tensor=3", "model.language.num_heads: 32 is not divisible by parallel.tensor 3"),
        ("data.capacity=4090", "capacity 4090 is not a multiple of alignment 16: take 4080"),
        ("schedule.0.until=0.9", "must end at until: 1.0, got 0.9"),
        ("schedule.0.tokens_per_image=150", "150 is not a square"),
        ("schedule.0.image_size=112", "needs 12x12 patches, 112 px give 8x8"),
        ("parallel.sequence=true", "needs parallel.tensor > 1"),
        ("parallel.pipeline=5", "36 language layers do not divide over 5 stages"),
        ("precision.fp8=blockwise", "not a multiple of 128"),
        ("batch.micro_rows=3", "rows 256 is not a multiple of micro_rows 3"),
        ("data.sources=[{prefix: a, weight: 1}]", "data.documents must say"),
        ("data.sources=[{prefix: a}, {prefix: a}]", "listed twice"),
        ("data.sources=[{prefix: a, weight: 1, epochs: 2}]", "weight or epochs, not both"),
        ("optimizer.min_lr=1", "min_lr 1.0 is above lr"),
        ("schedule.3.until=1", "not one of the list's places"),
        ("optimizer", "an override is key.path=value"),
        ("output.x=1", "is a value"),
        ("optimizer.lr=[1", "not YAML"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, word, message):
    with pytest.raises(UserError) as e:
        load_recipe(write(tmp_path), [word])
    assert message in str(e.value)


def test_processes_must_suit_the_layout(tmp_path):
    recipe = load_recipe(write(tmp_path), ["parallel.tensor=2", "parallel.pipeline=2", "batch.rows=6"])
    assert recipe.problems(8) == [] and recipe.problems(12) == []
    assert "does not divide 6 processes" in recipe.problems(6)[0]
    assert "batch.rows: 6 is not a multiple" in recipe.problems(16)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("base: r.yaml\n", "refers back to itself"), ("[1, 2]", "is a mapping"), ("a: [", "not YAML"), ("base: none.yaml\n", "cannot read")],
)
def test_unreadable_recipes(tmp_path, text, message):
    with pytest.raises(UserError) as e:
        load_recipe(write(tmp_path, text))
    assert message in str(e.value)


def test_frozen(tmp_path):
    recipe: Recipe = load_recipe(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
