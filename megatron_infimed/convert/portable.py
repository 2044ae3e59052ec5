"""The small files of an exported folder: what transformers 4.52 and 5 read the same way.

transformers 5 would write another layout by itself, from which 4.52 loads a random tower and a wrong rope_theta with only a warning.
So the files are written here, in the older of the two ways wherever they differ: rope_theta at the top of text_config, torch_dtype, both
names of the image token's id, preprocessor_config.json, tokenizer class PreTrainedTokenizerFast.

The tower's `vision_feature_layer` is -1: the exported tower has just the blocks that our model has (SigLIP's later blocks are never
built), and its last block's output, before the final norm, is the feature. The final norm that the stock class insists on is there as an
identity and unused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from megatron_infimed import __version__
from megatron_infimed.config import Recipe
from megatron_infimed.data.chat import CHAT_TEMPLATE, IM_END, IMAGE_PAD, SpecialIds, Tokenizer, load_tokenizer
from megatron_infimed.errors import UserError

_MADE_WITH = "4.52.4"


def write_files(folder: Path, recipe: Recipe, tokenizer: Path, dtype: str, card: str) -> None:
    """Everything but the weights.

    Args:
        recipe: of the checkpoint; its last phase gives image size and tokens per image.
        tokenizer: Hugging Face folder.
        card: text of README.md.

    Raises:
        UserError: the tokenizer is not one that the folder can carry.
    """
    loaded = usable_tokenizer(tokenizer, recipe)
    _write(folder / "config.json", config(recipe, loaded.special, dtype))
    _write(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": loaded.special.im_end,
            "pad_token_id": loaded.special.pad,
            "transformers_version": _MADE_WITH,
        },
    )
    size = recipe.schedule[-1].image_size
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": size, "width": size},
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    _write(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_PAD,
            "patch_size": recipe.model.vision.patch_size,
            "num_additional_image_tokens": 0,
            "vision_feature_select_strategy": "full",
        },
    )
    _write_tokenizer(folder, tokenizer, loaded.special)
    (folder / "README.md").write_text(card, encoding="utf-8")


def usable_tokenizer(path: Path, recipe: Recipe) -> Tokenizer:
    """The tokenizer, where the exported folder can carry it and its ids fit the embeddings.

    Raises:
        UserError: not so.
    """
    tokenizer, vocabulary = load_tokenizer(path), recipe.model.language.vocab_size
    if tokenizer.kind != "huggingface":
        raise UserError(
            f"{path}: a SentencePiece model, and the exported folder needs a tokenizer.json: name a Hugging Face folder with the same ids "
            "with --tokenizer"
        )
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{path}: ids up to {tokenizer.vocab_size - 1}, but the model has {vocabulary} embeddings: name the tokenizer that the shards "
            "were made with"
        )
    trained_with = Path(recipe.data.tokenizer) if recipe.data.tokenizer else path
    if (
        trained_with.exists()
        and (trained := load_tokenizer(trained_with)).kind == "huggingface"
        and trained.fingerprint != tokenizer.fingerprint
    ):
        raise UserError(f"{path}: gives other ids than {trained_with}, which the recipe was trained with: leave --tokenizer out")
    return tokenizer


def config(recipe: Recipe, special: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json."""
    v, lm, phase = recipe.model.vision, recipe.model.language, recipe.schedule[-1]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": dtype,
        "transformers_version": _MADE_WITH,
        "image_token_index": special.image_pad,
        "image_token_id": special.image_pad,
        "image_seq_length": phase.tokens_per_image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": lm.tied_embeddings,
        "eos_token_id": special.im_end,
        "pad_token_id": special.pad,
        "text_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "torch_dtype": dtype,
            "hidden_size": lm.hidden_size,
            "num_hidden_layers": lm.num_layers,
            "num_attention_heads": lm.num_heads,
            "num_key_value_heads": lm.num_kv_heads,
            "head_dim": lm.head_dim,
            "intermediate_size": lm.ffn_hidden_size,
            "vocab_size": lm.vocab_size,
            "rope_theta": lm.rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": lm.norm_eps,
            "max_position_embeddings": lm.max_positions,
            "tie_word_embeddings": lm.tied_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": lm.num_layers,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": special.im_end,
            "pad_token_id": special.pad,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "torch_dtype": dtype,
            "hidden_size": v.hidden_size,
            "num_hidden_layers": v.built_layers,
            "num_attention_heads": v.num_heads,
            "intermediate_size": v.ffn_hidden_size,
            "image_size": phase.image_size,
            "patch_size": v.patch_size,
            "num_channels": 3,
            "layer_norm_eps": v.layernorm_eps,
            "hidden_act": "gelu_pytorch_tanh",
            "attention_dropout": 0.0,
            "vision_use_head": False,
        },
    }


