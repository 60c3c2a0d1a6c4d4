"""The configurations of temporal VAEs: all that is needed to rebuild one around its weights."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
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

    @property
    def frames_per_latent(self) -> int:
        """Frames per latent along time: 1, as time is never compressed."""
        return 1

    @property
    def layout(self) -> Self:
        """What the memory of a walk depends on: the same with every other field at one value."""
        needed = self.clip_frames if self.temporal_norm == "clip" else None
        return replace(self, clip_frames=needed, latent_scale_factor=1.0, latent_shift_factor=0.0)

    @property
    def least_size(self) -> tuple[int, int]:
        """(blocks, numbers) that a model of this configuration has at the least."""
        levels, widest = len(self.widths), max(self.widths)
        blocks = levels * (2 * self.blocks_per_level + 1)
        blocks += levels * (self.blocks_per_level + 1) * self.num_temporal_layers
        numbers = max(
            9 * widest**2,
            9 * widest * self.latent_channels,
            widest**2 * self.temporal_kernel_size * min(1, self.num_temporal_layers),
            self.temporal_attention_reach * min(1, self.num_temporal_layers),
            self.input_channels**2 * self.temporal_kernel_size * int(self.time_conv_out),
        )
        return blocks, numbers

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


Family = Literal["wan", "qwen-image"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WanVAEConfig:
    """The architecture of a `TemporalVAE` of Wan's or Qwen-Image's kind: `from_config` makes one.

    Its layers see time and space at once, and the past only. `frames_per_latent` frames make one
    latent, but for the first, which makes one alone: so 1 + 4k frames are 1 + k latents. Each level
    but the last halves height and width; some halve the number of frames too.

    Raises `ValueError` for any field that could not make a working model.
    """

    input_channels: int = 3
    """Channels of a pixel: 1 grey, 3 RGB, 4 RGBA."""
    latent_channels: int = 16
    """Channels of a latent cell."""
    base_channels: int = 96
    """Width behind the first convolution of the encoder, and the unit of the levels' widths."""
    decoder_base_channels: int | None = None
    """The unit of the widths in the decoder; None means that of the encoder."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level in these units, finest first."""
    blocks_per_level: int = 2
    """Residual blocks per encoder level; the decoder has one more."""
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """For each level but the last, finest first, whether the encoder halves the frames there."""
    level_shortcuts: bool = False
    """A shortcut around each level (Wan 2.2); without, the decoder's levels halve their width."""
    patch_size: int = 1
    """Pixels of a square that enter as the channels of one (Wan 2.2: 2)."""
    latent_mean: tuple[float, ...] | None = None
    """Of each latent channel, subtracted before it is scaled; None means 0."""
    latent_std: tuple[float, ...] | None = None
    """Of each latent channel, by which it is divided; None means 1."""
    family: Family = "wan"
    """Whose layout it is, "wan" or "qwen-image": they compute the same, in classes of two names."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", _multipliers(self.channel_multipliers))
        for name in (
            "input_channels", "latent_channels", "base_channels", "blocks_per_level", "patch_size",
        ):  # fmt: skip
            object.__setattr__(self, name, _integer(name, getattr(self, name), at_least=1))
        if self.input_channels not in (1, 3, 4):
            raise ValueError(
                f"input_channels must be 1 (grey), 3 (RGB) or 4 (RGBA), got {self.input_channels}"
            )
        own = self.decoder_base_channels
        own = None if own is None else _integer("decoder_base_channels", own, at_least=1)
        object.__setattr__(
            self, "decoder_base_channels", None if own == self.base_channels else own
        )
        self._check_levels()
        for name in ("latent_mean", "latent_std"):
            object.__setattr__(self, name, self._per_channel(name))
        if self.latent_std is not None and min(self.latent_std) <= 0:
            raise ValueError(f"latent_std must be above 0 in every channel, got {self.latent_std}")

    def _check_levels(self) -> None:
        halved, levels = self.temporal_downsample, len(self.channel_multipliers)
        if not isinstance(halved, (list, tuple)) or not all(isinstance(t, bool) for t in halved):
            raise ValueError(f"temporal_downsample must be a sequence of flags, got {halved!r}")
        if len(halved) != levels - 1:
            raise ValueError(
                f"temporal_downsample must have a flag for each of {levels} levels but the last, "
                f"got {len(halved)}"
            )
        object.__setattr__(self, "temporal_downsample", tuple(halved))
        if not isinstance(self.level_shortcuts, bool):
            raise ValueError(f"level_shortcuts must be True or False, got {self.level_shortcuts!r}")
        if self.family not in ("wan", "qwen-image"):
            raise ValueError(f"family must be 'wan' or 'qwen-image', got {self.family!r}")
        odd = [width for width in self.decoder_widths[1:] if width % 2]
        if odd and not self.level_shortcuts:
            raise ValueError(
                f"the decoder halves the widths {odd} of its levels: they must be even"
            )
        if self.level_shortcuts:
            self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """A shortcut takes means of whole groups of channels, or repeats each as often."""
        more = [4 * (1 + time) for time in self.temporal_downsample]
        down = zip(pairwise((self.base_channels, *self.widths)), [*more, 1], strict=True)
        wide = self.decoder_widths[::-1]
        up = zip(pairwise((wide[0], *wide)), more[::-1], strict=False)
        if any(one * times % other for (one, other), times in down) or any(
            other * times % one for (one, other), times in up
        ):
            raise ValueError(
                f"with level_shortcuts the channels of a level, {self.widths} and "
                f"{self.decoder_widths} in the decoder, must share out among those of the next, "
                "and the last two must be as many"
            )

    def _per_channel(self, name: str) -> tuple[float, ...] | None:
        values = getattr(self, name)
        if values is None:
            return None
        if not isinstance(values, (list, tuple)) or len(values) != self.latent_channels:
            raise ValueError(
                f"{name} must have a number for each of {self.latent_channels} latent channels, "
                f"got {values!r}"
            )
        if not all(_is_finite(value) for value in values):
            raise ValueError(f"{name} must be finite numbers, got {values!r}")
        return tuple(map(float, values))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level of the encoder, finest first."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each level of the decoder, finest first."""
        base = self.decoder_base_channels or self.base_channels
        return tuple(base * m for m in self.channel_multipliers)

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent cell along height and width."""
        return int(self.patch_size * 2 ** (len(self.channel_multipliers) - 1))

    @property
    def frames_per_latent(self) -> int:
        """Frames per latent along time, but for the first, which has one of its own."""
        return int(2 ** sum(self.temporal_downsample))

    @property
    def causal_mode(self) -> bool:
        """A frame depends on itself and the past only: always."""
        return True

    @property
    def temporal_kernel_size(self) -> int:
        """Frames that a convolution sees: 3."""
        return 3

    @property
    def clip_frames(self) -> None:
        """None: every such model streams at any length."""
        return None

    @property
    def layout(self) -> Self:
        """What the memory of a walk depends on: the same with every other field at one value."""
        return replace(self, latent_mean=None, latent_std=None, family="wan")

    @property
    def least_size(self) -> tuple[int, int]:
        """(blocks, numbers) that a model of this configuration has at the least."""
        widest = max(*self.widths, *self.decoder_widths)
        blocks = len(self.widths) * (2 * self.blocks_per_level + 1)
        return blocks, max(27 * widest**2, 27 * widest * self.latent_channels)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; "kind" tells them from those of a `TemporalVAEConfig`."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        return {"kind": "wan"} | values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises `ValueError` naming unknown fields."""
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in values.items() if name != "kind"}
        if unknown := sorted(set(given) - known):
            raise ValueError(
                f"unknown configuration fields {unknown}: this version knows {sorted(known)}"
            )
        return cls(**given)

    def inflated(self, **_: Unpack[TemporalOptions]) -> Self:
        """Raises `ValueError`: this is no image VAE."""
        raise ValueError(
            "a video VAE already, whose layers see time and space at once: load it with "
            "from_pretrained"
        )

    @classmethod
    def wan21(cls) -> Self:
        """Wan 2.1's VAE, 4x8x8 to 16 channels, which Wan 2.2's 14B models use too.

        Source: Wan team 2025, arXiv 2503.20314; diffusers' `AutoencoderKLWan`.
        """
        return cls(latent_mean=_WAN21_MEAN, latent_std=_WAN21_STD)

    @classmethod
    def wan22(cls) -> Self:
        """The VAE of Wan 2.2's 5B model, 4x16x16 to 48 channels.

        Source: Wan-Video/Wan2.2; diffusers' `AutoencoderKLWan` with `is_residual`.
        """
        return cls(
            latent_channels=48,
            base_channels=160,
            decoder_base_channels=256,
            level_shortcuts=True,
            patch_size=2,
            latent_mean=_WAN22_MEAN,
            latent_std=_WAN22_STD,
        )

    @classmethod
    def qwen_image(cls) -> Self:
        """Qwen-Image's VAE: Wan 2.1's layout, for images, which are clips of one frame.

        Source: Qwen team 2025, arXiv 2508.02324; diffusers' `AutoencoderKLQwenImage`.
        """
        return cls(latent_mean=_WAN21_MEAN, latent_std=_WAN21_STD, family="qwen-image")

    @classmethod
    def tiny(cls) -> Self:
        """Wan 2.1's layout at about a quarter of its width: as many numbers a frame as `tiny`'s."""
        return cls(base_channels=24, channel_multipliers=(1, 2, 3, 4))


# Of latents over the data that the models were trained on; from diffusers' configurations
_WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

VAEConfig = TemporalVAEConfig | WanVAEConfig
"""The configuration of any `TemporalVAE`."""


def config_from_dict(values: Mapping[str, Any]) -> VAEConfig:
    """The configuration that `to_dict` gave these values of.

    Raises `ValueError` for another kind, and naming unknown fields.
    """
    kind = values.get("kind")
    if kind == "wan":
        return WanVAEConfig.from_dict(values)
    if kind is not None:
        raise ValueError(f"unknown kind of model {kind!r}: this version knows 'wan'")
    return TemporalVAEConfig.from_dict(values)


_FLAGS = (
    "causal_mode", "quant_conv", "post_quant_conv", "temporal_encoder", "temporal_decoder",
    "time_conv_out",
)  # fmt: skip


def _is_finite(value: object) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and -math.inf < value < math.inf  # type: ignore[operator]


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
