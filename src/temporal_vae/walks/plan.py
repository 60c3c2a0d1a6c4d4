"""How much memory and time a walk takes, and which walk fits a budget.

Nothing is run to find out the memory: each layer is traced once on shapes alone, for the size of
piece that a walk would give it, and what is alive at the worst moment is counted. The same trace
counts operations and bytes written; how long those take here, one small probe tells.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from temporal_vae.network.autoencoder import Line
from temporal_vae.network.framewise import Framewise
from temporal_vae.network.timewise import TemporalBlock
from temporal_vae.walks import stages
from temporal_vae.walks.budget import Budget, BudgetError, parse_budget
from temporal_vae.walks.heap import MAPPED_BYTES
from temporal_vae.walks.peak import Count, Offload, Operation, Part, Question
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.tracing import Shape, Tracer, Work

MARGIN = 0.06
"""Share of the count that is added for what it does not see: sums, slices, copies in kernels."""
KERNELS_BYTES = 32 * 2**20
"""What kernels and their threads keep for themselves, however small the walk."""
NEARLY_LEAST = 1.05
"""The least memory may be exceeded by so much for the sake of speed."""
CHUNK_BYTES = 8 * 2**20
"""A chunk of pixels, all frames and channels, is about as large: it stays in the cache."""
GROUP_BYTES = 40 * 2**20
"""Of a group before and after a layer. On a CPU, larger ones gain a few percent, and cut up the
memory of a long stream."""


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
    bounds: Bounds | None
    """Pieces of the bounded walk; None for the whole walk."""
    peak_bytes: int
    """Largest memory in use at a time over the weights and the input, the result included, and for
    a stream the state before a step and what there is of the one after."""
    state_bytes: int = 0
    """Size of one state of the stream."""
    parts: tuple[Part, ...] = field(repr=False, default=())
    """What the peak is made of: (name, bytes)."""
    work: Work = field(repr=False, default=Work())
    """Operations counted."""
    device: torch.device
    """Where the model is."""
    network: object = field(repr=False, default=None)
    """The layout of the model."""

    @property
    def seconds(self) -> float:
        """About how long it takes; a probe of a fraction of a second tells, once a process."""
        speed = probe(self.device, self.dtype)
        return sum(n / each for n, each in zip(self.work, speed, strict=True))

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
        b, c, t, h, w = self.shape
        what = f"{self.operation} {b}x{c}x{t}x{h}x{w}, {self.dtype}"
        step = ", a step of a stream" if self.stream else ""
        lines = [f"{what}: {self.walk} walk{step}"]
        if self.bounds is not None:
            pieces = f"{self.bounds.frames} frames" if self.bounds.rows is None else (
                f"bands of {self.bounds.rows} rows of a frame"
            )  # fmt: skip
            more = ", the widest activation never stored" if self.bounds.fused else ""
            if self.bounds.largest and self.bounds.frames < stages.ENOUGH_FRAMES:
                more = f", up to {stages.ENOUGH_FRAMES} where they are smaller"
            lines.append(f"  framewise layers: {pieces} at a time{more}")
            fewer = "" if self.bounds.channels is None else ", fewer where layers hold more"
            lines.append(f"  timewise layers: {self.bounds.pixels} pixels at a time{fewer}")
        if self.offload is not None:
            where = "the memory of the CPU" if self.offload == "host" else os.fspath(self.offload)
            lines.append(f"  the clip's activation lies in {where}")
        lines += [f"  {size / 2**20:10.1f} MiB  {name}" for name, size in self.parts]
        lines.append(f"  {self.peak_bytes / 2**20:10.1f} MiB  peak over weights and input")
        lines.append(f"  {self.seconds:10.1f} s    expected here")
        return "\n".join(lines)


class Planner:
    """Plans to one question, for any budget: each way to walk is counted once."""

    def __init__(self, build: Callable[[], Line], asked: Question):
        """`build` makes the network; it is called where tensors have a shape and no memory."""
        self._asked, self._tracer = asked, Tracer(asked.dtype, asked.device)
        self._shapes_alone, self._lock = FakeTensorMode(), threading.Lock()
        self._counted: dict[Bounds | None, Plan] = {}
        with self._counting():
            self._line = build()
            for module in self._line.modules():  # `.to` cannot swap parameters of no memory
                for name, parameter in list(module.named_parameters(recurse=False)):
                    shape = torch.empty_like(parameter, dtype=asked.dtype)
                    setattr(module, name, nn.Parameter(shape))

    def plan(self, budget: Budget) -> Plan:
        """The fastest plan within a budget: bytes, words such as "6GiB", "least", None for any.

        Raises `BudgetError` for a budget that cannot be met, naming the smallest that can.
        """
        with self._lock, self._counting():
            return self._fastest(budget)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """The same everywhere: inference mode and autocast hide operations, or add some."""
        with (
            torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False),
            self._shapes_alone,
        ):  # fmt: skip
            yield

    def _fastest(self, budget: Budget) -> Plan:
        asked, limit, plans = self._asked, parse_budget(budget), list[Plan]()
        for bounds in _candidates(self._line, asked):
            plan = self._counted.get(bounds) or self._count(bounds)
            if limit is None or (limit != "least" and plan.peak_bytes <= limit):
                return plan
            plans.append(plan)
        least = min(plan.peak_bytes for plan in plans)
        if limit == "least":
            return next(plan for plan in plans if plan.peak_bytes <= NEARLY_LEAST * least)
        states = (2 if asked.keep_state else 1) * plans[0].state_bytes
        state = f", of which {states} for the stream's state" if asked.stream else ""
        raise BudgetError(
            f"the budget {budget!r} is below the least that {asked.operation} of {asked.shape} "
            f"in {asked.dtype} can do with: {least} bytes ({least / 2**30:.3f} GiB){state}",
            least,
        )

    def _count(self, bounds: Bounds | None) -> Plan:
        asked = self._asked
        count = Count(self._line, asked, bounds, self._tracer)
        parts, work = count.parts(), count.work
        if (rest := count.after_the_walk() - sum(size for _, size in parts)) > 0:
            parts.append(("what is made of the result", rest))
        margin = math.ceil(MARGIN * sum(size for _, size in parts))
        parts += [("margin", margin), ("the kernels' own", KERNELS_BYTES)]
        peak = sum(size for _, size in parts)
        walked = bounds
        if bounds is not None:
            most = peak - count.state  # which is there before the step
            walked = replace(bounds, workspace=count.workspace, most=most)
        plan = Plan(
            operation=asked.operation, shape=asked.shape, dtype=asked.dtype, stream=asked.stream,
            keep_state=asked.keep_state, bounds=walked, parts=tuple(parts),
            peak_bytes=peak, state_bytes=count.state, work=work,
            device=asked.device, network=asked.network,
        )  # fmt: skip
        self._counted[bounds] = plan
        return plan


def _candidates(line: Line, asked: Question) -> Iterator[Bounds | None]:
    """Ways to walk, fastest first; those of one place for the activation before the next place."""
    if None in asked.offload:
        yield None
    framewise = [layer for layer in line.layers() if isinstance(layer, Framewise)]
    shapes, frames = stages.shapes_in(framewise, (1, *asked.shape[1:])), asked.shape[2]
    height, width = max(shape[3:] for shape in shapes)
    channels = _finest_channels(line)
    pixels = max(16, CHUNK_BYTES // (frames * asked.dtype.itemsize * channels))
    largest, most = stages.largest_of(framewise, (1, *asked.shape[1:])), frames
    if asked.device.type == "cpu":
        most = max(1, min(frames, GROUP_BYTES // (largest * asked.dtype.itemsize)))
    for offload in asked.offload:
        group = most
        while group >= 1:
            chunk = max(16, min(pixels, group * height * width // frames))
            yield Bounds(
                frames=group, largest=largest, pixels=chunk, channels=channels, offload=offload
            )
            group = group // 2
        for fused in (False, True):
            for rows in (256, 128, 64, 32, 16, 8):
                if rows < height:
                    chunk = max(16, min(pixels, rows * width // frames))
                    yield Bounds(
                        rows=rows, pixels=chunk, channels=channels, fused=fused, offload=offload
                    )


def _finest_channels(line: Line) -> int:
    """Channels of the temporal blocks where they are fewest, which is at the finest level."""
    widths = [layer.width for layer in line.layers() if isinstance(layer, TemporalBlock)]
    return min(widths, default=128)


# Seconds -------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def probe(device: torch.device, dtype: torch.dtype) -> Work:
    """What a device does in a second, of each kind of work: convolves, writes, calls, and what
    memory that comes new from the system costs on top of being written.
    """
    with torch.no_grad():
        x = torch.ones(4, 64, 64, 128, device=device, dtype=dtype).movedim(-1, 1)
        weight = torch.ones(128, 128, 3, 3, device=device, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        large = torch.ones(2 * MAPPED_BYTES // dtype.itemsize, device=device, dtype=dtype)
        operations = 2.0 * x.numel() * weight[0].numel()
        written = x.nbytes / _seconds(device, lambda: F.silu(x))
        fresh = _seconds(device, lambda: F.silu(large)) - large.nbytes / written
        return Work(
            operations / _seconds(device, lambda: F.conv2d(x, weight, padding=1)),
            written,
            1 / _seconds(device, lambda: F.silu(x[:1, :, :1, :1])),
            large.nbytes / fresh if fresh > 0 else math.inf,
        )


def _seconds(device: torch.device, step: Callable[[], object]) -> float:
    """The median of a few runs, after one that is not counted."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times) // 2 - 1]
