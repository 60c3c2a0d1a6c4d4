"""Memory for the results of our kernels that a walk uses again as soon as nobody holds them.

Left to the system's allocator, much of it is given back and comes anew, page by page, at a cost of
up to a fifth of the time of a small model. What a walk keeps here is gone when it ends, and never
more than its results took at their worst moment. A tensor that somebody holds, as hooks may, keeps
its block for itself; like all memory that numpy made, it cannot be resized in place.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from temporal_vae.network.kernels.plain import has_memory, recorded

Block = Any
"""An array of bytes. Each tensor has a view of its own, whose end says that the block is free."""


class Blocks:
    """Blocks that are free, the one that has been so for longest first."""

    def __init__(self) -> None:
        self._free: list[Block] = []
        self._in_use = self._most = 0
        self._open = True
        self._lock = threading.RLock()  # tensors end in any thread, and while one is made

    def empty(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of a shape and of the dtype of another, its numbers whatever they are."""
        size = math.prod(shape) * like.element_size()
        with self._lock:
            block = self._taken(size)
        view = block[:]
        weakref.finalize(view, self._back, block).atexit = False
        return torch.from_numpy(view).view(like.dtype).view(*shape)

    def close(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._open = False
            self._free.clear()

    def _taken(self, size: int) -> Block:
        self._in_use += size
        self._most = max(self._most, self._in_use)
        for i in reversed(range(len(self._free))):  # the last may be in the cache still
            if len(self._free[i]) == size:
                return self._free.pop(i)
        while self._free and self._in_use + sum(map(len, self._free)) > self._most:
            self._free.pop(0)
        return torch.empty(size, dtype=torch.uint8, device="cpu").numpy()

    def _back(self, block: Block) -> None:
        with self._lock:
            self._in_use -= len(block)
            if self._open:
                self._free.append(block)


_blocks: ContextVar[Blocks | None] = ContextVar("blocks", default=None)


@contextmanager
def used_again() -> Iterator[None]:
    """Use memory again for results of what is computed here, in this thread.

    Not with gradients, which keep what would be used again, nor while a compiler looks on.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        yield
        return
    blocks = Blocks()
    token = _blocks.set(blocks)
    try:
        yield
    finally:
        _blocks.reset(token)
        blocks.close()


def new_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """`like.new_empty(shape)`, of memory that a walk has used before where there is some."""
    blocks = _blocks.get()
    if blocks is None or like.device.type != "cpu" or recorded() or not has_memory(like):
        return like.new_empty(*shape)
    return blocks.empty(like, shape)


def empty_like(x: Tensor) -> Tensor:
    """The same for a tensor (N, C, ...) whose channels lie together."""
    return new_empty(x, x.movedim(1, -1).shape).movedim(-1, 1)
