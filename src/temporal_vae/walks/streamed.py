"""The streamed walk: a clip in pieces of any length, of which each layer remembers its tails.

It is exact by three rules. At the end of the clip each layer flushes with zeros at its own input. A
layer that looks ahead gives nothing for frames before the first. Attention hides keys outside the
clip. A causal network gives a frame for each that it takes. A symmetric one looks ahead, so each
frame comes as many frames later as its reach; the last ones come when the stream is finished.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from temporal_vae.network.autoencoder import Line
from temporal_vae.network.layer import Layer
from temporal_vae.network.layer import State as LayerState
from temporal_vae.walks import bounded, piecewise
from temporal_vae.walks.stages import Bounds

State = tuple[LayerState, ...]
"""One entry for each layer of the line that has tails, in order; `()` before the first piece."""
Held = State | list[LayerState]
"""A state, or the entries of one that nobody else holds."""
END_PIXELS = 1024
"""Pixels at a time at the end of a stream whose steps nothing bounds."""


def step(
    line: Line, x: Tensor, state: Held | None, bounds: Bounds | None = None
) -> tuple[Tensor | None, State]:
    """The next piece (B, C, n, H, W) through every layer -> what can be given so far, new state.

    The result is None where nothing can be given yet. A state is a value: read, never changed; one
    in a list is donated instead, and let go or written over. With `bounds` the piece is walked
    bounded.

    Raises `ValueError` for a network whose norms span the clip, and for a state that does not fit.
    """
    memories, first = _memories(line, state), False
    if bounds is not None and bounds.pieces is not None:
        return piecewise.step(line, x, memories, bounds), tuple(memories)
    if bounds is not None:
        bounded.refuse_watchers(line, x)
        # Without timewise layers there is no state to show that this is the first piece, so memory
        # is reserved every time.
        first = not any(memory and memory[0].any() for memory in memories)
    y = _pass_on(list(line.layers()), x, memories, bounds, isinstance(state, list), first)
    return y, tuple(memories)


def begin(line: Line, like: Tensor) -> State:
    """The state before the first piece (B, C, n, H, W) for a stream that overwrites it: one block.

    What lives as long as the stream, and is made piece by piece between what comes and goes, leaves
    gaps in the free memory: the peak then grows with the length.
    """
    shape, inputs = tuple(like.shape), []
    for layer in line.layers():
        if layer.tails():
            b, c, _, h, w = shape
            inputs.append((layer, like[:, :1, :0, :1, :1].expand(b, c, 0, h, w)))
        shape = layer.output_shape(shape)
    total = sum(layer.tail_numbers(tuple(x.shape)) for layer, x in inputs)
    block, used = like.new_zeros(total), 0

    def zeros(*size: int) -> Tensor:
        nonlocal used
        used += math.prod(size)
        return block[used - math.prod(size) : used].view(size)

    return tuple(layer.begin(x, zeros) for layer, x in inputs)


def finish(
    line: Line, state: Held | None, bounds: Bounds | None = None, frames: int = 1
) -> Iterator[Tensor]:
    """What an ended clip still owes, in pieces, in order.

    Layer after layer is told that its input has ended, and the few frames that it held back join
    those that wait for the next one. A quarter of `frames` of them, and never more than `frames`,
    go through the rest together: however far a network sees, no more is ever on the way.
    """
    layers, memories = list(line.layers()), _memories(line, state)
    donated, reached = isinstance(state, list), 0
    if bounds is not None and not donated:  # written over again and again: a copy of its own
        memories, donated = [tuple(map(torch.clone, memory)) for memory in memories], True
    waiting: Tensor | None = None  # in front of the layer that is reached
    for index, layer in enumerate(layers):
        if not layer.tails():
            continue
        through = layers[reached : index + 1]
        if waiting is not None:
            waiting = _pass_on(through, waiting, memories, bounds, donated)
        held, reached = _flush(layer, memories.pop(0), bounds, frames), index + 1
        waiting = _joined(waiting, held)
        del held
        while waiting is not None and waiting.shape[2] >= max(1, frames // 4):
            piece, rest = waiting[:, :, :frames], waiting[:, :, frames:]
            waiting = rest if rest.shape[2] else None
            x = _pass_on(layers[reached:], piece, memories, bounds, donated)
            del piece, rest  # or they would be there during the next pieces; so the result
            if x is not None:
                yield x
            del x
    if waiting is not None:
        x = _pass_on(layers[reached:], waiting, memories, bounds, donated)
        if x is not None:
            yield x


def _flush(layer: Layer, memory: LayerState, bounds: Bounds | None, frames: int) -> Tensor | None:
    """What a layer holds back at the end of its input, for steps of so many frames."""
    if not memory or (bounds is None and torch.is_grad_enabled()):
        return layer.stream(None, memory, last=True)[0]
    # a few pixels at a time, fewer for more frames, or the end would take more than the steps
    bounds = bounds or Bounds(pixels=END_PIXELS)
    pixels = bounds.pixels * frames // max(frames, layer.future or 0)
    return bounded.flush(layer, memory, replace(bounds, pixels=max(1, pixels)))


def _joined(*pieces: Tensor | None) -> Tensor | None:
    """Pieces (B, C, n, H, W) of a clip that follow one another, as one."""
    present = [piece for piece in pieces if piece is not None]
    return torch.cat(present, 2) if len(present) > 1 else next(iter(present), None)


def _pass_on(
    layers: Sequence[Layer],
    x: Tensor | None,
    memories: list[LayerState],
    bounds: Bounds | None,
    donated: bool,
    first: bool = False,
) -> Tensor | None:
    """A piece through layers; the entries of `memories` are replaced by the new ones."""
    if bounds is not None:
        if x is None or not layers:
            return x
        return bounded.step(layers, x, memories, bounds, donated, first)
    index = 0
    for layer in layers:
        if layer.tails():
            x, memories[index] = layer.stream(x, memories[index], last=False)
            index += 1
        elif x is not None:
            x = layer(x)
    return x


def _memories(line: Line, state: Held | None) -> list[LayerState]:
    """The state with an entry for each layer with tails, checked; a list stays the same one."""
    if not line.streams:
        raise ValueError(
            "this model normalises over the whole clip, so it cannot stream: give it clip after "
            "clip of its clip_frames"
        )
    needed = sum(bool(layer.tails()) for layer in line.layers())
    if state and len(state) != needed:
        raise ValueError(
            f"the state is of another model: it has {len(state)} entries, this one needs {needed}"
        )
    if state and isinstance(state, list):
        return state
    return list(state or ()) or [()] * needed
