"""The bounded walk: one activation in an arena, and a small piece of it on the way at a time.

    cut along frames   a few frames at a time, or bands of rows of one frame
    cut along pixels   a few pixels at a time, all frames of them
    cut along rows     all of a piece in time at once
    norms              where a piece is less than what a norm sums over, its sums are gathered from
                       all pieces first; then each piece is computed with the sums of the whole

Layers that follow one another and are cut along frames form a run and go together, a few frames at
a time, so the widest activation between them never exists for all frames. Between runs the clip
lies in one arena as large as the largest of them: a run that shrinks it writes from the front;
before one that expands it the clip is moved to the back of the arena, where frame t is read before
anything is written over it. In bands the same is done once more inside a frame: rows that the next
band still reads are kept aside.

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
from temporal_vae.network.autoencoder import Line
from temporal_vae.network.kernels.norm import Moments
from temporal_vae.network.layer import Layer, Past, State
from temporal_vae.network.primitives import Norm
from temporal_vae.walks import workspace
from temporal_vae.walks.norm_sums import input_of, moments_of, with_known
from temporal_vae.walks.stages import (
    TO_TRAIN_IN_PIECES,
    Bounds,
    in_pieces,
    runs,
    shape_after,
    stages,
)
from temporal_vae.walks.workspace import Workspace, new_clip

Across = Callable[[Layer, Tensor], Tensor | None]
"""A layer that sees several frames, over a clip in the arena; None where it gives nothing yet."""


def walk(line: Line, x: Tensor, bounds: Bounds, out: Tensor | None = None) -> Tensor:
    """A clip (B, C, T, H, W) through every layer, one sample at a time, into `out` or a new tensor.

    Raises `ValueError` under autograd, which needs what this walk overwrites.
    """
    refuse_watchers(line, x)
    layers = list(line.layers())
    work = Workspace(layers, x, bounds)
    if out is None:
        out = x.new_zeros(shape_after(layers, tuple(x.shape)))  # touched, so as to be there
    work.reserve()
    for sample, result in zip(x.split(1), out.split(1), strict=True):
        join(walk_sample(layers, sample, work, partial(_whole_clip, work)), result)
    return out


def pieces(line: Line, x: Tensor, bounds: Bounds) -> Iterator[Tensor]:
    """The result of `walk` for one sample, a few frames at a time, each as soon as it is there."""
    refuse_watchers(line, x)

    def walked() -> Iterator[Tensor]:  # whose memory is made where it is used, as to inference mode
        layers = list(line.layers())
        work = Workspace(layers, x, bounds)
        work.reserve()
        yield from walk_sample(layers, x, work, partial(_whole_clip, work))

    return walked()


def refuse_watchers(line: Line, x: Tensor) -> None:
    """Raise `ValueError` where autograd or a hook would need what a bounded walk has not."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *line.parameters())):
        to_train = "decode or encode with a plan(..., gradients=True)"
        if in_pieces(list(line.layers())):
            to_train = TO_TRAIN_IN_PIECES
        raise ValueError(
            "a bounded walk overwrites its activations, so it cannot run under autograd: use "
            "torch.no_grad() around it or freeze the weights, requires_grad_(False); to train, "
            f"{to_train}"
        )
    refuse_pieces(line)


def refuse_pieces(line: Line) -> None:
    """Raise `ValueError` where a hook, or a norm of another kind, needs more than a piece."""
    refuse_hooks(line)
    if (norm := line.strange_norm()) is not None:
        raise ValueError(
            f"a {norm} in place of a group norm cannot be gathered from pieces: use no plan, no "
            "memory budget and no tiling"
        )


def refuse_hooks(line: Line) -> None:
    """Raise `ValueError` for hooks that a walk in pieces would not call."""
    if (name := line.hooked()) is not None:
        raise ValueError(
            f"a hook on {name}, or what is in its place, is called only where a clip is walked "
            "whole: take it off, or use no plan, no memory budget, no tiling and no stream"
        )


def join(pieces: Iterator[Tensor], target: Tensor) -> int:
    """Write pieces (1, C, n, H, W) one after another into the target; the number of frames."""
    frames = 0
    for piece in pieces:
        target[:, :, frames : frames + piece.shape[2]] = piece
        frames += piece.shape[2]
        del piece  # or it would be there while the next one is made
    return frames


