"""Turns steps of the schedule into micro-batches, ahead of the training that uses them.

Which row goes where is index arithmetic: in a step that begins at row f, micro-batch m of data-parallel rank r takes the rows f + (m *
dp_size + r) * micro_rows + 0, 1, ... A global batch is therefore the same set of rows whatever the number of processes. Rows past a
phase's last one are empty. A background thread reads and decodes up to `prefetch` whole steps ahead, also across a change of resolution;
whatever goes wrong there is raised in the trainer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_infimed.config import Recipe
from megatron_infimed.data.batch import PackedBatch, pack_rows
from megatron_infimed.data.decode import Decoder
from megatron_infimed.data.schedule import Phase, Schedule
from megatron_infimed.data.shards import Document, Shard
from megatron_infimed.errors import UserError

log = logging.getLogger("megatron_infimed.data")


class _Slot(NamedTuple):
    """An image of a micro-batch: the row it is in, and where it comes from."""

    row: int
    source: int
    document: int
    number: int


class Loader:
    """One data-parallel rank's share of every step.

    Args:
        recipe: data and batch are read.
        shards: one for each of `recipe.data.sources`, as `build_schedule` got them.
        pad_id, image_id: what the tokenizer calls them.
        decoder: ignored without images; the loader closes it.
        with_images: False on pipeline stages that hold no tower: the same tokens and labels, and no image is read.
        pin_memory: batches lie in page-locked memory, so that copying them to the GPU overlaps with computing.

    Attributes:
        wait_seconds: time `iterate` has spent waiting for data; training that overlaps with loading keeps it near zero.

    Raises:
        UserError: batch.rows does not divide over the ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        shards: Sequence[Shard],
        schedule: Schedule,
        *,
        pad_id: int,
        image_id: int,
        decoder: Decoder | None,
        dp_rank: int = 0,
        dp_size: int = 1,
        with_images: bool = True,
        pin_memory: bool = False,
    ):
        self._data, self._micro_rows = recipe.data, recipe.batch.micro_rows
        self._shards, self._schedule, self._ids = shards, schedule, (pad_id, image_id)
        self._rank, self._dp_size = dp_rank, dp_size
        self._decoder = decoder
        self._with_images, self._pin_memory = with_images, pin_memory
        if with_images and decoder is None:
            raise ValueError("a loader with images needs a decoder")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} of {dp_size}")
        if recipe.batch.rows % (self._micro_rows * dp_size):
            raise UserError(
                f"batch.rows {recipe.batch.rows} is not a multiple of micro_rows {self._micro_rows} x {dp_size} data parallel processes"
            )
        self.num_microbatches = recipe.batch.rows // (self._micro_rows * dp_size)
        self.wait_seconds = 0.0
        self._told: set[tuple[int, int]] = set()
        self._lock = threading.Lock()  # a decoder serves one caller at a time

    def iterate(self, start: int, end: int) -> Iterator[list[PackedBatch]]:
        """The micro-batches of each step from `start` to `end - 1`. Leaving the loop early stops the background thread."""
        results: queue.SimpleQueue[list[PackedBatch] | BaseException] = queue.SimpleQueue()
        room, stop = threading.Semaphore(self._data.prefetch), threading.Event()

        def work() -> None:
            try:
                for step in range(start, end):
                    room.acquire()
                    if stop.is_set():
                        return
                    results.put(self.microbatches(step, stop))
            except BaseException as e:
                results.put(e)

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            for _ in range(start, end):
                before = time.perf_counter()
                result = results.get()
                self.wait_seconds += time.perf_counter() - before
                if isinstance(result, BaseException):
                    raise result
                room.release()
                yield result
        finally:
            stop.set()
            room.release()
            thread.join()

    def microbatches(self, step: int, stop: threading.Event | None = None) -> list[PackedBatch]:
        """This rank's micro-batches of one step; `stop`, once set, ends it early (its result is then of no use).

        Raises:
            UserError: more corrupt images in a row than `data.max_corrupt`.
        """
        number, first = self._schedule.locate(step)
        phase = self._schedule.phases[number]
        batches = []
        for micro in range(self.num_microbatches):
            if stop is not None and stop.is_set():
                break
            start = first + (micro * self._dp_size + self._rank) * self._micro_rows
            batches.append(self._build(phase, range(start, start + self._micro_rows)))
        return batches

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()

    def _build(self, phase: Phase, numbers: range) -> PackedBatch:
        documents = [phase.row(number) for number in numbers]
        rows = [[self._read(phase, source, document) for source, document in row] for row in documents]
        batch = pack_rows(
            rows,
            capacity=self._data.capacity,
            tokens_per_image=phase.tokens_per_image,
            image_size=phase.image_size,
            pad_id=self._ids[0],
            image_id=self._ids[1],
            document_alignment=self._data.document_alignment,
            phase=phase.number,
            documents=documents,
        )
        if self._with_images and batch.counts.images:
            slots = [
                _Slot(r, source, document, number)
                for r, row in enumerate(rows)
                for (source, document), content in zip(documents[r], row, strict=True)
                for number in content.images.tolist()
            ]
            batch = self._with_pixels(batch, slots)
        return batch.pin_memory() if self._pin_memory else batch

    def _read(self, phase: Phase, source: int, document: int) -> Document:
        content = self._shards[source].document(document)
        kept = phase.kept_values.get((source, document))
        return content if kept is None else Document(content.values[:kept], content.modes[:kept])

    def _with_pixels(self, batch: PackedBatch, slots: list[_Slot]) -> PackedBatch:
        assert self._decoder is not None
        encoded = [self._shards[s.source].image(s.number) for s in slots]
        with self._lock:
            pixels, corrupt = self._decoder(encoded, batch.image_size)
        for i in corrupt:
            s = slots[i]
            if (s.source, s.number) not in self._told:
                self._told.add((s.source, s.number))
                log.warning("%s: image %d is corrupt (%d bytes) and shown gray", self._name(s), s.number, len(encoded[i]))
        for row in {slots[i].row for i in corrupt}:
            bad = [slots[i] for i in corrupt if slots[i].row == row]
            if len(bad) > self._data.max_corrupt:
                names = dict.fromkeys(self._name(s) for s in bad)
                raise UserError(
                    f"{len(bad)} corrupt images in one row, more than data.max_corrupt {self._data.max_corrupt}, in {', '.join(names)}: "
                    "preprocess the data again, or raise data.max_corrupt"
                )
        return batch.with_pixels(pixels, len(corrupt))

    def _name(self, slot: _Slot) -> str:
        return f"{self._data.sources[slot.source].prefix} {self._shards[slot.source].record_id(slot.document)}"
