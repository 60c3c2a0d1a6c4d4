"""The bounded walk of lines whose layers see time and space together, and the past only.

Such a line is walked as a stream of pieces in time. Between them each layer remembers two frames
of its input: memory does not grow with the length of the clip, but what is remembered is about as
much as what is on the way. Bands of rows make less of both:

    bands outside, time inside    a band goes through the layers with all its pieces in time, and
                                  what layers remember is of that band alone; then the next band

A band reads more rows than it gives, by the halo of all layers it goes through: those are computed
again for the next band. Layers that see the whole frame cannot be in it, and layers near the latent
are small: they are walked with whole frames, before the bands of a decoder or behind those of an
encoder, and what is between is kept for the whole clip.

Nothing is blended: the result is that of the whole walk, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from temporal_vae.geometry import Span, rows_read, spans
from temporal_vae.network.autoencoder import Line
from temporal_vae.network.folds import channels_last
from temporal_vae.network.layer import Layer, Shape, State
from temporal_vae.walks import bounded
from temporal_vae.walks.stages import Bounds, shape_after
from temporal_vae.walks.workspace import new_clip


@dataclass(frozen=True)
class Section:
    """Layers that follow one another, with whole frames or in bands of rows of their result."""

    layers: list[Layer]
    rows: int | None

    @property
    def frames_each(self) -> int:
        """Frames of the input that give one latent, or are one."""
        return max(1, int(1 / _product(layer.rate for layer in self.layers)))

    @property
    def scale(self) -> Fraction:
        """Rows of the result for one of the input."""
        return _product(layer.scale for layer in self.layers)

    def pieces(self, frames: int, latents: int) -> list[Span]:
        """Frames of a clip as pieces in time, of so many latents.

        The first frame of a clip is a latent alone, so the first piece is shorter.
        """
        each = self.frames_each
        first = min(frames, 1 + (latents - 1) * each)
        later = spans(frames - first, latents * each)
        return [(0, first), *((first + start, first + stop) for start, stop in later)]

    def bands(self, height: int) -> list[Span]:
        """The rows of the result, band after band, for an input of a height."""
        total = int(height * self.scale)
        return spans(total, self.rows or total)

    def levels(self, rows: Span, height: int) -> list[Span]:
        """The rows that each layer reads for some of the result, and those at the end."""
        heights = [height]
        for layer in self.layers:
            heights.append(int(heights[-1] * layer.scale))
        if self.rows is None:
            return [(0, rows) for rows in heights]
        levels = [rows]
        for layer, whole in zip(reversed(self.layers), reversed(heights[:-1]), strict=True):
            assert layer.halo is not None
            levels.insert(0, rows_read(levels[0], layer.halo, layer.scale, whole))
        return levels


def sections(layers: Sequence[Layer], rows: int | None) -> list[Section]:
    """A line cut in two where bands begin or end; in one if there are none.

    `rows` are those of a band where frames are largest: in pixels.
    """
    everything, changes = list(layers), [i for i, layer in enumerate(layers) if layer.scale != 1]
    if rows is None or not changes:
        return [Section(everything, None)]
    scale = _product(layer.scale for layer in everything)
    if scale > 1:
        cut = changes[0]
        found = [Section(everything[:cut], None), Section(everything[cut:], rows)]
    else:
        cut = changes[-1] + 1
        coarse = max(1, int(rows * scale))
        found = [Section(everything[:cut], coarse), Section(everything[cut:], None)]
    return [section for section in found if section.layers]


def walk(line: Line, x: Tensor, bounds: Bounds, out: Tensor | None = None) -> Tensor:
    """A clip (B, C, T, H, W) through every layer, one sample at a time, into `out` or a new tensor.

    Raises `ValueError` under autograd, as other bounded walks do.
    """
    bounded.refuse_watchers(line, x)
    layers = list(line.layers())
    if out is None:
        out = x.new_zeros(shape_after(layers, tuple(x.shape)))  # touched, so as to be there
    with torch.no_grad():
        for sample, result in zip(x.split(1), out.split(1), strict=True):
            _walk_sample(layers, sample, bounds, result)
    return out


def frames(line: Line, x: Tensor, bounds: Bounds) -> Iterator[Tensor]:
    """The result of `walk` for one sample, piece after piece, or with bands at once at the end."""
    bounded.refuse_watchers(line, x)
    layers = list(line.layers())
    found = sections(layers, bounds.rows)
    if len(found) > 1 or found[0].rows is not None:
        return (part for part in [walk(line, x, bounds)])
    return _through(found[0], x, bounds, found[0].levels((0, 0), x.shape[3]))


def step(line: Line, x: Tensor, memories: list[State], bounds: Bounds) -> Tensor | None:
    """A piece of a stream through every layer, a few latents at a time -> what is certain by now.

    `memories` has an entry for each layer with tails; each is replaced.
    """
    bounded.refuse_watchers(line, x)
    layers = list(line.layers())
    assert bounds.pieces is not None
    found: list[Tensor] = []
    section = Section(layers, None)
    levels = section.levels((0, 0), x.shape[3])
    for start, stop in spans(x.shape[2], bounds.pieces * section.frames_each):
        y = _pass(section, x[:, :, start:stop], levels, memories)
        found += [] if y is None else [y]
    return torch.cat(found, 2) if len(found) > 1 else next(iter(found), None)


def _walk_sample(layers: Sequence[Layer], x: Tensor, bounds: Bounds, out: Tensor) -> None:
    *before, last = sections(layers, bounds.rows)
    for section in before:
        between = new_clip(x, shape_after(section.layers, tuple(x.shape)), x.device)
        fill(section, x, between, bounds)
        x = between
    fill(last, x, out, bounds)


class Part(NamedTuple):
    """Some rows of a clip, where not all of them are at hand."""

    height: int
    """Of the whole clip."""
    top: int
    """The first of its rows that is at hand."""
    rows: Span
    """The rows of the result that are wanted."""


def fill(
    section: Section, x: Tensor, target: Tensor, bounds: Bounds, part: Part | None = None
) -> None:
    """A section of a clip (1, C, T, H, W), or of a part of it, into the target, band after band."""
    height, top, (first, stop) = part or Part(x.shape[3], 0, (0, target.shape[3]))
    for start, end in spans(stop - first, section.rows or stop - first):
        band, levels = (
            target[:, :, :, start:end],
            section.levels((first + start, first + end), height),
        )
        bounded.join(_through(section, x, bounds, levels, top), band)


def _through(
    section: Section, x: Tensor, bounds: Bounds, levels: list[Span], above: int = 0
) -> Iterator[Tensor]:
    """A section on some rows, piece after piece in time, of a clip without the rows `above`."""
    top, bottom = (row - above for row in levels[0])
    assert bounds.pieces is not None
    pieces = section.pieces(x.shape[2], bounds.pieces)
    memories: list[State] | None = None
    if len(pieces) > 1:
        memories = [() for layer in section.layers if layer.tails()]
    for start, stop in pieces:
        part = x[:, :, start:stop, top:bottom]
        if (y := _pass(section, part, levels, memories)) is not None:
            yield y
        del part, y


@torch.no_grad()
def _pass(
    section: Section, x: Tensor, levels: list[Span], memories: list[State] | None
) -> Tensor | None:
    """A piece of some rows through the layers; without memories it is all there is in time."""
    index, y = 0, channels_last(x)
    del x
    for layer, (top, _), (first, stop) in zip(section.layers, levels, levels[1:], strict=False):
        if memories is None or not layer.tails():
            y = layer.compute(y)
        else:
            given, memories[index] = layer.stream(y, memories[index], last=False)
            index += 1
            if given is None:
                return None
            y = given
            del given
        skipped = first - int(top * layer.scale)
        y = y[:, :, :, skipped : skipped + stop - first]
    return y


def largest_pieces(
    layers: Sequence[Layer], shape: Shape, bounds: Bounds
) -> Iterator[tuple[Section, Shape, list[Span], bool]]:
    """Each section, the shape of what it gets for its largest piece and band, the rows that its
    layers read, and whether its layers remember: what a plan counts."""
    assert bounds.pieces is not None
    now: Shape = (1, *shape[1:])
    for section in sections(layers, bounds.rows):
        cut = section.pieces(now[2], bounds.pieces)
        most = max(stop - start for start, stop in cut)
        bands = section.bands(now[3])
        found = [section.levels(band, now[3]) for band in bands]
        levels = max(found, key=lambda levels: sum(stop - start for start, stop in levels))
        top, bottom = levels[0]
        yield section, (1, now[1], most, bottom - top, now[4]), levels, len(cut) > 1
        now = shape_after(section.layers, now)


def _product(numbers: Iterator[Fraction]) -> Fraction:
    return math.prod(numbers, start=Fraction(1))
