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

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temporal_vae.config import NormScope, TemporalVAEConfig
from temporal_vae.kernels.norm import group_norm

SPATIAL_EPS = 1e-6
TEMPORAL_EPS = 1e-5

# Scaled dot-product attention on CUDA refuses a batch above 65,535.
ATTENTION_BATCH = 32_768
# Queries per block of temporal attention: the band of keys stays short for any clip.
QUERY_FRAMES = 64


def silu(x: Tensor) -> Tensor:
    """SiLU, overwriting `x` where no gradient needs it: saves a pass and an activation."""
    y: Tensor = F.silu(x, inplace=not x.requires_grad)
    return y


class GroupNorm(nn.GroupNorm):
    """Group norm over all that a sample holds: a frame (N, C, H, W), or a clip (B, C, T, P)."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


# ---------------------------------------------------------------------------------------------
# Framewise


class Framewise(nn.Module):
    """A layer that sees one frame at a time, all its pixels; subclasses define `frames`."""

    past: int | None = 0
    future: int | None = 0

    def frames(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'), each of the N frames on its own."""
        raise NotImplementedError

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

    def frames(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class FrameNormSiLU(Framewise):
    """Group norm over each frame, then SiLU."""

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def frames(self, x: Tensor) -> Tensor:
        return silu(group_norm(x, self.groups, self.weight, self.bias, SPATIAL_EPS))


class ResidualBlock(Framewise):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, config: TemporalVAEConfig):
        super().__init__()
        self.norm1 = GroupNorm(config.groups(in_channels), in_channels, eps=SPATIAL_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(config.groups(out_channels), out_channels, eps=SPATIAL_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def frames(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        y: Tensor = h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))
        return y


class SpatialAttention(Framewise):
    """Single-head attention among the pixels of each frame, joined to its input."""

    def __init__(self, channels: int, config: TemporalVAEConfig):
        super().__init__()
        self.group_norm = GroupNorm(config.groups(channels), channels, eps=SPATIAL_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def frames(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, P, C)
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        y: Tensor = mixed.transpose(1, 2).unflatten(2, x.shape[2:]).add_(x)
        return y


class Downsample(Framewise):
    """Halve height and width: 3x3, stride 2, padded below and on the right only, as in SD."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def frames(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(Framewise):
    """Double height and width: each pixel four times, then 3x3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def frames(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


# ---------------------------------------------------------------------------------------------
# Timewise


class Timewise(nn.Module):
    """A layer that sees one pixel over time; subclasses define `pixels` and how far they see."""

    past: int | None
    future: int | None

    def pixels(self, x: Tensor) -> Tensor:
        """(B, C, T, P) -> (B, C', T, P), each of the P pixels on its own."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W)."""
        y = self.pixels(x.movedim(1, -1).flatten(2, 3).movedim(-1, 1))
        y = y.contiguous(memory_format=torch.channels_last).movedim(1, -1)
        clip: Tensor = y.unflatten(2, x.shape[3:]).movedim(-1, 1)
        return clip


class TimeConv(Timewise):
    """A (k, 1, 1) convolution; zeros stand before the clip and, unless causal, after it.

    The weight keeps the five dimensions it has in checkpoints.
    """

    past: int
    future: int

    def __init__(self, channels: int, kernel: int, causal: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel, 1, 1))
        self.bias = nn.Parameter(torch.empty(channels))
        self.past = kernel - 1 if causal else kernel // 2
        self.future = kernel - 1 - self.past

    def pixels(self, x: Tensor) -> Tensor:
        return self.scaled(x, None)

    def scaled(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """The convolution times `gain`, which costs nothing: it goes into the weights."""
        weight: Tensor = self.weight.squeeze(-1)
        bias: Tensor = self.bias
        if gain is not None:
            weight, bias = weight * gain, bias * gain
        if self.past == self.future:
            return F.conv2d(x, weight, bias, padding=(self.past, 0))
        return F.conv2d(F.pad(x, (0, 0, self.past, self.future)), weight, bias)


class PositionNorm(nn.Module):
    """Layer norm over the channels of one pixel of one frame; x (B, C, T, P)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        positions = x.movedim(1, -1)
        y = F.layer_norm(positions, self.weight.shape, self.weight, self.bias, TEMPORAL_EPS)
        return y.movedim(-1, 1)


def time_norm(scope: NormScope, channels: int, config: TemporalVAEConfig) -> nn.Module:
    """The norm of a timewise block: over one position, or in groups over the clip (SVD)."""
    if scope == "position":
        return PositionNorm(channels)
    return GroupNorm(config.groups(channels), channels, eps=TEMPORAL_EPS)


class TemporalBlock(Timewise):
    """x + sigmoid(mix) * conv(silu(norm(conv(silu(norm(x)))))) over time.

    SVD's blend (1 - a) * s + a * (s + f(s)) is the same thing written longer.
    """

    def __init__(self, channels: int, config: TemporalVAEConfig):
        super().__init__()
        kernel, causal = config.temporal_kernel_size, config.causal_mode
        self.norm1 = time_norm(config.temporal_norm, channels, config)
        self.conv1 = TimeConv(channels, kernel, causal)
        self.norm2 = time_norm(config.temporal_norm, channels, config)
        self.conv2 = TimeConv(channels, kernel, causal)
        self.mix_factor = nn.Parameter(torch.zeros(1))
        if config.temporal_norm == "clip":
            self.past = self.future = None
        else:
            self.past, self.future = 2 * self.conv1.past, 2 * self.conv1.future

    def pixels(self, x: Tensor) -> Tensor:
        h = self.conv1.pixels(silu(self.norm1(x)))
        h = self.conv2.scaled(silu(self.norm2(h)), torch.sigmoid(self.mix_factor))
        return h.add_(x)


class TemporalAttention(Timewise):
    """Multi-head attention among the frames of each pixel, joined to its input.

    A frame sees `reach` frames back, and as many ahead unless causal, by content and by a learned
    bias for each distance: positions are relative, so a clip may have any length.
    """

    past: int
    future: int

    def __init__(self, channels: int, config: TemporalVAEConfig):
        super().__init__()
        reach = config.temporal_attention_reach
        self.heads = max(h for h in range(1, max(1, channels // 64) + 1) if channels % h == 0)
        self.past, self.future = reach, 0 if config.causal_mode else reach
        self.norm = PositionNorm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels, bias=False)  # softmax would cancel a bias
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        self.distance_bias = nn.Parameter(torch.zeros(self.heads, self.past + self.future + 1))

    def pixels(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).permute(0, 3, 2, 1)  # (B, P, T, C)
        parts = tokens.flatten(0, 1).split(max(1, ATTENTION_BATCH // self.heads))
        mixed = torch.cat([self._attend(part) for part in parts])
        # heads want frames together, the clip wants pixels together: the one copy, at 1/8 the size
        y: Tensor = mixed.unflatten(0, tokens.shape[:2]).transpose(1, 2).contiguous()
        return y.movedim(-1, 1).add_(x)

    def _attend(self, tokens: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C), in blocks of queries against the band of keys they can see."""
        q, k, v = (
            to(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, heads, T, C / heads)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        length = tokens.shape[1]
        out = []
        for start in range(0, length, QUERY_FRAMES):
            stop = min(start + QUERY_FRAMES, length)
            band = slice(max(0, start - self.past), min(length, stop + self.future))
            bias = self._bias(start, stop, band)
            out.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:stop], k[:, :, band], v[:, :, band], attn_mask=bias
                )
            )
        y: Tensor = self.to_out(torch.cat(out, 2).transpose(1, 2).flatten(2))
        return y

    def _bias(self, start: int, stop: int, band: slice) -> Tensor:
        """(1, heads, queries, keys): the learned bias of each distance, -inf out of reach."""
        device = self.distance_bias.device
        queries = torch.arange(start, stop, device=device)[:, None]
        keys = torch.arange(band.start, band.stop, device=device)[None, :]
        index = keys - queries + self.past
        hidden = (index < 0) | (index > self.past + self.future)
        bias = self.distance_bias[:, index.clamp(0, self.past + self.future)]
        return bias.masked_fill(hidden, -math.inf).unsqueeze(0)


# ---------------------------------------------------------------------------------------------
# Birth


def draw_parameters(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter below `module` its value at birth, drawing from `generator` alone.

    Weights are uniform within 1 / sqrt(fan in), norms start as the identity, and the last layer of
    every temporal branch at zero, so that a new video VAE is an image VAE, frame by frame.
    """
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, FrameConv, TimeConv)):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                layer.weight.uniform_(-bound, bound, generator=generator)
                if layer.bias is not None:
                    layer.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(layer, (GroupNorm, FrameNormSiLU, PositionNorm)):
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in module.modules():
            if isinstance(layer, TemporalBlock):
                nn.init.zeros_(layer.mix_factor)
                _zero(layer.conv2)
            elif isinstance(layer, TemporalAttention):
                nn.init.zeros_(layer.distance_bias)
                _zero(layer.to_out[0])


def start_as_identity(conv: TimeConv) -> None:
    """Make a temporal convolution pass its input on unchanged."""
    with torch.no_grad():
        _zero(conv)
        for channel in range(conv.weight.shape[0]):
            conv.weight[channel, channel, conv.past] = 1.0


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
