"""Two videos in one, to look at: beside each other with their difference, or under a wipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from temporal_vae.evaluation.clips import CHEAP, PROTOCOLS, Tick, measure_clip
from temporal_vae.evaluation.codecs import Codec, eight_bits
from temporal_vae.evaluation.measures import need_pillow
from temporal_vae.evaluation.pictures import amplified_difference
from temporal_vae.video import (
    Format,
    Uint8Frames,
    VideoError,
    VideoReader,
    VideoWriter,
    writable,
)

WIPE_SECONDS = 4.0
"""A wipe takes as long from one side to the other, and then goes back."""
LINE = 2
"""Pixels of the line between both sides of a wipe."""
MEASURED = ("psnr", "ssim", "flicker")
"""What `measure` measures."""
Progress = Callable[[float, int | None], None]


@dataclass(frozen=True, slots=True)
class Layout:
    """How two frames become one."""

    labels: tuple[str, str]
    wipe: bool = False
    """Under a line that moves from side to side; otherwise beside each other."""
    gain: float = 8.0
    """What the difference that is shown is multiplied by."""

    def frame(self, a: Uint8Frames, b: Uint8Frames, seconds: float) -> Uint8Frames:
        """One frame of the comparison, with even sides, as most codecs want them."""
        if self.wipe:
            picture = _wiped(a, b, _place(seconds))
            labelled = _labelled(picture, [self.labels[0], self.labels[1]], spread=True)
        else:
            difference = amplified_difference(a, b, self.gain)
            names = [*self.labels, f"difference x {self.gain:g}"]
            labelled = _labelled(np.concatenate([a, b, difference], 1), names)
        height, width = labelled.shape[:2]
        return np.pad(labelled, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def compare(
    first: VideoReader,
    second: VideoReader,
    target: str | os.PathLike[str],
    layout: Layout,
    format: Format | None = None,
    overwrite: bool = True,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write a video of two that have as many frames of one size; gives the number of frames.

    Rate and timestamps are the first one's. The file appears whole or not at all. Raises
    `VideoError` for videos of different length or size, and what cannot be read or written.
    """
    need_pillow()
    if first.size != second.size:
        sizes = (
            f"{reader.path} is {reader.size[1]}x{reader.size[0]}" for reader in (first, second)
        )
        raise VideoError(f"{' and '.join(sizes)}: give --size to scale both")
    info, done = first.info, 0
    blank = np.zeros((*first.size, 3), np.uint8)
    height, width = layout.frame(blank, blank, 0).shape[:2]
    with (
        writable(target, format, overwrite) as partial,
        VideoWriter(partial, height, width, info.fps, info.time_base, format=format) as writer,
    ):
        for a, b, pts in _together(first, second):
            seconds = float((pts - first.begin) * info.time_base)
            writer.write(layout.frame(a, b, seconds), pts - first.begin)
            done += 1
            progress(done, info.expected_frames)
    return done


def measure(
    opening: Callable[[], VideoReader], codec: Codec, tick: Tick = lambda: None
) -> dict[str, float | None]:
    """How close a codec comes to a video, by name; None for what cannot be measured.

    `opening` opens the video. Raises `VideoError` for what cannot be read, and `ValueError` for a
    reconstruction that is not one of it.
    """
    makes = {name: CHEAP[name] for name in MEASURED}
    found = measure_clip(opening, codec, PROTOCOLS["quick"], tick, makes)
    return {name: found.values.get(name) for name in MEASURED}


def _together(
    first: VideoReader, second: VideoReader
) -> Iterator[tuple[Uint8Frames, Uint8Frames, int]]:
    for count, (a, b) in enumerate(zip_longest(first, second)):
        if a is None or b is None:
            ends, goes_on = (first, second) if a is None else (second, first)
            raise VideoError(
                f"{ends.path} ends after {count} frames, and {goes_on.path} has more: give --frames"
            )
        yield eight_bits(a.image), eight_bits(b.image), a.pts


def _place(seconds: float) -> float:
    """Where the line of a wipe is, from 0 at the left to 1 at the right."""
    return 1 - abs(1 - seconds / WIPE_SECONDS % 2)


def _wiped(a: Uint8Frames, b: Uint8Frames, place: float) -> Uint8Frames:
    """`a` on the left of the line, `b` on its right."""
    column = round(place * a.shape[1])
    picture = np.concatenate([a[:, :column], b[:, column:]], 1)
    picture[:, max(0, column - LINE // 2) : column + LINE // 2] = 255
    return picture


def _labelled(picture: Uint8Frames, names: list[str], spread: bool = False) -> Uint8Frames:
    """The picture under a bar with a name above each of its parts, or one at each end."""
    from PIL import Image, ImageDraw, ImageFont

    width = picture.shape[1]
    size = max(10, min(24, picture.shape[0] // 12))
    bar = Image.new("RGB", (width, size + 8), "black")
    draw, font = ImageDraw.Draw(bar), ImageFont.load_default(size)
    for index, name in enumerate(names):
        at_end = spread and index == 1
        place = (width - 4 if at_end else index * width // len(names) + 4, 2)
        draw.text(place, name, fill="white", font=font, anchor="ra" if at_end else "la")
    return np.concatenate([np.asarray(bar), picture])
