"""Convolutions with three taps along their axes: by our kernel where it serves, with gradients.

Where nobody differentiates or compiles, the functions of `winograd` are called as they are. Else
they are operators of torch, which `torch.compile` takes into its graphs and autograd knows: the
gradient of an input is a convolution of the same kind, that of a weight `winograd`'s, or torch's
where it is differentiated further or compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import assume_constant_result, is_compiling, is_exporting

from temporal_vae.network.folds import fold_frames, fold_pixels, joined
from temporal_vae.network.kernels import winograd
from temporal_vae.network.kernels.dtypes import is_slow
from temporal_vae.network.kernels.native import CHANNELS, library
from temporal_vae.network.kernels.plain import (
    has_memory,
    on_cpu,
    recorded,
    transformed,
    values_only,
)

LEAST_PIXELS = 256
"""Pixels of all frames below which transforming the weights costs more than it saves."""
LEAST_PRODUCTS = 2**24
"""Multiplications of torch's kernel below which a call costs more than it saves."""

_Question = Callable[[], bool]
_constant = cast("Callable[[_Question], _Question]", assume_constant_result)
"""Of the machine alone: a graph takes the answer, not the question."""


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our kernel is faster than torch's: on the CPU, in float32, or in bfloat16 where the
    processor has no instructions for it."""
    if is_exporting() or not (on_cpu(x) and has_memory(x, weight, bias)):
        return False
    if x.shape[1] != weight.shape[1] or (bias is not None and len(bias) != len(weight)):
        return False  # an error, which torch tells
    if not (is_compiling() or _large(x, weight)) or _elsewhere(x):
        return False
    out, channels = weight.shape[:2]
    return (
        x.dtype == weight.dtype == (x if bias is None else bias).dtype
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and (x.is_meta or _slow())))
        and channels % CHANNELS == out % CHANNELS == 0
        and not torch.is_autocast_enabled("cpu")
        and (x.is_meta or _present())
    )


def _elsewhere(x: Tensor) -> bool:
    """Whether torch itself must see the operations, though it makes no graph."""
    return not is_compiling() and (transformed() or (recorded() and not x.is_meta))


def _large(x: Tensor, weight: Tensor) -> bool:
    """Whether there is enough to do. (A graph would guard it, and be made anew beyond.)"""
    pixels = x.numel() // x.shape[1]
    return pixels >= LEAST_PIXELS and pixels * weight.numel() >= LEAST_PRODUCTS


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool = False) -> Tensor:
    """See `winograd.conv2d`."""
    if _mapped(x):
        x = F.interpolate(x, scale_factor=2.0) if doubled else x
        return F.conv2d(x, weight, bias, padding=1)
    if values_only(x, weight, bias):
        return winograd.conv2d(x, weight, bias, doubled)
    y: Tensor = _conv2d(x, weight, bias, doubled)
    return y


def over_time(
    parts: Sequence[Tensor], zeros: int, behind: int, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """See `winograd.over_time`."""
    if _mapped(parts[-1]):
        side, clip = weight.shape[-1] // 2, F.pad(joined(*parts), (0, 0, 0, 0, zeros, behind))
        return F.conv3d(clip, weight, bias, padding=(0, side, side))
    if values_only(weight, bias, *parts):
        return winograd.over_time(parts, zeros, behind, weight, bias)
    y: Tensor = _over_time(list(parts), zeros, behind, weight, bias)
    return y


def _mapped(x: Tensor) -> bool:
    """Whether x stands for several tensors, as gradients do where a batch of them is wanted."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return not is_compiling() and (transformed() or legacy(x))


@_constant
def _present() -> bool:
    return library() is not None


@_constant
def _slow() -> bool:
    return is_slow(torch.bfloat16, torch.device("cpu"))


# As operators of torch ---------------------------------------------------------------------------


@torch.library.custom_op("temporal_vae::conv2d", mutates_args=())
def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool) -> Tensor:
    return winograd.conv2d(x, weight, bias, doubled)


@_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool) -> Tensor:
    n, _, h, w = x.shape
    times = 2 if doubled else 1
    return x.new_empty(n, times * h, times * w, len(weight)).movedim(-1, 1)


