"""What a batch holds, in numbers: counted when rows are packed, added up over a step, priced in flops.py."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Counts:
    """What a micro-batch holds; T = text_tokens + image_tokens + padding."""

    documents: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    target_tokens: int = 0
    """Positions with a loss."""
    padding: int = 0
    images: int = 0
    corrupt: int = 0
    """Images that could not be decoded and are gray."""
    pairs: int = 0
    """Positions that attention looks at: l (l + 1) / 2 for each document of l tokens."""
    padding_pairs: int = 0
    """The same of padding, which attention computes too."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))
