"""Convolutions with three taps along an axis in fewer multiplications (Winograd's algorithm).

`winograd.c` says how. Of a 3x3 convolution they leave 4/9 of the multiplications, of one of doubled
pixels 1/4, of three taps in time 2/3, of 3x3x3 8/27, and they round less than torch's channels-last
kernels. Nothing as large as an activation is made beside the result: inputs are transformed a few
tiles at a time, in memory that stays in the cache.

Letters: N frames of all samples, B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from temporal_vae.network.kernels.native import library
from temporal_vae.network.kernels.plain import on_cpu, values_only

ONE, THREE, DOUBLED = range(3)
"""What a kernel does along an axis: see `winograd.c`."""
READ, GIVEN = (1, 4, 3), (1, 2, 2)
"""Of each kind, the inputs and results of a tile along an axis."""
CHANNELS = 16
"""Channels are taken so many at a time."""
LEAST_PIXELS = 256
"""Pixels of all frames below which transforming the weights costs more than it saves."""
LEAST_PRODUCTS = 2**24
"""Multiplications of torch's kernel below which a call costs more than it saves."""
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


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether three taps along an axis are faster here: for values alone, in float32 on the CPU."""
    pixels, (out, channels) = x.numel() // x.shape[1], weight.shape[:2]
    return (
        on_cpu(x)
        and x.dtype == weight.dtype == torch.float32
        and channels % CHANNELS == out % CHANNELS == 0
        and pixels >= LEAST_PIXELS
        and pixels * weight.numel() >= LEAST_PRODUCTS
        and values_only(x, weight)
        and (bias is None or (bias.dtype == x.dtype and values_only(bias)))
        and not torch.is_autocast_enabled("cpu")
        and (x.is_meta or library() is not None)
    )


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with a pixel of zeros around each frame; x (N, C, H, W)."""
    n, _, h, w = x.shape
    y = x.new_empty(n, h, w, len(weight))
    run((ONE, THREE, THREE), [[frame] for frame in x], [weight.unsqueeze(2)], bias, list(y))
    return y.movedim(-1, 1)


def doubled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same of frames in which every pixel is repeated four times, (N, O, 2 H, 2 W)."""
    n, _, h, w = x.shape
    y = x.new_empty(n, 2 * h, 2 * w, len(weight))
    run((ONE, DOUBLED, DOUBLED), [[frame] for frame in x], [weight.unsqueeze(2)], bias, list(y))
    return y.movedim(-1, 1)


def over_time(
    samples: Sequence[Sequence[Tensor]],
    zeros: int,
    weight: Tensor,
    bias: Tensor | None,
    behind: int = 0,
) -> Tensor:
    """Three taps in time, (O, C, 3, 1, 1) or (O, C, 3, 3, 3), over n + 2 frames to n.

    `samples` are the frames (C, H, W) of each, to be taken between so many frames of zeros before
    and behind them; a result is (B, O, n, H, W).
    """
    clips: list[list[Frame]] = [[None] * zeros + [*clip] + [None] * behind for clip in samples]
    given, frame, space = len(clips[0]) - 2, samples[0][0], ONE if weight.shape[-1] == 1 else THREE
    y = frame.new_empty(len(clips), given, *frame.shape[1:], len(weight))
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


def _two(frames: Tensor, i: int) -> tuple[Tensor, Frame]:
    """Two frames, the second None behind the last."""
    return frames[i], frames[i + 1] if i + 1 < len(frames) else None


def _fewer_by_taps(frames: Sequence[Frame]) -> bool:
    """Whether adding up taps multiplies less than pairs of frames do: few of them, or zeros."""
    given = len(frames) - 2
    taps = sum(frame is not None for i in range(given) for frame in frames[i : i + 3])
    return 2 * READ[THREE] * ((given + 1) // 2) >= 2 * taps


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
    known = [frame for group in reads for frame in group if frame is not None]
    frame, given = known[0], next(y for y in out if y is not None)
    shape = _Shape((c_int32 * 3)(*kind), *_channels(weights[0]), len(weights), _strides(weights))
    places = READ[kind[0]] * READ[kind[1]] * READ[kind[2]]
    lanes = -(-shape.outputs // 32) * 32  # as many as the widest panel
    u = frame.new_empty(len(weights) * places * shape.inputs * lanes)
    if frame.is_meta:
        return
    kernels, threads = library(), torch.get_num_threads()
    assert kernels is not None
    reads = _alike(reads)
    frame = next(frame for group in reads for frame in group if frame is not None)
    tiles = _tiles(kind, given, len(reads), threads, 4 * places * (shape.inputs + lanes))
    space = u.new_empty(threads, places * (tiles * (shape.inputs + lanes) + 32) + shape.inputs)
    frames = _Frames(
        len(reads), *frame.shape[1:], frame.stride(1), frame.stride(2), 1,
        *given.shape[:2], *given.stride()[:2], tiles, threads, 0,
    )  # fmt: skip
    by = ctypes.byref
    kernels.winograd_transform(_pointers(weights), _pointer(u), by(shape), c_int32(threads))
    kernels.winograd(
        _pointers([frame for group in reads for frame in group]), _pointers(out), _pointer(u),
        None if bias is None else _pointer(bias.contiguous()), _pointer(space),
        c_int64(space.shape[1]), by(shape), by(frames),
    )  # fmt: skip


def _channels(weight: Tensor) -> tuple[int, int]:
    return weight.shape[1], weight.shape[0]


def _strides(weights: Sequence[Tensor]) -> ctypes.Array[c_int64]:
    assert all(weight.stride() == weights[0].stride() for weight in weights)
    return (c_int64 * 5)(*weights[0].stride())


def _alike(reads: Sequence[Sequence[Frame]]) -> list[list[Frame]]:
    """The frames with the same strides, and their channels together: copied where they are not."""
    known = [frame for group in reads for frame in group if frame is not None]
    wanted = known[0].stride()
    if wanted[0] == 1 and all(frame.stride() == wanted for frame in known):
        return [list(group) for group in reads]
    whole = {frame: frame.movedim(0, -1).contiguous().movedim(-1, 0) for frame in known}
    return [[None if frame is None else whole[frame] for frame in group] for group in reads]


def _tiles(kind: Kind, given: Tensor, groups: int, threads: int, each: int) -> int:
    """Tiles of a block: what fits into a thread's space, or less, so that all threads have some."""
    rows, columns = (-(-size // GIVEN[of]) for size, of in zip(given.shape, kind[1:], strict=False))
    share = -(-groups * rows * columns // (2 * threads))
    return max(12, min(SPACE_BYTES // each, share) // 12 * 12)  # of rows of products, 6 or 12


def _pointer(x: Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())


def _pointers(tensors: Sequence[Frame]) -> ctypes.Array[c_void_p]:
    return (c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))