@torch.library.custom_op("temporal_vae::over_time", mutates_args=())
def _over_time(
    parts: list[Tensor], zeros: int, behind: int, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return winograd.over_time(parts, zeros, behind, weight, bias)


@_over_time.register_fake
def _(parts: list[Tensor], zeros: int, behind: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    frames = sum(part.shape[2] for part in parts) + zeros + behind - 2
    b, _, _, h, w = parts[-1].shape
    return parts[-1].new_empty(b, frames, h, w, len(weight)).movedim(-1, 1)


def _remember_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.doubled = inputs
    ctx.save_for_backward(x, weight)


def _conv2d_back(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight), doubled, wanted = ctx.saved_tensors, ctx.doubled, ctx.needs_input_grad
    back = of_weight = None
    given = given.resolve_neg()  # the kernels read what lies in memory
    if wanted[0]:
        back = conv2d(given, weight.flip(2, 3).transpose(0, 1), None)
        back = F.avg_pool2d(back, 2, divisor_override=1) if doubled else back
    if wanted[1] and _here(given, x, weight):
        of_weight = winograd.conv2d_weight(given, x, weight, doubled).to(weight.dtype)
    elif wanted[1]:
        read = F.interpolate(x, scale_factor=2.0) if doubled else x
        of_weight = _weight_back(given, read, weight, (1, 1))
    return back, of_weight, _sum(given, wanted[2]), None


def _remember_over_time(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parts, ctx.zeros, ctx.behind, weight, _ = inputs
    ctx.save_for_backward(*parts, weight)


def _over_time_back(ctx: Any, given: Tensor) -> tuple[Any, ...]:
    *parts, weight = ctx.saved_tensors
    given = given.resolve_neg()
    zeros, behind, wanted = ctx.zeros, ctx.behind, ctx.needs_input_grad
    back: Any = [None] * len(parts)
    if wanted[0] if isinstance(wanted[0], bool) else any(wanted[0]):
        turned = weight.flip(2, 3, 4).transpose(0, 1)
        back = over_time([given], 2 - zeros, 2 - behind, turned, None).split(
            [part.shape[2] for part in parts], 2
        )
    of_weight = _over_time_weight(given, parts, zeros, behind, weight) if wanted[3] else None
    return list(back), None, None, of_weight, _sum(given, wanted[4])


def _over_time_weight(
    given: Tensor, parts: Sequence[Tensor], zeros: int, behind: int, weight: Tensor
) -> Tensor:
    """The gradient of the weight: by our kernel, or tap by tap by torch's 2-D kernels."""
    if _here(given, weight, *parts):
        return winograd.over_time_weight(given, parts, zeros, behind, weight).to(weight.dtype)
    x = joined(*parts) if len(parts) > 1 else parts[0]
    if weight.shape[-1] == 1 and zeros == behind:
        flat = weight.squeeze(-1)
        found = _weight_back(fold_pixels(given), fold_pixels(x), flat, (zeros, 0))
        return found.unsqueeze(-1)
    taps = []
    for k in range(3):
        first, stop = max(0, zeros - k), min(given.shape[2], x.shape[2] + zeros - k)
        there = fold_frames(given[:, :, first:stop])
        read = fold_frames(x[:, :, first + k - zeros : stop + k - zeros])
        pad = (1, 1) if weight.shape[-1] == 3 else (0, 0)
        taps.append(_weight_back(there, read, weight[:, :, k], pad))
    return torch.stack(taps, 2)


def _here(*tensors: Tensor) -> bool:
    """Whether our kernel computes a gradient: of tensors in memory, which nobody differentiates
    further."""
    return (
        tensors[0].device.type == "cpu"
        and values_only(*tensors)
        and has_memory(*tensors)
        and not (recorded() or any(map(_mapped, tensors)))
    )


def _weight_back(given: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    mask = [False, True, False]
    found: Tensor = torch.ops.aten.convolution_backward(
        given, x, weight, None, [1, 1], list(padding), [1, 1], False, [0, 0], 1, mask
    )[1]
    return found


def _sum(given: Tensor, wanted: bool) -> Tensor | None:
    """The gradient of a bias."""
    return given.sum([axis for axis in range(given.ndim) if axis != 1]) if wanted else None


_conv2d.register_autograd(_conv2d_back, setup_context=_remember_conv2d)
_over_time.register_autograd(_over_time_back, setup_context=_remember_over_time)
