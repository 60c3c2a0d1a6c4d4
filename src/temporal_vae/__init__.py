"""Temporal-aware variational autoencoders for video diffusion.

Importing the package takes milliseconds: each public name, and torch with it, is imported when it
is first used.
"""

import importlib
import importlib.util
import typing

if typing.TYPE_CHECKING:
    from temporal_vae.adapters.diffusers import to_diffusers, upgrade
    from temporal_vae.config import TemporalVAEConfig, WanVAEConfig
    from temporal_vae.dataset.latents import EqualShapes, LatentDataset
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
    "EqualShapes",
    "LatentDataset",
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
    "WanVAEConfig",
    "load_video",
    "read_latents",
    "save_video",
    "to_diffusers",
    "upgrade",
    "write_latents",
]

_NAMES_BY_MODULE = {
    "adapters.diffusers": ("to_diffusers", "upgrade"),
    # A saved pipeline names its VAE as ["temporal_vae", "DiffusersTemporalVAE"]; diffusers looks
    # that up here, and beside it the base class that says how to load it.
    "adapters.drop_in": ("DiffusersTemporalVAE", "DiffusersWanVAE", "ModelMixin"),
    "config": ("TemporalVAEConfig", "WanVAEConfig"),
    "dataset.latents": ("EqualShapes", "LatentDataset"),
    "files.streams": ("CheckpointError",),
    "latents": (
        "LatentDistribution", "LatentFile", "LatentFileError", "LatentInfo", "ModelRecord",
        "read_latents", "write_latents",
    ),
    "latents.latent_channels": ("ChannelImportance",),
    "metadata": ("ModelMetadata",),
    "model": ("TemporalVAE",),
    "video": ("VideoInfo", "load_video", "save_video"),
    "walks.plan": ("Plan",),
}  # fmt: skip


def __getattr__(name: str) -> typing.Any:
    """A public name or a module, which is imported at the first use."""
    for module, names in _NAMES_BY_MODULE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
