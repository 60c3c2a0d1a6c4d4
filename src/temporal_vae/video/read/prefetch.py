"""Items made ahead in a thread, and arrays whose memory is used again."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from temporal_vae.video.frames import VideoError

T = TypeVar("T")

POLL_SECONDS = 0.1
"""How often a thread that waits looks whether the prefetcher was closed."""


class Prefetcher(Generic[T]):
    """Iterate over `items`, which a thread makes ahead; at most `depth` of them wait.

    An exception in the thread is raised where its item would have come.
    """

    def __init__(self, items: Iterator[T], depth: int):
        self._queue: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
        self._closed, self._process = threading.Event(), os.getpid()
        self._thread = threading.Thread(
            target=self._make, args=(items,), name="video decoder", daemon=True
        )
        self._thread.start()

    def _make(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(item, None):
                    return
            self._put(None, None)
        except BaseException as error:  # whatever it is, it is raised again for the consumer
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> bool:
        while not self._closed.is_set():
            with suppress(Full):
                self._queue.put((item, error), timeout=POLL_SECONDS)
                return True
        return False

    def __iter__(self) -> Iterator[T]:
        while not self._closed.is_set():
            if self._process != os.getpid():  # a fork has no threads but the one that forked
                raise VideoError(
                    "a video that is being read cannot be read on in a forked process: open it "
                    "there"
                )
            try:
                item, error = self._queue.get(timeout=POLL_SECONDS)
            except Empty:  # the thread is slow, or `close` has emptied the queue
                continue
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    def close(self, seconds: float = 5.0) -> bool:
        """Tell the thread to end, and wait for it that long.

        Returns False if it has not ended, as when it waits for a pipe that nobody writes to.
        """
        if self._process != os.getpid():  # where a lock may be held for ever
            return False
        self._closed.set()
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join(seconds)
        return not self._thread.is_alive()


class Recycler:
    """Makes arrays in the memory of arrays that are gone; it keeps at most `kept` bytes for that.

    The system hands out new memory page by page, which for large frames can take as long as
    decoding them.
    """

    def __init__(self, kept: int):
        self._kept = kept
        self._free: list[bytearray] = []

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Like `numpy.empty`. The memory is used again once all views of the array are gone."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = bytearray()
        while len(memory) != size:  # memory of another size is let go
            memory = self._free.pop() if self._free else bytearray(size)
        owner = np.frombuffer(memory, dtype)
        weakref.finalize(owner, self._take_back, memory).atexit = False
        return owner.reshape(shape)

    def _take_back(self, memory: bytearray) -> None:
        if sum(map(len, self._free)) + len(memory) <= self._kept:
            self._free.append(memory)
