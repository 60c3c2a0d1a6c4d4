"""Other libraries' configurations and parameter names to ours, and back.

Our spatial names are diffusers' image names (`resnets.0.conv1`); in SVD's decoder diffusers wraps
each residual block together with its temporal one, which here stand side by side:

    resnets.0.spatial_res_block.conv1     <->  resnets.0.conv1
    resnets.0.temporal_res_block.conv1    <->  temporals.0.0.conv1
    resnets.0.time_mixer.mix_factor       <->  temporals.0.0.mix_factor
    quant_conv, post_quant_conv           <->  encoder.quant_conv, decoder.post_quant_conv
    attentions.0.query (old files)         ->  attentions.0.to_q

Single files, as CompVis' and Stability's own code writes them, are read only. There decoder levels
count from the finest, and the projections of attention are 1x1 convolutions:

    encoder.down.0.block.1.nin_shortcut    ->  encoder.down_blocks.0.resnets.1.conv_shortcut
    decoder.up.3.upsample.conv             ->  decoder.up_blocks.0.upsamplers.0.conv
    decoder.mid.attn_1.q                   ->  decoder.mid_block.attentions.0.to_q
    decoder.up.3.block.0.time_stack        ->  decoder.up_blocks.0.temporals.0.0
    decoder.conv_out.time_mix_conv         ->  decoder.time_conv_out
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from temporal_vae.config import TemporalVAEConfig

SVD_CLASS = "AutoencoderKLTemporalDecoder"
IMAGE_CLASS = "AutoencoderKL"
CLASSES = (IMAGE_CLASS, SVD_CLASS)

Shape = tuple[int, ...]
Rules = list[tuple[re.Pattern[str], str]]


def rename_rules(*pairs: tuple[str, str]) -> Rules:
    """Compiled rules of (pattern, replacement) pairs."""
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


QUANT_TO_OURS = rename_rules(
    (r"^quant_conv\.", "encoder.quant_conv."),
    (r"^post_quant_conv\.", "decoder.post_quant_conv."),
)
_TO_OURS = QUANT_TO_OURS + rename_rules(
    (r"resnets\.(\d+)\.spatial_res_block\.", r"resnets.\1."),
    (r"resnets\.(\d+)\.temporal_res_block\.", r"temporals.\1.0."),
    (r"resnets\.(\d+)\.time_mixer\.", r"temporals.\1.0."),
    (r"attentions\.0\.query\.", "attentions.0.to_q."),
    (r"attentions\.0\.key\.", "attentions.0.to_k."),
    (r"attentions\.0\.value\.", "attentions.0.to_v."),
    (r"attentions\.0\.proj_attn\.", "attentions.0.to_out.0."),
)
QUANT_TO_DIFFUSERS = rename_rules(
    (r"^encoder\.quant_conv\.", "quant_conv."),
    (r"^decoder\.post_quant_conv\.", "post_quant_conv."),
)
_TO_SVD = QUANT_TO_DIFFUSERS[:1] + rename_rules(
    (r"^(decoder\..*)temporals\.(\d+)\.0\.mix_factor", r"\1resnets.\2.time_mixer.mix_factor"),
    (r"^(decoder\..*)resnets\.(\d+)\.", r"\1resnets.\2.spatial_res_block."),
    (r"^(decoder\..*)temporals\.(\d+)\.0\.", r"\1resnets.\2.temporal_res_block."),
)


PROJECTION = re.compile(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")


def rename_layer(key: str, rules: Rules) -> str:
    """The key by the first rule that matches it."""
    for pattern, replacement in rules:
        renamed, matches = pattern.subn(replacement, key)
        if matches:
            return renamed
    return key


# ---------------------------------------------------------------------------------------------
# diffusers


def from_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[TemporalVAEConfig, dict[str, Tensor]]:
    """A diffusers `AutoencoderKLTemporalDecoder` or `AutoencoderKL` as (configuration, weights).

    The tensors are those given, under our names. `config` is diffusers' own, a mapping.

    Raises `ValueError` for another class, or for an option that has no counterpart here.
    """
    renamed = {our_name(key): tensor for key, tensor in state.items()}
    return read_config(config), {
        name: tensor.reshape(our_shape(name, tuple(tensor.shape)))
        for name, tensor in renamed.items()
    }


def our_name(key: str) -> str:
    """Our name for a parameter of diffusers."""
    return rename_layer(key, _TO_OURS)


def our_shape(name: str, shape: Shape) -> Shape:
    """The shape of a parameter under our name: 1x1 convolutions of attention are linear here."""
    if PROJECTION.search(name) and len(shape) == 4 and shape[2:] == (1, 1):
        return shape[:2]
    return shape


def read_config(config: Mapping[str, Any]) -> TemporalVAEConfig:
    """Our configuration for one of diffusers', whose values are not trusted.

    Raises `ValueError` as `from_diffusers`.
    """
    by_options = IMAGE_CLASS if "up_block_types" in config else SVD_CLASS
    name = config.get("_class_name", by_options)
    if name not in CLASSES:
        raise ValueError(f"cannot read a {name}: only {IMAGE_CLASS} and {SVD_CLASS} are known")
    if config.get("in_channels", 3) != config.get("out_channels", 3):
        raise ValueError(
            f"in_channels and out_channels must be equal, got {config.get('in_channels', 3)} and "
            f"{config.get('out_channels', 3)}"
        )
    _check_options(name, config)
    widths = config.get("block_out_channels", (64,))
    if not isinstance(widths, (list, tuple)) or not widths or not all(map(_is_count, widths)):
        raise ValueError(f"block_out_channels must be a list of widths, got {widths!r}")
    groups = config.get("norm_num_groups", 32)
    if not _is_count(groups):
        raise ValueError(f"norm_num_groups must be a whole number above 0, got {groups!r}")
    base = math.gcd(*widths)
    common = {
        "input_channels": config.get("in_channels", 3),
        "latent_channels": config.get("latent_channels", 4),
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "latent_scale_factor": config.get("scaling_factor", 0.18215),
    }
    if name == SVD_CLASS:
        return replace(TemporalVAEConfig.svd(), **common)
    return TemporalVAEConfig(
        **common,
        num_temporal_layers=0,
        blocks_per_level=config.get("layers_per_block", 1),
        norm_groups=groups,
        latent_shift_factor=0.0 if (shift := config.get("shift_factor")) is None else shift,
        quant_conv=config.get("use_quant_conv", True),
        post_quant_conv=config.get("use_post_quant_conv", True),
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_READ = {"in_channels", "out_channels", "block_out_channels", "latent_channels", "scaling_factor"}
_READ_IMAGE = {
    "norm_num_groups", "layers_per_block", "shift_factor", "use_quant_conv", "use_post_quant_conv",
}  # fmt: skip
_WITHOUT_EFFECT = {"sample_size", "force_upcast"}
"""Tile size, and a switch of pipelines: neither changes a number of the model."""


def _check_options(name: str, config: Mapping[str, Any]) -> None:
    """Refuse every option that would change the numbers and has no counterpart here."""
    fixed: dict[str, Any] = {
        "down_block_types": "DownEncoderBlock2D",
        "up_block_types": "UpDecoderBlock2D",
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "latents_mean": None,
        "latents_std": None,
    }
    if name == SVD_CLASS:
        fixed["layers_per_block"] = 2  # with another number the middle of the decoder changes too
        if "layers_per_block" not in config:
            raise ValueError(f"layers_per_block must be 2 in {SVD_CLASS}, got none, which means 1")
    known = _READ | _WITHOUT_EFFECT | (_READ_IMAGE if name == IMAGE_CLASS else set())
    refuse_options(name, config, known, fixed)


def refuse_options(
    name: str, config: Mapping[str, Any], known: Container[str], fixed: Mapping[str, Any]
) -> None:
    """Refuse each option of a class of diffusers that is not `known`, nor has its `fixed` value."""
    for option, value in config.items():
        if option.startswith("_") or option in known:
            continue
        if option not in fixed and value is not None:
            raise ValueError(f"{name} has an option unknown here: {option}={value!r}")
        wanted, several = fixed.get(option), isinstance(value, (list, tuple))
        if several and option.endswith("_block_types"):
            same = all(kind == wanted for kind in value)
        else:
            same = (list(value) if several else value) == wanted
        if not same:
            raise ValueError(
                f"{option} must be {wanted!r} in a {name}, got {value!r}: there is no counterpart "
                "of anything else here"
            )


def to_diffusers(
    config: TemporalVAEConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `from_diffusers`: a model without temporal layers is an `AutoencoderKL`.

    Raises `ValueError` naming every field that diffusers' class cannot express.
    """
    image = config.num_temporal_layers == 0 and not config.time_conv_out
    options = _image_options(config) if image else _svd_options(config)
    levels = len(config.channel_multipliers)
    theirs = {
        "_class_name": IMAGE_CLASS if image else SVD_CLASS,
        "in_channels": config.input_channels,
        "out_channels": config.input_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks_per_level,
        "latent_channels": config.latent_channels,
        "scaling_factor": config.latent_scale_factor,
        "force_upcast": True,
    }
    rules = QUANT_TO_DIFFUSERS if image else _TO_SVD
    return theirs | options, {rename_layer(key, rules): tensor for key, tensor in state.items()}


