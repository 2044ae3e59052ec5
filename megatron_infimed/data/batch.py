"""A micro-batch: packed rows laid end to end, ready for the model.

Rows follow one another in one token axis of length T = rows x capacity, and cu_seqlens marks where documents begin, so attention, RoPE
and loss see documents and never rows. What is left at a row's end is a segment of padding of its own; padding that aligns a document
belongs to its segment, where causality hides it. A document comes from the shard as values and modes, one a text token and one an image;
an image becomes tokens_per_image slots holding the image id, whose positions are in `slots` in the order of `pixels`. Labels are already
shifted: position i is trained to say token i + 1, where that is a target token of the same document.

Suffixes: T tokens of all rows, D segments, N images, C = 3 colours, S pixels along a side, t tokens an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_infimed.counts import Counts
from megatron_infimed.data.shards import IMAGE, TARGET, Document


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch; see the top of the file.

    Attributes:
        tokens: int64 [T]; image slots hold the image id, padding the pad id.
        labels: int64 [T], the next token of the same document, else 0.
        loss_mask: float32 [T], 1 where the label is a target token, else 0.
        cu_seqlens: int32 [D + 1], strictly rising from 0 to T.
        max_seqlen: the longest segment.
        pixels: uint8 [N, 3, S, S], RGB; None where the images were not read (a pipeline stage without the tower) or there are none. Where
            processes share the decoding, only this one's block of the counts.images (`image_block`), and None where that is empty.
        slots: int64 [N * t], rising positions of the image tokens; of those in this share where the batch is one.
        features: int64, which of the N * t image tokens `slots` takes; None: all, in order.
        documents: for each row, (source, document) of what it holds.
        rows: the rows' numbers in their phase.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    pixels: torch.Tensor | None
    slots: torch.Tensor
    tokens_per_image: int
    image_size: int
    phase: int
    documents: list[list[tuple[int, int]]]
    counts: Counts
    features: torch.Tensor | None = None
    rows: list[int] = field(default_factory=list)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on a device; copies overlap with computing where the batch is pinned."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; needs CUDA. What is on a device already stays there."""
        return self._map(lambda t: t if t.is_cuda else t.pin_memory())

    def _map(self, move) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: move(v) for name, v in values.items() if isinstance(v, torch.Tensor)})

    def share(self, rank: int, size: int) -> PackedBatch:
        """What context parallel rank `rank` of `size` computes: tokens, labels, mask and slots [T / size]; the rest stays whole.

        Every segment is cut into 2 x size equal chunks, and rank r takes chunks r and 2 x size - 1 - r (Megatron's and Transformer
        Engine's order), so that all look at equally many positions.

        Raises:
            ValueError: a segment is no multiple of 2 x size (data.document_alignment).
        """
        if size == 1:
            return self
        here_T = context_positions(self.cu_seqlens, rank, size)
        feature_T = torch.full_like(self.tokens, -1)
        feature_T[self.slots] = torch.arange(self.slots.numel())
        mine_T = feature_T[here_T]
        slots = (mine_T >= 0).nonzero().squeeze(1)
        return replace(
            self,
            tokens=self.tokens[here_T],
            labels=self.labels[here_T],
            loss_mask=self.loss_mask[here_T],
            slots=slots,
            features=mine_T[slots],
        )

    def with_pixels(self, pixels: torch.Tensor, corrupt: int, share: tuple[int, int] = (0, 1)) -> PackedBatch:
        """The same batch with its images, or with `image_block(counts.images, share)` of them.

        Raises:
            ValueError: when the slots are not made for this many images.
        """
        elsewhere = self.counts.images - len(image_block(self.counts.images, share))
        check_slots(self.slots.numel(), elsewhere + pixels.shape[0], self.tokens_per_image)
        return replace(self, pixels=pixels if len(pixels) else None, counts=replace(self.counts, corrupt=corrupt))