# Pieces of a stream --------------------------------------------------------------------------


def step(
    layers: Sequence[Layer],
    x: Tensor,
    memories: list[State],
    bounds: Bounds,
    donated: bool = False,
    first: bool = False,
) -> Tensor | None:
    """A piece (B, C, n, H, W) of a stream through layers -> what can be given so far.

    `memories` has an entry for each layer with tails; each is replaced as soon as it has been read,
    so that the old one can be let go; where they are `donated`, in its own memory. A layer that
    nothing reaches yet keeps its own. The `first` piece reserves memory for all.
    """
    work, remembering = Workspace(layers, x, bounds), [layer for layer in layers if layer.tails()]
    out = x.new_empty(shape_after(layers, tuple(x.shape), begins=False))
    if first:
        work.reserve()
    fresh: dict[int, State] = {}
    frames = 0
    for number, sample in enumerate(x.split(1)):
        places = iter(range(len(remembering)))

        def remember(
            layer: Layer, clip: Tensor, number: int = number, places: Iterator[int] = places
        ) -> Tensor | None:
            if not layer.tails():
                return _whole_clip(work, layer, clip)
            index = next(places)  # a layer may stand in several
            # its size and dtype, where the model is: the clip itself may be offloaded
            like = clip[:, :, :0].expand(len(x), -1, -1, -1, -1).to(work.device)
            old = memories[index] or layer.begin(like)
            if not number:
                layer.check(like, old)
                # what is donated keeps its place: see `streamed.begin`
                fresh[index] = (
                    old if donated else (old[0].clone(), *map(workspace.new_like, old[1:]))
                )
            y = _step_sample(layer, clip, old, fresh[index], number, work)
            if number == len(x) - 1:
                fresh[index][0].add_(clip.shape[2])
            memories[index] = fresh[index] if number == len(x) - 1 else old
            return y if y.shape[2] else None

        frames = join(walk_sample(layers, sample, work, remember), out[number : number + 1])
    return out[:, :, :frames] if frames else None


def flush(layer: Layer, memory: State, bounds: Bounds) -> Tensor | None:
    """What a layer still owes at the end of its clip, (B, C, n, H, W); None if it owes nothing."""
    nothing = layer.nothing(memory)
    layer.check(nothing, memory)
    work = Workspace((), nothing, bounds)
    samples = [
        _step_sample(layer, nothing[number : number + 1], memory, None, number, work)
        for number in range(len(nothing))
    ]
    held = torch.cat(samples) if len(samples) > 1 else samples[0]
    return held if held.shape[2] else None


def _step_sample(
    layer: Layer, x: Tensor, old: State, new: State | None, number: int, work: Workspace
) -> Tensor:
    """One sample (1, C, n, H, W) of a stream through a layer, in parts as the layer may be cut.

    Reads sample `number` of the `old` state, writes that of the `new` one, or ends the clip where
    there is none. A layer that is cut along pixels, and has as much to give as it was given,
    overwrites x.
    """
    counts, *before = (part[number : number + 1] for part in old)
    past = Past(counts, int(old[0].min()))
    after = [] if new is None else [tail[number : number + 1] for tail in new[1:]]
    if layer.cut == "pixels":
        return _step_pixels(layer, x, past, before, after, work)
    piece, *kept = (part.to(work.device) for part in (x, *before))
    y, tails = layer.step(piece, past, tuple(kept), last=not after)
    for target, tail in zip(after, tails, strict=False):
        target.copy_(tail)
    return y


def _step_pixels(
    layer: Layer,
    x: Tensor,
    past: Past,
    before: list[Tensor],
    after: list[Tensor],
    work: Workspace,
) -> Tensor:
    """`_step_sample`, a few pixels at a time; without tails to write `after`, the end of a clip."""
    size, y = before[0].shape[3:], x[:, :, :0]
    for chunk in _chunks(size.numel(), layer, work.bounds):
        # no copies: a layer joins what it is given before it computes
        piece, *kept = (_pixels(part, chunk).to(work.device) for part in (x, *before))
        given, tails = layer.step(piece, past, tuple(kept), last=not after)
        y = y if chunk.start else _place(x, given.shape[2], size)
        for target, part in zip((y, *after), (given, *tails), strict=False):
            _pixels(target, chunk).copy_(part)
        del piece, kept, given, tails, part  # or they would be there during the next chunk
    return y


