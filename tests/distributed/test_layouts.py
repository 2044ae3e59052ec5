"""Every layout trains the same model: loss and gradient norm of each step against one process, clipping on, across a change of resolution."""

from __future__ import annotations

import pytest

from tests.distributed import runs

# Measured worst relative difference over 11 steps of loss and grad_norm (2 cores, gloo, float32): 1.1e-6
TOLERANCE = 2e-6

# name: (processes, overrides)
LAYOUTS = {
    "one-overlap-recompute-micro4": (1, ["precision.recompute=full", "batch.micro_rows=4", "parallel.overlap=true"]),
    "recompute-mlp-small-chunks": (1, ["precision.recompute={language: mlp}", "batch.loss_tokens=5", "batch.vision_images=1"]),
    "TP2": (2, ["parallel.tensor=2"]),
    "TP2-SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "PP2-uneven": (2, ["parallel.pipeline=2", "parallel.first_stage_layers=1"]),
    "PP2-VPP2": (2, ["parallel.pipeline=2", "parallel.virtual=2"]),
    "CP2": (2, ["parallel.context=2"]),
    "DP2": (2, []),
    "DP2-index-order": (2, ["parallel.balance=false"]),
    "DP2-overlap": (2, ["parallel.overlap=true"]),
    "DP2-micro2": (2, ["batch.micro_rows=2"]),
    "TP2-PP2-SP": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "TP2-CP2-SP": (4, ["parallel.tensor=2", "parallel.context=2", "parallel.sequence=true"]),
    "CP2-PP2-overlap": (4, ["parallel.context=2", "parallel.pipeline=2", "parallel.overlap=true"]),
    "CP2-DP2-overlap": (4, ["parallel.context=2", "parallel.overlap=true"]),
    "PP2-VPP2-DP2-overlap": (4, ["parallel.pipeline=2", "parallel.virtual=2", "parallel.overlap=true"]),
}
# Two steps in each layout, the rest in the last.
CHANGES = {
    "TP2-DP2-TP2": ["TP2", "DP2-overlap", "TP2"],
    "DP2-PP2-one": ["DP2", "PP2", "one"],
    "one-TP2SP-VPP2": ["one", "TP2-SP", "PP2-VPP2"],
    "VPP2-CP2": ["PP2-VPP2", "CP2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All the runs, made by as few starts of processes as their order allows."""
    folder = tmp_path_factory.mktemp("layouts")
    recipe = runs.make_data(folder)
    layouts = {"one": (1, []), **LAYOUTS}
    wanted = {
        1: [("alone", []), ("dropout", ["model.dropout=0.2"])],
        2: [("dropout-DP2", ["model.dropout=0.2", "parallel.overlap=true"])],
        4: [],
    }
    for name, (processes, words) in LAYOUTS.items():
        wanted[processes].append((name, words))
    for processes, those in wanted.items():
        runs.train_all(recipe, [(folder / name, words) for name, words in those], processes)
    for leg in range(3):
        for processes in (1, 2):
            those = []
            for name, way in CHANGES.items():
                if leg < len(way) and layouts[way[leg]][0] == processes:
                    last = leg == len(way) - 1
                    those.append((folder / name, [*layouts[way[leg]][1], *([] if last else [f"max_steps={2 * (leg + 1)}"])]))
            if those:
                runs.train_all(recipe, those, processes)
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


def test_dropout_falls_on_the_same_places_over_data_parallel_ranks(folder, alone):
    figures = runs.figures(folder / "dropout")
    assert runs.worst(figures, alone) > 1e-3, "dropout was not at work"
    assert runs.worst(runs.figures(folder / "dropout-DP2"), figures) < TOLERANCE
