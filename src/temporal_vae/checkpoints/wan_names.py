"""Wan's and Qwen-Image's checkpoints: diffusers' configurations and names to ours, and back.

Our names are diffusers', but that the convolutions around the latent belong to a line:

    quant_conv, post_quant_conv           <->  encoder.quant_conv, decoder.post_quant_conv

Single files, as Wan's own code writes them, are read only. There a level is a run of numbers, or
with shortcuts (Wan 2.2) a list of its own:

    conv1, conv2                           ->  encoder.quant_conv, decoder.post_quant_conv
    encoder.conv1, encoder.head.2          ->  encoder.conv_in, encoder.conv_out
    encoder.middle.1                       ->  encoder.mid_block.attentions.0
    encoder.downsamples.4.residual.2       ->  encoder.down_blocks.4.conv1
    decoder.upsamples.5.shortcut           ->  decoder.up_blocks.1.resnets.1.conv_shortcut
    encoder.downsamples.1.downsamples.2    ->  encoder.down_blocks.1.downsampler
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from temporal_vae.checkpoints.diffusers_names import (
    QUANT_TO_DIFFUSERS,
    QUANT_TO_OURS,
    Shape,
    refuse_options,
    rename_layer,
    rename_rules,
)
from temporal_vae.config import WanVAEConfig

WAN_CLASS = "AutoencoderKLWan"
QWEN_CLASS = "AutoencoderKLQwenImage"
CLASSES = (WAN_CLASS, QWEN_CLASS)

_COMMON = {
    "base_dim": "base_channels",
    "z_dim": "latent_channels",
    "dim_mult": "channel_multipliers",
    "num_res_blocks": "blocks_per_level",
    "temperal_downsample": "temporal_downsample",  # their spelling
    "latents_mean": "latent_mean",
    "latents_std": "latent_std",
}
_OF_WAN = {"decoder_base_dim": "decoder_base_channels", "is_residual": "level_shortcuts"}
_PIXELS = {WAN_CLASS: {"in_channels", "out_channels", "patch_size"}, QWEN_CLASS: {"input_channels"}}
_WITHOUT_EFFECT = {"scale_factor_temporal", "scale_factor_spatial", "clip_output"}
"""What pipelines read, and what follows from the layout; decoded pixels are never clamped here."""
_FIXED: dict[str, Any] = {"attn_scales": [], "dropout": 0.0}


# diffusers -----------------------------------------------------------------------------------


def our_name(key: str) -> str:
    """Our name for a parameter of diffusers."""
    return rename_layer(key, QUANT_TO_OURS)


def read_config(config: Mapping[str, Any]) -> WanVAEConfig:
    """Our configuration for one of diffusers', whose values are not trusted.

    Raises `ValueError` for an option that has no counterpart here.
    """
    by_options = QWEN_CLASS if "input_channels" in config else WAN_CLASS
    name = config.get("_class_name", by_options)
    if name not in CLASSES:
        raise ValueError(f"cannot read a {name}: only {WAN_CLASS} and {QWEN_CLASS} are known here")
    named = _COMMON | (_OF_WAN if name == WAN_CLASS else {})
    understood = named.keys() | _PIXELS[name] | _WITHOUT_EFFECT
    refuse_options(name, config, understood, _FIXED)
    known = WanVAEConfig.wan21() if name == WAN_CLASS else WanVAEConfig.qwen_image()
    given = {ours: config[theirs] for theirs, ours in named.items() if theirs in config}
    stored: dict[str, Any] = {"latent_mean": known.latent_mean, "latent_std": known.latent_std}
    stored |= given | _pixels(name, config)
    return WanVAEConfig(**stored, family=known.family)


def _pixels(name: str, config: Mapping[str, Any]) -> dict[str, int]:
    if name == QWEN_CLASS:
        return {"input_channels": config.get("input_channels", 3)}
    taken, given = config.get("in_channels", 3), config.get("out_channels", 3)
    if taken != given:
        raise ValueError(f"in_channels and out_channels must be equal, got {taken} and {given}")
    side = 1 if (patch := config.get("patch_size")) is None else patch
    if type(taken) is not int or type(side) is not int or side < 1 or taken % side**2:
        raise ValueError(
            f"in_channels must be those of squares of patch_size pixels, got {taken!r} for a side "
            f"of {side!r}"
        )
    return {"input_channels": taken // side**2, "patch_size": side}


def to_diffusers(
    config: WanVAEConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(diffusers' configuration, weights under its names), what `read_config` and names undo.

    Raises `ValueError` naming what the family's class cannot express.
    """
    wan, neutral = config.family == "wan", WanVAEConfig().to_dict()
    own, channels = config.to_dict(), config.latent_channels
    own["latent_mean"] = own["latent_mean"] or [0.0] * channels
    own["latent_std"] = own["latent_std"] or [1.0] * channels
    if not wan:
        fixed = (*_OF_WAN.values(), "patch_size")
        if wrong := [f"{n}={own[n]!r}" for n in fixed if own[n] != neutral[n]]:
            raise ValueError(f"{QWEN_CLASS} cannot express {', '.join(wrong)}")
    options = {theirs: own[ours] for theirs, ours in (_COMMON | (_OF_WAN if wan else {})).items()}
    found = {"_class_name": WAN_CLASS if wan else QWEN_CLASS} | options | _FIXED
    if wan:
        pixels, side = config.input_channels * config.patch_size**2, config.patch_size
        found |= {
            "in_channels": pixels, "out_channels": pixels, "patch_size": side if side > 1 else None,
            "scale_factor_temporal": config.frames_per_latent,
            "scale_factor_spatial": config.downsample_factor,
        }  # fmt: skip
    else:
        found["input_channels"] = config.input_channels
    return found, {rename_layer(key, QUANT_TO_DIFFUSERS): tensor for key, tensor in state.items()}


