"""Other libraries' configurations and parameter names to ours, and back.

Our spatial names are diffusers' image names (`resnets.0.conv1`); in SVD's decoder diffusers wraps
each residual block together with its temporal one, which here stand side by side:

    resnets.0.spatial_res_block.conv1     <->  resnets.0.conv1
    resnets.0.temporal_res_block.conv1    <->  temporals.0.0.conv1
    resnets.0.time_mixer.mix_factor       <->  temporals.0.0.mix_factor
    quant_conv                            <->  encoder.quant_conv
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from temporal_vae.config import TemporalVAEConfig

SVD_CLASS = "AutoencoderKLTemporalDecoder"

_TO_OURS = [
    (re.compile(r"resnets\.(\d+)\.spatial_res_block\."), r"resnets.\1."),
    (re.compile(r"resnets\.(\d+)\.temporal_res_block\."), r"temporals.\1.0."),
    (re.compile(r"resnets\.(\d+)\.time_mixer\."), r"temporals.\1.0."),
    (re.compile(r"^quant_conv\."), "encoder.quant_conv."),
]
_TO_DIFFUSERS = [
    (re.compile(r"^encoder\.quant_conv\."), "quant_conv."),
    (
        re.compile(r"^(decoder\..*)temporals\.(\d+)\.0\.mix_factor"),
        r"\1resnets.\2.time_mixer.mix_factor",
    ),
    (re.compile(r"^(decoder\..*)resnets\.(\d+)\."), r"\1resnets.\2.spatial_res_block."),
    (re.compile(r"^(decoder\..*)temporals\.(\d+)\.0\."), r"\1resnets.\2.temporal_res_block."),
]


def from_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[TemporalVAEConfig, dict[str, Tensor]]:
    """A diffusers `AutoencoderKLTemporalDecoder` (SVD's VAE) as (our configuration, our weights).

    The tensors are those given, under our names. `config` is diffusers' own, a mapping.

    Raises `ValueError` for another class, or for an option that has no counterpart here.
    """
    name = config.get("_class_name", SVD_CLASS)
    if name != SVD_CLASS:
        raise ValueError(f"cannot read a {name}: only {SVD_CLASS} is known so far")
    if config.get("in_channels", 3) != config.get("out_channels", 3):
        raise ValueError(
            f"in_channels and out_channels must be equal, got {config['in_channels']} and "
            f"{config['out_channels']}"
        )
    if config.get("layers_per_block", 1) != 2:
        raise ValueError(
            f"layers_per_block must be 2 as in SVD, got {config.get('layers_per_block', 1)}: with "
            "another number diffusers changes the middle of the decoder too"
        )
    widths = tuple(config.get("block_out_channels", (64,)))
    base = math.gcd(*widths)
    ours = replace(
        TemporalVAEConfig.svd(),
        input_channels=config.get("in_channels", 3),
        latent_channels=config.get("latent_channels", 4),
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        latent_scale_factor=config.get("scaling_factor", 0.18215),
    )
    return ours, {_rename(key, _TO_OURS): tensor for key, tensor in state.items()}


def to_diffusers(
    config: TemporalVAEConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `from_diffusers`.

    Raises `ValueError` naming every field that diffusers' class cannot express.
    """
    svd = TemporalVAEConfig.svd()
    free = {
        "input_channels",
        "latent_channels",
        "base_channels",
        "channel_multipliers",
        "latent_scale_factor",
        "clip_frames",
    }
    wrong = [
        f"{name}={value!r} (there: {svd.to_dict()[name]!r})"
        for name, value in config.to_dict().items()
        if name not in free and value != svd.to_dict()[name]
    ]
    if wrong:
        raise ValueError(f"{SVD_CLASS} cannot express {', '.join(wrong)}")
    levels = len(config.channel_multipliers)
    theirs = {
        "_class_name": SVD_CLASS,
        "in_channels": config.input_channels,
        "out_channels": config.input_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks_per_level,
        "latent_channels": config.latent_channels,
        "sample_size": 768,
        "scaling_factor": config.latent_scale_factor,
        "force_upcast": True,
    }
    return theirs, {_rename(key, _TO_DIFFUSERS): tensor for key, tensor in state.items()}


def _rename(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    """The key by the first rule that matches it."""
    for pattern, replacement in rules:
        renamed, matches = pattern.subn(replacement, key)
        if matches:
            return renamed
    return key
