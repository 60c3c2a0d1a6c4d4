"""A 3x3 convolution of a frame in which every pixel is repeated four times, without repeating it.

The nine taps of an output pixel meet four different pixels at most: which taps meet the same one
depends on whether its row and its column are even or odd. So the result is four 2x2 convolutions of
the smaller frame, whose taps are sums of the nine, and whose results lie between one another. They
take 4/9 of the multiplications, and round less.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_vae.network.kernels import three_taps
from temporal_vae.network.kernels.blocks import new_empty
from temporal_vae.network.kernels.conv import conv2d
from temporal_vae.network.kernels.plain import on_cpu, values_only

LEAST_PIXELS = 128
"""Pixels of all frames below which the sums of the taps cost more than they save."""


def repeated(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2 H, 2 W), every pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether not to repeat the pixels is faster; measured on the CPU only."""
    many = x.shape[0] * x.shape[2] * x.shape[3] >= LEAST_PIXELS
    if torch.compiler.is_compiling():
        return three_taps.serves(x, weight, bias)
    return on_cpu(x) and many


def doubled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d(repeated(x), weight, bias, padding=1)` of a 3x3 weight, by four of 2x2."""
    if three_taps.serves(x, weight, bias):
        return three_taps.conv2d(x, weight, bias, doubled=True)
    n, _, h, w = x.shape
    kernels = [_taps(rows, 3) for rows in _taps(weight, 2)]
    if not values_only(x, weight):
        rows = [
            torch.stack([_part(x, kernels[r][c], bias, r, c).movedim(1, -1) for c in (0, 1)], 3)
            for r in (0, 1)
        ]
        return torch.stack(rows, 2).reshape(n, 2 * h, 2 * w, -1).movedim(-1, 1)
    y = new_empty(x, (n, 2 * h, 2 * w, len(weight))).movedim(-1, 1)
    for r in (0, 1):
        for c in (0, 1):
            y[:, :, r::2, c::2] = _part(x, kernels[r][c], bias, r, c)
    return y


def _part(x: Tensor, kernel: Tensor, bias: Tensor | None, row: int, column: int) -> Tensor:
    """The outputs whose rows and columns are even (0) or odd (1)."""
    h, w = x.shape[2:]
    return conv2d(x, kernel, bias, padding=1)[:, :, row : row + h, column : column + w]


def _taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two taps along a dimension of an even output, and of an odd one, from the three."""
    first, middle, last = weight.split(1, dim)
    even, odd = (first, middle + last), (first + middle, last)
    return torch.cat(even, dim), torch.cat(odd, dim)
