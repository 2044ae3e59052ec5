"""The last few results of something expensive, shared by the threads of a process.

The frames of a DICOM file and the slices of a volume are asked for one by one and by several threads at once. Each result is made by one
thread while those that want the same one wait, so a large file is in memory once, not once a thread. Failures are not kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Entry(Generic[T]):
    def __init__(self) -> None:
        self.lock, self.value = threading.Lock(), list[T]()


class Kept(Generic[T]):
    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry[T]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value under `key`, made if it is not among the `most` last ones."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            while len(self._entries) > self._most:
                self._entries.popitem(last=False)
        with entry.lock:
            if not entry.value:
                entry.value.append(make())
            return entry.value[0]
