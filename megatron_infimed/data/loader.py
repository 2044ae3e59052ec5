"""Turns steps of the schedule into micro-batches, ahead of the training that uses them.

Which row goes where is worked out from the plan alone (balance.py), so a global batch is the same set of rows whatever the number of
processes. Rows past a phase's last one are empty. A background thread reads and decodes micro-batches in the order of their use, up to
`prefetch` of them ahead, on through the ends of steps and phases; the step takes them one by one (StepBatches), so it begins with the first
while later ones are still being decoded, and memory holds prefetch + 1 micro-batches, not steps. Whatever goes wrong in the thread is
raised in the trainer. Processes that hold the same rows can share the decoding.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from megatron_infimed.config import Recipe
from megatron_infimed.data.balance import rows_of
from megatron_infimed.data.batch import PackedBatch, image_block, pack_rows
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


class StepBatches(Iterator[PackedBatch]):
    """A step's micro-batches, each handed out once, as soon as it is ready; len() is how many the step has."""

    def __init__(self, take: Callable[[], PackedBatch], size: int):
        self._take, self._size, self._left = take, size, size

    def __len__(self) -> int:
        return self._size

    def __next__(self) -> PackedBatch:
        if not self._left:
            raise StopIteration
        batch = self._take()
        self._left -= 1
        return batch


class Loader:
    """One data-parallel rank's share of every step.

    Args:
        recipe: data, batch and parallel.balance are read, and what the cost of a row depends on.
        shards: one for each of `recipe.data.sources`, as `build_schedule` got them.
        pad_id, image_id: what the tokenizer calls them.
        decoder: ignored without images; the loader closes it.
        with_images: False on pipeline stages that hold no tower: the same tokens and labels, and no image is read.
        share: (index, of): which of the processes that hold these rows this one is. It decodes `image_block(images, share)` of each
            micro-batch; counts.corrupt and data.max_corrupt then see that block alone.
        pin_memory: batches lie in page-locked memory, so that copying them to the GPU overlaps with computing.

    Attributes:
        wait_seconds: time training has spent waiting for a micro-batch; loading that keeps ahead leaves it near zero.

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
        share: tuple[int, int] = (0, 1),
        pin_memory: bool = False,
    ):
        self._recipe, self._data, micro_rows = recipe, recipe.data, recipe.batch.micro_rows
        self._shards, self._schedule, self._ids = shards, schedule, (pad_id, image_id)
        self._rank, self._dp_size = dp_rank, dp_size
        self._decoder = decoder
        self._with_images, self._share, self._pin_memory = with_images, share, pin_memory
        if with_images and decoder is None:
            raise ValueError("a loader with images needs a decoder")
        for name, (index, of) in (("data-parallel rank", (dp_rank, dp_size)), ("share", share)):
            if not 0 <= index < of:
                raise ValueError(f"{name} {index} of {of}")
        if recipe.batch.rows % (micro_rows * dp_size):
            raise UserError(
                f"batch.rows {recipe.batch.rows} is not a multiple of micro_rows {micro_rows} x {dp_size} data parallel processes"
            )
        self.num_microbatches = recipe.batch.rows // (micro_rows * dp_size)
        self.wait_seconds = 0.0
        self._told: set[tuple[int, int]] = set()
        self._lock = threading.Lock()  # a decoder serves one caller at a time

    def iterate(self, start: int, end: int) -> Iterator[StepBatches]:
        """The steps from `start` to `end - 1`. What a step leaves of its micro-batches is passed over; leaving the loop stops the thread.

        What goes wrong in the background is raised where the next micro-batch is taken, and again if that is tried again.
        """
        ready: queue.SimpleQueue[PackedBatch | BaseException] = queue.SimpleQueue()
        room, stop = threading.Semaphore(self._data.prefetch), threading.Event()

        def work() -> None:
            try:
                for step in range(start, end):
                    phase, batches = self._locate(step)
                    for rows in batches:
                        room.acquire()
                        if stop.is_set():
                            return
                        ready.put(self._build(phase, rows))
            except BaseException as e:
                ready.put(e)

        def take() -> PackedBatch:
            before = time.perf_counter()
            result = ready.get()
            self.wait_seconds += time.perf_counter() - before
            if isinstance(result, BaseException):
                ready.put(result)
                raise result
            room.release()
            return result

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            for _ in range(start, end):
                batches = StepBatches(take, self.num_microbatches)
                yield batches
                for _ in batches:
                    pass
        finally:
            stop.set()
            room.release()
            thread.join()
            ready.put(RuntimeError("the loop over the loader's steps was left, so its steps have no more micro-batches"))

    def microbatches(self, step: int) -> Iterator[PackedBatch]:
        """This rank's micro-batches of one step, made as they are taken.

        Raises:
            UserError: more corrupt images in a row than `data.max_corrupt`.
        """
        phase, batches = self._locate(step)
        return (self._build(phase, rows) for rows in batches)

    def _locate(self, step: int) -> tuple[Phase, list[list[int]]]:
        """The phase of a step, and the rows of each of its micro-batches."""
        number, first = self._schedule.locate(step)
        phase = self._schedule.phases[number]
        return phase, rows_of(self._recipe, phase, first, self._rank, self._dp_size).tolist()

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()

    def _build(self, phase: Phase, numbers: list[int]) -> PackedBatch:
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
            numbers=numbers,
        )
        mine = image_block(batch.counts.images, self._share)
        if self._with_images and mine:
            slots = [
                _Slot(r, source, document, number)
                for r, row in enumerate(rows)
                for (source, document), content in zip(documents[r], row, strict=True)
                for number in content.images.tolist()
            ]
            batch = self._with_pixels(batch, [slots[i] for i in mine])
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
                log.warning("%s: image %d is corrupt (%d bytes) and shown gray", self.name(s.source, s.document), s.number, len(encoded[i]))
        for row in {slots[i].row for i in corrupt}:
            bad = [slots[i] for i in corrupt if slots[i].row == row]
            if len(bad) > self._data.max_corrupt:
                names = dict.fromkeys(self.name(s.source, s.document) for s in bad)
                raise UserError(
                    f"{len(bad)} corrupt images in one row, more than data.max_corrupt {self._data.max_corrupt}, in {', '.join(names)}: "
                    "preprocess the data again, or raise data.max_corrupt"
                )
        return batch.with_pixels(pixels, len(corrupt), self._share)

    def name(self, source: int, document: int) -> str:
        """What messages call a document: its shard and its record's id."""
        return f"{self._data.sources[source].prefix} {self._shards[source].record_id(document)}"
