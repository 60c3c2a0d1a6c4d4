"""The distribution over latents that an encoder gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class LatentDistribution(NamedTuple):
    """A diagonal Gaussian for each latent cell: `mean, log_variance = distribution`.

    Both have the shape of the latent, (B, L, T, h, w) for video and (B, L, h, w) for images.
    """

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> LatentDistribution:
        """Split an encoder's output (B, 2*L, ...); the log-variance is clamped to [-30, 20]."""
        mean, log_variance = moments.chunk(2, dim=1)
        # a view would keep all moments alive
        mean = mean.clone(memory_format=torch.contiguous_format)
        return cls(mean, log_variance.clamp(*LOG_VARIANCE_RANGE).contiguous())

    def mode(self) -> Tensor:
        """The most likely latent: the mean, as a tensor of its own."""
        return self.mean.clone()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + exp(log_variance / 2) * noise, differentiable in both.

        The noise is drawn on the CPU in float32, one draw a frame in the order of time, so it is
        the same for every device, dtype and way of cutting the clip.

        Raises `ValueError` for a generator on another device.
        """
        noise = draw_noise(self.mean.shape, generator).to(self.mean)
        return self.mean + torch.exp(0.5 * self.log_variance) * noise


def draw_noise(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of a latent's shape, (B, L, T, h, w) or (B, L, h, w); float32, CPU."""
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator is on {generator.device}, but latent noise is drawn on the CPU so that one "
            "seed gives the same latents on every device: use torch.Generator()"
        )
    if len(shape) == 4:
        return torch.randn(shape, generator=generator, dtype=torch.float32)
    frame = (shape[0], shape[1], *shape[3:])
    frames = [torch.randn(frame, generator=generator, dtype=torch.float32) for _ in range(shape[2])]
    return torch.stack(frames, dim=2)
