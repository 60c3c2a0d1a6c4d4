"""Frames without a container: y4m, and headerless RGB."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from typing import BinaryIO

from temporal_vae.files.streams import write_all
from temporal_vae.video.colour import LIMITED, MATRICES, tag_notes
from temporal_vae.video.frames import PIPE, Image
from temporal_vae.video.write.output import Output, Target


class RawWriter(Output):
    """The numbers of each frame, for y4m after a header; to a file or standard output."""

    def __init__(self, target: Target):
        self._target = target
        # a copy of standard output, so that closing this leaves the original open
        out: str | int = os.dup(sys.stdout.fileno()) if target.path == PIPE else target.path
        self._file: BinaryIO = open(out, "wb")  # noqa: SIM115
        self._frame_header = b"FRAME\n" if target.format.name == "y4m" else b""
        if target.format.name == "y4m":
            write_all(self._file, _y4m_header(target))

    def write(self, image: Image, pts: int) -> None:
        """See `Output`; the timestamp is not kept."""
        write_all(self._file, self._frame_header)
        for plane in self._target.layout.planes(image):
            write_all(self._file, plane.astype(plane.dtype.newbyteorder("<")).tobytes())

    def close(self, complete: bool) -> None:
        """See `Output`."""
        self._file.close()

    def notes(self) -> list[str]:
        """See `Output`."""
        layout = self._target.layout
        height, width, _ = layout.shape
        notes = tag_notes(layout.colour)
        if self._target.format.name == "rgb":
            notes.append(
                "headerless RGB states neither size nor rate: read it with ffmpeg -f rawvideo "
                f"-pix_fmt {layout.pixel_format} -s {width}x{height} -r {self._target.fps}"
            )
        elif layout.yuv is not None:
            notes.append(
                f"y4m does not state its matrix: it is {MATRICES[layout.colour.matrix]}, which "
                "players assume for this size"
            )
        return notes


def _y4m_header(target: Target) -> bytes:
    layout, fps, aspect = target.layout, target.fps, target.sample_aspect_ratio or Fraction(1)
    height, width, channels = layout.shape
    deep = "" if layout.depth == 8 else str(layout.depth)
    space = f"mono{deep}" if channels == 1 else f"444p{deep}" if deep else "444"
    range_ = "LIMITED" if layout.colour.range == LIMITED else "FULL"
    return (
        f"YUV4MPEG2 W{width} H{height} F{fps.numerator}:{fps.denominator} Ip "
        f"A{aspect.numerator}:{aspect.denominator} C{space} XCOLORRANGE={range_}\n"
    ).encode()
