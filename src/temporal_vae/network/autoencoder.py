"""Encoder and decoder: two straight lines of framewise and timewise layers.

Letters: B batch, C channels, T frames, H height, W width, L latent channels, f downsample factor.

    encoder  pixels  (B, C, T, H, W)     -> moments (B, 2*L, T, H/f, W/f)
    decoder  latents (B, L, T, H/f, W/f) -> pixels  (B, C, T, H, W)

The spatial line is the image VAE of Latent Diffusion (Rombach et al. 2022, arXiv 2112.10752). After
each of its residual blocks stand the temporal blocks (Blattmann et al. 2023, arXiv 2304.08818 and
2311.15127), whose last convolution starts at zero: at birth the video VAE is its image VAE, frame
by frame. Parameter names follow diffusers' where it has a counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Self, cast

import torch
from torch import Tensor, nn

from temporal_vae.config import TemporalVAEConfig
from temporal_vae.network import float16
from temporal_vae.network.framewise import (
    Downsample,
    FirstConv,
    FrameConv,
    FrameNormSiLU,
    ResidualBlock,
    SpatialAttention,
    Upsample,
)
from temporal_vae.network.layer import Layer
from temporal_vae.network.timewise import TemporalAttention, TemporalBlock, TimeConv


class Line(nn.Module):
    """Layers in a row, applied to the whole clip; how else to walk them is not their business.

    In float16 the residual stream between them is scaled where it would overflow: see `float16`.
    """

    stream_scale = 1.0
    """What the residual stream is multiplied by."""
    _fitted = False

    def __init__(self, config: TemporalVAEConfig):
        super().__init__()
        self.config = config
        self.register_load_state_dict_post_hook(_fit_after_loading)  # type: ignore[no-untyped-call]

    def typical_frames(self) -> Tensor:
        """A few small frames (T, C, H, W) such as the line is made for."""
        raise NotImplementedError

    def layers(self) -> Iterator[Layer]:
        """Every layer in the order of application."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H', W')."""
        x = x.contiguous(memory_format=torch.channels_last_3d)
        for layer in self.layers():
            x = layer(x)
        return x

    def fit_scales(self) -> None:
        """Scale the residual stream to fit float16, if the weights are float16, else not.

        Conversion and `load_state_dict` see to it. Who writes into float16 weights in another way
        calls it afterwards.
        """
        weight = next(self.parameters())
        self._fitted = weight.dtype == torch.float16 and not weight.is_meta
        if self._fitted:
            frames = self.typical_frames().to(weight.device)
            self.stream_scale = float16.fit_scales(self.layers(), frames)
        else:
            self.stream_scale = float16.reset_scales(self.layers())

    def ready(self) -> Self:
        """Fit the scales if the weights became float16, or left it, through another owner."""
        if (next(self.parameters()).dtype == torch.float16) != self._fitted:
            self.fit_scales()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = next(self.parameters()).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if next(self.parameters()).dtype != before:
            self.fit_scales()
        return self

    @property
    def reach(self) -> tuple[int, int] | None:
        """Frames (back, ahead) that an output depends on; None when it is the whole clip."""
        past, future = 0, 0
        for layer in self.layers():
            if layer.past is None or layer.future is None:
                return None
            past, future = past + layer.past, future + layer.future
        return past, future


def _fit_after_loading(line: nn.Module, keys: object) -> None:
    cast(Line, line).fit_scales()


def in_order(*parts: nn.Module | None) -> Iterator[Layer]:
    """The layers in some parts of a line, in the order of application."""
    for part in parts:
        if isinstance(part, Layer):
            yield part
        elif isinstance(part, nn.ModuleList):
            yield from in_order(*part)
        elif isinstance(part, (Level, MidBlock)):
            yield from part.layers()


def temporal_blocks(channels: int, count: int, config: TemporalVAEConfig) -> nn.ModuleList:
    """The temporal blocks that follow one spatial block."""
    return nn.ModuleList(TemporalBlock(channels, config) for _ in range(count))


