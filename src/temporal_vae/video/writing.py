"""8-bit frames with timestamps to video files."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from temporal_vae.video.frames import PIPE, Bytes, VideoError

WRITERS = {".mp4": "H.264, crf 14", ".mkv": "FFV1, lossless RGB"}
H264_CRF = 14


class VideoWriter:
    """Encode frames to a video container at `path`; use it inside `files.atomic_path`.

    "-" is standard output, and .mkv. `.mkv` is lossless FFV1 in RGB; `.mp4` is H.264 at crf 14,
    with full chroma (yuv444p) where a side is odd. H.264 is written in BT.709, limited range, and
    tagged so.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        height: int,
        width: int,
        fps: Fraction,
        time_base: Fraction | None = None,
        sample_aspect_ratio: Fraction | None = None,
    ):
        self.path = os.fspath(path)
        self._lossless = check_suffix(self.path) == ".mkv"
        time_base = time_base or 1 / fps
        # mp4 keeps the start of a clip in the clock of the movie: milliseconds unless told
        options = {} if self._lossless else {"movie_timescale": str(time_base.denominator)}
        try:
            if self.path == PIPE:
                self._container = av.open("pipe:1", "w", format="matroska", options=options)
            else:
                self._container = av.open(os.path.abspath(self.path), "w", options=options)
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(f"cannot write {self.path}: {error}") from error
        stream = self._container.add_stream("ffv1" if self._lossless else "libx264", rate=fps)
        stream.height, stream.width = height, width
        stream.time_base = stream.codec_context.time_base = time_base
        self.keeps_aspect = not self._lossless
        self._last_millisecond = -(10**18)
        if sample_aspect_ratio:
            stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
        if self._lossless:
            stream.pix_fmt = "bgr0"
        else:
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            stream.options = {"crf": str(H264_CRF), "preset": "medium"}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1  # limited
        self._stream: VideoStream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._mux(None)
        finally:
            self._container.close()

    def write(self, image: Bytes, pts: int) -> None:
        """Append one frame, uint8 (H, W, 3), at `pts` in units of the time base."""
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame = frame.reformat(
            format=self._stream.pix_fmt,
            dst_colorspace=None if self._lossless else "ITU709",
            dst_color_range=None if self._lossless else "MPEG",
        )
        base = self._stream.codec_context.time_base
        milliseconds = round(pts * base * 1000)
        if self._lossless and milliseconds <= self._last_millisecond:
            raise VideoError(
                f"frames less than a millisecond apart cannot be kept in .mkv, as at "
                f"{float(pts * base):.6f} s: take .mp4"
            )
        self._last_millisecond = milliseconds
        frame.pts, frame.time_base = pts, base
        self._mux(frame)

    def _mux(self, frame: VideoFrame | None) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(f"cannot write the video: {error.strerror or error}") from error


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The format's suffix, for "-" that of .mkv.

    Raises `VideoError` unless a video can be written under this name.
    """
    if os.fspath(path) == PIPE:
        return ".mkv"
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        known = " or ".join(f"{name} ({what})" for name, what in WRITERS.items())
        raise VideoError(f"cannot write {os.fspath(path)}: the name must end in {known}")
    return suffix
