"""launch/chains/infimed.yaml as it ships, from published-style weights and raw files to scores, with a tiny model: run, run again, begun anew."""

from __future__ import annotations

import json
from pathlib import Path

from tests import chains
from tests.distributed import runs
from tests.parity import hf
from tests.tiny import tiny_images

CHAIN = Path("launch/chains/infimed.yaml")
MODEL = {
    "model.vision": {"image_size": 56, "patch_size": 14, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "ffn_hidden_size": 48},
    "model.language": {
        "hidden_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_hidden_size": 64, "vocab_size": hf.VOCABULARY,
    },
}  # fmt: skip
SIZES = {
    **MODEL,
    "schedule": [{"until": 0.5, "image_size": 28, "tokens_per_image": 4}, {"until": 1.0, "image_size": 56, "tokens_per_image": 16}],
    "precision.params": "float32",
    "data.capacity": 128,
    "batch.rows": 4,
}
TRAINED = ("pretrain", "sft_general", "sft_medical", "sft_cross")
WORDS = [f"{stage}.{key}={json.dumps(value)}" for stage in TRAINED for key, value in SIZES.items()]
"""They reach the stages that plan, validate and evaluate with the same recipe too."""


def make_project(folder: Path) -> None:
    """What docs/cluster.md asks for before `stages submit`."""
    for name in ("launch", "megatron_infimed", "tools"):
        (folder / name).symlink_to(chains.ROOT / name)
    hf.qwen3(folder / "weights" / "Qwen3-4B")
    hf.siglip(folder / "weights" / "siglip-so400m-patch14-384")
    (folder / "data").mkdir()
    (folder / "data" / "qwen3").symlink_to("../weights/Qwen3-4B")
    pictures = tiny_images(6)
    for number, name in enumerate(("captions", "general", "medical", "cross", "held")):
        place = folder / "raw" / name
        place.mkdir(parents=True)
        (place / "p.png").write_bytes(pictures[number])
        rows = [{"image": "p.png", "question": f"chest {'film ' * (i % 5)}{name}?", "answer": f"normal {i}"} for i in range(24)]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "raw" / "images").mkdir()
    (folder / "raw" / "images" / "q.png").write_bytes(pictures[5])
    questions = [{"id": f"q{i}", "image": "q.png", "question": "chest film?", "answer": "normal", "kind": "k"} for i in range(4)]
    (folder / "raw" / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))


def begun(said: str) -> list[str]:
    """The stages that `stages run` says it begins."""
    return [line.split()[1].rstrip(":") for line in said.splitlines() if line.endswith(": begins")]


def test_from_weights_and_raw_files_to_scores(tmp_path: Path) -> None:
    make_project(tmp_path)
    words = [*WORDS, "--processes", "2"]
    assert begun(chains.stages("run", CHAIN, *words, "--until", "import", cwd=tmp_path)) == ["import"]
    (tmp_path / "runs/infimed_4b/import.json").unlink()  # killed before it was recorded
    said = chains.stages("run", CHAIN, *words, cwd=tmp_path)
    assert begun(said) == list(chains.states(CHAIN, *WORDS, cwd=tmp_path)) and "checkpoints/init_4b: done before" in said
    for before, stage in (("checkpoints/init_4b", "pretrain"), ("runs/pretrain_4b", "sft_general"), ("runs/sft_general_4b", "sft_medical")):
        assert f"weights of {before}/checkpoints/" in said and runs.figures(tmp_path / "runs" / f"{stage}_4b")
    assert json.loads((tmp_path / "runs/sft_medical_4b/held.json").read_text())["documents"] == 24
    assert json.loads((tmp_path / "hf/infimed_4b/conversion.json").read_text())
    scores = json.loads((tmp_path / "runs/sft_cross_4b/eval/scores.json").read_text())
    assert scores["all"]["n"] == 4 and "gray" in scores["all"] and not scores["unreadable_images"]
    assert "begins" not in chains.stages("run", CHAIN, *words, cwd=tmp_path)
    with (tmp_path / "raw/cross/rows.jsonl").open("a") as file:
        file.write(json.dumps({"image": "p.png", "question": "one more?", "answer": "yes"}) + "\n")
    refused = chains.stages("run", CHAIN, *words, code=2, cwd=tmp_path)
    assert (
        "cross: input raw/cross changed" in refused and "export: sft_cross before it changed" in refused and "4 stages are done" in refused
    )
    said = chains.stages("run", CHAIN, *words, "--redo", cwd=tmp_path)
    assert begun(said) == ["cross", "sft_cross", "export", "evaluate"]
    assert set(chains.states(CHAIN, *WORDS, cwd=tmp_path).values()) == {"done"}
    (old,) = (tmp_path / "data/shards").glob("cross.json.before-*")
    assert len(list(old.iterdir())) == 9 and len(list((tmp_path / "hf").glob("infimed_4b.before-*"))) == 1
