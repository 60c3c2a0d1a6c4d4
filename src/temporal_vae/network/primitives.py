"""What layers of every kind are made of: norms, and convolutions and linear layers with scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temporal_vae.config import NormScope, TemporalVAEConfig
from temporal_vae.network.folds import fold_pixels, joined, unfold_pixels, zero_frames
from temporal_vae.network.kernels import blocks, doubled, fused, three_taps, work
from temporal_vae.network.kernels.conv import conv2d
from temporal_vae.network.kernels.doubled import doubled_conv2d
from temporal_vae.network.kernels.norm import group_norm
from temporal_vae.network.kernels.plain import values_only

SPATIAL_EPS = 1e-6
TEMPORAL_EPS = 1e-5


def bare(module: nn.Module) -> nn.Module:
    """The part inside of what was wrapped around it, such as an adapter of PEFT."""
    inner = getattr(module, "get_base_layer", None)
    return module if inner is None else cast(nn.Module, inner())


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of its own are called with the module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's `forward`: hooks, or another one."""
    return has_hooks(module) or "forward" in module.__dict__


def watched(module: nn.Module) -> bool:
    """Whether a call is more than the module's `forward`: hooked, compiled, or hooks on all."""
    every = nn.modules.module._has_any_global_hook()
    return hooked(module) or bool(module._compiled_call_impl) or every


def unseen(module: nn.Module) -> bool:
    """Whether only the caller ever sees what a part gets and gives: ours, and without hooks.

    A part may be wrapped or replaced (adapters, quantised layers), and hooks may keep a tensor.
    """
    if watched(module):
        return False
    if isinstance(module, nn.Sequential):
        return len(module) > 0 and all(map(unseen, module))
    return isinstance(module, Leaf)


def activate(norm: Norm, module: nn.Module, x: Tensor, spent: bool = False) -> Tensor:
    """SiLU of a norm's result, with it or over it where nobody can see: saves a pass.

    `spent`: nobody reads x again, and the result may lie over it.
    """
    if norm is own_norm and isinstance(module, ActivatedNorm) and unseen(module):
        return module.activated(x, spent)
    y = norm(module, x)
    return F.silu(y, inplace=values_only(y) and unseen(module))


def join(y: Tensor, x: Tensor, *modules: nn.Module) -> Tensor:
    """y + x for a y that came out of modules, over it where nobody can see."""
    return y.add_(x) if values_only(y, x) and all(map(unseen, modules)) else y + x


class Scales(NamedTuple):
    """By what the input of a linear layer is multiplied, and by what its result is to be.

    Powers of two, other than 1 only where float16 would overflow; `float16` finds them. Norms undo
    them: one that reads x * s gives what it gives for x, if its eps is multiplied by s * s.
    """

    before: float = 1.0
    after: float = 1.0

    def enter(self, x: Tensor, module: nn.Module | None) -> Tensor:
        """What to apply a module's weight to: x, overwritten where nobody can see; never for None.

        The weight itself stays as it is: small ones would lose digits, or vanish.
        """
        gain = self.after / self.before
        if gain == 1.0:
            return x
        own = module is not None and values_only(x) and unseen(module)
        return x.mul_(gain) if own else x * gain

    def shift(self, bias: Tensor | None) -> Tensor | None:
        """What to add."""
        return bias if bias is None or self.after == 1.0 else bias * self.after


class Leaf(nn.Module):
    """What layers are made of: a module that nobody but the library derives from."""


class ActivatedNorm(Leaf):
    """A norm that may compute SiLU of its result in the same pass."""

    def activated(self, x: Tensor, spent: bool = False) -> Tensor:
        """SiLU of the norm, which may lie over x if that is `spent`; here in a pass of its own."""
        y = self(x)
        return F.silu(y, inplace=values_only(y))


class GroupNorm(ActivatedNorm, nn.GroupNorm):
    """Group norm over all that a sample holds: a frame (N, C, H, W), or a clip (B, C, T, H, W)."""

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__(groups, channels, eps)
        self.unscaled_eps = eps

    def set_scales(self, before: float) -> None:
        """Give for an input multiplied by `before` what it gave for the input itself."""
        self.eps = self.unscaled_eps * before**2

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def activated(self, x: Tensor, spent: bool = False) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, True, spent)


class Scaled(Leaf):
    """A linear layer between scales."""

    scales = Scales()

    def set_scales(self, before: float, after: float) -> None:
        """Take an input multiplied by `before`, and give a result multiplied by `after`."""
        self.scales = Scales(before, after)


