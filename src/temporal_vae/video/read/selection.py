"""Which frames of a video, and which part of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypedDict, TypeVar

from temporal_vae.video.frames import Raw, VideoError, exact_rate

LONGEST_HOLD = 600
"""Seconds that one frame may stand while a rate is made even: a longer gap is a damaged stamp."""

Size = tuple[int, int]
Crop = tuple[int, int, int, int] | Literal["centre"]
Alpha = Literal["keep", "drop"]
T = TypeVar("T")


class Options(TypedDict, total=False):
    """What may be asked of a reader, by keyword; see `Selection`."""

    start: float | Fraction
    frames: int | None
    stride: int
    fps: float | Fraction | None
    size: Size | None
    crop: Crop | None
    channels: int
    alpha: Alpha | None
    raw: Raw | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which frames, and which part of them.

    `start` is in seconds from the first frame; the first frame that comes is the first that begins
    then or later. Of those, `stride` keeps every n-th, or `fps` makes the rate even: at each
    instant the frame on screen then, repeated or left out as needed; a folder of images takes
    `fps` for its own rate. `frames` is the most that come.
    `crop`, (top, left, height, width) of the upright picture, is cut out first; "centre" is the
    largest part of the shape of `size` in the middle. Then the picture is scaled to `size`,
    (height, width), or to `width`, the height to the nearest multiple of `multiple` that keeps its
    shape.
    `channels` is 1 (grey), 3 (RGB) or 4 (RGB and alpha). `alpha` says what becomes of an alpha
    channel that has no place among them: "keep" gives it as `Frame.alpha`, "drop" lets it go.
    `raw`, (height, width, frames per second), says of a source that it is bare rgb24.
    Raises `ValueError` for what cannot be.
    """

    start: float | Fraction = 0
    frames: int | None = None
    stride: int = 1
    fps: float | Fraction | None = None
    size: Size | None = None
    crop: Crop | None = None
    channels: int = 3
    alpha: Alpha | None = None
    raw: Raw | None = None
    width: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start < math.inf:
            raise ValueError(f"start must be seconds from the first frame, 0 or more: {self.start}")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames must be 1 or more, got {self.frames}")
        if self.stride < 1:
            raise ValueError(f"stride must be 1 or more, got {self.stride}")
        if self.rate is not None and self.stride != 1:
            raise ValueError("stride and fps both choose frames: give one of them")
        if self.channels not in (1, 3, 4):
            raise ValueError(f"channels must be 1 (grey), 3 (RGB) or 4 (RGBA), got {self.channels}")
        if self.alpha not in (None, "keep", "drop"):
            raise ValueError(f"alpha must be 'keep' or 'drop', got {self.alpha!r}")
        if self.size is not None and self.width is not None:
            raise ValueError("size and width both say how large: give one of them")
        if self.raw is not None:
            height, width, rate = self.raw
            if min(height, width) < 1 or max(height, width) > 1 << 15 or not rate > 0:
                raise ValueError(f"raw is (height, width, frames per second), got {self.raw}")
        sides = (*(self.size or ()), self.width or 1, self.multiple)
        if min(sides) < 1 or max(sides) > 1 << 15:
            raise ValueError(f"a size must be 1 to 32768 pixels: {self.size or self.width}")
        if self.crop == "centre" and self.size is None:
            raise ValueError("crop='centre' needs the size whose shape is cut out")
        if self.crop is not None and self.crop != "centre" and min(self.crop[2:]) < 1:
            raise ValueError(f"a crop is (top, left, height, width), got {self.crop}")

    @property
    def rate(self) -> Fraction | None:
        """`fps` as a fraction: 29.97 is 30000/1001, as it is meant."""
        return None if self.fps is None else exact_rate(self.fps)

    def start_ticks(self, time_base: Fraction) -> int:
        """`start` in ticks, up to the next; a microsecond is nothing."""
        return max(0, math.ceil((Fraction(self.start) - Fraction(1, 10**6)) / time_base))

    def cut(self, height: int, width: int, path: str) -> tuple[int, int, int, int] | None:
        """The part to cut out of a picture. Raises `VideoError` when it does not lie inside."""
        if self.crop is None:
            return None
        if self.crop == "centre":
            assert self.size is not None
            rows, columns = self.size
            scale = min(Fraction(height, rows), Fraction(width, columns))
            rows, columns = max(1, round(rows * scale)), max(1, round(columns * scale))
            return (height - rows) // 2, (width - columns) // 2, rows, columns
        top, left, rows, columns = self.crop
        if min(top, left) < 0 or top + rows > height or left + columns > width:
            raise VideoError(
                f"{path}: a crop of {columns}x{rows} at column {left}, row {top} does not lie in "
                f"{width}x{height}"
            )
        return self.crop

    def scaled(self, height: int, width: int) -> Size:
        """The size that a picture, or the part cut out of it, comes in."""
        if self.size is not None:
            return self.size
        if self.width is None:
            return height, width
        rows = height * self.width / width / self.multiple
        return max(1, round(rows)) * self.multiple, self.width


def finest(a: Fraction, b: Fraction) -> Fraction:
    """The largest time of which both are multiples; `a` may be 0."""
    numerator = math.gcd(a.numerator * b.denominator, b.numerator * a.denominator)
    return Fraction(numerator, a.denominator * b.denominator)


def even(
    stamped: Iterator[tuple[T, int]],
    time_base: Fraction,
    rate: Fraction,
    ticks: Fraction,
    path: str,
) -> Iterator[tuple[T, int]]:
    """Frames at an even rate, stamped in `ticks`: at each instant the frame on screen then.

    The last frame stands as long as the one before it, or for 1 / rate when it is alone.
    """
    held: tuple[T, int] | None = None
    first, shown, stood = Fraction(0), 0, 1 / rate

    def instants(until: Fraction) -> Iterator[tuple[T, int]]:
        nonlocal shown
        while held is not None and (at := first + shown / rate) < until:
            shown += 1
            yield held[0], int(at / ticks)

    for frame, pts in stamped:
        now = pts * time_base
        if held is None:
            first = now
        else:
            stood = now - held[1] * time_base
            if stood > LONGEST_HOLD:
                raise VideoError(
                    f"{path}: {float(stood):.0f} s without a frame, from "
                    f"{float(held[1] * time_base):.3f} s: a gap too long to fill"
                )
            yield from instants(now)
        held = frame, pts
    if held is not None:
        yield from instants(held[1] * time_base + stood)
