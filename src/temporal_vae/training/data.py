"""Clips in memory, and random batches from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from temporal_vae.video import Uint8Frames, read_clip, to_pixels


def load_clips(
    files: Sequence[Path], widths: Sequence[int], progress: Callable[[str], None]
) -> list[Uint8Frames]:
    """Every clip at every width, uint8 (T, H, W, 3)."""
    clips = []
    for file in files:
        progress(file.stem)
        clips += [read_clip(file, width=width) for width in widths]
    return clips


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Samples of a batch, frames of a sample, and the side of the square crop in pixels."""

    samples: int
    frames: int
    crop: int


def draw_batch(clips: Sequence[Uint8Frames], shape: BatchShape, rng: np.random.Generator) -> Tensor:
    """A random batch in [-1, 1], (samples, 3, frames, crop, crop).

    One sample in sixteen is a synthetic fade between two flat colours. Real clips have few of them,
    and a model that was not trained on them gives them other colours.
    """
    samples = [
        _fade(shape, rng) if rng.random() < 1 / 16 else _augment(_crop(clips, shape, rng), rng)
        for _ in range(shape.samples)
    ]
    return torch.cat([to_pixels(sample) for sample in samples])


def _fade(shape: BatchShape, rng: np.random.Generator) -> Uint8Frames:
    start, stop = rng.uniform(0, 255, (2, 3)) if rng.random() < 0.5 else rng.uniform(0, 255, (2, 1))
    if rng.random() < 0.5:
        start, stop = np.round(start / 255) * 255, np.round(stop / 255) * 255
    steps = np.linspace(0, rng.random(), shape.frames)[:, None]
    colours = (start + (stop - start) * steps)[:, None, None, :]
    frames = np.broadcast_to(colours, (shape.frames, shape.crop, shape.crop, 3))
    return np.round(frames).astype(np.uint8)


def _crop(clips: Sequence[Uint8Frames], shape: BatchShape, rng: np.random.Generator) -> Uint8Frames:
    fitting = [clip for clip in clips if min(clip.shape[1:3]) >= shape.crop]
    clip = fitting[rng.integers(len(fitting))]
    frames = min(shape.frames, len(clip))
    t = rng.integers(len(clip) - frames + 1)
    y = rng.integers(clip.shape[1] - shape.crop + 1)
    x = rng.integers(clip.shape[2] - shape.crop + 1)
    cut = clip[t : t + frames, y : y + shape.crop, x : x + shape.crop]
    short = shape.frames - frames
    return np.concatenate([cut, cut[-1:].repeat(short, axis=0)]) if short else cut


def _augment(frames: Uint8Frames, rng: np.random.Generator) -> Uint8Frames:
    """Random flips, transpositions and changes of colour, the same for all frames of the clip."""
    if rng.random() < 0.5:
        frames = frames[:, :, ::-1]
    if rng.random() < 0.25:
        frames = frames[:, ::-1]
    if rng.random() < 0.25:
        frames = frames.transpose(0, 2, 1, 3)
    if rng.random() < 0.15:
        frames = frames[..., rng.permutation(3)]
    if rng.random() < 0.05:
        frames = frames.mean(axis=3, keepdims=True).repeat(3, axis=3).astype(np.uint8)
    if rng.random() < 0.3:
        gain, lift = rng.uniform(0.6, 1.3), rng.uniform(-40, 40)
        frames = (frames * gain + lift).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(frames)
