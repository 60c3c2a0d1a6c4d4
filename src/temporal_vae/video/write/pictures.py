"""Pictures: stills, PNG images in a folder, and animations."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.codec.context import CodecContext
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from temporal_vae.files.streams import write_all
from temporal_vae.video.colour import tag_notes
from temporal_vae.video.frames import Image, VideoError
from temporal_vae.video.write.output import Output, Target

ENCODERS = {"png": "png", "jpeg": "mjpeg", "webp": "libwebp_anim", "gif": "gif"}
CLOCKS = {"gif": 100, "webp": 1000}
"""Ticks per second of an animation's timestamps."""
SHORTEST = {"gif": 2, "webp": 11}
"""Ticks; players show a frame of fewer for a tenth of a second."""


class StillWriter(Output):
    """One image in a file."""

    def __init__(self, target: Target):
        self._target, self._count = target, 0

    def write(self, image: Image, pts: int) -> None:
        """See `Output`; raises `VideoError` for a second frame."""
        self._count += 1
        self._target.format.check_frames(self._count)
        self._save(Path(self._target.path), image)

    def close(self, complete: bool) -> None:
        """See `Output`; nothing is open between two images."""

    def notes(self) -> list[str]:
        """See `Output`."""
        return tag_notes(self._target.layout.colour)

    def _save(self, path: Path, image: Image) -> None:
        layout, format = self._target.layout, self._target.format
        encoder = CodecContext.create(ENCODERS[format.name], "w")
        assert isinstance(encoder, VideoCodecContext)
        encoder.height, encoder.width, _ = layout.shape
        encoder.pix_fmt, encoder.time_base = layout.pixel_format, Fraction(1)
        encoder.thread_count = 1
        if format.quality is not None:
            scale = str(1 + round(format.quality))  # JPEG's begins with 1
            encoder.options = {"qmin": scale, "qmax": scale}
        frame = layout.frame(image)
        # programs take an image without tags for sRGB, which is how they show video too
        frame.color_primaries = frame.color_trc = 2
        packets = [*encoder.encode(frame), *encoder.encode(None)]
        with path.open("wb") as file:
            for packet in packets:
                write_all(file, bytes(packet))


class ImageFolderWriter(StillWriter):
    """PNG images 000001.png, 000002.png, ... in a folder that exists."""

    def write(self, image: Image, pts: int) -> None:
        """See `Output`; the timestamp is not kept."""
        self._count += 1
        self._save(Path(self._target.path) / f"{self._count:06d}.png", image)


class AnimationWriter(Output):
    """GIF or WebP that begins again at its end.

    The last frame of a GIF is shown for 1 / fps; libwebp shows it for as long as others on average.
    """

    def __init__(self, target: Target):
        self._target, self._name = target, target.format.name
        self._first = self._last = -1
        self._rounded = False
        clock = CLOCKS[self._name]
        self._container = av.open(target.path, "w", format=self._name, options={"loop": "0"})
        stream = self._container.add_stream(ENCODERS[self._name], rate=target.fps)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, _ = target.layout.shape
        stream.time_base = stream.codec_context.time_base = Fraction(1, clock)
        stream.pix_fmt = "pal8" if self._name == "gif" else target.layout.pixel_format
        if target.format.quality is not None:
            stream.options = {"quality": f"{100 - target.format.quality:g}"}
        self._stream = stream
        self._palettes = _palettes(stream) if self._name == "gif" else None

    def write(self, image: Image, pts: int) -> None:
        """See `Output`; raises `VideoError` for frames too close to each other."""
        self._first = pts if self._first < 0 else self._first
        exact = (pts - self._first) * self._target.time_base * CLOCKS[self._name]
        tick = round(exact)
        self._rounded |= tick != exact
        if self._last >= 0 and tick - self._last < SHORTEST[self._name]:
            least = SHORTEST[self._name] * 1000 // CLOCKS[self._name]
            raise VideoError(
                f"frames less than {least} ms apart cannot be kept in .{self._name}, as at "
                f"{float(pts * self._target.time_base):.3f} s: players show each for 100 ms. Take "
                "fewer frames a second (--fps), or a video such as .mp4"
            )
        frame = self._target.layout.frame(image)
        frame.pts, frame.time_base, self._last = tick, self._stream.time_base, tick
        for shown in [frame] if self._palettes is None else _filtered(self._palettes, frame):
            self._container.mux(self._stream.encode(shown))

    def close(self, complete: bool) -> None:
        """See `Output`."""
        try:
            if complete:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()

    def notes(self) -> list[str]:
        """See `Output`."""
        notes = tag_notes(self._target.layout.colour)
        if self._first > 0:
            notes.append(f"its start cannot be kept: .{self._name} begins at once")
        if self._rounded:
            notes.append(f"its timestamps are rounded to 1/{CLOCKS[self._name]} s")
        return notes


def _palettes(stream: VideoStream) -> Graph:
    """A filter that gives each frame the 256 colours that suit it best."""
    graph = Graph()
    nodes = [
        graph.add_buffer(
            width=stream.width,
            height=stream.height,
            format=VideoFormat("rgb24"),
            time_base=stream.time_base,
        ),
        graph.add("split"),
        graph.add("palettegen", stats_mode="single", reserve_transparent="0"),
        graph.add("paletteuse", new="1"),
        graph.add("buffersink"),
    ]
    source, split, generate, use, sink = nodes
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(generate, 1, 0)
    generate.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def _filtered(graph: Graph, frame: VideoFrame) -> Iterator[VideoFrame]:
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
