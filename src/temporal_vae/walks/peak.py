"""What one way of walking one input has in memory at its worst moment."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import NamedTuple

import torch

from temporal_vae.geometry import rows_read, spans
from temporal_vae.network.autoencoder import Line
from temporal_vae.network.layer import Layer, Shape
from temporal_vae.network.lines import Operation
from temporal_vae.walks import piecewise, stages
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.tracing import Results, Tracer

Offload = str | os.PathLike[str] | None
Part = tuple[str, int]


class PlanRequest(NamedTuple):
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
    gradients: int | None = None
    """Bytes of the weights that are trained; None for a walk without gradients."""
    ranks: int = 1
    """How many processes walk the clip together; `shape` is that of the largest part."""


class Peak:
    """The bytes that one way of walking one input has alive at its worst moment.

    `parts` is what they are made of, `workspace` what pieces take at the most, `state` the size of
    one state of a stream, and `after` what there is when the layers are done.
    """

    def __init__(
        self, line: Line, request: PlanRequest, bounds: Bounds | None, counter: Tracer | Results
    ):
        self.layers, self.bounds, self.request = list(line.layers()), bounds, request
        self.tracer = counter
        self.size, self.stream = request.dtype.itemsize, request.stream
        self.state = self._held = 0
        self._replaces = not request.keep_state
        self._new = self._most_new = 0
        self._worst: tuple[str, int, int] = ("", 0, 0)
        self._largest: Part = ("", 0)
        self.parts = self._parts()
        self.workspace = self._largest[1]
        self.after = self._after_the_walk()

    def _parts(self) -> list[Part]:
        parts = self._whole() if self.bounds is None else self._bounded(self.bounds)
        name, size, after = self._worst
        if self._held:  # at the end every layer has its next state, and one hands on what it held
            (name, size), after = self._largest, self._most_new + 2 * self._held
        parts.append((name, size))
        if self.stream:
            new = "a layer's next state" if self._replaces else "the next state"
            parts = [("the state of the stream", self.state), (new, after), *parts]
        return [(name, size) for name, size in parts if size]

    def _after_the_walk(self) -> int:
        """Copies in the caller's layout, or moments and noise."""
        result = self._bytes(stages.shape_after(self.layers, self.request.shape))
        if self.request.operation == "decode":
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

    def _remember(self, layer: Layer, shape: Shape) -> None:
        if not self.stream:
            return
        own = layer.tail_numbers(shape) * self.size
        self.state += own
        if not self._replaces:
            self._new = self.state
        elif self.bounds is None:  # a bounded walk writes over the state
            self._new = own
        self._most_new = max(self._most_new, self._new)
        b, c, _, h, w = shape
        self._held = max(self._held, self._bytes((b, c, layer.future or 0, h, w)))

    def _whole(self) -> list[Part]:
        shape = self.request.shape
        for index, layer in enumerate(self.layers):
            self._new = 0 if self._replaces else self._new
            peak = self.tracer.whole(layer, shape, self.stream)
            name = f"layer {index}, {type(layer).__name__}, and its input"
            self._note(name, self._bytes(shape) + peak)
            if layer.tails():
                self._remember(layer, shape)
            shape = layer.output_shape(shape, begins=not self.stream)
        return []

    def _bounded(self, bounds: Bounds) -> list[Part]:
        batch, *sample = self.request.shape
        now: Shape = (1, *sample)
        for run in stages.runs(self.layers):
            if run[0].cut != "frames":
                self._remember(run[0], (batch, *now[1:]))
                self._chunks(run[0], now, bounds)
            else:
                self._new = 0 if self._replaces else self._new
                cut = self._groups if bounds.rows is None else self._bands
                cut(run, now, bounds)
            now = stages.shape_after(run, now)
        result = self._bytes((batch, *now[1:]))
        clip, frame = stages.arena_sizes(self.layers, self.request.shape, bounds)
        arenas = [] if bounds.offload is not None else [
            ("the clip's activation", clip * self.size), ("a frame's activation", frame * self.size)
        ]  # fmt: skip
        return [*arenas, ("the result", result)]

    def _chunks(self, layer: Layer, shape: Shape, bounds: Bounds) -> None:
        _, c, t, h, w = shape
        piece = shape
        if layer.cut == "pixels":
            piece = (1, c, t, 1, min(bounds.chunk(layer), h * w))
        if self.request.ranks > 1:  # all frames of as many pixels as a process has frames, or more
            everyone = t * self.request.ranks
            pixels = min(math.ceil(t * max(bounds.chunk(layer), everyone) / everyone), h * w)
            piece = (1, c, everyone, 1, pixels)
        held = self._bytes(piece)
        if self.stream:
            held += layer.tail_numbers(piece) * self.size
        if self.request.ranks > 1:  # what is sent, what comes, and what comes in another size
            held += 3 * self._bytes(piece)
        name = f"{math.prod(piece[3:])} pixels in {type(layer).__name__}"
        for peak in self.tracer.passes([layer], piece, [piece], self.stream):
            self._note(name, held + peak)

    def _groups(self, run: list[Layer], shape: Shape, bounds: Bounds) -> None:
        _, c, t, h, w = shape
        frames = min(bounds.group(run, shape), t)
        piece: Shape = (1, c, frames, h, w)
        in_arena = run[0] is not self.layers[0] and bounds.offload is None
        for layer in run:
            peak = self.tracer.whole(layer, piece, False)
            held = 0 if in_arena else self._bytes(piece)
            self._note(f"{frames} frames in {type(layer).__name__}", held + peak)
            piece, in_arena = layer.output_shape(piece), False

    def _bands(self, run: list[Layer], shape: Shape, bounds: Bounds) -> None:
        _, c, _, h, w = shape
        now: Shape = (1, c, 1, h, w)
        assert bounds.rows is not None
        for stage in stages.stages(run, now, bounds):
            name = type(stage[0]).__name__
            if stage[0].halo is None:
                peak = self.tracer.whole(stage[0], now, False)
                self._note(f"a frame in {name}", self._bytes(now) + peak)
            else:
                middle = _middle_band(stage, now, bounds.rows)
                for peak in self.tracer.passes(stage, middle[0], middle[1:], False):
                    rows = f"a band of {bounds.rows} rows in {name}"
                    self._note(rows, 2 * self._bytes(middle[0]) + peak)
            now = stages.shape_after(stage, now)


