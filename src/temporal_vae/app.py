"""What the commands do, as functions: files in, files out."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from temporal_vae.files import atomic_path
from temporal_vae.geometry import Padding
from temporal_vae.model import TemporalVAE
from temporal_vae.video import (
    PIPE,
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
from temporal_vae.walks.available import available_bytes
from temporal_vae.walks.plan import Budget, Operation, Plan, parse_budget

PIECE_FRAMES = 8
PIECE_PIXELS = PIECE_FRAMES * 640 * 360
"""A stream takes in so many frames at a time, or as few as have so many pixels, at least one."""
PLANNED_PIECES = (32, 16, 8, 4, 2, 1)
"""With a budget: the most frames that fit."""
AUTO_SHARE = 0.8
"""Of the free memory that "auto" takes."""

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
    memory: Budget = None,
) -> Summary:
    """Encode a video to the posterior mean, decode it, and write the result.

    Frame count, size and timestamps are kept: frames are padded to whole latent cells by repeating
    their edge, and cropped back. The video is one clip, streamed, so that its length changes
    neither the result nor the memory. A model with a norm over the clip cannot stream: it walks
    clips of its own length. `clip_frames` cuts any model's video into clips of that length, or with
    "all" takes it as one.
    `memory` bounds what the model takes over its weights, reserved before the first frame: bytes,
    words such as "2GiB", "auto" for most of what is free, None for no bound; it never changes the
    result. `target` appears whole or not at all; "-" is standard input, and standard output.

    Raises `VideoError` for a source that cannot be read or a target that cannot be written,
    `ValueError` for memory that cannot do.
    """
    check_suffix(target)
    exist = os.path.exists(source) and os.path.exists(target)
    if exist and os.path.samefile(source, target):
        raise VideoError(f"{os.fspath(source)} would be overwritten by its reconstruction")
    if model.input_channels != 3:
        raise VideoError(
            f"the model takes {model.input_channels} channels, video is read as 3 (RGB)"
        )
    length, budget = clip_length(model, clip_frames), _memory(memory, model)
    start, done = time.monotonic(), 0
    with VideoReader(source) as reader, _writable(target) as partial:
        info = reader.info
        size, rate = (info.height, info.width), (info.fps, info.time_base)
        walk = _walk(iter(reader), model, length, size, budget)
        with VideoWriter(partial, *size, *rate, info.sample_aspect_ratio) as writer:
            for images in walk.frames:
                for image in images:
                    writer.write(image[: info.height, : info.width], walk.stamps.popleft())
                done += len(images)
                if progress is not None:  # a frame taken in, and not given yet, is half done
                    progress(done + len(walk.stamps) // 2, info.expected_frames)
            if info.sample_aspect_ratio not in (None, 1) and not writer.keeps_aspect:
                reader.notes.append(
                    f"the shape of its pixels, {info.sample_aspect_ratio}, is kept in .mp4 only"
                )
        notes = tuple(f"{os.fspath(source)}: {note}" for note in reader.notes)
    cut = None if length == sys.maxsize else length
    return Summary(done, time.monotonic() - start, cut, notes)


@contextmanager
def _writable(target: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """Where to write: a file that takes the target's name at the end, or standard output."""
    if os.fspath(target) == PIPE:
        yield PIPE
    else:
        with atomic_path(target) as partial:
            yield partial


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


# Memory --------------------------------------------------------------------------------------


def _memory(memory: Budget, model: TemporalVAE) -> int | Literal["least"] | None:
    """Bytes of a budget; "auto" is a share of what is free."""
    free = available_bytes(model.device)
    if memory != "auto":
        budget = parse_budget(memory)
        if isinstance(budget, int) and free is not None and budget > free:
            raise ValueError(f"{memory} is above the memory that is free, {free / 2**30:.3f} GiB")
        return budget
    if free is None:
        raise ValueError(f"how much memory is free on {model.device} is not known: give it in GiB")
    return int(AUTO_SHARE * free)


@dataclass(frozen=True, slots=True)
class StreamPlans:
    """How a video streams through encoder and decoder: pieces of `frames` frames."""

    frames: int
    encode: Plan
    decode: Plan
    beside: int
    """Bytes of frames that lie about while a piece is walked."""

    @property
    def peak_bytes(self) -> int:
        """Largest memory in use: the state of one stream waits while a step of the other runs."""
        encoding = self.encode.peak_bytes + self.decode.state_bytes
        return self.beside + max(encoding, self.decode.peak_bytes + self.encode.state_bytes)


