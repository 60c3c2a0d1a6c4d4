"""The walk that gradients go back through: what they need is computed again, a piece at a time.

Autograd would keep what is inside of every layer to the end. This walk keeps what is between the
layers, and computes a layer again when its gradients are due: a few frames or a few pixels of it at
a time, so that only the inside of one piece is there. A norm that sums over more than a piece has
its sums gathered first, as in the bounded walk; here gradients go through the sums as well, and so
they are those of the whole walk, to rounding.

    nothing kept between some layers   the line is cut into segments; of each the input alone is
                                       kept, and what is between its layers computed once more
    samples                            one after the other; frames too, if no layer sees two
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from temporal_vae.network.autoencoder import Line
from temporal_vae.network.folds import channels_last
from temporal_vae.network.kernels.norm import Moments
from temporal_vae.network.layer import Layer
from temporal_vae.network.primitives import Norm, own_norm
from temporal_vae.walks import bounded, stages
from temporal_vae.walks.norm_sums import input_of, with_known
from temporal_vae.walks.stages import Bounds

T = TypeVar("T")


def walk(line: Line, x: Tensor, bounds: Bounds) -> Tensor:
    """A clip (B, C, T, H, W) through every layer; gradients go back in the pieces of `bounds`.

    Raises `ValueError` for hooks that pieces would not call, and norms that have no sums.
    """
    bounded.refuse_pieces(line)
    layers = list(line.layers())
    frames = stages.frames_apart(layers, x.shape[2], bounds)
    samples = [
        _joined([_through(layers, part, bounds) for part in sample.split(frames, 2)], 2)
        for sample in x.split(1)
    ]
    return _joined(samples, 0)


def again(function: Callable[[Tensor], T], x: Tensor) -> T:
    """`function(x)`, computed once more when gradients need what is inside: only x is kept."""
    found: T = checkpoint(function, x, use_reentrant=False)
    return found


def compute(layers: Sequence[Layer], x: Tensor, norm: Norm = own_norm) -> Tensor:
    """A part of a clip, which may be a view in any memory order, through some layers."""
    x = channels_last(x)
    for layer in layers:
        x = layer.compute(x, norm)
    return x


def moments(layer: Layer, norm: nn.Module, known: dict[nn.Module, Moments], x: Tensor) -> Moments:
    """What a norm of a layer sums up of a part of a clip, the norms before it being known."""
    found = input_of(norm, known, partial(compute, [layer], x))
    return Moments.of(found, groups=int(norm.num_groups))  # type: ignore[arg-type]


def _through(layers: Sequence[Layer], x: Tensor, bounds: Bounds) -> Tensor:
    """What is independent of the rest, (1, C, T, H, W), through every layer."""
    for segment in stages.segments(layers, tuple(x.shape), bounds):
        one = partial(_in_units, segment, bounds)
        x = again(one, x) if bounds.segments else one(x)
    return x


def _in_units(units: Sequence[list[Layer]], bounds: Bounds, x: Tensor) -> Tensor:
    for unit in units:
        cut = _in_chunks if unit[0].cut == "pixels" else _in_groups
        x = cut(unit, channels_last(x), bounds)
    return x


def _in_groups(unit: list[Layer], x: Tensor, bounds: Bounds) -> Tensor:
    """A few frames at a time, or if it must be all at once."""
    frames = stages.frames_of(unit, tuple(x.shape), bounds)
    return _joined([again(partial(compute, unit), group) for group in x.split(frames, 2)], 2)


def _in_chunks(unit: list[Layer], x: Tensor, bounds: Bounds) -> Tensor:
    """A few pixels at a time, with all frames of them."""
    (layer,) = unit
    pixels = x.movedim(1, -1).flatten(2, 3)[:, :, None]  # split at once: a slice each would have
    split = pixels.split(bounds.chunk(layer), 3)  # a gradient as large as x
    chunks = [chunk.movedim(-1, 1) for chunk in split]  # (1, C, T, 1, P)
    known: dict[nn.Module, Moments] = {}
    for norm in layer.norms() if len(chunks) > 1 else ():
        found = [again(partial(moments, layer, norm, known), chunk) for chunk in chunks]
        known = {**known, norm: Moments.join(found)}  # another one: what came before is in use
    one = partial(compute, unit, norm=with_known(known))
    row = _joined([again(one, chunk) for chunk in chunks], 4)
    clip: Tensor = row.squeeze(3).unflatten(3, x.shape[3:])
    return clip


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts of a clip, channels last; one alone as it is."""
    if len(parts) == 1:
        return parts[0]
    last = [part.movedim(1, -1) for part in parts]
    return torch.cat(last, dim and dim - 1).movedim(-1, 1)
