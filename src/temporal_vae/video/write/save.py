"""Tensors to video files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING

from temporal_vae.files.atomic import atomic_folder, atomic_path
from temporal_vae.video.frames import PIPE, Colour, VideoInfo, exact_rate, to_bytes
from temporal_vae.video.write.formats import Format, choose, depth_for, depth_notes
from temporal_vae.video.write.writer import VideoWriter

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def writable(target: str | os.PathLike[str], format: Format | None = None) -> Iterator[str]:
    """Where to write: what takes the target's name at the end, file or folder, or "-".

    Raises `VideoError` for what cannot be written, `OSError` where the place does not take it.
    """
    if os.fspath(target) == PIPE:
        yield PIPE
    elif choose(target, format).name == "png":
        with atomic_folder(target) as folder:
            yield os.fspath(folder)
    else:
        with atomic_path(target) as file:
            yield os.fspath(file)


def save_video(
    video: Tensor,
    path: str | os.PathLike[str],
    info: VideoInfo | None = None,
    *,
    fps: float | Fraction | None = None,
    timestamps: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    codec: str | None = None,
    depth: int | None = None,
    quality: float | None = None,
    colour: Colour | None = None,
) -> tuple[str, ...]:
    """Write (1, C, T, H, W) or (C, T, H, W) in [-1, 1]; the file appears whole or not at all.

    The name chooses: .mp4 and .mov (H.264), .mkv (FFV1, lossless), .webm (VP9), .y4m, .rgb, a name
    without a suffix for a folder of PNG; `codec`, `depth` and `quality` as in `Format`. C is 1 for
    grey, 3 for RGB, 4 for RGB and alpha where the file can have it. Values beyond the range are
    clipped.

    `info`, as `load_video` gives it, is where rate, colours, shape of pixels and depth come from
    that are not given; without it `fps` is needed. `timestamps` are in units of `time_base`, which
    is 1 / fps unless given; frames are evenly spaced where there are none.

    Returns what the file does not keep, a line each. Raises `ValueError` for another shape, whole
    numbers and a rate that is none, and `VideoError` for what cannot be written.
    """
    clip = video if video.ndim == 5 else video[None]
    if clip.ndim != 5 or len(clip) != 1 or 0 in clip.shape:
        raise ValueError(
            f"a video is (1, C, T, H, W) or (C, T, H, W), got {tuple(video.shape)}: save the clips "
            "of a batch one by one"
        )
    if not clip.is_floating_point():
        raise ValueError(
            f"a video is in [-1, 1], not in {str(clip.dtype).removeprefix('torch.')}: bytes are "
            "frames.float() / 127.5 - 1"
        )
    _, channels, frames, height, width = clip.shape
    if fps is None and info is None:
        raise ValueError("fps says how fast the frames follow: give it, or an info that does")
    rate = exact_rate(fps) if fps is not None else info.fps if info is not None else Fraction(1)
    if timestamps is not None and len(timestamps) != frames:
        raise ValueError(f"{frames} frames need as many timestamps, got {len(timestamps)}")
    base = time_base or 1 / rate
    if timestamps is None:
        timestamps = [round(index / rate / base) for index in range(frames)]
    wanted = Format(codec=codec, depth=depth, quality=quality)
    source = 8 if info is None else info.bit_depth
    bits, lost = depth_for(path, wanted, source), depth_notes(path, wanted, source)
    format = Format(codec=codec, depth=bits, quality=quality)
    ratio = None
    if info is not None:
        colour = colour or info.colour
        same = (height, width) == (info.height, info.width)
        ratio = info.sample_aspect_ratio if same else None
    shape = (height, width, rate, base, ratio)
    with (
        writable(path, format) as partial,
        VideoWriter(partial, *shape, channels=channels, format=format, colour=colour) as writer,
    ):
        for index, stamp in enumerate(timestamps):
            image = to_bytes(clip[:, :, index : index + 1], 8 if bits == 8 else 16)[0]
            writer.write(image, stamp)
    return (*lost, *writer.notes)
