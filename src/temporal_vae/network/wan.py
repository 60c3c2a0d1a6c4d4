"""Encoder and decoder of Wan's and Qwen-Image's VAEs: lines of layers that see time and space.

Letters: B batch, C channels, T frames, H height, W width, L latent channels, f downsample factor,
r frames per latent.

    encoder  pixels  (B, C, 1 + r k, H, W)    -> moments (B, 2*L, 1 + k, H/f, W/f)
    decoder  latents (B, L, 1 + k, H/f, W/f)  -> pixels  (B, C, 1 + r k, H, W)

Sources: Wan team 2025, arXiv 2503.20314; Qwen team 2025, arXiv 2508.02324. The parameters have the
names of diffusers' `AutoencoderKLWan`, but that the 1x1x1 convolutions around the latent belong to
the encoder and the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor, nn

from temporal_vae.config import WanVAEConfig
from temporal_vae.network import float16
from temporal_vae.network.autoencoder import Chain, Line
from temporal_vae.network.framewise import Framewise
from temporal_vae.network.layer import Layer
from temporal_vae.network.spacetime import (
    CausalConv,
    CausalResidualBlock,
    DownFork,
    FrameAttention,
    IntoSpacetime,
    OverSpacetime,
    Patches,
    RMSNorm,
    RMSNormSiLU,
    SpacetimeDownsample,
    SpacetimeUpsample,
    Unpatched,
    UpFork,
)


class WanMidBlock(Chain):
    """Residual block, attention in each frame, residual block."""

    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList(CausalResidualBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def parts(self) -> Iterator[nn.Module]:
        """In order."""
        first, last = self.resnets
        yield from (first, *self.attentions, last)


class WanUpLevel(Chain):
    """The residual blocks of a level of the decoder, then the doubling unless it is the last."""

    def __init__(self, channels: int, out: int, blocks: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            CausalResidualBlock(out if index else channels, out) for index in range(blocks)
        )
        self.upsamplers = nn.ModuleList()

    def parts(self) -> Iterator[nn.Module]:
        """In order."""
        yield from (*self.resnets, *self.upsamplers)


class WanLine(Line):
    """What both lines have in common: the layers at their ends."""

    config: WanVAEConfig
    conv_in: CausalConv
    conv_out: CausalConv
    norm_out: RMSNorm

    def _ends(self) -> Iterator[Layer]:
        """The end of the residual stream."""
        yield self.as_layer("norm_out", RMSNormSiLU)
        yield self.as_layer("conv_out", OverSpacetime)

    def _patches(self, kind: type[Patches] | type[Unpatched]) -> Iterator[Framewise]:
        """The layer that lays pixels out as channels, or back, if there is one."""
        if self.config.patch_size > 1:
            yield kind(self.config.patch_size)


class WanEncoder(WanLine):
    """Pixels (B, C, 1 + r k, H, W) -> moments (B, 2*L, 1 + k, H/f, W/f): mean and log-variance."""

    def __init__(self, config: WanVAEConfig):
        super().__init__(config)
        widths, moments = config.widths, 2 * config.latent_channels
        self.conv_in = CausalConv.of(
            config.input_channels * config.patch_size**2, config.base_channels
        )
        self.down_blocks = nn.ModuleList(_down(config))
        self.mid_block = WanMidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv.of(widths[-1], moments)
        self.quant_conv = CausalConv.of(moments, moments, frames=1, side=1)

    def typical_frames(self) -> Tensor:
        """A few small frames of pixels."""
        size = float16.PROBE_CELLS * self.config.downsample_factor
        return float16.probe_frames(self.config.input_channels, size)

    def parts(self) -> Iterator[nn.Module]:
        """Layers and levels in the order of application."""
        yield from self._patches(Patches)
        yield self.as_layer("conv_in", IntoSpacetime)
        yield from (*self.down_blocks, self.mid_block, *self._ends())
        yield self.as_layer("quant_conv", OverSpacetime)


def _down(config: WanVAEConfig) -> Iterator[Layer]:
    """The levels of an encoder, finest first."""
    halved: Sequence[bool | None] = (*config.temporal_downsample, None)
    steps = pairwise((config.base_channels, *config.widths))
    for (before, width), time in zip(steps, halved, strict=True):
        if config.level_shortcuts:
            yield DownFork(before, width, config.blocks_per_level, bool(time), last=time is None)
            continue
        for index in range(config.blocks_per_level):
            yield CausalResidualBlock(width if index else before, width)
        if time is not None:
            yield SpacetimeDownsample(width, time)


class WanDecoder(WanLine):
    """Latents (B, L, 1 + k, H/f, W/f) -> pixels (B, C, 1 + r k, H, W), not clamped."""

    def __init__(self, config: WanVAEConfig):
        super().__init__(config)
        latent, widths = config.latent_channels, config.decoder_widths[::-1]
        self.post_quant_conv = CausalConv.of(latent, latent, frames=1, side=1)
        self.conv_in = CausalConv.of(latent, widths[0])
        self.mid_block = WanMidBlock(widths[0])
        self.up_blocks = nn.ModuleList(_up(config))
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv.of(widths[-1], config.input_channels * config.patch_size**2)

    def typical_frames(self) -> Tensor:
        """A few small frames of latents, as a diffusion model would hand them over, unscaled."""
        config = self.config
        frames = float16.probe_frames(config.latent_channels, float16.PROBE_CELLS)
        mean, std = (
            frames.new_tensor(values or [neutral] * config.latent_channels).view(-1, 1, 1)
            for values, neutral in ((config.latent_mean, 0.0), (config.latent_std, 1.0))
        )
        return frames * std + mean

    def parts(self) -> Iterator[nn.Module]:
        """Layers and levels in the order of application."""
        yield self.as_layer("post_quant_conv", OverSpacetime)
        yield self.as_layer("conv_in", IntoSpacetime)
        yield from (self.mid_block, *self.up_blocks, *self._ends())
        yield from self._patches(Unpatched)


def _up(config: WanVAEConfig) -> Iterator[nn.Module]:
    """The levels of a decoder, coarsest first."""
    widths, blocks = config.decoder_widths[::-1], config.blocks_per_level + 1
    doubled: Sequence[bool | None] = (*config.temporal_downsample[::-1], None)
    before = widths[0]
    for width, time in zip(widths, doubled, strict=True):
        if config.level_shortcuts and time is not None:
            yield UpFork(before, width, blocks, time)
            before = width
            continue
        level = WanUpLevel(before, width, blocks)
        if time is not None:
            level.upsamplers.append(SpacetimeUpsample(width, width // 2, time))
        yield level
        before = width // 2
