"""Import: Hugging Face's Qwen3 and SigLIP become a starting checkpoint with a fresh projector.

The model is built once, in one process; each tensor is read, laid out as Megatron-Core wants it and copied into its place. Every weight of
ours must be filled, and every tensor of the two folders must be used or known to be left out: SigLIP's blocks after the feature layer, its
final norm, pooling head and text half are not part of our model. Their names are kept in state.json.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_infimed import __version__
from megatron_infimed.config import ModelConfig, ParallelConfig, PhaseConfig, PrecisionConfig, Recipe
from megatron_infimed.convert import hf
from megatron_infimed.convert.table import Entry, entries
from megatron_infimed.errors import UserError
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.parallel import cpu, groups
from megatron_infimed.parallel.groups import Ranks
from megatron_infimed.train import checkpoint, saver

# isort: split
from megatron.core.transformer.module import MegatronModule  # parallel comes first: it sees to how Megatron-Core is imported

log = logging.getLogger(__name__)
_LANGUAGE_UNUSED = re.compile(r".*rotary_emb\.inv_freq")
_VISION_UNUSED = re.compile(r"(text_model\.|logit_scale|logit_bias|(vision_model\.)?(post_layernorm|head)\.|.*position_ids$)")


def import_checkpoint(
    language: Path, vision: Path, output: Path, *, feature_layer: int = -2, dtype: str | None = None, seed: int = 1234
) -> checkpoint.Checkpoint:
    """Writes `output`/checkpoints/step_00000000, which `init_from: output` finds. Where it is already, nothing is done.

    Args:
        language: Qwen3ForCausalLM folder.
        vision: SiglipModel or SiglipVisionModel folder.
        output: a new run directory, or one with this very import.
        feature_layer: counted from the end; blocks after it are left out.
        dtype: float32 or bfloat16. None: bfloat16 where every weight is stored so, else float32, so that nothing is lost.
        seed: of the projector.

    Raises:
        UserError: a folder is not what it should be, or `output` holds other checkpoints.
    """
    model_config = ModelConfig(vision=hf.vision_config(vision, feature_layer), language=hf.language_config(language))
    sources = {"vision": hf.Folder(vision), "language": hf.Folder(language)}
    prefix = {"vision": "vision_model." if any(n.startswith("vision_model.") for n in sources["vision"].shapes) else "", "language": ""}
    table = [e for e in entries(model_config) if e.part in sources]
    left_out = _left_out(sources, prefix, table, model_config)

    stored = {
        part: {folder.dtypes[prefix[part] + n] for e in table if e.part == part for n in e.theirs} for part, folder in sources.items()
    }
    narrow = all(d == {torch.bfloat16} for d in stored.values())
    recipe = _recipe(model_config, dtype or ("bfloat16" if narrow else "float32"), language, output, seed)
    ranks = groups.initialize(recipe.parallel, seed)
    state = {
        "format": 1,
        "version": __version__,
        "step": 0,
        "position": [0, 0],
        "recipe": recipe.model_dump(mode="json"),
        "data": {},
        "imported": {
            # An export of this very checkpoint gives each part back as it was stored.
            "stored": {part: _only(kinds) for part, kinds in stored.items()} if dtype is None else {},
            "sources": {part: _described(folder) for part, folder in sources.items()},
            "left_out": left_out,
        },
    }
    made = _made_before(output, state, ranks)
    if made is None:
        with cpu.cuda_means_cpu():
            model = InfiMed(recipe, ranks)
        initialize_weights(_ProjectorOnly(model), recipe)  # type: ignore[arg-type]
        _fill(model, sources, prefix, table)
        made = saver.save(output, state, [model], None, ranks)
    if (checkpoint.read_done(output) or {}).get("checkpoint_sha256") != made.fingerprint:
        checkpoint.mark_done(output, made)
    return made


def _made_before(output: Path, state: dict[str, Any], ranks: Ranks) -> checkpoint.Checkpoint | None:
    """The sound checkpoint of this import; UserError where `output` holds others."""
    found = checkpoint.in_run(output)
    if [c.step for c in found] not in ([], [0]) or any(_made_from(c.state) != _made_from(state) for c in found):
        raise UserError(f"{output}: holds checkpoints already, of something else than this import; name a new directory")
    made = checkpoint.newest_sound(output, ranks)
    if made is not None:
        log.info("%s: done before", output)
    return made


def _made_from(state: dict[str, Any]) -> Any:
    """What decides the weights, wherever they lie."""
    recipe, imported = state["recipe"], state.get("imported", {})
    hashes = {part: source["sha256"] for part, source in imported.get("sources", {}).items()}
    return recipe["model"], recipe["precision"]["params"], recipe["seed"], hashes


class _ProjectorOnly(MegatronModule):
    """The part of a model that starts from fresh weights, under its own name."""

    def __init__(self, model: InfiMed) -> None:
        super().__init__(config=model.config)
        self.projector = model.projector


def _recipe(model: ModelConfig, dtype: str, language: Path, output: Path, seed: int) -> Recipe:
    v = model.vision
    return Recipe(
        stage="import",
        output=str(output),
        seed=seed,
        model=model,
        parallel=ParallelConfig(),
        precision=PrecisionConfig(params=dtype, layers="local"),  # type: ignore[arg-type]
        data={"tokenizer": str(language.resolve())} if (language / "tokenizer.json").is_file() else {},  # type: ignore[arg-type]
        schedule=(PhaseConfig(until=1.0, image_size=v.image_size, tokens_per_image=v.grid**2),),
    )


def _left_out(sources: dict[str, hf.Folder], prefix: dict[str, str], table: list[Entry], model: ModelConfig) -> list[str]:
    """Names that the table does not use and need not.

    Raises:
        UserError: a tensor is missing, has another shape than its fellows say, or is unknown.
    """
    unused = []
    for part, folder in sources.items():
        wanted = {prefix[part] + n for e in table if e.part == part for n in e.theirs}
        missing = sorted(wanted - folder.shapes.keys())
        if missing:
            raise UserError(
                f"{folder.path}: {_listed(missing)} missing, config.json promises it: the download is incomplete or of another model"
            )
        for name in sorted(folder.shapes.keys() - wanted):
            if not _known_unused(part, name.removeprefix(prefix[part]), name, model):
                raise UserError(
                    f"{folder.path}: {name} {list(folder.shapes[name])} has no place in the model that config.json describes: "
                    "give a folder whose two parts belong together"
                )
            if name == "lm_head.weight" and not torch.equal(folder.read(name), folder.read("model.embed_tokens.weight")):
                raise UserError(
                    f"{folder.path}: lm_head.weight differs from the embeddings: set tie_word_embeddings to false in config.json"
                )
            unused.append(f"{part}: {name}")
    return unused


def _known_unused(part: str, short: str, name: str, model: ModelConfig) -> bool:
    if part == "language":
        return bool(_LANGUAGE_UNUSED.fullmatch(name)) or (name == "lm_head.weight" and model.language.tied_embeddings)
    layer = re.match(r"encoder\.layers\.(\d+)\.", short)
    if layer:
        return model.vision.built_layers <= int(layer.group(1)) < model.vision.num_layers
    return bool(_VISION_UNUSED.match(name))


@torch.no_grad()
def _fill(model: InfiMed, sources: dict[str, hf.Folder], prefix: dict[str, str], table: list[Entry]) -> None:
    places = weights_of(model)
    for entry in table:
        folder = sources[entry.part]
        names = [prefix[entry.part] + n for n in entry.theirs]
        place = places.pop(entry.ours)
        for name, part in zip(names, entry.split(place), strict=True):
            if folder.shapes[name] != tuple(part.shape):
                raise UserError(
                    f"{folder.path}: {name} is {list(folder.shapes[name])}, but config.json makes it {list(part.shape)}: "
                    "give a folder whose two parts belong together"
                )
        place.copy_(entry.join([folder.read(name) for name in names]))
    fresh = {name for name in places if name.startswith("projector.")}
    if places.keys() != fresh:
        raise RuntimeError(f"convert/table.py does not fill {_listed(sorted(places.keys() - fresh))}")


def weights_of(model: InfiMed) -> dict[str, Tensor]:
    """The model's weights by name, each once, as they lie in memory."""
    return {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def _only(kinds: set[torch.dtype]) -> str | None:
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else None


def _described(folder: hf.Folder) -> dict[str, Any]:
    hashes = {}
    for file in (folder.path / "config.json", *folder.files):
        with file.open("rb") as f:
            hashes[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return {"path": str(folder.path.resolve()), "sha256": hashes}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
