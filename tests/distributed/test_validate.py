"""The held-out loss: that of the training step on the same rows, the same in every layout, and refusals a user can act on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_infimed.data.chat import load_tokenizer
from megatron_infimed.data.shard_writer import ShardWriter
from megatron_infimed.errors import UserError
from megatron_infimed.parallel import groups
from megatron_infimed.recipe_files import load_recipe
from megatron_infimed.train import checkpoint
from megatron_infimed.train import validate as validation
from megatron_infimed.train.validate import validate
from tests.distributed import runs
from tests.tiny import tiny_images

# Measured worst relative difference (2 cores, gloo, float32): 2.7e-9 over the layouts (CP2), 2.5e-8 to the training step, which sums in float32
TOLERANCE = 1e-7
HELD, MORE = 27, 5  # documents
BROKEN = 5  # of a shard's six pictures

# name: (processes, overrides)
LAYOUTS = {
    "batch-2": (1, ["batch.rows=2", "batch.micro_rows=2"]),
    "batch-64-recompute": (1, ["batch.rows=64", "precision.recompute=full"]),
    "dropout": (1, ["model.dropout=0.3"]),
    "TP2-SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "PP2-VPP2": (2, ["parallel.pipeline=2", "parallel.virtual=2", "batch.micro_rows=2"]),
    "CP2": (2, ["parallel.context=2"]),
    "DP2": (2, []),
    "DP2-overlap": (2, ["parallel.overlap=true", "batch.rows=2"]),
}


def write_shard(prefix: Path, tokenizer: Path, documents: int, first: int) -> Path:
    """Documents of all lengths with 0 to 2 images, one of which does not decode; none of them like another shard's."""
    pictures = tiny_images(6, seed=first)
    pictures[BROKEN] = b"no picture"
    with ShardWriter(prefix, load_tokenizer(str(tokenizer))) as writer:
        for i in range(first, first + documents):
            numbers = [writer.add_image(pictures[(i + k) % 6]) for k in range(i % 3)]
            question = [20 + (7 * i + k) % 300 for k in range(3 + i % 11)]
            answer = [20 + (5 * i + 3 * k) % 300 for k in range(1 + i % 17)]
            segments = [*(("image", k) for k in range(len(numbers))), ("context", question), ("target", answer)]
            writer.add_document(f"held-{i}", "held", segments, numbers)
        writer.finish()
    return prefix


