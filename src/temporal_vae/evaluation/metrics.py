"""Measures of a reconstruction. Frames are uint8 (T, H, W, 3) RGB throughout.

PSNR and SSIM come from torchmetrics (the extra `report`); flicker is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from temporal_vae.video import Uint8Frames

PSNR_CEILING = 100.0
"""Decibels given to a frame that comes back exactly, so that means stay finite."""


@dataclass(frozen=True, slots=True)
class Scores:
    """A reconstruction against its original, means over frames."""

    psnr: float
    """Decibels, of each frame's RGB, then the mean over frames."""
    ssim: float
    """Structural similarity in [-1, 1], per frame (Wang et al. 2004)."""
    flicker: float
    """RMS error of the differences between neighbouring frames, in 8-bit units; see `flicker`."""


def score(original: Uint8Frames, reconstruction: Uint8Frames) -> Scores:
    """All measures of one clip. Raises `ValueError` when the shapes differ."""
    clips = original, reconstruction
    return Scores(psnr(*clips), ssim(*clips), flicker(*clips))


def psnr(original: Uint8Frames, reconstruction: Uint8Frames) -> float:
    """Peak signal-to-noise ratio in dB: per frame over H, W and RGB, then the mean over frames."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ours, theirs = _frames(original, reconstruction)
    values = peak_signal_noise_ratio(
        theirs, ours, data_range=255.0, dim=(1, 2, 3), reduction="none"
    )
    return float(values.clamp(max=PSNR_CEILING).mean())


def ssim(original: Uint8Frames, reconstruction: Uint8Frames) -> float:
    """Structural similarity per frame, then the mean over frames; frame by frame in memory."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    ours, theirs = _frames(original, reconstruction)
    values = [
        structural_similarity_index_measure(b[None], a[None], data_range=255.0)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return float(torch.stack([torch.as_tensor(value) for value in values]).mean())


def flicker(original: Uint8Frames, reconstruction: Uint8Frames) -> float:
    """RMS over the clip of (change of the reconstruction - change of the original), 8-bit units.

    A constant error gives 0, however large: only what moves that should not counts. 0 for a single
    frame, which cannot flicker.
    """
    ours, theirs = _frames(original, reconstruction)
    if len(ours) == 1:
        return 0.0
    error = theirs - ours
    return float((error[1:] - error[:-1]).square().mean().sqrt())


def _frames(original: Uint8Frames, reconstruction: Uint8Frames) -> tuple[Tensor, Tensor]:
    """Both as float (T, 3, H, W) in [0, 255]."""
    if original.shape != reconstruction.shape:
        raise ValueError(
            f"original and reconstruction must have one shape, got {original.shape} and "
            f"{reconstruction.shape}"
        )
    ours, theirs = map(torch.from_numpy, (original, reconstruction))
    return ours.permute(0, 3, 1, 2).float(), theirs.permute(0, 3, 1, 2).float()
