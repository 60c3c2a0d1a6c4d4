"""The line cut into what goes together, the shapes in between, and the sizes of pieces."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from temporal_vae.network.layer import Layer, Shape

ENOUGH_FRAMES = 8
"""Frames of a group from which on more of them gain nothing."""
TO_TRAIN_IN_PIECES = (
    "leave the budget out, a plan and tiling too, and take enable_gradient_checkpointing()"
)
"""What to do for gradients of a line that is walked in pieces in time."""


def in_pieces(layers: Sequence[Layer]) -> bool:
    """Whether layers are walked in pieces in time, by `piecewise`: some are cut along rows alone,
    and none looks ahead."""
    return any(layer.cut == "rows" for layer in layers) and not any(
        layer.future != 0 for layer in layers
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much of an activation may be on the way at a time."""

    frames: int = 1
    """Frames of a group, for layers that are cut along frames."""
    largest: int | None = None
    """Most numbers of a frame that a layer reads and makes together: runs of fewer get more frames,
    up to `ENOUGH_FRAMES`, so that a group is about as large."""
    pixels: int = 4096
    """Pixels of a chunk, for layers that are cut along pixels."""
    channels: int | None = None
    """Layers of more channels, or more to hold of each, get fewer pixels, so that a chunk takes
    about as much."""
    rows: int | None = None
    """Output rows of a band of one frame; None for whole frames."""
    pieces: int | None = None
    """Latents of a piece in time, for lines of layers that see time and space together; then `rows`
    are those of a band that goes through the layers with all pieces; see `piecewise`."""
    keep_rows: bool = False
    """Whether layers in the bands of `pieces` keep the rows that the next band reads again, of all
    frames, or they are computed again."""
    fused: bool = False
    """Bands go through the widest activation without storing it, computing parts of it again."""
    offload: str | os.PathLike[str] | None = None
    """Where the activation lies: None where the model is, "host" in the memory of the CPU, else a
    folder, for a file without a name that is gone when the walk ends."""
    segments: int = 0
    """Into how many segments the line is cut for gradients, which keep nothing but their inputs;
    0 keeps what is between all layers."""
    workspace: int = 0
    """Bytes that pieces take at the most: taken and let go before the first layer."""

    def __post_init__(self) -> None:
        for name in ("frames", "largest", "pixels", "channels", "rows", "pieces"):
            value = getattr(self, name)
            optional = value is None and name not in ("frames", "pixels")
            if not optional and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
        for name, what in (("workspace", "bytes"), ("segments", "segments")):
            if not isinstance(value := getattr(self, name), int) or value < 0:
                raise ValueError(f"{name} must be a number of {what}, got {value!r}")

    def explain(self) -> list[str]:
        """The sizes of pieces in words, a line each."""
        if self.pieces is not None:
            rows = "" if self.rows is None else f", in bands of {self.rows} rows, one after another"
            edges = ", what two of them read kept" if self.keep_rows else ""
            return [f"  {self.pieces} latents in time at a time{rows}{edges}"]
        pieces = f"{self.frames} frames" if self.rows is None else (
            f"bands of {self.rows} rows of a frame"
        )  # fmt: skip
        more = ", the widest activation never stored" if self.fused else ""
        if self.largest and self.frames < ENOUGH_FRAMES:
            more = f", up to {ENOUGH_FRAMES} where they are smaller"
        fewer = "" if self.channels is None else ", fewer where layers hold more"
        kept = [f"  {self.segments} segments, whose inputs alone are kept"] if self.segments else []
        return [
            f"  framewise layers: {pieces} at a time{more}",
            f"  timewise layers: {self.pixels} pixels at a time{fewer}",
            *kept,
        ]

    def group(self, run: Sequence[Layer], shape: Shape) -> int:
        """Frames at a time for a run of layers that gets (1, C, T, H, W)."""
        if self.largest is None or any(layer.halo is None for layer in run):
            return self.frames  # attention holds more than its size
        most = min(ENOUGH_FRAMES, self.frames * self.largest // largest_of(run, shape))
        # doubled, not filled up: groups of many sizes leave gaps between blocks of memory
        return self.frames << (max(1, most // self.frames).bit_length() - 1)

    def chunk(self, layer: Layer) -> int:
        """Pixels at a time for a layer."""
        if self.channels is None:
            return self.pixels
        heavy = (layer.width or self.channels) * layer.held
        return max(1, self.pixels * self.channels // max(self.channels, heavy))


def runs(layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """Layers that are cut along frames and follow one another together, every other one alone."""
    for apart, following in groupby(layers, key=lambda layer: layer.cut == "frames"):
        together = list(following)
        yield from [together] if apart else ([layer] for layer in together)


def stages(run: list[Layer], shape: Shape, bounds: Bounds) -> list[list[Layer]]:
    """The layers of a run that bands go through together: each alone, but for the widest result.

    A `fused` walk never stores a result that is larger than what comes before and after it and more
    than half of the largest one: the layer that makes it and the one that reads it go together.
    """
    if not bounds.fused:
        return [[layer] for layer in run]
    sizes = [math.prod(each) for each in shapes_in(run, shape)]
    found: list[list[Layer]] = [[run[0]]]
    for layer, following, (before, here, after) in zip(
        run, run[1:], zip(sizes, sizes[1:], sizes[2:], strict=False), strict=False
    ):
        widest = here > before and here > after and 2 * here > max(sizes)
        if widest and layer.halo is not None and following.halo is not None:
            found[-1].append(following)
        else:
            found.append([following])
    return found


def frames_apart(layers: Sequence[Layer], frames: int, bounds: Bounds) -> int:
    """Frames of a clip that gradients go through the whole line together with: those of a piece if
    no layer sees more than one, else all."""
    return bounds.frames if all(layer.cut == "frames" for layer in layers) else frames


def frames_of(unit: Sequence[Layer], shape: Shape, bounds: Bounds) -> int:
    """Frames that layers which gradients are computed of together get at a time."""
    return bounds.group(unit, shape) if unit[0].cut == "frames" else shape[2]


def piece_of(unit: Sequence[Layer], shape: Shape, bounds: Bounds) -> Shape:
    """The largest piece of (1, C, T, H, W) that layers get at a time for gradients."""
    _, c, t, h, w = shape
    if unit[0].cut == "pixels":
        pixels = bounds.chunk(unit[0])
        return shape if pixels >= h * w else (1, c, t, 1, pixels)
    return (1, c, min(t, frames_of(unit, shape, bounds)), h, w)


def segments(layers: Iterable[Layer], shape: Shape, bounds: Bounds) -> list[list[list[Layer]]]:
    """The layers in as many segments as there are to be for gradients, about equal in what is
    between their layers; each in units that are computed together.

    A unit is one layer, but for two with the widest result between them, which is never stored.
    """
    found, sizes = list[list[Layer]](), list[int]()
    for run in runs(layers):
        cut = stages(run, shape, Bounds(fused=True)) if run[0].cut == "frames" else [run]
        for unit in cut:
            found.append(unit)
            sizes.append(math.prod(shape))
            shape = shape_after(unit, shape)
    before = accumulate(sizes, initial=0)
    total, count = sum(sizes), max(1, bounds.segments)
    numbered = zip(found, (count * size // total for size in before), strict=False)
    return [[unit for unit, _ in of] for _, of in groupby(numbered, key=lambda pair: pair[1])]


def largest_of(run: Iterable[Layer], shape: Shape) -> int:
    """Numbers of a frame before and after a layer of a run, together, where they are most."""
    sizes = [math.prod(each) // shape[2] for each in shapes_in(run, shape)]
    return max(map(sum, pairwise(sizes)))


def shape_after(layers: Iterable[Layer], shape: Shape, begins: bool = True) -> Shape:
    """Shape of what layers make of a clip (B, C, T, H, W), or the most of a later piece of one."""
    return shapes_in(layers, shape, begins)[-1]


def shapes_in(layers: Iterable[Layer], shape: Shape, begins: bool = True) -> list[Shape]:
    """Shapes before the first of some layers, and after each of them; see `shape_after`."""
    shapes = [shape]
    for layer in layers:
        shapes.append(layer.output_shape(shapes[-1], begins))
    return shapes


def arena_sizes(layers: Iterable[Layer], shape: Shape, bounds: Bounds) -> tuple[int, int]:
    """Elements of the largest activation that waits between runs, and between stages of a frame.

    Where there is one frame only, both are one: the second is 0.
    """
    clip, frame, shape, layers = 0, 0, (1, *shape[1:]), list(layers)
    alone = all(each[2] == 1 for each in shapes_in(layers, shape))
    for run in runs(layers):
        if run[0].cut != "frames":
            clip = max(clip, math.prod(shape))
        elif bounds.rows is not None:
            here: Shape = (1, shape[1], 1, *shape[3:])
            for stage in stages(run, here, bounds)[:-1]:
                here = shape_after(stage, here)
                frame = max(frame, math.prod(here))
        shape = shape_after(run, shape, begins=False)
    return (max(clip, frame), 0) if alone else (clip, frame)