def validate_all(recipe: Path, calls: list[tuple[list[str], list[Path], Path, Path]], processes: int = 1) -> str:
    words = json.dumps([[overrides, [str(p) for p in data], str(file), str(checkpoint)] for overrides, data, file, checkpoint in calls])
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "tests.distributed.validator", str(recipe), words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def groups_are_left():
    yield
    groups.shut_down()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained checkpoint, two held-out shards, a training step over the first of them, and the validations."""
    folder = tmp_path_factory.mktemp("validate")
    recipe = runs.make_data(folder)
    held = write_shard(folder / "held", folder / "tokenizer", HELD, first=0)
    more = write_shard(folder / "more", folder / "tokenizer", MORE, first=100)
    last = runs.RECIPE["schedule"][-1]
    once = [f"data.sources=[{{prefix: {held}}}]", f"schedule=[{json.dumps(last)}]", "batch.rows=32", f"init_from={folder / 'run'}"]
    runs.train_all(recipe, [(folder / "run", []), (folder / "step", once)])
    calls = {1: [([], [held], folder / "one.json", folder / "run"), ([], [held, more], folder / "both.json", folder / "run")], 2: []}
    calls[1].append((["data.max_images=1", "data.overlong=reject"], [held], folder / "rejects.json", folder / "run"))
    for name, (processes, overrides) in LAYOUTS.items():
        calls[processes].append((overrides, [held], folder / f"{name}.json", folder / "run"))
    for processes, those in calls.items():
        validate_all(recipe, those, processes)
    return folder


def result(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_it_is_the_training_step_s_loss_on_the_same_rows(folder):
    """The step's global batch is the whole shard, and its loss is from before the update."""
    ((trained, _),) = runs.figures(folder / "step")
    one, manifest = result(folder, "one"), json.loads((folder / "held.json").read_text())
    print(f"difference to the training step {abs(one['loss'] - trained) / trained:.1e}")
    assert one["loss"] == pytest.approx(trained, rel=TOLERANCE)
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
    assert (one["documents"], one["target_tokens"]) == (HELD, manifest["target_tokens"])
    assert (one["cut"], one["left_out"]) == (0, 0)
    assert one["corrupt_images"] == sum((i + k) % 6 == BROKEN for i in range(HELD) for k in range(i % 3)) > 1
    assert one["rows"] % 2, "over two processes there must be an empty row"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same(folder, name):
    one, other = result(folder, "one"), result(folder, name)
    print(f"{name}: relative difference {abs(other['loss'] - one['loss']) / one['loss']:.1e}")
    assert other["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
    for figure in ("documents", "target_tokens", "corrupt_images", "rows", "inputs"):
        assert other[figure] == one[figure]


def test_several_shards_count_by_their_tokens(folder):
    both, one = result(folder, "both"), result(folder, "one")
    held, more = (both["sources"][str(folder / name)] for name in ("held", "more"))
    assert held == one["sources"][str(folder / "held")]
    assert (more["documents"], both["documents"]) == (MORE, HELD + MORE)
    total = held["loss"] * held["target_tokens"] + more["loss"] * more["target_tokens"]
    assert both["loss"] == pytest.approx(total / both["target_tokens"], rel=1e-12)
    assert abs(held["loss"] - more["loss"]) > 1e-3, "the shards must differ for the mean to mean something"


def test_what_does_not_fit_a_row_is_told(folder):
    rejects = result(folder, "rejects")
    assert rejects["left_out"] == sum(i % 3 == 2 for i in range(HELD))
    assert rejects["documents"] == HELD - rejects["left_out"]


def here(folder: Path, file: Path, data: list[Path], *overrides: str, checkpoint: str | None = None) -> dict[str, Any]:
    """In this process: the figures."""
    return validate(
        load_recipe(folder / "recipe.yaml", [f"output={folder / 'run'}", *overrides]), [str(p) for p in data], file, checkpoint=checkpoint
    )


def test_nothing_is_computed_twice(folder, tmp_path, monkeypatch):
    file, held = tmp_path / "new" / "loss.json", [folder / "held"]
    first = here(folder, file, held)
    assert first["loss"] == result(folder, "one")["loss"], "the newest checkpoint of the recipe's output is the default"
    monkeypatch.setattr(validation, "build_pieces", None)
    assert here(folder, file, held, "batch.rows=8", "log.every=3") == first
    assert json.loads(file.read_text()) == first
    for changed in (["data.max_images=1"], ["schedule.1.tokens_per_image=4"]):
        with pytest.raises(TypeError):  # it goes on to build the model
            here(folder, file, held, *changed)
    with pytest.raises(TypeError):
        here(folder, file, held, checkpoint=str(folder / "step"))
    monkeypatch.undo()
    (folder / "run" / "checkpoints").rename(folder / "run" / "away")
    try:
        with pytest.raises(UserError, match="holds no checkpoint"):
            here(folder, file, held)
    finally:
        (folder / "run" / "away").rename(folder / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("data", "overrides", "checkpoint", "said"),
    [
        (["shard"], [], None, "/shard: the recipe trains on it, so it is not held out"),
        (["held", "link"], [], None, "the recipe trains on it \\(as .*/shard\\)"),
        (["held", "held"], [], None, "the same shard as .*/held, its documents would count twice"),
        (["nowhere"], [], None, "there is no shard"),
        ([], [], None, "name at least one shard"),
        (["held"], [], "nowhere", "nowhere does not exist"),
        (["held"], ["model.language.num_layers=2"], None, "another model than the recipe describes"),
        (["held"], ["parallel.tensor=2"], None, "needs a multiple of 2 processes, there are 1"),
    ],
)
def test_refusals(folder, tmp_path, data, overrides, checkpoint, said):
    for path in folder.glob("shard.*"):
        link = folder / path.name.replace("shard", "link", 1)
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    with pytest.raises(UserError, match=said) as e:
        here(folder, tmp_path / "loss.json", [folder / name for name in data], *overrides, checkpoint=checkpoint)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_no_figure(folder, tmp_path, monkeypatch):
    def spoil(source: Any, models: list[Any]) -> None:
        load_weights(source, models)
        models[0].projector.linear_fc1.bias.data[0] = float("nan")

    load_weights = checkpoint.load_weights
    monkeypatch.setattr(checkpoint, "load_weights", spoil)
    with pytest.raises(UserError, match=r"the held-out loss is nan over .* target tokens"):
        here(folder, tmp_path / "loss.json", [folder / "held"])
    assert not list(tmp_path.iterdir())


def test_the_command(folder, tmp_path):
    """Its words, and that what the user has to put right is one line and exit code 2."""
    words = ["validate", folder / "recipe.yaml", f"output={folder / 'run'}", "--data", folder / "held", "--data", folder / "shard"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_infimed", *words, "--output", tmp_path / "loss.json", "--checkpoint", folder / "run"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "the recipe trains on it" in done.stderr
