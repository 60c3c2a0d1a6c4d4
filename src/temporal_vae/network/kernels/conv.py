"""Convolutions of wide channels-last tensors, with the rounding of the contiguous layout.

On the CPU the channels-last kernel behind torch rounds more than the one for contiguous input (2.7
times at 128 channels), the more so the wider the input, as if it added all products of an output in
one chain. Here wide inputs are convolved 128 channels at a time and the results added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_vae.network.kernels import three_taps
from temporal_vae.network.kernels.plain import values_only

CHANNELS_AT_A_TIME = 128
WIDE = 512
"""Input channels from which on the chain is cut; below, the cut costs more than it mends."""


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0
) -> Tensor:
    """torch's function; in float32 on the CPU a faster, or without gradients a more exact one."""
    if stride == padding == 1 and weight.shape[2] == 3 and three_taps.serves(x, weight, bias):
        return three_taps.conv2d(x, weight, bias)
    if not _is_wide(x, weight):
        return F.conv2d(x, weight, bias, stride, padding)
    y: Tensor | None = None
    parts = zip(x.split(CHANNELS_AT_A_TIME, 1), weight.split(CHANNELS_AT_A_TIME, 1), strict=True)
    for channels, weights in parts:
        channels = channels.contiguous(memory_format=torch.channels_last)
        part = F.conv2d(channels, weights, bias if y is None else None, stride, padding)
        y = part if y is None else y.add_(part)
    assert y is not None
    return y


def _is_wide(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.shape[1] >= WIDE
        and weight.shape[2] > 1
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and values_only(x, weight)
    )
