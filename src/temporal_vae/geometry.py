"""Arithmetic of shapes, without tensors. Sizes are in pixels unless a name says otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Padding:
    """Rows below and columns to the right that bring a frame to whole latent cells."""

    height: int
    width: int
    rows: int
    columns: int

    @classmethod
    def to_cells(cls, height: int, width: int, factor: int) -> Padding:
        """The least padding of a `height` x `width` frame to multiples of `factor`."""
        return cls(height, width, -height % factor, -width % factor)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width with the padding."""
        return self.height + self.rows, self.width + self.columns


def indivisible(height: int, width: int, factor: int) -> str | None:
    """What is wrong with a frame size for a downsample factor, and the way out; None if nothing."""
    if height % factor == 0 and width % factor == 0:
        return None
    padding = Padding.to_cells(height, width, factor)
    down = max(factor, height // factor * factor), max(factor, width // factor * factor)
    return (
        f"height and width must be multiples of {factor}, got {height}x{width}: "
        f"pad to {padding.padded[0]}x{padding.padded[1]} and crop the result, or crop to "
        f"{down[0]}x{down[1]}"
    )


def latent_frames(frames: int, per_latent: int) -> int:
    """Latents along time of so many frames: one for the first, one for every few behind it.

    Raises `ValueError` naming the nearest numbers of frames for one that does not fit.
    """
    latents, left = divmod(_whole(frames, "frames") - 1, per_latent)
    if frames < 1:
        raise ValueError(f"a clip has at least one frame, got {frames}")
    if left:
        fewer, more = video_frames(latents + 1, per_latent), video_frames(latents + 2, per_latent)
        raise ValueError(
            f"{frames} frames are no whole number of latents: this model makes one of the first "
            f"frame, and one of each {per_latent} behind it: take {fewer} frames or {more}"
        )
    return latents + 1


def _whole(number: int, what: str) -> int:
    """The number, unless it is a fraction; sizes in a graph are symbols."""
    if isinstance(number, float):
        raise ValueError(f"{what} must be a whole number, got {number!r}")
    return number


def video_frames(latents: int, per_latent: int, begins: bool = True) -> int:
    """Frames of so many latents along time, at the beginning of a clip or behind that.

    Raises `ValueError` for less than one.
    """
    if _whole(latents, "latents") < 1:
        raise ValueError(f"a clip has at least one latent, got {latents}")
    return latents * per_latent - (per_latent - 1) * begins


def latents_for(frames: int, per_latent: int, begins: bool = True) -> int:
    """Latents along time that hold any number of frames, the last of them filled up if need be."""
    return -(-(frames + (per_latent - 1) * begins) // per_latent)


Span = tuple[int, int]
"""A range of frames, rows or pixels: first, and one past the last."""


def spans(total: int, step: int) -> list[Span]:
    """The ranges that cut `total` into pieces of `step`, the last one shorter if need be."""
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def rows_read(rows: Span, halo: tuple[int, int], scale: Fraction, height: int) -> Span:
    """The input rows, of `height`, that a layer reads to give the output rows `rows`."""
    above, below = halo
    first, last = int(rows[0] / scale), math.ceil(rows[1] / scale)
    return max(0, first - above), min(height, last + below)


def rows_owned(rows: Span, scale: Fraction) -> Span:
    """The input rows that belong to the output rows `rows` and to no other band of them."""
    return int(rows[0] / scale), int(rows[1] / scale)
