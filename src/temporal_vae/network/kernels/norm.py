"""Group norm for channels-last tensors, as exact as torch's for the other layout.

torch's own CPU kernel for channels-last float32 sums x and x^2 in float32, pixel after pixel, and
takes the variance as E[x^2] - E[x]^2: ten times the rounding error of its kernel for contiguous
input, and fifty times where the mean is far from zero. Here the moments of short runs of pixels are
taken in two passes, by the same sums whatever the number of threads, and joined in float64 (Chan,
Golub and LeVeque 1983). What joins runs joins the pieces of a walk too: a norm can span more than
is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_vae.network.folds import fold_pixels, unfold_pixels
from temporal_vae.network.kernels import blocks, fused
from temporal_vae.network.kernels.plain import transformed, values_only

RUN_PIXELS = 256
"""Pixels of one run: few enough to sum in float32, whatever the number of threads."""
COLUMNS = 2048
"""Sums that one call takes side by side: its input fits a core's cache, as it is read twice."""


def group_norm_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """What `group_norm` computes, by torch: x (N, C, H, W) -> (N, C, H, W), differentiable."""
    x = x.contiguous() if transformed() else x  # `vmap` knows no other memory order here
    if torch.is_grad_enabled() and weight.requires_grad and not x.requires_grad:
        # torch's channels-last backward writes the gradient of x even where none is wanted, and
        # crashes: behind frozen layers scale and shift stand outside of it
        shape = (1, -1, 1, 1)
        y = F.group_norm(x, groups, None, None, eps)
        return y * weight.view(shape) + bias.view(shape)
    return F.group_norm(x, groups, weight, bias, eps)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    spent: bool = False,
) -> Tensor:
    """Normalise groups of channels over each sample's pixels; with SiLU of that, if `silu`.

    x (N, C, H, W), or a clip (B, C, T, H, W) whose frames go together; any floating dtype. The
    result is a new tensor in the memory order of x, or where x is `spent`, which nobody reads
    again, it may lie over x. Our kernel serves channels-last float32 on the CPU where no gradient
    is wanted, torch all else.
    """
    if x.ndim == 5:
        y = group_norm(fold_pixels(x), groups, weight, bias, eps, silu, spent)
        return unfold_pixels(y, x.shape[3:])
    if _has_kernel(x, weight):
        return normalise(x, Moments.of(x, groups), weight, bias, eps, silu, spent)
    y = _by_torch(x, groups, weight, bias, eps)
    return F.silu(y, inplace=values_only(y)) if silu else y


