"""The two kinds of layer: framewise ones see one frame, timewise ones see one pixel over time.

Letters: B batch, C channels, T frames, H height, W width, P pixels of a frame (H*W).

Every layer takes and returns x (B, C, T, H, W) whose memory order is B T H W C
(`torch.channels_last_3d`). In that order the frames fold into the batch, (B*T, C, H, W), and the
pixels into one axis, (B, C, T, P), both as views and both channels-last: no kind of layer ever
copies the clip to see it its own way. (Views are taken with the channels last: otherwise torch
gives an axis of size one a stride that hides the memory order from its kernels.)

A layer declares how far it sees in time: `past` and `future` are counts of frames, None for the
whole clip.
"""

from __future__ import annotations

from fractions import Fraction
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temporal_vae.config import TemporalVAEConfig
from temporal_vae.network.kernels.conv import conv2d
from temporal_vae.network.kernels.norm import group_norm
from temporal_vae.network.primitives import (
    SPATIAL_EPS,
    Conv2d,
    GroupNorm,
    Linear,
    Norm,
    Scales,
    own_norm,
    silu,
)

# Pairs of query and key at a time: some kernels hold a number for each.
ATTENTION_SCORES = 2**26
LEAST_QUERIES = 1024


# ---------------------------------------------------------------------------------------------
# Framewise


class Framewise(nn.Module):
    """A layer that sees one frame at a time, all its pixels; subclasses define `frames`."""

    past: int | None = 0
    future: int | None = 0
    halo: tuple[int, int] | None = (0, 0)
    """Rows above and below that an output row's inputs reach; None for the whole frame."""
    scale: Fraction = Fraction(1)
    """Output rows, and columns, for one of the input."""

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'), each of the N frames on its own."""
        raise NotImplementedError

    def norms(self) -> tuple[nn.Module, ...]:
        """The norms over a frame, in order of application."""
        return ()

    def channels(self, channels: int) -> int:
        """Output channels for input channels: the same unless a layer says otherwise."""
        return channels

    def carry(self, stream: float, branch: float = 1.0) -> None:
        """From now on find and leave the residual stream multiplied by `stream`.

        What is between the two norms of the layer's own branch, if it has one, is multiplied by
        `branch`. Nothing happens in a layer beside the stream.
        """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H', W')."""
        y = self.frames(x.movedim(1, -1).flatten(0, 1).movedim(-1, 1))
        y = y.contiguous(memory_format=torch.channels_last).movedim(1, -1)
        clip: Tensor = y.unflatten(0, (x.shape[0], x.shape[2])).movedim(-1, 1)
        return clip


class FrameConv(Framewise):
    """A square convolution on each frame, size kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.padding = kernel // 2
        self.halo = (self.padding, self.padding)

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        return conv2d(x, self.weight, self.bias, padding=self.padding)

    def channels(self, channels: int) -> int:
        return self.weight.shape[0]


class FirstConv(FrameConv):
    """The convolution that the residual stream begins with."""

    scales = Scales()

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        if self.scales.after != 1.0:
            x = x.clone()  # it is the caller's, not to be overwritten
        x, bias = self.scales.enter(x), self.scales.shift(self.bias)
        return conv2d(x, self.weight, bias, padding=self.padding)

    def carry(self, stream: float, branch: float = 1.0) -> None:
        self.scales = Scales(1.0, stream)


class FrameNormSiLU(Framewise):
    """Group norm over each frame, then SiLU."""

    def __init__(self, groups: int, channels: int):
        super().__init__()
        norm = GroupNorm(groups, channels, eps=SPATIAL_EPS)
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps = groups, SPATIAL_EPS

    def frames(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        if norm is None:
            return silu(group_norm(x, self.num_groups, self.weight, self.bias, self.eps))
        return silu(norm(self, x))

    def norms(self) -> tuple[nn.Module, ...]:
        return (self,)

    def carry(self, stream: float, branch: float = 1.0) -> None:
        self.eps = SPATIAL_EPS * stream**2


class ResidualBlock(Framewise):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    halo = (2, 2)

    def __init__(self, in_channels: int, out_channels: int, config: TemporalVAEConfig):
        super().__init__()
        self.norm1 = GroupNorm(config.groups(in_channels), in_channels, eps=SPATIAL_EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(config.groups(out_channels), out_channels, eps=SPATIAL_EPS)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        h = self.conv1(silu(norm(self.norm1, x)))
        h = silu(norm(self.norm2, h))  # a line of its own frees what it replaces before the next
        y: Tensor = self.conv2(h)
        return y.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))

    def norms(self) -> tuple[nn.Module, ...]:
        return (self.norm1, self.norm2)

    def channels(self, channels: int) -> int:
        return self.conv2.out_channels

    def carry(self, stream: float, branch: float = 1.0) -> None:
        self.norm1.eps = SPATIAL_EPS * stream**2
        self.conv1.scales = Scales(1.0, branch)
        self.norm2.eps = SPATIAL_EPS * branch**2
        self.conv2.scales = Scales(1.0, stream)
        if self.conv_shortcut is not None:
            self.conv_shortcut.scales = Scales(stream, stream)


class SpatialAttention(Framewise):
    """Single-head attention among the pixels of each frame, joined to its input."""

    halo = None

    def __init__(self, channels: int, config: TemporalVAEConfig):
        super().__init__()
        self.group_norm = GroupNorm(config.groups(channels), channels, eps=SPATIAL_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(Linear(channels, channels))

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        tokens = norm(self.group_norm, x).flatten(2).transpose(1, 2)  # (N, P, C)
        keys, values = self.to_k(tokens), self.to_v(tokens)
        if torch.compiler.is_exporting():  # a graph has no loop over pieces whose number varies
            queries: tuple[Tensor, ...] = (tokens,)
        else:
            at_a_time = max(LEAST_QUERIES, ATTENTION_SCORES // (len(x) * tokens.shape[1]))
            queries = tokens.split(at_a_time, 1)
        mixed = [self._attend(part, keys, values) for part in queries]
        together = torch.cat(mixed, 1) if len(mixed) > 1 else mixed[0]
        y: Tensor = together.transpose(1, 2).unflatten(2, x.shape[2:]).add_(x)
        return y

    def _attend(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (x.unsqueeze(1) for x in (self.to_q(tokens), keys, values))
        y: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return y

    def carry(self, stream: float, branch: float = 1.0) -> None:
        self.group_norm.eps = SPATIAL_EPS * stream**2
        cast(Linear, self.to_out[0]).scales = Scales(1.0, stream)


class Downsample(Framewise):
    """Halve height and width: 3x3, stride 2, padded below and on the right only, as in SD."""

    halo = (0, 1)
    scale = Fraction(1, 2)

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y

    def carry(self, stream: float, branch: float = 1.0) -> None:
        self.conv.scales = Scales(stream, stream)


class Upsample(Framewise):
    """Double height and width: each pixel four times, then 3x3."""

    halo = (1, 1)
    scale = Fraction(2)

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y

    def carry(self, stream: float, branch: float = 1.0) -> None:
        self.conv.scales = Scales(stream, stream)
