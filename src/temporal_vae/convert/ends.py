"""What every conversion does at its two ends: readers, writers, refusals and notes."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from temporal_vae.convert.chunks import T, Walk
from temporal_vae.model import TemporalVAE
from temporal_vae.video import (
    PIPE,
    Alpha,
    Colour,
    CopiedStreams,
    Format,
    Frame,
    Image,
    Options,
    VideoError,
    VideoReader,
    VideoWriter,
    check_suffix,
    choose,
    depth_for,
    depth_notes,
    writable,
)
from temporal_vae.video.frames import NOT_COPIED

Path = str | os.PathLike[str]
Progress = Callable[[int, int | None], None]
"""Called with the frames done, one on the way counting half, and the frames the file claims."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did."""

    frames: int
    seconds: float
    clip_frames: int | None
    """Frames of each clip; None when the video was taken as one."""
    notes: tuple[str, ...]
    """What was not carried over, or could not be read; a line each."""

    @classmethod
    def since(
        cls, start: float, frames: int, clip_frames: int | None, source: Path, notes: list[str]
    ) -> Summary:
        """Of a conversion that began at `start` of `time.monotonic`; notes name the source."""
        told = tuple(f"{os.fspath(source)}: {note}" for note in notes)
        cut = None if clip_frames == sys.maxsize else clip_frames
        return cls(frames, time.monotonic() - start, cut, told)


def open_reader(source: Path, model: TemporalVAE, options: Options | None = None) -> VideoReader:
    """A reader of the pixels that a model takes: grey, RGB, or RGB and alpha.

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
    return VideoReader(source, **asked)


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


def timed(reader: VideoReader) -> Iterator[Frame]:
    """Its frames, with timestamps that are counted from the `start` that was asked for."""
    begin = reader.begin
    return (replace(frame, pts=frame.pts - begin) for frame in reader)


class Picture(NamedTuple):
    """What is known of a video before its frames are written."""

    size: tuple[int, int]
    fps: Fraction
    time_base: Fraction
    sample_aspect_ratio: Fraction | None
    bit_depth: int
    colour: Colour | None
    frames: int | None

    @classmethod
    def of(cls, reader: VideoReader) -> Picture:
        """Of the frames that a reader gives."""
        info = reader.info
        return cls(
            reader.size, info.fps, info.time_base, reader.sample_aspect_ratio, info.bit_depth,
            info.colour, info.expected_frames,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class VideoTarget:
    """A video that may be written. Its frames have 3 channels, or 4 with alpha."""

    path: Path
    format: Format
    channels: int

    @classmethod
    def checked(
        cls, path: Path, format: Format | None, model: TemporalVAE, alpha: Alpha | None,
        overwrite: bool,
    ) -> VideoTarget:  # fmt: skip
        """The frames of a model as a video; `alpha` "drop" leaves out the alpha that it gives.

        Raises `VideoError` for a name or a format that cannot be written, for a file that would be
        replaced though nobody said so, and where alpha would get lost in silence.
        """
        format, name = format or Format(), os.fspath(path)
        check_suffix(path, format)
        if not overwrite and name != PIPE and os.path.exists(path):
            raise VideoError(f"{name} exists: give --overwrite to replace it")
        keeps_alpha = model.input_channels == 4 and alpha != "drop"
        if keeps_alpha and not choose(path, format).codec.alpha:
            raise VideoError(
                f"{name} has no place for the alpha channel that the model gives: take .mkv (FFV1) "
                "or a folder of PNG, or --alpha drop, which writes the colours alone"
            )
        return cls(path, format, 4 if keeps_alpha else 3)

    def depth(self, bits: int) -> int:
        """The depth of frames, 8 or 16 bits, for a source of so many bits."""
        return 8 if depth_for(self.path, self.format, bits) == 8 else 16

    def write(
        self, walk: Walk[Image], picture: Picture, progress: Progress | None,
        copied: CopiedStreams | None = None,
    ) -> tuple[int, list[str]]:  # fmt: skip
        """Write frames, cropped to the picture; gives their number, and what was not carried over.

        The file appears whole or not at all.
        """
        bits, (height, width), ratio = picture.bit_depth, picture.size, picture.sample_aspect_ratio
        notes = depth_notes(self.path, self.format, bits)
        format = replace(self.format, depth=depth_for(self.path, self.format, bits))
        with (
            writable(self.path, format) as path,
            VideoWriter(
                path, height, width, picture.fps, picture.time_base, ratio,
                channels=self.channels, format=format, colour=picture.colour, copied=copied,
            ) as writer,
        ):  # fmt: skip

            def write(images: Image) -> int:
                for image in self._in_channels(images):
                    writer.write(image[:height, :width], walk.stamps.popleft())
                return len(images)

            done = write_pieces(walk, write, progress, picture.frames)
            if ratio not in (None, 1) and not writer.keeps_aspect:
                notes.append(f"the shape of its pixels, {ratio}, is kept in .mp4 only")
        return done, notes + writer.notes

    def _in_channels(self, images: Image) -> Image:
        """(n, H, W, C) as a model gives them -> (n, H, W, channels) as written: grey in each."""
        if images.shape[3] == 1:
            return np.repeat(images, self.channels, 3)
        return images[..., : self.channels]


def write_pieces(
    walk: Walk[T], write: Callable[[T], int], progress: Progress | None, expected: int | None
) -> int:
    """Write all pieces of a walk, by a function that gives their frames; gives all frames."""
    done = 0
    for piece in walk.pieces:
        done += 0 if piece is None else write(piece)
        if progress is not None:  # a frame taken in, and not given yet, is half done
            progress(done + len(walk.stamps) // 2, expected)
    return done


COLOUR_TAGS = ("matrix", "primaries", "range", "transfer")
"""Of `Colour`, that a file of latents keeps."""


def colour_fields(colour: Colour) -> tuple[tuple[str, str], ...]:
    """A source's colours as the header of its latents has them."""
    return tuple((name, str(getattr(colour, name))) for name in COLOUR_TAGS)


@contextmanager
def source_checksum(source: str | os.PathLike[str]) -> Iterator[Callable[[], str | None]]:
    """SHA-256 of a file, taken by a thread in the meantime; None of what is no file."""
    if not os.path.isfile(source):
        yield lambda: None
        return
    ended = threading.Event()

    def take() -> str:
        digest = hashlib.sha256()
        with open(source, "rb") as file:
            while not ended.is_set() and (block := file.read(2**20)):
                digest.update(block)
        return digest.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(take).result
        finally:
            ended.set()
