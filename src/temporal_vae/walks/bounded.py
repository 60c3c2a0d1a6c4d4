"""The bounded walk: one activation in an arena, and a small piece of it on the way at a time.

    framewise layers   a few frames at a time, or bands of rows of one frame
    timewise layers    a few pixels at a time, all frames of them
    norms              where a piece is less than what a norm sums over, its sums are gathered from
                       all pieces first; then each piece is computed with the sums of the whole

Consecutive framewise layers form a run and go together, frame by frame, so the widest activation
between them never exists for all frames. Between runs the clip lies in one arena as large as the
largest of them: a run that shrinks it writes from the front; before one that expands it the clip is
moved to the back of the arena, where frame t is read before anything is written over it. In bands
the same is done once more inside a frame: rows that the next band still reads are kept aside.

Nothing is blended, nothing cut at a seam: the result is that of the whole walk, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from temporal_vae.geometry import Span, rows_owned, rows_read, spans
from temporal_vae.network.autoencoder import Layer, Line
from temporal_vae.network.framewise import Framewise
from temporal_vae.network.kernels.norm import Moments
from temporal_vae.network.primitives import Norm
from temporal_vae.network.timewise import Past, Timewise, fold_pixels, unfold_pixels
from temporal_vae.network.timewise import State as LayerState
from temporal_vae.walks.norm_sums import input_of, moments_of, with_known
from temporal_vae.walks.stages import Bounds, result_shape, runs, shape_after, stages
from temporal_vae.walks.workspace import Room, new_clip, new_like


def walk(line: Line, x: Tensor, bounds: Bounds, out: Tensor | None = None) -> Tensor:
    """A clip (B, C, T, H, W) through every layer, one sample at a time, into `out` or a new tensor.

    Raises `ValueError` under autograd, which needs what this walk overwrites.
    """
    refuse_autograd(line, x)
    layers = list(line.layers())
    room = Room(layers, x, bounds)
    if out is None:
        out = x.new_zeros(result_shape(layers, tuple(x.shape)))  # touched, so as to be there
    room.reserve()
    for sample, result in zip(x.split(1), out.split(1), strict=True):
        start = 0
        for piece in _walk_sample(layers, sample, room, _in_place(room)):
            result[:, :, start : start + piece.shape[2]] = piece
            start += piece.shape[2]
            del piece  # or it would be there while the next one is made; so below
    return out


def pieces(line: Line, x: Tensor, bounds: Bounds) -> Iterator[Tensor]:
    """The result of `walk` for one sample, a few frames at a time, each as soon as it is there."""
    refuse_autograd(line, x)

    def walked() -> Iterator[Tensor]:  # whose memory is made where it is used, as to inference mode
        layers = list(line.layers())
        room = Room(layers, x, bounds)
        room.reserve()
        yield from _walk_sample(layers, x, room, _in_place(room))

    return walked()


def refuse_autograd(line: Line, x: Tensor) -> None:
    """Raise `ValueError` where autograd would need what a bounded walk overwrites."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *line.parameters())):
        raise ValueError(
            "a bounded walk overwrites its activations, so it cannot run under autograd: use "
            "torch.no_grad() around it, or no plan"
        )


# Pieces of a stream --------------------------------------------------------------------------


