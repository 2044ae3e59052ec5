"""Export: any checkpoint, of whatever layout it was trained in, becomes a stock LlavaForConditionalGeneration folder.

Megatron-Core reshards the checkpoint into a model of one process; each weight then goes through convert/table.py. The stock class has no
pooling, so it expresses a model whose last phase keeps every patch; another one is refused. Where that phase's pixels are not the tower's
native ones, the interpolated position embeddings are what is written. The folder is made aside and renamed, after an audit:
every weight of ours went out, and read back from the files it is the same bits; the stock class has just these tensors, shape by shape.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_infimed.config import ParallelConfig, Recipe
from megatron_infimed.convert import portable
from megatron_infimed.convert.start import weights_of
from megatron_infimed.convert.table import PREFIX, Entry, entries
from megatron_infimed.errors import UserError
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import cpu, groups
from megatron_infimed.train import checkpoint

_SHARD_BYTES = 5_000_000_000
_POSITIONS = "vision_tower.position_embedding"


def export(source: Path, output: Path, *, tokenizer: Path | None = None, dtype: str | None = None) -> Path:
    """Writes the folder and returns it.

    Args:
        source: checkpoint folder, or a run directory whose newest checkpoint is taken.
        output: a new folder, or an earlier export, which is replaced.
        tokenizer: Hugging Face folder. None: the recipe's.
        dtype: float32 or bfloat16. None: as in the checkpoint (of one just imported: each part as it was stored).

    Raises:
        UserError: the checkpoint is damaged, the stock class cannot express its model, or the audit fails.
    """
    found = checkpoint.find(source)
    state = found.state
    recipe = Recipe.model_validate(state["recipe"])
    _refuse_pooling(recipe, found.path)
    if output.exists() and not (output / "conversion.json").is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not an earlier export; name a new folder")
    tokenizer = tokenizer or _recipe_tokenizer(recipe)
    portable.usable_tokenizer(tokenizer, recipe)

    model = load(found, recipe)
    written_as = _dtypes(recipe, state, dtype)
    plan = _plan(recipe, model, written_as)
    aside = output.with_name(output.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    records = _write_weights(aside, plan)
    kept = dtype or recipe.precision.params
    portable.write_files(aside, recipe, tokenizer, kept, portable.model_card(recipe, state, found.fingerprint))
    _audit(aside, plan, records)
    _write_report(aside / "conversion.json", {"checkpoint": str(found.path.resolve()), "fingerprint": found.fingerprint}, records)
    if output.exists():
        shutil.rmtree(output)
    aside.rename(output)
    return output


def load(found: checkpoint.Checkpoint, recipe: Recipe) -> InfiMed:
    """The checkpoint's model in this one process, its files checked against their hashes."""
    # Megatron-Core's own layers, whatever it was trained with: their names are the table's.
    precision = {**recipe.precision.model_dump(), "layers": "local", "fp8": "off", "recompute": {}}
    alone = recipe.model_copy(update={"parallel": ParallelConfig(), "precision": type(recipe.precision).model_validate(precision)})
    ranks = groups.initialize(alone.parallel, alone.seed)
    damaged = found.damaged(ranks)
    if damaged:
        raise UserError(f"{found.path}: {', '.join(damaged)} is not what was written (hash): take another checkpoint of the run")
    with cpu.cuda_means_cpu():
        model = InfiMed(alone, ranks)
    checkpoint.load_weights(found, [model])
    return model.eval()


@dataclass(frozen=True)
class _Row:
    """What one weight of ours (None: nothing, the values are given) becomes."""

    ours: str
    entry: Entry | None
    names: tuple[str, ...]
    source: Tensor
    dtype: torch.dtype

    def tensors(self) -> tuple[Tensor, ...]:
        parts = self.entry.split(self.source) if self.entry else (self.source,)
        return tuple(part.to(device="cpu", dtype=self.dtype).contiguous().clone() for part in parts)

    @property
    def nbytes(self) -> int:
        return self.source.numel() * self.dtype.itemsize


def _plan(recipe: Recipe, model: InfiMed, written_as: dict[str, torch.dtype]) -> list[_Row]:
    """Every tensor to be written, in the table's order.

    Raises:
        UserError: the table and the model do not name the same weights, or a weight is not finite.
    """
    v, side = recipe.model.vision, recipe.schedule[-1].image_size // recipe.model.vision.patch_size
    weights = weights_of(model)
    table = entries(recipe.model)
    unmapped, absent = weights.keys() - {e.ours for e in table}, {e.ours for e in table} - weights.keys()
    if unmapped or absent:
        raise UserError(
            f"convert/table.py: no row for {sorted(unmapped) or 'none'}; no weight for {sorted(absent) or 'none'}: add the rows"
        )
    broken = [name for name, w in weights.items() if not bool(w.isfinite().all())]
    if broken:
        raise UserError(f"{len(broken)} weights hold NaN or infinity ({', '.join(broken[:3])}, ...): take an earlier checkpoint")
    assert model.vision_tower is not None
    with torch.no_grad():
        weights[_POSITIONS] = model.vision_tower.positions(side).detach()
    rows = [_Row(e.ours, e, e.exported, weights[e.ours], written_as[e.part]) for e in table]
    norm = PREFIX["vision"] + "post_layernorm."
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        rows.append(_Row("identity", None, (norm + name,), torch.full((v.hidden_size,), value), written_as["vision"]))
    return rows


