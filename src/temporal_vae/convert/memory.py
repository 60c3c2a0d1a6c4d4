"""How long the pieces of a video are, and how they are walked, so that a budget holds for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from temporal_vae.geometry import Padding
from temporal_vae.model import TemporalVAE
from temporal_vae.walks import budget, stages
from temporal_vae.walks import plan as planning
from temporal_vae.walks.budget import BudgetError, Limit, in_words
from temporal_vae.walks.peak import Operation
from temporal_vae.walks.plan import Plan

PIECE_FRAMES = 8
PIECE_PIXELS = PIECE_FRAMES * 640 * 360
"""A stream without a budget takes in so many frames at a time, or as few as have so many pixels, at
least one."""
SHORT_CLIPS = (16, 4, 1)
"""Frames of clips that are proposed where memory is too little."""
PLANNED_PIECES = (32, 16, 8, 4, 2)
"""Frames of a piece that are tried for a stream with a budget; one if none of them fits."""

CODEC_BYTES = 24 * 2**20
"""What codecs, their threads and their libraries hold, however small the frames."""
CODEC_BYTES_A_PIXEL = 1.5
"""Bytes for each pixel of a frame that an encoder of videos holds."""
LOOKED_AHEAD = 60
"""Frames that an encoder of videos holds at a time, to look ahead."""


class Overhead(NamedTuple):
    """What the command takes beside the walk of a piece."""

    frames: int
    """Bytes of the piece's frames, in the forms they have on their way to the model."""
    codecs: int
    """Bytes that reading and writing the video takes."""

    def reserved(self, walk: int) -> int:
        """Bytes to reserve for a walk of so many: all but the codecs."""
        return walk + self.frames

    def total(self, walk: int) -> int:
        """Bytes of all together."""
        return self.reserved(walk) + self.codecs

    def left(self, limit: int) -> int:
        """Bytes that a walk may take for all to be within a limit."""
        return limit - self.codecs - self.frames

    @classmethod
    def of(
        cls, model: TemporalVAE, frames: int, size: tuple[int, int], looked_ahead: int, depth: int
    ) -> Overhead:
        """For pieces of frames of (height, width) and so many bits, and an encoder of videos that
        looks so many ahead."""
        pixels = size[0] * size[1]
        # three times as they are in the file, once in float32, and in the dtype of the model
        each = 3 * (1 if depth == 8 else 2) + 4
        each += 0 if model.dtype == torch.float32 else model.dtype.itemsize
        taken = frames * pixels * model.input_channels * each
        if model.device.type != "cpu":  # codecs and the heap are not in the memory of the device
            return cls(taken, 0)
        return cls(taken, CODEC_BYTES + int(looked_ahead * pixels * CODEC_BYTES_A_PIXEL))


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces of so many frames, and how they are walked."""

    frames: int
    plans: Mapping[Operation, Plan]
    """A plan for each operation; none without a budget."""
    reserved: int = 0
    """Bytes that the walk takes."""
    total: int = 0
    """The same with the codecs."""


@dataclass(slots=True)
class PiecePlanner:
    """Plans the pieces of one video that is encoded, decoded, or both, within a limit for all.

    Frames have a `size` of (height, width), padded to whole latent cells. With `clip_frames` each
    piece is a clip of its own, of so many frames or fewer; otherwise the video is one clip that
    streams, in pieces of a length that is chosen here. A video of one frame is an image: a clip
    that remembers nothing.
    """

    model: TemporalVAE
    operations: tuple[Operation, ...]
    size: tuple[int, int]
    limit: Limit
    clip_frames: int | None
    frames: int | None = None
    """Frames of the whole video, where that is certain."""
    depth: int = 8
    """Bits of a component of its frames."""
    _found: Pieces | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.model.frames_per_latent > 1:
            raise ValueError(
                "commands take videos through models of one latent a frame, and this one makes one "
                "of several: in Python, encode_stream and decode_stream take any length"
            )
        self.size = Padding.to_cells(*self.size, self.model.downsample_factor).padded
        if self.frames == 1:
            self.clip_frames = 1

    @property
    def piece_frames(self) -> int:
        """Frames of each piece, but for the last one."""
        return self.clip_frames or self.pieces().frames

    def pieces(self, clip: int | None = None) -> Pieces:
        """Pieces of the stream, or a clip of so many frames.

        Their memory is taken once, and let go: what cannot be had is missed before the first frame.

        Raises `BudgetError` naming the smallest budget that can be met, and `ValueError` for memory
        that cannot be had.
        """
        if self._found is None or clip not in (None, self._found.frames):
            self._found = self._planned(clip)
        return self._found

    def frame_operations(self) -> int:
        """About how many multiplications a frame takes, in all operations together."""
        total = 0
        for operation in self.operations:
            line = self.model.encoder if operation == "encode" else self.model.decoder
            shape = self._shape(operation, 1)
            for layer in line.layers():
                total += layer.operations(shape)
                shape = layer.output_shape(shape)
        return total

    def explain(self) -> str:
        """How the video is walked, in a few words."""
        if self._found is None or not self._found.plans:
            return "whole walks, in as much memory as they take"
        kinds = sorted({plan.walk for plan in self._found.plans.values()})
        return f"{' and '.join(kinds)} walks, in {in_words(self._found.total)}"

    def _planned(self, clip: int | None) -> Pieces:
        if self.limit is None:
            most = PIECE_PIXELS // (self.size[0] * self.size[1])
            return Pieces(clip or max(1, min(PIECE_FRAMES, most)), {})
        if clip is None:
            found = self._stream(self.limit)
        else:
            found = self._within(self.limit, clip, self._held(clip))
        free = budget.available_bytes(self.model.device)
        if free is not None and found.reserved > free:
            # Linux would give it, and end the process when it is used
            raise BudgetError(self._too_little(in_words(free) + " are free,", found), found.total)
        reserve(found.reserved, self.model.device)
        if self.limit != "least":
            # Others may have taken the rest of what was free by now.
            self.limit = min(self.limit, found.total)
        return found

    def _held(self, clip: int) -> dict[Operation, int]:
        """Bytes of latents that lie between the operations."""
        latents = math.prod(self._shape("decode", clip)) * self.model.dtype.itemsize
        return dict.fromkeys(self.operations, latents if len(self.operations) > 1 else 0)

    def _stream(self, limit: Limit) -> Pieces:
        """The most frames that are not cut into bands, whose edges would be computed twice."""
        one = {operation: self._one_frame(operation, limit) for operation in self.operations}
        states = sum(plan.state_bytes for plan in one.values())
        beside = {operation: states - plan.state_bytes for operation, plan in one.items()}

        def fits(frames: int) -> bool:
            """Whether pieces of so many frames ought to fit."""
            return isinstance(limit, int) and all(
                plan.peak_bytes + (frames - 1) * self._frame_bytes(operation) + beside[operation]
                <= self._overhead(frames).left(limit)
                for operation, plan in one.items()
            )

        frames = next(filter(fits, PLANNED_PIECES), 1)
        if frames == 1:
            return self._within(limit, 1, beside)
        with suppress(BudgetError):
            found = self._within(limit, frames, beside)
            if not any(plan.banded for plan in found.plans.values()):
                return found
        return self._pieces(1, one, beside)

    def _one_frame(self, operation: Operation, limit: Limit) -> Plan:
        """Pieces of one frame, within the limit or else in the least memory."""
        with suppress(BudgetError):
            return self._plan(operation, 1, limit)
        return self._plan(operation, 1, "least")

    def _frame_bytes(self, operation: Operation) -> int:
        """About what one more frame takes: its activation between the layers, and its result."""
        line = self.model.encoder if operation == "encode" else self.model.decoder
        layers, shape = list(line.layers()), self._shape(operation, 1)
        activation, _ = stages.arena_sizes(layers, shape, stages.Bounds())
        numbers = activation + math.prod(stages.shape_after(layers, shape))
        return math.ceil((1 + planning.MARGIN) * numbers * self.model.dtype.itemsize)

    def _within(self, limit: Limit, frames: int, beside: Mapping[Operation, int]) -> Pieces:
        """Plans for pieces of so many frames, `beside` what waits while an operation runs."""
        plans: dict[Operation, Plan] = {}
        least = 0
        for operation in self.operations:
            left: Limit = "least"
            if isinstance(limit, int):
                left = max(1, self._overhead(frames).left(limit) - beside[operation])
            try:
                plans[operation] = self._plan(operation, frames, left)
            except BudgetError as error:
                least = max(least, error.least + beside[operation])
        if not least:
            return self._pieces(frames, plans, beside)
        assert isinstance(limit, int)
        needed = self._within("least", frames, beside)
        needed = replace(needed, total=self._overhead(frames).total(least))
        raise BudgetError(self._too_little(f"{in_words(limit)} are", needed, limit), needed.total)

    def _too_little(self, given: str, needed: Pieces, limit: int | None = None) -> str:
        """That so much is less than the least, what takes that, and what would take less."""
        if self.frames == 1:
            what = "an image"
        else:
            what = f"a clip of {needed.frames} frames" if self.clip_frames else "a stream"
        plan = max(needed.plans.values(), key=lambda plan: plan.peak_bytes)
        name, size = max(plan.parts, key=lambda part: part[1])
        ways = [] if self.frames == 1 else self._shorter_clips(needed.frames, limit)
        ways += ["smaller frames (--height)"]
        ways += ["--dtype bfloat16"] if self.model.dtype.itemsize > 2 else []
        return (
            f"{given} below the least that {what} of {self.size[1]}x{self.size[0]} can do with: "
            f"{in_words(needed.total)}, of which {in_words(size)} are {name}: give --memory as "
            f"much, or take {', or '.join(ways)}"
        )

    def _shorter_clips(self, frames: int, limit: int | None) -> list[str]:
        """What clips would need that fit the limit, or of one frame, which always need least."""
        clips = [n for n in SHORT_CLIPS if not self.clip_frames or n < frames]
        for length in clips:
            clip = replace(self, limit="least", clip_frames=length, frames=None)
            needed = clip._within("least", length, self._held(length)).total
            if length == clips[-1] or (limit is not None and needed <= limit):
                return [f"clips that are walked apart (--clip-frames {length}: {in_words(needed)})"]
        return []

    def _pieces(
        self, frames: int, plans: Mapping[Operation, Plan], beside: Mapping[Operation, int]
    ) -> Pieces:
        walk = max(plan.peak_bytes + beside[operation] for operation, plan in plans.items())
        overhead = self._overhead(frames)
        return Pieces(frames, plans, overhead.reserved(walk), overhead.total(walk))

    def _plan(self, operation: Operation, frames: int, limit: Limit) -> Plan:
        # On a GPU a step that runs out of memory begins again, from the state before it.
        return self.model.plan(
            self._shape(operation, frames), operation, budget=limit,
            stream=self.clip_frames is None, keep_state=self.model.device.type != "cpu",
        )  # fmt: skip

    def _shape(self, operation: Operation, frames: int) -> tuple[int, ...]:
        """Shape of the input of an operation."""
        if operation == "encode":
            return (1, self.model.input_channels, frames, *self.size)
        cells = (side // self.model.downsample_factor for side in self.size)
        return (1, self.model.latent_channels, frames, *cells)

    def _overhead(self, frames: int) -> Overhead:
        ahead = min(LOOKED_AHEAD, self.frames or LOOKED_AHEAD)
        ahead = ahead if "decode" in self.operations else 0
        return Overhead.of(self.model, frames, self.size, ahead, self.depth)


def reserve(size: int, device: torch.device) -> None:
    """Take memory and let it go: what cannot be had is missed now, not in the middle.

    Raises `ValueError` for more than the process may have.
    """
    try:
        torch.empty(max(0, size), dtype=torch.uint8, device=device).fill_(0)
    except RuntimeError as error:  # torch's own for the CPU; for a GPU a kind of it
        raise ValueError(
            f"the walk needs {in_words(size)}, which cannot be had: give a smaller --memory"
        ) from error
