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
import warnings
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from temporal_vae.config import TemporalVAEConfig

SVD_CLASS = "AutoencoderKLTemporalDecoder"
IMAGE_CLASS = "AutoencoderKL"

Shape = tuple[int, ...]
Rules = list[tuple[re.Pattern[str], str]]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


_QUANT_TO_OURS = _rules(
    (r"^quant_conv\.", "encoder.quant_conv."),
    (r"^post_quant_conv\.", "decoder.post_quant_conv."),
)
_TO_OURS = _QUANT_TO_OURS + _rules(
    (r"resnets\.(\d+)\.spatial_res_block\.", r"resnets.\1."),
    (r"resnets\.(\d+)\.temporal_res_block\.", r"temporals.\1.0."),
    (r"resnets\.(\d+)\.time_mixer\.", r"temporals.\1.0."),
    (r"attentions\.0\.query\.", "attentions.0.to_q."),
    (r"attentions\.0\.key\.", "attentions.0.to_k."),
    (r"attentions\.0\.value\.", "attentions.0.to_v."),
    (r"attentions\.0\.proj_attn\.", "attentions.0.to_out.0."),
)
_QUANT_TO_DIFFUSERS = _rules(
    (r"^encoder\.quant_conv\.", "quant_conv."),
    (r"^decoder\.post_quant_conv\.", "post_quant_conv."),
)
_TO_SVD = _QUANT_TO_DIFFUSERS[:1] + _rules(
    (r"^(decoder\..*)temporals\.(\d+)\.0\.mix_factor", r"\1resnets.\2.time_mixer.mix_factor"),
    (r"^(decoder\..*)resnets\.(\d+)\.", r"\1resnets.\2.spatial_res_block."),
    (r"^(decoder\..*)temporals\.(\d+)\.0\.", r"\1resnets.\2.temporal_res_block."),
)
_SINGLE_PLACES = _QUANT_TO_OURS + _rules(
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"^decoder\.conv_out\.time_mix_conv\.", "decoder.time_conv_out."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)
_SINGLE_LAYERS = _rules(
    (r"attentions\.0\.norm\.", "attentions.0.group_norm."),
    (r"attentions\.0\.([qkv])\.", r"attentions.0.to_\1."),
    (r"attentions\.0\.proj_out\.", "attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"resnets\.(\d+)\.time_stack\.in_layers\.0\.", r"temporals.\1.0.norm1."),
    (r"resnets\.(\d+)\.time_stack\.in_layers\.2\.", r"temporals.\1.0.conv1."),
    (r"resnets\.(\d+)\.time_stack\.out_layers\.0\.", r"temporals.\1.0.norm2."),
    (r"resnets\.(\d+)\.time_stack\.out_layers\.3\.", r"temporals.\1.0.conv2."),
    (r"resnets\.(\d+)\.mix_factor$", r"temporals.\1.0.mix_factor"),
)
_PROJECTION = re.compile(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")


def _rename(key: str, rules: Rules) -> str:
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
    return _rename(key, _TO_OURS)


def our_shape(name: str, shape: Shape) -> Shape:
    """The shape of a parameter under our name: 1x1 convolutions of attention are linear here."""
    if _PROJECTION.search(name) and len(shape) == 4 and shape[2:] == (1, 1):
        return shape[:2]
    return shape


def read_config(config: Mapping[str, Any]) -> TemporalVAEConfig:
    """Our configuration for one of diffusers', whose values are not trusted.

    Raises `ValueError` as `from_diffusers`.
    """
    by_options = IMAGE_CLASS if "up_block_types" in config else SVD_CLASS
    name = config.get("_class_name", by_options)
    if name not in (IMAGE_CLASS, SVD_CLASS):
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
    for option, value in config.items():
        if option.startswith("_") or option in known:
            continue
        if option not in fixed and value is not None:
            raise ValueError(f"{name} has an option unknown here: {option}={value!r}")
        wanted = fixed.get(option)
        same = value == wanted
        if option.endswith("_block_types") and isinstance(value, (list, tuple)):
            same = all(kind == wanted for kind in value)
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
    rules = _QUANT_TO_DIFFUSERS if image else _TO_SVD
    return theirs | options, {_rename(key, rules): tensor for key, tensor in state.items()}


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


# ---------------------------------------------------------------------------------------------
# Single files

_FIRST_STAGE = "first_stage_model."
_TRAINING = ("loss.", "model_ema.")
"""What a training run of the VAE leaves in its file beside it."""
_SDXL = ("conditioner.embedders.0.model.", "conditioner.embedders.1.model.")
_LABELLED = "model.diffusion_model.label_emb."
_SD3 = "model.diffusion_model.joint_blocks."


def read_single_file(
    shapes: Mapping[str, Shape], given: Container[str] = ()
) -> tuple[TemporalVAEConfig, dict[str, str]]:
    """(our configuration, {their key: our name}) for the VAE in a file of CompVis or Stability.

    `shapes` are all tensors in the file; what belongs to other models than the VAE is left out. A
    VAE alone in its file does not tell its latent scale: unless it is in `given`, the best known
    one is taken, with a warning.

    Raises `ValueError` when there is no such VAE in the file.
    """
    prefix = _FIRST_STAGE if any(key.startswith(_FIRST_STAGE) for key in shapes) else ""
    keys = {
        key: key.removeprefix(prefix)
        for key in shapes
        if key.startswith(prefix) and not key.removeprefix(prefix).startswith(_TRAINING)
    }
    levels = len({key.split(".")[2] for key in keys.values() if key.startswith("encoder.down.")})
    if not levels:
        raise ValueError(
            "no encoder.down.* or first_stage_model.encoder.down.* in it: a single file must have "
            "the keys of CompVis' or Stability's own code; for a folder of diffusers or of ours, "
            "which has a config.json, name the folder"
        )
    names = {key: _single_name(bare, levels) for key, bare in keys.items()}
    config = _infer({name: shapes[key] for key, name in names.items()}, levels)
    others = bool(prefix) and any(not key.startswith(prefix) for key in shapes)
    scale, shift, sure = _scale(config, shapes, others)
    asked = {"latent_scale_factor"} | ({"latent_shift_factor"} if shift else set())
    if not sure and not all(name in given for name in asked):
        warnings.warn(
            f"the file does not say its latent scale: {scale} (shift {shift}) is taken; SDXL has "
            f"0.13025, SD3 1.5305 (shift 0.0609): give {' and '.join(sorted(asked))} to choose",
            stacklevel=5,
        )
    return replace(config, latent_scale_factor=scale, latent_shift_factor=shift), names


def _single_name(key: str, levels: int) -> str:
    name = _rename(_rename(key, _SINGLE_PLACES), _SINGLE_LAYERS)
    return re.sub(
        r"^decoder\.up_blocks\.(\d+)\.",
        lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}.",
        name,
    )


def _infer(shapes: Mapping[str, Shape], levels: int) -> TemporalVAEConfig:
    """The configuration that has tensors of these shapes, under our names."""

    def size(name: str, axis: int) -> int:
        shape = shapes.get(name, ())
        if len(shape) <= axis:
            raise ValueError(f"the VAE in it is not whole: {name} is missing or misshapen")
        return shape[axis]

    first = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    widths = [size(first.format(level), 0) for level in range(levels)]
    block = re.compile(r"^encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight$")
    temporal = "decoder.mid_block.temporals.0.0.conv1.weight"
    if min(widths) < 1:
        raise ValueError(f"the VAE in it has levels of {widths} channels")
    base = math.gcd(*widths)
    return replace(
        TemporalVAEConfig.svd() if temporal in shapes else TemporalVAEConfig(),
        input_channels=size("encoder.conv_in.weight", 1),
        latent_channels=size("decoder.conv_in.weight", 1),
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_temporal_layers=int(temporal in shapes),
        temporal_kernel_size=size(temporal, 2) if temporal in shapes else 3,
        blocks_per_level=sum(1 for name in shapes if block.match(name)),
        norm_groups=32,  # their code knows no other number
        quant_conv="encoder.quant_conv.weight" in shapes,
        post_quant_conv="decoder.post_quant_conv.weight" in shapes,
        time_conv_out="decoder.time_conv_out.weight" in shapes,
    )


def _scale(
    config: TemporalVAEConfig, keys: Mapping[str, Shape], whole: bool
) -> tuple[float, float, bool]:
    """(scale, shift, whether that is certain) of a latent, by the models that share the file."""
    if config.latent_channels == 16:
        sd3 = any(key.startswith(_SD3) for key in keys)
        return (1.5305, 0.0609, True) if sd3 else (0.3611, 0.1159, False)
    if any(key.startswith(_SDXL) for key in keys):
        return 0.13025, 0.0, True
    if not config.num_temporal_layers and any(key.startswith(_LABELLED) for key in keys):
        return 0.13025, 0.0, False  # SDXL's denoiser, as likely as not
    known = config.latent_channels == 4
    return 0.18215, 0.0, known and (whole or config.num_temporal_layers > 0)
