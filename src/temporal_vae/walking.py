"""Frames of any number through a model in flat memory: pieces of a stream, or clips, as planned."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from temporal_vae.geometry import Padding, spans
from temporal_vae.model import Stream, TemporalVAE
from temporal_vae.video import Bytes, Frame, Image, pad_frames, to_bytes, to_pixels
from temporal_vae.walks.available import available_bytes
from temporal_vae.walks.plan import Budget, BudgetError, Operation, Plan, parse_budget

PIECE_FRAMES = 8
PIECE_PIXELS = PIECE_FRAMES * 640 * 360
"""A stream takes in so many frames at a time, or as few as have so many pixels, at least one."""
PLANNED_PIECES = (32, 16, 8, 4, 2)
"""With a budget: the most frames that fit whole, or if not even one does, that fit in bands."""
AUTO_SHARE = 0.8
"""Of the free memory that "auto" takes."""

HEAP_PERCENT = 12
"""Of what a walk takes, that the command's allocator loses between blocks: 5 to 10 were seen."""
CODEC_BYTES = 24 * 2**20
"""What codecs, their threads and their libraries hold, however small the frames."""
CODEC_BYTES_A_PIXEL = 1.5
"""A codec's frame takes so many."""
LOOKED_AHEAD = 60
"""Frames that an encoder holds."""

NO_FRAMES: Bytes = np.empty((0, 1, 1, 3), np.uint8)


def clip_length(model: TemporalVAE, asked: int | Literal["all"] | None) -> int | None:
    """Frames of each clip; None for one clip that streams."""
    if asked not in (None, "all") and (type(asked) is not int or not 1 <= asked <= sys.maxsize):
        raise ValueError(f"clip_frames must be a number of frames or 'all', got {asked!r}")
    streams = model.encode_reach is not None and model.decode_reach is not None
    if asked == "all":
        return None if streams else sys.maxsize
    return asked or (None if streams else model.config.clip_frames)


def pieces_of(frames: Iterator[Frame], length: int, stamps: deque[int]) -> Iterator[Bytes]:
    """uint8 (n, H, W, 3) of up to `length` frames; their timestamps are put into `stamps`."""
    while piece := list(islice(frames, length)):
        stamps.extend(frame.pts for frame in piece)
        yield np.stack([frame.image for frame in piece])


# Memory --------------------------------------------------------------------------------------


def memory_budget(memory: Budget, model: TemporalVAE) -> int | Literal["least"] | None:
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


class Needed(NamedTuple):
    """Bytes that a walk with all beside it takes."""

    reserved: int
    """To reserve before it begins."""
    total: int

    def settle(self, budget: int | Literal["least"]) -> int | Literal["least"]:
        """The budget of further clips, none longer: what this process has by now.

        Meanwhile others may have taken what was free, of the budget too.
        """
        return budget if budget == "least" else min(budget, self.total)