class Level(nn.Module):
    """The blocks at one resolution, then a change of resolution unless it is the last level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        temporal: int,
        config: TemporalVAEConfig,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.resnets = nn.ModuleList(
            ResidualBlock(before, after, config) for before, after in pairwise(widths)
        )
        self.temporals = nn.ModuleList(
            temporal_blocks(out_channels, temporal, config) for _ in range(blocks)
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def layers(self) -> Iterator[Layer]:
        """Every layer in the order of application."""
        for resnet, temporals in zip(self.resnets, self.temporals, strict=True):
            yield from in_order(resnet, temporals)
        yield from in_order(self.downsamplers, self.upsamplers)


class MidBlock(nn.Module):
    """Residual block, attention in space, attention in time, residual block."""

    def __init__(self, channels: int, temporal: int, config: TemporalVAEConfig):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, config) for _ in range(2))
        self.temporals = nn.ModuleList(
            temporal_blocks(channels, temporal, config) for _ in range(2)
        )
        self.attentions = nn.ModuleList([SpatialAttention(channels, config)])
        self.temporal_attentions = nn.ModuleList()
        if temporal and config.temporal_attention_reach:
            self.temporal_attentions.append(TemporalAttention(channels, config))

    def layers(self) -> Iterator[Layer]:
        """Every layer in the order of application."""
        first, last = zip(self.resnets, self.temporals, strict=True)
        return in_order(*first, self.attentions, self.temporal_attentions, *last)


class Encoder(Line):
    """Pixels (B, C, T, H, W) -> moments (B, 2*L, T, H/f, W/f): mean and log-variance."""

    def __init__(self, config: TemporalVAEConfig):
        super().__init__(config)
        widths, moments = config.widths, 2 * config.latent_channels
        temporal = config.num_temporal_layers if config.temporal_encoder else 0
        self.conv_in = FirstConv(config.input_channels, widths[0], 3)
        self.down_blocks = nn.ModuleList()
        for before, width in pairwise((widths[0], *widths)):
            level = Level(before, width, config.blocks_per_level, temporal, config)
            self.down_blocks.append(level)
            if len(self.down_blocks) < len(widths):
                level.downsamplers.append(Downsample(width))
        self.mid_block = MidBlock(widths[-1], temporal, config)
        self.conv_norm_out = FrameNormSiLU(config.groups(widths[-1]), widths[-1])
        self.conv_out = FrameConv(widths[-1], moments, 3)
        self.quant_conv = FrameConv(moments, moments, 1) if config.quant_conv else None

    def typical_frames(self) -> Tensor:
        """A few small frames of pixels."""
        size = float16.PROBE_CELLS * self.config.downsample_factor
        return float16.probe_frames(self.config.input_channels, size)

    def layers(self) -> Iterator[Layer]:
        """Every layer in the order of application."""
        return in_order(
            self.conv_in, self.down_blocks, self.mid_block, self.conv_norm_out, self.conv_out,
            self.quant_conv,
        )  # fmt: skip


class Decoder(Line):
    """Latents (B, L, T, H/f, W/f) -> pixels (B, C, T, H, W), not clamped."""

    def __init__(self, config: TemporalVAEConfig):
        super().__init__(config)
        latent, pixel = config.latent_channels, config.input_channels
        widths, temporal = config.widths[::-1], config.num_temporal_layers
        self.post_quant_conv = FrameConv(latent, latent, 1) if config.post_quant_conv else None
        self.conv_in = FirstConv(latent, widths[0], 3)
        self.mid_block = MidBlock(widths[0], temporal, config)
        self.up_blocks = nn.ModuleList()
        for before, width in pairwise((widths[0], *widths)):
            level = Level(before, width, config.blocks_per_level + 1, temporal, config)
            self.up_blocks.append(level)
            if len(self.up_blocks) < len(widths):
                level.upsamplers.append(Upsample(width))
        self.conv_norm_out = FrameNormSiLU(config.groups(widths[-1]), widths[-1])
        self.conv_out = FrameConv(widths[-1], pixel, 3)
        kernel, causal = config.temporal_kernel_size, config.causal_mode
        self.time_conv_out = TimeConv(pixel, kernel, causal) if config.time_conv_out else None

    def typical_frames(self) -> Tensor:
        """A few small frames of latents, as a diffusion model would hand them over, unscaled."""
        frames = float16.probe_frames(self.config.latent_channels, float16.PROBE_CELLS)
        return frames / self.config.latent_scale_factor + self.config.latent_shift_factor

    def layers(self) -> Iterator[Layer]:
        """Every layer in the order of application."""
        return in_order(
            self.post_quant_conv, self.conv_in, self.mid_block, self.up_blocks, self.conv_norm_out,
            self.conv_out, self.time_conv_out,
        )  # fmt: skip
