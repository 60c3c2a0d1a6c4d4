"""How long the pieces of a video are, and how they are walked, so that a budget holds for all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import NamedTuple

import torch

from temporal_vae.geometry import Padding, latents_for, video_frames
from temporal_vae.model import TemporalVAE
from temporal_vae.network.lines import Operation
from temporal_vae.video import PIPE
from temporal_vae.walks import budget, stages
from temporal_vae.walks import plan as planning
from temporal_vae.walks.budget import BudgetError, Limit, in_words
from temporal_vae.walks.plan import Plan

PIECE_FRAMES = 8
PIECE_PIXELS = PIECE_FRAMES * 640 * 360
"""A stream without a budget takes in so many frames at a time, or as few as have so many pixels, at
least one."""
WHOLE_PIXELS = PIECE_PIXELS
"""Without a budget videos of no more pixels are walked whole: a stream takes time at its ends."""
SHORT_CLIPS = (16, 4, 1)
"""Frames of clips that are proposed where memory is too little, or a few more that fill latents."""
PLANNED_PIECES = (32, 16, 8, 4, 2)
"""Latents of a piece that are tried for a stream with a budget; one if none of them fits."""

CODEC_BYTES = 24 * 2**20
"""What codecs, their threads and their libraries hold, however small the frames."""
CODEC_BYTES_A_PIXEL = 1.5
"""Bytes for each pixel of a frame that an encoder of videos holds."""
LOOKED_AHEAD = 60
"""Frames that an encoder of videos holds at a time, to look ahead."""


def frames_at_once(path: str, size: tuple[int, int], limit: Limit) -> int:
    """How many frames of a video to read ahead, to know whether there are more: one of a pipe,
    which may be slow."""
    return 1 if path == PIPE or limit is not None else max(1, WHOLE_PIXELS // (size[0] * size[1]))


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
    """Pieces of so many latents along time, and how they are walked."""

    latents: int
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
    that remembers nothing. A video of few pixels is such a clip, too, where there is no limit.
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
        self.size = Padding.to_cells(*self.size, self.model.downsample_factor).padded
        streams = self.clip_frames is None and self.limit is None
        pixels = (self.frames or math.inf) * self.size[0] * self.size[1]
        if self.frames == 1 or (streams and pixels <= WHOLE_PIXELS):
            self.clip_frames = self.frames

    def lengths(self) -> Iterator[int]:
        """Frames of piece after piece; the last one of a video may have fewer.

        Each but the last is of whole latents: a clip begins with one of a single frame.
        """
        if self.clip_frames is not None:
            return repeat(self.clip_frames)
        latents, each = self.pieces().latents, self.model.frames_per_latent
        return chain([video_frames(latents, each)], repeat(latents * each))

    def filled(self, frames: int, first: bool) -> tuple[int, int]:
        """Latents of a piece of so many frames, and how many frames are missing to fill them.

        `first` says whether it is the first piece of the video; each clip begins anew.
        """
        begins, each = first or self.clip_frames is not None, self.model.frames_per_latent
        latents = latents_for(frames, each, begins)
        return latents, video_frames(latents, each, begins) - frames

    def pieces(self, clip: int | None = None) -> Pieces:
        """Pieces of the stream, or a clip of so many latents.

        Their memory is taken once, and let go: what cannot be had is missed before the first frame.

        Raises `BudgetError` naming the smallest budget that can be met, and `ValueError` for memory
        that cannot be had.
        """
        if self._found is None or clip not in (None, self._found.latents):
            self._found = self._planned(clip)
        return self._found

    def frame_operations(self) -> int:
        """About how many multiplications a frame takes, in all operations together."""
        total = sum(
            self._operations(operation, 2) - self._operations(operation, 1)  # without the first one
            for operation in self.operations
        )
        return total // self.model.frames_per_latent

    def explain(self) -> str:
        """How the video is walked, in a few words."""
        if self._found is None or not self._found.plans:
            return "whole walks, in as much memory as they take"
        kinds = sorted({plan.walk for plan in self._found.plans.values()})
        return f"{' and '.join(kinds)} walks, in {in_words(self._found.total)}"

    def _operations(self, operation: Operation, latents: int) -> int:
        line = self.model.encoder if operation == "encode" else self.model.decoder
        total, shape = 0, self._shape(operation, latents, begins=True)
        for layer in line.layers():
            total += layer.operations(shape)
            shape = layer.output_shape(shape)
        return total

    def _planned(self, clip: int | None) -> Pieces:
        if self.limit is None:
            most = min(PIECE_FRAMES, PIECE_PIXELS // (self.size[0] * self.size[1]))
            return Pieces(clip or max(1, most // self.model.frames_per_latent), {})
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
        """The most latents that are not cut into bands, whose edges would be computed twice."""
        one = {operation: self._one_latent(operation, limit) for operation in self.operations}
        states = sum(plan.state_bytes for plan in one.values())
        beside = {operation: states - plan.state_bytes for operation, plan in one.items()}

        def fits(latents: int) -> bool:
            """Whether pieces of so many latents ought to fit."""
            return isinstance(limit, int) and all(
                plan.peak_bytes + (latents - 1) * self._latent_bytes(operation) + beside[operation]
                <= self._overhead(latents).left(limit)
                for operation, plan in one.items()
            )

        latents = next(filter(fits, PLANNED_PIECES), 1)
        if latents == 1:
            return self._within(limit, 1, beside)
        with suppress(BudgetError):
            found = self._within(limit, latents, beside)
            if not any(plan.banded for plan in found.plans.values()):
                return found
        return self._pieces(1, one, beside)

    def _one_latent(self, operation: Operation, limit: Limit) -> Plan:
        """Pieces of one latent, within the limit or else in the least memory."""
        with suppress(BudgetError):
            return self._plan(operation, 1, limit)
        return self._plan(operation, 1, "least")

    def _latent_bytes(self, operation: Operation) -> int:
        """About what one more latent takes: its activation between the layers, and its result."""
        line = self.model.encoder if operation == "encode" else self.model.decoder
        layers, shape = list(line.layers()), self._shape(operation, 1)
        activation, _ = stages.arena_sizes(layers, shape, stages.Bounds())
        numbers = activation + math.prod(stages.shape_after(layers, shape))
        return math.ceil((1 + planning.MARGIN) * numbers * self.model.dtype.itemsize)

    def _within(self, limit: Limit, latents: int, beside: Mapping[Operation, int]) -> Pieces:
        """Plans for pieces of so many latents, `beside` what waits while an operation runs."""
        plans: dict[Operation, Plan] = {}
        least = 0
        for operation in self.operations:
            left: Limit = "least"
            if isinstance(limit, int):
                left = max(1, self._overhead(latents).left(limit) - beside[operation])
            try:
                plans[operation] = self._plan(operation, latents, left)
            except BudgetError as error:
                least = max(least, error.least + beside[operation])
        if not least:
            return self._pieces(latents, plans, beside)
        assert isinstance(limit, int)
        needed = self._within("least", latents, beside)
        needed = replace(needed, total=self._overhead(latents).total(least))
        raise BudgetError(self._too_little(f"{in_words(limit)} are", needed, limit), needed.total)

    def _too_little(self, given: str, needed: Pieces, limit: int | None = None) -> str:
        """That so much is less than the least, what takes that, and what would take less."""
        frames = self._frames(needed.latents)
        if self.frames == 1:
            what = "an image"
        else:
            what = f"a clip of {frames} frames" if self.clip_frames else "a stream"
        plan = max(needed.plans.values(), key=lambda plan: plan.peak_bytes)
        name, size = max(plan.parts, key=lambda part: part[1])
        ways = [] if self.frames == 1 else self._shorter_clips(frames, limit)
        ways += ["smaller frames (--size)"]
        ways += ["--dtype bfloat16"] if self.model.dtype.itemsize > 2 else []
        return (
            f"{given} below the least that {what} of {self.size[1]}x{self.size[0]} can do with: "
            f"{in_words(needed.total)}, of which {in_words(size)} are {name}: give --memory as "
            f"much, or take {', or '.join(ways)}"
        )

    def _shorter_clips(self, frames: int, limit: int | None) -> list[str]:
        """What clips would need that fit the limit, or of one frame, which always need least."""
        each = self.model.frames_per_latent
        short = [latents_for(length, each) for length in SHORT_CLIPS]
        clips = [n for n in short if not self.clip_frames or video_frames(n, each) < frames]
        for latents in clips:
            length = video_frames(latents, each)
            clip = replace(self, limit="least", clip_frames=length, frames=None)
            needed = clip._within("least", latents, self._held(latents)).total
            if latents == clips[-1] or (limit is not None and needed <= limit):
                return [f"clips that are walked apart (--clip-frames {length}: {in_words(needed)})"]
        return []

    def _pieces(
        self, latents: int, plans: Mapping[Operation, Plan], beside: Mapping[Operation, int]
    ) -> Pieces:
        walk = max(plan.peak_bytes + beside[operation] for operation, plan in plans.items())
        overhead = self._overhead(latents)
        return Pieces(latents, plans, overhead.reserved(walk), overhead.total(walk))

    def _plan(self, operation: Operation, latents: int, limit: Limit) -> Plan:
        # On a GPU a step that runs out of memory begins again, from the state before it.
        return self.model.plan(
            self._shape(operation, latents), operation, budget=limit,
            stream=self.clip_frames is None, keep_state=self.model.device.type != "cpu",
        )  # fmt: skip

    def _frames(self, latents: int, begins: bool = False) -> int:
        """Frames of a clip of so many latents, or in a stream of the largest piece of them."""
        begins = begins or self.clip_frames is not None
        return video_frames(latents, self.model.frames_per_latent, begins)

    def _shape(self, operation: Operation, latents: int, begins: bool = False) -> tuple[int, ...]:
        """Shape of the input of an operation, see `_frames`."""
        if operation == "encode":
            return (1, self.model.input_channels, self._frames(latents, begins), *self.size)
        cells = (side // self.model.downsample_factor for side in self.size)
        return (1, self.model.latent_channels, latents, *cells)

    def _overhead(self, latents: int) -> Overhead:
        ahead = min(LOOKED_AHEAD, self.frames or LOOKED_AHEAD)
        ahead = ahead if "decode" in self.operations else 0
        return Overhead.of(self.model, self._frames(latents), self.size, ahead, self.depth)


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
