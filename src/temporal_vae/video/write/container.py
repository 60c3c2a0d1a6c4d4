"""A video in one of libav's containers, with copied sound and subtitles beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from fractions import Fraction

import av
from av.packet import Packet
from av.video.stream import VideoStream

from temporal_vae.video.frames import PIPE, Image, VideoError
from temporal_vae.video.write.output import Output, Target
from temporal_vae.video.write.remux import CopiedStreams

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", PIPE: "matroska"}
IN_MILLISECONDS = ("matroska", "webm")
"""Containers whose timestamps are whole milliseconds."""
ENCODER_OPTIONS = {
    # chromaloc=1: a chroma sample lies in the middle of its pixels, as `Yuv` computes it
    "h264": {"preset": "medium", "x264-params": "chromaloc=1"},
    "h265": {"preset": "medium", "x265-params": "log-level=error:chromaloc=1"},
    "vp9": {"b": "0", "cpu-used": "2", "row-mt": "1"},
    "ffv1": {},
}
FASTEST_CLOCK = 2**31
"""Ticks per second of an mp4 file's movie header, at most."""


class ContainerWriter(Output):
    """A video in a container, and the streams of `copied` in the same file."""

    def __init__(self, target: Target, copied: CopiedStreams | None):
        self._target, self._format, self._layout = target, target.format, target.layout
        self._base, self._copied = target.time_base, copied
        self._end = Fraction(0)
        self._last_millisecond: int | None = None
        name = CONTAINERS[target.format.suffix]
        self._in_milliseconds = name in IN_MILLISECONDS
        options = {"avoid_negative_ts": "disabled"}
        if not self._in_milliseconds:
            options = _movie_clock([self._base, *(copied.time_bases if copied else ())])
        options["fflags"] = "+bitexact"  # no random numbers: the same video is the same bytes
        url = "pipe:1" if target.path == PIPE else os.path.abspath(target.path)
        self._container = av.open(url, "w", format=name, options=options)
        try:
            if target.comment is not None:
                self._container.metadata["comment"] = target.comment
            self._stream = self._add_stream()
            if copied is not None:
                copied.join(self._container)
        except BaseException:
            self._container.close()
            raise

    def _add_stream(self) -> VideoStream:
        format, layout, aspect = self._format, self._layout, self._target.sample_aspect_ratio
        stream = self._container.add_stream(str(format.codec.encoder), rate=self._target.fps)
        assert isinstance(stream, VideoStream)
        context, colour = stream.codec_context, layout.colour
        stream.height, stream.width, _ = layout.shape
        stream.time_base = context.time_base = self._base
        stream.pix_fmt = layout.pixel_format
        if aspect:
            context.sample_aspect_ratio = aspect
        context.colorspace, context.color_range = colour.matrix, colour.range
        context.color_primaries, context.color_trc = colour.primaries, colour.transfer
        stream.options = dict(ENCODER_OPTIONS[format.name])
        if format.quality is not None:
            stream.options |= {"crf": f"{format.quality:g}"}
        if format.name == "h265" and not self._in_milliseconds:
            context.codec_tag = "hvc1"  # Apple's players do not play H.265 with another tag
        return stream

    def write(self, image: Image, pts: int) -> None:
        """See `Output`."""
        milliseconds = round(pts * self._base * 1000)
        if self._in_milliseconds and milliseconds == self._last_millisecond:
            raise VideoError(
                f"frames less than a millisecond apart cannot be kept in .mkv, as at "
                f"{float(pts * self._base):.6f} s: take .mp4"
            )
        frame = self._layout.frame(image)
        self._last_millisecond = milliseconds
        self._end = pts * self._base + 1 / self._target.fps
        frame.pts, frame.time_base = pts, self._base
        self._mux(self._stream.encode(frame))

    def close(self, complete: bool) -> None:
        """See `Output`."""
        try:
            if complete:
                self._mux(self._stream.encode(None))
                whole = self._copied is None or not self._copied.to_last_frame
                self._mux_copied(None if whole else self._end)
        finally:
            self._container.close()

    def notes(self) -> list[str]:
        """See `Output`."""
        return [] if self._copied is None else self._copied.all_notes()

    def _mux(self, packets: Iterable[Packet[VideoStream]]) -> None:
        """Write packets of the video, each after the copied packets that come before it."""
        for packet in packets:
            if packet.dts is not None:
                self._mux_copied(packet.dts * packet.time_base)
            self._container.mux_one(packet)

    def _mux_copied(self, until: Fraction | None) -> None:
        """Write the copied packets that come before a time; None for all the rest."""
        if self._copied is None:
            return
        for packet in self._copied.until(until):
            try:
                self._container.mux_one(packet)
            except (av.error.InvalidDataError, av.error.ArgumentError):
                self._copied.refused(packet)


def _movie_clock(time_bases: list[Fraction]) -> dict[str, str]:
    """An option for a clock in which all streams can start exactly when they should.

    mp4 keeps the starts of streams in ticks of the whole movie, which are milliseconds by default.
    """
    ticks = time_bases[0].denominator
    for base in time_bases[1:]:
        finer = math.lcm(ticks, base.denominator)
        ticks = finer if finer < FASTEST_CLOCK else ticks
    return {"movie_timescale": str(ticks)}
