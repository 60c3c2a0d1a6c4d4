"""What every kind of output is told, and does."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from temporal_vae.video.frames import Image
from temporal_vae.video.write.formats import ChosenFormat
from temporal_vae.video.write.to_yuv import PixelLayout


@dataclass(frozen=True, slots=True)
class Target:
    """Where a video is written to, and how."""

    path: str
    format: ChosenFormat
    layout: PixelLayout
    fps: Fraction
    time_base: Fraction
    sample_aspect_ratio: Fraction | None
    comment: str | None = None
    """Kept where the file has a place for it."""


class Output(Protocol):
    """Takes frames one by one."""

    def write(self, image: Image, pts: int) -> None:
        """Append one frame, uint8 or uint16 (H, W, C), at `pts` in units of the time base."""

    def close(self, complete: bool) -> None:
        """Close what is open; if `complete`, first write what ends the video."""

    def notes(self) -> list[str]:
        """What is not in the file, one line each; known in full once it is closed."""