class PiecewisePeak(Peak):
    """The same of a line that is walked in pieces in time and bands of rows: see `piecewise`."""

    def _parts(self) -> list[Part]:
        assert self.bounds is not None
        result = self._bytes(stages.shape_after(self.layers, self.request.shape, not self.stream))
        worst, between = list[Part](), 0
        for section, shape, band, remembers in self._sections(self.bounds):
            between = max(between, self._between(section))
            state, own, moment = self._section(section, shape, band, remembers)
            around = self._around(section)
            parts = [
                ("rows for the next band", self._kept(section)),
                ("with rows around", around),
                ("what layers remember of a piece", state),
                moment,
            ]
            if self.stream:
                self.state = state
                parts = [
                    ("the state of the stream", state), ("the next state", self._next(state, own)),
                    moment,
                ]  # fmt: skip
            worst = max(worst, parts, key=lambda parts: sum(size for _, size in parts))
            self._largest = max(self._largest, ("a piece", state + moment[1]), key=lambda x: x[1])
        parts = [("the result", result), ("between whole frames and bands", between), *worst]
        return [(name, size) for name, size in parts if size]

    def _next(self, state: int, largest: int) -> int:
        return largest if self._replaces else state

    def _sections(
        self, bounds: Bounds
    ) -> Iterable[tuple[piecewise.Section, Shape, piecewise.Band, bool]]:
        if not self.stream:
            return piecewise.largest_pieces(
                self.layers, self.request.shape, bounds, self.request.ranks
            )
        assert bounds.pieces is not None
        section, (b, c, t, h, w) = piecewise.Section(self.layers, None), self.request.shape
        frames = min(t, bounds.pieces * section.frames_each)
        return [(section, (b, c, frames, h, w), section.bands(h)[0], True)]

    def _between(self, section: piecewise.Section) -> int:
        """What the clip takes behind a section, unless it is the last."""
        if section.layers[-1] is self.layers[-1]:
            return 0
        shape: Shape = (1, *self.request.shape[1:])
        return self._bytes(stages.shape_after(section.layers, shape))

    def _around(self, section: piecewise.Section) -> int:
        """What several processes hold beside their parts: these with the rows around that bands
        read, and those rows as they are sent and as they come."""
        if self.request.ranks == 1 or section.rows is None:
            return 0
        b, c, t, h, w = self._before(section)
        height, rows = piecewise.among(section, h, self.request.ranks)
        top, bottom = section.reads(rows, height)
        return self._bytes((b, c, t, 3 * (bottom - top) - 2 * h, w))

    def _kept(self, section: piecewise.Section) -> int:
        """The rows that layers keep for the next band, of all frames."""
        if not section.keeps:
            return 0
        (*_, height, _), *inside = stages.shapes_in(section.layers, self._before(section))
        bands = piecewise.bands_of_part(section, height, self.request.ranks)
        most = (max(band[index].keeps for band in bands) for index in range(1, len(inside)))
        shapes = ((*shape[:3], rows, shape[4]) for shape, rows in zip(inside, most, strict=False))
        return sum(map(self._bytes, shapes))

    def _before(self, section: piecewise.Section) -> Shape:
        """What a section gets."""
        before = self.layers[: self.layers.index(section.layers[0])]
        return stages.shape_after(before, (1, *self.request.shape[1:]))

    def _section(
        self, section: piecewise.Section, shape: Shape, band: piecewise.Band, remembers: bool
    ) -> tuple[int, int, Part]:
        """(bytes of the tails of all layers, of the largest, and the worst moment beside them)."""
        state, largest, moment = 0, 0, ("", 0)
        given = self._bytes(shape)  # with the rows that were read in vain
        joined = self.request.ranks > 1 and section.rows is None  # with other rows, at each layer
        for index, (layer, part) in enumerate(zip(section.layers, band, strict=True)):
            stream = remembers and bool(layer.tails())
            if not part.height:  # it has given all
                given, shape = 0, layer.output_shape((*shape[:3], 0, shape[4]), not remembers)
                continue
            if joined:
                given, shape = self._joined(layer, shape, given)
            elif section.keeps and index:  # new rows, and those joined with the ones kept
                joint = (*shape[:3], part.height, shape[4])
                moment = max(moment, ("", given + self._bytes(joint)), key=lambda part: part[1])
                given, shape = self._bytes(joint), joint
            own = layer.tail_numbers(shape) * self.size if stream else 0
            state, largest = state + own, max(largest, own)
            peak = given + self.tracer.whole(layer, shape, stream)
            rows = f"{shape[2]} frames of {shape[3]} rows in {type(layer).__name__}"
            moment = max(moment, (rows, peak), key=lambda part: part[1])
            b, c, t, _, w = after = layer.output_shape(shape, begins=not remembers)
            given, shape = self._bytes(after), (b, c, t, part.gives[1] - part.gives[0], w)
        return state, largest, moment

    def _joined(self, layer: Layer, shape: Shape, given: int) -> tuple[int, Shape]:
        """What a layer of whole frames gets of a part of their rows, and what there is beside it:
        the part, rows that are sent, and those that come."""
        b, c, t, h, w = shape
        if layer.halo is None:  # some whole frames, for rows of all
            whole = (b, c, math.ceil(t / self.request.ranks), h * self.request.ranks, w)
            return given + self._bytes(shape) + 2 * self._bytes(whole), whole
        around = sum(layer.halo)
        wide = (b, c, t, h + around, w)
        return given + self._bytes(wide) + 2 * self._bytes((b, c, t, around, w)), wide


def _middle_band(stage: list[Layer], shape: Shape, rows: int) -> list[Shape]:
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
