"""How much memory a walk takes, and which walk fits a budget.

Nothing is run to find out: each layer is traced once on shapes alone, for the size of piece that a
walk would give it, and what is alive at the worst moment is counted.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Literal

import torch

from temporal_vae.config import TemporalVAEConfig, WanVAEConfig
from temporal_vae.network.autoencoder import Line
from temporal_vae.network.kernels.winograd import SPACE_BYTES
from temporal_vae.network.layer import Layer, Shape
from temporal_vae.network.lines import Operation, line_of
from temporal_vae.walks import piecewise, stages
from temporal_vae.walks.budget import Budget, BudgetError, parse_budget
from temporal_vae.walks.gradient_peak import GradientPeak
from temporal_vae.walks.peak import Offload, Part, Peak, PiecewisePeak, PlanRequest
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.tracing import Results, Tracer, tracer

MARGIN = 0.06
"""Share of the count that is added for what it does not see: sums, slices, copies in kernels."""
GAPS_BYTES = 256 * 2**20
"""Added for the gaps that the system's allocator leaves between the blocks of pieces: as much as
the pieces take, and so much at the most, as large blocks are mapped each on their own. They differ
from run to run by most of it. Layers that see time and space together make their results in parts,
so a whole walk of them leaves gaps, too. Of Wan's layout at a third of its width, 21 frames of
240x416: 150 MiB of 950, and 240 of 500 in bands, that are not there where every block is mapped on
its own, which takes a third more time."""
BAND_GAPS = 2.5
"""So many times what pieces take, where time and space are seen together in bands: blocks of many
sizes come and go. 21 frames at that width: 80 MiB where the pieces take 54 (240x416), 800 where
they take 314 (480x832 in bands of 64 rows). None are left where every block has a mapping."""
KERNELS_BYTES = 32 * 2**20
"""What kernels and their threads keep for themselves, however small the walk."""
KERNELS_THREADS = 4
"""Threads for which that is enough; each of more has its own space in our kernels."""
GRADIENT_GAPS = 1.0
"""The same for gradients of weights, which come with every piece and stay between what goes: of all
of them so much. SVD's decoder, 0.24 GiB of weights: 0.3 to 0.4 GiB above the count of 8x64x64."""
NEARLY_LEAST = 1.05
"""The least memory may be exceeded by so much for the sake of speed."""
CHUNK_BYTES = 8 * 2**20
"""A chunk of pixels, all frames and channels, is about as large: it stays in the cache."""
GROUP_BYTES = 40 * 2**20
"""Of a group of frames before and after a layer. On a CPU, larger ones gain a few percent."""
STEP_GROUP_BYTES = 8 * 2**20
"""The same for the steps of a stream: blocks of up to 4 MiB are reused from step to step, so that
the process stays as large as it is. Twice as large ones walk 4 percent faster."""
BAND_ROWS = (256, 128, 64, 32, 16, 8)
"""Rows of a band, fastest first."""
LATENTS = (8, 4, 2, 1)
"""Latents of a piece in time, most memory first."""

