"""Temporal-aware variational autoencoders for video diffusion."""

from temporal_vae.config import TemporalVAEConfig
from temporal_vae.latents import LatentDistribution
from temporal_vae.model import TemporalVAE
from temporal_vae.walks.plan import Plan

__all__ = ["LatentDistribution", "Plan", "TemporalVAE", "TemporalVAEConfig"]
