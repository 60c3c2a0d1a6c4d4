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
from itertools import chain
from typing import TypeGuard, cast

import torch
from torch import Tensor

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
    y = x.new_empty(n, times * h, times * w, len(weight))
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
    if len({(part.shape[:2], part.shape[3:], part.dtype) for part in parts}) > 1:
        raise ValueError(f"clips of one size follow one another, not {[*map(_size, parts)]}")
    samples = zip(*(part.transpose(1, 2) for part in parts), strict=True)
    clips: list[list[Frame]] = [
        [None] * zeros + [frame for part in each for frame in part] + [None] * behind
        for each in samples
    ]
    like, space = parts[-1], ONE if weight.shape[-1] == 1 else THREE
    given = sum(part.shape[2] for part in parts) + zeros + behind - 2
    y = like.new_empty(len(clips), given, *like.shape[3:], len(weight))
    if not y.numel():
        return y.movedim(-1, 1)
    if space == ONE or not _fewer_by_taps(clips[0]):
        pairs = range(0, given, 2)
        reads = [[*clip, None][i : i + 4] for clip in clips for i in pairs]
        out: list[Frame] = [frame for sample in y for i in pairs for frame in _two(sample, i)]
        run((THREE, space, space), reads, [weight], bias, out)
        return y.movedim(-1, 1)
    for taps, results in _same_taps(clips[0]):
        reads = [[clip[i + k] for k in taps] for clip in clips for i in results]
        out = [sample[i] for sample in y for i in results]
        run((ONE, space, space), reads, [weight[:, :, k, None] for k in taps], bias, out)
    return y.movedim(-1, 1)


def _size(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _two(frames: Tensor, i: int) -> tuple[Tensor, Frame]:
    """Two frames, the second None behind the last."""
    return frames[i], frames[i + 1] if i + 1 < len(frames) else None


def _fewer_by_taps(frames: Sequence[Frame]) -> bool:
    """Whether adding up taps multiplies less than pairs of frames do: few of them, or zeros."""
    given = len(frames) - 2
    taps = sum(frame is not None for i in range(given) for frame in frames[i : i + 3])
    return READ[THREE] * ((given + 1) // 2) >= taps


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
    _check(frame, given, weights, bias)
    shape, lanes = _shape(kind, weights), -(-len(weights[0]) // LANES) * LANES
    places, channels = math.prod(READ[each] for each in kind), frame.shape[0]
    u = weights[0].new_empty(len(weights) * places * channels * lanes)
    if frame.is_meta:
        return
    kernels, threads, by = cast(ctypes.CDLL, library()), torch.get_num_threads(), ctypes.byref
    kernels.winograd_transform(_pointers(weights), _pointer(u), by(shape), c_int32(threads))
    tiles = _tiles(kind, given, len(reads), threads, 4 * places * (channels + lanes))
    each = places * (tiles * (channels + lanes) + 32) + channels
    space = _space(threads * each)
    frames = _Frames(
        len(reads), *frame.shape[1:], *frame.stride()[1:], 1, *given.shape[:2],
        *given.stride()[:2], tiles, threads, int(frame.dtype == torch.bfloat16),
    )  # fmt: skip
    kernels.winograd(
        _pointers([*chain(*reads)]), _pointers(out), _pointer(u),
        _pointer(None if bias is None else (bias := bias.float().contiguous())), _pointer(space),
        c_int64(each), by(shape), by(frames),
    )  # fmt: skip


def _check(frame: Tensor, given: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> None:
    """The kernel takes addresses and believes what it is told: nothing may be told wrong."""
    out, channels = weights[0].shape[:2]
    fits = (len(frame), given.shape[2], out if bias is None else len(bias)) == (channels, out, out)
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
        _kept.space = kept = torch.empty(numbers)
    return kept


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
    rows, columns = (-(-size // GIVEN[of]) for size, of in zip(given.shape, kind[1:], strict=False))
    share = -(-groups * rows * columns // (2 * threads))
    return max(12, min(SPACE_BYTES // each, share) // 12 * 12)  # of rows of products, 6 or 12


def _pointer(x: Tensor | None) -> c_void_p:
    return c_void_p(None if x is None else x.data_ptr())


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[c_void_p]:
    return (c_void_p * len(tensors))(*map(_pointer, tensors))
