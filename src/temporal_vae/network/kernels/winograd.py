"""Convolutions with three taps along an axis in fewer multiplications (Winograd's algorithm).

`winograd.c` says how. Of a 3x3 convolution they leave 4/9 of the multiplications, of one of doubled
pixels 1/4, of three taps in time 2/3, of 3x3x3 8/27, and they round less than torch's channels-last
kernels. Inputs are transformed a few tiles at a time, in memory that stays in the cache; only where
frames do not have their channels together is a copy made of them.

Letters: N frames of all samples, B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from functools import lru_cache
from itertools import chain
from typing import TypeGuard, cast

import torch
from torch import Tensor

from temporal_vae.network.kernels.blocks import new_empty
from temporal_vae.network.kernels.native import CHANNELS, library

ONE, THREE, DOUBLED = range(3)
"""What a kernel does along an axis: see `winograd.c`."""
READ, GIVEN = (1, 4, 3), (1, 2, 2)
"""Of each kind, the inputs and results of a tile along an axis."""
LANES = 2 * CHANNELS
"""Channels that a panel has with the longest vectors."""
SPACE_BYTES = 3 * 2**20
"""That a thread works in, about."""

Frame = Tensor | None
"""(C, H, W), its channels together; None for one of zeros."""
Kind = tuple[int, int, int]


class _Shape(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32 * 3), ("inputs", c_int64), ("outputs", c_int64), ("taps", c_int64),
        ("weight", c_int64 * 5),
    )  # fmt: skip


class _Frames(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("groups", "height", "width", "row", "pixel", "pad")),
        *((name, c_int64) for name in ("out_height", "out_width", "out_row", "out_pixel")),
        *((name, c_int64) for name in ("tiles", "threads")), ("type", c_int32),
    )  # fmt: skip


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool = False) -> Tensor:
    """A 3x3 convolution with a pixel of zeros around each frame; x (N, C, H, W).

    `doubled`: of frames in which every pixel is repeated four times -> (N, O, 2 H, 2 W).
    """
    n, _, h, w = x.shape
    times, kind = (2, DOUBLED) if doubled else (1, THREE)
    y = new_empty(x, (n, times * h, times * w, len(weight)))
    if not y.numel():
        return y.movedim(-1, 1)
    run((ONE, kind, kind), [[frame] for frame in x], [weight.unsqueeze(2)], bias, list(y))
    return y.movedim(-1, 1)


def over_time(
    parts: Sequence[Tensor], zeros: int, behind: int, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Three taps in time, (O, C, 3, 1, 1) or (O, C, 3, 3, 3), over n + 2 frames to n.

    The frames are those of `parts`, clips (B, C, ..., H, W) that follow one another, between so
    many frames of zeros before and behind them; a result is (B, O, n, H, W).
    """
    clips, like = _clips(parts, zeros, behind), parts[-1]
    y = new_empty(like, (len(clips), len(clips[0]) - 2, *like.shape[3:], len(weight)))
    if not y.numel():
        return y.movedim(-1, 1)
    space = _space_kind(weight)
    if _in_pairs(clips[0], weight):
        out: list[Frame] = [frame for sample in y for frame in _two_by_two([*sample])]
        run((THREE, space, space), _fours(clips), [weight], bias, out)
        return y.movedim(-1, 1)
    for taps, results in _same_taps(clips[0]):
        reads = [[clip[i + k] for k in taps] for clip in clips for i in results]
        out = [sample[i] for sample in y for i in results]
        run((ONE, space, space), reads, [weight[:, :, k, None] for k in taps], bias, out)
    return y.movedim(-1, 1)


def conv2d_weight(given: Tensor, x: Tensor, weight: Tensor, doubled: bool = False) -> Tensor:
    """The gradient of the weight of `conv2d`, from that of its result."""
    kind = DOUBLED if doubled else THREE
    reads = [[frame] for frame in x]
    return weight_gradient((ONE, kind, kind), reads, [*given], weight.unsqueeze(2)).squeeze(2)


def over_time_weight(
    given: Tensor, parts: Sequence[Tensor], zeros: int, behind: int, weight: Tensor
) -> Tensor:
    """The gradient of the weight of `over_time`, from that of its result."""
    clips, space = _clips(parts, zeros, behind), _space_kind(weight)
    samples: list[list[Frame]] = [[*sample.unbind(1)] for sample in given]
    if _in_pairs(clips[0], weight):
        out = [frame for sample in samples for frame in _two_by_two(sample)]
        return weight_gradient((THREE, space, space), _fours(clips), out, weight)
    taps = []
    for k in range(3):
        read = [
            pair
            for clip, sample in zip(clips, samples, strict=True)
            for pair in zip(clip[k:], sample, strict=False)
            if pair[0] is not None
        ]
        reads, out = [[frame] for frame, _ in read], [one for _, one in read]
        taps.append(weight_gradient((ONE, space, space), reads, out, weight[:, :, k : k + 1]))
    return torch.cat(taps, 2)


