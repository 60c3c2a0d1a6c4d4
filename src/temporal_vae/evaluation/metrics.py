"""Measures of a reconstruction. Frames are uint8 (T, H, W, 3) RGB throughout.

PSNR and SSIM come from torchmetrics (the extra `report`); flicker is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from temporal_vae.evaluation import measures
from temporal_vae.evaluation.measures import PSNR_CEILING
from temporal_vae.video import Uint8Frames

__all__ = ["PSNR_CEILING", "Scores", "flicker", "psnr", "score", "ssim"]


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
    return _over(measures.psnr(), original, reconstruction)["psnr"]


def ssim(original: Uint8Frames, reconstruction: Uint8Frames) -> float:
    """Structural similarity per frame, then the mean over frames; frame by frame in memory."""
    return _over(measures.ssim(), original, reconstruction)["ssim"]


def flicker(original: Uint8Frames, reconstruction: Uint8Frames) -> float:
    """RMS over the clip of (change of the reconstruction - change of the original), 8-bit units.

    A constant error gives 0, however large: only what moves that should not counts. 0 for a single
    frame, which cannot flicker.
    """
    if len(original) == 1 == len(reconstruction):
        return 0.0
    return _over(measures.Changes(), original, reconstruction)["flicker"]


def _over(
    measure: measures.Measure, original: Uint8Frames, reconstruction: Uint8Frames
) -> dict[str, float]:
    """What a measure finds in all frames."""
    if original.shape != reconstruction.shape:
        raise ValueError(
            f"original and reconstruction must have one shape, got {original.shape} and "
            f"{reconstruction.shape}"
        )
    ours, theirs = (
        torch.from_numpy(frames).permute(0, 3, 1, 2) for frames in (original, reconstruction)
    )
    for a, b in zip(ours, theirs, strict=True):
        measure.add(measures.Pair(a.float(), b.float()))
    return measure.found().values