SEGMENTS = (0, 12, 8, 6, 4, 3, 2, 1)
"""Segments of a line for gradients, of more memory first; all but 0 compute most layers thrice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one input will be walked, and what that takes. Make one with `TemporalVAE.plan`."""

    operation: Operation
    shape: Shape
    """Of the input, (B, C, T, H, W); for a stream, of its largest piece."""
    dtype: torch.dtype
    stream: bool = False
    """Whether it is for the steps of a stream."""
    keep_state: bool = True
    """Whether the state before a step of the stream outlives the step."""
    gradients: bool = False
    """Whether it is for a walk with gradients; without `torch.no_grad` no other one is."""
    ranks: int = 1
    """How many processes walk the clip together; then `shape` is that of the largest part."""
    bounds: Bounds | None
    """Pieces of the bounded walk; None for the whole walk."""
    peak_bytes: int
    """Largest memory in use at a time over the weights and the input, the result included, and for
    a stream the state before a step and what there is of the one after; with gradients their whole
    way back is counted, and a gradient for each weight that is trained."""
    state_bytes: int = 0
    """Size of one state of the stream."""
    parts: tuple[Part, ...] = field(repr=False, default=())
    """What the peak is made of: (name, bytes)."""
    device: torch.device
    """Where the model is."""
    network: object = field(repr=False, default=None)
    """The layout of the model."""

    @property
    def walk(self) -> Literal["whole", "bounded"]:
        """The kind of walk."""
        return "whole" if self.bounds is None else "bounded"

    @property
    def banded(self) -> bool:
        """Whether frames are cut into bands of rows, whose edges are computed twice."""
        return self.bounds is not None and self.bounds.rows is not None

    @property
    def offload(self) -> Offload:
        """Where the clip's activation lies, if not beside the weights: "host" or a folder."""
        return None if self.bounds is None else self.bounds.offload

    def explain(self) -> str:
        """The plan in words, a line each."""
        what = f"{self.operation} {'x'.join(map(str, self.shape))}, {self.dtype}"
        step = ", a step of a stream" if self.stream else ""
        step = ", with gradients" if self.gradients else step
        step = f", the largest part of {self.ranks}" if self.ranks > 1 else step
        lines = [f"{what}: {self.walk} walk{step}"]
        lines += [] if self.bounds is None else self.bounds.explain()
        if self.offload is not None:
            where = "the memory of the CPU" if self.offload == "host" else os.fspath(self.offload)
            lines.append(f"  the clip's activation lies in {where}")
        lines += [f"  {size / 2**20:10.1f} MiB  {name}" for name, size in self.parts]
        lines.append(f"  {self.peak_bytes / 2**20:10.1f} MiB  peak over weights and input")
        return "\n".join(lines)


def _kernels_bytes(device: torch.device) -> int:
    more = max(0, torch.get_num_threads() - KERNELS_THREADS) if device.type == "cpu" else 0
    return KERNELS_BYTES + more * 2 * SPACE_BYTES  # twice at 1024 channels


