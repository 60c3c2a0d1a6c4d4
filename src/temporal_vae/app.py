"""What the commands do, as functions: files in, files out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from temporal_vae.files import atomic_path
from temporal_vae.geometry import Padding
from temporal_vae.model import TemporalVAE
from temporal_vae.video import (
    Bytes,
    Frame,
    VideoReader,
    VideoWriter,
    check_suffix,
    to_bytes,
    to_pixels,
)

CLIP_FRAMES = 16
"""Frames walked at a time when the model does not say."""

Progress = Callable[[int, int | None], None]
"""Called with the frames done and the frames the file claims to have, if it does."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did."""

    frames: int
    seconds: float
    clip_frames: int
    notes: tuple[str, ...]
    """What was not carried over, or could not be read; a line each."""


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises `ValueError` for a device that is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here: take auto, cpu or cuda") from error
    return device


def choose_dtype(name: str) -> torch.dtype:
    """float32, bfloat16, float16 or float64. Raises `ValueError` for another name."""
    dtypes = {str(d).removeprefix("torch."): d for d in _DTYPES}
    if name not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def reconstruct(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    model: TemporalVAE,
    clip_frames: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Encode a video to the posterior mean, decode it, and write the result.

    Frame count, size and timestamps are kept: frames are padded to whole latent cells by repeating
    their edge, and cropped back. The video is walked in clips of `clip_frames` frames (the model's
    own clip length, else 16), so memory does not grow with its length. `target` appears whole or
    not at all.

    Raises `VideoError` for a source that cannot be read or a target that cannot be written.
    """
    check_suffix(target)
    length = clip_frames or model.config.clip_frames or CLIP_FRAMES
    start, done = time.monotonic(), 0
    with VideoReader(source) as reader, atomic_path(target) as partial:
        info = reader.info
        size, rate = (info.height, info.width), (info.fps, info.time_base)
        with VideoWriter(partial, *size, *rate, info.sample_aspect_ratio) as writer:
            for clip in _clips(iter(reader), length):
                images = reconstruct_frames(np.stack([frame.image for frame in clip]), model)
                for frame, image in zip(clip, images, strict=True):
                    writer.write(image, frame.pts)
                done += len(clip)
                if progress is not None:
                    progress(done, info.frames)
    notes = (*info.notes, *([reader.loss] if reader.loss else []))
    return Summary(done, time.monotonic() - start, length, notes)


def reconstruct_frames(frames: Bytes, model: TemporalVAE) -> Bytes:
    """One clip, uint8 (T, H, W, 3) of any size, through the model and back to the same size."""
    _, height, width, _ = frames.shape
    video = to_pixels(pad_frames(frames, model.downsample_factor))
    return to_bytes(model.predict(video.to(model.device, model.dtype))[..., :height, :width])


def pad_frames(frames: Bytes, factor: int) -> Bytes:
    """Repeat the last row and column of uint8 (T, H, W, 3) up to multiples of `factor`."""
    padding = Padding.to_cells(frames.shape[1], frames.shape[2], factor)
    edges = ((0, 0), (0, padding.rows), (0, padding.columns), (0, 0))
    return np.pad(frames, edges, mode="edge")


def _clips(frames: Iterator[Frame], length: int) -> Iterator[list[Frame]]:
    clip: list[Frame] = []
    for frame in frames:
        clip.append(frame)
        if len(clip) == length:
            yield clip
            clip = []
    if clip:
        yield clip