def _write_weights(folder: Path, plan: list[_Row]) -> list[dict[str, Any]]:
    """The safetensors files; returns a record of each tensor."""
    shards: list[list[_Row]] = [[]]
    for row in plan:
        if shards[-1] and sum(r.nbytes for r in shards[-1]) + row.nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(row)
    records, where = [], {}
    for number, rows in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for row in rows:
            for name, tensor in zip(row.names, row.tensors(), strict=True):
                tensors[name], where[name] = tensor, file
                records.append({**_record(name, tensor), "file": file, "from": row.ours})
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(row.nbytes for row in plan)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return records


def _write_report(file: Path, about: dict[str, str], records: list[dict[str, Any]]) -> None:
    """JSON with one tensor a line."""
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    tensors = ",\n".join(json.dumps(record) for record in records)
    file.write_text(f'{{{head}"tensors": [\n{tensors}\n]}}\n', encoding="utf-8")


def _audit(folder: Path, plan: list[_Row], records: list[dict[str, Any]]) -> None:
    """
    Raises:
        UserError: naming what differs.
    """
    there = Counter(name for file in sorted(folder.glob("*.safetensors")) for name in _names(file))
    wrong = [f"{name} is written {n} times" for name, n in there.items() if n > 1]
    wrong += [f"{name} is written and not planned" for name in there.keys() - {r["name"] for r in records}]
    wrong += [f"{name} is planned and not written" for name in {r["name"] for r in records} - there.keys()]
    planned = {r["name"]: r for r in records}
    for row in plan if not wrong else ():
        back = [_read(folder / planned[name]["file"], name) for name in row.names]
        wrong += [
            f"{name} is not what was written"
            for name, t in zip(row.names, back, strict=True)
            if _record(name, t) != _without_place(planned[name])
        ]
        if row.entry and not torch.equal(row.entry.join(back), row.source.to(device="cpu", dtype=row.dtype)):
            wrong.append(f"{row.ours} does not come back")
    ours, stock = Counter(tuple(r["shape"]) for r in records), _stock_shapes(folder)
    wrong += [f"{n} stock tensors of shape {list(shape)} have no value" for shape, n in (stock - ours).items()]
    wrong += [f"{n} tensors of shape {list(shape)} are none of the stock class" for shape, n in (ours - stock).items()]
    if wrong:
        raise UserError(f"{folder}: the audit of the export failed on {len(wrong)} items ({'; '.join(wrong[:5])}): report this")


def _stock_shapes(folder: Path) -> Counter[tuple[int, ...]]:
    """Shapes of the tensors of the stock class, as transformers builds it from the folder's config.json."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    return Counter(tuple(p.shape) for p in stock.parameters())


def _record(name: str, tensor: Tensor) -> dict[str, Any]:
    data: Any = tensor.contiguous().view(torch.uint8).numpy()  # hashed in place: no copy of a large embedding
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _without_place(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("file", "from")}


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as f:
        return list(f.keys())


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as f:
        return f.get_tensor(name)


def _refuse_pooling(recipe: Recipe, path: Path) -> None:
    phase, patch = recipe.schedule[-1], recipe.model.vision.patch_size
    side = phase.image_size // patch
    if phase.tokens_per_image != side**2:
        raise UserError(
            f"{path}: its last phase pools {side}x{side} patches to {phase.tokens_per_image} tokens an image, which no stock Hugging Face "
            f"class does: evaluate it with `evaluate` of this package, or train a last phase with image_size {phase.image_size} and "
            f"tokens_per_image {side**2}"
        )


def _recipe_tokenizer(recipe: Recipe) -> Path:
    if not recipe.data.tokenizer:
        raise UserError("the checkpoint's recipe names no tokenizer: give its Hugging Face folder with --tokenizer")
    return Path(recipe.data.tokenizer)


def _dtypes(recipe: Recipe, state: dict[str, Any], dtype: str | None) -> dict[str, torch.dtype]:
    """What each part is written as."""
    stored = {} if dtype else state.get("imported", {}).get("stored", {})
    return {part: getattr(torch, stored.get(part) or dtype or recipe.precision.params) for part in PREFIX}
