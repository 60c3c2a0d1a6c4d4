"""`save_video`: a tensor to a video file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from temporal_vae.files.atomic import atomic_folder, atomic_path
from temporal_vae.video.frames import PIPE, Colour, VideoInfo, exact_rate, to_bytes
from temporal_vae.video.write.formats import FOLDER, Format, choose, depth_for, depth_notes
from temporal_vae.video.write.writer import VideoWriter

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def writable(
    target: str | os.PathLike[str], format: Format | None = None, replace: bool = True
) -> Iterator[str]:
    """A temporary path to write to, which takes the name of `target` when the block ends.

    It is a file or a folder, as the format asks; "-" stays "-". A file that somebody else has made
    meanwhile is kept unless `replace`, see `atomic_path`. Raises `VideoError` for a name or
    format that cannot be written, and `OSError` where no file can be made in that place.
    """
    if os.fspath(target) == PIPE:
        yield PIPE
    elif choose(target, format).suffix == FOLDER:
        with atomic_folder(target) as folder:
            yield os.fspath(folder)
    else:
        with atomic_path(target, replace) as file:
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

    The name chooses: .mp4 and .mov (H.264), .mkv (FFV1, lossless), .webm (VP9), .gif, .webp,
    .y4m, .rgb, .png and .jpg for one frame, a name without a suffix for a folder of PNG;
    `codec`, `depth` and `quality` as in `Format`. C is 1 for grey, 3 for RGB, 4 for RGB and
    alpha where the file can have it. Values out of range are clipped.

    Rate, colours, pixel aspect ratio and depth are those of `info`, as `load_video` gives it, where
    they are not given; without `info`, `fps` is needed. `timestamps` are in units of `time_base`,
    which is 1 / fps by default; without them frames are evenly spaced.

    Returns what the file does not keep, one line each. Raises `ValueError` for a tensor of another
    shape or of integers, a rate out of range or timestamps that are not one for each frame, and
    `VideoError` for what cannot be written.
    """
    clip = _checked_clip(video)
    channels, frames, height, width = clip.shape
    rate = _rate(fps, info)
    base = time_base or 1 / rate
    if timestamps is None:
        timestamps = [round(index / rate / base) for index in range(frames)]
    if len(timestamps) != frames:
        raise ValueError(f"{frames} frames need as many timestamps, got {len(timestamps)}")
    format, bits, ratio = Format(codec=codec, depth=depth, quality=quality), 8, None
    if info is not None:
        colour, bits = colour or info.colour, info.bit_depth
        if (height, width) == (info.height, info.width):
            ratio = info.sample_aspect_ratio
    choose(path, format).check_frames(frames)
    lost = depth_notes(path, format, bits)
    format = replace(format, depth=depth_for(path, format, bits))
    sizes = (height, width, rate, base, ratio)
    with (
        writable(path, format) as partial,
        VideoWriter(partial, *sizes, channels=channels, format=format, colour=colour) as writer,
    ):
        for index, stamp in enumerate(timestamps):
            frame = clip[None, :, index : index + 1]
            writer.write(to_bytes(frame, 8 if format.depth == 8 else 16)[0], stamp)
    return (*lost, *writer.notes)


def _checked_clip(video: Tensor) -> Tensor:
    """(1, C, T, H, W) or (C, T, H, W) -> (C, T, H, W), of floats."""
    import torch  # here, since reading and writing frames do without it

    if not isinstance(video, torch.Tensor):
        raise ValueError(
            f"a video is a torch.Tensor in [-1, 1], got {type(video).__name__}: frames of bytes, "
            "(H, W, C), become one with "
            "torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 127.5 - 1"
        )
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
    return clip[0]


def _rate(fps: float | Fraction | None, info: VideoInfo | None) -> Fraction:
    if fps is not None:
        return exact_rate(fps)
    if info is None:
        raise ValueError("the frame rate, fps, is missing: give it, or an info that has it")
    return info.fps
