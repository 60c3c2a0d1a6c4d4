"""Layers that see one frame at a time, all its pixels.

Letters: B batch, C channels, T frames, N frames of all samples, H height, W width, P pixels of a
frame (H*W).

In the memory order of a clip, B T H W C, the frames fold into the batch, (B*T, C, H, W), as a view
that is channels-last too: no layer copies the clip to see it its own way. (Views are taken with the
channels last: otherwise torch gives an axis of size one a stride that hides the memory order from
its kernels.)
"""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temporal_vae.config import TemporalVAEConfig
from temporal_vae.network.kernels.conv import conv2d
from temporal_vae.network.kernels.norm import group_norm
from temporal_vae.network.layer import Layer, Ports
from temporal_vae.network.primitives import (
    SPATIAL_EPS,
    Conv2d,
    GroupNorm,
    Linear,
    Norm,
    Scaled,
    own_norm,
    silu,
)

# Pairs of query and key at a time: some kernels hold a number for each.
ATTENTION_SCORES = 2**26
LEAST_QUERIES = 1024


class Framewise(Layer):
    """A layer that sees one frame at a time; subclasses define `frames`."""

    cut = "frames"

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'), each of the N frames on its own."""
        raise NotImplementedError

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H', W')."""
        y = self.frames(x.movedim(1, -1).flatten(0, 1).movedim(-1, 1), norm)
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


class FirstConv(Scaled, FrameConv):
    """The convolution that the residual stream begins with."""

    ports: ClassVar[Ports] = {"": ("one", "stream")}

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        if self.scales.after != 1.0:
            x = x.clone()  # it is the caller's, not to be overwritten
        x, bias = self.scales.enter(x), self.scales.shift(self.bias)
        return conv2d(x, self.weight, bias, padding=self.padding)


class FrameNormSiLU(Framewise):
    """Group norm over each frame, then SiLU."""

    ports: ClassVar[Ports] = {"": ("stream",)}

    def __init__(self, groups: int, channels: int):
        super().__init__()
        norm = GroupNorm(groups, channels, eps=SPATIAL_EPS)
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps = groups, SPATIAL_EPS
        self.unscaled_eps = SPATIAL_EPS

    set_scales = GroupNorm.set_scales

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        if norm is own_norm:  # which would call the layer itself
            return silu(group_norm(x, self.num_groups, self.weight, self.bias, self.eps))
        return silu(norm(self, x))

    def norms(self) -> tuple[nn.Module, ...]:
        return (self,)


class ResidualBlock(Framewise):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    halo = (2, 2)
    ports: ClassVar[Ports] = {
        "norm1": ("stream",),
        "conv1": ("one", "branch"),
        "norm2": ("branch",),
        "conv2": ("one", "stream"),
        "conv_shortcut": ("stream", "stream"),
    }

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


class SpatialAttention(Framewise):
    """Single-head attention among the pixels of each frame, joined to its input."""

    halo = None
    ports: ClassVar[Ports] = {"group_norm": ("stream",), "to_out.0": ("one", "stream")}

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


class Downsample(Framewise):
    """Halve height and width: 3x3, stride 2, padded below and on the right only, as in SD."""

    halo = (0, 1)
    scale = Fraction(1, 2)
    ports: ClassVar[Ports] = {"conv": ("stream", "stream")}

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(Framewise):
    """Double height and width: each pixel four times, then 3x3."""

    halo = (1, 1)
    scale = Fraction(2)
    ports: ClassVar[Ports] = {"conv": ("stream", "stream")}

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y
