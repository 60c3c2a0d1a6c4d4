"""The configuration of a temporal VAE: all that is needed to rebuild it around its weights."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self, TypedDict, Unpack

NormScope = Literal["position", "clip"]


class TemporalOptions(TypedDict, total=False):
    """The fields of a `TemporalVAEConfig` that an image VAE leaves open."""

    num_temporal_layers: int
    temporal_kernel_size: int
    causal_mode: bool
    temporal_encoder: bool
    temporal_decoder: bool
    temporal_attention_reach: int
    temporal_norm: NormScope
    time_conv_out: bool
    clip_frames: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalVAEConfig:
    """The architecture of a `TemporalVAE`; `TemporalVAEConfig()` is the default layout.

    Widths are `base_channels * m` for each multiplier, finest level first; every level but the
    last halves height and width, so pixels per latent cell are `2 ** (levels - 1)`.

    Raises `ValueError` for any field that could not make a working model.
    """

    input_channels: int = 3
    """Channels of a pixel: 1 grey, 3 RGB, 4 RGBA."""
    latent_channels: int = 4
    """Channels of a latent cell."""
    base_channels: int = 128
    """Width of the finest level."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level in units of `base_channels`, finest first."""
    num_temporal_layers: int = 1
    """Temporal blocks after each spatial residual block; 0 makes a pure image VAE."""
    temporal_kernel_size: int = 3
    """Frames a temporal convolution sees; odd."""
    causal_mode: bool = False
    """A frame depends on itself and the past only."""
    latent_scale_factor: float = 0.18215
    """Multiplier that brings latents to about unit variance."""
    latent_shift_factor: float = 0.0
    """Subtracted from a latent before it is scaled."""
    blocks_per_level: int = 2
    """Spatial residual blocks per encoder level; the decoder has one more."""
    norm_groups: int | None = None
    """Groups of every group norm; None takes a number that fits each width."""
    quant_conv: bool = True
    """A 1x1 convolution on the moments, as in Stable Diffusion."""
    post_quant_conv: bool = True
    """A 1x1 convolution on the latent before decoding."""
    temporal_encoder: bool = True
    """Whether the encoder has temporal layers too; SVD's has none."""
    temporal_decoder: bool = True
    """Whether the decoder has temporal layers; without, frames are decoded one by one."""
    temporal_attention_reach: int = 8
    """Frames temporal attention sees back and, unless causal, ahead; 0 removes it."""
    temporal_norm: NormScope = "position"
    """What a temporal block normalises over: the channels of one position, or the clip (SVD)."""
    time_conv_out: bool = False
    """A last temporal convolution on the pixels (SVD)."""
    clip_frames: int | None = None
    """Clip length the model was made for; required where a norm spans the clip, else unused."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From the arguments of `TemporalVAE`, where None stands for some defaults."""
        given = {field.name: arguments[field.name] for field in fields(cls)}
        for name in ("channel_multipliers", "latent_scale_factor"):
            if given[name] is None:
                del given[name]
        return cls(**given)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", _multipliers(self.channel_multipliers))
        for name in ("input_channels", "latent_channels", "base_channels", "blocks_per_level"):
            self._set_integer(name, at_least=1)
        for name in ("num_temporal_layers", "temporal_attention_reach"):
            self._set_integer(name, at_least=0)
        self._set_integer("temporal_kernel_size", at_least=1)
        if self.temporal_kernel_size % 2 == 0:
            raise ValueError(
                f"temporal_kernel_size must be odd, so that it has a middle frame; "
                f"got {self.temporal_kernel_size}: take {self.temporal_kernel_size + 1}"
            )
        if self.input_channels not in (1, 3, 4):
            raise ValueError(
                f"input_channels must be 1 (grey), 3 (RGB) or 4 (RGBA), got {self.input_channels}"
            )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_scales()
        self._check_norms()

    def _set_integer(self, name: str, at_least: int) -> None:
        object.__setattr__(self, name, _integer(name, getattr(self, name), at_least))

    def _check_scales(self) -> None:
        for name in ("latent_scale_factor", "latent_shift_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"{name} must be a number, got {value!r}")
            try:
                number = float(value)
            except OverflowError:  # a whole number may be larger than any float
                number = math.inf
            if not math.isfinite(number):
                raise ValueError(f"{name} must be finite, got {number}")
            object.__setattr__(self, name, number)
        if self.latent_scale_factor <= 0:
            raise ValueError(
                f"latent_scale_factor must be above 0, got {self.latent_scale_factor}: it divides "
                "on the way back; Stable Diffusion's is 0.18215"
            )

    def _check_norms(self) -> None:
        if self.norm_groups is not None:
            self._set_integer("norm_groups", at_least=1)
            for width in self.widths:
                if width % self.norm_groups:
                    raise ValueError(
                        f"norm_groups must divide every width, got {self.norm_groups} for widths "
                        f"{self.widths}: leave it None to have a number chosen for each width"
                    )
        if self.temporal_norm not in ("position", "clip"):
            raise ValueError(
                f"temporal_norm must be 'position' or 'clip', got {self.temporal_norm!r}"
            )
        if self.clip_frames is not None:
            self._set_integer("clip_frames", at_least=1)
        if self.temporal_norm == "clip":
            if self.causal_mode:
                raise ValueError(
                    "causal_mode with temporal_norm='clip' would let the future into the norms of "
                    "the past: use temporal_norm='position'"
                )
            if self.clip_frames is None:
                raise ValueError(
                    "temporal_norm='clip' makes the clip length part of the model: give "
                    "clip_frames (SVD: 14)"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent cell along height and width."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    def groups(self, channels: int) -> int:
        """Groups of a group norm over `channels` channels.

        With one channel per group a norm would erase the brightness of that channel, so a group
        holds at least four channels where the width allows it.
        """
        if self.norm_groups is not None:
            return self.norm_groups
        most = max(1, min(32, channels // 4))
        return max(g for g in range(1, most + 1) if channels % g == 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = asdict(self)
        values["channel_multipliers"] = list(self.channel_multipliers)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises `ValueError` naming unknown fields."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown configuration fields {unknown}: this version knows {sorted(known)}"
            )
        return cls(**values)

    def inflated(self, **options: Unpack[TemporalOptions]) -> Self:
        """This image VAE's layout with temporal layers, one after each block unless said otherwise.

        Raises `ValueError` for a layout that has temporal layers already, and for unknown options.
        """
        if self.num_temporal_layers or self.time_conv_out:
            raise ValueError(
                f"a video VAE already, with num_temporal_layers={self.num_temporal_layers} and "
                f"time_conv_out={self.time_conv_out}: load it with from_pretrained"
            )
        known = TemporalOptions.__annotations__.keys()
        if unknown := sorted(set(options) - known):
            raise ValueError(f"unknown temporal options {unknown}: there are {sorted(known)}")
        one: TemporalOptions = {"num_temporal_layers": 1}
        return replace(self, **(one | options))

    @classmethod
    def svd(cls) -> Self:
        """Stable Video Diffusion's VAE: image encoder, temporal decoder; 97,742,847 parameters.

        Source: diffusers' `AutoencoderKLTemporalDecoder`; Blattmann et al. 2023, arXiv 2311.15127.
        """
        return cls(
            norm_groups=32,
            post_quant_conv=False,
            temporal_encoder=False,
            temporal_attention_reach=0,
            temporal_norm="clip",
            time_conv_out=True,
            clip_frames=14,
        )

    @classmethod
    def tiny(cls) -> Self:
        """The layout of the bundled weights: the default one at a quarter of the width."""
        return cls(base_channels=32, latent_scale_factor=0.3461)


_FLAGS = (
    "causal_mode", "quant_conv", "post_quant_conv", "temporal_encoder", "temporal_decoder",
    "time_conv_out",
)  # fmt: skip


def _integer(name: str, value: object, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def _multipliers(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"channel_multipliers must be a non-empty sequence such as (1, 2, 4, 4), got {value!r}"
        )
    return tuple(
        _integer("each of channel_multipliers", multiplier, at_least=1) for multiplier in value
    )
