"""Every layout trains the same model: loss and gradient norm of each step against one process, clipping on, across a change of resolution."""

from __future__ import annotations

import pytest

from tests.distributed import runs

# Measured worst relative difference over 6 steps of loss and grad_norm (2 cores, gloo, float32): 1.2e-6
TOLERANCE = 2e-6

# name: (processes, overrides)
LAYOUTS = {
    "TP2": (2, ["parallel.tensor=2"]),
    "TP2-SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "PP2-uneven": (2, ["parallel.pipeline=2", "parallel.first_stage_layers=1"]),
    "DP2": (2, []),
    "DP2-micro2": (2, ["batch.micro_rows=2"]),
    "TP2-PP2-SP": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "recompute-micro4": (1, ["precision.recompute=full", "batch.micro_rows=4"]),
}
# Three steps in one layout, the rest in another.
CHANGES = {
    "TP2-to-DP2": (LAYOUTS["TP2"], LAYOUTS["DP2"]),
    "DP2-to-PP2": (LAYOUTS["DP2"], LAYOUTS["PP2"]),
    "PP2-to-one": (LAYOUTS["PP2"], (1, [])),
    "one-to-TP2-SP": ((1, []), LAYOUTS["TP2-SP"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All the runs, made by as few starts of processes as their order allows."""
    folder = tmp_path_factory.mktemp("layouts")
    recipe = runs.make_data(folder)

    def train(processes: int, wanted: list[tuple[str, list[str]]]) -> None:
        runs.train_all(recipe, [(folder / name, overrides) for name, overrides in wanted], processes)

    def of(processes: int) -> list[tuple[str, list[str]]]:
        return [(name, words) for name, (n, words) in LAYOUTS.items() if n == processes]

    def first(processes: int) -> list[tuple[str, list[str]]]:
        return [(name, [*a[1], "max_steps=3"]) for name, (a, _) in CHANGES.items() if a[0] == processes]

    def then(processes: int) -> list[tuple[str, list[str]]]:
        return [(name, b[1]) for name, (_, b) in CHANGES.items() if b[0] == processes]

    train(1, [("alone", []), *of(1), *first(1)])
    train(2, [*of(2), *first(2), *then(2)])
    train(1, then(1))
    train(4, of(4))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    figures = runs.figures(folder / "alone")
    assert len(figures) >= 6
    assert min(norm for _, norm in figures) > runs.RECIPE["optimizer"]["clip"], (
        "clipping must be at work for the comparison to mean something"
    )
    return figures


@pytest.mark.parametrize("name", [*LAYOUTS, *CHANGES])
def test_layout_equals_one_process(folder, alone, name):
    worst = runs.worst(runs.figures(folder / name), alone)
    print(f"{name}: worst relative difference {worst:.2e}")
    assert worst < TOLERANCE
    if name in CHANGES:
        assert "resumed from" in (folder / name / "log" / "rank_0.log").read_text()