def model_card(recipe: Recipe, state: dict[str, Any], fingerprint: str) -> str:
    """README.md: what the model is, what it was trained on and how, by the checkpoint's own record."""
    v, lm = recipe.model.vision, recipe.model.language
    phases = "\n".join(
        f"| {i} | {phase.until:g} | {phase.image_size} x {phase.image_size} | {phase.tokens_per_image} |"
        for i, phase in enumerate(recipe.schedule)
    )
    imported = ""
    if "imported" in state:
        record = {part: source["sha256"] for part, source in state["imported"]["sources"].items()}
        imported = f"\n## Imported from\nThe projector is untrained. SHA-256 of the sources:\n```yaml\n{yaml.safe_dump(record)}```\n"
    sources = "\n".join(f"| `{s.prefix}` | {_share(s)} | {_counts(state, s.prefix)} |" for s in recipe.data.sources) or "| none | | |"
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, medical]
---
# {recipe.stage}, step {state["step"]}
SigLIP tower ({v.built_layers} of {v.num_layers} blocks, patch {v.patch_size}, width {v.hidden_size}), two-layer projector, Qwen3
({lm.num_layers} layers, width {lm.hidden_size}). Made with megatron-infimed {state.get("version", "?")}, exported by {__version__} as a
stock `LlavaForConditionalGeneration`. Loads in transformers 4.52 and 5.

The tower ends at the feature layer ({v.feature_layer} of the original), so `vision_feature_layer` is -1 here; its final norm is an
identity and unused. `conversion.json` lists every tensor with its hash and the weight it came from.

Not a medical device: answers about patients' images need a clinician's check.

## Resolution schedule
{_reached(recipe, state)}
| phase | until (share of documents) | pixels | tokens per image |
|---|---|---|---|
{phases}

## Data
| shard | share | what it holds |
|---|---|---|
{sources}
{imported}
## Identity
Checkpoint fingerprint (SHA-256 over the hashes of its files): `{fingerprint}`

## Recipe
```yaml
{yaml.safe_dump(state["recipe"], sort_keys=False)}```
"""


def _reached(recipe: Recipe, state: dict[str, Any]) -> str:
    phase, packs = state["position"]
    if state["step"] and phase < len(recipe.schedule) - 1:
        return f"Training stopped in phase {phase} after {packs:,} packed rows: **the last phase, which this folder is set up for, was not reached.**"
    return f"Exported at phase {phase}, {packs:,} packed rows into it." if state["step"] else "Not trained yet."


def _share(source: Any) -> str:
    return f"weight {source.weight:g}" if source.weight is not None else f"{source.epochs or 1:g} epochs"


def _counts(state: dict[str, Any], prefix: str) -> str:
    counts = state.get("data", {}).get(prefix, {})
    return ", ".join(f"{value:,} {key}" for key, value in counts.items() if isinstance(value, int))


def _write_tokenizer(folder: Path, tokenizer: Path, special: SpecialIds) -> None:
    source = tokenizer.parent if tokenizer.is_file() else tokenizer
    tree = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    names = {token["id"]: token["content"] for token in tree["added_tokens"]}
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "eos_token": IM_END,
            "pad_token": names.get(special.pad, "<|endoftext|>"),
            "bos_token": None,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
            "model_input_names": ["input_ids", "attention_mask"],  # 4.52 would add token_type_ids, which generate refuses
            "chat_template": CHAT_TEMPLATE,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
