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
from functools import partial
from itertools import pairwise
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from temporal_vae.config import TemporalVAEConfig, VAEConfig
from temporal_vae.network import float16
from temporal_vae.network.folds import channels_last
from temporal_vae.network.framewise import (
    Downsample,
    IntoStream,
    NormSiLU,
    OnFrames,
    ResidualBlock,
    SpatialAttention,
    Upsample,
)
from temporal_vae.network.kernels.dtypes import warn_if_slow
from temporal_vae.network.layer import Layer, frames_back
from temporal_vae.network.primitives import (
    SPATIAL_EPS,
    Conv2d,
    FirstConv,
    GroupNorm,
    Leaf,
    Scaled,
    TimeConv,
    has_hooks,
    hooked,
    watched,
)
from temporal_vae.network.timewise import OverTime, TemporalAttention, TemporalBlock


class Chain(nn.Module):
    """Modules in a row: layers, and chains of them."""

    gradient_checkpointing = False
    """Whether a layer is computed again for the gradients, so that nothing inside of it is kept."""
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))

    def parts(self) -> Iterator[nn.Module]:
        """Layers and chains in the order of application, each as a person can name it."""
        raise NotImplementedError

    def layers(self) -> Iterator[Layer]:
        """Every layer in the order of application.

        Raises `TypeError` for a module that is none, and does not wrap one.
        """
        for part in self.parts():
            inner = unwrapped(part)
            if isinstance(inner, Chain):
                yield from inner.layers()
            elif isinstance(inner, Layer):
                yield inner
            elif not isinstance(inner, nn.Identity):
                raise TypeError(
                    f"a {type(inner).__name__} in {type(self).__name__} is no layer: such a model "
                    "is walked whole, in float32, bfloat16 or float64, without plan, budget or "
                    "stream; a class derived from network.layer.Layer can do all"
                )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W'), through every part, whose hooks are called."""
        x = channels_last(x)  # here, where nothing else holds the copy
        for part in self._called():
            if self.gradient_checkpointing and torch.is_grad_enabled() and self._is_layer(part):
                x = self._gradient_checkpointing_func(part, x)
            else:
                x = part(x)
        return x

    @staticmethod
    def _is_layer(part: nn.Module) -> bool:
        return isinstance(unwrapped(part), Layer)

    def _called(self) -> Iterator[nn.Module]:
        """The parts, and in place of a chain that nobody watches its own: a call would keep its
        input to the end."""
        for part in self.parts():
            if isinstance(part, Chain) and not watched(part):
                yield from part._called()
            else:
                yield part


class Line(Chain):
    """A chain that is an encoder or a decoder; how else to walk it is not its business.

    In float16 the residual stream between layers is scaled where it would overflow: see `float16`.
    """

    stream_scale = 1.0
    """What the residual stream is multiplied by."""
    _fitted = False

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self._around: dict[str, Layer] = {}
        self.register_load_state_dict_post_hook(_fit_after_loading)  # type: ignore[no-untyped-call]

    def typical_frames(self) -> Tensor:
        """A few small frames (T, C, H, W) such as the line is made for."""
        raise NotImplementedError

    def as_layer(self, name: str, kind: Callable[[nn.Module], Layer]) -> Layer:
        """The layer around a part that has its place, and its hooks, in the line itself."""
        part, found = self.get_submodule(name), self._around.get(name)
        if found is None or next(found.children()) is not part:  # an adapter may have replaced it
            found = self._around[name] = kind(part)
        return found

    def fit_scales(self) -> None:
        """Scale the residual stream to fit float16, if the weights are float16, else not.

        Conversion and `load_state_dict` see to it. Who writes into float16 weights in another way
        calls it afterwards.
        """
        weight = next(self.parameters())
        if weight.dtype == torch.float16 and not weight.is_meta:
            frames = self.typical_frames().to(weight.device)
            self._fitted = False  # until all layers have taken theirs
            self.stream_scale = float16.fit_scales(self.layers(), frames)
            self._fitted = True
        elif self._fitted:
            self.stream_scale, self._fitted = float16.reset_scales(self.layers()), False

    def ready(self) -> Self:
        """Fit the scales if the weights became float16, or left it, through another owner."""
        weight = next(self.parameters())
        if not torch.compiler.is_compiling():
            warn_if_slow(weight.dtype, weight.device)
        if (weight.dtype == torch.float16) != self._fitted:
            self.fit_scales()
        if self.stream_scale != 1.0:
            for layer in self.layers():
                layer.refuse_wrapped()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = next(self.parameters()).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if next(self.parameters()).dtype != before:
            self.fit_scales()
        return self

    def hooked(self) -> str | None:
        """The name of a module with hooks that only the whole walk calls; None if none has."""
        for name, module in self.named_modules():
            inner = unwrapped(module)
            norm = isinstance(module, Leaf) and not isinstance(module, Scaled)
            if inner is module:
                more = hooked(module)
            else:  # wrappers of torch compute what is in them
                more = has_hooks(module) or not type(module).__module__.startswith("torch.")
            if (isinstance(inner, (Chain, Layer)) or norm) and more:
                return name or type(self).__name__
        return None

    def strange_norm(self) -> str | None:
        """The class of a norm over more than a piece whose formula is not group norm's, or None."""
        known = (GroupNorm.forward, nn.GroupNorm.forward)
        for layer in self.layers():
            for norm in layer.norms():
                if type(norm).forward not in known or getattr(norm, "weight", None) is None:
                    return type(norm).__name__
        return None

    @property
    def streams(self) -> bool:
        """Whether a clip may come in pieces: no layer depends on all of it."""
        return all(layer.past is not None and layer.future is not None for layer in self.layers())

    @property
    def reach(self) -> tuple[int, int] | None:
        """Frames (back, ahead) that an output depends on; None when it is the whole clip."""
        layers = list(self.layers())
        if not self.streams:
            return None
        return frames_back(layers), sum(layer.future or 0 for layer in layers)