def context_positions(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """int64 [T / size]: the positions of the whole row that rank `rank` holds, in the order it holds them; see PackedBatch.share."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if bool((lengths % (2 * size)).any()):
        raise ValueError(
            f"segments of {lengths.tolist()} tokens do not divide into {2 * size} chunks: set data.document_alignment {2 * size}"
        )
    chunks = lengths // (2 * size)
    firsts = torch.stack([starts + rank * chunks, starts + (2 * size - 1 - rank) * chunks], 1).flatten()
    sizes = chunks.repeat_interleave(2)
    within = torch.arange(int(sizes.sum()), device=cu_seqlens.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return firsts.repeat_interleave(sizes) + within


def image_block(images: int, share: tuple[int, int]) -> range:
    """Which of a micro-batch's images process (index, of) decodes: blocks of ceil(images / of), the last ones shorter or empty."""
    index, of = share
    size = -(-images // of)
    return range(images)[index * size : (index + 1) * size]


def check_slots(slots: int, n_images: int, tokens_per_image: int) -> None:
    wanted = n_images * tokens_per_image
    if slots != wanted:
        raise ValueError(
            f"{slots} image slots but {n_images} images x {tokens_per_image} tokens = {wanted}: "
            "this batch was made for another phase, or images were left out; build it again with this phase's tokens_per_image"
        )


def pack_rows(
    rows: Sequence[Sequence[Document]],
    *,
    capacity: int,
    tokens_per_image: int,
    image_size: int,
    pad_id: int,
    image_id: int,
    document_alignment: int = 1,
    phase: int = 0,
    documents: list[list[tuple[int, int]]] | None = None,
    numbers: Sequence[int] = (),
) -> PackedBatch:
    """Lays rows end to end, without their images.

    Args:
        rows: the documents of each row; an empty row is all padding.
        capacity: tokens in a row.
        pad_id, image_id: what stands in padding and in image slots.
        document_alignment: a document's segment ends, with padding, at a multiple of this.
        documents: what the rows hold, for messages. numbers: what the rows are called in their phase.

    Raises:
        ValueError: when a row's documents do not fit it.
    """
    names = documents if documents is not None else [[] for _ in rows]
    is_used_T = np.zeros(len(rows) * capacity, bool)
    cuts, pairs = [0], 0
    for number, row in enumerate(rows):
        start, end = number * capacity, (number + 1) * capacity
        lengths = np.array([length(d.modes, tokens_per_image) for d in row], np.int64)
        padded = -(-lengths // document_alignment) * document_alignment
        ends = start + np.cumsum(padded)
        used = int(padded.sum())
        if used > capacity:
            raise ValueError(
                f"row {names[number]} has {used} tokens but {capacity} fit: it was planned for another phase or other data; plan again"
            )
        for end_of_document, size, tokens in zip(ends.tolist(), padded.tolist(), lengths.tolist(), strict=True):
            is_used_T[end_of_document - size : end_of_document - size + tokens] = True
        cuts += ends.tolist()
        pairs += _pairs(lengths)
        if used < capacity:
            cuts.append(end)

    flat = [d for row in rows for d in row]
    modes = np.concatenate([d.modes for d in flat]) if flat else np.empty(0, np.int8)
    values = np.concatenate([d.values for d in flat]) if flat else np.empty(0, np.int32)
    repeats = np.where(modes == IMAGE, tokens_per_image, 1)
    modes_T = np.full(len(is_used_T), -1, np.int8)
    modes_T[is_used_T] = np.repeat(modes, repeats)
    tokens_T = np.full(len(is_used_T), pad_id, np.int64)
    tokens_T[is_used_T] = np.repeat(np.where(modes == IMAGE, image_id, values), repeats)
    labels_T, loss_mask_T = _shift(tokens_T, modes_T, cuts)
    slots, n_images = np.flatnonzero(modes_T == IMAGE), int((modes == IMAGE).sum())
    check_slots(len(slots), n_images, tokens_per_image)
    cu_seqlens = np.asarray(cuts, np.int32)
    return PackedBatch(
        tokens=torch.from_numpy(tokens_T),
        labels=torch.from_numpy(labels_T),
        loss_mask=torch.from_numpy(loss_mask_T),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max(initial=0)),
        pixels=None,
        slots=torch.from_numpy(slots),
        tokens_per_image=tokens_per_image,
        image_size=image_size,
        phase=phase,
        documents=names,
        counts=Counts(
            documents=len(flat),
            text_tokens=len(modes) - n_images,
            image_tokens=len(slots),
            target_tokens=int(loss_mask_T.sum()),
            padding=int((~is_used_T).sum()),
            images=n_images,
            pairs=pairs,
            padding_pairs=_pairs(np.diff(cu_seqlens)) - pairs,
        ),
        rows=list(numbers),
    )


def _pairs(lengths: NDArray[np.integer]) -> int:
    lengths = lengths.astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum())


def length(modes: NDArray[np.int8], tokens_per_image: int) -> int:
    """Tokens of a document at this resolution."""
    return len(modes) + int((modes == IMAGE).sum()) * (tokens_per_image - 1)


def _shift(tokens_T: NDArray[np.int64], modes_T: NDArray[np.int8], cuts: list[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    labels_T, mask_T = np.zeros_like(tokens_T), np.zeros(len(tokens_T), np.float32)
    labels_T[:-1], mask_T[:-1] = tokens_T[1:] * (modes_T[1:] >= 0), modes_T[1:] == TARGET
    last = np.asarray(cuts[1:], np.int64) - 1  # what follows a segment's last token belongs to another one
    labels_T[last], mask_T[last] = 0, 0
    return labels_T, mask_T
