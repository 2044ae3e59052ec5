"""The name table, what import and export refuse and say, and files in several pieces."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_infimed.config import LanguageConfig, ModelConfig, PhaseConfig, Recipe, VisionConfig
from megatron_infimed.convert import export as export_module
from megatron_infimed.convert import hf as source
from megatron_infimed.convert.export import export, load
from megatron_infimed.convert.start import import_checkpoint
from megatron_infimed.convert.table import Entry, entries
from megatron_infimed.errors import UserError
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import cpu, groups
from megatron_infimed.train import checkpoint
from tests.parity import hf
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with `language` and `vision`."""
    folder = tmp_path_factory.mktemp("sources")
    hf.qwen3(folder / "language")
    hf.siglip(folder / "vision")
    return folder


@pytest.fixture(scope="module")
def run(sources, tmp_path_factory):
    """An imported run directory."""
    folder = tmp_path_factory.mktemp("run")
    import_checkpoint(sources / "language", sources / "vision", folder / "run")
    return folder / "run"


@pytest.fixture
def damaged(sources, tmp_path):
    """Copies of the sources to spoil."""
    shutil.copytree(sources, tmp_path / "sources")
    return tmp_path / "sources"


def edit(file, **changes):
    tree = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(tree))


def refused(text, call, *args, **kwargs):
    with pytest.raises(UserError, match=re.escape(text)) as e:
        call(*args, **kwargs)
    assert "\n" not in str(e.value)


def refuse_import(folder, text, **kwargs):
    refused(text, import_checkpoint, folder / "language", folder / "vision", folder / "out", **kwargs)


def with_schedule(run, folder, phase, **model):
    """The imported checkpoint as if its last phase had been another one."""
    found = checkpoint.find(run)
    recipe = Recipe.model_validate(found.state["recipe"])
    return hf.save(folder, load(found, recipe), recipe, PhaseConfig(until=1.0, **phase))


def test_qkv_is_interleaved_by_group():
    entry = Entry("language", "w", ("q", "k", "v"), "qkv", groups=2, heads=2)
    q, k, v = torch.arange(8.0), torch.arange(4.0) + 100, torch.arange(4.0) + 200  # head size 2
    joined = entry.join([q, k, v])
    assert joined.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    assert all(torch.equal(a, b) for a, b in zip(entry.split(joined), (q, k, v), strict=True))


def test_gated_is_gate_then_up():
    entry = Entry("language", "w", ("gate", "up"), "gated", 1, 1)
    assert entry.join([torch.zeros(2), torch.ones(2)]).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("tied", [True, False])
def test_table_names_every_weight_of_both_sides_once(tied):
    model = ModelConfig(vision=VisionConfig(num_layers=4), language=LanguageConfig(num_layers=3, tied_embeddings=tied))
    table = entries(model)
    ours, theirs = [e.ours for e in table], [n for e in table for n in e.exported]
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    assert len(theirs) == 3 + 3 * 16 + 4 + 3 * 11 + 2 + (not tied)
    assert not [name for name in (*ours, *theirs) if set(name) & set("*[]{}|")]


def test_full_size_model_has_a_row_for_every_weight():
    recipe = Recipe(output="x", schedule=(PhaseConfig(until=1.0, image_size=384, tokens_per_image=729),))
    ranks = groups.initialize(recipe.parallel)
    with cpu.cuda_means_cpu(), torch.device("meta"):
        model = InfiMed(recipe, ranks)
    assert {name for name, _ in model.named_parameters()} == {e.ours for e in entries(recipe.model)}


def test_imported_state_says_where_it_came_from(run):
    state = checkpoint.find(run).state
    assert (state["step"], state["position"]) == (0, [0, 0])
    assert state["recipe"]["precision"]["params"] == "float32"
    assert state["recipe"]["model"]["vision"]["feature_layer"] == -2
    assert len(state["imported"]["left_out"]) == 16 + 2  # the block after the feature layer, the final norm
    assert set(state["imported"]["sources"]["vision"]["sha256"]) == {"config.json", "model.safetensors"}


