"""The sharded walk: one clip that several processes hold together, each a part of it.

    layers that see one frame      each process has some frames, with all pixels of them
    layers that see several        each process has some pixels, with all frames of them
    layers that see both           each process has some rows, and is handed those around them

Where the kind of layer changes, frames are exchanged for pixels and back, a chunk of pixels at a
time: chunk after chunk is sent, and what comes for it is put in its place. Norms that sum over more
than one process has join the sums of all. So each process walks its share bounded, and the result
is that of the whole walk, to rounding.

What is exchanged goes through `processes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from temporal_vae.geometry import Span, rows_read, spans
from temporal_vae.network.autoencoder import Line
from temporal_vae.network.folds import channels_last, joined
from temporal_vae.network.kernels.norm import Moments
from temporal_vae.network.layer import Layer, State
from temporal_vae.network.primitives import Norm, own_norm
from temporal_vae.walks import bounded
from temporal_vae.walks.norm_sums import input_of, moments_of, with_known
from temporal_vae.walks.piecewise import Part, Section, fill, sections
from temporal_vae.walks.processes import Group
from temporal_vae.walks.stages import Bounds, shape_after
from temporal_vae.walks.workspace import Workspace, new_clip

NO_BOUND = 2**31


def agreed(group: Group, x: Tensor, axis: int) -> list[int]:
    """The sizes along an axis of the parts of a clip (B, C, T, H, W) that the processes have.

    Raises `ValueError`, in every process, for parts that do not belong together.
    """
    told = torch.tensor([*x.shape, x.element_size()], device=x.device)
    shapes = [s.tolist() for s in group.of_all(told)]
    others = {tuple(n for i, n in enumerate(shape) if i != axis) for shape in shapes}
    what = "frames" if axis == 2 else "rows"
    if len(others) > 1:
        raise ValueError(
            f"the processes have parts of different clips, of {[s[:-1] for s in shapes]} numbers, "
            f"each of {[s[-1] for s in shapes]} bytes: all but {what} must be the same"
        )
    found = [int(shape[axis]) for shape in shapes]
    if min(found) < 1:
        raise ValueError(
            f"every process needs at least one of the {what}, and they have {found}: take fewer "
            "processes"
        )
    return found


# Frames and pixels ---------------------------------------------------------------------------


def walk(line: Line, x: Tensor, bounds: Bounds, group: Group) -> Tensor:
    """This process's frames (B, C, n, H, W) of a clip through every layer.

    The parts follow one another in the order of the processes. Raises `ValueError` for layers that
    see time and space together, and where a bounded walk does.
    """
    bounded.refuse_watchers(line, x)
    layers, frames = list(line.layers()), agreed(group, x, 2)
    work = Workspace(layers, x, _common(bounds, group, x))
    out = x.new_zeros(shape_after(layers, tuple(x.shape)))
    for sample, result in zip(x.split(1), out.split(1), strict=True):
        across = partial(_across, work, group, frames)
        bounded.join(bounded.walk_sample(layers, sample, work, across), result)
    return out


def _common(bounds: Bounds, group: Group, x: Tensor) -> Bounds:
    """Bounds whose chunks of pixels, and pieces in time, are those of all processes."""
    optional = bounds.channels, bounds.pieces, bounds.rows  # None: no bound
    own = [bounds.pixels, *(n or NO_BOUND for n in optional)]
    everyone = torch.stack(group.of_all(torch.tensor(own, device=x.device)))
    pixels, *least = (int(n) for n in everyone.amin(0))
    channels, pieces, rows = (None if n == NO_BOUND else n for n in least)
    return replace(bounds, pixels=pixels, channels=channels, pieces=pieces, rows=rows)


class _Chunk:
    """Some pixels of a clip: some frames of all of them here, and all frames of some of them."""

    def __init__(self, span: Span, frames: list[int], group: Group):
        self.span, self._frames, self._group = span, frames, group
        start, stop = span
        before = accumulate(frames, initial=0)  # a process gets pixels as it has frames
        self._edges = [(stop - start) * n // sum(frames) for n in before]
        self._own = self._edges[group.rank + 1] - self._edges[group.rank]
        self._kept: Tensor | None = None

    def take(self, clip: Tensor) -> Tensor:
        """Send pixels (t, P, C) of the frames here; some pixels with all frames, (T, p, C)."""
        here = clip[:, slice(*self.span)]
        parts = [here[:, first:stop] for first, stop in pairwise(self._edges)]
        channels = clip.shape[-1]
        numbers = [frames * self._own * channels for frames in self._frames]
        got = self._group.exchange(parts, numbers)
        counted = zip(got, self._frames, strict=True)
        return torch.cat([part.view(frames, self._own, channels) for part, frames in counted])

    def keep(self, clip: Tensor, pixels: Tensor) -> None:
        """Put what `take` gave where what was sent was, or aside if it is of another size."""
        here = clip[:, slice(*self.span)]
        if here.numel() == pixels.numel():
            here.copy_(pixels.view(here.shape))
        else:
            self._kept = pixels

    def kept(self, clip: Tensor) -> Tensor:
        """What `keep` put away, (T, p, C)."""
        if self._kept is not None:
            return self._kept
        here = clip[:, slice(*self.span)]
        return here.reshape(sum(self._frames), self._own, clip.shape[-1])

    def give(self, clip: Tensor, pixels: Tensor) -> None:
        """Send pixels with all frames (T, p, C) back; the frames here have all pixels again."""
        channels, own = clip.shape[-1], clip.shape[0]
        widths = [stop - first for first, stop in pairwise(self._edges)]
        got = self._group.exchange(
            pixels.split(self._frames), [own * width * channels for width in widths]
        )
        here = clip[:, slice(*self.span)]
        for (first, stop), part in zip(pairwise(self._edges), got, strict=True):
            here[:, first:stop] = part.view(own, stop - first, channels)


def _across(work: Workspace, group: Group, frames: list[int], layer: Layer, clip: Tensor) -> Tensor:
    """A layer over all frames of a clip (1, C, n, H, W) of which this process has some."""
    if layer.cut != "pixels":
        raise ValueError(
            f"a {type(layer).__name__} sees time and space together, beside layers that are split "
            "by frames: such a line cannot be walked by several processes"
        )
    flat = clip[0].movedim(0, -1).flatten(1, 2)  # (n, P, C), a view
    total = sum(frames)
    together = total * max(1, work.bounds.chunk(layer) // total)
    chunks = [_Chunk(span, frames, group) for span in spans(flat.shape[1], together)]
    apply: Norm = own_norm
    ready = partial(_taken, flat)
    if layer.norms():
        for chunk in chunks:
            chunk.keep(flat, chunk.take(flat))
        ready = partial(_kept, flat)
        apply = with_known(_sums(layer, chunks, ready, group, flat))
    for chunk in chunks:
        x = ready(chunk)
        y = layer.compute(_as_clip(x), apply) if x.numel() else _as_clip(x)
        if y.shape[1:3] != (clip.shape[1], total):
            raise ValueError(
                f"a {type(layer).__name__} changes the number of frames or channels over time: "
                "such a line cannot be walked by several processes"
            )
        chunk.give(flat, y[0].movedim(0, -1).flatten(1, 2))
        del x, y
    return clip


def _taken(clip: Tensor, chunk: _Chunk) -> Tensor:
    return chunk.take(clip)


def _kept(clip: Tensor, chunk: _Chunk) -> Tensor:
    return chunk.kept(clip)


def _as_clip(pixels: Tensor) -> Tensor:
    """(T, p, C) -> (1, C, T, 1, p), channels-last; a view."""
    return pixels[None, :, None].movedim(-1, 1)


def _sums(
    layer: Layer,
    chunks: list[_Chunk],
    ready: Callable[[_Chunk], Tensor],
    group: Group,
    like: Tensor,
) -> dict[nn.Module, Moments]:
    """The moments of a layer's norms over the whole clip."""
    known: dict[nn.Module, Moments] = {}
    for norm in layer.norms():

        def inputs(norm: nn.Module = norm) -> Iterator[Tensor]:
            for chunk in chunks:
                if (x := ready(chunk)).numel():
                    yield input_of(norm, known, partial(layer.compute, _as_clip(x)))
                del x

        first = next(found := inputs(), None)
        own = None if first is None else moments_of(norm, _with_first(first, found))
        del first
        known[norm] = group.joined(own, norm, like)
    return known


