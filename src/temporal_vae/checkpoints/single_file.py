"""Single files with the keys of CompVis' and Stability's code."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Container, Mapping
from dataclasses import replace

from temporal_vae.checkpoints.diffusers_names import (
    QUANT_TO_OURS,
    Shape,
    rename_layer,
    rename_rules,
)
from temporal_vae.config import TemporalVAEConfig

_SINGLE_PLACES = QUANT_TO_OURS + rename_rules(
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
_SINGLE_LAYERS = rename_rules(
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
    name = rename_layer(rename_layer(key, _SINGLE_PLACES), _SINGLE_LAYERS)
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
