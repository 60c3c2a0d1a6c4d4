"""What one way of walking one input has in memory at its worst moment, the way back included.

    kept      inputs of layers, or of segments, from which all inside of them is computed again
    passed    the result of a layer, or its gradient, whole and in pieces
    inside    what one piece is made of while its gradients are computed

Beside that the result is there, and a gradient for each weight that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from temporal_vae.network.autoencoder import Line
from temporal_vae.network.layer import Layer, Shape
from temporal_vae.walks import stages
from temporal_vae.walks.peak import Part, PlanRequest
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.tracing import Tracer


class _Moment(NamedTuple):
    """What is there while one unit is computed, or its gradients are."""

    name: str
    kept: int
    passed: int
    inside: int


class GradientPeak:
    """As `Peak`, for a walk and the way back of its gradients."""

    state = after = 0

    def __init__(self, line: Line, request: PlanRequest, bounds: Bounds | None, counter: Tracer):
        self._layers, self._request = list(line.layers()), request
        self._tracer = counter
        self.workspace = 0
        self.parts: list[Part] = [("the gradients of the weights", request.gradients or 0)]
        if bounds is None:
            all_at_once = self._tracer.there_and_back(line, request.shape)
            self.parts.append(("all that gradients need, and the result", all_at_once))
        else:
            self._in_pieces(bounds)

    def _in_pieces(self, bounds: Bounds) -> None:
        part, others = self._parts_apart(bounds)
        moments = list(self._moments(part, bounds))
        worst = max(moments, key=lambda moment: sum(moment[1:]))
        result = self._bytes(stages.shape_after(self._layers, self._request.shape))
        copies = 2 if self._request.operation == "decode" else 6  # in another layout; moments
        self.workspace = max(moment.inside for moment in moments)
        self.parts += [
            ("the result and what is made of it", copies * result),
            ("the gradient of the input", 2 * self._bytes(self._request.shape)),
            ("inputs that are kept", worst.kept + others * self._kept(part, bounds)),
            ("on the way between layers", worst.passed),
            (worst.name, worst.inside),
        ]

    def _bytes(self, shape: Shape) -> int:
        return math.prod(shape) * self._request.dtype.itemsize

    def _parts_apart(self, bounds: Bounds) -> tuple[Shape, int]:
        """The largest part of the input that goes through the line alone, and how many others."""
        b, c, t, h, w = self._request.shape
        frames = min(t, stages.frames_apart(self._layers, t, bounds))
        return (1, c, frames, h, w), b * math.ceil(t / frames) - 1

    def _kept(self, shape: Shape, bounds: Bounds) -> int:
        """Of a part, from its walk to the way back."""
        kept = 0
        for segment in stages.segments(self._layers, shape, bounds):
            kept += self._bytes(shape) if bounds.segments else 0
            for unit in segment:
                kept += 0 if bounds.segments else self._bytes(shape)
                shape = stages.shape_after(unit, shape)
        return kept

    def _moments(self, shape: Shape, bounds: Bounds) -> Iterator[_Moment]:
        """Each unit on the way there, and on the way back."""
        before = 0
        for segment in stages.segments(self._layers, shape, bounds):
            first, inputs = self._bytes(shape), 0
            end = stages.shape_after([layer for unit in segment for layer in unit], shape)
            for unit in segment:
                inputs += self._bytes(shape)
                after = stages.shape_after(unit, shape)
                yield from self._of_unit(unit, shape, bounds, before + inputs, self._bytes(end))
                shape = after
            before += first if bounds.segments else inputs

    def _of_unit(
        self, unit: Sequence[Layer], shape: Shape, bounds: Bounds, kept: int, end: int
    ) -> Iterator[_Moment]:
        piece = stages.piece_of(unit, shape, bounds)
        given, made = self._bytes(shape), self._bytes(stages.shape_after(unit, shape))
        whole = piece == shape
        frames, pixels = piece[2], piece[3] * piece[4]
        size = f"{pixels} pixels" if unit[0].cut == "pixels" else f"{frames} frames"
        name = f"gradients of {size} in {type(unit[0]).__name__}"
        there, back = self._tracer.again(unit, piece, norms=not whole)
        waiting = end if bounds.segments else 0
        yield _Moment(name, kept, waiting + made, there)
        yield _Moment(name, kept, made + (0 if whole else given), back)
        if not whole:
            yield _Moment("pieces put together", kept, waiting + 2 * made, 0)
            yield _Moment("pieces put together", kept, 2 * given, 0)
