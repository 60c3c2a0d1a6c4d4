"""Law 6: SVD's checkpoint gives diffusers' numbers, both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import difference, redraw
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from temporal_vae import TemporalVAE, TemporalVAEConfig
from temporal_vae.checkpoints import diffusers_names
from temporal_vae.network import primitives
from temporal_vae.network.timewise import TemporalBlock


def theirs(widths: tuple[int, ...] = (32, 64), **options: Any) -> Any:
    """An awake `AutoencoderKLTemporalDecoder`, float64."""
    model = AutoencoderKLTemporalDecoder(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        layers_per_block=2,
        **options,
    )
    redraw(model.double())
    return model.eval()


def ours(model: Any) -> TemporalVAE:
    """Our model with the weights of theirs."""
    config, state = diffusers_names.from_diffusers(model.state_dict(), model.config)
    result = TemporalVAE.from_config(config).to(next(iter(state.values())).dtype)
    result.load_state_dict(state)
    return result


@torch.no_grad()
def their_numbers(model: Any, video: Tensor, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log-variance of a video, and the decoded latent, as (B, C, T, H, W)."""
    batch, frames = video.shape[0], video.shape[2]
    posterior = model.encode(video.transpose(1, 2).flatten(0, 1)).latent_dist
    svd = isinstance(model, AutoencoderKLTemporalDecoder)
    extra = {"num_frames": frames} if svd else {}
    decoded = model.decode(latent.transpose(1, 2).flatten(0, 1), **extra).sample
    mean, log_variance, pixels = (
        x.unflatten(0, (batch, frames)).transpose(1, 2)
        for x in (posterior.mean, posterior.logvar, decoded)
    )
    return mean, log_variance, pixels


@torch.no_grad()
def our_numbers(model: TemporalVAE, video: Tensor, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *model.encode_with_distribution(video), model.decode(latent)


def inputs(
    batch: int,
    frames: int,
    size: tuple[int, int],
    channels: int = 3,
    factor: int = 2,
    cells: int = 4,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    video = torch.rand(batch, channels, frames, *size, generator=generator).double() * 2 - 1
    cell = (size[0] // factor, size[1] // factor)
    return video, torch.randn(batch, cells, frames, *cell, generator=generator).double()


def worst(model: Any, mine: TemporalVAE, video: Tensor, latent: Tensor) -> float:
    pairs = zip(our_numbers(mine, video, latent), their_numbers(model, video, latent), strict=True)
    return max(difference(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("batch", "frames", "size"), [(1, 1, (8, 8)), (2, 5, (16, 24)), (1, 7, (2, 2)), (3, 2, (6, 10))]
)
def test_float64_numbers_are_diffusers(batch: int, frames: int, size: tuple[int, int]) -> None:
    model = theirs()
    assert worst(model, ours(model), *inputs(batch, frames, size)) < 1e-10


@pytest.mark.parametrize(
    ("widths", "options"),
    [
        ((32,), {}),
        ((64, 32, 96), {"latent_channels": 7, "scaling_factor": 0.5}),
        ((32, 64), {"in_channels": 1, "out_channels": 1}),
    ],
)
def test_other_layouts_too(widths: tuple[int, ...], options: dict[str, Any]) -> None:
    model = theirs(widths, **options)
    mine = ours(model)
    assert mine.config.widths == widths
    assert mine.latent_scale_factor == options.get("scaling_factor", 0.18215)
    given = inputs(
        1, 3, (16, 24), mine.input_channels, mine.downsample_factor, mine.latent_channels
    )
    assert worst(model, mine, *given) < 1e-10


def rms_errors(model: Any, mine: TemporalVAE, dtype: torch.dtype) -> list[tuple[float, float]]:
    """(ours, theirs) for mean, log-variance and pixels: RMS distance from float64."""
    factor = mine.downsample_factor
    video, latent = inputs(1, 4, (16 * factor, 16 * factor), factor=factor)
    exact = their_numbers(model, video, latent)
    video, latent = video.to(dtype), latent.to(dtype)
    a = our_numbers(mine.to(dtype), video, latent)
    b = their_numbers(model.to(dtype), video, latent)

    def rms(x: Tensor, y: Tensor) -> float:
        return float((x.double() - y).square().mean().sqrt())

    return [(rms(x, e), rms(y, e)) for x, y, e in zip(a, b, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_worse_than_diffusers(dtype: torch.dtype) -> None:
    model = theirs()
    for mine, other in rms_errors(model, ours(model), dtype):
        assert mine <= 1.5 * other


def test_the_way_back_gives_every_tensor_and_a_model_of_theirs() -> None:
    model = theirs()
    config, state = diffusers_names.from_diffusers(model.state_dict(), model.config)
    their_config, their_state = diffusers_names.to_diffusers(config, state)
    original = model.state_dict()
    assert their_state.keys() == original.keys()
    assert all(torch.equal(their_state[key], original[key]) for key in original)
    again = AutoencoderKLTemporalDecoder.from_config(their_config)
    again.load_state_dict(their_state)
    for key in ("block_out_channels", "latent_channels", "scaling_factor", "layers_per_block"):
        assert list_or_value(again.config[key]) == list_or_value(model.config[key])


def list_or_value(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.slow
def test_full_size() -> None:
    model = theirs((128, 256, 512, 512))
    mine = ours(model)
    assert mine.parameter_count == 97_742_847
    assert mine.config == TemporalVAEConfig.svd()
    assert worst(model, mine, *inputs(1, 3, (64, 96), factor=8)) < 1e-10
    for error, other in rms_errors(model, mine, torch.float32):
        assert error <= 1.5 * other


def test_law_6_sees_a_wrong_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "TEMPORAL_EPS", primitives.SPATIAL_EPS)
    model = theirs()
    assert worst(model, ours(model), *inputs(1, 3, (16, 16))) > 1e-10


def test_law_6_sees_a_norm_per_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    class PerFrame(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x.transpose(1, 2).flatten(0, 1))
            clip: Tensor = y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
            return clip

    model = theirs()
    mine = ours(model)
    block = next(m for m in mine.modules() if isinstance(m, TemporalBlock))
    broken = PerFrame(32, block.conv1.bias.numel(), eps=1e-5).double()
    broken.load_state_dict(block.norm1.state_dict())
    block.norm1 = broken
    assert worst(model, mine, *inputs(1, 3, (16, 16))) > 1e-3


def test_what_has_no_counterpart_is_refused() -> None:
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        diffusers_names.from_diffusers({}, {"_class_name": "AutoencoderTiny"})
    with pytest.raises(ValueError, match="layers_per_block must be 2"):
        diffusers_names.from_diffusers({}, {"layers_per_block": 3})
    with pytest.raises(ValueError, match="must be equal"):
        diffusers_names.from_diffusers(
            {}, {"layers_per_block": 2, "in_channels": 3, "out_channels": 4}
        )


def test_what_diffusers_cannot_express_is_named() -> None:
    config = replace(TemporalVAEConfig.svd(), norm_groups=16, latent_shift_factor=0.5)
    with pytest.raises(ValueError, match="norm_groups=16") as error:
        diffusers_names.to_diffusers(config, {})
    assert "latent_shift_factor=0.5" in str(error.value)
