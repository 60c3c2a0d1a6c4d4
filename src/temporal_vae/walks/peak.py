"""What one way of walking one input has in memory at its worst moment."""

from __future__ import annotations

import math
import os
from typing import Literal, NamedTuple

import torch

from temporal_vae.geometry import rows_read, spans
from temporal_vae.network.autoencoder import Line
from temporal_vae.network.framewise import Framewise
from temporal_vae.network.timewise import Timewise
from temporal_vae.walks import stages
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.tracing import Shape, Tracer, Work

Operation = Literal["encode", "decode"]
Offload = str | os.PathLike[str] | None
Part = tuple[str, int]


class Question(NamedTuple):
    """What a plan depends on, beside the budget."""

    network: object
    """What tells the layout of the model from others."""
    operation: Operation
    shape: Shape
    dtype: torch.dtype
    stream: bool
    offload: tuple[Offload, ...]
    """Where the activation may lie, in the order of preference."""
    device: torch.device
    keep_state: bool = True


# Bytes and work ------------------------------------------------------------------------------


class Count:
    """What one way of walking one input has alive at its worst moment, and what it computes."""

    def __init__(self, line: Line, asked: Question, bounds: Bounds | None, tracer: Tracer):
        self.layers, self.bounds, self.tracer = list(line.layers()), bounds, tracer
        self.shape, self.size, self.stream = asked.shape, asked.dtype.itemsize, asked.stream
        self.operation = asked.operation
        self.work, self.state, self._held = Work(), 0, 0
        self._replaces = not asked.keep_state
        self._new = self._most_new = 0
        self._worst: tuple[str, int, int] = ("", 0, 0)
        self._largest: Part = ("", 0)

    def parts(self) -> list[Part]:
        """The parts of the peak; `work` and `state` are known afterwards."""
        parts = self._whole() if self.bounds is None else self._bounded(self.bounds)
        name, size, after = self._worst
        if self._held:  # at the end every layer has its next state, and one hands on what it held
            (name, size), after = self._largest, self._most_new + 2 * self._held
        parts.append((name, size))
        if self.stream:
            new = "a layer's next state" if self._replaces else "the next state"
            parts = [("the state of the stream", self.state), (new, after), *parts]
        return [(name, size) for name, size in parts if size]

    @property
    def workspace(self) -> int:
        """Bytes that pieces take at the most."""
        return self._largest[1]

    def after_the_walk(self) -> int:
        """Bytes when the layers are done: copies in the caller's layout, or moments and noise."""
        result = self._bytes(stages.result_shape(self.layers, self.shape))
        if self.operation == "decode":
            return 2 * result
        noise = 2 * result // self.size * 4 // 2  # float32, drawn and stacked; of half the channels
        return 3 * result + noise

    def _bytes(self, shape: Shape) -> int:
        return math.prod(shape) * self.size

    def _note(self, name: str, size: int) -> None:
        """A moment: what is alive for it, beside the layers' next states so far."""
        if size > self._largest[1]:
            self._largest = (name, size)
        if size + self._new > sum(self._worst[1:]):
            self._worst = (name, size, self._new)

    def _remember(self, layer: Timewise, shape: Shape) -> None:
        if self.stream:
            b, c, _, h, w = shape
            own = self._bytes((b, c, sum(layer.tails()), h, w))
            self.state += own
            if not self._replaces:
                self._new = self.state
            elif self.bounds is None:  # a bounded walk writes over the state
                self._new = own
            self._most_new = max(self._most_new, self._new)
            self._held = max(self._held, self._bytes((b, c, layer.future or 0, h, w)))

    def _whole(self) -> list[Part]:
        shape = self.shape
        for index, layer in enumerate(self.layers):
            self._new = 0 if self._replaces else self._new
            trace = self.tracer.whole(layer, shape, self.stream)
            self.work = self.work.plus(trace.work)
            name = f"layer {index}, {type(layer).__name__}, and its input"
            self._note(name, self._bytes(shape) + trace.peak)
            if isinstance(layer, Timewise):
                self._remember(layer, shape)
            else:
                shape = stages.shape_after([layer], shape)
        return []

    def _bounded(self, bounds: Bounds) -> list[Part]:
        batch, *sample = self.shape
        now: Shape = (1, *sample)
        for run in stages.runs(self.layers):
            if isinstance(run, Timewise):
                self._remember(run, (batch, *now[1:]))
                self._chunks(run, now, bounds)
            else:
                self._new = 0 if self._replaces else self._new
                if bounds.rows is None:
                    self._groups(run, now, bounds)
                else:
                    self._bands(run, now, bounds)
                now = stages.shape_after(run, now)
        self.work = Work(*(batch * n for n in self.work))
        result = self._bytes((batch, *now[1:]))
        clip, frame = stages.arena_sizes(self.layers, self.shape, bounds)
        arenas = [] if bounds.offload is not None else [
            ("the clip's activation", clip * self.size), ("a frame's activation", frame * self.size)
        ]  # fmt: skip
        return [*arenas, ("the result", result)]

    def _chunks(self, layer: Timewise, shape: Shape, bounds: Bounds) -> None:
        _, c, t, h, w = shape
        piece: Shape = (1, c, t, 1, min(bounds.chunk(layer), h * w))
        for trace in self.tracer.passes([layer], piece, [piece], self.stream):
            self.work = self.work.plus(trace.work, h * w / piece[4])
            held = self._bytes(piece)
            if self.stream:
                held += self._bytes((1, c, sum(layer.tails()), 1, piece[4]))
            self._note(f"{piece[4]} pixels in {type(layer).__name__}", held + trace.peak)

    def _groups(self, run: list[Framewise], shape: Shape, bounds: Bounds) -> None:
        _, c, t, h, w = shape
        frames = min(bounds.group(run, shape), t)
        piece: Shape = (1, c, frames, h, w)
        in_arena = run[0] is not self.layers[0] and bounds.offload is None
        for layer in run:
            trace = self.tracer.whole(layer, piece, False)
            self.work = self.work.plus(trace.work, t / frames)
            held = 0 if in_arena else self._bytes(piece)
            self._note(f"{frames} frames in {type(layer).__name__}", held + trace.peak)
            piece, in_arena = stages.shape_after([layer], piece), False

    def _bands(self, run: list[Framewise], shape: Shape, bounds: Bounds) -> None:
        _, c, t, h, w = shape
        now: Shape = (1, c, 1, h, w)
        assert bounds.rows is not None
        for stage in stages.stages(run, now, bounds):
            after, name = stages.shape_after(stage, now), type(stage[0]).__name__
            if stage[0].halo is None:
                trace = self.tracer.whole(stage[0], now, False)
                self.work = self.work.plus(trace.work, t)
                self._note(f"a frame in {name}", self._bytes(now) + trace.peak)
            else:
                middle = _middle_band(stage, now, bounds.rows)
                for trace in self.tracer.passes(stage, middle[0], middle[1:], False):
                    bands = after[3] / middle[-1][3]
                    self.work = self.work.plus(trace.work, t * bands)
                    rows = f"a band of {bounds.rows} rows in {name}"
                    self._note(rows, 2 * self._bytes(middle[0]) + trace.peak)
            now = after


def _middle_band(stage: list[Framewise], shape: Shape, rows: int) -> list[Shape]:
    """Shapes of a band in the middle of a frame: what each layer reads, and the result."""
    shapes = stages.shapes_in(stage, shape)
    bands = spans(shapes[-1][3], rows)
    band = bands[len(bands) // 2] if len(bands) > 2 else bands[0]
    found = [(*shapes[-1][:3], band[1] - band[0], shapes[-1][4])]
    for layer, before in zip(reversed(stage), reversed(shapes[:-1]), strict=True):
        assert layer.halo is not None
        band = rows_read(band, layer.halo, layer.scale, before[3])
        found.insert(0, (*before[:3], band[1] - band[0], before[4]))
    return found
