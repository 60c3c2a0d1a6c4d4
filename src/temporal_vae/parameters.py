"""All parameters of a model as one flat vector, in the order of `named_parameters`, and back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def gather(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Every value, (N,), in memory of its own and without a gradient's history."""
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def check(
    vector: Tensor, parameters: Iterable[nn.Parameter], name: str, *, way_out: str | None = None
) -> Tensor:
    """`vector` (N,) as `gather` gives: on the device of the parameters, in the dtype of each.

    Raises `ValueError` unless it is flat, as long as they have numbers, and floating point; and
    for values that are not finite in their dtype, if there is a `way_out` to name.
    """
    like = list(parameters)
    count = sum(p.numel() for p in like)
    if not isinstance(vector, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(vector).__name__}")
    if vector.shape != (count,):
        raise ValueError(
            f"{name} must be one flat vector of {count} numbers, as many as the model has "
            f"parameters, got {tuple(vector.shape)}"
        )
    if not vector.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {vector.dtype}: convert it first")
    pieces = vector.detach().to(like[0].device).split([p.numel() for p in like])
    converted = torch.cat([piece.to(p.dtype) for piece, p in zip(pieces, like, strict=True)])
    if way_out and (bad := int((~converted.isfinite()).sum())):
        raise ValueError(
            f"{name} has {bad} of {count} numbers that are not finite in {converted.dtype}: "
            f"{way_out}"
        )
    return converted


@torch.no_grad()
def scatter(vector: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Write a checked vector into the parameters, which stay the objects they are."""
    start = 0
    for p in parameters:
        p.copy_(vector[start : start + p.numel()].view(p.shape))
        start += p.numel()


@torch.no_grad()
def descend(vector: Tensor, parameters: Iterable[nn.Parameter], rate: float) -> None:
    """parameter - rate * vector, in place."""
    start = 0
    for p in parameters:
        p.sub_(vector[start : start + p.numel()].view(p.shape), alpha=rate)
        start += p.numel()


def sanitised(vector: Tensor, current: Tensor) -> Tensor:
    """A checked vector with `current` where it is not finite."""
    return torch.where(vector.isfinite(), vector, current)


@contextlib.contextmanager
def recording(input: Tensor, target: Any) -> Iterator[tuple[Tensor, Any]]:
    """Gradients on, whatever surrounds; tensors made in inference mode as ones that may be kept."""
    with torch.inference_mode(False), torch.enable_grad():
        x, y = (
            v.clone() if isinstance(v, Tensor) and v.is_inference() else v for v in (input, target)
        )
        yield x, x if target is None else y


def check_learning_rate(rate: float) -> None:
    """Raise `ValueError` for a learning rate that is not a finite number above 0."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise ValueError(f"learning_rate must be a finite number above 0, got {rate!r}")


def gradients(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """The gradient of a scalar for all parameters, (N,); `.grad` is not touched.

    Zeros for parameters that are frozen, or have no part in the loss.
    """
    every = list(parameters)
    wanted = [p for p in every if p.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if wanted and loss.requires_grad:
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    by_parameter = dict(zip(wanted, found, strict=True))
    parts = ((p, by_parameter.get(p)) for p in every)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in parts]
    )
