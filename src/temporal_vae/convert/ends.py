"""What every conversion does at its two ends: readers, writers, refusals and notes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from temporal_vae import video
from temporal_vae.convert.chunks import T, Walk
from temporal_vae.convert.origin import checksum
from temporal_vae.model import TemporalVAE
from temporal_vae.network.kernels import work
from temporal_vae.video import (
    CopiedStreams,
    Format,
    Image,
    Options,
    VideoError,
    VideoInfo,
    VideoReader,
)
from temporal_vae.video.frames import NOT_COPIED

Path = str | os.PathLike[str]
Progress = Callable[[float, int | None, str], None]
"""Called with the frames done, those on the way counting by what is computed of them, the frames
the file claims, and how they are walked, in words."""
TOLD_SECONDS = 0.1
"""Progress is told so often, at the most."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did."""

    frames: int
    seconds: float
    clip_frames: int | None
    """Frames of each clip; None when the video was taken as one."""
    notes: tuple[str, ...]
    """What of the source was not carried over, or could not be read; a line each."""

    @classmethod
    def since(cls, start: float, frames: int, clip_frames: int | None, notes: list[str]) -> Summary:
        """Of a conversion that began at `start` of `time.monotonic`."""
        cut = None if clip_frames == sys.maxsize else clip_frames
        return cls(frames, time.monotonic() - start, cut, tuple(notes))


@dataclass(frozen=True, slots=True)
class OpenVideo:
    """A video that is being read."""

    reader: VideoReader
    sha256: str | None
    """Of its bytes, see `origin.checksum`."""


Opening = Callable[[], OpenVideo]
"""Opens a video, or waits for one that is being opened already."""


def open_video(source: Path, model: TemporalVAE, options: Options | None = None) -> OpenVideo:
    """A video to be read. Raises as `open_reader`.

    The checksum is taken first: of a file that changes meanwhile it is that of older bytes, so that
    what is made of it is never taken for what the newer ones give.
    """
    sha256 = checksum(source)
    return OpenVideo(open_reader(source, model, options), sha256)


def open_reader(source: Path, model: TemporalVAE, options: Options | None = None) -> VideoReader:
    """A reader of the pixels that a model takes. Raises as `reader_options`."""
    return VideoReader(source, **reader_options(model, options))


def reader_options(model: TemporalVAE, options: Options | None = None) -> Options:
    """What a reader is asked for the pixels that a model takes: grey, RGB, or RGB and alpha.

    Raises `VideoError` where an alpha channel is to be kept that the model has no place for.
    """
    asked: Options = {**(options or {}), "channels": model.input_channels}
    if asked.get("alpha") == "keep" and model.input_channels != 4:
        raise VideoError(
            f"the model takes {model.input_channels} channels, none of them alpha: take one with "
            "input_channels=4, or --alpha drop"
        )
    if model.input_channels == 4:
        asked["alpha"] = None  # it is the fourth channel, and needs no plane of its own
    return asked


def copied_streams(
    source: Path, reader: VideoReader, options: Options
) -> AbstractContextManager[CopiedStreams | None]:
    """Sound and subtitles of the frames that were asked for; none where their rate is another."""
    if options.get("stride", 1) != 1 or options.get("fps") is not None:
        if any(note.endswith(NOT_COPIED) for note in reader.notes):
            reader.notes.append("sound and subtitles are left out, as frames are at another rate")
        return nullcontext()
    if options.get("raw") is not None:  # there is nothing else in it
        return nullcontext()
    skipped = reader.begin * reader.info.time_base
    start = Fraction(reader.info.start) + skipped - reader.shift if skipped else None
    ends = options.get("frames") is not None
    return CopiedStreams(source, start, shift=reader.shift - skipped, to_last_frame=ends)


def timed(reader: VideoReader) -> Iterator[video.Frame]:
    """Its frames, with timestamps that are counted from the `start` that was asked for."""
    begin = reader.begin
    return (replace(frame, pts=frame.pts - begin) for frame in reader)


