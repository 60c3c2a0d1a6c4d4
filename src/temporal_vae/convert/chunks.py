"""Frames of any number through a model in flat memory: pieces of a stream, or clips, as planned."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from temporal_vae.convert.memory import (
    clip_plans,
    one_way_plan,
    piece_frames,
    reserve,
    stream_piece,
    stream_plans,
)
from temporal_vae.geometry import Padding, spans
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Frame, Image, Uint8Frames, pad_frames, to_bytes, to_pixels
from temporal_vae.walks.plan import Plan
from temporal_vae.walks.runner import Stream

NO_FRAMES: Uint8Frames = np.empty((0, 1, 1, 3), np.uint8)


def clip_length(model: TemporalVAE, asked: int | Literal["all"] | None) -> int | None:
    """Frames of each clip; None for one clip that streams."""
    if asked not in (None, "all") and (type(asked) is not int or not 1 <= asked <= sys.maxsize):
        raise ValueError(f"clip_frames must be a number of frames or 'all', got {asked!r}")
    streams = model.encode_reach is not None and model.decode_reach is not None
    if asked == "all":
        return None if streams else sys.maxsize
    return asked or (None if streams else model.config.clip_frames)


def pieces_of(frames: Iterator[Frame], length: int, stamps: deque[int]) -> Iterator[Uint8Frames]:
    """uint8 (n, H, W, 3) of up to `length` frames; their timestamps are put into `stamps`."""
    while piece := list(islice(frames, length)):
        stamps.extend(frame.pts for frame in piece)
        yield np.stack([frame.image for frame in piece])


# Walks ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Walk:
    """Frames on their way through a model, (n, H, W, C), and timestamps of those inside."""

    frames: Iterator[Image]
    stamps: deque[int]


def start_walk(
    frames: Iterator[Frame],
    model: TemporalVAE,
    length: int | None,
    size: tuple[int, int],
    budget: int | Literal["least"] | None,
    depth: int = 8,
) -> Walk:
    """A video as one clip that streams, or where there is a length as clips of it.

    Frames come out in a depth of 8 or 16 bits.
    """
    stamps: deque[int] = deque()
    if length is not None:
        clips = pieces_of(frames, length, stamps)
        return Walk(_walk_clips(clips, model, budget, depth), stamps)
    padded = Padding.to_cells(*size, model.downsample_factor).padded
    if budget is None:
        pieces = pieces_of(frames, piece_frames(size), stamps)
        return Walk(_walk_stream(pieces, model, None, None, depth), stamps)
    plans = stream_plans(model, padded, budget)
    reserve(plans.walk_bytes, model.device)
    pieces = pieces_of(frames, plans.frames, stamps)
    return Walk(_walk_stream(pieces, model, plans.encode, plans.decode, depth), stamps)


@torch.no_grad()
def _walk_clips(
    clips: Iterator[Image],
    model: TemporalVAE,
    budget: int | Literal["least"] | None,
    depth: int = 8,
) -> Iterator[Image]:
    """Each clip on its own, its frames as they are decoded."""
    encode: Plan | None = None
    decode: Plan | None = None
    for clip in clips:
        video = _padded_pixels(clip, model)
        if budget is not None and (encode is None or encode.shape != tuple(video.shape)):
            encode, decode, needed = clip_plans(model, tuple(video.shape), budget)
            reserve(needed.reserved, model.device)
            budget = needed.settle(budget)
        latents = model.encode(video, sample_mode=False, plan=encode)
        del video
        for frames in model.iter_decode(latents, plan=decode):
            yield to_bytes(frames, depth)


def _walk_stream(
    pieces: Iterator[Image],
    model: TemporalVAE,
    encode: Plan | None,
    decode: Plan | None,
    depth: int = 8,
) -> Iterator[Image]:
    """One clip in pieces, encoded and decoded; frames come padded, and late by the reach."""
    latents = _encode_pieces(pieces, model, model.encode_stream(sample_mode=False, plan=encode))
    return _decode_pieces(_joined(latents), model.decode_stream(plan=decode), depth)


def _joined(latents: Iterator[Tensor | None]) -> Iterator[Tensor | None]:
    """Pieces of latents as large as the first ones: those at the end come in bits."""
    waiting: list[Tensor] = []
    full = 0
    for piece in latents:
        if piece is None:
            yield None
            continue
        waiting.append(piece)
        full = max(full, piece.shape[2])
        if sum(part.shape[2] for part in waiting) >= full:
            joined = torch.cat(waiting, 2)
            yield joined[:, :, :full]
            waiting = [joined[:, :, full:]] if joined.shape[2] > full else []
    if waiting:
        yield torch.cat(waiting, 2)


@torch.no_grad()
def _encode_pieces(
    pieces: Iterator[Uint8Frames], model: TemporalVAE, stream: Stream
) -> Iterator[Tensor | None]:
    """What a stream gives of each piece, None where that is nothing yet, so that progress shows."""
    for piece in pieces:
        yield stream.push(_padded_pixels(piece, model))
    yield from stream.flush()


@torch.no_grad()
def _decode_pieces(
    pieces: Iterable[Tensor | None], stream: Stream, depth: int = 8
) -> Iterator[Image]:
    """Frames of each piece of latents, none where none can be given yet; see `_encode_pieces`."""
    for latents in pieces:
        frames = None if latents is None else stream.push(latents)
        yield NO_FRAMES if frames is None else to_bytes(frames, depth)
        del latents, frames  # or they would be there during the next step
    for frames in stream.flush():
        yield to_bytes(frames, depth)
        del frames


# One way -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LatentWalk:
    """Latents on their way out of a model, and timestamps of the frames inside.

    (1, 2*L, n, h, w) of moments, (1, L, n, h, w) of samples; None where nothing comes yet.
    """

    latents: Iterator[Tensor | None]
    stamps: deque[int]


def encode_walk(
    frames: Iterator[Frame],
    model: TemporalVAE,
    length: int | None,
    size: tuple[int, int],
    budget: int | Literal["least"] | None,
    generator: torch.Generator | None,
) -> LatentWalk:
    """The first half of `start_walk`: moments of the frames, or with a generator samples."""
    stamps: deque[int] = deque()
    if length is not None:
        clips = pieces_of(frames, length, stamps)
        return LatentWalk(_encode_clips(clips, model, budget, generator), stamps)
    padded = Padding.to_cells(*size, model.downsample_factor).padded
    piece, plan = stream_piece(model, "encode", padded, budget)
    if generator is None:
        stream = model.moments_stream(plan)
    else:
        stream = model.encode_stream(True, generator, plan)
    return LatentWalk(_encode_pieces(pieces_of(frames, piece, stamps), model, stream), stamps)


@torch.no_grad()
def _encode_clips(
    clips: Iterator[Uint8Frames],
    model: TemporalVAE,
    budget: int | Literal["least"] | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    plan: Plan | None = None
    for clip in clips:
        video = _padded_pixels(clip, model)
        if plan is None or plan.shape != tuple(video.shape):
            size = (video.shape[3], video.shape[4])
            plan, budget = one_way_plan(model, "encode", len(clip), size, budget, stream=False)
        if generator is None:
            yield torch.cat(model.encode_with_distribution(video, plan=plan), 1)
        else:
            yield model.encode(video, True, generator, plan=plan)


def decode_walk(
    read: Callable[[int, int], Tensor],
    frames: int,
    model: TemporalVAE,
    length: int | None,
    cells: tuple[int, int],
    budget: int | Literal["least"] | None,
    depth: int = 8,
) -> Iterator[Image]:
    """The second half of `start_walk`: padded frames of the latents that `read` gives.

    `read(start, count)` gives unscaled latents (1, L, count, h, w).
    """
    size = (cells[0] * model.downsample_factor, cells[1] * model.downsample_factor)

    def pieces(step: int) -> Iterator[Tensor]:
        for start, end in spans(frames, step):
            yield read(start, end - start).to(model.device, model.dtype)

    if length is not None:
        return _decode_clips(pieces(length), model, size, budget, depth)
    piece, plan = stream_piece(model, "decode", size, budget)
    return _decode_pieces(pieces(piece), model.decode_stream(plan), depth)


@torch.no_grad()
def _decode_clips(
    clips: Iterator[Tensor],
    model: TemporalVAE,
    size: tuple[int, int],
    budget: int | Literal["least"] | None,
    depth: int,
) -> Iterator[Image]:
    plan: Plan | None = None
    for latents in clips:
        if plan is None or plan.shape != tuple(latents.shape):
            length = latents.shape[2]
            plan, budget = one_way_plan(model, "decode", length, size, budget, stream=False)
        for frames in model.iter_decode(latents, plan=plan):
            yield to_bytes(frames, depth)


def _padded_pixels(frames: Uint8Frames, model: TemporalVAE) -> Tensor:
    video = to_pixels(pad_frames(frames, model.downsample_factor))
    return video.to(model.device, model.dtype)