def advance(
    layers: Sequence[Layer],
    x: Tensor,
    memories: list[LayerState],
    bounds: Bounds,
    handed: bool = False,
    first: bool = False,
) -> Tensor | None:
    """A piece (B, C, n, H, W) of a stream through layers -> what can be given so far.

    `memories` has an entry for each timewise layer; each is replaced as soon as it has been read,
    so that the old one can be let go; where they are handed over, in its own memory. A layer that
    nothing reaches yet keeps its own. The `first` piece reserves memory for all.
    """
    room, batch, frames = Room(layers, x, bounds), len(x), 0
    out = x.new_empty(result_shape(layers, tuple(x.shape)))
    if first:
        room.reserve()
    timewise = [layer for layer in layers if isinstance(layer, Timewise)]
    fresh: dict[int, LayerState] = {}
    for number, sample in enumerate(x.split(1)):

        def remember(layer: Timewise, clip: Tensor, number: int = number) -> Tensor | None:
            room.heap.before()
            index = next(i for i, other in enumerate(timewise) if other is layer)
            # its size and dtype, where the model is: the clip itself may be offloaded
            like = clip[:, :, :0].expand(batch, -1, -1, -1, -1).to(room.device)
            old = memories[index] or layer.begin(like)
            if not number:
                layer.check(like, old)
                # what is handed over keeps its place: see `streamed.begin`
                fresh[index] = old if handed else (old[0].clone(), *map(new_like, old[1:]))
            folded = fold_pixels(clip)
            y = _advance_pixels(
                layer, folded, old, fresh[index], number, bounds, lambda n: folded[:, :, :n]
            )
            if number == batch - 1:
                fresh[index][0].add_(clip.shape[2])
            memories[index] = fresh[index] if number == batch - 1 else old
            return clip[:, :, : y.shape[2]] if y.shape[2] else None

        frames = 0
        for piece in _walk_sample(layers, sample, room, remember):
            out[number : number + 1, :, frames : frames + piece.shape[2]] = piece
            frames += piece.shape[2]
            del piece
    return out[:, :, :frames] if frames else None


def flush(layer: Timewise, memory: LayerState, bounds: Bounds) -> Tensor | None:
    """What a layer still owes at the end of its clip, (B, C, n, H, W); None if it owes nothing."""
    nothing = layer.nothing(memory)
    layer.check(nothing, memory)
    samples, size = [], nothing.shape[3:]
    for number in range(len(nothing)):
        one = nothing[number : number + 1]

        def place(n: int, like: Tensor = one) -> Tensor:
            return fold_pixels(new_clip(like, (1, like.shape[1], n, *size), like.device))

        y = _advance_pixels(layer, fold_pixels(one), memory, None, number, bounds, place)
        samples.append(y)
    held = torch.cat(samples) if len(samples) > 1 else samples[0]
    return unfold_pixels(held, size) if held.shape[2] else None


def _advance_pixels(
    layer: Timewise,
    x: Tensor,
    old: LayerState,
    new: LayerState | None,
    number: int,
    bounds: Bounds,
    place: Callable[[int], Tensor],
) -> Tensor:
    """One sample (1, C, n, P) of a stream through a timewise layer, a few pixels at a time.

    Reads sample `number` of the `old` state, writes that of the `new` one, or ends the clip where
    there is none; the result is in `place(frames)`.
    """
    counts, *tails = (part[number : number + 1] for part in old)
    past, device = Past(counts, int(old[0].min())), old[1].device
    before = [fold_pixels(tail) for tail in tails]
    after = [] if new is None else [fold_pixels(tail[number : number + 1]) for tail in new[1:]]
    y: Tensor | None = None
    for span in spans(before[0].shape[3], bounds.chunk(layer)):
        chunk = slice(*span)
        # no copies: a layer joins what it is given before it computes
        piece, *kept = (part[:, :, :, chunk].to(device) for part in (x, *before))
        given, after_piece = layer.advance(piece, past, tuple(kept), last=new is None)
        if y is None:
            y = place(given.shape[2])
        y[:, :, :, chunk] = given
        for target, tail in zip(after, after_piece, strict=False):
            target[:, :, :, chunk] = tail
    assert y is not None
    return y


