"""The line cut into what goes together, and the shapes of what lies between."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from temporal_vae.network.autoencoder import Layer
from temporal_vae.network.framewise import Framewise
from temporal_vae.network.timewise import Timewise

Shape = tuple[int, ...]
ENOUGH_FRAMES = 8
"""Frames of a group from which on more of them gain nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much of an activation may be on the way at a time."""

    frames: int = 1
    """Frames of a group, for framewise layers."""
    largest: int | None = None
    """Most numbers of a frame that a layer reads and makes together: runs of fewer get more frames,
    up to `ENOUGH_FRAMES`, so that a group is about as large."""
    pixels: int = 4096
    """Pixels of a chunk, for timewise layers."""
    channels: int | None = None
    """Timewise layers of more channels, or more to hold of each, get fewer pixels, so that a chunk
    takes about as much."""
    rows: int | None = None
    """Output rows of a band of one frame; None for whole frames."""
    fused: bool = False
    """Bands go through the widest activation without storing it, computing parts of it again."""
    offload: str | os.PathLike[str] | None = None
    """Where the activation lies: None where the model is, "host" in the memory of the CPU, else a
    folder, for a file without a name that is gone when the walk ends."""
    workspace: int = 0
    """Bytes that pieces take at the most: taken and let go before the first layer."""
    most: int | None = None
    """Bytes that the walk may take on the CPU over what the process has when it begins: where the
    allocator keeps too much of what is freed, it has to give that back. None: it keeps all."""

    def __post_init__(self) -> None:
        for name in ("frames", "largest", "pixels", "channels", "rows", "most"):
            value = getattr(self, name)
            optional = value is None and name not in ("frames", "pixels")
            if not optional and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
        if not isinstance(self.workspace, int) or self.workspace < 0:
            raise ValueError(f"workspace must be a number of bytes, got {self.workspace!r}")

    def group(self, run: Sequence[Framewise], shape: Shape) -> int:
        """Frames at a time for a run that gets (1, C, T, H, W)."""
        if self.largest is None or any(layer.halo is None for layer in run):
            return self.frames  # attention holds more than its size
        most = min(ENOUGH_FRAMES, self.frames * self.largest // largest_of(run, shape))
        # doubled, not filled up: groups of many sizes cut the heap up
        return self.frames << (max(1, most // self.frames).bit_length() - 1)

    def chunk(self, layer: Timewise) -> int:
        """Pixels at a time for a layer."""
        if self.channels is None:
            return self.pixels
        return max(1, self.pixels * self.channels // max(self.channels, layer.width * layer.load))


# The line, cut into what goes together -------------------------------------------------------


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


def stages(run: list[Framewise], shape: Shape, bounds: Bounds) -> list[list[Framewise]]:
    """The layers of a run that bands go through together: each alone, but for the widest result.

    A `fused` walk never stores a result that is larger than what comes before and after it and more
    than half of the largest one: the layer that makes it and the one that reads it go together.
    """
    if not bounds.fused:
        return [[layer] for layer in run]
    sizes = [math.prod(each) for each in shapes_in(run, shape)]
    found: list[list[Framewise]] = [[run[0]]]
    for layer, following, (before, here, after) in zip(
        run, run[1:], zip(sizes, sizes[1:], sizes[2:], strict=False), strict=False
    ):
        widest = here > before and here > after and 2 * here > max(sizes)
        if widest and layer.halo is not None and following.halo is not None:
            found[-1].append(following)
        else:
            found.append([following])
    return found


def largest_of(run: Iterable[Framewise], shape: Shape) -> int:
    """Numbers of a frame before and after a layer of a run, together, where they are most."""
    sizes = [math.prod(each) // shape[2] for each in shapes_in(run, shape)]
    return max(map(sum, pairwise(sizes)))


def shape_after(run: Iterable[Framewise], shape: Shape) -> Shape:
    """(1, C, T, H, W) after a run of framewise layers."""
    return shapes_in(run, shape)[-1]


def shapes_in(run: Iterable[Framewise], shape: Shape) -> list[Shape]:
    """(1, C, T, H, W) before a run of framewise layers, and after each of them."""
    shapes = [shape]
    for layer in run:
        b, c, t, h, w = shapes[-1]
        shapes.append((b, layer.channels(c), t, int(h * layer.scale), int(w * layer.scale)))
    return shapes


def result_shape(layers: Iterable[Layer], shape: Shape) -> Shape:
    """Shape of what a line gives for (B, C, T, H, W)."""
    return shape_after((layer for layer in layers if isinstance(layer, Framewise)), shape)


def arena_sizes(layers: Iterable[Layer], shape: Shape, bounds: Bounds) -> tuple[int, int]:
    """Elements of the largest activation that waits between runs, and between stages of a frame."""
    clip, frame, shape = 0, 0, (1, *shape[1:])
    for run in runs(layers):
        if isinstance(run, Timewise):
            clip = max(clip, math.prod(shape))
            continue
        if bounds.rows is not None:
            here: Shape = (1, shape[1], 1, *shape[3:])
            for stage in stages(run, here, bounds)[:-1]:
                here = shape_after(stage, here)
                frame = max(frame, math.prod(here))
        shape = shape_after(run, shape)
    return clip, frame
