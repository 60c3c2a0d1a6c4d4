"""What the commands do, as functions: files in, files out."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch

from temporal_vae.evaluate import reconstruct_frames
from temporal_vae.files import atomic_path
from temporal_vae.model import StreamState, TemporalVAE
from temporal_vae.video import (
    Bytes,
    Frame,
    VideoError,
    VideoReader,
    VideoWriter,
    check_suffix,
    pad_frames,
    to_bytes,
    to_pixels,
)

PIECE_FRAMES = 8
PIECE_PIXELS = PIECE_FRAMES * 640 * 360
"""A stream takes in so many frames at a time, or as few as have so many pixels, at least one."""

NO_FRAMES: Bytes = np.empty((0, 1, 1, 3), np.uint8)

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


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises `ValueError` for a device that is not there.
    """
    if name.split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here: take auto") from error
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
    clip_frames: int | Literal["all"] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Encode a video to the posterior mean, decode it, and write the result.

    Frame count, size and timestamps are kept: frames are padded to whole latent cells by repeating
    their edge, and cropped back. The video is one clip, streamed, so that its length changes
    neither the result nor the memory. A model with a norm over the clip cannot stream: it walks
    clips of its own length. `clip_frames` cuts any model's video into clips of that length, or with
    "all" takes it as one.
    `target` appears whole or not at all.

    Raises `VideoError` for a source that cannot be read or a target that cannot be written.
    """
    check_suffix(target)
    exist = os.path.exists(source) and os.path.exists(target)
    if exist and os.path.samefile(source, target):
        raise VideoError(f"{os.fspath(source)} would be overwritten by its reconstruction")
    if model.input_channels != 3:
        raise VideoError(
            f"the model takes {model.input_channels} channels, video is read as 3 (RGB)"
        )
    length = clip_length(model, clip_frames)
    start, done = time.monotonic(), 0
    with VideoReader(source) as reader, atomic_path(target) as partial:
        info = reader.info
        size, rate = (info.height, info.width), (info.fps, info.time_base)
        with VideoWriter(partial, *size, *rate, info.sample_aspect_ratio) as writer:
            stamps: deque[int] = deque()
            piece = max(1, min(PIECE_FRAMES, PIECE_PIXELS // (info.height * info.width)))
            pieces = _pieces(iter(reader), length or piece, stamps)
            walk = _walk_stream(pieces, model) if length is None else _walk_clips(pieces, model)
            for images in walk:
                for image in images:
                    writer.write(image[: info.height, : info.width], stamps.popleft())
                done += len(images)
                if progress is not None:  # a frame taken in, and not given yet, is half done
                    progress(done + len(stamps) // 2, info.expected_frames)
            if info.sample_aspect_ratio not in (None, 1) and not writer.keeps_aspect:
                reader.notes.append(
                    f"the shape of its pixels, {info.sample_aspect_ratio}, is kept in .mp4 only"
                )
        notes = tuple(f"{os.fspath(source)}: {note}" for note in reader.notes)
    cut = None if length == sys.maxsize else length
    return Summary(done, time.monotonic() - start, cut, notes)


def clip_length(model: TemporalVAE, asked: int | Literal["all"] | None) -> int | None:
    """Frames of each clip; None for one clip that streams."""
    if asked not in (None, "all") and (type(asked) is not int or not 1 <= asked <= sys.maxsize):
        raise ValueError(f"clip_frames must be a number of frames or 'all', got {asked!r}")
    streams = model.encode_reach is not None and model.decode_reach is not None
    if asked == "all":
        return None if streams else sys.maxsize
    return asked or (None if streams else model.config.clip_frames)


def _pieces(frames: Iterator[Frame], length: int, stamps: deque[int]) -> Iterator[Bytes]:
    """uint8 (n, H, W, 3) of up to `length` frames; their timestamps are put into `stamps`."""
    while piece := list(islice(frames, length)):
        stamps.extend(frame.pts for frame in piece)
        yield np.stack([frame.image for frame in piece])


def _walk_clips(clips: Iterator[Bytes], model: TemporalVAE) -> Iterator[Bytes]:
    """Each clip on its own."""
    return (reconstruct_frames(clip, model) for clip in clips)


@torch.no_grad()
def _walk_stream(pieces: Iterator[Bytes], model: TemporalVAE) -> Iterator[Bytes]:
    """One clip in pieces, encoded and decoded; frames come padded, and late by the reach.

    Where nothing can be given yet it yields no frames, so that progress shows.
    """
    encoding: StreamState = ()
    decoding: StreamState = ()
    for piece in pieces:
        video = to_pixels(pad_frames(piece, model.downsample_factor))
        latents, encoding = model.encode_step(
            video.to(model.device, model.dtype), encoding, sample_mode=False
        )
        frames = None
        if latents is not None:
            frames, decoding = model.decode_step(latents, decoding)
        yield NO_FRAMES if frames is None else to_bytes(frames)
    owed = model.encode_finish(encoding, sample_mode=False)
    for latents in () if owed is None else owed.split(1, 2):
        frames, decoding = model.decode_step(latents, decoding)
        yield NO_FRAMES if frames is None else to_bytes(frames)
    if (frames := model.decode_finish(decoding)) is not None:
        yield to_bytes(frames)
