"""Temporal-aware variational autoencoders for video diffusion."""

from temporal_vae.adapters.diffusers import to_diffusers, upgrade
from temporal_vae.config import TemporalVAEConfig
from temporal_vae.files.streams import CheckpointError
from temporal_vae.latents import (
    LatentDistribution,
    LatentFile,
    LatentFileError,
    LatentInfo,
    ModelRecord,
    read_latents,
    write_latents,
)
from temporal_vae.latents.latent_channels import ChannelImportance
from temporal_vae.metadata import ModelMetadata
from temporal_vae.model import TemporalVAE
from temporal_vae.video import VideoInfo, load_video, save_video
from temporal_vae.walks.plan import Plan

__all__ = [
    "ChannelImportance",
    "CheckpointError",
    "LatentDistribution",
    "LatentFile",
    "LatentFileError",
    "LatentInfo",
    "ModelMetadata",
    "ModelRecord",
    "Plan",
    "TemporalVAE",
    "TemporalVAEConfig",
    "VideoInfo",
    "load_video",
    "read_latents",
    "save_video",
    "to_diffusers",
    "upgrade",
    "write_latents",
]


def __getattr__(name: str):  # type: ignore[no-untyped-def]
    # A saved pipeline names its VAE as ["temporal_vae", "DiffusersTemporalVAE"]; diffusers looks
    # that up here, and beside it the base class that says how to load it. Neither is imported
    # before.
    if name in ("DiffusersTemporalVAE", "ModelMixin"):
        from temporal_vae.adapters import drop_in

        return getattr(drop_in, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