def _image_options(config: TemporalVAEConfig) -> dict[str, Any]:
    groups = {config.groups(width) for width in config.widths}
    if len(groups) > 1:
        raise ValueError(
            f"{IMAGE_CLASS} cannot express norm_groups=None with widths {config.widths}: it has "
            f"one number of groups, here they have {sorted(groups)}"
        )
    return {
        "up_block_types": ["UpDecoderBlock2D"] * len(config.channel_multipliers),
        "act_fn": "silu",
        "norm_num_groups": groups.pop(),
        "sample_size": 512,
        "shift_factor": config.latent_shift_factor or None,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.post_quant_conv,
        "mid_block_add_attention": True,
    }


_FREE_IN_SVD = {
    "input_channels", "latent_channels", "base_channels", "channel_multipliers",
    "latent_scale_factor", "clip_frames",
}  # fmt: skip


def _svd_options(config: TemporalVAEConfig) -> dict[str, Any]:
    svd = TemporalVAEConfig.svd().to_dict()
    values = config.to_dict()
    if {config.groups(width) for width in config.widths} == {32}:
        values["norm_groups"] = 32  # chosen for each width, and the same
    wrong = [
        f"{name}={value!r} (there: {svd[name]!r})"
        for name, value in values.items()
        if name not in _FREE_IN_SVD and value != svd[name]
    ]
    if wrong:
        raise ValueError(f"{SVD_CLASS} cannot express {', '.join(wrong)}")
    return {"sample_size": 768}