def _by_torch(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float16 and x.device.type != "cpu":
        return group_norm_in_float32(x, groups, weight, bias, eps)
    y = group_norm_reference(x, groups, weight, bias, eps)
    if x.device.type != "cpu" and x.is_contiguous(memory_format=torch.channels_last):
        # a GPU's kernel gives the other layout, of which every convolution would make a copy
        y = y.contiguous(memory_format=torch.channels_last)
    return y


def group_norm_in_float32(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`group_norm` of float16 input, one sample at a time.

    torch's kernel for CUDA takes eps in the dtype of x, and in float16 nothing below 6e-8 is left
    of it: the eps of a scaled input would be 0, and a group of equal values NaN.
    """
    weight, bias = weight.float(), bias.float()

    def one(part: Tensor) -> Tensor:  # whose float32 is let go before the next
        y = group_norm_reference(part.float(), groups, weight, bias, eps)
        return y.to(x.dtype, memory_format=torch.channels_last)

    return torch.cat([one(part) for part in x.split(1)])


@dataclass(frozen=True, slots=True)
class Moments:
    """What a group norm needs of its input: pixels summed over, and float64 moments (N, groups)."""

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, x: Tensor, groups: int) -> Moments:
        """Moments of x (N, C, ...), joined from those of short runs of pixels.

        Runs are taken side by side, every n-th pixel in one of n: as channels, to torch. Where
        gradients are wanted torch sums it all.
        """
        if not values_only(x):
            return cls(x[0, 0].numel(), *_differentiable(x, groups))
        samples, channels = x.shape[:2]
        pixels = x.movedim(1, -1).reshape(samples, -1, channels)
        # float16 cannot hold the variance of what it can hold: 256 squared is beyond its end
        wide = torch.float32 if x.dtype == torch.float16 else x.dtype
        found, begin = [], 0
        for runs, length in _slabs(pixels.shape[1], max(1, COLUMNS // channels)):
            slab = pixels[:, begin : begin + runs * length]
            columns = slab.reshape(samples, length, runs * channels)
            moments = [_of_columns(one.to(wide)) for one in columns]
            shape = (samples, runs, groups, channels // groups)
            mean, variance = (
                _double(torch.stack(each)).view(shape) for each in zip(*moments, strict=True)
            )
            between, centre = torch.var_mean(mean, (1, 3), correction=0)
            found.append(cls(runs * length, centre, between.add_(variance.mean((1, 3)))))
            begin += runs * length
        return found[0] if len(found) == 1 else cls.join(found)

    @classmethod
    def join(cls, parts: Sequence[Moments]) -> Moments:
        """Moments of the whole from those of its parts, which share no pixel."""
        count = sum(part.count for part in parts)
        mean = torch.stack([part.mean for part in parts])
        variance = torch.stack([part.variance for part in parts])
        share = torch.tensor([part.count / count for part in parts], dtype=torch.float64)
        return cls(count, *_pool(share.view(-1, 1, 1).to(mean.device), mean, variance, (0,)))


def normalise(
    x: Tensor,
    moments: Moments,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    spent: bool = False,
) -> Tensor:
    """A part of what has these moments by them, scaled and shifted per channel; then SiLU, if so.

    x is (N, C, H, W) or (B, C, T, H, W); the result may lie over it if it is `spent`. 16-bit
    input is computed in float32. Gradients go through the moments too.
    """
    if x.ndim == 5:
        y = normalise(fold_pixels(x), moments, weight, bias, eps, silu, spent)
        return unfold_pixels(y, x.shape[3:])
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)
    samples, groups = moments.mean.shape
    each = (samples, groups, x.shape[1] // groups)
    mean, variance = (
        moment.unsqueeze(2).expand(each).reshape(samples, -1).to(x.device, wide)
        for moment in (moments.mean, moments.variance)
    )
    if not values_only(x, weight, bias, mean):
        mean, scale = (each[..., None, None] for each in (mean, (variance + eps).rsqrt()))
        weight, bias = (each[:, None, None] for each in (weight, bias))
        y = torch.addcmul(bias, x - mean, scale * weight).to(x.dtype)
        return F.silu(y) if silu else y
    if fused.serves(x):
        y = x if spent else blocks.empty_like(x)
        scale = (variance.double() + eps).rsqrt().to(wide) * weight
        for n in range(samples):
            fused.shifted(x[n : n + 1], y[n : n + 1], mean[n], scale[n], bias, silu)
        return y
    # CUDA computes with what it saves: two tensors, or one would overwrite the other
    y, saved = torch.empty_like(x), [x.new_empty(0, dtype=wide) for _ in range(2)]
    for n in range(samples):
        torch.ops.aten.native_batch_norm.out(
            x[n : n + 1], weight, bias, mean[n], variance[n], False, 0.0, eps,
            out=y[n : n + 1], save_mean=saved[0], save_invstd=saved[1],
        )  # fmt: skip
    return F.silu(y, inplace=True) if silu else y


def _of_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each column of x (rows, columns), in two passes."""
    if x.device.type == "cuda":
        mean, variance = torch.batch_norm_update_stats(x.T[None, :, :, None], None, None, 0.0)
        return mean, variance
    if fused.has_moments(x):
        return fused.moments(x)
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(x.float(), 0, correction=0)
        return mean, variance
    # torch's kernel for batch norms on the CPU rounds by the number of threads; these sums do not
    mean = x.mean(0)
    return mean, (x - mean).square_().mean(0)


def _differentiable(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (N, groups) of x (N, C, ...), float64, by torch's own sums."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(wide, tuple(range(2, wide.ndim)), correction=0)
    return _double(mean), _double(variance)


def _double(x: Tensor) -> Tensor:
    """x in float64, on the CPU where its device has none (MPS)."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def _slabs(pixels: int, most: int) -> Iterator[tuple[int, int]]:
    """(number of runs, pixels of each) for as many as there are, `most` runs at a time."""
    while pixels >= RUN_PIXELS:
        runs = min(most, pixels // RUN_PIXELS)
        yield runs, RUN_PIXELS
        pixels -= runs * RUN_PIXELS
    if pixels:
        yield 1, pixels


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and values_only(x, weight)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _pool(
    share: Tensor, mean: Tensor, variance: Tensor, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a union of parts, whose shares add up to 1 over `dims`."""
    centre = (share * mean).sum(dims, keepdim=True)
    spread = (share * (variance + (mean - centre).square())).sum(dims)
    return centre.sum(dims), spread
