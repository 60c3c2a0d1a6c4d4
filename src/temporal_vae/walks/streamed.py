"""The streamed walk: a clip in pieces of any length, each timewise layer handing its tail on.

Exact by three rules: at the end each layer flushes with zeros at its own input; one that looks
ahead gives nothing for frames before the first; attention hides keys outside the clip. A causal
network gives a frame for each it takes; a symmetric one is late by its reach, and the end flushes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from temporal_vae.layers import State as LayerState
from temporal_vae.layers import Timewise
from temporal_vae.network import Layer, Line

State = tuple[LayerState, ...]
"""One entry for each timewise layer of the line, in order; `()` before the first piece."""


def step(line: Line, x: Tensor, state: State) -> tuple[Tensor | None, State]:
    """The next piece (B, C, n, H, W) through every layer -> what can be given so far, new state.

    The result is None where nothing can be given yet. A state is a value: read, never changed.

    Raises `ValueError` for a network whose norms span the clip, and for a state that does not fit.
    """
    layers = list(line.layers())
    return _pass_on(layers, x, _memories(line, state))


def finish(line: Line, state: State) -> Iterator[Tensor]:
    """What an ended clip still owes, in pieces, in order.

    Layer after layer is told that its input has ended, and the few frames that it held back go
    through the rest one by one: however far a network sees, no more is ever on the way.
    """
    layers, memories = list(line.layers()), _memories(line, state)
    for index, layer in enumerate(layers):
        if isinstance(layer, Timewise):
            held, _ = layer.stream(None, memories[0], last=True)
            memories = memories[1:]
            for frame in () if held is None else held.split(1, dim=2):
                x, memories = _pass_on(layers[index + 1 :], frame, memories)
                if x is not None:
                    yield x


def _pass_on(
    layers: Sequence[Layer], x: Tensor | None, memories: State
) -> tuple[Tensor | None, State]:
    remembered, kept = iter(memories), []
    for layer in layers:
        if isinstance(layer, Timewise):
            x, memory = layer.stream(x, next(remembered), last=False)
            kept.append(memory)
        elif x is not None:
            x = layer(x)
    return x, tuple(kept)


def _memories(line: Line, state: State) -> State:
    """The state with an entry for each timewise layer, checked."""
    if line.reach is None:
        raise ValueError(
            "this model normalises over the whole clip, so it cannot stream: give it clip after "
            "clip of its clip_frames"
        )
    needed = sum(isinstance(layer, Timewise) for layer in line.layers())
    if state and len(state) != needed:
        raise ValueError(
            f"the state is of another model: it has {len(state)} entries, this one needs {needed}"
        )
    return state or ((),) * needed
