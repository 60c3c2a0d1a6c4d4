"""`ModelMetadata`: a description of a model in plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from torch import nn

from temporal_vae.config import VAEConfig, WanVAEConfig
from temporal_vae.latents import ModelRecord, weights_sha256
from temporal_vae.network.lines import AnyDecoder, AnyEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMetadata:
    """A description of a model; `to_dict` gives it ready for JSON."""

    name: str
    """Name of the class."""
    version: str
    """Of this library."""
    config: VAEConfig
    parameter_count: int
    parameters: Mapping[str, int]
    """Number of parameters by part: "encoder_spatial", "encoder_temporal", "decoder_spatial",
    "decoder_temporal". They add up to `parameter_count`; layers that see time and space at once are
    temporal."""
    encode_reach: int | None
    """Frames back (and ahead too, unless the model is causal) that a latent frame depends on; None
    for the whole clip."""
    decode_reach: int | None
    """The same for a frame, in latent frames."""
    encode_delay: int | None
    """Frames by which latents come late in a stream; None for a model that cannot stream."""
    decode_delay: int | None
    """The same for frames, in latent frames."""
    active_features: tuple[int, ...]
    """Latent channels that are not masked."""
    dtype: str
    """Of the weights, such as "float32"."""
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = asdict(self) | {"config": self.config.to_dict()}
        return values | {"active_features": list(self.active_features)}


def describe(
    name: str, encoder: AnyEncoder, decoder: AnyDecoder, active_features: tuple[int, ...]
) -> ModelMetadata:
    """The metadata of a model with this encoder and decoder."""
    parts = {}
    for half, stack in (("encoder", encoder), ("decoder", decoder)):
        temporal = sum(_count(layer) for layer in stack.layers() if layer.tails())
        parts[f"{half}_spatial"] = _count(stack) - temporal
        parts[f"{half}_temporal"] = temporal
    encode_reach, encode_delay = encoder.reach or (None, None)
    decode_reach, decode_delay = decoder.reach or (None, None)
    weight = encoder.conv_in.weight
    return ModelMetadata(
        name=name,
        version=version("temporal-video-vae"),
        config=encoder.config,
        parameter_count=sum(parts.values()),
        parameters=parts,
        encode_reach=encode_reach,
        decode_reach=decode_reach,
        encode_delay=encode_delay,
        decode_delay=decode_delay,
        active_features=active_features,
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
    )


def record(name: str | None, encoder: AnyEncoder, decoder: AnyDecoder) -> ModelRecord:
    """What a file of latents records of a model with these two lines."""
    config = encoder.config
    encoder_sha256, decoder_sha256 = (
        weights_sha256(line.named_parameters(), f"{half} {_structure(line)}")
        for half, line in (("encoder", encoder), ("decoder", decoder))
    )
    return ModelRecord(
        name=name,
        downsample_factor=config.downsample_factor,
        frames_per_latent=config.frames_per_latent,
        encoder_sha256=encoder_sha256,
        decoder_sha256=decoder_sha256,
        **_scale(config),
    )


def _structure(line: AnyEncoder | AnyDecoder) -> str:
    """What names and shapes of parameters do not tell of a line, as docs/formats.md says."""
    config = line.config
    if isinstance(config, WanVAEConfig):
        return f"patch_size={config.patch_size}"
    groups = ",".join(str(config.groups(width)) for width in config.widths)
    structure = f"norm_groups={groups}"
    if any(layer.tails() for layer in line.layers()):
        structure += f" causal={config.causal_mode} temporal_norm={config.temporal_norm}"
    return structure


def _scale(config: VAEConfig) -> dict[str, Any]:
    """The fields of a `ModelRecord` that say how latents are scaled."""
    if not isinstance(config, WanVAEConfig):
        return {
            "scale_factor": config.latent_scale_factor, "shift_factor": config.latent_shift_factor,
        }  # fmt: skip
    if config.latent_mean is config.latent_std is None:
        return {"scale_factor": 1.0, "shift_factor": 0.0}
    channels = config.latent_channels
    return {
        "latent_mean": config.latent_mean or (0.0,) * channels,
        "latent_std": config.latent_std or (1.0,) * channels,
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