class Planner:
    """Plans for one request and any budget: each way to walk is counted once."""

    def __init__(self, request: PlanRequest):
        self._request, self._lock = request, threading.Lock()
        self._counted: dict[Bounds | None, Plan] = {}
        config = request.network
        assert isinstance(config, TemporalVAEConfig | WanVAEConfig)
        with _on_shapes_alone(), torch.device("meta"):
            self._line: Line = line_of(config, request.operation).to(request.dtype)
        self._line.requires_grad_(bool(request.gradients))

    def plan(self, budget: Budget) -> Plan:
        """The fastest plan within a budget: bytes, words such as "6GiB", "least", None for any.

        Raises `BudgetError` for a budget that cannot be met, naming the smallest that can.
        """
        limit = parse_budget(budget)
        with self._lock, _on_shapes_alone():
            ways = self._candidates(limit is not None)
            if limit is None:
                return self._plan(next(ways))
            floors = {bounds: self._floor(bounds) for bounds in ways}
            if limit != "least":
                for bounds, floor in floors.items():
                    if floor <= limit and (plan := self._plan(bounds)).peak_bytes <= limit:
                        return plan
            plans = self._nearly_least(floors)
        if limit == "least":
            return plans[0]
        raise self._too_little(budget, min(plan.peak_bytes for plan in plans), plans[0].state_bytes)

    def _nearly_least(self, floors: dict[Bounds | None, int]) -> list[Plan]:
        """The plans of about the least memory, fastest first; few others are counted."""
        plans, least = dict[Bounds | None, Plan](), math.inf
        for bounds, floor in sorted(floors.items(), key=lambda item: item[1]):
            if floor > NEARLY_LEAST * least:
                break
            plans[bounds] = self._plan(bounds)
            least = min(least, plans[bounds].peak_bytes)
        counted = (plans[bounds] for bounds in floors if bounds in plans)
        return [plan for plan in counted if plan.peak_bytes <= NEARLY_LEAST * least]

    def _plan(self, bounds: Bounds | None) -> Plan:
        if bounds not in self._counted:
            request = self._request
            self._counted[bounds] = self._count(bounds, tracer(request.dtype, request.device))
        return self._counted[bounds]

    def _floor(self, bounds: Bounds | None) -> int:
        """Less than the peak of a plan, or as much, found without running its layers."""
        if bounds in self._counted:
            return self._counted[bounds].peak_bytes
        if self._request.gradients is not None:
            return 0
        return self._count(bounds, Results(self._request.dtype)).peak_bytes

    def _candidates(self, limited: bool) -> Iterator[Bounds | None]:
        if self._request.gradients is None:
            return _candidates(self._line, self._request, limited)
        return _with_gradients(self._line, self._request)

    def _too_little(self, budget: Budget, least: int, state_bytes: int) -> BudgetError:
        request, state = self._request, ""
        if request.gradients is not None:
            state = ", with gradients; torch.no_grad() takes less where they are not wanted"
        if request.stream:
            states = (2 if request.keep_state else 1) * state_bytes
            state = f", of which {states} for the stream's state"
        return BudgetError(
            f"the budget {budget!r} is below the least that {request.operation} of {request.shape} "
            f"in {request.dtype} can do with: {least} bytes ({least / 2**30:.3f} GiB){state}",
            least,
        )

    def _count(self, bounds: Bounds | None, counter: Tracer | Results) -> Plan:
        request = self._request
        found: Peak | GradientPeak
        in_pieces = bounds is not None and bounds.pieces is not None
        if isinstance(counter, Tracer) and request.gradients is not None:
            found = GradientPeak(self._line, request, bounds, counter)
        else:
            kind = PiecewisePeak if in_pieces else Peak
            found = kind(self._line, request, bounds, counter)
        parts = list(found.parts)
        if (rest := found.after - sum(size for _, size in parts)) > 0:
            parts.append(("what is made of the result", rest))
        gaps = 0
        if bounds is not None or stages.in_pieces(list(self._line.layers())):
            weights = request.gradients or 0
            banded = in_pieces and bounds is not None and bounds.rows is not None
            size = found.workspace
            gaps = int(BAND_GAPS * size) if banded else min(GAPS_BYTES, size)
            gaps += int(GRADIENT_GAPS * weights)
        parts.append(("gaps", gaps))
        margin = math.ceil(MARGIN * sum(size for _, size in parts))
        parts += [("margin", margin), ("the kernels' own", _kernels_bytes(request.device))]
        parts = [(name, size) for name, size in parts if size]
        walked = None if bounds is None else replace(bounds, workspace=found.workspace)
        return Plan(
            operation=request.operation, shape=request.shape, dtype=request.dtype,
            stream=request.stream, keep_state=request.keep_state, bounds=walked,
            gradients=request.gradients is not None, ranks=request.ranks,
            parts=tuple(parts), peak_bytes=sum(size for _, size in parts), state_bytes=found.state,
            device=request.device, network=request.network,
        )  # fmt: skip


@lru_cache(maxsize=64)
def planner(request: PlanRequest) -> Planner:
    """The one planner for a request, which has counted for the budgets before."""
    return Planner(request)


if hasattr(os, "register_at_fork"):  # a child would wait for a thread that it does not have
    os.register_at_fork(after_in_child=planner.cache_clear)


@contextmanager
def _on_shapes_alone() -> Iterator[None]:
    """The same everywhere: inference mode and autocast hide operations, or add some."""
    with (
        torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False),
    ):  # fmt: skip
        yield


def fastest(line: Line, request: PlanRequest) -> Bounds | None:
    """The pieces of the fastest walk where no bound is needed; None for the whole walk.

    Groups of whole frames stay in the cache of a CPU between the layers they go through: 0.7 to 1.0
    of the whole walk's time, more with more channels, where there are several groups. Norms
    over the clip would compute temporal convolutions twice (1.04 to 1.13), and pieces in time would
    transform the weights of convolutions again for each (1.03 to 3.5).
    """
    layers = list(line.layers())
    over_clip = any(layer.cut == "pixels" and any(layer.norms()) for layer in layers)
    if request.stream or over_clip or stages.in_pieces(layers):
        return None
    return _Sizes(line, request).one_of_many_groups()