# The whole clip ------------------------------------------------------------------------------


@torch.no_grad()
def walk_sample(
    layers: Sequence[Layer], clip: Tensor, work: Workspace, across: Across
) -> Iterator[Tensor]:
    """A clip (1, C, T, H, W) through every layer; the result a few frames at a time, in order.

    `across` takes a layer that sees more than one frame.
    """
    *steps, last = runs(layers)
    for run in steps:
        if run[0].cut == "frames":
            clip = _walk_frames(run, clip, work)
        elif (after := across(run[0], work.clip.hold(clip))) is not None:
            clip = after
        else:
            return
    if last[0].cut != "frames":
        after = across(last[0], work.clip.hold(clip))
        for frames in () if after is None else after.split(work.bounds.frames, 2):
            yield frames.to(work.device, copy=True)
    elif work.bounds.rows is None:
        for _, frames in _groups(last, clip, work):
            yield frames
            del frames
    else:
        for frame in clip.split(1, 2):
            whole = new_clip(frame, shape_after(last, tuple(frame.shape)), work.device)
            _in_bands(last, frame, whole, work)
            yield whole
            del whole


def _whole_clip(work: Workspace, layer: Layer, clip: Tensor) -> Tensor:
    """A layer over all frames: a few pixels at a time, over its input, or if it must be at once."""
    if layer.cut != "pixels":
        return layer.compute(clip.to(work.device))
    chunks = _chunks(clip.shape[3:].numel(), layer, work.bounds)
    known: dict[nn.Module, Moments] = {}
    for norm in layer.norms():
        inputs = (
            input_of(norm, known, partial(layer.compute, _ready(_pixels(clip, chunk), work)))
            for chunk in chunks
        )
        known[norm] = moments_of(norm, inputs)
    apply = with_known(known)
    y = clip
    for chunk in chunks:
        given = layer.compute(_ready(_pixels(clip, chunk), work), apply)
        y = y if chunk.start else _place(clip, given.shape[2], clip.shape[3:])
        _pixels(y, chunk).copy_(given)
        del given  # or it would be there during the next chunk
    return y


def _chunks(pixels: int, layer: Layer, bounds: Bounds) -> list[slice]:
    return [slice(*span) for span in spans(pixels, bounds.chunk(layer))]


def _pixels(x: Tensor, chunk: slice) -> Tensor:
    """Some pixels of (B, C, T, H, W) as one row of them, (B, C, T, 1, P); a view."""
    return x.movedim(1, -1).flatten(2, 3)[:, :, None, chunk].movedim(-1, 1)


def _place(x: Tensor, frames: int, size: torch.Size) -> Tensor:
    """Where a layer's result goes: over its input x (1, C, T, H, W), if that has the frames."""
    if frames <= x.shape[2]:
        return x[:, :, :frames]
    return new_clip(x, (*x.shape[:2], frames, *size), x.device)


def _ready(x: Tensor, work: Workspace) -> Tensor:
    """A part of a clip where the model is, in its memory order."""
    return x.to(work.device).contiguous(memory_format=torch.channels_last_3d)


# Frames --------------------------------------------------------------------------------------


def _walk_frames(run: list[Layer], clip: Tensor, work: Workspace) -> Tensor:
    """All layers of a run on a few frames at a time, from the clip into the front of the arena."""
    shape = shape_after(run, tuple(clip.shape))
    if math.prod(shape) > clip.numel() and work.clip.holds(clip):
        clip = work.clip.back(clip)
    target = work.clip.front(shape)
    if work.bounds.rows is None:
        for (start, stop), frames in _groups(run, clip, work):
            target[:, :, start:stop] = frames
            del frames
    else:
        for before, after in zip(clip.split(1, 2), target.split(1, 2), strict=True):
            _in_bands(run, before, after, work)
    return target