# Wan's own single files ----------------------------------------------------------------------

_MARK = "decoder.middle.0.residual.0.gamma"
_PREFIXES = ("", "first_stage_model.", "vae.")
_PLACES = rename_rules(
    (r"^conv1\.", "encoder.quant_conv."),
    (r"^conv2\.", "decoder.post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
)
_PARTS = rename_rules(
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
_LEVEL = re.compile(
    r"^(encoder|decoder)\.(?:down|up)samples\.(\d+)\.(?:(?:down|up)samples\.(\d+)\.)?"
)


def original_prefix(keys: Mapping[str, object]) -> str | None:
    """What stands before the keys of Wan's own code in a file; None where it has none of them."""
    return next((prefix for prefix in _PREFIXES if prefix + _MARK in keys), None)


def read_original(shapes: Mapping[str, Shape], prefix: str) -> tuple[WanVAEConfig, dict[str, str]]:
    """(our configuration, {their key: our name}) for the VAE in a file with Wan's own keys.

    `shapes` are all tensors in the file; what does not begin with the prefix is left out.

    Raises `ValueError` for a VAE that is not whole.
    """
    bare = {key.removeprefix(prefix): key for key in shapes if key.startswith(prefix)}
    if prefix == "":
        bare = {key: key for key in bare if key.startswith(("encoder.", "decoder.", "conv"))}
    config = _infer({key: shapes[full] for key, full in bare.items()})
    return config, {full: _original_name(key, config) for key, full in bare.items()}


def _original_name(key: str, config: WanVAEConfig) -> str:
    name = rename_layer(rename_layer(key, _PLACES), _PARTS)
    return _LEVEL.sub(lambda found: _level_name(found, config), name)


def _level_name(found: re.Match[str], config: WanVAEConfig) -> str:
    """Where the layer of a level stands."""
    half, number, inside = found[1], int(found[2]), found[3]
    blocks = config.blocks_per_level + (half == "decoder")
    level = f"{half}.{'down' if half == 'encoder' else 'up'}_blocks."
    if inside is not None:
        change = "downsampler" if half == "encoder" else "upsampler"
        return f"{level}{number}." + (
            f"resnets.{inside}." if int(inside) < blocks else f"{change}."
        )
    if half == "encoder":
        return f"{level}{number}."
    number, index = divmod(number, blocks + 1)
    return f"{level}{number}." + (f"resnets.{index}." if index < blocks else "upsamplers.0.")


def _infer(shapes: Mapping[str, Shape]) -> WanVAEConfig:
    """The configuration that has tensors of these shapes, under their names."""

    def size(name: str, axis: int) -> int:
        shape = shapes.get(name, ())
        if len(shape) <= axis or shape[axis] < 1:
            raise ValueError(f"the VAE in it is not whole: {name} is missing or misshapen")
        return shape[axis]

    nested = any(key.startswith("encoder.downsamples.0.downsamples.") for key in shapes)
    widths, blocks, halved = _levels(shapes, size, nested)
    base, latent = size("encoder.conv1.weight", 0), size("decoder.conv1.weight", 1)
    if any(width % base for width in widths):
        raise ValueError(f"the VAE in it has levels of {widths} channels behind {base}")
    multipliers = tuple(width // base for width in widths)
    side = 2 if nested else 1
    known = {16: WanVAEConfig.wan21(), 48: WanVAEConfig.wan22()}.get(latent)
    if known is None:
        warnings.warn(
            "the file does not say the mean and deviation of its latents: 0 and 1 are taken",
            stacklevel=6,
        )
    return WanVAEConfig(
        input_channels=size("encoder.conv1.weight", 1) // side**2,
        latent_channels=latent,
        base_channels=base,
        decoder_base_channels=size("decoder.head.0.gamma", 0) // multipliers[0],
        channel_multipliers=multipliers,
        blocks_per_level=blocks,
        temporal_downsample=tuple(halved),
        level_shortcuts=nested,
        patch_size=side,
        latent_mean=None if known is None else known.latent_mean,
        latent_std=None if known is None else known.latent_std,
    )


def _levels(
    shapes: Mapping[str, Shape], size: Callable[[str, int], int], nested: bool
) -> tuple[list[int], int, list[bool]]:
    """Width of each level of the encoder, its blocks, and for all but the last if time halves."""
    inner = r"(\d+)\.downsamples\.(\d+)\." if nested else r"(\d+)()\."
    pattern = re.compile(rf"^encoder\.downsamples\.{inner}(residual\.2|resample\.1)\.weight$")
    found = sorted(
        (int(match[1]), int(match[2] or 0), match[3], key)
        for key in shapes
        if (match := pattern.match(key))
    )
    levels: list[list[str]] = [[]]
    halved: list[bool] = []
    for _, _, part, key in found:
        if part == "residual.2":
            levels[-1].append(key)
        else:
            halved.append(key.replace("resample.1", "time_conv") in shapes)
            levels.append([])
    if not all(levels):
        raise ValueError("the VAE in it is not whole: a level of the encoder has no blocks")
    return [size(level[-1], 0) for level in levels], len(levels[0]), halved
