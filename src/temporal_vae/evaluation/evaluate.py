"""Quality over a folder of clips, beside the linear baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from temporal_vae.evaluation.baseline import BLOCK, LinearBaseline
from temporal_vae.evaluation.metrics import Scores, score
from temporal_vae.geometry import latents_for, video_frames
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Uint8Frames, pad_frames, read_clip, to_bytes, to_pixels


def as_clip(frames: Uint8Frames, model: TemporalVAE) -> Tensor:
    """Frames (T, H, W, 3) of any size as pixels that the model takes, (1, 3, T', H', W').

    The last row, column and frame are repeated up to whole latents.
    """
    per_latent = model.frames_per_latent
    whole = video_frames(latents_for(len(frames), per_latent), per_latent)
    frames = np.concatenate([frames, *[frames[-1:]] * (whole - len(frames))])
    video = to_pixels(pad_frames(frames, model.downsample_factor))
    return video.to(model.device, model.dtype)


def reconstruct_frames(frames: Uint8Frames, model: TemporalVAE) -> Uint8Frames:
    """One clip, uint8 (T, H, W, 3) of any size, through the model and back to the same size."""
    count, height, width, _ = frames.shape
    return to_bytes(model.predict(as_clip(frames, model))[:, :, :count, :height, :width])


@dataclass(frozen=True, slots=True)
class Row:
    """One clip: the model's scores and the linear baseline's."""

    name: str
    model: Scores
    linear: Scores


def evaluate(
    files: Sequence[Path],
    codec: Callable[[Uint8Frames], Uint8Frames] | TemporalVAE,
    frames: int = 32,
    width: int = 256,
) -> Iterator[Row]:
    """Scores of the first `frames` frames of each file, scaled to `width` (height to the
    nearest multiple of 8), for a model's posterior mean or any function of frames, and the
    linear baseline's beside them."""
    baseline = LinearBaseline.bundled()
    through = partial(reconstruct_frames, model=codec) if isinstance(codec, TemporalVAE) else codec
    for file in files:
        original = read_clip(file, frames, width, multiple=BLOCK)
        yield Row(
            file.stem, score(original, through(original)), score(original, baseline(original))
        )


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Mean over clips, each clip counting the same."""
    return Scores(*np.mean([astuple(each) for each in scores], 0).tolist())
