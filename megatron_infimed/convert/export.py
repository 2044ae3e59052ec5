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
from collections.abc import Iterator
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
    _audit(aside, plan, records, model)
    report = {"checkpoint": str(found.path.resolve()), "fingerprint": found.fingerprint, "step": state["step"], "tensors": records}
    (aside / "conversion.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    aside.rename(output)
    return output


def load(found: checkpoint.Checkpoint, recipe: Recipe) -> InfiMed:
    """The checkpoint's model in this one process, its files checked against their hashes."""
    # Megatron-Core's own layers, whatever it was trained with: their names are the table's.
    precision = {**recipe.precision.model_dump(), "layers": "local", "fp8": "off", "recompute": "none"}
    alone = recipe.model_copy(update={"parallel": ParallelConfig(), "precision": type(recipe.precision).model_validate(precision)})
    ranks = groups.initialize(alone.parallel, alone.seed)
    damaged = found.damaged(ranks)
    if damaged:
        raise UserError(f"{found.path}: {', '.join(damaged)} is not what was written (hash): take another checkpoint of the run")
    with cpu.cuda_means_cpu():
        model = InfiMed(alone, ranks)
    checkpoint.load_weights(found, model)
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
        raise UserError(f"convert/table.py: no row for {sorted(unmapped) or 'none'}; no weight for {sorted(absent) or 'none'}: add the rows")
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


def _audit(folder: Path, plan: list[_Row], records: list[dict[str, Any]], model: InfiMed) -> None:
    """
    Raises:
        UserError: naming what differs.
    """
    read = {name: (file, tensor) for file, name, tensor in _read_names(folder)}
    wrong = [r["name"] for r in records if r["name"] not in read or r != {**r, **_record(r["name"], _tensor(folder, r))}]
    wrong += sorted(read.keys() - {r["name"] for r in records})
    by_name = {r["name"]: r for r in records}
    for row in plan:
        back = [_tensor(folder, by_name[name]) for name in row.names]
        if row.entry and not torch.equal(row.entry.join(back), row.source.to(device="cpu", dtype=row.dtype)):
            wrong.append(row.ours)
    ours, stock = Counter(tuple(r["shape"]) for r in records), _stock_shapes(folder)
    wrong += [f"{n} stock tensors of shape {list(shape)} without a value" for shape, n in (stock - ours).items()]
    wrong += [f"{n} tensors of shape {list(shape)} that the stock class lacks" for shape, n in (ours - stock).items()]
    if wrong:
        raise UserError(f"the audit of the export failed on {len(wrong)} items: {'; '.join(wrong[:5])}: nothing was written, report this")


def _stock_shapes(folder: Path) -> Counter[tuple[int, ...]]:
    """Shapes of the tensors of the stock class, as transformers builds it from the folder's config.json."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    return Counter(tuple(p.shape) for p in stock.parameters())