def _groups(run: list[Layer], clip: Tensor, work: Workspace) -> Iterator[tuple[Span, Tensor]]:
    """Whole frames (1, C, n, H, W), a few at a time, after all layers of a run."""
    for start, stop in spans(clip.shape[2], work.bounds.group(run, tuple(clip.shape))):
        frames = _ready(clip[:, :, start:stop], work)
        for layer in run:
            frames = layer.compute(frames)
        yield (start, stop), frames
        del frames


def _in_bands(run: list[Layer], source: Tensor, target: Tensor, work: Workspace) -> None:
    """One frame (1, C, 1, H, W) through a run in bands, from the source into the target.

    The target may lie where source rows have been read; what is between stages is in the arena for
    a frame, written in place as well.
    """
    cut = stages(run, tuple(source.shape), work.bounds)
    for stage in cut:
        shape = shape_after(stage, tuple(source.shape))
        if math.prod(shape) > source.numel() and work.frame.holds(source):
            source = work.frame.back(source)
        result = target if stage is cut[-1] else work.frame.front(shape)
        if stage[0].halo is None:
            result.copy_(stage[0].compute(_ready(source, work)))
        else:
            _Bands(stage, source, work).walk(result)
        source = result


class _Bands:
    """A frame (1, C, 1, H, W) through the layers of one stage, a band of output rows at a time."""

    def __init__(self, stage: list[Layer], source: Tensor, work: Workspace):
        self.stage, self.source, self.work = stage, source, work
        self.heights = [source.shape[3]]
        for layer in stage:
            self.heights.append(int(self.heights[-1] * layer.scale))
        assert work.bounds.rows is not None
        self.bands = [self._levels(rows) for rows in spans(self.heights[-1], work.bounds.rows)]

    def walk(self, target: Tensor) -> None:
        """Fill the target (1, C', 1, H', W'): sums first, then each band with the sums of all."""
        known: dict[nn.Module, Moments] = {}
        for index, layer in enumerate(self.stage):
            for norm in layer.norms():
                known[norm] = self._gather(norm, index, known)
        apply = with_known(known)
        kept = self.source[:, :, :, :0].to(self.work.device)
        for band, following in zip(self.bands, [*self.bands[1:], None], strict=True):
            top, bottom = band[0]
            read = self.source[:, :, :, top + kept.shape[3] : bottom].to(self.work.device)
            piece = _ready(torch.cat([kept, read], 3), self.work)
            if following is not None:  # the target may cover rows that the next band reads
                kept = _aside(piece[:, :, :, following[0][0] - top :])
            first, stop = band[-1]
            target[:, :, :, first:stop] = self._through(piece, band, apply)

    def _levels(self, rows: Span) -> list[Span]:
        """The rows that each layer reads for some output rows, and those themselves at the end."""
        levels = [rows]
        for layer, height in zip(reversed(self.stage), reversed(self.heights[:-1]), strict=True):
            assert layer.halo is not None
            levels.insert(0, rows_read(levels[0], layer.halo, layer.scale, height))
        return levels

    def _through(self, piece: Tensor, band: list[Span], norm: Norm) -> Tensor:
        for layer, (top, _), (first, stop) in zip(self.stage, band, band[1:], strict=False):
            y = layer.compute(piece, norm)
            skipped = first - int(top * layer.scale)
            piece = y[:, :, :, skipped : skipped + stop - first]
        return piece

    def _gather(self, wanted: nn.Module, index: int, known: dict[nn.Module, Moments]) -> Moments:
        """The moments of one norm's input over the frame, the norms before it being known."""
        scale = math.prod((layer.scale for layer in self.stage[index:]), start=Fraction(1))

        def found() -> Iterator[Tensor]:
            for band in self.bands:
                top, bottom = band[0]
                piece = _ready(self.source[:, :, :, top:bottom], self.work)
                x = input_of(wanted, known, partial(self._through, piece, band))
                first, stop = rows_owned(band[-1], scale)  # norms keep rows
                if first < stop:
                    yield x[..., first - band[index][0] : stop - band[index][0], :]

        return moments_of(wanted, found())


def _aside(rows: Tensor) -> Tensor:
    """Rows in memory of their own."""
    return rows.clone()
