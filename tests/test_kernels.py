"""Fused operations against their plain references."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_vae.network.framewise import Upsample
from temporal_vae.network.kernels.conv import conv2d
from temporal_vae.network.kernels.doubled import doubled_conv2d, repeated
from temporal_vae.network.kernels.norm import group_norm, group_norm_reference

SHAPES = [
    (2, 8, 6, 5),
    (1, 32, 64, 64),
    (3, 64, 1, 1),
    (2, 4, 130, 131),
    (1, 128, 1, 9000),
    (2, 1, 5, 7),
]


def rms(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).square().mean().sqrt())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_norm_is_as_exact_as_torchs_contiguous_one(
    shape: tuple[int, ...], offset: float, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_exact(shape, offset)
    finally:
        torch.set_num_threads(before)


def assert_exact(shape: tuple[int, ...], offset: float) -> None:
    torch.manual_seed(0)
    groups = max(1, shape[1] // 4)
    x = torch.randn(shape) + offset * torch.randn(1, shape[1], 1, 1)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    exact = group_norm_reference(x.double(), groups, weight.double(), bias.double(), 1e-6)
    last = x.contiguous(memory_format=torch.channels_last)
    y = group_norm(last, groups, weight, bias, 1e-6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    contiguous = rms(group_norm_reference(x, groups, weight, bias, 1e-6), exact)
    assert rms(y, exact) <= 3 * contiguous + 1e-7


def test_torchs_channels_last_one_is_not() -> None:
    """Why the kernel exists; when this fails, torch has been mended and the kernel may go."""
    torch.manual_seed(0)
    x = torch.randn(1, 64, 128, 128) + 5
    one, zero = torch.ones(64), torch.zeros(64)
    exact = group_norm_reference(x.double(), 16, one.double(), zero.double(), 1e-6)
    last = x.contiguous(memory_format=torch.channels_last)
    theirs = rms(group_norm_reference(last, 16, one, zero, 1e-6), exact)
    assert theirs > 5 * rms(group_norm(last, 16, one, zero, 1e-6), exact)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
@pytest.mark.parametrize("channels", [512, 600])
def test_wide_convolutions_are_more_exact_than_torchs(
    channels: int, stride: int, padding: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, channels, 9, 8).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(16, channels, 3, 3) / 60, torch.randn(16)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    ours, theirs = (
        conv2d(x, weight, bias, stride, padding),
        F.conv2d(x, weight, bias, stride, padding),
    )
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert rms(ours, exact) < 2e-6 and rms(ours, exact) <= 1.05 * rms(theirs, exact)


FROZEN = """
import torch
from temporal_vae import TemporalVAE
torch.manual_seed(0)
for options in ({}, {"temporal_norm": "clip", "clip_frames": 2, "temporal_encoder": False}):
    for part in ("norm", "temporals", "decoder.conv_norm_out"):
        model = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), seed=0, **options)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        video = torch.rand(1, 3, 2, 8, 8)
        grads = []
        for frozen in (False, True):
            for name, p in model.named_parameters():
                p.grad = None
                p.requires_grad_(not frozen or part in name)
            model(video, sample_posterior=False)[0].square().mean().backward()
            grads.append([p.grad for n, p in model.named_parameters() if part in n])
        for a, b in zip(*grads, strict=True):
            if a is not None:  # behind the posterior mean the log-variance has none
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
print("sound")
"""


FRAMES = [(1, 8, 1, 1), (2, 8, 5, 7), (3, 16, 12, 9), (1, 520, 12, 12)]


@pytest.mark.parametrize("shape", FRAMES, ids=str)
def test_a_convolution_of_repeated_pixels(shape: tuple[int, ...]) -> None:
    """Values and gradients are those of the pixels laid out, and nearer to the exact ones."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(6, shape[1], 3, 3) / 3 / shape[1] ** 0.5
    bias = torch.randn(6)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(repeated(x), weight, bias, padding=1)

    exact = plain(*(v.double() for v in (x, weight, bias)))
    ours, last = (
        doubled_conv2d(x.double(), weight.double(), bias.double()),
        x.contiguous(memory_format=torch.channels_last),
    )
    assert (ours - exact).abs().max() < 1e-13
    y = doubled_conv2d(last, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert rms(y, exact) <= 1.2 * rms(plain(last, weight, bias), exact)
    wanted = [v.double().requires_grad_() for v in (x, weight, bias)]
    found = [doubled_conv2d(*wanted), plain(*wanted)]
    assert torch.equal(found[0], ours) or (found[0] - ours).abs().max() < 1e-13
    seen = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(z, wanted, seen) for z in found), strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1, float(b.abs().max()))


def test_the_shape_of_pixels_that_stay_unseen() -> None:
    """A hook on the convolution, or a module around it, gets the frame with its pixels laid out."""
    layer, x = Upsample(8), torch.randn(1, 8, 16, 16)
    quiet, sizes = layer.frames(x), list[torch.Size]()
    layer.conv.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    assert (layer.frames(x) - quiet).abs().max() < 1e-5
    assert sizes == [(1, 8, 32, 32)]


def test_training_part_of_a_model() -> None:
    """Frozen layers in front of a trained norm crashed the process; so this runs in its own."""
    result = subprocess.run([sys.executable, "-c", FROZEN], capture_output=True, text=True)
    assert result.stdout == "sound\n", (result.returncode, result.stderr)


def test_gradients_go_through_the_reference() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(8), torch.randn(8)
    group_norm(x, 2, weight, bias, 1e-6).square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_a_gpu_keeps_the_order_of_memory() -> None:
    """Its kernel gives the other one, as does this stand-in for one."""
    x = torch.empty(2, 8, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    weight = bias = torch.empty(8, device="meta")
    y = group_norm(x, 2, weight, bias, 1e-6)
    assert y.is_contiguous(memory_format=torch.channels_last)
