"""Frames and pixels, and what a video file says of itself.

The only place that converts between frames, uint8 or uint16 (T, H, W, C) over the full range of the
type, and pixels, (1, C, T, H, W) in [-1, 1].
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from temporal_vae.geometry import Padding

if TYPE_CHECKING:  # torch takes seconds to import: only the functions that need it do
    from torch import Tensor

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]
Image = npt.NDArray[Any]
"""`Bytes` or `Words`: uint8 or uint16 over the full range of the type."""

Raw = tuple[int, int, Fraction]
"""Height, width and frames per second of bare rgb24."""

PIPE = "-"
"""Stands for standard input or output in place of a file."""


def is_rewound(path: str) -> bool:
    """Whether what stands under a name can be read twice: a file, and no pipe or device."""
    return path != PIPE and os.path.isfile(path)


class VideoError(Exception):
    """A video that cannot be read or written; the message is one line for the user."""


def to_pixels(frames: Image) -> Tensor:
    """uint8 or uint16 (T, H, W, C) -> float32 (1, C, T, H, W) in [-1, 1]."""
    import torch

    half = float(np.iinfo(frames.dtype).max) / 2
    video = torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).to(torch.float32)
    return video.div_(half).sub_(1)


@overload
def to_bytes(video: Tensor) -> Bytes: ...
@overload
def to_bytes(video: Tensor, depth: Literal[8]) -> Bytes: ...
@overload
def to_bytes(video: Tensor, depth: Literal[16]) -> Words: ...
@overload
def to_bytes(video: Tensor, depth: int) -> Image: ...
def to_bytes(video: Tensor, depth: int = 8) -> Image:
    """(1, C, T, H, W) in [-1, 1] -> (T, H, W, C), rounded to nearest and clipped.

    uint8 at a depth of 8 bits, uint16 over the full range at 16. Raises `ValueError` for another
    depth, and for NaN, which would turn black in silence.
    """
    import torch

    if depth not in (8, 16):
        raise ValueError(f"frames have a depth of 8 or 16 bits, got {depth}")
    if video.isnan().any():
        raise ValueError("the frames hold NaN: in float16 a model may overflow, so take bfloat16")
    top = 2**depth - 1
    frames = ((video.detach()[0].float() + 1) * (top / 2)).round().clamp(0, top)
    kind = torch.uint8 if depth == 8 else torch.uint16
    array: Image = frames.to("cpu", kind).permute(1, 2, 3, 0).contiguous().numpy()
    return array


def pad_frames(frames: Image, factor: int) -> Image:
    """Repeat the last row and column of (T, H, W, C) up to multiples of `factor`."""
    padding = Padding.to_cells(frames.shape[1], frames.shape[2], factor)
    edges = ((0, 0), (0, padding.rows), (0, padding.columns), (0, 0))
    return np.pad(frames, edges, mode="edge")


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame and its timestamp in units of `time_base`.

    `image` is (H, W, C) over the full range of its type: uint8 for a source of 8 bits, uint16 for a
    deeper one. `alpha` is (H, W) of the same type where it was asked for as a plane of its own.
    """

    image: Image
    pts: int
    alpha: Image | None = None


@dataclass(frozen=True, slots=True)
class Colour:
    """How the file's numbers mean colours: the codes of ISO/IEC 23091-2, as ffmpeg has them.

    `matrix` and `range` (1 limited, 2 full) are what the frames are read with; `primaries` and
    `transfer` what is tagged, 2 when nothing is.
    """

    primaries: int = 2
    transfer: int = 2
    matrix: int = 2
    range: int = 0
    matrix_assumed: bool = False
    range_assumed: bool = False


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video says of itself; `frames` and `fps` are claims, which frames may belie.

    Size and shape of pixels are those of the upright picture, before any crop or scaling; rate,
    time base and frames those of what was asked for.
    """

    path: str
    width: int
    height: int
    fps: Fraction
    frames: int | None
    end: float | None
    """Seconds at which the last frame ends, as the container claims; None when it does not say."""
    time_base: Fraction
    sample_aspect_ratio: Fraction | None
    codec: str
    pixel_format: str
    notes: tuple[str, ...] = field(default=())
    """What of the file is not carried over, a line each."""
    bit_depth: int = 8
    """Bits of a component in the file; above 8 frames are uint16."""
    rotation: int = 0
    """Degrees, counterclockwise, by which the stored picture was turned to stand upright."""
    colour: Colour = field(default=Colour())
    alpha: bool = False
    """Whether the file has an alpha channel, opaque or not."""
    start: float = 0.0
    """Seconds at which the file's first frame is shown."""
    interlaced: bool = False

    @property
    def expected_frames(self) -> int | None:
        """Frames the file claims to have, else its length times its rate, else None."""
        if self.frames is None and self.end is not None:
            return max(1, round(self.end * float(self.fps)))
        return self.frames


FRACTION_LIMIT = 2**31 - 1
"""The largest number that a fraction of libav is made of."""


def exact_rate(fps: float | Fraction) -> Fraction:
    """A rate as a fraction; one within a hundredth of a per mille of n * 1000 / 1001 is that.

    Raises `ValueError` for what is none: libav counts in fractions of numbers below 2**31.
    """
    if not 1e-6 <= fps <= 1e6:
        raise ValueError(f"fps must be above 0, and within a millionth and a million, got {fps}")
    whole = Fraction(fps).limit_denominator(min(1_000_000, int(FRACTION_LIMIT / fps)))
    ntsc = Fraction(round(whole * 1001 / 1000) * 1000, 1001)
    if ntsc and whole.denominator != 1 and abs(whole / ntsc - 1) < Fraction(1, 30_000):
        return ntsc
    return whole


NOT_COPIED = " is not copied"
"""How a note of a stream ends that a reader of frames leaves out."""


def not_copied(kind: str, index: int) -> str:
    """What a reader of frames says of another stream."""
    return f"{kind} stream {index}{NOT_COPIED}"
