"""One or several shards looked at as one: document numbers run on from shard to shard, manifests are added up.

Only indices and manifests are read here (vectorised, whole), documents and images one by one where somebody asks for them; so a set of a
million documents opens in a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infimed.data.chat import Tokenizer
from megatron_infimed.data.shards import Shard
from megatron_infimed.errors import UserError

TOTALS = ("documents", "images", "distinct_images", "image_bytes", "text_tokens", "target_tokens", "rejected")
_EXAMPLES = 20


class ShardSet:
    """Raises UserError: damaged, foreign or repeated shard, or another tokenizer than the one they were made with."""

    def __init__(self, prefixes: Sequence[str | Path], tokenizer: Tokenizer) -> None:
        names = [str(p) for p in prefixes]
        if twice := [n for n, times in Counter(str(Path(n).resolve()) for n in names).items() if times > 1]:
            raise UserError(f"{twice[0]}: given more than once; every document would be counted again")
        self.shards = [Shard(p) for p in names]
        for shard in self.shards:
            shard.check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.starts = np.cumsum([0, *map(len, self.shards)])
        self.image_starts = np.cumsum([0, *(s.images for s in self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def name(self) -> str:
        first = self.shards[0].prefix
        return first if len(self.shards) == 1 else f"{first} and {len(self.shards) - 1} more"

    @cached_property
    def text_lengths(self) -> np.ndarray:
        """int64 [n]"""
        return np.concatenate([s.text_lengths for s in self.shards])

    @cached_property
    def image_counts(self) -> np.ndarray:
        """int64 [n]"""
        return np.concatenate([s.image_counts for s in self.shards])

    def lengths(self, tokens_per_image: int) -> np.ndarray:
        """int64 [n]: tokens of each document at this resolution."""
        return self.text_lengths + self.image_counts * tokens_per_image

    def document(self, i: int) -> tuple[Shard, int]:
        """The shard of document i of the set, and its number there."""
        k = int(np.searchsorted(self.starts, i, "right")) - 1
        return self.shards[k], i - int(self.starts[k])

    def image(self, i: int) -> bytes:
        """Distinct image i of the set, as it came."""
        k = int(np.searchsorted(self.image_starts, i, "right")) - 1
        return self.shards[k].image(i - int(self.image_starts[k]))

    @cached_property
    def totals(self) -> dict[str, int]:
        """TOTALS, added up. Distinct images are distinct within a shard."""
        return {key: sum(s.manifest[key] for s in self.shards) for key in TOTALS}

    @cached_property
    def sources(self) -> dict[str, Counter[str]]:
        """source -> documents, images, text_tokens, target_tokens; the largest first."""
        found: dict[str, Counter[str]] = {}
        for shard in self.shards:
            for name, counts in shard.manifest["sources"].items():
                found.setdefault(name, Counter()).update(counts)
        return dict(sorted(found.items(), key=lambda entry: (-entry[1]["documents"], entry[0])))

    @cached_property
    def rejects(self) -> dict[str, dict[str, Any]]:
        """reason -> {"count", "examples": up to 20 of {"id", "detail"}}; the most frequent first."""
        found: dict[str, dict[str, Any]] = {}
        for shard in self.shards:
            for reason, entry in shard.manifest["rejects"].items():
                into = found.setdefault(reason, {"count": 0, "examples": []})
                into["count"] += entry["count"]
                into["examples"] = [*into["examples"], *entry["examples"]][:_EXAMPLES]
        return dict(sorted(found.items(), key=lambda entry: (-entry[1]["count"], entry[0])))

    @cached_property
    def decisions(self) -> Counter[str]:
        """De-identification: decision -> how often. Empty where no shard says anything."""
        return sum((Counter(s.manifest.get("deid", {}).get("counts", {})) for s in self.shards), Counter())

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        """prefix -> de-identification policy, for the shards that name one."""
        return {s.prefix: policy for s in self.shards if (policy := s.manifest.get("deid", {}).get("policy"))}

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """name, bytes, sha256, source of every file the shards were made of."""
        return [entry for s in self.shards for entry in s.manifest["inputs"]]
