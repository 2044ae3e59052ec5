"""What makes a stage stale: settings that decide, inputs, code it can reach, what it left; and what does not."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_infimed.data.shards import DATA_FILES
from megatron_infimed.errors import UserError
from megatron_infimed.stages import execute, standing, status
from megatron_infimed.stages.chain import Chain, Gate, load_chain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in.txt").write_text("data")
    (tmp_path / "helper.py").write_text("x = 1\n")
    (tmp_path / "script.py").write_text("import helper  # comment\n")
    return tmp_path


def load(folder: Path, words: str = "", **first: object) -> Chain:
    a = {"run": f"python {folder}/script.py {words}", "inputs": [f"{folder}/in.txt"], "outputs": [f"{folder}/out.txt"], **first}
    (folder / "c.yaml").write_text(yaml.safe_dump({"chain": "c", "output": f"{folder}/o", "stages": {"a": a, "b": {"run": "true"}}}))
    return load_chain(folder / "c.yaml")


def finish(chain: Chain, folder: Path) -> None:
    (folder / "out.txt").write_text("made")
    for name in chain.stages:
        if execute.begin(chain, name):
            execute.end(chain, name)
    assert all(one.done for one in standing.standings(chain).values())


def changed(chain: Chain) -> dict[str, tuple[str, ...]]:
    standing.code.cache_clear(), standing._source.cache_clear()
    return {name: one.changed for name, one in standing.standings(chain).items()}


def test_nothing_changed(folder):
    finish(load(folder), folder)
    assert changed(load(folder)) == {"a": (), "b": ()}


@pytest.mark.parametrize(
    ("file", "text", "part"),
    [("in.txt", "other", "input {}/in.txt"), ("helper.py", "x = 2", "code {}/helper.py"), ("out.txt", "cut", "its output {}/out.txt")],
)
def test_what_a_stage_is_made_of(folder, file, text, part):
    finish(load(folder), folder)
    (folder / file).write_text(text)
    assert changed(load(folder)) == {"a": (part.format(folder),), "b": ("a before it",)}


def test_settings_count_and_comments_do_not(folder):
    finish(load(folder), folder)
    (folder / "script.py").write_text("# another comment\nimport helper\n")
    assert changed(load(folder)) == {"a": (), "b": ()}
    assert changed(load(folder, "more"))["a"] == ("its commands",)


def test_what_a_run_may_change_while_it_goes_on_counts_once_it_is_done(folder):
    (folder / "s.json").write_text("{}")
    words = [f"data.sources=[{{prefix: {folder}/s}}]", "init_from=null", f"output={folder}/run"]

    def training(*more: str) -> Chain:
        first = {"run": (), "train": "launch/recipes/sft_general_4b.yaml", "set": [*words, *more], "inputs": (), "outputs": ()}
        return load(folder, **first)

    before = standing.made_of(training(), "a")
    for word, part in (
        ("max_steps=3", "recipe.max_steps"), ("data.sources.0.epochs=2", "recipe.data.sources"), ("optimizer.lr=1", "recipe.optimizer"),
    ):  # fmt: skip
        assert standing.differences(before, standing.made_of(training(word), "a")) == [part]
    assert standing.made_of(training("parallel.overlap=false", "log.every=3", "checkpoint.keep=1"), "a") == before


def test_what_follows_is_stale_only_where_something_else_came_out(folder):
    chain = load(folder)
    finish(chain, folder)
    (folder / "helper.py").write_text("x = 3")
    standing.code.cache_clear(), standing._source.cache_clear()
    assert execute.begin(chain, "a", redo=True)
    assert not (folder / "out.txt").exists() and len(list(folder.glob("out.txt.before-*"))) == 1, "what it left is kept beside"
    (folder / "out.txt").write_text("made")
    execute.end(chain, "a")
    assert standing.standings(chain)["b"].done, "the same came out"


def test_stale_stages_are_named_before_anything_runs(folder):
    finish(load(folder), folder)
    (folder / "in.txt").write_text("other")
    with pytest.raises(UserError, match=r"(?s)2 stages are done, but of something else.*a: input .*in.txt changed.*b: a before it"):
        execute.to_do(load(folder), redo=False)
    assert execute.to_do(load(folder), redo=True) == ["a", "b"]
    assert execute.accept(load(folder)) == ["a", "b"]
    assert execute.to_do(load(folder), redo=False) == []


def test_a_stage_that_began_goes_on_and_sets_nothing_aside(folder):
    chain = load(folder)
    finish(chain, folder)
    (folder / "in.txt").write_text("other")
    assert execute.begin(chain, "a", redo=True)
    (folder / "out.txt").write_text("half")
    assert execute.begin(chain, "a", redo=True), "begun again, as after a requeue"
    assert (folder / "out.txt").read_text() == "half"


def test_an_output_that_is_not_there(folder):
    chain = load(folder)
    execute.begin(chain, "a")
    with pytest.raises(UserError, match=r"a ended without .*out.txt"):
        execute.end(chain, "a")


@pytest.mark.parametrize(
    ("text", "limits", "message"),
    [
        ('{"eval": {"loss": 2.0}}', {"at_most": 2.0}, ""),
        ('{"eval": {"loss": 2.0}}', {"at_least": 1, "at_most": 3}, ""),
        ('{"eval": {"loss": 2.0}}', {"at_most": 1.5}, "eval.loss is 2 in .*asks for at most 1.5"),
        ('{"eval": {"loss": NaN}}', {"at_most": 1.5}, "is nan"),
        ('{"eval": {}}', {"at_most": 1.5}, "finds no number eval.loss"),
        ("nonsense", {"at_most": 1.5}, "finds no number"),
    ],
)
def test_gates(folder, text, limits, message):
    (folder / "g.json").write_text(text)
    chain = load(folder, gates=[Gate(file=f"{folder}/g.json", value="eval.loss", **limits).model_dump(exclude_none=True)])
    if message:
        with pytest.raises(UserError, match=message):
            execute.begin(chain, "a")
    else:
        assert execute.begin(chain, "a")


def test_the_code_of_training_is_what_training_imports():
    files = standing.code((standing.PACKAGE / "train/trainer.py",))
    assert {"megatron_infimed/train/step.py", "megatron_infimed/data/packing.py", "megatron_infimed/model/infimed.py"} <= set(files)
    assert not any(part in file for file in files for part in ("/evaluate/", "/report/", "/intake/dicom", "cli.py", "/stages/", "estimate"))


def test_large_files_go_by_size_and_time(folder, monkeypatch):
    monkeypatch.setattr(standing, "BY_CONTENT", 3)
    before = standing.fingerprint(folder / "in.txt")
    assert before.startswith("4 bytes")
    os.utime(folder / "in.txt", (1, 1))
    assert standing.fingerprint(folder / "in.txt") != before
    shutil.rmtree(folder / "o", ignore_errors=True)


def test_a_redo_sets_a_whole_shard_aside(folder):
    made = {f"shard.{name}" for name in (*DATA_FILES, "json")}
    shard = {"outputs": [f"{folder}/shard.json"]}
    for name in (*made, "out.txt"):
        (folder / name).write_text("old")
    finish(load(folder, **shard), folder)
    (folder / "in.txt").write_text("other")
    assert execute.begin(load(folder, **shard), "a", redo=True)
    (aside,) = folder.glob("shard.json.before-*")
    assert {path.name for path in aside.iterdir()} == made and not list(folder.glob("shard.*[!0-9]"))


@pytest.mark.parametrize("text", ["{cut", "[]", '{"seconds": 1}'])
def test_a_damaged_note_is_one_line(folder, text):
    chain = load(folder)
    finish(chain, folder)
    (folder / "o" / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"o/a\.json is damaged: delete it"):
        standing.standings(chain)


def test_code_that_changes_while_a_redo_is_half_done_does_not_undo_it(folder):
    finish(load(folder), folder)
    (folder / "in.txt").write_text("other")
    assert execute.begin(load(folder), "a", redo=True)
    (folder / "out.txt").write_text("half")
    (folder / "helper.py").write_text("x = 5")
    standing.code.cache_clear(), standing._source.cache_clear()
    assert execute.begin(load(folder), "a", redo=True) and (folder / "out.txt").read_text() == "half"
    (folder / "in.txt").write_text("a third")
    assert execute.begin(load(folder), "a", redo=True) and not (folder / "out.txt").exists(), "other data: it begins anew"


def test_a_file_system_without_locks(folder, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with execute.locked(load(folder)):
        assert "cannot be locked (Function not implemented)" in caplog.text
        assert not status._held(folder / "o" / "lock")


def test_one_at_a_time(folder):
    chain = load(folder)
    with execute.locked(chain), pytest.raises(UserError, match=r"c is being run or submitted by process \d+"), execute.locked(chain):
        pass
