"""Which latent channels carry something: measured, by what they say and by what the picture loses.

A channel is masked by what the prior expects of it: a mean of 0. Sources: the KL divergence for
each channel is the rate that it costs (Kingma and Welling 2014, arXiv 1312.6114); active units are
those whose posterior mean moves with the data (Burda, Grosse and Salakhutdinov 2016, arXiv
1509.00519).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from temporal_vae import losses
from temporal_vae.latents import LatentDistribution

ACTIVE_VARIANCE = 0.01
"""Variance of the posterior mean above which a unit counts as active (Burda et al. 2016)."""


class ChannelImportance(NamedTuple):
    """How much one latent channel matters."""

    share: float
    """Of the importance of all channels, which add up to 1: by KL if there was data, else by the
    decoder's first weights."""
    kl: float | None
    """Nats that the channel carries in each latent cell, on the mean of the data."""
    decibels: float | None
    """PSNR that the reconstruction of the data loses when the channel is masked; below 0 where
    masking would help."""


def check_indices(indices: Iterable[int], channels: int) -> tuple[int, ...]:
    """Latent channels in rising order.

    Raises `ValueError` for none, for duplicates, and for what is no channel.
    """
    try:
        found = [index(i) for i in indices]
    except TypeError as error:
        raise ValueError(f"latent channels must be whole numbers, got {indices!r}") from error
    if not found:
        raise ValueError("at least one latent channel must stay active, got none")
    if len(set(found)) < len(found):
        raise ValueError(f"each latent channel may be named once, got {found}")
    if outside := [i for i in found if not 0 <= i < channels]:
        raise ValueError(f"latent channels are 0 to {channels - 1}, got {outside}")
    return tuple(sorted(found))


def index(i: object) -> int:
    """A whole number. Raises `TypeError` for anything else, True and False included."""
    if isinstance(i, bool):
        raise TypeError(f"a latent channel is a whole number, got {i!r}")
    return operator.index(i)  # type: ignore[arg-type]


def mask(x: Tensor, active: tuple[int, ...]) -> Tensor:
    """x (B, L, ...) with zeros in all channels but the active ones, in memory of its own."""
    keep = torch.zeros(x.shape[1], dtype=torch.bool)
    keep[list(active)] = True
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return x.masked_fill(~keep.to(x.device).view(shape), 0.0)


def measure(
    clips: Iterable[Tensor],
    encode: Callable[[Tensor], LatentDistribution],
    decode: Callable[[Tensor], Tensor],
    channels: int,
) -> dict[str, ChannelImportance]:
    """Importance of each channel on clips (B, C, T, H, W) of pixels, each clip weighing alike.

    Raises `ValueError` when there is no clip.
    """
    kl = torch.zeros(channels, dtype=torch.float64)
    lost = torch.zeros(channels, dtype=torch.float64)
    count = 0
    for clip in clips:
        mean, log_variance = encode(clip)
        kl += losses.kl_per_channel(mean, log_variance).double().cpu()
        whole = _decibels(decode(mean), clip)
        for channel in range(channels):
            others = tuple(c for c in range(channels) if c != channel)
            lost[channel] += whole - _decibels(decode(mask(mean, others)), clip)
        count += 1
    if not count:
        raise ValueError("there is no clip in the data to measure importance on")
    kl, lost = kl / count, lost / count
    return _named(kl, kl.tolist(), lost.tolist())


def by_weights(first: Tensor, before: Tensor | None) -> dict[str, ChannelImportance]:
    """Importance by the decoder's first convolution (C, L, k, k), behind a 1x1 one or not.

    The norm of the weights that a channel meets: what it could do, not what it does.
    """
    weight = first.detach().double().flatten(2)  # (C, L, k * k)
    if before is not None:
        weight = torch.einsum("cmk,ml->clk", weight, before.detach().double().flatten(1))
    norms = weight.square().sum((0, 2)).sqrt().cpu()
    unmeasured = [None] * len(norms)
    return _named(norms, unmeasured, unmeasured)


def active_units(
    clips: Iterable[Tensor], encode: Callable[[Tensor], LatentDistribution], threshold: float
) -> list[int]:
    """Channels whose posterior mean varies over the clips, their cells included, above `threshold`.

    Raises `ValueError` when there is no clip.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for clip in clips:
        mean = encode(clip).mean.double().cpu().transpose(0, 1).flatten(1)  # (L, cells)
        count += mean.shape[1]
        total = total + mean.sum(1)
        squares = squares + mean.square().sum(1)
    if not count:
        raise ValueError("there is no clip in the data to find active channels on")
    variance = squares / count - (total / count).square()
    return [channel for channel, v in enumerate(variance.tolist()) if v > threshold]


def _named(
    weights: Tensor, kl: list[float] | list[None], lost: list[float] | list[None]
) -> dict[str, ChannelImportance]:
    total = float(weights.sum())
    shares = (weights / total if total else torch.full_like(weights, 1 / len(weights))).tolist()
    values = zip(shares, kl, lost, strict=True)
    return {f"channel_{i}": ChannelImportance(*value) for i, value in enumerate(values)}


def _decibels(picture: Tensor, clip: Tensor) -> float:
    """PSNR over the range of pixels, [-1, 1]."""
    error = float((picture.clamp(-1, 1).double() - clip.double()).square().mean())
    return 10 * float(torch.tensor(4 / max(error, 1e-12), dtype=torch.float64).log10())
