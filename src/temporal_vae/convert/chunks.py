"""Frames of any number through a model in flat memory: pieces of a stream, or clips, as planned."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from temporal_vae.convert.memory import PiecePlanner
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Frame, Image, pad_frames, to_bytes, to_pixels
from temporal_vae.walks.runner import Stream

T = TypeVar("T", Tensor, Image)


def clip_length(model: TemporalVAE, asked: int | Literal["all"] | None) -> int | None:
    """Frames of each clip; None for one clip that streams."""
    if asked not in (None, "all") and (type(asked) is not int or not 1 <= asked <= sys.maxsize):
        raise ValueError(f"clip_frames must be a number of frames or 'all', got {asked!r}")
    streams = model.encode_reach is not None and model.decode_reach is not None
    if asked == "all":
        return None if streams else sys.maxsize
    return asked or (None if streams else model.config.clip_frames)


@dataclass(frozen=True, slots=True)
class Walk(Generic[T]):
    """Pieces of a video on their way, and the timestamps of frames that have not come out yet.

    Pieces are latents (1, C, n, h, w), or frames (n, H, W, C) in whole latent cells; None where a
    step of a stream gives nothing yet, so that progress shows.
    """

    pieces: Iterator[T | None]
    stamps: deque[int]
    planner: PiecePlanner

    def take(self, frames: int) -> list[int]:
        """The timestamps of the next frames; of fewer where a latent is not full.

        That is the first, which holds one frame, and the last, which is filled up. Raises
        `RuntimeError` where more of them are missing: frames would be lost without a word.
        """
        spare = 2 * (self.planner.model.frames_per_latent - 1)
        if frames - len(self.stamps) > spare:
            raise RuntimeError(
                f"the walk gave {frames} frames where {len(self.stamps)} timestamps are left"
            )
        return [self.stamps.popleft() for _ in range(min(frames, len(self.stamps)))]


def counted(frames: Iterator[Frame], most: int) -> tuple[Iterator[Frame], int | None]:
    """The same frames, and their number if there are no more than `most`, which are read ahead."""
    first = list(islice(frames, most + 1))
    return chain(first, frames), len(first) if 0 < len(first) <= most else None


def encode_walk(
    frames: Iterator[Frame],
    planner: PiecePlanner,
    generator: torch.Generator | None = None,
    *,
    moments: bool = False,
) -> Walk[Tensor]:
    """The latents of a video: the mean of each, or with a generator a sample.

    With `moments` both mean and log-variance, (1, 2*L, n, h, w).
    """
    stamps: deque[int] = deque()
    model, sampled = planner.model, generator is not None

    def encode(clip: Tensor) -> Tensor:
        plan = planner.pieces(model.latent_frames(clip.shape[2])).plans.get("encode")
        if moments:
            return torch.cat(model.encode_with_distribution(clip, plan=plan), 1)
        return model.encode(clip, sampled, generator, plan=plan)

    @torch.no_grad()
    def stepwise(stream: Stream | None) -> Iterator[Tensor | None]:
        step = encode if stream is None else stream.push
        for index, length in enumerate(planner.lengths()):
            piece = list(islice(frames, length))
            if not piece:
                break
            stamps.extend(frame.pts for frame in piece)
            _, missing = planner.filled(len(piece), index == 0)
            piece += piece[-1:] * missing
            images = np.stack([frame.image for frame in piece])
            padded = pad_frames(images, model.downsample_factor)
            yield step(to_pixels(padded).to(model.device, model.dtype))
        yield from () if stream is None else stream.flush()

    if planner.clip_frames is not None:
        return Walk(stepwise(None), stamps, planner)
    plan = planner.pieces().plans.get("encode")
    if moments:
        return Walk(stepwise(model.moments_stream(plan)), stamps, planner)
    return Walk(stepwise(model.encode_stream(sampled, generator, plan)), stamps, planner)


def decode_walk(latents: Walk[Tensor], planner: PiecePlanner, depth: int = 8) -> Walk[Image]:
    """The frames of unscaled latents (1, L, n, h, w): uint8, or uint16 for more than 8 bits."""
    depth = 8 if depth == 8 else 16
    if planner.clip_frames is not None:
        return Walk(_decode_clips(latents.pieces, planner, depth), latents.stamps, planner)
    stream = planner.model.decode_stream(planner.pieces().plans.get("decode"))
    pieces = _decode_stream(_joined(latents.pieces), stream, depth)
    return Walk(pieces, latents.stamps, planner)


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
def _decode_stream(
    pieces: Iterator[Tensor | None], stream: Stream, depth: int
) -> Iterator[Image | None]:
    for latents in pieces:
        frames = None if latents is None else stream.push(latents)
        yield None if frames is None else to_bytes(frames, depth)
        del latents, frames  # or they would be there during the next step
    for frames in stream.flush():
        yield to_bytes(frames, depth)
        del frames


@torch.no_grad()
def _decode_clips(
    clips: Iterator[Tensor | None], planner: PiecePlanner, depth: int
) -> Iterator[Image]:
    for latents in clips:
        assert latents is not None
        plan = planner.pieces(latents.shape[2]).plans.get("decode")
        for frames in planner.model.iter_decode(latents, plan=plan):
            yield to_bytes(frames, depth)
