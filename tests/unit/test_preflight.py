"""What preflight makes of facts: which nodes are bad, what is the user's mistake. And the small parts that it stands on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_infimed.check import count_parameters
from megatron_infimed.config import LanguageConfig, ModelConfig, Recipe, TrainableConfig, VisionConfig
from megatron_infimed.errors import UserError
from megatron_infimed.preflight import allreduce, facts
from megatron_infimed.preflight.board import Board, expand, nodes_of_ranks
from megatron_infimed.preflight.facts import Facts, Gpu
from megatron_infimed.preflight.judge import (
    Clock,
    Finding,
    checkpoint_bytes,
    disk_needed,
    judge,
    judge_absent,
    judge_speed,
    judge_stuck,
    size,
)
from megatron_infimed.recipe_files import load_recipe

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
VERSIONS = {"python": "3.12.3", "torch": "2.13.0", "code": "0.1.0 aaaa"}
H100 = Gpu(8, "H100", 0.99)


def recipe(**settings: Any) -> Recipe:
    settings = {"batch": {"rows": 240}, **settings}
    return Recipe(output="runs/x", schedule=({"until": 1.0, "image_size": 384, "tokens_per_image": 256},), **settings)  # type: ignore[arg-type]


def cluster(nodes: int = 4, each: int = 2, **settings: Any) -> list[Facts]:
    """Facts of a sound one."""
    return [
        Facts(node * each + local, local, f"n{node + 1}", VERSIONS, **{"disk_free": 10**13, **settings})
        for node in range(nodes)
        for local in range(each)
    ]


def with_node(seen: list[Facts], node: str, **changes: Any) -> list[Facts]:
    return [replace(f, **changes) if f.node == node else f for f in seen]


def judged(seen: list[Facts], ahead: dict[str, float] | None = None, within: float = 0.001, **settings: Any) -> Finding:
    clocks = {f.node: Clock((ahead or {}).get(f.node, 0.0), within) for f in seen}
    return judge(recipe(**settings), seen, clocks)


@pytest.mark.parametrize(("nodes", "each"), [(1, 1), (1, 8), (2, 1), (5, 8)])
def test_a_sound_cluster_has_nothing_to_find(nodes: int, each: int) -> None:
    finding = judged(cluster(nodes, each, gpu=H100))
    assert not finding and finding.lines() == []


# versions and code


@pytest.mark.parametrize(("what", "value"), [("code", "0.1.0 bbbb"), ("torch", "2.12.0"), ("NCCL", "2.28.9")])
def test_other_versions_on_a_minority(what: str, value: str) -> None:
    finding = judged(with_node(cluster(), "n3", versions={**VERSIONS, what: value}))
    assert finding.mistakes == [] and list(finding.bad) == ["n3"]
    assert finding.lines() == [f"bad node n3: {what} {value} there, {VERSIONS.get(what, 'missing')} on 3 other nodes"]


def test_a_package_that_one_node_lacks() -> None:
    finding = judged(with_node(cluster(3), "n1", versions={k: v for k, v in VERSIONS.items() if k != "torch"}))
    assert finding.lines() == ["bad node n1: torch missing there, 2.13.0 on 2 other nodes"]


def test_versions_without_a_majority_are_named_both() -> None:
    seen = with_node(with_node(cluster(), "n1", versions={**VERSIONS, "torch": "2.12.0"}), "n2", versions={**VERSIONS, "torch": "2.12.0"})
    finding = judged(seen)
    assert finding.bad == {}
    assert finding.mistakes == [
        "the nodes have different versions of torch, and no majority has one: 2.12.0 on n1, n2; 2.13.0 on n3, n4: install the same everywhere"
    ]


# clocks


@pytest.mark.parametrize("seconds", [-7.0, 3600.0])
@pytest.mark.parametrize("node", ["n1", "n3"])
def test_a_wrong_clock_is_named_even_that_of_rank_0(node: str, seconds: float) -> None:
    ahead = {n: (seconds if n == node else 0.0) - (seconds if node == "n1" else 0.0) for n in ("n1", "n2", "n3")}
    (line,) = judged(cluster(3), ahead).lines()
    assert line.startswith(f"bad node {node}: its clock is {abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'} (measured to 1.0 ms")


def test_a_clock_is_not_blamed_for_a_slow_answer() -> None:
    assert not judged(cluster(3), {"n2": 8.0}, within=4.0)
    assert judged(cluster(3), {"n2": 8.0}, within=2.0).bad.keys() == {"n2"}


def test_small_differences_of_clocks_are_nobodys_fault() -> None:
    assert not judged(cluster(2), {"n2": 4.9}) and not judged(cluster(4), {"n2": 4.0, "n3": -4.0})


@pytest.mark.parametrize("wrong", ["n1", "n2"])
def test_between_two_clocks_a_file_server_decides(wrong: str) -> None:
    ahead = {"n2": 3600.0 if wrong == "n2" else -3600.0}
    seen = with_node(cluster(2), wrong, file_clock=-3600.0)
    assert judged(seen, ahead).bad.keys() == {wrong}


def test_between_two_clocks_and_no_file_server_the_user_decides() -> None:
    finding = judged(cluster(2), {"n2": 3600.0})
    assert finding.bad == {} and "no majority agrees on the time (n1 +0.0 s, n2 +3600.0 s)" in finding.mistakes[0]


def test_a_wrong_file_server_is_not_the_nodes_fault() -> None:
    assert not judged(cluster(2, file_clock=100.0))


# GPUs


def test_gpus_that_are_broken_missing_or_taken() -> None:
    seen = cluster(5, gpu=H100)
    seen = with_node(seen, "n1", gpu=replace(H100, wrong="it computes wrongly: 1 of 9 entries"))
    seen = with_node(seen, "n2", gpu=replace(H100, visible=7))
    seen = with_node(seen, "n3", gpu=Gpu())
    seen = with_node(seen, "n4", gpu=replace(H100, free=0.79))
    finding = judged(seen)
    assert finding.mistakes == [] and finding.bad["n1"][0] == "GPU 0 (H100): it computes wrongly: 1 of 9 entries"
    assert finding.bad["n2"] == ["7 GPUs there, 8 elsewhere"] and finding.bad["n3"] == ["0 GPUs there, 8 elsewhere"]
    assert finding.bad["n4"] == [f"GPU {i} (H100): 21% of its memory is taken by another process" for i in (0, 1)]
    assert "n5" not in finding.bad


def test_a_broken_gpu_is_bad_on_a_single_node_too() -> None:
    assert judged(cluster(1, gpu=replace(H100, wrong="CUDA error"))).bad.keys() == {"n1"}


def test_gpus_that_no_node_can_use_are_a_mistake() -> None:
    finding = judged(cluster(2, gpu=Gpu(wrong="driver too old")))
    assert finding.bad == {} and finding.mistakes == ["no node can use its GPUs: driver too old"]


def test_more_processes_than_gpus_everywhere_is_a_mistake() -> None:
    finding = judged(cluster(2, 2, gpu=Gpu(1)))
    assert finding.bad == {} and "process 1 of n1 has no GPU, it sees 1: start 1 processes a node" in finding.mistakes[0]


# files


def test_data_that_some_nodes_cannot_read_is_their_fault_and_all_the_recipes() -> None:
    some = judged(with_node(cluster(3), "n2", trouble={"data": "x.json: there is no shard"}))
    assert some.mistakes == [] and some.lines() == ["bad node n2: data, which 2 of 3 nodes can use: x.json: there is no shard"]
    every = judged(cluster(3, trouble={"data": "x.json: there is no shard"}))
    assert every.bad == {} and every.mistakes == ["data: x.json: there is no shard"]


def test_one_rank_of_a_node_is_enough() -> None:
    seen = cluster(3)
    assert judged([replace(seen[0], trouble={"init_from": "gone"}), *seen[1:]]).bad.keys() == {"n1"}


def test_an_output_that_is_not_shared() -> None:
    assert judged(with_node(cluster(3), "n2", sees_output=False)).bad.keys() == {"n2"}
    two = judged(with_node(cluster(2), "n2", sees_output=False))
    assert two.bad == {} and "what n1 writes there, n2 cannot see" in two.mistakes[0]
    nobody = judged([replace(f, sees_output=f.node == "n1") for f in cluster(3)])
    assert nobody.bad == {} and "what n1 writes there, n2, n3 cannot see" in nobody.mistakes[0]


def test_too_little_disk_is_said_with_its_numbers() -> None:
    need = disk_needed(recipe(), 0)
    assert need == 3 * checkpoint_bytes(recipe())
    assert not judged(cluster(disk_free=need))
    finding = judged(with_node(cluster(), "n2", disk_free=need - 1))
    assert finding.bad == {}
    for part in (f"has {size(need - 1)} free", f"needs {size(need)}", f"{size(checkpoint_bytes(recipe()))} each", "checkpoint.keep 2"):
        assert part in finding.mistakes[0]


def test_checkpoints_that_are_there_need_no_room_again() -> None:
    each = checkpoint_bytes(recipe())
    assert [disk_needed(recipe(), there) // each for there in (0, 1, 2, 3, 9)] == [3, 2, 1, 1, 1]
    assert disk_needed(recipe(checkpoint={"every": 0, "keep": 5}), 0) == each


def test_a_recipe_that_does_not_suit_the_processes() -> None:
    assert judged(cluster(4, 2), parallel={"pipeline": 3}).mistakes == [
        "parallel: tensor 1 x pipeline 3 x context 1 does not divide 8 processes"
    ]


# size of a checkpoint

TINY = ModelConfig(
    vision=VisionConfig(image_size=56, hidden_size=32, num_layers=3, num_heads=4, ffn_hidden_size=48, feature_layer=-1),
    language=LanguageConfig(
        hidden_size=32, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=12, ffn_hidden_size=64, vocab_size=512, tied_embeddings=False
    ),
)


@pytest.mark.parametrize("name", ["pretrain_1p7b", "pretrain_4b", "sft_general_4b", "tiny"])
def test_the_size_of_a_checkpoint_is_that_of_the_real_model(name: str) -> None:
    settings = recipe(model=TINY, precision={"params": "float32"}) if name == "tiny" else load_recipe(RECIPES / f"{name}.yaml")
    counts, weight = count_parameters(settings), 4 if name == "tiny" else 2
    for learns in (settings.trainable, TrainableConfig(vision=True, projector=False, language=False)):
        wanted = sum(
            n * (weight + 12 * on)
            for n, on in ((counts.vision, learns.vision), (counts.projector, learns.projector), (counts.language, learns.language))
        )
        assert checkpoint_bytes(settings.model_copy(update={"trainable": learns})) == wanted


# bandwidth


def speeds(nodes: int, slow: dict[str, float]) -> dict[tuple[str, ...], float]:
    """Of a ring in which a pair is as quick as its slower node."""
    plan = allreduce.rounds([f"n{i + 1}" for i in range(nodes)], 8 * nodes)
    return {pair: min(slow.get(node, 40.0) for node in pair) for groups in plan for pair in groups if len(pair) <= 2}


@pytest.mark.parametrize("nodes", [3, 4, 5, 16])
def test_a_slow_node_is_named_and_not_its_neighbours(nodes: int) -> None:
    (line,) = judge_speed(speeds(nodes, {"n2": 19.0}), 0, True).lines()
    assert line == "bad node n2: all-reduce with its neighbours reaches 19 GB/s at best, the usual node 40"
    assert not judge_speed(speeds(nodes, {"n2": 21.0}), 0, True)
    assert not judge_speed(speeds(nodes, {"n2": 19.0}), 0, False), "gloo on busy CPUs"


def test_an_absolute_minimum() -> None:
    assert judge_speed(speeds(4, {"n3": 21.0}), 30, True).bad.keys() == {"n3"}
    two = judge_speed(speeds(2, {"n2": 21.0}), 30, True)
    assert two.bad.keys() == {"n1", "n2"} and "between n1 and n2 reaches 21 GB/s, INFIMED_MIN_GBPS is 30" in two.lines()[0]
    assert not judge_speed(speeds(2, {"n2": 21.0}), 0, True)
    assert judge_speed({("n1",): 100.0}, 200, True).bad.keys() == {"n1"}
    assert judge_speed(speeds(3, {}), 50, True).bad == {}
    every = judge_speed(speeds(4, {}), 50, True)
    assert every.bad == {} and "slow between all 4 nodes: 40 GB/s at best" in every.mistakes[0]
    assert not judge_speed({}, 50, True)


def test_an_all_reduce_that_does_not_end() -> None:
    nodes = {0: "n1", 1: "n1", 2: "n2", 3: "n2", 4: "n3", 5: "n4"}
    pairs = [("n1", "n2"), ("n3", "n4")]
    gone = judge_stuck(nodes, pairs, dict.fromkeys(range(4), "not done"), {0, 1, 3, 4, 5})
    assert gone.lines() == ["bad node n2: rank 2 does not answer any more: it is stopped, dead or cut off in an all-reduce"]
    both = judge_stuck(nodes, pairs, {4: "not done", 5: "refused"}, set(nodes))
    assert both.bad.keys() == {"n3", "n4"} and "all-reduce between n3 and n4 did not work: not done; refused" in both.lines()[0]
    with pytest.raises(RuntimeError, match=r"all-reduce worked nowhere, so no node is left out: no socket interface found; see to NCCL's"):
        judge_stuck(nodes, pairs, dict.fromkeys(nodes, "no socket interface found"), set(nodes))
    assert not judge_stuck(nodes, [("n1", "n2", "n3", "n4")], dict.fromkeys(nodes, "not done"), set(nodes)), "nobody can tell"
    assert judge_stuck(nodes, [("n1",)], {0: "not done", 1: "not done"}, set(nodes)).bad.keys() == {"n1"}


def test_absent_ranks_by_node() -> None:
    absent = judge_absent(dict(enumerate(["n1", "n1", "n2", "n2", "n3", "n4"])), {1: "not heard of", 2: "not heard of", 3: "not heard of"})
    assert absent.lines() == ["bad node n1: rank 1 not heard of", "bad node n2: ranks 2, 3 not heard of"]
    with pytest.raises(RuntimeError, match="2 of 3 nodes did not get through to rank 0 on n1"):
        judge_absent(dict(enumerate(["n1", "n2", "n3"])), {1: "not heard of", 2: "not heard of"})
    with pytest.raises(RuntimeError, match="rank 3 not heard of"):
        judge_absent({0: "n1"}, {3: "not heard of"})


@pytest.mark.parametrize("nodes", [3, 4, 5, 8, 9])
def test_rounds_measure_each_node_with_two_others_one_at_a_time(nodes: int) -> None:
    names = [f"n{i}" for i in range(nodes)]
    *pairs, whole = allreduce.rounds(names, nodes)
    assert whole == [tuple(names)] and len(pairs) == 2 + nodes % 2
    for groups in pairs:
        busy = [node for group in groups for node in group]
        assert len(busy) == len(set(busy))
    partners = {n: {m for groups in pairs for g in groups if n in g for m in g} - {n} for n in names}
    assert all(len(p) == 2 for p in partners.values())


def test_rounds_of_few() -> None:
    assert (
        allreduce.rounds(["n1"], 1) == []
        and allreduce.rounds(["n1"], 8) == [[("n1",)]]
        and allreduce.rounds(["n1", "n2"], 2) == [[("n1", "n2")]]
    )


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert allreduce.bus_bandwidth(0.001, 2, 10**6) == pytest.approx(1.0)  # each of two sends all of it once
    assert allreduce.bus_bandwidth(0.001, 4, 10**6) == pytest.approx(1.5)


# names


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3],login", ["n1", "n2", "n3", "login"]),
        ("gpu-a[08-10,12]b", ["gpu-a08b", "gpu-a09b", "gpu-a10b", "gpu-a12b"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("", []),
    ],
)
def test_slurms_lists_of_nodes(short: str, names: list[str]) -> None:
    assert expand(short) == names


def test_the_nodes_of_ranks() -> None:
    env = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    assert nodes_of_ranks(5, env) == ["n1", "n1", "n2", "n2", "n3"]
    assert nodes_of_ranks(40, env) == [], "srun started something else, such as torchrun"
    assert nodes_of_ranks(1, {}) == []


# facts


def test_facts_survive_the_notice_board() -> None:
    one = cluster(gpu=H100, trouble={"data": "x"}, left="name")[3]
    assert Facts.read(json.loads(json.dumps(asdict(one)))) == one


def test_the_board_tells_who_failed_and_who_is_where() -> None:
    board = Board.of_job(1, 0, 1)
    board.post("facts/0", {"a": 1})
    board.at("this")
    board._rank = 1
    board.at("reading a disk")
    board._rank = 2
    board.fail("OSError: no")
    found, trouble = board.collect("facts", range(4), 0.1)
    assert found == {0: {"a": 1}}
    assert list(board.collect("facts", range(4), 60, after_failure=0.1)[1]) == [2, 1, 3], "does not wait a minute"
    assert trouble == {1: "not done with reading a disk after 0.1 s", 2: "OSError: no", 3: "not heard of within 0.1 s"}


def test_the_code_version_changes_with_a_line_or_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = facts.code_version(tmp_path)
    assert first == facts.code_version(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert facts.code_version(tmp_path) != first
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert facts.code_version(tmp_path) != first


def test_a_gpu_that_computes_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    facts._multiply(torch.device("cpu"))
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: real(self, *args).index_fill_(0, torch.tensor([7]), 0.5))
    with pytest.raises(RuntimeError, match="it computes wrongly"):
        facts._multiply(torch.device("cpu"))


def test_what_is_said_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's answers are made up: there is no GPU here."""
    answers = {"is_available": True, "device_count": 2, "get_device_name": "H100", "mem_get_info": (60, 80)}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(facts, "_multiply", lambda device: None)
    assert facts._gpu(1) == Gpu(2, "H100", 0.75) and facts._gpu(2) == Gpu(2)

    def break_down(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with ...")

    monkeypatch.setattr(facts, "_multiply", break_down)
    assert facts._gpu(0) == Gpu(2, "H100", 0.75, "CUDA error: an illegal memory access")


def test_a_driver_without_a_usable_gpu_is_wrong_unless_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(facts, "_driver", lambda: "580.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert facts._gpu(0).wrong
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert facts._gpu(0) == Gpu()


def test_a_checkpoint_that_lacks_a_file_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "sha256.json").write_text(json.dumps({"state.json": "", "__0_0.distcp": ""}))
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(OSError, match=r"__0_0\.distcp"):
        facts._read_checkpoint(str(tmp_path))
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    facts._read_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        facts._read_checkpoint(str(tmp_path / "none"))
