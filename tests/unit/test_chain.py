"""What a chain's file may say, and what it is told when it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_infimed.errors import UserError
from megatron_infimed.stages.chain import Chain, load_chain
from megatron_infimed.stages.slurm import options_of

RECIPE = "launch/recipes/sft_general_4b.yaml"


def chain(folder: Path, stages: dict, *words: str, **more: object) -> Chain:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"chain": "c", "output": str(folder / "out"), "stages": stages, **more}, sort_keys=False))
    return load_chain(path, words)


def test_a_stage_comes_after_the_one_above_unless_it_says_otherwise(tmp_path):
    made = chain(tmp_path, {"a": {"run": "x"}, "b": {"run": "x"}, "c": {"run": "x", "after": ["a"]}, "d": {"run": "x", "after": []}})
    assert [made.after(name) for name in "abcd"] == [(), ("a",), ("a",), ()]


def test_what_our_commands_read_and_leave_is_known(tmp_path):
    here = tmp_path / "x.json"
    here.write_text("{}")
    words = [f"output={tmp_path}/run", f"data.sources=[{{prefix: {tmp_path}/x}}]", f"init_from={tmp_path}/before"]
    run = {"train": RECIPE, "set": words}
    options = {"questions": str(here), "output": f"{tmp_path}/eval", "gray": True}
    made = chain(
        tmp_path,
        {
            "before": {"run": "x", "outputs": [f"{tmp_path}/before"]},
            "train": run,
            "look": {"evaluate": RECIPE, "set": words, "options": options},
        },
    )
    assert made.stages["train"].reads == [f"{tmp_path}/x.json", f"{tmp_path}/before/DONE"]
    assert made.stages["train"].leaves == [f"{tmp_path}/run/DONE"]
    assert made.stages["look"].reads == [f"{tmp_path}/run/DONE", str(here)]
    assert made.stages["look"].leaves == [f"{tmp_path}/eval/scores.json"]
    (command,) = made.stages["look"].commands
    assert command.words == (
        "python", "-m", "megatron_infimed", "evaluate", RECIPE, *words, "--questions", str(here), "--output", f"{tmp_path}/eval", "--gray",
    )  # fmt: skip


def test_names_are_filled_in_and_replaced_by_words(tmp_path):
    stages = {"a": {"run": ["echo ${what} $$HOME"]}}
    assert chain(tmp_path, stages, let={"what": "this"}).stages["a"].commands[0].words == ("echo", "this", "$HOME")
    assert chain(tmp_path, stages, "what=that", let={"what": "this"}).stages["a"].commands[0].words == ("echo", "that", "$HOME")


def test_a_number_may_be_named(tmp_path):
    assert chain(tmp_path, {"a": {"run": "echo ${n}"}}, let={"n": 1.5}).stages["a"].commands[0].words == ("echo", "1.5")
    for key in ("let", "resources"):
        with pytest.raises(UserError, match=f"{key} is a mapping"):
            chain(tmp_path, {"a": {"run": "x"}}, **{key: ["x"]})


def test_an_empty_option_of_sbatch_is_none(tmp_path):
    stages = {"a": {"run": "x", "resources": {"sbatch": ["--mem=4G", "${cpu}"]}}}
    for value, wanted in (("", ["--mem=4G"]), ("--partition=cpu", ["--mem=4G", "--partition=cpu"])):
        assert options_of(chain(tmp_path, stages, let={"cpu": value}).stages["a"].resources)[2:] == wanted


def test_resources_are_taken_key_by_key_and_become_options(tmp_path):
    made = chain(
        tmp_path, {"a": {"run": "x", "resources": {"nodes": 4, "cpus": 6}}, "b": {"run": "x"}}, resources={"gpus": 8, "time": "2:00:00"}
    )
    a, b = (made.stages[name].resources for name in "ab")
    assert (a.ranks, b.ranks) == (32, 8)
    assert options_of(a) == ["--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-gpu=6", "--time=2:00:00"]
    assert "--cpus-per-task=3" in options_of(a.model_copy(update={"gpus": 0, "cpus": 3}))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": {}}, "stages.a: give one of run, train, plan, evaluate, validate"),
        ({"a": {"run": "x", "train": RECIPE}}, "not run and train"),
        ({"a": {"run": "x", "options": {"gray": True}}}, "set and options belong to a recipe's command"),
        ({"a": {"run": "x", "after": ["b"]}, "b": {"run": "x"}}, "stages.a.after: b does not stand above it"),
        ({"a": {"run": "x", "inputs": ["/nowhere/at/all"]}}, "stages.a: /nowhere/at/all is not there, and no stage above it makes it"),
        ({"a": {"run": "x", "outputs": ["o"]}, "b": {"run": "x", "outputs": ["o"]}}, "stages.b: o is left by a too"),
        (
            {"a": {"run": "x", "outputs": ["o"]}, "b": {"run": "x", "inputs": ["o/file"], "after": []}},
            "stages.b: o/file is made by a, which its `after` does not name",
        ),
        (
            {"a": {"run": "x", "outputs": ["o"]}, "b": {"run": "x", "gates": [{"file": "o", "value": "v", "at_most": 1}], "after": []}},
            "stages.b: o is made by a, which its `after` does not name",
        ),
        ({"a": {"train": RECIPE, "set": ["output=/"]}}, "lies in a's own folder, which a redo sets aside"),
        ({"a": {"run": "x", "resources": {"nodes": 2, "processes": 3}}}, "processes 3 do not divide over nodes 2"),
        ({"a": {"run": "x", "gates": [{"file": "f", "value": "v"}]}}, "give at_least or at_most"),
        ({"a": {"run": "x", "colour": 1}}, "stages.a.colour: Extra inputs are not permitted"),
        ({"a": {"run": "echo 'open"}}, '"echo \'open" is no command line: No closing quotation'),
        ({"a": {"run": " "}}, "stages.a: an empty command line"),
        ({"a/b": {"run": "x"}}, "stages.a/b.[key]: String should match pattern"),
        ({"a": {"run": "x", "resources": 5}}, "stages.a.resources: Input should be a valid dictionary"),
        ({"a": {"run": "echo ${who}"}}, "${who} in 'echo ${who}' is not among `let`"),
        ({"a": {"run": "echo $5"}}, "write $$ for the sign itself"),
    ],
)
def test_mistakes_are_named(tmp_path, stages, message):
    with pytest.raises(UserError) as said:
        chain(tmp_path, stages)
    assert message in str(said.value)


def test_all_problems_come_at_once(tmp_path):
    with pytest.raises(UserError, match="2 problems in the chain"):
        chain(tmp_path, {"a": {"run": "x", "inputs": ["/no/1", "/no/2"]}})


def test_a_word_must_be_a_name_of_the_chain_or_a_setting_of_a_stage(tmp_path):
    for word in ("split=dev", "b.lr=1", "a"):
        with pytest.raises(
            UserError, match=rf"'{word}': .* has no such name to set; it has run=\.\.\., STAGE\.key\.path=\.\.\. with STAGE one of a$"
        ):
            chain(tmp_path, {"a": {"run": "x"}}, word, let={"run": "r"})
    with pytest.raises(UserError, match="set and options belong to a recipe's command"):
        chain(tmp_path, {"a": {"run": "x"}}, "a.lr=1")


def test_words_are_settings_of_one_stage_behind_its_own(tmp_path):
    plain = {"plan": RECIPE, "set": ["data.sources=[]", "optimizer.lr=1e-3"]}
    made = chain(tmp_path, {"a": plain, "a.b": plain}, "a.optimizer.lr=2e-3", "a.b.optimizer.lr=3e-3", "a.b.optimizer.lr=4e-3")
    assert [stage.recipe.optimizer.lr for stage in made.stages.values() if stage.recipe] == [2e-3, 4e-3]
    assert made.stages["a"].commands[0].words[-1] == "optimizer.lr=2e-3"


def test_words_of_training_reach_what_judges_it(tmp_path):
    fresh = {"set": ["data.sources=[]", "init_from=null"]}
    stages = {
        "w": {"run": "x", "outputs": ["w"]},
        "plan": {"plan": RECIPE, **fresh},
        "train": {"train": RECIPE, **fresh},
        "look": {"validate": RECIPE, "options": {"data": [], "checkpoint": "w", "output": "1"}},
        "second": {"train": RECIPE, "set": [*fresh["set"], "output=second"]},
        "other": {"validate": "launch/recipes/sft_medical_4b.yaml", "options": {"data": [], "checkpoint": "w", "output": "2"}},
    }
    made = chain(tmp_path, stages, "train.optimizer.lr=0.5", "look.optimizer.clip=7")
    recipes = {name: stage.recipe for name, stage in made.stages.items() if stage.recipe}
    assert {name for name, recipe in recipes.items() if recipe.optimizer.lr == 0.5} == {"plan", "train", "look"}
    assert {name for name, recipe in recipes.items() if recipe.optimizer.clip == 7} == {"look"}


def test_times_are_read_as_they_are_written(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "chain: c\noutput: o\nstages: {a: {run: x, resources: {time: 4:00:00}}, b: {run: x, resources: {time: 240}}}"
    )
    made = load_chain(tmp_path / "c.yaml")
    assert [options_of(stage.resources)[-1] for stage in made.stages.values()] == ["--time=4:00:00", "--time=240"]


def test_without_output_a_validation_leaves_what_its_command_does(tmp_path):
    made = chain(tmp_path, {"a": {"run": "x", "outputs": ["w"]}, "b": {"validate": RECIPE, "options": {"checkpoint": "w", "data": []}}})
    assert made.stages["b"].leaves == ["validation.json"]


@pytest.mark.parametrize("path", sorted(Path("launch/chains").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_chains_ask_for_nothing_but_data_and_weights(path):
    with pytest.raises(UserError) as said:
        load_chain(path)
    lines = str(said.value).splitlines()[1:]
    assert lines and all("is not there, and no stage above it makes it" in line for line in lines), lines
    assert load_chain(path, to_run=False).stages, "its state can be asked for all the same"
