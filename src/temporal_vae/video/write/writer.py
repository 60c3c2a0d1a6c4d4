"""Frames with timestamps to videos, to folders of images, and into pipes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from numbers import Integral
from types import TracebackType
from typing import Self

import av
from av.packet import Packet
from av.video.stream import VideoStream

from temporal_vae.video.frames import PIPE, Colour, Image, VideoError
from temporal_vae.video.write.formats import Chosen, Format, choose
from temporal_vae.video.write.raw import ImageFiles, RawFile, untold
from temporal_vae.video.write.remux import CopiedStreams
from temporal_vae.video.write.to_yuv import Layout, layout_of

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", PIPE: "matroska"}
IN_MILLISECONDS = ("matroska", "webm")
OPTIONS = {
    "h264": {"preset": "medium", "x264-params": "chromaloc=1"},
    "h265": {"preset": "medium", "x265-params": "log-level=error:chromaloc=1"},
    "vp9": {"b": "0", "cpu-used": "2", "row-mt": "1"},
    "ffv1": {},
}
"""Beside the quality. A chroma sample is in the middle of its pixels, which two of them can say."""
FASTEST_CLOCK = 2**31
"""Ticks per second of mp4's movie, at most."""


class VideoWriter:
    """Write frames to `path`: a video, raw frames, a folder of images, or "-", standard output.

    What is written follows from the name and from `format`; .mkv is lossless FFV1 in RGB, .mp4 is
    H.264. Files are written in place, so use it inside `files.atomic_path`; a folder must exist.

    FFV1 and images keep the numbers. The others store YUV in the matrix and range of `colour`,
    BT.709 and limited where it has none, with chroma of half the size where the sides are even. Its
    tags are passed on. Streams of `copied` go in beside.

    `notes` says what will not be in the file, after the end in full. Raises `VideoError` for what
    cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        height: int,
        width: int,
        fps: Fraction,
        time_base: Fraction | None = None,
        sample_aspect_ratio: Fraction | None = None,
        *,
        channels: int = 3,
        format: Format | None = None,
        colour: Colour | None = None,
        copied: CopiedStreams | None = None,
    ):
        self.path = os.fspath(path)
        chosen = choose(self.path, format)
        chosen.check(height, width, channels)
        layout = layout_of(chosen, (height, width, channels), colour)
        self._fps, self._base = fps, time_base or 1 / fps
        self._first: int | None = None
        self._last = -1
        self._count, self._even = 0, True
        self.notes: list[str] = []
        self.keeps_aspect = chosen.suffix in (".mp4", ".mov") or chosen.name == "y4m"
        self.keeps_tags = chosen.in_container
        self._file: ContainerFile | None = None
        self._plain: ImageFiles | RawFile | None = None
        with _errors(f"cannot write {self.path}"):
            if chosen.in_container:
                aspect = sample_aspect_ratio
                self._file = ContainerFile(
                    self.path, chosen, layout, fps, self._base, aspect, copied
                )
            elif chosen.name == "png":
                self._plain = ImageFiles(self.path, layout)
            else:
                self._plain = RawFile(self.path, chosen, layout, fps, sample_aspect_ratio)
        if self._plain is not None:
            self.notes += untold(chosen, layout, fps, colour)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is not None:
            with suppress(av.error.FFmpegError, OSError):
                self._close(complete=False)
            return
        with _errors("cannot write the video"):
            self._close(complete=True)
        if self._plain is not None and (self._first or not self._even):
            what = "timestamps" if not self._even else "start"
            self.notes.append(f"its {what} cannot be kept: frames stand at {self._fps} a second")

    def write(self, image: Image, pts: int) -> None:
        """Append one frame, uint8 or uint16 (H, W, C), at `pts` in units of the time base.

        Raises `VideoError` for timestamps below 0, or that do not grow: mp4 would hide such frames,
        or make other timestamps up.
        """
        if not isinstance(pts, Integral) or pts <= self._last:
            raise VideoError(
                f"timestamps must be whole numbers that grow from 0 or above, got {pts} after "
                f"{self._last} at frame {self._count}"
            )
        with _errors("cannot write the video"):
            if self._file is not None:
                self._file.write(image, pts)
            if self._plain is not None:
                self._plain.write(image)
        self._first, self._last = pts if self._first is None else self._first, pts
        late = (pts - self._first) * self._base - self._count / self._fps
        self._even &= abs(late) <= self._base / 2
        self._count += 1

    def _close(self, complete: bool) -> None:
        if self._plain is not None:
            self._plain.close()
        if self._file is not None:
            self._file.close(complete)
            self.notes += self._file.notes()


class ContainerFile:
    """A video in one of libav's containers, and the streams beside it."""

    def __init__(
        self,
        path: str,
        chosen: Chosen,
        layout: Layout,
        fps: Fraction,
        time_base: Fraction,
        aspect: Fraction | None,
        copied: CopiedStreams | None,
    ):
        self._layout, self._base, self._copied = layout, time_base, copied
        self._fps, self._end = fps, Fraction(0)
        self._last_millisecond = -(10**18)
        name = CONTAINERS[chosen.suffix]
        self._coarse = name in IN_MILLISECONDS
        clocks = [time_base, *([] if copied is None else copied.time_bases)]
        options = {"avoid_negative_ts": "disabled"} if self._coarse else _movie_clock(clocks)
        url = "pipe:1" if path == PIPE else os.path.abspath(path)
        self._container = av.open(url, "w", format=name, options=options)
        try:
            self._stream = self._add_stream(chosen, fps, aspect)
            if copied is not None:
                copied.join(self._container)
        except BaseException:
            self._container.close()
            raise

    def _add_stream(self, chosen: Chosen, fps: Fraction, aspect: Fraction | None) -> VideoStream:
        stream = self._container.add_stream(chosen.codec.encoder or chosen.name, rate=fps)
        assert isinstance(stream, VideoStream)
        context, colour = stream.codec_context, self._layout.colour
        stream.height, stream.width, _ = self._layout.shape
        stream.time_base = context.time_base = self._base
        stream.pix_fmt = self._layout.pixel_format
        if aspect:
            context.sample_aspect_ratio = aspect
        context.colorspace, context.color_range = colour.matrix, colour.range
        context.color_primaries, context.color_trc = colour.primaries, colour.transfer
        stream.options = dict(OPTIONS[chosen.name])
        if chosen.quality is not None:
            stream.options |= {"crf": f"{chosen.quality:g}"}
        if chosen.name == "h265" and not self._coarse:
            context.codec_tag = "hvc1"  # what Apple's players ask for
        return stream

    def write(self, image: Image, pts: int) -> None:
        """Append one frame."""
        milliseconds = round(pts * self._base * 1000)
        if self._coarse and milliseconds <= self._last_millisecond:
            raise VideoError(
                f"frames less than a millisecond apart cannot be kept in .mkv, as at "
                f"{float(pts * self._base):.6f} s: take .mp4"
            )
        frame = self._layout.frame(image)
        self._last_millisecond = milliseconds
        self._end = pts * self._base + 1 / self._fps
        frame.pts, frame.time_base = pts, self._base
        self._mux(self._stream.encode(frame))

    def close(self, complete: bool) -> None:
        """Write what is left, and the end of the file if it is `complete`."""
        try:
            if complete:
                self._mux(self._stream.encode(None))
                whole = self._copied is None or not self._copied.to_last_frame
                self._copy(None if whole else self._end)
        finally:
            self._container.close()

    def notes(self) -> list[str]:
        """What was not copied."""
        return [] if self._copied is None else [*self._copied.notes, *self._copied.close_notes()]

    def _mux(self, packets: Iterable[Packet[VideoStream]]) -> None:
        for packet in packets:
            if packet.dts is not None:
                self._copy(packet.dts * packet.time_base)
            self._container.mux_one(packet)

    def _copy(self, until: Fraction | None) -> None:
        """Packets of other streams that come before a time; all that are left when it is None."""
        for packet in () if self._copied is None else self._copied.until(until):
            try:
                self._container.mux_one(packet)
            except (av.error.InvalidDataError, av.error.ArgumentError):
                assert self._copied is not None
                self._copied.refused(packet)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """What libav and the system refuse, as one line for the user."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{what}: {error.strerror or error}") from error


def _movie_clock(time_bases: list[Fraction]) -> dict[str, str]:
    """mp4 keeps the starts of streams in the clock of the movie: milliseconds unless told."""
    ticks = time_bases[0].denominator
    for base in time_bases[1:]:
        finer = math.lcm(ticks, base.denominator)
        ticks = finer if finer < FASTEST_CLOCK else ticks
    return {"movie_timescale": str(ticks)}


def check_suffix(path: str | os.PathLike[str], format: Format | None = None) -> str:
    """The suffix of what is written under this name, for "-" that of .mkv, for a folder "".

    Raises `VideoError` unless a video can be written under it.
    """
    suffix = choose(path, format).suffix
    return ".mkv" if suffix == PIPE else suffix
