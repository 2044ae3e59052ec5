"""Import and export are inverse, and the exported folder is the same model for its users: transformers as installed and 4.52.4."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_infimed.config import PhaseConfig
from megatron_infimed.convert.export import export
from megatron_infimed.convert.start import import_checkpoint
from megatron_infimed.data.chat import load_tokenizer, prompt_segments
from megatron_infimed.data.decode import TorchDecoder
from megatron_infimed.evaluate.generate import prompt_document
from megatron_infimed.intake.records import IMAGE_MARK, Turn
from tests.parity import client, hf, old_transformers
from tests.tiny import tiny_images

PHASE = PhaseConfig(until=1.0, image_size=84, tokens_per_image=36)  # not the tower's 56: position embeddings go out interpolated


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def world(request, tmp_path_factory):
    """(our model, its exported folder, a picture, what the installed transformers makes of it)."""
    folder = tmp_path_factory.mktemp("export")
    model, recipe, _, _ = hf.imported(folder, tied=request.param)
    exported = export(hf.save(folder / "run", model, recipe, PHASE).path, folder / "hf")
    picture = folder / "picture.jpg"
    picture.write_bytes(tiny_images(1)[0])
    return model, exported, picture, *client.ask(str(exported), str(picture))


def test_loads_whole_in_the_installed_version(world):
    _, _, _, report, _ = world
    assert report["version"].startswith("5.")
    _check_report(report)


def test_same_logits_and_same_answer_as_ours(world):
    model, exported, picture, _, arrays = world
    tokenizer = load_tokenizer(exported)
    pixels = TorchDecoder(1)([picture.read_bytes()], PHASE.image_size).pixels
    for name, text, images in (("one", f"{IMAGE_MARK}{client.QUESTION}", pixels), ("none", client.QUESTION, pixels[:0])):
        document = prompt_document(prompt_segments(tokenizer, [Turn("user", text)]), [0])
        logits = _logits(model, document, images)
        length = len(logits)
        batch = hf.batch([document], images, PHASE)
        assert batch.tokens[:length].tolist() == arrays[f"{name}_ids"][0].tolist()
        # The picture is resized by torch here and by PIL there, at most two levels of 255 apart: so loosely first, then on equal pixels.
        assert np.abs(logits.numpy() - arrays[f"{name}_logits"][0]).max() < 0.3  # 0.06
        if len(images):
            theirs = torch.from_numpy(arrays["pixels"])
            assert (theirs - hf.normalised(images)).abs().max() <= 2.1 / 127.5  # two levels
            images = ((theirs + 1) * 127.5).round().to(torch.uint8)
            logits = _logits(model, document, images)
        assert np.abs(logits.numpy() - arrays[f"{name}_logits"][0]).max() < 1e-4  # 0
        said = []
        for _ in arrays[f"{name}_answer"]:
            token = int(_logits(model, document, images)[-1].argmax())
            said.append(token)
            document = type(document)(np.append(document.values, np.int32(token)), np.append(document.modes, np.int8(0)))
        assert said == arrays[f"{name}_answer"].tolist()


def test_loads_whole_in_4_52_with_the_same_results(world, tmp_path):
    _, exported, picture, _, arrays = world
    printed = old_transformers.run(Path(client.__file__), exported, picture, tmp_path / "old.npz")
    report = json.loads(printed.strip().splitlines()[-1])
    assert report["version"] == old_transformers.VERSION
    _check_report(report)
    old = np.load(tmp_path / "old.npz")
    assert sorted(old.files) == sorted(arrays)
    for name in arrays:
        if name.endswith(("ids", "answer")):
            assert old[name].tolist() == arrays[name].tolist(), name
        else:
            assert np.abs(old[name] - arrays[name]).max() < 2e-5, name  # 0


@pytest.mark.parametrize(
    ("language_dtype", "vision_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_import_then_export_is_byte_for_byte(tmp_path, language_dtype, vision_dtype):
    hf.qwen3(tmp_path / "language", dtype=language_dtype)
    hf.siglip(tmp_path / "vision", dtype=vision_dtype)
    import_checkpoint(tmp_path / "language", tmp_path / "vision", tmp_path / "run")
    out = load_file(export(tmp_path / "run", tmp_path / "hf") / "model.safetensors")
    compared = 0
    for source, prefix in (("language", "language_model."), ("vision", "vision_tower.vision_model.")):
        before = load_file(tmp_path / source / "model.safetensors")
        after = {name.removeprefix(prefix): t for name, t in out.items() if name.startswith(prefix)}
        left_out = {n for n in before if n.startswith("encoder.layers.2.")}  # the block after the feature layer is not in our model
        assert after.keys() == before.keys() - left_out
        for name in after:
            if "post_layernorm" in name:  # comes after the feature layer, goes out as an identity
                continue
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
            compared += 1
    assert compared == 2 + 22 + 35


def test_other_layouts_export_the_same(tmp_path):
    """Doubled in the other layout, so that it cannot be the old file: every exported value is then exactly twice the first export's."""
    hf.qwen3(tmp_path / "language")
    hf.siglip(tmp_path / "vision")
    import_checkpoint(tmp_path / "language", tmp_path / "vision", tmp_path / "one")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.parity.reshard",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "one"), str(tmp_path / "two")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one = load_file(export(tmp_path / "one", tmp_path / "hf_one") / "model.safetensors")
    for layout in ("TP2", "PP2"):
        two = load_file(export(tmp_path / "two" / layout, tmp_path / layout) / "model.safetensors")
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(two[name], one[name] if "post_layernorm" in name else 2 * one[name]), (layout, name)


def _check_report(report: dict) -> None:
    assert (report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"]) == ([], [], [])
    assert report["class"] == "LlavaForConditionalGeneration"
    assert report["rope_theta"] == 1e6
    assert (report["eos"], report["pad"]) == (hf.END_ID, hf.PAD_ID)


@torch.no_grad()
def _logits(model, document, images):
    batch = hf.batch([document], images, PHASE)
    return model(batch, with_loss=False)[: int(batch.cu_seqlens[1])]
