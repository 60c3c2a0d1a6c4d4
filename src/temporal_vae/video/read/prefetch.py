"""Work done ahead in a thread, and the memory that goes round in it."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

PATIENCE = 0.1
"""Seconds between two looks whether the reader has gone."""


class Ahead(Generic[T]):
    """Iterate over `items` made in a thread, at most `depth` of them waiting.

    An exception of the maker is raised where its item would have come. `close` ends the thread; it
    returns False if the thread is stuck, as in reading a pipe that nobody writes.
    """

    def __init__(self, items: Iterator[T], depth: int):
        self._queue: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
        self._left = threading.Event()
        self._thread = threading.Thread(
            target=self._make, args=(items,), name="video decoder", daemon=True
        )
        self._thread.start()

    def _make(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, None))
        except BaseException as error:  # the reader is to have it, whatever it is
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._left.is_set():
            with suppress(Full):
                self._queue.put(entry, timeout=PATIENCE)
                return True
        return False

    def __iter__(self) -> Iterator[T]:
        while not self._left.is_set():
            try:
                item, error = self._queue.get(timeout=PATIENCE)
            except Empty:  # the maker is slow, or another thread has closed this
                continue
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    def close(self, seconds: float = 5.0) -> bool:
        """Let the thread end, and wait for it; whether it has ended."""
        self._left.set()
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join(seconds)
        return not self._thread.is_alive()


class Recycler:
    """Arrays in the memory of those that are gone, of which at most `kept` bytes wait.

    Fresh memory for every frame comes from the system page by page, which can take as long as the
    decoding.
    """

    def __init__(self, kept: int):
        self._kept = kept
        self._free: list[bytearray] = []

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """As `numpy.empty`: nobody else has this memory until all views of the array are gone."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = bytearray()
        while len(memory) != size:  # what waits of another size is of no more use
            try:
                memory = self._free.pop()
            except IndexError:
                memory = bytearray(size)
        owner = np.frombuffer(memory, dtype)
        weakref.finalize(owner, self._take_back, memory).atexit = False
        return owner.reshape(shape)

    def _take_back(self, memory: bytearray) -> None:
        if sum(map(len, self._free)) + len(memory) <= self._kept:
            self._free.append(memory)