def _candidates(line: Line, request: PlanRequest, limited: bool) -> Iterator[Bounds | None]:
    """Ways to walk, fastest first; those of one place for the activation before the next place."""
    on_cpu = request.device.type == "cpu"
    writes_over = on_cpu and request.stream and not request.keep_state and limited
    if None in request.offload and not writes_over and request.ranks == 1:
        yield None  # which cannot write over a state, and takes large blocks anew at every step
    layers = list(line.layers())
    if stages.in_pieces(layers):
        yield from _pieces(layers, request)
        return
    sizes = _Sizes(line, request)
    for offload in request.offload:
        cut = partial(Bounds, channels=sizes.channels, offload=offload)
        yield from sizes.in_groups(cut)
        for fused in (False, True):
            for rows in (rows for rows in BAND_ROWS if rows < sizes.height):
                yield cut(rows=rows, fused=fused, pixels=sizes.chunk(rows * sizes.width))


def _with_gradients(line: Line, request: PlanRequest) -> Iterator[Bounds | None]:
    """Ways to walk and to come back, fastest first."""
    yield None
    sizes = _Sizes(line, request)
    for segments in SEGMENTS:
        yield from sizes.in_groups(partial(Bounds, channels=sizes.channels, segments=segments))


class _Sizes:
    """The sizes of pieces that suit a line."""

    def __init__(self, line: Line, request: PlanRequest):
        layers, itemsize = list(line.layers()), request.dtype.itemsize
        self.frames = request.shape[2]
        shapes = stages.shapes_in(layers, (1, *request.shape[1:]))
        self.height, self.width = max(shape[3:] for shape in shapes)
        self.channels = max(
            (layer.width or 0 for layer, shape in zip(layers, shapes, strict=False)
             if layer.cut == "pixels" and shape[3:] == (self.height, self.width)),
            default=128,
        )  # fmt: skip
        self.largest = max(
            math.prod(before) // before[2] + math.prod(after) // after[2]
            for layer, (before, after) in zip(layers, pairwise(shapes), strict=True)
            if layer.cut == "frames"
        )
        self._pixels = max(16, CHUNK_BYTES // (self.frames * itemsize * self.channels))
        self._most = self.frames
        if request.device.type == "cpu":
            size = STEP_GROUP_BYTES if request.stream else GROUP_BYTES
            self._most = max(1, min(self.frames, size // (self.largest * itemsize)))

    def one_of_many_groups(self) -> Bounds | None:
        """The largest group, if the clip has more frames."""
        groups = self.in_groups(partial(Bounds, channels=self.channels))
        return next(groups) if self._most < self.frames else None

    def in_groups(self, cut: Callable[..., Bounds]) -> Iterator[Bounds]:
        """Groups of whole frames, the larger first."""
        for group in (self._most >> n for n in range(self._most.bit_length())):
            pixels = self.chunk(group * self.height * self.width)
            yield cut(frames=group, largest=self.largest, pixels=pixels)

    def chunk(self, pixels: int) -> int:
        """Pixels of a chunk, with all their frames, that takes no more than so many of one."""
        return max(16, min(self._pixels, pixels // self.frames))


def _pieces(layers: list[Layer], request: PlanRequest) -> Iterator[Bounds]:
    """The same for layers that see time and space together: fewer latents at a time, then bands."""
    whole = piecewise.Section(layers, None)
    latents = -(-request.shape[2] // whole.frames_each)
    for pieces in (n for n in LATENTS if n < latents or n == 1):
        yield Bounds(pieces=pieces)
    if not request.stream:  # whose state is that of whole frames
        height = max(shape[3] for shape in stages.shapes_in(layers, request.shape))
        cut = [
            Bounds(pieces=1, rows=rows, keep_rows=keep)
            for rows in BAND_ROWS if rows < height for keep in (True, False)
            if keep or rows > BAND_ROWS[-1]  # which would compute nearly all of it over and over
        ]  # fmt: skip
        yield from sorted(cut, key=partial(piecewise.operations, layers, request.shape))
