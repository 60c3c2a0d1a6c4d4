"""Fused operations against their plain references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from temporal_vae.kernels.norm import group_norm, group_norm_reference

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


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_norm_is_as_exact_as_torchs_contiguous_one(
    shape: tuple[int, ...], offset: float
) -> None:
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


def test_gradients_go_through_the_reference() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(8), torch.randn(8)
    group_norm(x, 2, weight, bias, 1e-6).square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
