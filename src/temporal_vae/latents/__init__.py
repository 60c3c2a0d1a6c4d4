"""Latents: the distribution that an encoder gives, and files of them (docs/formats.md)."""

from temporal_vae.files.safetensors import SUFFIX
from temporal_vae.latents.distribution import LOG_VARIANCE_RANGE, LatentDistribution, draw_noise
from temporal_vae.latents.identity import weights_sha256
from temporal_vae.latents.info import LatentFileError, LatentInfo, ModelRecord
from temporal_vae.latents.reading import LatentFile, holds_latents, read_latents
from temporal_vae.latents.statistics import LatentStatistics, latent_statistics
from temporal_vae.latents.writing import LatentWriter, check_target, record_fields, write_latents

__all__ = [
    "LOG_VARIANCE_RANGE",
    "SUFFIX",
    "LatentDistribution",
    "LatentFile",
    "LatentFileError",
    "LatentInfo",
    "LatentStatistics",
    "LatentWriter",
    "ModelRecord",
    "check_target",
    "draw_noise",
    "holds_latents",
    "latent_statistics",
    "read_latents",
    "record_fields",
    "weights_sha256",
    "write_latents",
]