def _clips(parts: Sequence[Tensor], zeros: int, behind: int) -> list[list[Frame]]:
    """The frames of each sample, None for those of zeros."""
    if len({(part.shape[:2], part.shape[3:], part.dtype) for part in parts}) > 1:
        raise ValueError(f"clips of one size follow one another, not {[*map(_size, parts)]}")
    samples = zip(*(part.transpose(1, 2) for part in parts), strict=True)
    return [
        [None] * zeros + [frame for part in each for frame in part] + [None] * behind
        for each in samples
    ]


def _size(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _space_kind(weight: Tensor) -> int:
    return ONE if weight.shape[-1] == 1 else THREE


def _fours(clips: Sequence[Sequence[Frame]]) -> list[list[Frame]]:
    """What each two results read."""
    return [[*clip, None][i : i + 4] for clip in clips for i in range(0, len(clip) - 2, 2)]


def _two_by_two(frames: Sequence[Frame]) -> Sequence[Frame]:
    """The frames, one of nothing behind an odd last one."""
    return [*frames, None] if len(frames) % 2 else frames


def _in_pairs(frames: Sequence[Frame], weight: Tensor) -> bool:
    """Whether to compute results two by two: not if adding up taps multiplies less, as where there
    are few frames, or many of zeros."""
    given = len(frames) - 2
    taps = sum(frame is not None for i in range(given) for frame in frames[i : i + 3])
    return weight.shape[-1] == 1 or READ[THREE] * ((given + 1) // 2) < taps


def _same_taps(frames: Sequence[Frame]) -> list[tuple[tuple[int, ...], list[int]]]:
    """(taps that read a frame, the results that have just these), for all results."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(frames) - 2):
        taps = tuple(k for k in range(3) if frames[i + k] is not None)
        found.setdefault(taps, []).append(i)
    return list(found.items())


def run(
    kind: Kind,
    reads: Sequence[Sequence[Frame]],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    out: Sequence[Frame],
) -> None:
    """Convolve into `out`, frames (H, W, O); `reads` has a list for each group of frames given.

    Each weight (O, C, kt, kh, kw) reads its own frames of a group, and their results are added.
    """
    reads, weights = _alike(reads), [weight.float() for weight in weights]
    frame, given = next(filter(_is_tensor, chain(*reads))), next(filter(_is_tensor, out))
    given = given.movedim(-1, 0)
    _check(frame, given, weights, bias)
    shape, lanes = _shape(kind, weights), _filled(len(weights[0]), LANES)
    places, channels = _places(kind), frame.shape[0]
    u = weights[0].new_empty(len(weights) * places * channels * lanes)
    if frame.is_meta:
        return
    kernels, threads, by = cast(ctypes.CDLL, library()), torch.get_num_threads(), ctypes.byref
    kernels.winograd_transform(_pointers(weights), _pointer(u), by(shape), c_int32(threads))
    tiles = _tiles(kind, given, len(reads), threads, 4 * places * (channels + lanes))
    each = places * (tiles * (channels + lanes) + 32) + channels
    space = _space(threads * each)
    kernels.winograd(
        _pointers([*chain(*reads)]), _pointers(out), _pointer(u),
        _pointer(None if bias is None else (bias := bias.float().contiguous())), _pointer(space),
        c_int64(each), by(shape), by(_frames(frame, given, len(reads), tiles, threads)),
    )  # fmt: skip


def weight_gradient(
    kind: Kind, reads: Sequence[Sequence[Frame]], given: Sequence[Frame], weight: Tensor
) -> Tensor:
    """That of a weight (O, C, kt, kh, kw) from the gradients `given` (O, H, W) of what `run` makes:
    in float32, by the transforms of `run` the other way."""
    first = next(filter(_is_tensor, given), None)
    if not reads or first is None or not first.numel():
        return torch.zeros(weight.shape, dtype=torch.float32, device="cpu")
    reads, (givens,) = _alike(reads), _alike([given])
    frame, one = next(filter(_is_tensor, chain(*reads))), next(filter(_is_tensor, givens))
    _check(frame, one, [weight], None)
    sizes = [frame.shape[i] * (2 if kind[i] == DOUBLED else 1) for i in (1, 2)]
    groups = len(givens) / GIVEN[kind[0]]
    if (frame.dtype, sizes, len(reads)) != (one.dtype, [*one.shape[1:]], groups):
        raise ValueError(
            f"gradients {_size(one)} of {one.dtype}, for {groups:g} groups, are not of what comes "
            f"of frames {_size(frame)} of {frame.dtype} in {len(reads)} groups"
        )
    shape, threads, places = _shape(kind, [weight]), torch.get_num_threads(), _places(kind)
    out, channels = weight.shape[:2]
    tall, wide = _filled(channels, 12), _filled(out, LANES)
    # blocks of whole chains of 64 (`winograd.c`), so that sums are the same with any threads
    tiles = max(64, threads * SPACE_BYTES // (4 * places * (tall + wide + 32)) // 64 * 64)
    space = _space(places * (tiles * (tall + wide + 32) + 32) + tall + wide)
    space[-tall - wide :] = 0
    u = torch.zeros(places, tall * wide, dtype=torch.float32, device="cpu")
    kernels, by = cast(ctypes.CDLL, library()), ctypes.byref
    kernels.winograd_weight(
        _pointers([*chain(*reads)]), _pointers(givens), _pointer(u), _pointer(space),
        by(shape), by(_frames(frame, one, len(reads), tiles, threads)),
    )  # fmt: skip
    taps = (_taps_back(kind) @ u.double()).view(-1, tall, wide)  # no mode rounds float64
    return taps[:, :channels, :out].permute(2, 1, 0).float().contiguous().view(weight.shape)


_TAPS_BACK = (
    [[1.0]],
    [[1.0, 0.5, 0.5, 0.0], [0.0, 0.5, -0.5, 0.0], [0.0, 0.5, 0.5, 1.0]],
    [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1.0]],
)
"""Of each kind along an axis, the gradients of taps from those of products."""


@lru_cache
def _taps_back(kind: Kind) -> Tensor:
    """(taps, places) of all three axes."""
    time, row, column = (
        torch.tensor(_TAPS_BACK[each], dtype=torch.float64, device="cpu") for each in kind
    )
    return torch.kron(torch.kron(time, row), column)


def _places(kind: Kind) -> int:
    return math.prod(READ[each] for each in kind)


def _filled(channels: int, up_to: int) -> int:
    return -(-channels // up_to) * up_to


def _frames(frame: Tensor, given: Tensor, groups: int, tiles: int, threads: int) -> _Frames:
    """What is read (C, H, W), and given (O, H, W), its channels together."""
    return _Frames(
        groups, *frame.shape[1:], *frame.stride()[1:], 1, *given.shape[1:], *given.stride()[1:],
        tiles, threads, int(frame.dtype == torch.bfloat16),
    )  # fmt: skip


def _check(frame: Tensor, given: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> None:
    """The kernel takes addresses and believes what it is told: nothing may be told wrong."""
    out, channels = weights[0].shape[:2]
    fits = (len(frame), len(given), out if bias is None else len(bias)) == (channels, out, out)
    alike = all(weight.shape == weights[0].shape for weight in weights)
    devices = {x.device for x in (frame, given, *weights, *(() if bias is None else (bias,)))}
    if not (alike and fits) or len(devices) > 1:
        raise ValueError(
            f"a weight {_size(weights[0])} and a bias of {None if bias is None else len(bias)} do "
            f"not go with frames {_size(frame)} and results {_size(given)} on {devices}"
        )


_kept = threading.local()


def _space(numbers: int) -> Tensor:
    """What the kernel works in: kept by the thread that calls it, so that the heap has no gaps."""
    kept: Tensor | None = getattr(_kept, "space", None)
    if kept is None or kept.numel() < numbers:
        with torch.inference_mode(False):  # or nobody could write to it outside of that mode
            _kept.space = kept = torch.empty(numbers, dtype=torch.float32, device="cpu")
    return kept[:numbers]


def _is_tensor(x: Frame) -> TypeGuard[Tensor]:
    return x is not None


def _shape(kind: Kind, weights: Sequence[Tensor]) -> _Shape:
    strides = weights[0].stride()
    assert all(weight.stride() == strides for weight in weights)
    out, channels = weights[0].shape[:2]
    return _Shape((c_int32 * 3)(*kind), channels, out, len(weights), (c_int64 * 5)(*strides))


def _alike(reads: Sequence[Sequence[Frame]]) -> list[list[Frame]]:
    """The frames with the same strides, and their channels together: copied where they are not."""
    known = [*filter(_is_tensor, chain(*reads))]
    wanted = known[0].stride()
    if wanted[0] == 1 and all(frame.stride() == wanted for frame in known):
        return [list(group) for group in reads]
    whole = {id(frame): frame.movedim(0, -1).contiguous().movedim(-1, 0) for frame in known}
    return [[whole.get(id(frame)) for frame in group] for group in reads]


def _tiles(kind: Kind, given: Tensor, groups: int, threads: int, each: int) -> int:
    """Tiles of a block: what fits into a thread's space, or less, so that all threads have some.

    `each`: bytes that a tile takes.
    """
    rows, columns = (
        -(-size // GIVEN[of]) for size, of in zip(given.shape[1:], kind[1:], strict=True)
    )
    share = -(-groups * rows * columns // (2 * threads))
    return max(12, min(SPACE_BYTES // each, share) // 12 * 12)  # of rows of products, 6 or 12


def _pointer(x: Tensor | None) -> c_void_p:
    return c_void_p(None if x is None else x.data_ptr())


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[c_void_p]:
    return (c_void_p * len(tensors))(*map(_pointer, tensors))
