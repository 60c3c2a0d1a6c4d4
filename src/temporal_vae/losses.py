"""Loss terms: pure functions of tensors, each a scalar."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

KL_WEIGHT = 1e-4
"""Of the KL divergence in nats per number of the latent, beside a mean squared error over pixels in
[-1, 1]: light, as latent diffusion wants it (Rombach et al. 2022, arXiv 2112.10752)."""


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of squared differences over every element.

    Raises `ValueError` for shapes that differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have one shape, got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
    return (prediction - target).square().mean()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats: summed over a sample, mean over samples.

    In float32 at least, since the sum over a clip soon leaves float16.
    Raises `ValueError` for shapes that differ.
    Source: Kingma and Welling 2014, arXiv 1312.6114, appendix B.
    """
    return _divergences(mean, log_variance).flatten(1).sum(1).mean()


def kl_per_channel(mean: Tensor, log_variance: Tensor) -> Tensor:
    """The same divergence of each latent channel, (L,), in nats on the mean of all cells.

    Raises `ValueError` for shapes that differ.
    """
    return _divergences(mean, log_variance).transpose(0, 1).flatten(1).mean(1)


def _divergences(mean: Tensor, log_variance: Tensor) -> Tensor:
    if mean.shape != log_variance.shape:
        raise ValueError(
            f"mean and log_variance must have one shape, got {tuple(mean.shape)} and "
            f"{tuple(log_variance.shape)}"
        )
    wide = torch.promote_types(mean.dtype, torch.float32)
    mean, log_variance = mean.to(wide), log_variance.to(wide)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def loss_name(loss: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """What a loss is called, module and all; None for the mean squared error."""
    if loss is mean_squared_error:
        return None
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"
