"""`VideoWriter`: frames with timestamps to a video, to images, or into a pipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from numbers import Integral
from typing import NoReturn, Self

import av

from temporal_vae.video.frames import PIPE, Colour, Image, VideoError
from temporal_vae.video.write.container import ContainerWriter
from temporal_vae.video.write.formats import ANIMATIONS, FOLDER, STILLS, Format, choose
from temporal_vae.video.write.output import Output, Target
from temporal_vae.video.write.pictures import AnimationWriter, ImageFolderWriter, StillWriter
from temporal_vae.video.write.raw import RawWriter
from temporal_vae.video.write.remux import CopiedStreams
from temporal_vae.video.write.to_yuv import layout_of


class VideoWriter:
    """Write frames to `path`: a video, raw frames, images, or "-", standard output.

    What is written follows from the name and from `format`: by default .mkv is lossless FFV1 in
    RGB, .mp4 is H.264. Files are written in place, so use it inside `writable`; a folder must
    exist.

    FFV1 and images keep every number. The others store YUV in the matrix and range of `colour`
    (BT.709 and limited where it has none), with chroma of half the size if both sides are even.
    The tags of `colour` are passed on. The streams of `copied` are put in the same file, and
    `comment` where it has a place for one.

    After the end `notes` says what is not in the file. Raises `VideoError` for what cannot be
    written.
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
        comment: str | None = None,
    ):
        self.path = os.fspath(path)
        chosen = choose(self.path, format)
        chosen.check(height, width, channels)
        layout = layout_of(chosen, (height, width, channels), colour)
        self._fps, self._base = fps, time_base or 1 / fps
        self._first: int | None = None
        self._last = -1
        self._count, self._evenly_spaced = 0, True
        self.notes: list[str] = []
        self.keeps_aspect = chosen.suffix in (".mp4", ".mov") or chosen.name == "y4m"
        self.keeps_tags = chosen.in_container
        # a still has none, and an animation says itself what it loses
        self._keeps_timestamps = chosen.in_container or chosen.suffix in STILLS + ANIMATIONS
        ratio = sample_aspect_ratio
        target = Target(self.path, chosen, layout, fps, self._base, ratio, comment)
        with _video_errors(f"cannot write {self.path}"):
            self._output = _open(target, copied)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.path} is being written: a video is written by one process")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with suppress(av.error.FFmpegError, OSError):
                self._output.close(complete=False)
            return
        with _video_errors("cannot write the video"):
            self._output.close(complete=True)
        self.notes += self._output.notes()
        if not self._keeps_timestamps and (self._first or not self._evenly_spaced):
            what = "start" if self._evenly_spaced else "timestamps"
            self.notes.append(f"its {what} cannot be kept: frames come at {self._fps} per second")

    def write(self, image: Image, pts: int) -> None:
        """Append one frame, uint8 or uint16 (H, W, C), at `pts` in units of the time base.

        Raises `VideoError` for timestamps below 0, or that do not rise: mp4 would hide such frames,
        or give them other timestamps.
        """
        if not isinstance(pts, Integral) or pts <= self._last:
            raise VideoError(
                f"timestamps must be whole numbers that grow from 0 or above, got {pts} after "
                f"{self._last} at frame {self._count}"
            )
        with _video_errors("cannot write the video"):
            self._output.write(image, pts)
        self._first, self._last = pts if self._first is None else self._first, pts
        late = (pts - self._first) * self._base - self._count / self._fps
        self._evenly_spaced &= abs(late) <= self._base / 2
        self._count += 1


def _open(target: Target, copied: CopiedStreams | None) -> Output:
    if target.format.in_container:
        return ContainerWriter(target, copied)
    if target.format.suffix in ANIMATIONS:
        return AnimationWriter(target)
    if target.format.suffix in STILLS:
        return StillWriter(target)
    return ImageFolderWriter(target) if target.format.suffix == FOLDER else RawWriter(target)


@contextmanager
def _video_errors(what: str) -> Iterator[None]:
    """Raise errors of libav and the system as a `VideoError` of one line."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{what}: {error.strerror or error}") from error


def check_suffix(path: str | os.PathLike[str], format: Format | None = None) -> str:
    """The suffix of what is written under this name: for "-" that of .mkv, for a folder "".

    Raises `VideoError` unless a video can be written under it.
    """
    suffix = choose(path, format).suffix
    return ".mkv" if suffix == PIPE else suffix
