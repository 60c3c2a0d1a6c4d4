"""The linear baseline: what a codec of as many numbers does without learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from temporal_vae.video import Uint8Frames, pad_frames

BLOCK = 8
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LinearBaseline:
    """Principal components of 8x8x3 pixel blocks: what a codec of as many numbers does unlearned.

    `mean` is (192,), `basis` (numbers per block, 192) with orthonormal rows, `deviation` (numbers
    per block,) that of each number over the data. A model that is not above it has learned nothing
    that a matrix could not do.
    """

    mean: Floats
    basis: Floats
    deviation: Floats

    @classmethod
    def bundled(cls) -> LinearBaseline:
        """The baseline in the package: four numbers a block, fitted to the training clips."""
        file = resources.files("temporal_vae") / "weights" / "linear_baseline.safetensors"
        return cls(**load_file(str(file)))

    @classmethod
    def fit(cls, frames: Sequence[Uint8Frames], numbers: int) -> LinearBaseline:
        """The leading `numbers` components of all blocks of `frames`, each uint8 (T, H, W, 3)."""
        count, total = 0, np.zeros(BLOCK * BLOCK * 3)
        products = np.zeros((total.size, total.size))
        for clip in frames:
            blocks = _to_blocks(clip).reshape(-1, total.size).astype(np.float64)
            count, total = count + len(blocks), total + blocks.sum(0)
            products += blocks.T @ blocks
        mean = total / count
        values, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
        basis = vectors[:, ::-1][:, :numbers].T
        deviation = np.sqrt(values[::-1][:numbers].clip(0))
        return cls(*(np.ascontiguousarray(x.astype(np.float32)) for x in (mean, basis, deviation)))

    def __call__(self, frames: Uint8Frames, noise: float = 0.0, seed: int = 0) -> Uint8Frames:
        """Project every block of uint8 (T, H, W, 3) and go back; edges repeat to whole blocks.

        `noise` is Gaussian noise on the numbers in between, as a share of their deviation.
        """
        _, height, width, _ = frames.shape
        blocks = _to_blocks(pad_frames(frames, BLOCK)).astype(np.float32) - self.mean
        numbers = blocks @ self.basis.T
        if noise:
            drawn = np.random.default_rng(seed).standard_normal(numbers.shape, np.float32)
            numbers += noise * self.deviation * drawn
        back = numbers @ self.basis + self.mean
        return _from_blocks(back.round().clip(0, 255).astype(np.uint8))[:, :height, :width]


def _to_blocks(frames: Uint8Frames) -> npt.NDArray[np.uint8]:
    """(T, H, W, 3) -> (T, H/8, W/8, 192)."""
    t, h, w, c = frames.shape
    cut = frames.reshape(t, h // BLOCK, BLOCK, w // BLOCK, BLOCK, c)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(t, h // BLOCK, w // BLOCK, -1)


def _from_blocks(blocks: Uint8Frames) -> Uint8Frames:
    t, h, w, _ = blocks.shape
    cut = blocks.reshape(t, h, w, BLOCK, BLOCK, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(cut.reshape(t, h * BLOCK, w * BLOCK, 3))
