"""Video to frames with timestamps, and to tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import av
import numpy as np
from av.video.frame import VideoFrame

from temporal_vae.video.frames import FRACTION_LIMIT, Frame, Image, VideoError, VideoInfo, to_pixels
from temporal_vae.video.read.container import Source, VideoFile
from temporal_vae.video.read.images import is_animated_webp, open_folder, open_webp
from temporal_vae.video.read.prefetch import Ahead
from temporal_vae.video.read.selection import Options, Selection, even, finest
from temporal_vae.video.read.to_rgb import ALPHA_LOST, Converter, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AHEAD_FRAMES = 4
"""Frames that wait, converted, for the reader."""
DECODED_FRAMES = 3
"""Frames that wait, decoded, to be converted."""


class VideoReader:
    """Decode a video frame by frame: `with VideoReader(path) as video: for frame in video`.

    `path` is a file that PyAV decodes, a folder of images, a GIF or WebP, or "-" for what another
    program pipes into standard input. Frames come upright, in RGB, uint8 or (deeper than 8 bits)
    uint16; a thread decodes ahead of the reader. With `width` frames are scaled (bilinear,
    averaging where it shrinks), the height to the nearest multiple of `multiple` that keeps the
    shape of the picture; `options` are those of `Selection`.

    What would come out wrong is refused by a `VideoError` that gives a way out. After the iteration
    `notes` says what is not as in the file, or was lost.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int | None = None,
        multiple: int = 1,
        **options: Unpack[Options],
    ):
        self.path = os.fspath(path)
        self._selection = Selection(width=width, multiple=multiple, **options)
        self._ahead: Ahead[Frame] | None = None
        self._decoded: Ahead[tuple[VideoFrame, int]] | None = None
        self._source = _open(self.path, self._selection)
        self._resampled = self._selection.rate is not None and not os.path.isdir(self.path)
        try:
            self._file_info = self._source.info
            self.notes = list(self._file_info.notes)
            shape = self._shape()
            watched = self._source.opaque_until_seen and self._selection.alpha != "drop"
            self._converter, self._size = Converter(self.path, shape, watched), shape.size
            self.info = self._selected_info()
            self._squeeze = _squeeze(shape, self._file_info)
            self.notes += _distortion(shape, self._file_info, self._squeeze)
        except BaseException:
            self._source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding, and close the file."""
        # a thread that is stuck in a read keeps its file: to close it would crash
        stages = (self._decoded, self._ahead)
        if all([stage is None or stage.close() for stage in stages]):  # each, whatever another says
            self._source.close()

    def __iter__(self) -> Iterator[Frame]:
        if self._ahead is not None:
            raise VideoError(f"{self.path} has been read: open it again to read it again")
        self._ahead = Ahead(self._frames(), AHEAD_FRAMES)
        yield from self._ahead

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames that come out."""
        return self._size

    @property
    def sample_aspect_ratio(self) -> Fraction | None:
        """Width to height of a pixel of the frames that come out, None where none is stated.

        That of the file, unless `size` changes the shape of the picture: shown with this one, the
        picture has its own shape again.
        """
        ratio = self.info.sample_aspect_ratio
        return ratio if self._squeeze == 1 else (ratio or 1) * self._squeeze

    @property
    def begin(self) -> int:
        """Where `start` lies from the first frame, in units of `info.time_base`."""
        if self.info.time_base > self._file_info.time_base:  # the first frame may be rounded down
            return int(Fraction(self._selection.start) / self.info.time_base)
        return self._selection.start_ticks(self.info.time_base)

    @property
    def shift(self) -> Fraction:
        """Seconds that were added to the file's timestamps, so that none is below 0."""
        return self._source.shift if isinstance(self._source, VideoFile) else Fraction(0)

    def _frames(self) -> Iterator[Frame]:
        last: tuple[VideoFrame, Frame] | None = None
        asked, count = self._selection.frames, 0
        # a thread of its own, as converting takes about as long as decoding
        self._decoded = Ahead(islice(self._selected(), asked), DECODED_FRAMES)
        for decoded, pts in self._decoded:
            count += 1
            if last is None or last[0] is not decoded:  # a frame may stand more than once
                try:
                    last = decoded, self._converter(decoded, pts)
                except (av.error.FFmpegError, MemoryError) as error:
                    raise VideoError(f"{self.path}: frame {count - 1}: {error}") from error
            yield replace(last[1], pts=pts)
        if not count:
            begin = float(self._selection.start)
            raise VideoError(f"{self.path}: no frame begins at {begin:g} s or later")
        self.notes += self._source.notes(complete=asked is None or count < asked)

    def _selected(self) -> Iterator[tuple[VideoFrame, int]]:
        """Frames and timestamps, in units of `info.time_base`, that were asked for."""
        base = self._file_info.time_base
        start = self._selection.start_ticks(base)
        if start:
            start += round(self._file_info.start / base)
        frames = ((f, pts) for f, pts in self._source.frames(start) if pts >= start)
        if self._resampled:
            assert self._selection.rate is not None
            return even(frames, base, self._selection.rate, self.info.time_base, self.path)
        return islice(frames, None, None, self._selection.stride)

    def _shape(self) -> Shape:
        info, selection = self._file_info, self._selection
        wants = selection.channels == 4 or selection.alpha is not None
        if info.alpha and not self._source.opaque_until_seen and not wants:
            raise VideoError(f"{self.path}: {ALPHA_LOST}")
        cut = selection.cut(info.height, info.width, self.path)
        size = selection.scaled(*(cut[2:] if cut else (info.height, info.width)))
        return Shape(
            size=size,
            crop=cut,
            channels=selection.channels,
            plane=selection.alpha == "keep",
            deep=info.bit_depth > 8,
        )

    def _selected_info(self) -> VideoInfo:
        """What the file says, with rate, time base and frames as they come."""
        info, selection = self._file_info, self._selection
        fps, base = info.fps / selection.stride, info.time_base
        if self._resampled and selection.rate is not None:
            fps = selection.rate
            base = finest(info.time_base, 1 / fps)
            if (
                base.denominator > FRACTION_LIMIT
            ):  # then a start between two frames moves to the one before
                base = 1 / fps
        length = None
        if info.expected_frames is not None:
            seconds = info.expected_frames / info.fps - Fraction(selection.start)
            length = max(1, round(seconds * fps))
        if selection.frames is not None:
            length = min(selection.frames, length or selection.frames)
        whole = selection.frames is None and not selection.start and fps == info.fps
        return replace(info, fps=fps, time_base=base, frames=info.frames if whole else length)


