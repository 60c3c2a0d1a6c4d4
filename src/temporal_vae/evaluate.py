"""Quality over a folder of clips, beside the linear baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from temporal_vae.metrics import Scores, score
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Bytes, pad_frames, read_clip, to_bytes, to_pixels

BLOCK = 8
Floats = npt.NDArray[np.float32]


def reconstruct_frames(frames: Bytes, model: TemporalVAE) -> Bytes:
    """One clip, uint8 (T, H, W, 3) of any size, through the model and back to the same size."""
    _, height, width, _ = frames.shape
    video = to_pixels(pad_frames(frames, model.downsample_factor))
    return to_bytes(model.predict(video.to(model.device, model.dtype))[..., :height, :width])


@dataclass(frozen=True, slots=True)
class LinearBaseline:
    """Principal components of 8x8x3 pixel blocks: what a codec of as many numbers does unlearned.

    `mean` is (192,), `basis` (numbers per block, 192) with orthonormal rows. A model that is not
    above it has learned nothing that a matrix could not do.
    """

    mean: Floats
    basis: Floats

    @classmethod
    def bundled(cls) -> LinearBaseline:
        """The baseline in the package: four numbers a block, fitted to the training clips."""
        file = resources.files("temporal_vae") / "weights" / "linear_baseline.safetensors"
        return cls(**load_file(str(file)))

    @classmethod
    def fit(cls, frames: Sequence[Bytes], numbers: int) -> LinearBaseline:
        """The leading `numbers` components of all blocks of `frames`, each uint8 (T, H, W, 3)."""
        count, total = 0, np.zeros(BLOCK * BLOCK * 3)
        products = np.zeros((total.size, total.size))
        for clip in frames:
            blocks = _to_blocks(clip).reshape(-1, total.size).astype(np.float64)
            count, total = count + len(blocks), total + blocks.sum(0)
            products += blocks.T @ blocks
        mean = total / count
        _, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
        basis = vectors[:, ::-1][:, :numbers].T
        return cls(mean.astype(np.float32), np.ascontiguousarray(basis.astype(np.float32)))

    def __call__(self, frames: Bytes) -> Bytes:
        """Project every block of uint8 (T, H, W, 3) and go back; edges repeat to whole blocks."""
        _, height, width, _ = frames.shape
        blocks = _to_blocks(pad_frames(frames, BLOCK)).astype(np.float32) - self.mean
        back = blocks @ self.basis.T @ self.basis + self.mean
        return _from_blocks(back.round().clip(0, 255).astype(np.uint8))[:, :height, :width]


def _to_blocks(frames: Bytes) -> npt.NDArray[np.uint8]:
    """(T, H, W, 3) -> (T, H/8, W/8, 192)."""
    t, h, w, c = frames.shape
    cut = frames.reshape(t, h // BLOCK, BLOCK, w // BLOCK, BLOCK, c)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(t, h // BLOCK, w // BLOCK, -1)


def _from_blocks(blocks: Bytes) -> Bytes:
    t, h, w, _ = blocks.shape
    cut = blocks.reshape(t, h, w, BLOCK, BLOCK, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(cut.reshape(t, h * BLOCK, w * BLOCK, 3))


@dataclass(frozen=True, slots=True)
class Row:
    """One clip: the model's scores and the linear baseline's."""

    name: str
    model: Scores
    linear: Scores


def evaluate(
    files: Sequence[Path],
    codec: Callable[[Bytes], Bytes] | TemporalVAE,
    frames: int = 32,
    width: int = 256,
) -> Iterator[Row]:
    """Scores of the first `frames` frames of each file, scaled to `width` (height to the
    nearest multiple of 8), for a model's posterior mean or any function of frames, and the
    linear baseline's beside them."""
    baseline = LinearBaseline.bundled()
    for file in files:
        original = read_clip(file, frames, width, multiple=BLOCK)
        if isinstance(codec, TemporalVAE):
            reconstruction = reconstruct_frames(original, codec)
        else:
            reconstruction = codec(original)
        yield Row(file.stem, score(original, reconstruction), score(original, baseline(original)))


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Mean over clips, each clip counting the same."""
    return Scores(*(float(np.mean([getattr(s, name) for s in scores])) for name in _NAMES))


_NAMES = ("psnr", "ssim", "flicker")
