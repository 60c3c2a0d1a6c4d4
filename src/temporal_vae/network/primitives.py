"""What layers of every kind are made of: norms, and convolutions and linear layers with scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temporal_vae.config import NormScope, TemporalVAEConfig
from temporal_vae.network.kernels.conv import conv2d
from temporal_vae.network.kernels.norm import group_norm

SPATIAL_EPS = 1e-6
TEMPORAL_EPS = 1e-5


def silu(x: Tensor) -> Tensor:
    """SiLU, overwriting `x` where no gradient needs it: saves a pass and an activation."""
    y: Tensor = F.silu(x, inplace=not x.requires_grad)
    return y


class Scales(NamedTuple):
    """By what the input of a linear layer is multiplied, and by what its result is to be.

    Powers of two, other than 1 only where float16 would overflow; `float16` finds them. Norms undo
    them: one that reads x * s gives what it gives for x, if its eps is multiplied by s * s.
    """

    before: float = 1.0
    after: float = 1.0

    def enter(self, x: Tensor) -> Tensor:
        """What to apply the weight to: x, overwritten where no gradient needs it.

        The weight itself stays as it is: small ones would lose digits, or vanish.
        """
        gain = self.after / self.before
        if gain == 1.0:
            return x
        return x * gain if x.requires_grad else x.mul_(gain)

    def shift(self, bias: Tensor) -> Tensor:
        """What to add."""
        return bias if self.after == 1.0 else bias * self.after


class GroupNorm(nn.GroupNorm):
    """Group norm over all that a sample holds: a frame (N, C, H, W), or a clip (B, C, T, P)."""

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__(groups, channels, eps)
        self.unscaled_eps = eps

    def set_scales(self, before: float) -> None:
        """Give for an input multiplied by `before` what it gave for the input itself."""
        self.eps = self.unscaled_eps * before**2

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Scaled:
    """A linear layer between scales."""

    scales = Scales()

    def set_scales(self, before: float, after: float) -> None:
        """Take an input multiplied by `before`, and give a result multiplied by `after`."""
        self.scales = Scales(before, after)


class Conv2d(Scaled, nn.Conv2d):
    """torch's convolution between scales, by our kernel where that is the more exact one."""

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.scales.enter(x), self.scales.shift(cast(Tensor, self.bias))
        return conv2d(x, self.weight, bias, int(self.stride[0]), int(self.padding[0]))


class Linear(Scaled, nn.Linear):
    """torch's linear layer between scales."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.scales.enter(x), self.weight, self.scales.shift(self.bias))


Norm = Callable[[nn.Module, Tensor], Tensor]
"""How a layer applies its norms: `norm(module, x)`. A walk that gives a layer less than what a norm
sums over hands in its own, which knows the sums of the whole."""


def own_norm(module: nn.Module, x: Tensor) -> Tensor:
    """The norm of what is given, nothing else."""
    y: Tensor = module(x)
    return y


class PositionNorm(nn.Module):
    """Layer norm over the channels of one pixel of one frame; x (B, C, T, P)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = self.unscaled_eps = TEMPORAL_EPS

    set_scales = GroupNorm.set_scales

    def forward(self, x: Tensor) -> Tensor:
        positions = x.movedim(1, -1)
        y = F.layer_norm(positions, self.weight.shape, self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)


def time_norm(scope: NormScope, channels: int, config: TemporalVAEConfig) -> nn.Module:
    """The norm of a timewise block: over one position, or in groups over the clip (SVD)."""
    if scope == "position":
        return PositionNorm(channels)
    return GroupNorm(config.groups(channels), channels, eps=TEMPORAL_EPS)