class Beside(NamedTuple):
    """What the command takes beside the walk of a plan."""

    frames: int
    """Bytes of frames that lie about while a piece is walked."""
    codecs: int
    """Bytes that reading and writing the video takes."""
    heap_percent: int
    """Of a walk, what the allocator loses between blocks."""

    def reserved(self, walk: int) -> int:
        """Bytes to reserve for a walk and the frames beside it."""
        size = walk + self.frames
        return size + -(-size * self.heap_percent // 100)

    def total(self, walk: int) -> int:
        """Bytes of all together."""
        return self.reserved(walk) + self.codecs

    def needed(self, walk: int) -> Needed:
        """Both."""
        return Needed(self.reserved(walk), self.total(walk))

    def left(self, budget: int) -> int:
        """Bytes that a walk may take for all to be within a budget."""
        return (budget - self.codecs) * 100 // (100 + self.heap_percent) - self.frames

    @classmethod
    def of(
        cls, model: TemporalVAE, frames: int, size: tuple[int, int], looked_ahead: int
    ) -> Beside:
        """For pieces of frames of (height, width), and an encoder that looks so many ahead."""
        pixels = size[0] * size[1]
        # in up to 16 bits, and as the model takes them
        taken = frames * pixels * model.input_channels * (6 + 4 + 2 * model.dtype.itemsize)
        if model.device.type != "cpu":  # codecs and the heap are not of its memory
            return cls(taken, 0, 0)
        codecs = CODEC_BYTES + int(looked_ahead * pixels * CODEC_BYTES_A_PIXEL)
        return cls(taken, codecs, HEAP_PERCENT)


@dataclass(frozen=True, slots=True)
class StreamPlans:
    """How a video streams through encoder and decoder: pieces of `frames` frames."""

    frames: int
    encode: Plan
    decode: Plan
    beside: Beside

    @property
    def peak_bytes(self) -> int:
        """Largest memory in use."""
        return self.beside.total(self._both_bytes)

    @property
    def walk_bytes(self) -> int:
        """That of the walk alone."""
        return self.beside.reserved(self._both_bytes)

    @property
    def _both_bytes(self) -> int:
        """The state of one stream waits while a step of the other runs."""
        encoding = self.encode.peak_bytes + self.decode.state_bytes
        return max(encoding, self.decode.peak_bytes + self.encode.state_bytes)


def stream_plans(
    model: TemporalVAE, size: tuple[int, int], budget: int | Literal["least"]
) -> StreamPlans:
    """Plans for frames of (height, width), in whole cells, within a budget for both streams.

    Raises `BudgetError` naming the smallest budget that can be met.
    """
    factor = model.downsample_factor
    cells = (size[0] // factor, size[1] // factor)
    keeps = _keeps_states(model)

    def plan(operation: Operation, frames: int, budget: Budget) -> Plan:
        pixels = (1, model.input_channels, frames, *size)
        latents = (1, model.latent_channels, frames, *cells)
        shape = pixels if operation == "encode" else latents
        return model.plan(shape, operation, budget=budget, stream=True, keep_state=keeps)

    def beside(frames: int) -> Beside:
        return Beside.of(model, frames, size, LOOKED_AHEAD)

    if budget == "least":
        return StreamPlans(1, plan("encode", 1, "least"), plan("decode", 1, "least"), beside(1))
    encoder_state = plan("encode", 1, None).state_bytes
    decoder_state = plan("decode", 1, None).state_bytes

    def within(frames: int) -> tuple[Plan, Plan]:
        left = beside(frames).left(budget)
        encode = plan("encode", frames, max(1, left - decoder_state))
        return encode, plan("decode", frames, max(1, left - encoder_state))

    if found := _largest_piece(within):
        frames, (encode, decode) = found
        return StreamPlans(frames, encode, decode, beside(frames))
    encoding = _least(partial(plan, "encode", 1)) + decoder_state
    decoding = _least(partial(plan, "decode", 1)) + encoder_state
    raise _too_little(budget, beside(1).total(max(encoding, decoding)), "a stream", size)


def _largest_piece(
    within: Callable[[int], tuple[Plan, ...]],
) -> tuple[int, tuple[Plan, ...]] | None:
    """The best of `PLANNED_PIECES`, and what `within` plans for it; None when none fits.

    `within` raises `BudgetError` for what does not fit.
    """

    def planned(frames: int) -> tuple[Plan, ...]:
        with suppress(BudgetError):
            return within(frames)
        return ()

    one = planned(1)
    if not one:
        return None
    hopeless = any(plan.banded for plan in one)
    for frames in PLANNED_PIECES:
        plans = planned(frames)
        if plans and (hopeless or not any(plan.banded for plan in plans)):
            return frames, plans
    return 1, one


def _keeps_states(model: TemporalVAE) -> bool:
    """Whether steps keep the state before: a GPU that runs out of memory tries a step again."""
    return model.device.type != "cpu"


def _least(plan: Callable[[Budget], Plan]) -> int:
    """The smallest budget that can be met."""
    try:
        return plan(1).peak_bytes
    except BudgetError as error:
        return error.least


def _too_little(budget: int, least: int, what: str, size: tuple[int, int]) -> BudgetError:
    return BudgetError(
        f"{budget} bytes ({budget / 2**30:.3f} GiB) are below the least that {what} of "
        f"{size[1]}x{size[0]} can do with: {least} bytes ({least / 2**30:.3f} GiB)",
        least,
    )


def clip_plans(
    model: TemporalVAE, shape: tuple[int, ...], budget: int | Literal["least"]
) -> tuple[Plan, Plan, Needed]:
    """Plans to encode and decode a clip (1, C, T, H, W), and what they need.

    Raises `BudgetError` naming the smallest budget that can be met.
    """
    factor, size = model.downsample_factor, (shape[3], shape[4])
    latents = (1, model.latent_channels, shape[2], size[0] // factor, size[1] // factor)
    beside = Beside.of(model, shape[2], size, LOOKED_AHEAD)
    held = math.prod(latents) * model.dtype.itemsize
    encode, decode = partial(model.plan, shape, "encode"), partial(model.plan, latents, "decode")

    def planned(budget: Budget) -> tuple[Plan, Plan]:
        return encode(budget=budget), decode(budget=budget)

    if budget == "least":
        plans = planned(budget)
    else:
        try:
            plans = planned(max(1, beside.left(budget) - held))
        except BudgetError:
            both = max(_least(lambda n: encode(budget=n)), _least(lambda n: decode(budget=n)))
            what = f"a clip of {shape[2]} frames"
            raise _too_little(budget, beside.total(held + both), what, size) from None
    return *plans, beside.needed(held + max(plan.peak_bytes for plan in plans))


def reserve(size: int, device: torch.device) -> None:
    """Take memory and let it go: what cannot be had is missed now, not in the middle."""
    needs = f"the walk needs {size} bytes ({size / 2**30:.3f} GiB)"
    free = available_bytes(device)
    if free is not None and size > free:  # Linux would give it, and end the process when it is used
        raise ValueError(f"{needs}, and {free / 2**30:.3f} GiB are free: give --memory less")
    try:
        torch.empty(max(0, size), dtype=torch.uint8, device=device).fill_(0)
    except RuntimeError as error:  # torch's own for the CPU; for a GPU a kind of it
        raise ValueError(f"{needs}, which cannot be had: give --memory less") from error


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
        pieces = pieces_of(frames, _piece_frames(size), stamps)
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
    pieces: Iterator[Bytes], model: TemporalVAE, stream: Stream
) -> Iterator[Tensor | None]:
    """What a stream gives of each piece, None where that is nothing yet, so that progress shows."""
    for piece in pieces:
        yield stream.push(_padded_pixels(piece, model))
    yield from stream.drain()


@torch.no_grad()
def _decode_pieces(
    pieces: Iterable[Tensor | None], stream: Stream, depth: int = 8
) -> Iterator[Image]:
    """Frames of each piece of latents, none where none can be given yet; see `_encode_pieces`."""
    for latents in pieces:
        frames = None if latents is None else stream.push(latents)
        yield NO_FRAMES if frames is None else to_bytes(frames, depth)
        del latents, frames  # or they would be there during the next step
    for frames in stream.drain():
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
    piece, plan = _stream_piece(model, "encode", padded, budget)
    if generator is None:
        stream = model.moments_stream(plan)
    else:
        stream = model.encode_stream(True, generator, plan)
    return LatentWalk(_encode_pieces(pieces_of(frames, piece, stamps), model, stream), stamps)


@torch.no_grad()
def _encode_clips(
    clips: Iterator[Bytes],
    model: TemporalVAE,
    budget: int | Literal["least"] | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    plan: Plan | None = None
    for clip in clips:
        video = _padded_pixels(clip, model)
        if plan is None or plan.shape != tuple(video.shape):
            size = (video.shape[3], video.shape[4])
            plan, budget = _one_way_plan(model, "encode", len(clip), size, budget, stream=False)
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
    piece, plan = _stream_piece(model, "decode", size, budget)
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
            plan, budget = _one_way_plan(model, "decode", length, size, budget, stream=False)
        for frames in model.iter_decode(latents, plan=plan):
            yield to_bytes(frames, depth)


def _stream_piece(
    model: TemporalVAE,
    operation: Operation,
    size: tuple[int, int],
    budget: int | Literal["least"] | None,
) -> tuple[int, Plan | None]:
    """Frames of a piece, and how it is walked, for one stream within a budget."""
    if budget is None:
        return _piece_frames(size), None

    def within(frames: int) -> tuple[Plan, ...]:
        return (_fitting_plan(model, operation, frames, size, budget, stream=True)[0],)

    found = _largest_piece(within) if isinstance(budget, int) else None
    frames = found[0] if found else 1
    return frames, _one_way_plan(model, operation, frames, size, budget, stream=True)[0]


def _one_way_plan(
    model: TemporalVAE,
    operation: Operation,
    frames: int,
    size: tuple[int, int],
    budget: int | Literal["least"] | None,
    *,
    stream: bool,
) -> tuple[Plan | None, int | Literal["least"] | None]:
    """A plan whose memory, with that of the frames beside it, is within the budget and reserved.

    And the budget for further clips.
    """
    if budget is None:
        return None, None
    plan, needed = _fitting_plan(model, operation, frames, size, budget, stream=stream)
    reserve(needed.reserved, model.device)
    return plan, needed.settle(budget)


def _fitting_plan(
    model: TemporalVAE,
    operation: Operation,
    frames: int,
    size: tuple[int, int],
    budget: int | Literal["least"],
    *,
    stream: bool,
) -> tuple[Plan, Needed]:
    """A plan, and what it needs with the frames beside it.

    Raises `BudgetError` naming the smallest budget that can be met.
    """
    factor = model.downsample_factor
    shape = (1, model.input_channels, frames, *size)
    if operation == "decode":
        shape = (1, model.latent_channels, frames, size[0] // factor, size[1] // factor)
    beside = Beside.of(model, frames, size, LOOKED_AHEAD if operation == "decode" else 0)
    keeps = _keeps_states(model)

    def planned(budget: Budget) -> Plan:
        return model.plan(shape, operation, budget=budget, stream=stream, keep_state=keeps)

    try:
        plan = planned(budget if budget == "least" else max(1, beside.left(budget)))
    except BudgetError as error:
        assert isinstance(budget, int)
        what = "a stream" if stream else f"a clip of {frames} frames"
        raise _too_little(budget, beside.total(error.least), what, size) from None
    return plan, beside.needed(plan.peak_bytes)


def _piece_frames(size: tuple[int, int]) -> int:
    """Frames (height, width) of a piece of a stream that nothing bounds."""
    return max(1, min(PIECE_FRAMES, PIECE_PIXELS // (size[0] * size[1])))


def _padded_pixels(frames: Bytes, model: TemporalVAE) -> Tensor:
    video = to_pixels(pad_frames(frames, model.downsample_factor))
    return video.to(model.device, model.dtype)