def _open(path: str, selection: Selection) -> Source:
    if os.path.isdir(path):
        return open_folder(path, selection.rate)
    if is_animated_webp(path):
        return open_webp(path)
    alpha = selection.channels == 4 or selection.alpha == "keep"
    return VideoFile(path, alpha, selection.raw)


def _squeeze(shape: Shape, info: VideoInfo) -> Fraction:
    """By what a size makes pixels wider than they were; 1 within a pixel's rounding."""
    rows, columns = shape.crop[2:] if shape.crop else (info.height, info.width)
    height, width = shape.size
    if abs(rows * width - columns * height) <= max(rows, columns) + max(width, height):
        return Fraction(1)
    return Fraction(columns * height, rows * width).limit_denominator(10_000)


def _distortion(shape: Shape, info: VideoInfo, squeeze: Fraction) -> Iterator[str]:
    """A line where pixels are neither square nor as they were."""
    if squeeze != 1 and (info.sample_aspect_ratio or 1) * squeeze != 1:
        rows, columns = shape.crop[2:] if shape.crop else (info.height, info.width)
        height, width = shape.size
        yield f"{columns}x{rows} is squeezed to {width}x{height}: crop='centre' keeps its shape"


def read_clip(
    path: str | os.PathLike[str],
    frames: int | None = None,
    width: int | None = None,
    multiple: int = 1,
) -> Image:
    """The first `frames` frames of a video (all if None), (T, H, W, 3); see `VideoReader`."""
    with VideoReader(path, width, multiple, frames=frames) as video:
        return np.stack([frame.image for frame in video])


def load_video(
    path: str | os.PathLike[str],
    *,
    width: int | None = None,
    multiple: int = 1,
    dtype: torch.dtype | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, VideoInfo]:
    """A video as a tensor (1, C, T, H, W) in [-1, 1], and what its file says of itself.

    The tensor is float32 unless `dtype` is given.
    The whole clip lies in memory: `start`, `frames`, `stride`, `fps`, `size`, `crop`, `channels`
    and `alpha` choose less of it, as in `VideoReader`, whose notes end up in the info's.

    Raises `ValueError` for alpha that is to be kept, unless `channels` gives it a place.
    """
    import torch

    if options.get("alpha") == "keep" and options.get("channels") != 4:
        raise ValueError(
            "alpha='keep' is a plane beside each frame, for which a tensor has no place: "
            "channels=4 gives it as the fourth channel"
        )
    with VideoReader(path, width, multiple, **options) as video:
        parts = [to_pixels(frame.image[None]).to(dtype or torch.float32) for frame in video]
        return torch.cat(parts, 2), replace(video.info, notes=tuple(video.notes))