def test_projector_is_that_of_a_fresh_run(run, sources, tmp_path):
    recipe = Recipe.model_validate(checkpoint.find(run).state["recipe"])
    model = load(checkpoint.find(run), recipe)
    assert model.projector is not None
    assert 0.5 < model.projector.linear_fc1.weight.std() * recipe.model.vision.hidden_size**0.5 < 1.5
    assert not model.projector.linear_fc1.bias.any()
    import_checkpoint(sources / "language", sources / "vision", tmp_path / "other", seed=5)
    other = load(checkpoint.find(tmp_path / "other"), recipe)
    assert other.projector is not None and not torch.equal(other.projector.linear_fc1.weight, model.projector.linear_fc1.weight)


def test_full_siglip_and_old_names_and_sharded_weights_import(damaged, run):
    """As published: vision half with a prefix inside the whole model, weights in pieces with an index, rope_theta at the top level."""
    weights = load_file(damaged / "vision/model.safetensors")
    whole = {f"vision_model.{n}": t for n, t in weights.items()}
    whole |= {"vision_model.head.probe": torch.zeros(1, 1, 32), "text_model.head.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(1)}
    save_file(whole, damaged / "vision/model.safetensors")
    config = json.loads((damaged / "vision/config.json").read_text())
    (damaged / "vision/config.json").write_text(json.dumps({"model_type": "siglip", "text_config": {}, "vision_config": config}))
    weights = load_file(damaged / "language/model.safetensors")
    names = sorted(weights)
    for i, part in enumerate((names[:5], names[5:])):
        save_file({n: weights[n] for n in part}, damaged / f"language/model-{i}.safetensors")
    index = {"weight_map": {n: f"model-{int(n in names[5:])}.safetensors" for n in names}}
    (damaged / "language/model.safetensors.index.json").write_text(json.dumps(index))
    (damaged / "language/model.safetensors").unlink()
    config = json.loads((damaged / "language/config.json").read_text())
    del config["rope_parameters"]
    (damaged / "language/config.json").write_text(json.dumps({**config, "rope_theta": 1000000, "rope_scaling": None}))
    import_checkpoint(damaged / "language", damaged / "vision", damaged / "run")
    recipe = Recipe.model_validate(checkpoint.find(run).state["recipe"])
    assert checkpoint.find(damaged / "run").model == recipe.model
    ours, other = (load(checkpoint.find(r), recipe).state_dict() for r in (run, damaged / "run"))
    assert all(torch.equal(ours[n], other[n]) for n in ours if isinstance(ours[n], torch.Tensor))


@pytest.mark.parametrize(
    ("part", "changes", "text"),
    [
        ("language", {"model_type": "llama"}, "model_type is llama, this model has qwen3; give a Qwen3 folder"),
        ("language", {"hidden_act": "gelu"}, "hidden_act is gelu, this model has silu"),
        ("language", {"attention_bias": True}, "attention_bias is True, this model has False"),
        ("language", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("language", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type is yarn"),
        ("language", {"rope_parameters": None}, "rope_theta is missing"),
        ("language", {"head_dim": None}, "head_dim is missing"),
        ("language", {"intermediate_size": 32}, "mlp.gate_proj.weight is [64, 48], but config.json makes it [32, 48]"),
        ("language", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight, "),
        ("language", {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight [48] has no place"),
        ("vision", {"model_type": "clip_vision_model"}, "model_type is clip_vision_model, this model has siglip or siglip_vision_model"),
        ("vision", {"hidden_act": "quick_gelu"}, "hidden_act is quick_gelu"),
        ("vision", {"num_hidden_layers": 2}, "encoder.layers.2.layer_norm1.bias [32] has no place"),
    ],
)
def test_unfit_config_is_refused(damaged, part, changes, text):
    edit(damaged / part / "config.json", **changes)
    refuse_import(damaged, text)


def test_unfit_weights_are_refused(damaged):
    file = damaged / "language/model.safetensors"
    weights = load_file(file)
    save_file({n: t for n, t in weights.items() if n != "model.norm.weight"}, file)
    refuse_import(damaged, "model.norm.weight missing")
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, file)
    refuse_import(damaged, "model.layers.0.self_attn.q_proj.bias [64] has no place in the model")
    save_file({**weights, "lm_head.weight": torch.zeros(512, 48)}, file)
    refuse_import(damaged, "lm_head.weight differs from the embeddings")
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in weights.items()}, file)
    refuse_import(damaged, "is stored as F8_E4M3; only F32, BF16 and F16 are read")
    file.write_bytes(file.read_bytes()[:100])
    refuse_import(damaged, "not readable as safetensors")
    file.unlink()
    refuse_import(damaged, "no model.safetensors")
    torch.save({}, damaged / "language/pytorch_model.bin")
    refuse_import(damaged, "the weights are pickled (pytorch_model.bin)")
    (damaged / "language/config.json").unlink()
    refuse_import(damaged, "no config.json there")


def test_import_refuses_a_layer_that_is_not_there_and_a_used_directory(damaged, run):
    refuse_import(damaged, "--feature-layer -4: the tower", feature_layer=-4)
    refused("holds checkpoints already, of something else", import_checkpoint, damaged / "language", damaged / "vision", run, seed=5)


def test_an_import_is_done_once(sources, tmp_path, caplog):
    words = (sources / "language", sources / "vision", tmp_path / "run")
    first = import_checkpoint(*words)
    (tmp_path / "run" / "DONE").unlink()  # killed just before
    files = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    with caplog.at_level("INFO", "megatron_infimed"):
        assert import_checkpoint(*words) == first and "done before" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == files
    assert checkpoint.read_done(tmp_path / "run") == {
        "step": 0, "checkpoint": "step_00000000", "checkpoint_sha256": first.fingerprint,
    }  # fmt: skip
    weights = next(first.path.glob("*.distcp"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    import_checkpoint(*words)
    assert weights.read_bytes() == whole, "a damaged one is made again"
    refused("holds checkpoints already, of something else", import_checkpoint, *words, dtype="bfloat16")


def test_index_that_names_a_missing_file(damaged):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (damaged / "language/model.safetensors.index.json").write_text(json.dumps(index))
    refuse_import(damaged, "model-00001-of-00002.safetensors: not readable")


def test_dtype_is_the_one_that_loses_nothing_unless_told(sources, tmp_path):
    import_checkpoint(sources / "language", sources / "vision", tmp_path / "run", dtype="bfloat16")
    assert checkpoint.find(tmp_path / "run").state["recipe"]["precision"]["params"] == "bfloat16"
    out = load_file(export(tmp_path / "run", tmp_path / "hf") / "model.safetensors")
    assert {t.dtype for t in out.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = load_file(export(tmp_path / "run", tmp_path / "wide", dtype="float32") / "model.safetensors")
    assert all(torch.equal(wide[n], out[n].float()) for n in out)


def test_float32_checkpoint_loads_into_a_bfloat16_model(run):
    found = checkpoint.find(run)
    recipe = Recipe.model_validate(found.state["recipe"])
    wide = load(found, recipe).state_dict()
    precision = recipe.precision.model_copy(update={"params": "bfloat16"})
    narrow = load(found, recipe.model_copy(update={"precision": precision})).state_dict()
    assert all(torch.equal(narrow[n], wide[n].bfloat16()) for n in wide if isinstance(wide[n], torch.Tensor))


def test_large_exports_are_split_and_indexed(run, tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText

    whole = load_file(export(run, tmp_path / "whole") / "model.safetensors")
    monkeypatch.setattr(export_module, "_SHARD_BYTES", 100_000)
    folder = export(run, tmp_path / "split")
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    parts = {name: t for file in files for name, t in load_file(folder / file).items()}
    assert parts.keys() == whole.keys() and all(torch.equal(parts[n], whole[n]) for n in whole)
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    folder_again = export(run, tmp_path / "split")  # replaces an earlier export
    assert sorted(p.name for p in folder_again.glob("*.safetensors")) == files
    assert not list(tmp_path.glob("*.tmp"))


def test_report_and_card(run, tmp_path):
    folder = export(run, tmp_path / "hf")
    report = json.loads((folder / "conversion.json").read_text())
    assert report["fingerprint"] == checkpoint.find(run).fingerprint
    assert {t["name"] for t in report["tensors"]} == load_file(folder / "model.safetensors").keys()
    card = (folder / "README.md").read_text()
    assert report["fingerprint"] in card and "| 0 | 1 | 56 x 56 | 16 |" in card and "SHA-256 of the sources" in card


def test_pooled_last_phase_is_refused(run, tmp_path):
    found = with_schedule(run, tmp_path / "pooled", {"image_size": 84, "tokens_per_image": 4})
    refused("its last phase pools 6x6 patches to 4 tokens an image", export, found.path, tmp_path / "hf")


def test_export_refuses_what_it_cannot_do_right(run, sources, tmp_path):
    refused("does not exist: name a checkpoint folder", export, tmp_path / "nothing", tmp_path / "hf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    refused("exists and is not an earlier export", export, run, tmp_path / "mine")
    refused("no tokenizer there", export, run, tmp_path / "hf", tokenizer=tmp_path / "none")
    other = tiny_tokenizer(tmp_path / "other", vocab_size=390)
    refused("gives other ids than", export, run, tmp_path / "hf", tokenizer=other)
    large = tiny_tokenizer(tmp_path / "large")
    tree = json.loads((large / "tokenizer.json").read_text())
    last = tree["added_tokens"][-1]
    tree["added_tokens"] += [{**last, "id": i, "content": f"<|{i}|>"} for i in range(last["id"] + 1, 513)]
    (large / "tokenizer.json").write_text(json.dumps(tree))
    refused("but the model has 512 embeddings", export, run, tmp_path / "hf", tokenizer=large)
    assert not (tmp_path / "hf").exists()


def test_damaged_and_broken_checkpoints_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "flipped")
    found = checkpoint.find(tmp_path / "flipped")
    file = max(found.path.glob("*.distcp"), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(f"{file.name} is not what was written", export, found.path, tmp_path / "hf")

    recipe = Recipe.model_validate(checkpoint.find(run).state["recipe"])
    model = load(checkpoint.find(run), recipe)
    with torch.no_grad():
        model.language_model.decoder.layers[1].mlp.linear_fc2.weight[3, 3] = float("nan")
    broken = hf.save(tmp_path / "nan", model, recipe, recipe.schedule[-1])
    refused("1 weights hold NaN or infinity (language_model.decoder.layers.1.mlp.linear_fc2.weight", export, broken.path, tmp_path / "hf")


def test_audit_finds_what_was_changed_on_the_way(run, tmp_path, monkeypatch):
    right = export_module.save_file

    def wrong(tensors, file, metadata):
        name = "language_model.model.norm.weight"
        right({**tensors, name: tensors[name] + 1}, file, metadata)

    monkeypatch.setattr(export_module, "save_file", wrong)
    refused("language_model.model.norm.weight is not what was written; language_model.decoder.final_layernorm.weight does not come back",
            export, run, tmp_path / "hf")  # fmt: skip
    assert not (tmp_path / "hf").exists()


def test_audit_finds_a_row_that_the_table_lacks(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "entries", lambda model: entries(model)[:-1])
    refused("no row for ['language_model.decoder.final_layernorm.weight']", export, run, tmp_path / "hf")


def test_siglip_defaults_fill_what_published_configs_leave_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}))
    config = source.vision_config(tmp_path, -2)  # google/siglip-base-patch16-224
    assert (config.hidden_size, config.num_layers, config.image_size, config.patch_size) == (768, 12, 224, 16)
