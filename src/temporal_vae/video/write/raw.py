"""Frames without a container: images in a folder, y4m, and bare RGB."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

from av.codec.context import CodecContext
from av.video.codeccontext import VideoCodecContext

from temporal_vae.files.streams import write_all
from temporal_vae.video.colour import LIMITED, MATRICES, tag_notes
from temporal_vae.video.frames import PIPE, Colour, Image
from temporal_vae.video.write.formats import Chosen
from temporal_vae.video.write.to_yuv import Layout


class ImageFiles:
    """PNG images in a folder that exists, 000001.png and on."""

    def __init__(self, path: str, layout: Layout):
        self._folder, self._layout, self._count = Path(path), layout, 0

    def write(self, image: Image) -> None:
        """The next image."""
        self._count += 1
        encoder = CodecContext.create("png", "w")
        assert isinstance(encoder, VideoCodecContext)
        encoder.height, encoder.width, _ = self._layout.shape
        encoder.pix_fmt, encoder.time_base = self._layout.pixel_format, Fraction(1)
        encoder.thread_count = 1
        frame = self._layout.frame(image)
        # an image without tags is sRGB to every program, which is how video on a screen looks
        frame.color_primaries = frame.color_trc = 2
        packets = [*encoder.encode(frame), *encoder.encode(None)]
        with (self._folder / f"{self._count:06d}.png").open("wb") as file:
            for packet in packets:
                write_all(file, bytes(packet))

    def close(self) -> None:
        """Nothing is open."""


class RawFile:
    """The numbers of each frame, for y4m with a header; to a file or standard output."""

    def __init__(
        self, path: str, chosen: Chosen, layout: Layout, fps: Fraction, aspect: Fraction | None
    ):
        self._layout = layout
        # a copy of standard output, which stays open when this is closed
        out: str | int = os.dup(sys.stdout.fileno()) if path == PIPE else path
        self._file: BinaryIO = open(out, "wb")  # noqa: SIM115
        self._before = b""
        if chosen.name == "y4m":
            self._before = b"FRAME\n"
            write_all(self._file, _y4m_header(layout, fps, aspect or Fraction(1)))

    def write(self, image: Image) -> None:
        """The next frame."""
        write_all(self._file, self._before)
        for plane in self._layout.planes(image):
            write_all(self._file, plane.astype(plane.dtype.newbyteorder("<")).tobytes())

    def close(self) -> None:
        """Hand on what is buffered."""
        self._file.close()


def untold(chosen: Chosen, layout: Layout, fps: Fraction, colour: Colour | None) -> list[str]:
    """What a reader will not find in a file, a line each."""
    height, width, _ = layout.shape
    notes = tag_notes(colour or Colour())
    if chosen.name == "rgb":
        notes.append(
            "bare RGB says nothing of itself: read it with ffmpeg -f rawvideo "
            f"-pix_fmt {layout.pixel_format} -s {width}x{height} -r {fps}"
        )
    if chosen.name == "y4m" and layout.yuv is not None:
        notes.append(
            f"y4m does not tell its matrix: {MATRICES[layout.colour.matrix]}, as players take for "
            "its size"
        )
    return notes


def _y4m_header(layout: Layout, fps: Fraction, aspect: Fraction) -> bytes:
    height, width, channels = layout.shape
    deep = "" if layout.depth == 8 else str(layout.depth)
    space = f"mono{deep}" if channels == 1 else f"444p{deep}" if deep else "444"
    range_ = "LIMITED" if layout.colour.range == LIMITED else "FULL"
    return (
        f"YUV4MPEG2 W{width} H{height} F{fps.numerator}:{fps.denominator} Ip "
        f"A{aspect.numerator}:{aspect.denominator} C{space} XCOLORRANGE={range_}\n"
    ).encode()
