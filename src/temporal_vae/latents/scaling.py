"""Latents as a diffusion model wants them: of about zero mean and unit variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from temporal_vae.config import VAEConfig, WanVAEConfig


def scale(latent: Tensor, config: VAEConfig, channel_axis: int = 1) -> Tensor:
    """(latent - shift) * scale, or (latent - mean) / deviation of each channel."""
    if isinstance(config, WanVAEConfig):
        mean, std = _of_channels(latent, config, channel_axis)
        return (latent - mean) / std
    return (latent - config.latent_shift_factor) * config.latent_scale_factor


def unscale(latent: Tensor, config: VAEConfig, channel_axis: int = 1) -> Tensor:
    """The inverse of `scale`."""
    if isinstance(config, WanVAEConfig):
        mean, std = _of_channels(latent, config, channel_axis)
        return latent * std + mean
    return latent / config.latent_scale_factor + config.latent_shift_factor


def scale_factor(config: VAEConfig) -> float:
    """The one multiplier of all channels. Raises `ValueError` where each has its own."""
    if isinstance(config, WanVAEConfig):
        raise ValueError(
            "this model scales each latent channel by a mean and a deviation of its own: use "
            "scale_latent and unscale_latent, or config.latent_mean and config.latent_std"
        )
    return config.latent_scale_factor


def deviation(config: VAEConfig, latent: Tensor) -> Tensor:
    """The deviation of a model's latents, as it multiplies a latent (B, L, T, h, w)."""
    if isinstance(config, WanVAEConfig):
        return _of_channels(latent, config, 1)[1]
    return latent.new_tensor(1 / config.latent_scale_factor)


def measured(config: VAEConfig, latents: Sequence[Tensor]) -> VAEConfig:
    """The configuration with the scale that brings these latents (B, L, T, h, w) to unit variance.

    One deviation for all channels, or mean and deviation of each, as the kind of model has it.
    """
    cells = torch.cat([latent.transpose(0, 1).flatten(1) for latent in latents], 1)
    if isinstance(config, WanVAEConfig):
        mean, std = (tuple(values.tolist()) for values in (cells.mean(1), cells.std(1)))
        return replace(config, latent_mean=mean, latent_std=std)
    return replace(config, latent_scale_factor=round(1 / float(cells.std()), 4))


def _of_channels(latent: Tensor, config: WanVAEConfig, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, as wide as they multiply a latent."""
    channels = config.latent_channels
    if latent.ndim not in (4, 5) or latent.shape[axis] != channels:
        raise ValueError(
            f"a latent of this model has {channels} channels on axis {axis}, got "
            f"{tuple(latent.shape)}"
        )
    shape = [channels if index == axis else 1 for index in range(latent.ndim)]
    dtype = latent.dtype if latent.dtype.is_floating_point else torch.float32
    mean, std = (
        torch.tensor(values or [neutral] * channels, dtype=dtype, device=latent.device).view(shape)
        for values, neutral in ((config.latent_mean, 0.0), (config.latent_std, 1.0))
    )
    return mean, std