def _pixels(x: Tensor, chunk: slice, device: torch.device) -> Tensor:
    """Some pixels of (1, C, T, P), channels-last, where the model is."""
    return x[:, :, :, chunk].to(device).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _walk_sample(
    layers: Sequence[Layer],
    clip: Tensor,
    room: Room,
    timewise: Callable[[Timewise, Tensor], Tensor | None],
) -> Iterator[Tensor]:
    """A clip (1, C, T, H, W) through every layer; the result a few frames at a time, in order.

    `timewise` takes a layer and the clip in the arena, and gives the clip after it, there as well;
    None ends the walk with nothing.
    """
    steps = list(runs(layers))
    for run in steps[:-1]:
        if isinstance(run, Timewise):
            after = timewise(run, room.clip.hold(clip))
            if after is None:
                return
            clip = after
        else:
            clip = _walk_frames(run, clip, room)
    last = steps[-1]
    if isinstance(last, Timewise):
        after = timewise(last, room.clip.hold(clip))
        for frames in () if after is None else after.split(room.bounds.frames, 2):
            yield frames.to(room.device, copy=True)
    elif room.bounds.rows is None:
        for _, frames in _groups(last, clip, room):
            yield frames.movedim(0, 1).unsqueeze(0)
            del frames
    else:
        for frame in clip.split(1, 2):
            whole = new_clip(frame, shape_after(last, tuple(frame.shape)), room.device)
            _in_bands(last, frame, whole, room)
            yield whole
            del whole


# Frames --------------------------------------------------------------------------------------


def _walk_frames(run: list[Framewise], clip: Tensor, room: Room) -> Tensor:
    """All layers of a run on a few frames at a time, from the clip into the front of the arena."""
    shape = shape_after(run, tuple(clip.shape))
    if math.prod(shape) > clip.numel() and room.clip.holds(clip):
        clip = room.clip.back(clip)
    target = room.clip.front(shape)
    if room.bounds.rows is None:
        for (start, stop), frames in _groups(run, clip, room):
            target[0, :, start:stop] = frames.movedim(1, 0)
            del frames
    else:
        for before, after in zip(clip.split(1, 2), target.split(1, 2), strict=True):
            _in_bands(run, before, after, room)
    return target


def _groups(run: list[Framewise], clip: Tensor, room: Room) -> Iterator[tuple[Span, Tensor]]:
    """Whole frames (n, C, H, W), a few at a time, after all layers of a run."""
    for start, stop in spans(clip.shape[2], room.bounds.group(run, tuple(clip.shape))):
        frames = _channels_last(clip[0, :, start:stop].movedim(1, 0), room.device)
        for layer in run:
            room.heap.before(max(frames.nbytes, _bytes_after(layer, frames)))
            frames = layer.frames(frames)
        yield (start, stop), frames
        del frames


def _bytes_after(layer: Framewise, x: Tensor) -> int:
    """Size of what a layer makes of frames (N, C, H, W)."""
    n, c, h, w = x.shape
    after = shape_after([layer], (1, c, n, h, w))
    return math.prod(after) * x.itemsize


def _in_bands(run: list[Framewise], source: Tensor, target: Tensor, room: Room) -> None:
    """One frame (1, C, 1, H, W) through a run in bands, from the source into the target.

    The target may lie where source rows have been read; what is between stages is in the arena for
    a frame, written in place as well.
    """
    cut = stages(run, tuple(source.shape), room.bounds)
    for stage in cut:
        shape = shape_after(stage, tuple(source.shape))
        if math.prod(shape) > source.numel() and room.frame.holds(source):
            source = room.frame.back(source)
        result = target if stage is cut[-1] else room.frame.front(shape)
        if stage[0].halo is None:
            room.heap.before()
            whole = _channels_last(source[:, :, 0], room.device)
            result[:, :, 0] = stage[0].frames(whole)
        else:
            _Bands(stage, source[:, :, 0], room).walk(result[:, :, 0])
        source = result


