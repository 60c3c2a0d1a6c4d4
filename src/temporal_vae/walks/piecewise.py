"""The bounded walk of lines whose layers see time and space together, and the past only.

Such a line is walked as a stream of pieces in time. Between them each layer remembers two frames
of its input: memory does not grow with the length of the clip, but what is remembered is about as
much as what is on the way. Bands of rows make less of both:

    bands outside, time inside    a band goes through the layers with all its pieces in time, and
                                  what layers remember is of that band alone; then the next band

A layer reads more rows than it gives, by its halo. What a band shares with the next one is computed
again, by the halo of all layers that it goes through; or every layer keeps the last rows of what it
read, of all frames, and nothing but the inside of layers is computed again. Layers that see the
whole frame cannot be in a band, and layers near the latent are small: they are walked with whole
frames, before the bands of a decoder or behind those of an encoder, and what is between is kept for
the whole clip.

Nothing is blended: the result is that of the whole walk, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from temporal_vae.geometry import Span, rows_read, spans
from temporal_vae.network.autoencoder import Line
from temporal_vae.network.folds import channels_last, joined
from temporal_vae.network.layer import Layer, Shape, State
from temporal_vae.walks import bounded
from temporal_vae.walks.stages import Bounds, shape_after
from temporal_vae.walks.workspace import new_clip


class Rows(NamedTuple):
    """What a band is for one layer of a section."""

    reads: Span
    """Rows of its input; none where it gives none."""
    gives: Span
    """Rows of its result."""
    keeps: int = 0
    """How many of the last rows that it reads it keeps for the next band."""

    @property
    def height(self) -> int:
        """Of its input."""
        return self.reads[1] - self.reads[0]


Band = list[Rows]
"""For each layer of a section."""


@dataclass(frozen=True)
class Section:
    """Layers that follow one another, with whole frames or in bands of rows of their result."""

    layers: list[Layer]
    rows: int | None
    keeps: bool = False
    """Whether layers keep what the next band reads as well, or it is computed again."""

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

    def bands(self, height: int, part: Span | None = None) -> list[Band]:
        """Band after band of the result, or of a part of it, for an input of a height."""
        heights = self._heights(height)
        if self.rows is None:
            return [[Rows((0, h), (0, after)) for h, after in pairwise(heights)]]
        first, stop = part or (0, heights[-1])
        found, done = list[Band](), [0] * len(self.layers)
        for start, end in spans(stop - first, self.rows):
            found.append(self._band((first + start, first + end), heights, done))
            if self.keeps:
                done = [rows.reads[1] for rows in found[-1]]
        return self._keeping(found) if self.keeps else found

    def reads(self, rows: Span, height: int) -> Span:
        """The rows of the input that some of the result need."""
        return self._band(rows, self._heights(height), [0] * len(self.layers))[0].reads

    def _heights(self, height: int) -> list[int]:
        """Before the first layer, and after each."""
        scales = (layer.scale for layer in self.layers)
        return list(accumulate(scales, lambda rows, scale: int(rows * scale), initial=height))

    def _band(self, wanted: Span, heights: list[int], done: list[int]) -> Band:
        """The rows of each layer for some of the result, of which it has read the first `done`."""
        band: Band = []
        for layer, height, known in zip(
            reversed(self.layers), reversed(heights[:-1]), reversed(done), strict=True
        ):
            assert layer.halo is not None
            reads = known, known
            if wanted[0] < wanted[1]:
                reads = rows_read(wanted, layer.halo, layer.scale, height)
            band.insert(0, Rows(reads, wanted))
            wanted = max(reads[0], known), reads[1]
        return band

    def _keeping(self, bands: list[Band]) -> list[Band]:
        """The same with the rows that are kept: as many as the next band reads again."""
        following = [rows.reads[1] for rows in bands[-1]]
        found = list[Band]()
        for band in reversed(bands):
            tops = zip(band, following, strict=True)
            found.insert(0, [rows._replace(keeps=rows.reads[1] - top) for rows, top in tops])
            following = [
                rows.reads[0] if rows.height else top
                for rows, top in zip(band, following, strict=True)
            ]
        return found


def sections(layers: Sequence[Layer], bounds: Bounds) -> list[Section]:
    """A line cut in two where bands begin or end; in one if there are none.

    The rows of `bounds` are those of a band where frames are largest: in pixels.
    """
    everything, changes = list(layers), [i for i, layer in enumerate(layers) if layer.scale != 1]
    if bounds.rows is None or not changes:
        return [Section(everything, None)]
    scale = _product(layer.scale for layer in everything)
    if scale > 1:
        cut = changes[0]
        banded = Section(everything[cut:], bounds.rows, bounds.keep_rows)
        found = [Section(everything[:cut], None), banded]
    else:
        cut = changes[-1] + 1
        banded = Section(everything[:cut], max(1, int(bounds.rows * scale)), bounds.keep_rows)
        found = [banded, Section(everything[cut:], None)]
    return [section for section in found if section.layers]


def operations(layers: Sequence[Layer], shape: Shape, bounds: Bounds) -> int:
    """About how many multiplications the walk of a clip (B, C, T, H, W) takes."""
    count, now = 0, shape
    for section in sections(layers, bounds):
        bands = section.bands(now[3])
        for index, layer in enumerate(section.layers):
            each = (band[index].height for band in bands)
            count += sum(layer.operations((*now[:3], rows, now[4])) for rows in each if rows)
            now = layer.output_shape(now)
    return count


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
    found = sections(layers, bounds)
    if len(found) > 1 or found[0].rows is not None:
        return (part for part in [walk(line, x, bounds)])
    return _through(found[0], x, bounds, found[0].bands(x.shape[3])[0])


def step(line: Line, x: Tensor, memories: list[State], bounds: Bounds) -> Tensor | None:
    """A piece of a stream through every layer, a few latents at a time -> what is certain by now.

    `memories` has an entry for each layer with tails; each is replaced.
    """
    bounded.refuse_watchers(line, x)
    layers = list(line.layers())
    assert bounds.pieces is not None
    found: list[Tensor] = []
    section = Section(layers, None)
    [band] = section.bands(x.shape[3])
    for start, stop in spans(x.shape[2], bounds.pieces * section.frames_each):
        y = _pass(section, x[:, :, start:stop], band, memories)
        found += [] if y is None else [y]
    return torch.cat(found, 2) if len(found) > 1 else next(iter(found), None)


def _walk_sample(layers: Sequence[Layer], x: Tensor, bounds: Bounds, out: Tensor) -> None:
    *before, last = sections(layers, bounds)
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
    height, top, wanted = part or Part(x.shape[3], 0, (0, target.shape[3]))
    kept: list[Kept] = [{} for _ in section.pieces(x.shape[2], bounds.pieces or 1)]
    for band in section.bands(height, wanted):
        first, stop = (row - wanted[0] for row in band[-1].gives)
        pieces = _through(section, x, bounds, band, top, kept)
        bounded.join(pieces, target[:, :, :, first:stop])


Kept = dict[int, Tensor]
"""The last rows that layers read of a piece in time, by the place of the layer."""


def _through(
    section: Section, x: Tensor, bounds: Bounds, band: Band, above: int = 0,
    kept: Sequence[Kept] = (),
) -> Iterator[Tensor]:  # fmt: skip
    """A section on some rows, piece after piece in time, of a clip without the rows `above`."""
    top, bottom = (row - above for row in band[0].reads)
    assert bounds.pieces is not None
    pieces = section.pieces(x.shape[2], bounds.pieces)
    memories: list[State] | None = None
    if len(pieces) > 1:
        memories = [() for layer in section.layers if layer.tails()]
    for (start, stop), rows in zip_longest(pieces, kept):
        part = x[:, :, start:stop, top:bottom]
        if (y := _pass(section, part, band, memories, rows)) is not None:
            yield y
        del part, y


@torch.no_grad()
def _pass(
    section: Section,
    x: Tensor,
    band: Band,
    memories: list[State] | None,
    kept: Kept | None = None,
) -> Tensor | None:
    """A piece of some rows through the layers; without memories it is all there is in time."""
    places = iter(range(len(section.layers)))
    y: Tensor | None = channels_last(x)
    del x
    for index, (layer, rows) in enumerate(zip(section.layers, band, strict=True)):
        place = next(places) if layer.tails() else None
        if not rows.height:  # all that it has to give was given
            y = None
            continue
        if kept is not None and section.keeps and index:
            y = _with_kept(kept, index, y, rows)
        assert y is not None
        if memories is None or place is None:
            y = layer.compute(y)
        else:
            given, memories[place] = layer.stream(y, memories[place], last=False)
            if given is None:
                return None
            y = given
            del given
        skipped = rows.gives[0] - int(rows.reads[0] * layer.scale)
        y = y[:, :, :, skipped : skipped + rows.gives[1] - rows.gives[0]]
    return y


def _with_kept(kept: Kept, index: int, y: Tensor | None, rows: Rows) -> Tensor:
    """The rows that a layer reads: those it kept of the last band, and new ones behind them."""
    known = kept.pop(index, None)
    if known is not None:
        again = rows.height - (0 if y is None else y.shape[3])
        known = known[:, :, :, known.shape[3] - again :]
        y = known if y is None else joined(known, y, axis=3)
    assert y is not None
    if rows.keeps:
        kept[index] = y[:, :, :, y.shape[3] - rows.keeps :].clone()
    return y


def largest_pieces(
    layers: Sequence[Layer], shape: Shape, bounds: Bounds, ranks: int = 1
) -> Iterator[tuple[Section, Shape, Band, bool]]:
    """Each section and kind of band, the shape of what it gets for its largest piece in time, and
    whether its layers remember: what a plan counts, of one process of `ranks`."""
    assert bounds.pieces is not None
    now: Shape = (1, *shape[1:])
    for section in sections(layers, bounds):
        cut = section.pieces(now[2], bounds.pieces)
        most = max(stop - start for start, stop in cut)
        for band in bands_of_part(section, now[3], ranks):
            yield section, (1, now[1], most, band[0].height, now[4]), band, len(cut) > 1
        now = shape_after(section.layers, now)


def among(section: Section, height: int, ranks: int) -> tuple[int, Span]:
    """A height that has a part of a clip in its middle, and the rows that a section gives of it."""
    own = int(height * section.scale)
    return (2 * ranks - 1) * height, ((ranks - 1) * own, ranks * own)


def bands_of_part(section: Section, height: int, ranks: int) -> list[Band]:
    """The bands, of each size once, of a part of a clip that is so high, where there are as many
    rows above and below as the other processes may have."""
    if section.rows is None:
        return section.bands(height)
    found = section.bands(*among(section, height, ranks))
    return list({tuple((r.height, r.keeps) for r in band): band for band in found}.values())


def _product(numbers: Iterator[Fraction]) -> Fraction:
    return math.prod(numbers, start=Fraction(1))
