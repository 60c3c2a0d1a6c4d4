"""`VideoReader`, a video frame by frame, and `load_video`, a video as a tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any, Self, Unpack

import av
import numpy as np
from av.video.frame import VideoFrame

from temporal_vae.video.frames import (
    FRACTION_LIMIT,
    PIPE,
    Frame,
    Image,
    VideoError,
    VideoInfo,
    to_pixels,
)  # fmt: skip
from temporal_vae.video.read.container import ContainerReader, Source, Stamped
from temporal_vae.video.read.images import is_animated_webp, open_folder, open_pages, open_webp
from temporal_vae.video.read.prefetch import Prefetcher
from temporal_vae.video.read.selection import Options, Selection, even, finest
from temporal_vae.video.read.to_rgb import ALPHA_LOST, Converter, FrameSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONVERTED_AHEAD = 4
"""Converted frames that wait for the caller."""
DECODED_AHEAD = 3
"""Decoded frames that wait to be converted."""


class VideoReader:
    """Decode a video frame by frame: `with VideoReader(path) as video: for frame in video`.

    `path` is a file that PyAV decodes, a folder of images, a GIF or WebP, or "-" for standard
    input. Frames come upright, in RGB, uint8 or (for a source deeper than 8 bits) uint16; threads
    decode and convert ahead. With `width` frames are scaled (bilinear, averaging where it shrinks),
    with the height to the nearest multiple of `multiple` that keeps the shape of the picture;
    `options` are those of `Selection`.

    Raises `VideoError` for a video that cannot be read, or whose frames would come out wrong; the
    message gives a way out. After the iteration `notes` says what of the file was assumed, changed,
    left out or lost.

    A reader that has not begun may be sent to another process, or be there after a fork: it opens
    its file again. One that has begun raises `VideoError` there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int | None = None,
        multiple: int = 1,
        **options: Unpack[Options],
    ):
        self.path = os.fsdecode(path)  # a name may be bytes, as those of os.scandir(b".")
        self._selection = Selection(width=width, multiple=multiple, **options)
        self._converted: Prefetcher[Frame] | None = None
        self._taken, self._process = False, os.getpid()
        self._decoded: Prefetcher[Stamped] | None = None
        self._source = _open(self.path, self._selection)
        self._new_rate = None if self._source.takes_rate else self._selection.rate
        try:
            self._file_info = self._source.info
            self._spec = self._frame_spec()
            watch_alpha = self._source.opaque_until_seen and self._selection.alpha != "drop"
            self._converter = Converter(self.path, self._spec, watch_alpha)
            self.info = self._selected_info()
            self.notes = [*self._file_info.notes, *self._spec.notes(self.info.sample_aspect_ratio)]
        except BaseException:
            self._source.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        if self._taken or self._converted is not None:
            raise VideoError(f"{self.path} is being read: open it in the process that reads it")
        return _reopen, (type(self), os.path.abspath(self._again()), self._selection)

    def _again(self) -> str:
        """The path, if it can be opened a second time."""
        if self.path == PIPE:
            raise VideoError("standard input cannot be read in two processes: read it in one")
        return self.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding, and close the file."""
        stages = [stage for stage in (self._decoded, self._converted) if stage is not None]
        ended = [stage.close() for stage in stages]  # each, even if an earlier one has not ended
        if all(ended):  # closing the file of a thread that still reads it would crash
            self._source.close()

    def __iter__(self) -> Iterator[Frame]:
        if self._taken:
            raise VideoError(f"{self.path} has been read: open it again to read it again")
        self._taken = True
        yield from self.start()

    def start(self) -> Prefetcher[Frame]:
        """Begin to decode ahead, before the first frame is asked for."""
        if self._converted is None:
            if self._process != os.getpid():  # which has the same place in the same open file
                self._source, self._process = _open(self._again(), self._selection), os.getpid()
            # decoded in a thread of its own, since converting takes about as long
            decoded = islice(self._selected(), self._selection.frames)
            self._decoded = Prefetcher(decoded, DECODED_AHEAD)
            self._converted = Prefetcher(self._frames(self._decoded), CONVERTED_AHEAD)
        return self._converted

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames that come out."""
        return self._spec.size

    @property
    def sample_aspect_ratio(self) -> Fraction | None:
        """Width to height of a pixel of the frames that come out, None if the file does not say.

        If `size` changes the shape of the picture, this ratio is changed too, so that the picture
        has its own shape where the ratio is followed.
        """
        ratio, squeeze = self.info.sample_aspect_ratio, self._spec.squeeze
        return ratio if squeeze == 1 else (ratio or 1) * squeeze

    @property
    def begin(self) -> int:
        """`start` in units of `info.time_base`, from the first frame of the file."""
        if self.info.time_base > self._file_info.time_base:
            # a coarser time base than the file's rounds timestamps down: see `even`
            return int(Fraction(self._selection.start) / self.info.time_base)
        return self._selection.start_ticks(self.info.time_base)

    @property
    def shift(self) -> Fraction:
        """Seconds that were added to the file's timestamps, so that none is below 0."""
        return self._source.shift

    def _frames(self, decoded_frames: Prefetcher[Stamped]) -> Iterator[Frame]:
        """Converted frames; then `notes` is complete."""
        last: tuple[VideoFrame, Frame] | None = None
        limit, count = self._selection.frames, 0
        for decoded, pts in decoded_frames:
            if last is None or last[0] is not decoded:  # a frame may be repeated
                try:
                    last = decoded, self._converter(decoded, pts)
                except (av.error.FFmpegError, MemoryError) as error:
                    raise VideoError(f"{self.path}: frame {count}: {error}") from error
            count += 1
            yield replace(last[1], pts=pts)
        if not count:
            start = float(self._selection.start)
            raise VideoError(f"{self.path}: no frame begins at {start:g} s or later")
        self.notes += self._source.notes(complete=limit is None or count < limit)

    def _selected(self) -> Iterator[Stamped]:
        """The frames that were asked for, with timestamps in units of `info.time_base`."""
        base = self._file_info.time_base
        start = self._selection.start_ticks(base)
        if start:
            start += round(self._file_info.start / base)
        frames = ((f, pts) for f, pts in self._source.frames(start) if pts >= start)
        if self._new_rate is not None:
            return even(frames, base, self._new_rate, self.info.time_base, self.path)
        return islice(frames, None, None, self._selection.stride)

    def _frame_spec(self) -> FrameSpec:
        info, selection = self._file_info, self._selection
        has_place = selection.channels == 4 or selection.alpha is not None
        if info.alpha and not self._source.opaque_until_seen and not has_place:
            raise VideoError(f"{self.path}: {ALPHA_LOST}")
        crop = selection.cut(info.height, info.width, self.path)
        cut_size = crop[2:] if crop else (info.height, info.width)
        return FrameSpec(
            size=selection.scaled(*cut_size),
            cut_size=cut_size,
            crop=crop,
            channels=selection.channels,
            alpha_beside=selection.alpha == "keep",
            deep=info.bit_depth > 8,
        )

    def _selected_info(self) -> VideoInfo:
        """What the file says, with the rate, time base and frame count of the selection."""
        info, selection = self._file_info, self._selection
        fps, base = info.fps / selection.stride, info.time_base
        if self._new_rate is not None:
            fps = self._new_rate
            base = finest(info.time_base, 1 / fps)
            if base.denominator > FRACTION_LIMIT:
                base = 1 / fps
        length = None
        if info.expected_frames is not None:
            seconds = info.expected_frames / info.fps - Fraction(selection.start)
            length = max(1, round(seconds * fps))
        if selection.frames is not None:
            length = min(selection.frames, length or selection.frames)
        whole = selection.frames is None and not selection.start and fps == info.fps
        return replace(info, fps=fps, time_base=base, frames=info.frames if whole else length)


def _reopen(kind: type[VideoReader], path: str, selection: Selection) -> VideoReader:
    options = {field.name: getattr(selection, field.name) for field in fields(selection)}
    return kind(path, **options)


def _open(path: str, selection: Selection) -> Source:
    if os.path.isdir(path):
        return open_folder(path, selection.rate)
    if is_animated_webp(path):
        return open_webp(path)
    alpha = selection.channels == 4 or selection.alpha == "keep"
    return open_pages(path, selection.rate) or ContainerReader(path, alpha, selection.raw)


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
    """A video as a tensor (1, C, T, H, W) in [-1, 1], and what its file says about itself.

    The whole clip lies in memory, float32 unless `dtype` says otherwise. `start`, `frames`,
    `stride`, `fps`, `size`, `crop`, `channels` and `alpha` select less of it, as in `VideoReader`,
    whose notes are in the info's.

    Raises `VideoError` as `VideoReader` does, and `ValueError` for `alpha="keep"` without
    `channels=4`.
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
