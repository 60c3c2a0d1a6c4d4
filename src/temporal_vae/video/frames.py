"""8-bit frames and pixels, and what a video file says of itself.

The only place that converts between 8-bit frames, uint8 (T, H, W, 3) RGB in [0, 255], and pixels,
(1, 3, T, H, W) in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from temporal_vae.geometry import Padding

Bytes = npt.NDArray[np.uint8]

PIPE = "-"
"""Stands for standard input or output in place of a file."""


class VideoError(Exception):
    """A video that cannot be read or written; the message is one line for the user."""


def to_pixels(frames: Bytes) -> Tensor:
    """uint8 (T, H, W, C) -> float32 (1, C, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1


def to_bytes(video: Tensor) -> Bytes:
    """(1, C, T, H, W) in [-1, 1] -> uint8 (T, H, W, C), rounded to nearest and clipped.

    Raises `ValueError` for NaN, which would turn black in silence.
    """
    if video.isnan().any():
        raise ValueError("the frames hold NaN: in float16 a model may overflow, so take bfloat16")
    frames = ((video.detach()[0].float() + 1) * 127.5).round().clamp(0, 255)
    array: Bytes = frames.to("cpu", torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()
    return array


def pad_frames(frames: Bytes, factor: int) -> Bytes:
    """Repeat the last row and column of uint8 (T, H, W, C) up to multiples of `factor`."""
    padding = Padding.to_cells(frames.shape[1], frames.shape[2], factor)
    edges = ((0, 0), (0, padding.rows), (0, padding.columns), (0, 0))
    return np.pad(frames, edges, mode="edge")


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame: `image` uint8 (H, W, 3) RGB, and its timestamp in units of `time_base`."""

    image: Bytes
    pts: int


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video file says of itself; `frames` and `fps` are claims, which frames may belie."""

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

    @property
    def expected_frames(self) -> int | None:
        """Frames the file claims to have, else its length times its rate, else None."""
        if self.frames is None and self.end is not None:
            return max(1, round(self.end * float(self.fps)))
        return self.frames