class Conv2d(Scaled, nn.Conv2d):
    """torch's convolution between scales, by our kernel where that is the more exact one."""

    bias: Tensor
    """None only in those that adapters make."""

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.scales.enter(x, self), self.scales.shift(self.bias)
        y = conv2d(x, self.weight, bias, int(self.stride[0]), int(self.padding[0]))
        work.count(y, self.weight.numel() // len(self.weight))
        return y

    def of_repeated(self, x: Tensor) -> Tensor:
        """The convolution, 3x3 and padded, of x with every pixel four times."""
        x, bias = self.scales.enter(x, None), self.scales.shift(self.bias)
        y = doubled_conv2d(x, self.weight, bias)
        work.count(y, self.weight.numel() // len(self.weight))
        return y


def larger(x: Tensor, conv: nn.Module) -> Tensor:
    """A convolution of x with every pixel four times, which are laid out only where it is seen."""
    if isinstance(conv, Conv2d) and unseen(conv) and doubled.pays(x, conv.weight, conv.bias):
        return conv.of_repeated(x)
    y: Tensor = conv(doubled.repeated(x))
    return y


class FirstConv(Conv2d):
    """The convolution that a line begins with: its input is the caller's, not to be overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clone() if self.scales.after != 1.0 else x)


class TimeConv(Scaled, nn.Conv3d):
    """A (k, 1, 1) convolution of n + k - 1 frames to n: who calls it gives the frames before and
    after the clip, zeros or remembered ones, with it or by name."""

    bias: Tensor
    past = future = 0
    """Frames before and after an output's own that it reads."""

    @classmethod
    def of(cls, channels: int, kernel: int, causal: bool) -> Self:
        """One that keeps the channels. (Adapters make others, by the arguments of torch's.)"""
        conv = cls(channels, channels, (kernel, 1, 1))
        conv.past = kernel - 1 if causal else kernel // 2
        conv.future = kernel - 1 - conv.past
        return conv

    def forward(
        self, x: Tensor, zeros: int = 0, behind: int = 0, tail: Tensor | None = None
    ) -> Tensor:
        """(B, C, n, H, W) after so many frames of zeros and a tail, and before zeros `behind`.

        Give these by name: hooks that are called before may replace x alone.
        """
        u, bias = self.scales.enter(x, self), self.scales.shift(self.bias)
        parts = [u] if tail is None else [self.scales.enter(tail, None).to(u.dtype), u]
        if self.kernel_size[0] == 3 and three_taps.serves(u, self.weight, bias):
            y = three_taps.over_time(parts, zeros, behind, self.weight, bias)
        else:
            if tail is not None or zeros != behind:  # a copy; torch pads both sides alike without
                parts = [zero_frames(u, zeros), *parts, zero_frames(u, behind)]
                u, zeros = joined(*parts), 0
            y = F.conv2d(fold_pixels(u), self.weight.squeeze(-1), bias, padding=(zeros, 0))
            y = unfold_pixels(y, x.shape[3:])
        work.count(y, self.weight.numel() // len(self.weight))
        return y


class Linear(Scaled, nn.Linear):
    """torch's linear layer between scales."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.scales.enter(x, None)  # a hook on what is around the layer may hold it
        return F.linear(x, self.weight, self.scales.shift(self.bias))


Norm = Callable[[nn.Module, Tensor], Tensor]
"""How a layer applies its norms: `norm(module, x)`. A walk that gives a layer less than what a norm
sums over hands in its own, which knows the sums of the whole."""


def own_norm(module: nn.Module, x: Tensor) -> Tensor:
    """The norm of what is given, nothing else."""
    y: Tensor = module(x)
    return y


class ChannelNorm(ActivatedNorm):
    """A norm over the channels of one position, by our kernel where it serves."""

    def forward(self, x: Tensor) -> Tensor:
        return self._fused(x, blocks.empty_like(x), False) if self._serves(x) else self._plain(x)

    def activated(self, x: Tensor, spent: bool = False) -> Tensor:
        if not self._serves(x):
            return super().activated(x)
        return self._fused(x, x if spent else blocks.empty_like(x), True)

    def _serves(self, x: Tensor) -> bool:
        raise NotImplementedError

    def _fused(self, x: Tensor, y: Tensor, silu: bool) -> Tensor:
        """The kernel's result, put into y."""
        raise NotImplementedError

    def _plain(self, x: Tensor) -> Tensor:
        """The same by torch, without SiLU."""
        raise NotImplementedError


class PositionNorm(ChannelNorm):
    """Layer norm over the channels of one pixel of one frame; x (B, C, ...)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = self.unscaled_eps = TEMPORAL_EPS

    set_scales = GroupNorm.set_scales

    def _serves(self, x: Tensor) -> bool:
        return self.bias is not None and fused.serves(x, self.weight, self.bias)

    def _plain(self, x: Tensor) -> Tensor:
        positions = x.movedim(1, -1)
        y = F.layer_norm(positions, self.weight.shape, self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)

    def _fused(self, x: Tensor, y: Tensor, silu: bool) -> Tensor:
        fused.by_position(x, y, self.weight.float(), self.bias.float(), self.eps, silu)
        return y


def time_norm(scope: NormScope, channels: int, config: TemporalVAEConfig) -> nn.Module:
    """The norm of a timewise block: over one position, or in groups over the clip (SVD)."""
    if scope == "position":
        return PositionNorm(channels)
    return GroupNorm(config.groups(channels), channels, eps=TEMPORAL_EPS)
