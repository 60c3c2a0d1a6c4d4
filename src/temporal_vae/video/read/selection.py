"""What is asked of a reader: which frames, which part of them, at what rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypedDict, TypeVar

from temporal_vae.video.frames import Raw, VideoError, exact_rate

LONGEST_GAP = 600
"""Seconds between two frames; a longer gap is a damaged timestamp, and is not filled."""
LARGEST_SIDE = 1 << 15
"""Pixels."""

Size = tuple[int, int]
Crop = tuple[int, int, int, int] | Literal["centre"]
Alpha = Literal["keep", "drop"]
T = TypeVar("T")


class Options(TypedDict, total=False):
    """Keyword arguments of `VideoReader` and `load_video`; see `Selection`."""

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
    """Which frames of a video to give, which part of the picture, and in what form.

    `start` is in seconds from the first frame; frames that begin before it are left out. `stride`
    keeps every n-th of the others, or `fps` makes the rate even: at each instant comes the frame
    that is shown then, so that frames are repeated or left out as needed. For a folder of images
    `fps` is its rate. `frames` is the most that come.

    `crop`, (top, left, height, width) of the upright picture, is cut out first; "centre" is the
    largest part in the middle that has the shape of `size`. Then the picture is scaled to `size`,
    (height, width), or to `width`, with the height to the nearest multiple of `multiple` that keeps
    its shape.

    `channels` is 1 (grey), 3 (RGB) or 4 (RGB and alpha). `alpha` says what becomes of an alpha
    channel if `channels` is not 4: "keep" gives it as `Frame.alpha`, "drop" leaves it out, None
    refuses it.

    `raw`, (height, width, frames per second), says that the source is headerless rgb24.

    Raises `ValueError` for values out of range, or that contradict each other.
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
            raise ValueError("size and width both set the size: give one of them")
        if self.raw is not None:
            height, width, rate = self.raw
            if min(height, width) < 1 or max(height, width) > LARGEST_SIDE or not rate > 0:
                raise ValueError(f"raw is (height, width, frames per second), got {self.raw}")
        sides = (*(self.size or ()), self.width or 1, self.multiple)
        if min(sides) < 1 or max(sides) > LARGEST_SIDE:
            raise ValueError(
                f"a size must be 1 to {LARGEST_SIDE} pixels: {self.size or self.width}"
            )
        if self.crop == "centre" and self.size is None:
            raise ValueError("crop='centre' needs the size whose shape is cut out")
        if self.crop is not None and self.crop != "centre" and min(self.crop[2:]) < 1:
            raise ValueError(f"a crop is (top, left, height, width), got {self.crop}")

    @property
    def rate(self) -> Fraction | None:
        """`fps` as an exact fraction; see `exact_rate`."""
        return None if self.fps is None else exact_rate(self.fps)

    def start_ticks(self, time_base: Fraction) -> int:
        """`start` in units of a time base, rounded up; up to a microsecond more is rounded down."""
        return max(0, math.ceil((Fraction(self.start) - Fraction(1, 10**6)) / time_base))

    def cut(self, height: int, width: int, path: str) -> tuple[int, int, int, int] | None:
        """`crop` as (top, left, height, width) of a picture of this size.

        Raises `VideoError` if it does not lie inside.
        """
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
        """The size to which a picture, or the part cut out of it, is scaled."""
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
    stamped: Iterable[tuple[T, int]],
    time_base: Fraction,
    rate: Fraction,
    ticks: Fraction,
    path: str,
) -> Iterator[tuple[T, int]]:
    """Frames at an even rate: at each instant the one that is shown then.

    `stamped` has timestamps in units of `time_base`, the result in units of `ticks`. Raises
    `VideoError` for a gap of more than `LONGEST_GAP`, which is a damaged timestamp.
    """
    first, count = None, 0
    for frame, begin, end in _shown(stamped, time_base, 1 / rate, path):
        first = begin if first is None else first
        while (at := first + count / rate) < end:
            count += 1
            yield frame, int(at / ticks)


def _shown(
    stamped: Iterable[tuple[T, int]], time_base: Fraction, alone: Fraction, path: str
) -> Iterator[tuple[T, Fraction, Fraction]]:
    """Frames and the seconds from when until when each is shown.

    The last frame is shown as long as the one before it, or for `alone` if there is no other.
    """
    held: tuple[T, Fraction] | None = None
    length = alone
    for frame, pts in stamped:
        now = pts * time_base
        if held is not None:
            length = now - held[1]
            if length > LONGEST_GAP:
                raise VideoError(
                    f"{path}: {float(length):.0f} s without a frame, from {float(held[1]):.3f} s: "
                    "a gap too long to fill"
                )
            yield *held, now
        held = frame, now
    if held is not None:
        yield *held, held[1] + length
