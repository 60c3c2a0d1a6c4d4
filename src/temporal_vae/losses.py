"""Loss terms: pure functions of tensors, each a scalar."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of squared differences over every element."""
    return (prediction - target).square().mean()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats: summed over a sample, mean over samples.

    Raises `ValueError` for shapes that differ.
    Source: Kingma and Welling 2014, arXiv 1312.6114, appendix B.
    """
    if mean.shape != log_variance.shape:
        raise ValueError(
            f"mean and log_variance must have one shape, got {tuple(mean.shape)} and "
            f"{tuple(log_variance.shape)}"
        )
    terms = mean.square() + log_variance.exp() - 1 - log_variance
    return 0.5 * terms.flatten(1).sum(1).mean()


def loss_name(loss: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """What a loss is called, module and all; None for the mean squared error."""
    if loss is mean_squared_error:
        return None
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"
