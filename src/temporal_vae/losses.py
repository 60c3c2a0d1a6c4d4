"""Loss terms: pure functions of tensors, each a scalar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LossFunction = Callable[[Tensor, Tensor], Tensor]

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


def callable_loss(loss: LossFunction | None) -> LossFunction:
    """A loss, the mean squared error for None. Raises `ValueError` for what cannot be called."""
    if loss is not None and not callable(loss):
        raise ValueError(
            f"loss_function must be callable as (prediction, target) -> scalar, got {loss!r}"
        )
    return loss or mean_squared_error


def loss_name(loss: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """What a loss is called, module and all; None for the mean squared error."""
    if loss is mean_squared_error:
        return None
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def scalar_loss(value: object) -> Tensor:
    """What a loss gave, if it is a loss."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"a loss must give a scalar tensor, got {what}: take its mean")
    return value.reshape(())


def vae_terms(
    loss: LossFunction, prediction: Tensor, target: Tensor, mean: Tensor, log_variance: Tensor
) -> dict[str, Tensor]:
    """The loss of a VAE: "reconstruction", "kl" (weighted by `KL_WEIGHT`) and "loss", their sum.

    The KL divergence counts in nats per number of the latent.
    """
    reconstruction = scalar_loss(loss(prediction, target))
    kl = KL_WEIGHT * kl_divergence(mean, log_variance) / mean[0].numel()
    return {"reconstruction": reconstruction, "kl": kl, "loss": reconstruction + kl}


def finite_values(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """The terms as numbers. Raises `ValueError` if "loss" is not finite."""
    found = {name: float(value.detach()) for name, value in terms.items()}
    if not math.isfinite(found["loss"]):
        raise ValueError(f"the loss must be finite to step down from, got {found}")
    return found


# Of reconstructions (B, C, T, H, W) in [-1, 1], for training --------------------------------------

LOG_FLOOR = 1e-3
"""Added to a frame's squared error before its log: a PSNR of 36 dB, beyond which a frame hardly
counts any more."""
COLOUR_FLOOR = 1e-4
"""The same for mean colours: 46 dB."""


def absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of absolute differences."""
    return (prediction - target).abs().mean()


def log_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over frames of the log of each frame's mean squared error.

    By the logarithm a decibel counts the same in every frame, easy or hard.
    """
    return _log_mean(prediction - target, LOG_FLOOR)


def log_colour_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The same for frames shrunk 8 times, where the error is that of mean colours.

    Without it a small model spends its few latent channels on edges, and turns green into brown.
    """
    difference = prediction - target
    return _log_mean(F.avg_pool3d(difference, (1, 8, 8)), COLOUR_FLOOR)


def log_temporal_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The same for differences of neighbouring frames: what flickers; 0 for single frames."""
    difference = prediction - target
    if difference.shape[2] == 1:
        return difference.sum() * 0
    return _log_mean(difference[:, :, 1:] - difference[:, :, :-1], LOG_FLOOR)


def _log_mean(difference: Tensor, floor: float) -> Tensor:
    return (difference.square().mean(dim=(1, 3, 4)) + floor).log().mean()
