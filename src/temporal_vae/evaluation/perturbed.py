"""Quality on perturbed latents: what a decoder makes of what a diffusion model would hand to it.

A diffusion model's latents are not an encoder's: each frame has errors of its own. A decoder that
sees one frame at a time turns them into flicker, and one that sees its neighbours need not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from temporal_vae.evaluation.evaluate import as_clip
from temporal_vae.latents import scaling
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Uint8Frames, to_bytes

SHARES = (0.0, 0.1, 0.2, 0.4)
"""Shares of the latents' deviation at which decoders are compared."""


@torch.no_grad()
def decoded_perturbed(
    model: TemporalVAE, frames: Uint8Frames, shares: Sequence[float] = SHARES, seed: int = 0
) -> list[Uint8Frames]:
    """Frames (T, H, W, 3) through the posterior's mean, noise and decoder, once for each share.

    The noise is Gaussian, independent in every element of every latent; its deviation is a share
    of the latents' own. All shares have the same noise, scaled.
    """
    count, height, width, _ = frames.shape
    latent = model.encode(as_clip(frames, model), sample_mode=False)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(latent) * scaling.deviation(model.config, latent)
    return [
        to_bytes(model.decode(latent + share * noise)[:, :, :count, :height, :width])
        for share in shares
    ]
