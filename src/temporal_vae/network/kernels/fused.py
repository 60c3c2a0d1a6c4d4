"""A norm's last step and SiLU in one pass, by our kernels in C.

x is (N, C, ...) with its channels together in memory, and so is what is computed, y, which may lie
over x.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import cast

import torch
from torch import Tensor

from temporal_vae.network.kernels.native import CHANNELS, library
from temporal_vae.network.kernels.plain import has_memory, recorded, values_only


def serves(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels take x, and values alone are wanted."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[1] % CHANNELS == 0
        and all(weight.numel() == x.shape[1] for weight in weights)
        and has_memory(x, *weights)
        and values_only(x, *weights)
        and not recorded()
        and x.movedim(1, -1).is_contiguous()
        and library() is not None
    )


def has_moments(x: Tensor) -> bool:
    """Whether the kernel takes rows x (n, columns)."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[1] % CHANNELS == 0
        and has_memory(x)
        and values_only(x)
        and not recorded()
        and x.is_contiguous()
        and library() is not None
    )


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each column of rows (n, columns)."""
    mean, variance = torch.empty_like(x[0]), torch.empty_like(x[0])
    cast(ctypes.CDLL, library()).norm_moments(
        c_void_p(x.data_ptr()), *map(c_int64, x.shape), c_void_p(mean.data_ptr()),
        c_void_p(variance.data_ptr()), c_int32(torch.get_num_threads()),
    )  # fmt: skip
    return mean, variance


def shifted(x: Tensor, y: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> None:
    """y = (x - mean) * scale + shift, each (C,) in float32."""
    kernels, each = cast(ctypes.CDLL, library()), [of.contiguous() for of in (mean, scale, shift)]
    where = (c_void_p(of.data_ptr()) for of in each)
    kernels.norm_shifted(*_both(x, y), *where, *_how(x, silu))


def by_length(x: Tensor, y: Tensor, gain: Tensor, shortest: float, silu: bool) -> None:
    """y = x by its length over the channels, or `shortest`, times gain (C,) in float32."""
    kernels, gain = cast(ctypes.CDLL, library()), gain.contiguous()
    kernels.norm_by_length(
        *_both(x, y), c_void_p(gain.data_ptr()), c_float(shortest), *_how(x, silu)
    )


def by_position(x: Tensor, y: Tensor, gain: Tensor, shift: Tensor, eps: float, silu: bool) -> None:
    """y = the layer norm of x over the channels; gain and shift (C,) in float32."""
    kernels, each = cast(ctypes.CDLL, library()), [of.contiguous() for of in (gain, shift)]
    where = (c_void_p(of.data_ptr()) for of in each)
    kernels.norm_by_position(*_both(x, y), *where, c_float(eps), *_how(x, silu))


def _both(x: Tensor, y: Tensor) -> tuple[c_void_p, c_void_p, c_int64, c_int64]:
    """Where both lie, their pixels and their channels."""
    channels = x.shape[1]
    pixels = x.numel() // channels
    return c_void_p(x.data_ptr()), c_void_p(y.data_ptr()), c_int64(pixels), c_int64(channels)


def _how(x: Tensor, silu: bool) -> tuple[c_int32, c_int32, c_int32]:
    narrow = int(x.dtype == torch.bfloat16)
    return c_int32(int(silu)), c_int32(narrow), c_int32(torch.get_num_threads())
