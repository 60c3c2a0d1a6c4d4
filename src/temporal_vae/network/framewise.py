"""Layers that see one frame at a time, all its pixels.

Letters: B batch, C channels, T frames, N frames of all samples, H height, W width, P pixels of a
frame (H*W).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temporal_vae.config import TemporalVAEConfig
from temporal_vae.network.folds import fold_frames, unfold_frames
from temporal_vae.network.kernels.attention import attention
from temporal_vae.network.layer import Layer, Ports, Shape
from temporal_vae.network.primitives import (
    SPATIAL_EPS,
    Conv2d,
    GroupNorm,
    Linear,
    Norm,
    activate,
    bare,
    join,
    larger,
    own_norm,
    unseen,
)

# Pairs of query and key at a time: some kernels hold a number for each.
ATTENTION_SCORES = 2**26
LEAST_QUERIES = 1024


def queries(tokens: Tensor, frames: int, dim: int) -> Sequence[Tensor]:
    """The pixels of frames, along a dimension, in parts that attend to all of them one by one."""
    if torch.compiler.is_exporting():  # a graph has no loop over pieces whose number varies
        return (tokens,)
    at_a_time = max(LEAST_QUERIES, ATTENTION_SCORES // (frames * tokens.shape[dim]))
    parts: tuple[Tensor, ...] = tokens.split(at_a_time, dim)
    return parts


class Framewise(Layer):
    """A layer that sees one frame at a time; subclasses define `frames`."""

    cut = "frames"

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'), each of the N frames on its own."""
        raise NotImplementedError

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H', W')."""
        return unfold_frames(self.frames(fold_frames(x), norm), x.shape[0])


class OnFrames(Framewise):
    """A convolution of each frame, size kept, as a layer of its own."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv
        padding = cast(Any, bare(conv)).padding[0]
        self.halo = (padding, padding)

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        y: Tensor = self.conv(x)
        return y

    def channels(self, channels: int) -> int:
        return cast(nn.Conv2d, bare(self.conv)).out_channels


class IntoStream(OnFrames):
    """The convolution that the residual stream begins with."""

    ports: ClassVar[Ports] = {"conv": ("one", "stream")}


class NormSiLU(Framewise):
    """Group norm over each frame, then SiLU: the end of the residual stream."""

    ends_stream = True
    ports: ClassVar[Ports] = {"norm": ("stream",)}

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        return activate(norm, self.norm, x)

    def norms(self) -> tuple[nn.Module, ...]:
        return (self.norm,)


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
        h = self.conv1(activate(norm, self.norm1, x))
        # a line of its own frees what it replaces
        h = activate(norm, self.norm2, h, spent=unseen(self.conv1))
        y: Tensor = self.conv2(h)
        return join(y, x if self.conv_shortcut is None else self.conv_shortcut(x), self.conv2)

    def norms(self) -> tuple[nn.Module, ...]:
        return (self.norm1, self.norm2)

    def channels(self, channels: int) -> int:
        return cast(nn.Conv2d, bare(self.conv2)).out_channels


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
        mixed = [self._attend(part, keys, values) for part in queries(tokens, x.shape[0], 1)]
        together = torch.cat(mixed, 1) if len(mixed) > 1 else mixed[0]
        y: Tensor = together.transpose(1, 2).unflatten(2, x.shape[2:])
        return join(y, x, self.to_out, self.to_out[0])

    def operations(self, shape: Shape) -> int:
        b, c, t, h, w = shape
        return super().operations(shape) + 2 * b * t * c * (h * w) ** 2

    def _attend(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (x.unsqueeze(1) for x in (self.to_q(tokens), keys, values))
        y: Tensor = self.to_out(attention(q, k, v).squeeze(1))
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
        return larger(x, self.conv)