def stream_plans(
    model: TemporalVAE, size: tuple[int, int], budget: int | Literal["least"]
) -> StreamPlans:
    """Plans for frames of (height, width), in whole cells, within a budget for both streams.

    Raises `ValueError` naming the smallest budget that can be met.
    """
    factor = model.downsample_factor
    cells = (size[0] // factor, size[1] // factor)

    def plan(operation: Operation, frames: int, budget: Budget) -> Plan:
        pixels = (1, model.input_channels, frames, *size)
        latents = (1, model.latent_channels, frames, *cells)
        shape = pixels if operation == "encode" else latents
        return model.plan(shape, operation, budget=budget, stream=True)

    encode, decode = plan("encode", 1, "least"), plan("decode", 1, "least")
    least = StreamPlans(1, encode, decode, _beside(model, 1, size))
    if budget == "least":
        return least
    for frames in PLANNED_PIECES:
        beside = _beside(model, frames, size)
        left = budget - beside
        with suppress(ValueError):
            encode = plan("encode", frames, left - least.decode.state_bytes)
            decode = plan("decode", frames, left - least.encode.state_bytes)
            return StreamPlans(frames, encode, decode, beside)
    needed = least.peak_bytes
    raise ValueError(
        f"{budget} bytes ({budget / 2**30:.3f} GiB) are below the least that a stream of "
        f"{size[1]}x{size[0]} can do with: {needed} bytes ({needed / 2**30:.3f} GiB)"
    )


def _beside(model: TemporalVAE, frames: int, size: tuple[int, int]) -> int:
    """Bytes of frames beside a walk: in 8 bits, and as the model takes them."""
    pixels = frames * size[0] * size[1] * 3
    return pixels * (3 + 4 + 2 * model.dtype.itemsize)


def clip_plans(
    model: TemporalVAE, shape: tuple[int, ...], budget: int | Literal["least"]
) -> tuple[Plan, Plan, int]:
    """Plans to encode and decode a clip (1, C, T, H, W), and the bytes for both, one at a time.

    Raises `ValueError` naming the smallest budget that can be met.
    """
    factor = model.downsample_factor
    latents = (1, model.latent_channels, shape[2], shape[3] // factor, shape[4] // factor)
    beside = _beside(model, shape[2], (shape[3], shape[4]))
    beside += math.prod(latents) * model.dtype.itemsize
    least = [model.plan(shape, "encode", budget="least"), model.plan(latents, budget="least")]
    needed = beside + max(plan.peak_bytes for plan in least)
    if isinstance(budget, int):
        if budget < needed:
            raise ValueError(
                f"{budget} bytes ({budget / 2**30:.3f} GiB) are below the least that a clip of "
                f"{shape[2]} frames of {shape[4]}x{shape[3]} can do with: {needed} bytes "
                f"({needed / 2**30:.3f} GiB)"
            )
        left = budget - beside
        least = [model.plan(shape, "encode", budget=left), model.plan(latents, budget=left)]
    encode, decode = least
    return encode, decode, beside + max(encode.peak_bytes, decode.peak_bytes)


def _reserve(size: int, device: torch.device) -> None:
    """Take memory and let it go: what cannot be had is missed now, not in the middle."""
    try:
        torch.empty(max(0, size), dtype=torch.uint8, device=device).fill_(0)
    except RuntimeError as error:  # torch's own for the CPU; for a GPU a kind of it
        raise ValueError(
            f"the walk needs {size} bytes ({size / 2**30:.3f} GiB), which cannot be had: give "
            "--memory less"
        ) from error


# Walks ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Walk:
    """Frames on their way through a model, uint8 (n, H, W, 3), and timestamps of those inside."""

    frames: Iterator[Bytes]
    stamps: deque[int]


def _walk(
    frames: Iterator[Frame],
    model: TemporalVAE,
    length: int | None,
    size: tuple[int, int],
    budget: int | Literal["least"] | None,
) -> Walk:
    """A video as one clip that streams, or where there is a length as clips of it."""
    stamps: deque[int] = deque()
    if length is not None:
        clips = _pieces(frames, length, stamps)
        return Walk(_walk_clips(clips, model, budget), stamps)
    padded = Padding.to_cells(*size, model.downsample_factor).padded
    if budget is None:
        piece = max(1, min(PIECE_FRAMES, PIECE_PIXELS // (size[0] * size[1])))
        return Walk(_walk_stream(_pieces(frames, piece, stamps), model, None, None), stamps)
    plans = stream_plans(model, padded, budget)
    _reserve(plans.peak_bytes, model.device)
    pieces = _pieces(frames, plans.frames, stamps)
    return Walk(_walk_stream(pieces, model, plans.encode, plans.decode), stamps)


@torch.no_grad()
def _walk_clips(
    clips: Iterator[Bytes], model: TemporalVAE, budget: int | Literal["least"] | None
) -> Iterator[Bytes]:
    """Each clip on its own, its frames as they are decoded."""
    encode: Plan | None = None
    decode: Plan | None = None
    for clip in clips:
        video = _padded_pixels(clip, model)
        if budget is not None and (encode is None or encode.shape != tuple(video.shape)):
            encode, decode, needed = clip_plans(model, tuple(video.shape), budget)
            _reserve(needed, model.device)
        latents = model.encode(video, sample_mode=False, plan=encode)
        del video
        yield from map(to_bytes, model.iter_decode(latents, plan=decode))


@torch.no_grad()
def _walk_stream(
    pieces: Iterator[Bytes], model: TemporalVAE, encode: Plan | None, decode: Plan | None
) -> Iterator[Bytes]:
    """One clip in pieces, encoded and decoded; frames come padded, and late by the reach.

    Where nothing can be given yet it yields no frames, so that progress shows.
    """
    encoder = model.encode_stream(sample_mode=False, plan=encode)
    decoder = model.decode_stream(plan=decode)
    for piece in pieces:
        latents = encoder.push(_padded_pixels(piece, model))
        frames = None if latents is None else decoder.push(latents)
        yield NO_FRAMES if frames is None else to_bytes(frames)
    for latents in encoder.drain():
        frames = decoder.push(latents)
        yield NO_FRAMES if frames is None else to_bytes(frames)
    yield from map(to_bytes, decoder.drain())


def _padded_pixels(frames: Bytes, model: TemporalVAE) -> Tensor:
    video = to_pixels(pad_frames(frames, model.downsample_factor))
    return video.to(model.device, model.dtype)
