"""The bounded walk: one activation in an arena, and a small piece of it on the way at a time.

    framewise layers   a few frames at a time, or bands of rows of one frame
    timewise layers    a few pixels at a time, all frames of them
    norms              where a piece is less than what a norm sums over, its sums are gathered from
                       all pieces first; then each piece is computed with the sums of the whole

Consecutive framewise layers form a run and go together, frame by frame, so the widest activation
between them never exists for all frames. Between runs the clip lies in one arena as large as the
largest of them: a run that shrinks it writes from the front; before one that expands it the clip is
moved to the back of the arena, where frame t is read before anything is written over it.

Nothing is blended, nothing recomputed at a seam: the result is that of the whole walk, to rounding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from temporal_vae.kernels.norm import Moments, normalise
from temporal_vae.layers import Framewise, Norm, Timewise, own_norm
from temporal_vae.network import Layer, Line


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much of an activation may be on the way at a time."""

    frames: int = 1
    """Frames of a group, for framewise layers."""
    pixels: int = 4096
    """Pixels of a chunk, for timewise layers."""
    rows: int | None = None
    """Output rows of a band of one frame; None for whole frames."""
    arena: str | os.PathLike[str] | None = None
    """A new file to hold the activation instead of memory; it may be deleted afterwards."""

    def __post_init__(self) -> None:
        for name in ("frames", "pixels", "rows"):
            value = getattr(self, name)
            if (name != "rows" or value is not None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")


def walk(line: Line, x: Tensor, bounds: Bounds) -> Tensor:
    """A clip (B, C, T, H, W) through every layer, one sample at a time; the result is contiguous.

    Raises `ValueError` under autograd, which needs what this walk overwrites.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *line.parameters())):
        raise ValueError(
            "a bounded walk overwrites its activations, so it cannot run under autograd: use "
            "torch.no_grad() around it, or no plan"
        )
    layers = list(line.layers())
    # reserved before the first layer: running out of memory can only come before work
    arena = _Arena(_largest(layers, x), x, bounds.arena)
    out = x.new_empty(_shape_of_result(layers, x))
    for sample, result in zip(x.split(1), out, strict=True):
        clip = sample.contiguous(memory_format=torch.channels_last_3d)
        for run in runs(layers):
            if isinstance(run, Timewise):
                clip = _walk_pixels(run, arena.hold(clip), bounds)
            else:
                clip = _walk_frames(run, clip, arena, bounds)
        result.copy_(clip[0])
    return out


class _Arena:
    """Flat memory for one activation (1, C, T, H, W), channels-last, at its front or its back."""

    def __init__(self, size: int, like: Tensor, file: str | os.PathLike[str] | None):
        if file is None:
            self._memory = torch.empty(size, dtype=like.dtype, device=like.device)
        elif os.path.exists(file):
            raise ValueError(f"{os.fspath(file)} exists: the arena overwrites what it is given")
        elif like.device.type != "cpu":
            raise ValueError(
                f"an arena in a file needs the model on the CPU, it is on {like.device}"
            )
        else:
            self._memory = torch.from_file(
                os.fspath(file), shared=True, size=size, dtype=like.dtype
            )

    def front(self, shape: tuple[int, ...]) -> Tensor:
        """The first of the memory as (1, C, T, H, W)."""
        return self._view(0, shape)

    def back(self, clip: Tensor) -> Tensor:
        """Move a clip to the end of the memory, last frame first: source and target may overlap."""
        target = self._view(self._memory.numel() - clip.numel(), clip.shape)
        for t in reversed(range(clip.shape[2])):
            target[:, :, t] = clip[:, :, t].clone()
        return target

    def holds(self, clip: Tensor) -> bool:
        """Whether the clip lies in here."""
        return clip.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()

    def hold(self, clip: Tensor) -> Tensor:
        """The clip if it lies in here, else a copy at the front: what may be overwritten."""
        return clip if self.holds(clip) else self.front(tuple(clip.shape)).copy_(clip)

    def _view(self, start: int, shape: tuple[int, ...]) -> Tensor:
        _, c, t, h, w = shape
        part = self._memory[start : start + c * t * h * w]
        return part.view(1, t, h, w, c).movedim(-1, 1)


def runs(layers: Iterable[Layer]) -> Iterator[list[Framewise] | Timewise]:
    """Framewise layers that follow one another together, timewise ones each alone."""
    run: list[Framewise] = []
    for layer in layers:
        if isinstance(layer, Framewise):
            run.append(layer)
            continue
        if run:
            yield run
        yield layer
        run = []
    if run:
        yield run


def shape_after(run: Iterable[Framewise], shape: tuple[int, ...]) -> tuple[int, ...]:
    """(1, C, T, H, W) after a run of framewise layers."""
    _, c, t, h, w = shape
    for layer in run:
        c, h, w = layer.channels(c), int(h * layer.scale), int(w * layer.scale)
    return 1, c, t, h, w


def _shape_of_result(layers: Iterable[Layer], x: Tensor) -> tuple[int, ...]:
    framewise = [layer for layer in layers if isinstance(layer, Framewise)]
    return (len(x), *shape_after(framewise, tuple(x.shape))[1:])


def _largest(layers: list[Layer], x: Tensor) -> int:
    """Elements of the largest activation between runs, of one sample."""
    shape: tuple[int, ...] = (1, *x.shape[1:])
    most = 0
    for run in runs(layers):
        if not isinstance(run, Timewise):
            shape = shape_after(run, shape)
        most = max(most, math.prod(shape))
    return most


# Frames --------------------------------------------------------------------------------------


def _walk_frames(run: list[Framewise], clip: Tensor, arena: _Arena, bounds: Bounds) -> Tensor:
    """All layers of a run on a few frames at a time, from the clip into the front of the arena."""
    shape = shape_after(run, tuple(clip.shape))
    if math.prod(shape) > clip.numel() and arena.holds(clip):
        clip = arena.back(clip)
    target = arena.front(shape)
    step = bounds.frames if bounds.rows is None else 1
    for start in range(0, clip.shape[2], step):
        stop = min(start + step, clip.shape[2])
        frames = clip[0, :, start:stop].movedim(0, -1).movedim(-1, 1)  # (n, C, H, W)
        for layer in run:
            frames = _in_bands(layer, frames, bounds.rows) if bounds.rows else layer.frames(frames)
        target[0, :, start:stop] = frames.movedim(1, 0)
    return target


def _in_bands(layer: Framewise, frame: Tensor, rows: int) -> Tensor:
    """One layer on one frame (1, C, H, W), a band of output rows at a time."""
    if layer.halo is None:
        return layer.frames(frame)
    above, below = layer.halo
    height, scale = frame.shape[2], layer.scale
    bands = [
        (start, min(start + rows, int(height * scale)))
        for start in range(0, int(height * scale), rows)
    ]

    def seen(band: tuple[int, int]) -> tuple[int, int]:
        """The input rows that the output rows of a band see."""
        first, last = int(band[0] / scale), math.ceil(band[1] / scale)
        return max(0, first - above), min(height, last + below)

    def compute(band: tuple[int, int], norm: Norm | None) -> Tensor:
        top, bottom = seen(band)
        piece = frame[:, :, top:bottom]
        y = layer.frames(piece) if norm is None else layer.frames(piece, norm)
        start = band[0] - int(top * scale)
        return y[:, :, start : start + band[1] - band[0]]

    def own(band: tuple[int, int], x: Tensor) -> Tensor:
        """Of what a norm gets, the rows that are this band's and no other's (norms keep rows)."""
        start = band[0] - seen(band)[0]
        return x[:, :, start : start + band[1] - band[0]]

    known: dict[nn.Module, Moments] = {}
    for norm in layer.norms():
        known[norm] = _gather(norm, known, compute, own, bands)
    apply = _with(known) if known else None
    out: Tensor | None = None
    for band in bands:
        y = compute(band, apply)
        if out is None:
            shape = (1, y.shape[1], int(height * scale), y.shape[3])
            out = y.new_empty(shape).contiguous(memory_format=torch.channels_last)
        out[:, :, band[0] : band[1]] = y
    assert out is not None
    return out


# Pixels --------------------------------------------------------------------------------------


def _walk_pixels(layer: Timewise, clip: Tensor, bounds: Bounds) -> Tensor:
    """A timewise layer on a few pixels at a time, in place; clip (1, C, T, H, W)."""
    x = clip.movedim(1, -1).flatten(2, 3).movedim(-1, 1)  # (1, C, T, P)
    chunks = [
        (start, min(start + bounds.pixels, x.shape[3]))
        for start in range(0, x.shape[3], bounds.pixels)
    ]

    def compute(chunk: tuple[int, int], norm: Norm) -> Tensor:
        piece = x[:, :, :, chunk[0] : chunk[1]].contiguous(memory_format=torch.channels_last)
        return layer.pixels(piece, norm)

    known: dict[nn.Module, Moments] = {}
    for norm in layer.norms():
        known[norm] = _gather(norm, known, compute, lambda _, piece: piece, chunks)
    for chunk in chunks:
        x[:, :, :, chunk[0] : chunk[1]] = compute(chunk, _with(known))
    return clip


# Norms wider than a piece --------------------------------------------------------------------


class _Reached(Exception):
    """Ends the computation of a piece at the norm whose sums are wanted, with that norm's input."""

    def __init__(self, x: Tensor):
        self.input = x


def _gather(
    wanted: nn.Module,
    known: dict[nn.Module, Moments],
    compute: Callable[[tuple[int, int], Norm], Tensor],
    own: Callable[[tuple[int, int], Tensor], Tensor],
    pieces: list[tuple[int, int]],
) -> Moments:
    """The moments of one norm's input over all pieces, the norms before it being known."""
    before = _with(known)

    def stop_there(module: nn.Module, x: Tensor) -> Tensor:
        if module is wanted:
            raise _Reached(x)
        return before(module, x)

    parts = []
    for piece in pieces:
        try:
            compute(piece, stop_there)
        except _Reached as reached:
            parts.append(Moments.of(own(piece, reached.input), cast(int, wanted.num_groups)))
    return Moments.join(parts)


def _with(known: dict[nn.Module, Moments]) -> Norm:
    """Norms by known moments; those that no piece cuts, on their own."""

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        if module not in known:
            return own_norm(module, x)
        group_norm = cast(nn.GroupNorm, module)
        return normalise(x, known[module], group_norm.weight, group_norm.bias, group_norm.eps)

    return norm