def _with_first(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


# Rows ----------------------------------------------------------------------------------------


def walk_rows(line: Line, x: Tensor, bounds: Bounds, group: Group) -> Tensor:
    """This process's rows (B, C, T, h, W) of a clip through every layer, piece after piece in time.

    The parts lie below one another in the order of the processes. Raises `ValueError` where a
    bounded walk does.
    """
    bounded.refuse_watchers(line, x)
    layers, rows = list(line.layers()), agreed(group, x, 3)
    bounds = _common(bounds, group, x)
    out = x.new_zeros(shape_after(layers, tuple(x.shape)))
    with torch.no_grad():
        for sample, result in zip(x.split(1), out.split(1), strict=True):
            clip, share = sample, _Rows(list(accumulate(rows, initial=0)), group)
            for section in sections(layers, bounds):
                target = result
                if section.layers[-1] is not layers[-1]:
                    shape = shape_after(section.layers, tuple(clip.shape))
                    target = new_clip(clip, shape, clip.device)
                share = share.walk(section, clip, bounds, target)
                clip = target
    return out


class _Rows:
    """The rows of a frame that each process has."""

    def __init__(self, edges: list[int], group: Group):
        """`edges`: the first row of each process, and one past the last of all."""
        self._edges, self._group = edges, group

    def walk(self, section: Section, clip: Tensor, bounds: Bounds, target: Tensor) -> _Rows:
        """A section on a clip (1, C, T, h, W), into the target; the rows behind it.

        In bands, the rows around are handed over once, for all layers; else before each of them.
        """
        after = [int(edge * section.scale) for edge in self._edges]
        if section.rows is None:
            cut = section.pieces(clip.shape[2], bounds.pieces or 1)
            bounded.join(self._pieces(section.layers, clip, cut), target)
        else:
            own = after[self._group.rank], after[self._group.rank + 1]
            needs = [section.reads(rows, self._edges[-1]) for rows in pairwise(after)]
            clip, top = self._with_rows(clip, self._edges, needs)
            fill(section, clip, target, bounds, Part(self._edges[-1], top, own))
        return _Rows(after, self._group)

    def _pieces(self, layers: Sequence[Layer], x: Tensor, cut: list[Span]) -> Iterator[Tensor]:
        """What layers make of a clip (1, C, T, h, W), piece after piece in time."""
        memories: list[State] | None = None
        if len(cut) > 1:
            memories = [() for layer in layers if layer.tails()]
        for start, stop in cut:
            yield self._through(layers, channels_last(x[:, :, start:stop]), memories)

    def _through(self, layers: Sequence[Layer], y: Tensor, memories: list[State] | None) -> Tensor:
        """A piece in time (1, C, n, h, W) through layers; each of the memories is replaced. Without
        them it is all there is in time."""
        index, edges = 0, self._edges
        for layer in layers:
            if layer.halo is None:
                y = self._whole_frames(layer, y, edges)
                continue
            after = [int(edge * layer.scale) for edge in edges]
            top = edges[self._group.rank]
            if layer.halo != (0, 0):
                needs = [
                    rows_read(rows, layer.halo, layer.scale, edges[-1]) for rows in pairwise(after)
                ]
                y, top = self._with_rows(y, edges, needs)
            if memories is not None and layer.tails():
                given, memories[index] = layer.stream(y, memories[index], last=False)
                index += 1
                assert given is not None  # a layer that sees the past alone holds nothing back
                y = given
                del given
            else:
                y = layer.compute(y)
            first, stop = after[self._group.rank : self._group.rank + 2]
            skipped = first - int(top * layer.scale)
            y, edges = y[:, :, :, skipped : skipped + stop - first], after
        return y

    def _with_rows(self, y: Tensor, edges: list[int], needs: list[Span]) -> tuple[Tensor, int]:
        """The rows that this process needs of all, its own and others', and the first of them."""
        owns, rank = list(pairwise(edges)), self._group.rank
        (b, c, t, _, w), mine = y.shape, owns[rank]
        parts = [
            _rows(y, _common_span(mine, (0, 0) if i == rank else need), mine[0])
            for i, need in enumerate(needs)
        ]
        wanted = [
            _common_span((0, 0) if i == rank else own, needs[rank]) for i, own in enumerate(owns)
        ]
        got = self._group.exchange(parts, [b * c * t * (s - f) * w for f, s in wanted])
        blocks = [
            y if i == rank else part.view(b, t, s - f, w, c).movedim(-1, 1)
            for i, (part, (f, s)) in enumerate(zip(got, wanted, strict=True))
        ]
        top = min([mine[0], *(f for f, s in wanted if s > f)])
        return joined(*blocks, axis=3), top

    def _whole_frames(self, layer: Layer, y: Tensor, edges: list[int]) -> Tensor:
        """A layer that sees the whole of a frame: each process has some frames for it."""
        (b, c, t, h, w), rank = y.shape, self._group.rank
        cut = list(pairwise(t * n // self._group.size for n in range(self._group.size + 1)))
        first, stop = cut[rank]
        heights = [below - above for above, below in pairwise(edges)]
        got = self._group.exchange(
            [y[:, :, f:s].movedim(1, -1) for f, s in cut],
            [b * (stop - first) * height * w * c for height in heights],
        )
        frames = torch.cat(
            [part.view(b, stop - first, height, w, c)
             for part, height in zip(got, heights, strict=True)], 2,
        ).movedim(-1, 1)  # fmt: skip
        if stop > first:
            frames = layer.compute(frames)
        if frames.shape[1:2] != (c,) or frames.shape[3] != edges[-1]:
            raise ValueError(
                f"a {type(layer).__name__} sees whole frames and changes their size: such a line "
                "cannot be walked by several processes"
            )
        got = self._group.exchange(
            [frames[:, :, :, above:below].movedim(1, -1) for above, below in pairwise(edges)],
            [b * (s - f) * h * w * c for f, s in cut],
        )
        back = [part.view(b, s - f, h, w, c) for part, (f, s) in zip(got, cut, strict=True)]
        return torch.cat(back, 1).movedim(-1, 1)


def _rows(y: Tensor, rows: Span, top: int) -> Tensor:
    """Some rows of (B, C, T, h, W) that begin at row `top`, in the memory order B T h W C."""
    first, stop = rows
    return y[:, :, :, first - top : stop - top].movedim(1, -1)


def _common_span(a: Span, b: Span) -> Span:
    """The rows that are in both; an empty range at the first's begin if there are none."""
    first, stop = max(a[0], b[0]), min(a[1], b[1])
    return (first, stop) if first < stop else (a[0], a[0])