class _Bands:
    """A frame (1, C, H, W) through the layers of one stage, a band of output rows at a time."""

    def __init__(self, stage: list[Framewise], source: Tensor, room: Room):
        self.stage, self.source, self.device = stage, source, room.device
        self.heap = room.heap
        self.heights = [source.shape[2]]
        for layer in stage:
            self.heights.append(int(self.heights[-1] * layer.scale))
        assert room.bounds.rows is not None
        self.bands = [self._levels(rows) for rows in spans(self.heights[-1], room.bounds.rows)]

    def walk(self, target: Tensor) -> None:
        """Fill the target (1, C', H', W'): sums first, then each band with the sums of all."""
        known: dict[nn.Module, Moments] = {}
        for index, layer in enumerate(self.stage):
            for norm in layer.norms():
                known[norm] = self._gather(norm, index, known)
        apply = with_known(known)
        kept = self.source[:, :, :0].to(self.device)
        for band, following in zip(self.bands, [*self.bands[1:], None], strict=True):
            top, bottom = band[0]
            read = self.source[:, :, top + kept.shape[2] : bottom].to(self.device)
            piece = _channels_last(torch.cat([kept, read], 2), self.device)
            if following is not None:  # the target may cover rows that the next band reads
                kept = _aside(piece[:, :, following[0][0] - top :])
            first, stop = band[-1]
            target[:, :, first:stop] = self._through(piece, band, apply)

    def _levels(self, rows: Span) -> list[Span]:
        """The rows that each layer reads for some output rows, and those themselves at the end."""
        levels = [rows]
        for layer, height in zip(reversed(self.stage), reversed(self.heights[:-1]), strict=True):
            assert layer.halo is not None
            levels.insert(0, rows_read(levels[0], layer.halo, layer.scale, height))
        return levels

    def _through(self, piece: Tensor, band: list[Span], norm: Norm) -> Tensor:
        for layer, (top, _), (first, stop) in zip(self.stage, band, band[1:], strict=False):
            self.heap.before(max(piece.nbytes, _bytes_after(layer, piece)))
            y = layer.frames(piece, norm)
            skipped = first - int(top * layer.scale)
            piece = y[:, :, skipped : skipped + stop - first]
        return piece

    def _gather(self, wanted: nn.Module, index: int, known: dict[nn.Module, Moments]) -> Moments:
        """The moments of one norm's input over the frame, the norms before it being known."""
        scale = math.prod((layer.scale for layer in self.stage[index:]), start=Fraction(1))

        def found() -> Iterator[Tensor]:
            for band in self.bands:
                top, bottom = band[0]
                piece = _channels_last(self.source[:, :, top:bottom], self.device)
                x = input_of(wanted, known, partial(self._through, piece, band))
                first, stop = rows_owned(band[-1], scale)  # norms keep rows
                if first < stop:
                    yield x[:, :, first - band[index][0] : stop - band[index][0]]

        return moments_of(wanted, found())


def _aside(rows: Tensor) -> Tensor:
    """Rows in memory of their own."""
    return rows.clone()


def _channels_last(frames: Tensor, device: torch.device) -> Tensor:
    """(N, C, H, W) where the model is, in its memory order."""
    return frames.to(device).contiguous(memory_format=torch.channels_last)


# Pixels --------------------------------------------------------------------------------------


def _in_place(room: Room) -> Callable[[Timewise, Tensor], Tensor]:
    """A timewise layer on a few pixels at a time, all frames of them, over its input."""

    def walk(layer: Timewise, clip: Tensor) -> Tensor:
        room.heap.before()
        x = fold_pixels(clip)
        chunks = [slice(*span) for span in spans(x.shape[3], room.bounds.chunk(layer))]
        known: dict[nn.Module, Moments] = {}
        for norm in layer.norms():
            inputs = (
                input_of(norm, known, partial(layer.pixels, _pixels(x, chunk, room.device)))
                for chunk in chunks
            )
            known[norm] = moments_of(norm, inputs)
        apply = with_known(known)
        for chunk in chunks:
            x[:, :, :, chunk] = layer.pixels(_pixels(x, chunk, room.device), apply)
        return clip

    return walk
