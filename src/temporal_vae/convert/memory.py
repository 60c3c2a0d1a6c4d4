"""What the commands need in memory: a walk, the frames beside it, and codecs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch

from temporal_vae.model import TemporalVAE
from temporal_vae.walks.budget import Budget, BudgetError, available_bytes, parse_budget
from temporal_vae.walks.peak import Operation
from temporal_vae.walks.plan import Plan

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


def stream_piece(
    model: TemporalVAE,
    operation: Operation,
    size: tuple[int, int],
    budget: int | Literal["least"] | None,
) -> tuple[int, Plan | None]:
    """Frames of a piece, and how it is walked, for one stream within a budget."""
    if budget is None:
        return piece_frames(size), None

    def within(frames: int) -> tuple[Plan, ...]:
        return (_fitting_plan(model, operation, frames, size, budget, stream=True)[0],)

    found = _largest_piece(within) if isinstance(budget, int) else None
    frames = found[0] if found else 1
    return frames, one_way_plan(model, operation, frames, size, budget, stream=True)[0]


def one_way_plan(
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


def piece_frames(size: tuple[int, int]) -> int:
    """Frames (height, width) of a piece of a stream that nothing bounds."""
    return max(1, min(PIECE_FRAMES, PIECE_PIXELS // (size[0] * size[1])))