@dataclass(frozen=True, slots=True)
class VideoTarget:
    """A video that may be written. Its frames have 3 channels, or 4 with alpha."""

    path: Path
    format: Format
    channels: int
    overwrite: bool

    @classmethod
    def checked(
        cls, path: Path, format: Format | None, model: TemporalVAE, alpha: video.Alpha | None,
        overwrite: bool,
    ) -> VideoTarget:  # fmt: skip
        """The frames of a model as a video; `alpha` "drop" leaves out the alpha that it gives.

        Raises `VideoError` for a name or a format that cannot be written, for a file that would be
        replaced though nobody said so, and where alpha would get lost in silence.
        """
        format, name = format or Format(), os.fspath(path)
        video.check_suffix(path, format)
        if not overwrite and name != video.PIPE and os.path.exists(path):
            raise VideoError(f"{name} exists: give --overwrite to replace it")
        keeps_alpha = model.input_channels == 4 and alpha != "drop"
        if keeps_alpha and not video.choose(path, format).codec.alpha:
            raise VideoError(
                f"{name} has no place for the alpha channel that the model gives: take .mkv "
                "(FFV1), PNG or WebP, or --alpha drop, which writes the colours alone"
            )
        return cls(path, format, 4 if keeps_alpha else 3, overwrite)

    def depth(self, bits: int) -> int:
        """Bits of the components that are written, for a source of so many."""
        return video.depth_for(self.path, self.format, bits)

    def write(
        self, walk: Walk[Image], info: VideoInfo, progress: Progress | None,
        copied: CopiedStreams | None = None, comment: str | None = None,
    ) -> tuple[int, list[str]]:  # fmt: skip
        """Write frames, cropped to the size in `info`; gives their number, and notes on losses.

        The file appears whole or not at all, with `comment` where it has a place for one.
        """
        video.choose(self.path, self.format).check_frames(info.frames)
        ratio, channels = info.sample_aspect_ratio, self.channels
        format = replace(self.format, depth=self.depth(info.bit_depth))
        with (
            video.writable(self.path, format, self.overwrite) as path,
            video.VideoWriter(
                path, info.height, info.width, info.fps, info.time_base, ratio,
                channels=channels, format=format, colour=info.colour, copied=copied,
                comment=comment,
            ) as writer,
        ):  # fmt: skip

            def write(images: Image) -> int:
                grey = images.shape[3] == 1  # which is written into each channel
                images = np.repeat(images, channels, 3) if grey else images[..., :channels]
                stamps = walk.take(len(images))
                for image, stamp in zip(images, stamps, strict=False):
                    writer.write(image[: info.height, : info.width], stamp)
                return len(stamps)

            done = write_pieces(walk, write, progress, info.expected_frames)
        notes = video.depth_notes(self.path, self.format, info.bit_depth)
        if ratio not in (None, 1) and not writer.keeps_aspect:
            notes.append(f"the shape of its pixels, {ratio}, is kept in .mp4 only")
        return done, notes + writer.notes


def write_pieces(
    walk: Walk[T], write: Callable[[T], int], progress: Progress | None, expected: int | None
) -> int:
    """Write all pieces of a walk, by a function that gives their frames; gives all frames."""
    done, counted = 0, _Counted(walk, progress, expected)
    with work.told_to(None if progress is None else counted):
        for piece in walk.pieces:
            done += 0 if piece is None else write(piece)
            counted.tell(done)
    return done


class _Counted:
    """Turns the multiplications that are done into frames that are done."""

    def __init__(self, walk: Walk[Any], progress: Progress | None, expected: int | None):
        self._walk, self._progress, self._expected = walk, progress, expected
        self._each = max(1, walk.planner.frame_operations())
        self._operations, self._written, self._told = 0, 0, time.monotonic()

    def __call__(self, operations: int) -> None:
        """Count what is being computed."""
        self._operations += operations
        if time.monotonic() - self._told > TOLD_SECONDS:
            self.tell(self._written)

    def tell(self, written: int) -> None:
        """Tell of the frames that are written, and those on the way."""
        self._written, self._told = written, time.monotonic()
        if self._progress is None:
            return
        on_the_way = written + 0.99 * len(self._walk.stamps)
        done = max(written, min(self._operations / self._each, on_the_way))
        self._progress(done, self._expected, self._walk.planner.explain())
