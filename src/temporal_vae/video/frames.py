"""Frames and pixels, and what a video file says about itself.

*Frames* are arrays (T, H, W, C), uint8 or uint16 over the full range of the type; *pixels* are
tensors (1, C, T, H, W) in [-1, 1]. Only this module converts between the two.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from temporal_vae.geometry import Padding

if TYPE_CHECKING:
    from torch import Tensor

Uint8Frames = npt.NDArray[np.uint8]
Uint16Frames = npt.NDArray[np.uint16]
Image = npt.NDArray[Any]
"""One frame (H, W, C) or several (T, H, W, C): uint8 or uint16, over the full range of the type."""

Raw = tuple[int, int, Fraction]
"""Height, width and frames per second of headerless rgb24 video."""

PIPE = "-"
"""Given in place of a file name: standard input or standard output."""


def is_regular_file(path: str) -> bool:
    """Whether a name is that of a file, which can be read twice, and not of a pipe or a device."""
    return path != PIPE and os.path.isfile(path)


VIDEO_SUFFIXES = frozenset([
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogv", ".ts", ".webm", ".wmv", ".y4m",
])  # fmt: skip
"""Names of files that may hold a video end in one of these."""


class VideoError(Exception):
    """A video that cannot be read or written; the message is one line for the user."""


def to_pixels(frames: Image) -> Tensor:
    """uint8 or uint16 (T, H, W, C) -> float32 (1, C, T, H, W) in [-1, 1]."""
    import torch

    if min(frames.strides) < 0:  # a view of something backwards, which torch does not take
        frames = frames.copy()
    half = float(np.iinfo(frames.dtype).max) / 2
    video = torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).to(torch.float32)
    return video.div_(half).sub_(1)


def to_bytes(video: Tensor, depth: int = 8) -> Image:
    """(1, C, T, H, W) in [-1, 1] -> (T, H, W, C), rounded to nearest and clipped.

    The result is uint8 for a depth of 8 bits and uint16 for 16. Raises `ValueError` for another
    depth, and for NaN, which would otherwise become black without a word.
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
    """One decoded frame and its timestamp in units of the reader's `info.time_base`.

    `image` is (H, W, C) over the full range of its type: uint8 for a source of 8 bits, uint16 for a
    deeper one. `alpha` is (H, W) of the same type if the reader was opened with `alpha="keep"` and
    the source has alpha, else None.
    """

    image: Image
    pts: int
    alpha: Image | None = None


@dataclass(frozen=True, slots=True)
class Colour:
    """What the numbers in a file mean, as the codes of ISO/IEC 23091-2, which ffmpeg uses too.

    `matrix` and `range` (1 limited, 2 full) are what the frames are converted with, and the last
    two fields say whether they had to be assumed. `primaries` and `transfer` are the file's tags;
    2 is "unspecified".
    """

    primaries: int = 2
    transfer: int = 2
    matrix: int = 2
    range: int = 0
    matrix_assumed: bool = False
    range_assumed: bool = False


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video says about itself. A damaged file may hold another number of frames or rate.

    Width, height and pixel aspect ratio are those of the upright picture, before any crop or
    scaling. Rate, time base and frame count are those of the frames that were asked for.
    """

    path: str
    width: int
    height: int
    fps: Fraction
    time_base: Fraction
    codec: str
    pixel_format: str
    frames: int | None = None
    """None if the file does not say."""
    end: float | None = None
    """Seconds at which the last frame ends, by the container; None if it does not say."""
    sample_aspect_ratio: Fraction | None = None
    notes: tuple[str, ...] = ()
    """What of the file is assumed, changed or left out; one line each."""
    bit_depth: int = 8
    """Bits of a component in the file; above 8 frames are uint16."""
    rotation: int = 0
    """Degrees, counterclockwise, by which the stored picture was turned to stand upright."""
    colour: Colour = Colour()
    alpha: bool = False
    """Whether the file has an alpha channel, opaque or not."""
    start: float = 0.0
    """Seconds at which the file's first frame is shown."""
    interlaced: bool = False

    @property
    def expected_frames(self) -> int | None:
        """The stated number of frames, or else the length times the rate, or else None."""
        if self.frames is None and self.end is not None:
            return max(1, round((self.end - self.start) * float(self.fps)))
        return self.frames


FRACTION_LIMIT = 2**31 - 1
"""libav keeps the numerator and the denominator of a fraction in signed 32-bit integers."""


def exact_rate(fps: float | Fraction) -> Fraction:
    """Frames per second as a fraction: 29.97 becomes 30000/1001.

    So does any rate within 1/30000 of a multiple of 1000/1001. Raises `ValueError` outside
    [1e-6, 1e6].
    """
    if not 1e-6 <= fps <= 1e6:
        raise ValueError(f"fps must be above 0, from a millionth to a million, got {fps}")
    whole = Fraction(fps).limit_denominator(min(1_000_000, int(FRACTION_LIMIT / fps)))
    ntsc = Fraction(round(whole * 1001 / 1000) * 1000, 1001)
    if ntsc and whole.denominator != 1 and abs(whole / ntsc - 1) < Fraction(1, 30_000):
        return ntsc
    return whole


NOT_COPIED = " is not copied"
"""How a note about a stream ends which `VideoReader` skips, and which may be copied otherwise."""


def not_copied(kind: str, index: int) -> str:
    """The note of `VideoReader` about a stream that is not the video."""
    return f"{kind} stream {index}{NOT_COPIED}"
