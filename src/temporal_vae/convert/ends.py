"""What every conversion does at its two ends: readers, writers, refusals and notes."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

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
    choose,
)
from temporal_vae.video.frames import NOT_COPIED

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


def refuse_existing(target: str | os.PathLike[str]) -> None:
    """Raise `VideoError` where a file would be replaced that was not said to be."""
    if os.fspath(target) != PIPE and os.path.exists(target):
        raise VideoError(f"{os.fspath(target)} exists: give --overwrite to replace it")


def open_reader(
    source: str | os.PathLike[str], model: TemporalVAE, options: Options | None = None
) -> VideoReader:
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
    source: str | os.PathLike[str], reader: VideoReader, options: Options
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


def written_channels(
    target: str | os.PathLike[str], format: Format, model: TemporalVAE, alpha: Alpha | None
) -> int:
    """3, or 4 where the model gives alpha, and `alpha` does not say to drop it.

    Raises `VideoError` where it would get lost in silence.
    """
    if model.input_channels != 4 or alpha == "drop":
        return 3
    if not choose(target, format).codec.alpha:
        raise VideoError(
            f"{os.fspath(target)} has no place for the alpha channel that the model gives: take "
            ".mkv (FFV1) or a folder of PNG, or --alpha drop, which writes the colours alone"
        )
    return 4


def timed(reader: VideoReader) -> Iterator[Frame]:
    """Its frames, with timestamps that are counted from the `start` that was asked for."""
    begin = reader.begin
    return (replace(frame, pts=frame.pts - begin) for frame in reader)


def in_channels(images: Image, channels: int) -> Image:
    """(n, H, W, C) as a model gives them -> (n, H, W, channels) as written: grey in each."""
    return np.repeat(images, channels, 3) if images.shape[3] == 1 else images[..., :channels]


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
