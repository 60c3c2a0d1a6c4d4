"""Which clips are made of a video, and their frames, decoded in one pass."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import count, pairwise
from typing import Any, Literal, Self, cast

from temporal_vae.dataset.buckets import Bucket, fitting
from temporal_vae.dataset.entries import OURS, Entry
from temporal_vae.files.streams import sha256_of
from temporal_vae.video import Frame, Options, VideoError, VideoInfo, VideoReader

Cut = int | Literal["scenes"] | None
"""Clips of so many frames, of a scene each, or one of the whole video."""
SCENE_WIDTH = 256
"""Pixels across at which scenes are told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """How clips are made of videos."""

    options: Options
    """Which frames, and which part of them, as `tvae encode` takes it."""
    reading: Options
    """What the model wants beside them, see `ends.reader_options`."""
    cut: Cut = None
    buckets: tuple[Bucket, ...] = ()

    def __post_init__(self) -> None:
        if self.buckets and {"size", "crop"} & self.options.keys():
            raise ValueError("--buckets set the size of clips: leave out --size and --crop")
        if isinstance(self.cut, int) and self.cut < 1:
            raise ValueError(f"clips of {self.cut} frames cannot be: --cut takes 1 or more")


@dataclass(slots=True)
class Clip:
    """A clip on its way to the encoder, which reads it as it would read a video's file."""

    entry: Entry
    name: str
    """Of its latents, without suffix."""
    first: int
    """Its first frame, counted among those of the video that were asked for."""
    sha256: str
    """Of the video's bytes."""
    options: Options
    """With which `tvae encode` gives the same."""
    bucket: str | None
    info: VideoInfo
    size: tuple[int, int]
    sample_aspect_ratio: Fraction | None
    begin: int
    notes: list[str] = field(default_factory=list)
    frames: Iterator[Frame] = field(default_factory=lambda: iter(()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Frame]:
        return self.frames


@dataclass(frozen=True, slots=True)
class Passed:
    """A part of a video that is left out."""

    entry: Entry
    name: str
    first: int
    reason: str


def clips_of(entry: Entry, cutting: Cutting, done: Collection[str] = ()) -> Iterator[Clip | Passed]:
    """The clips of a video, but for those whose names are `done`; read each before the next.

    Raises `VideoError` for a video that cannot be read, also while frames of a clip are read.
    """
    if entry.wrong is not None:
        raise VideoError(entry.wrong)
    given = {"start": entry.start, "frames": entry.frames}
    ranged = {name: value for name, value in given.items() if value is not None}
    options = cast(Options, {**cutting.options, **ranged})
    path = str(entry.source)
    try:
        with entry.source.file() as path:
            if os.path.exists(path) and not os.path.isfile(path):
                raise VideoError(f"{path} is no file")
            sha256 = sha256_of(path)
            video = _Video(entry, path, sha256, options, cutting)
            yield from video.clips(frozenset(done))
    except (VideoError, OSError, ValueError) as error:  # a copy's name tells nobody anything
        words = str(error) or type(error).__name__
        raise VideoError(words.replace(path, str(entry.source))) from error


@dataclass(slots=True)
class _Video:
    """A video that is cut."""

    entry: Entry
    path: str
    sha256: str
    options: Options
    cutting: Cutting

    def clips(self, done: Collection[str]) -> Iterator[Clip | Passed]:
        edges = self._scenes() if self.cutting.cut == "scenes" else [0, None]
        buckets = self._buckets()
        sized = self._sized(buckets[0]) if buckets else self.options
        with self._reader(sized) as reader:
            frames, total = _Numbered(iter(reader)), reader.info.expected_frames
            for first, length in self._spans(edges):
                start = frames.at(first)
                if start is None:
                    return
                left = None if total is None else total - first
                held = left if length is None else min(length, left or length)
                name = self._name(first)
                bucket = _longest(buckets, held)
                if name in done:
                    continue
                if buckets and bucket is None:
                    reason = f"{held} frames are fewer than those of bucket {buckets[-1]}"
                    yield Passed(self.entry, name, first, reason)
                    continue
                exact = bucket.frames if bucket else None
                clip = self._clip(reader, first, start, exact or length, sized)
                clip.bucket = None if bucket is None else str(bucket)
                clip.frames = _noted(frames, exact or length, exact, clip, reader)
                yield clip

    def _name(self, first: int) -> str:
        return self.entry.name + (f"{OURS}{first:06d}" if self.cutting.cut else "")

    def _clip(
        self, reader: VideoReader, first: int, start: Frame, length: int | None, sized: Options
    ) -> Clip:
        base, begin, options = reader.info.time_base, reader.begin, cast(Options, dict(sized))
        if self.cutting.cut:  # the same as from this frame on
            seconds = start.pts * base - Fraction(reader.info.start)
            begin, options["start"] = round(seconds / base), seconds
        if length is not None:
            options["frames"] = length
        info = replace(reader.info, path=self.entry.source.name)
        return Clip(self.entry, self._name(first), first, self.sha256, options, None, info,
                    reader.size, reader.sample_aspect_ratio, begin, list(reader.notes))  # fmt: skip

    def _spans(self, edges: list[Any]) -> Iterator[tuple[int, int | None]]:
        """First frame and number of frames of what may become a clip; None: to the end."""
        length = self.cutting.cut
        for begin, end in pairwise(edges):
            if not isinstance(length, int):
                yield begin, None if end is None else end - begin
            elif end is None:
                yield from ((first, length) for first in count(begin, length))

    def _reader(self, options: Options, width: int | None = None) -> VideoReader:
        return VideoReader(self.path, width, **cast(Options, {**options, **self.cutting.reading}))

    def _buckets(self) -> tuple[Bucket, ...]:
        """Those that the video's shape fits into, the longest first."""
        if not self.cutting.buckets:
            return ()
        with self._reader(self.options) as reader:
            height, width = reader.size
            shape = Fraction(width, height) * (reader.sample_aspect_ratio or 1)
        return fitting(self.cutting.buckets, (height, width), shape)

    def _sized(self, bucket: Bucket) -> Options:
        return {**self.options, "size": (bucket.height, bucket.width), "crop": "centre"}

    def _scenes(self) -> list[int]:
        """Where scenes begin, and where the last one ends."""
        from scenedetect import ContentDetector, FrameTimecode

        detector, cuts, number = ContentDetector(), [0], 0
        options = cast(Options, {**self.options, "size": None, "crop": None})
        reading = cast(Options, {**self.cutting.reading, "channels": 3, "alpha": "drop"})
        with VideoReader(self.path, SCENE_WIDTH, **cast(Options, {**options, **reading})) as reader:
            rate = float(reader.info.fps)
            for frame in reader:
                image = frame.image if frame.image.dtype == "uint8" else (frame.image >> 8)
                bgr = image[..., ::-1].astype("uint8")
                found = detector.process_frame(FrameTimecode(number, fps=rate), bgr)
                cuts += [code.frame_num for code in found]
                number += 1
        return [*dict.fromkeys(cuts), number]


def _noted(
    frames: _Numbered, length: int | None, exact: int | None, clip: Clip, reader: VideoReader
) -> Iterator[Frame]:
    """The frames of a clip; behind the last ones of the file it has what that was noted of."""
    yield from frames.take(length, exact)
    if frames.at_end():
        clip.notes += [note for note in reader.notes if note not in clip.notes]


class _Numbered:
    """Frames in one pass, by their numbers."""

    def __init__(self, frames: Iterator[Frame]):
        self._frames, self._number = frames, 0
        self._held: Frame | None = None

    def at(self, number: int) -> Frame | None:
        """The frame of this number, which comes next; None where there is none."""
        while self._number < number:
            if self._pop() is None:
                return None
        self._held = self._held or next(self._frames, None)
        return self._held

    def take(self, length: int | None, exact: int | None) -> Iterator[Frame]:
        """So many frames from the next one on. Raises `VideoError` for fewer than `exact`."""
        taken = 0
        while (length is None or taken < length) and (frame := self._pop()) is not None:
            taken += 1
            yield frame
        if exact is not None and taken < exact:
            raise VideoError(f"it ends after {taken} of {exact} frames that its length promises")

    def at_end(self) -> bool:
        """Whether there are no more frames; then the reader's notes are complete."""
        self._held = self._held or next(self._frames, None)
        return self._held is None

    def _pop(self) -> Frame | None:
        frame, self._held = self._held or next(self._frames, None), None
        self._number += frame is not None
        return frame


def _longest(buckets: tuple[Bucket, ...], held: int | None) -> Bucket | None:
    """The longest bucket that so many frames fill. Raises `VideoError` where that is unknown."""
    if held is None and any(bucket.frames for bucket in buckets):
        raise VideoError("the file does not say how long it is, which buckets with frames need")
    return next((b for b in buckets if b.frames is None or b.frames <= (held or 0)), None)