def _fit_after_loading(line: nn.Module, keys: object) -> None:
    cast(Line, line).fit_scales()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of what torch or an adapter wraps around it."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return module


def temporal_blocks(channels: int, count: int, config: TemporalVAEConfig) -> nn.ModuleList:
    """The temporal blocks that follow one spatial block."""
    return nn.ModuleList(TemporalBlock(channels, config) for _ in range(count))


class Level(Chain):
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

    def parts(self) -> Iterator[nn.Module]:
        """Each spatial block and the temporal ones behind it, then the change of resolution."""
        for resnet, temporals in zip(self.resnets, self.temporals, strict=True):
            yield resnet
            yield from cast(nn.ModuleList, temporals)
        yield from (*self.downsamplers, *self.upsamplers)


class MidBlock(Chain):
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

    def parts(self) -> Iterator[nn.Module]:
        """The first spatial block and the temporal ones behind it, attention, the last blocks."""
        (first, last), (behind_first, behind_last) = self.resnets, self.temporals
        yield first
        yield from cast(nn.ModuleList, behind_first)
        yield from (*self.attentions, *self.temporal_attentions, last)
        yield from cast(nn.ModuleList, behind_last)


class Encoder(Line):
    """Pixels (B, C, T, H, W) -> moments (B, 2*L, T, H/f, W/f): mean and log-variance."""

    config: TemporalVAEConfig

    def __init__(self, config: TemporalVAEConfig):
        super().__init__(config)
        widths, moments = config.widths, 2 * config.latent_channels
        temporal = config.num_temporal_layers if config.temporal_encoder else 0
        self.conv_in = FirstConv(config.input_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for before, width in pairwise((widths[0], *widths)):
            level = Level(before, width, config.blocks_per_level, temporal, config)
            self.down_blocks.append(level)
            if len(self.down_blocks) < len(widths):
                level.downsamplers.append(Downsample(width))
        self.mid_block = MidBlock(widths[-1], temporal, config)
        self.conv_norm_out = GroupNorm(config.groups(widths[-1]), widths[-1], SPATIAL_EPS)
        self.conv_out = Conv2d(widths[-1], moments, 3, padding=1)
        self.quant_conv = Conv2d(moments, moments, 1) if config.quant_conv else None

    def typical_frames(self) -> Tensor:
        """A few small frames of pixels."""
        size = float16.PROBE_CELLS * self.config.downsample_factor
        return float16.probe_frames(self.config.input_channels, size)

    def parts(self) -> Iterator[nn.Module]:
        """Layers and levels in the order of application."""
        yield self.as_layer("conv_in", IntoStream)
        yield from (*self.down_blocks, self.mid_block)
        yield self.as_layer("conv_norm_out", NormSiLU)
        yield self.as_layer("conv_out", OnFrames)
        if self.quant_conv is not None:
            yield self.as_layer("quant_conv", OnFrames)


class Decoder(Line):
    """Latents (B, L, T, H/f, W/f) -> pixels (B, C, T, H, W), not clamped."""

    config: TemporalVAEConfig

    def __init__(self, config: TemporalVAEConfig):
        super().__init__(config)
        latent, pixel = config.latent_channels, config.input_channels
        widths = config.widths[::-1]
        temporal = config.num_temporal_layers if config.temporal_decoder else 0
        self.post_quant_conv = Conv2d(latent, latent, 1) if config.post_quant_conv else None
        self.conv_in = FirstConv(latent, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], temporal, config)
        self.up_blocks = nn.ModuleList()
        for before, width in pairwise((widths[0], *widths)):
            level = Level(before, width, config.blocks_per_level + 1, temporal, config)
            self.up_blocks.append(level)
            if len(self.up_blocks) < len(widths):
                level.upsamplers.append(Upsample(width))
        self.conv_norm_out = GroupNorm(config.groups(widths[-1]), widths[-1], SPATIAL_EPS)
        self.conv_out = Conv2d(widths[-1], pixel, 3, padding=1)
        kernel, causal = config.temporal_kernel_size, config.causal_mode
        self.time_conv_out = TimeConv.of(pixel, kernel, causal) if config.time_conv_out else None

    def typical_frames(self) -> Tensor:
        """A few small frames of latents, as a diffusion model would hand them over, unscaled."""
        frames = float16.probe_frames(self.config.latent_channels, float16.PROBE_CELLS)
        return frames / self.config.latent_scale_factor + self.config.latent_shift_factor

    def parts(self) -> Iterator[nn.Module]:
        """Layers and levels in the order of application."""
        if self.post_quant_conv is not None:
            yield self.as_layer("post_quant_conv", OnFrames)
        yield self.as_layer("conv_in", IntoStream)
        yield from (self.mid_block, *self.up_blocks)
        yield self.as_layer("conv_norm_out", NormSiLU)
        yield self.as_layer("conv_out", OnFrames)
        if self.time_conv_out is not None:
            yield self.as_layer("time_conv_out", OverTime)
