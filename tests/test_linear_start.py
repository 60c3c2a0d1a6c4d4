"""A new model of Wan's kind that begins as a linear autoencoder."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import difference

from temporal_vae import TemporalVAE, WanVAEConfig
from temporal_vae.evaluation.baseline import LinearBaseline
from temporal_vae.network.spacetime import CausalResidualBlock, FrameAttention
from temporal_vae.training import linear_start
from temporal_vae.training.build import without_branches
from temporal_vae.video import VideoReader, to_pixels

CONFIG = WanVAEConfig(base_channels=18, channel_multipliers=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def clips(real_clip: Path) -> torch.Tensor:
    """Squares of 9 frames from all over a real clip, (N, 3, 9, 64, 64)."""
    with VideoReader(real_clip, 320, 8, frames=108) as video:
        frames = np.stack([frame.image for frame in video])
    pixels = to_pixels(frames)
    parts = [
        pixels[:, :, first : first + 9, y : y + 64, x : x + 64]
        for first in (0, 54)
        for y in (0, 112)
        for x in (64, 240)
    ]
    return torch.cat(parts)


@pytest.fixture(scope="module")
def started(clips: torch.Tensor) -> TemporalVAE:
    """A small model, fitted."""
    model = TemporalVAE.from_config(CONFIG, seed=0)
    linear_start.start_linear(model, clips)
    return model


@pytest.fixture(scope="module")
def made(started: TemporalVAE, clips: torch.Tensor) -> torch.Tensor:
    """The clips, there and back."""
    return reconstructed(started, clips)


def psnr(video: torch.Tensor, made: torch.Tensor) -> float:
    """Decibels of values in [-1, 1]."""
    return 10 * math.log10(4 / float((video - made.clamp(-1, 1)).square().mean()))


def reconstructed(model: TemporalVAE, video: torch.Tensor) -> torch.Tensor:
    """There and back."""
    with torch.no_grad():
        return model.decode(model.encode(video, sample_mode=False))


def test_it_is_nearly_the_linear_baseline_of_as_many_numbers(
    made: torch.Tensor, clips: torch.Tensor
) -> None:
    frames = ((clips + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    baseline = LinearBaseline.fit([clip[1:] for clip in frames], 16, 4)
    theirs = torch.cat([to_pixels(baseline(clip[1:])) for clip in frames])
    mine, best = (psnr(clips[:, :, 1:], y) for y in (made[:, :, 1:], theirs))
    assert mine > best - 3.5
    blind = TemporalVAE.from_config(CONFIG, seed=0)
    assert mine > psnr(clips[:2], reconstructed(blind, clips[:2])) + 12


def test_a_first_frame_is_kept_as_well_as_later_ones(
    made: torch.Tensor, clips: torch.Tensor
) -> None:
    assert psnr(clips[:, :, :1], made[:, :, :1]) > psnr(clips[:, :, 1:], made[:, :, 1:]) - 2


def test_latents_have_deviation_one(started: TemporalVAE, clips: torch.Tensor) -> None:
    with torch.no_grad():
        latent = started.encode(clips, sample_mode=False).transpose(0, 1).flatten(1)
    assert float(latent.std(1).min()) > 0.5
    assert float(latent.std(1).max()) < 1.5
    assert float(latent.mean(1).abs().max()) < 0.5


def test_it_is_the_same_however_often_it_is_fitted(clips: torch.Tensor) -> None:
    one, two = (TemporalVAE.from_config(CONFIG, seed=0) for _ in range(2))
    for model in (one, two):
        linear_start.start_linear(model, clips[:3, :, :5])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_without_branches_it_computes_the_same_by_the_same_weights(
    started: TemporalVAE, clips: torch.Tensor
) -> None:
    twin = without_branches(started)
    assert {id(p) for p in twin.parameters()} < {id(p) for p in started.parameters()}
    assert not any(isinstance(m, CausalResidualBlock | FrameAttention) for m in twin.modules())
    for line in ("encoder", "decoder"):
        given = clips[:1] if line == "encoder" else torch.randn(1, 16, 3, 8, 8)
        with torch.no_grad():
            whole, bare = (getattr(model, line)(given) for model in (started, twin))
        assert difference(whole, bare) < 1e-5
    with torch.no_grad():
        started.decoder.conv_in.weight.add_(0.01)
        assert torch.equal(twin.decoder.conv_in.weight, started.decoder.conv_in.weight)
        started.decoder.conv_in.weight.sub_(0.01)


def test_time_is_halved_to_the_mean_of_two_frames() -> None:
    """In the first channels, and their difference can be had back from the others."""
    conv, x = torch.nn.Conv3d(2, 4, (3, 1, 1), (2, 1, 1)), torch.randn(3, 2, 9, 4, 4)
    assert conv.bias is not None
    with torch.no_grad():
        conv.bias.zero_()
        linear_start._halve_time(conv, x, torch.ones(2))
        given = conv(x)
    first, second = x[:, :, 1::2], x[:, :, 2::2]
    assert difference(given[:, :2], (first + second) / 2) < 1e-6
    parts = [part.movedim(1, 0).flatten(1).T.double() for part in (given[:, 2:], first - second)]
    constant = torch.ones(len(parts[0]), 1, dtype=torch.float64)
    known = torch.cat([parts[0], constant], 1)
    assert difference(known @ torch.linalg.lstsq(known, parts[1]).solution, parts[1]) < 1e-5


def test_branches_wake_up(started: TemporalVAE, clips: torch.Tensor) -> None:
    model = TemporalVAE.from_config(CONFIG, seed=0)
    model.load_state_dict(started.state_dict())
    model.decode(model.encode(clips[:1], sample_mode=False)).square().mean().backward()
    gradients = [
        block.conv2.weight.grad
        for block in model.modules()
        if isinstance(block, CausalResidualBlock)
    ]
    assert gradients
    assert all(g is not None and float(g.abs().max()) > 0 for g in gradients)


@pytest.mark.parametrize(
    "config",
    [WanVAEConfig.wan22(), replace(CONFIG, channel_multipliers=(1, 2, 4, 4))],
    ids=["Wan 2.2", "a last level no wider"],
)
def test_other_layouts_are_refused(config: WanVAEConfig) -> None:
    with torch.device("meta"):
        model = TemporalVAE.from_config(config)
    with pytest.raises(ValueError, match=r"model\.start = 'linear' is known for"):
        linear_start.start_linear(model, torch.zeros(1, 3, 5, 64, 64))
