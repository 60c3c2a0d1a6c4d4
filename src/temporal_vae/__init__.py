"""Temporal-aware variational autoencoders for video diffusion."""

from temporal_vae.config import TemporalVAEConfig
from temporal_vae.latents import LatentDistribution
from temporal_vae.model import TemporalVAE

__all__ = ["LatentDistribution", "TemporalVAE", "TemporalVAEConfig"]
