"""How much of a long computation is done, told while it goes on.

Convolutions and attention count their multiplications. A walk of one large frame takes minutes, in
which nothing else moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Listener = Callable[[int], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def count(result: Tensor, each: int) -> None:
    """Say that a result was computed with `each` multiplications for each of its numbers."""
    if torch.compiler.is_compiling() or (listen := _listener.get()) is None or result.is_meta:
        return
    listen(result.numel() * each)


@contextmanager
def told_to(listener: Listener | None) -> Iterator[None]:
    """Tell a listener of all that is computed here, in this thread; None tells nobody."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
