"""Quality on perturbed latents: what a decoder makes of what a diffusion model would hand to it.

A diffusion model's latents are not an encoder's: each frame has errors of its own. A decoder that
sees one frame at a time turns them into flicker, and one that sees its neighbours need not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from temporal_vae.evaluation.evaluate import as_clip
from temporal_vae.latents import scaling
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Uint8Frames, to_bytes

SHARES = (0.0, 0.1, 0.2, 0.4)
"""Shares of the latents' deviation at which decoders are compared."""


def perturbations(
    model: TemporalVAE, latents: Tensor, shares: Sequence[float], generator: torch.Generator
) -> list[Tensor]:
    """Unscaled latents (1, L, n, h, w) with noise, for each share of their deviation.

    The noise is Gaussian and drawn frame by frame, so that pieces of a clip get what the whole one
    does; its deviation is the share of 1 in each channel of scaled latents.
    """
    if not any(shares):
        return [latents] * len(shares)
    frame = latents.shape[1], *latents.shape[3:]
    drawn = [torch.randn(frame, generator=generator) for _ in range(latents.shape[2])]
    noise = torch.stack(drawn, 1)[None].to(latents)
    noise = noise * scaling.deviation(model.config, latents)
    return [latents + share * noise for share in shares]


@torch.no_grad()
def decoded_perturbed(
    model: TemporalVAE, frames: Uint8Frames, shares: Sequence[float] = SHARES, seed: int = 0
) -> list[Uint8Frames]:
    """Frames (T, H, W, 3) through the posterior's mean, noise and decoder, once for each share.

    The noise is Gaussian, independent in every element of every latent; its deviation is a share
    of the latents' own. All shares have the same noise, scaled; see `perturbations`.
    """
    count, height, width, _ = frames.shape
    latent = model.encode(as_clip(frames, model), sample_mode=False)
    noisy = perturbations(model, latent, shares, torch.Generator().manual_seed(seed))
    return [to_bytes(model.decode(each)[:, :, :count, :height, :width]) for each in noisy]
