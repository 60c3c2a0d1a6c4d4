"""The linear baselines: what a codec of as many numbers does without learning."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from temporal_vae.files.atomic import atomic_path
from temporal_vae.video import Uint8Frames, VideoError, VideoReader, pad_frames

BLOCK = 8
KINDS = {"4": (4, 1), "16": (16, 1), "4x4": (4, 4), "16x4": (16, 4)}
"""The baselines by their names: numbers for each 8x8 pixels of a frame, frames of a block."""
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LinearBaseline:
    """Principal components of pixel blocks: what a codec of as many numbers does unlearned.

    A block is 8x8x3 pixels of one frame, or of `frames` following ones. `mean` is (pixels of a
    block,), `basis` (numbers of a block, pixels of a block) with orthonormal rows, `deviation`
    (numbers of a block,) that of each number over the data. A model that is not above it has
    learned nothing that a matrix could not do.
    """

    mean: Floats
    basis: Floats
    deviation: Floats

    @property
    def frames(self) -> int:
        """Frames of a block."""
        return len(self.mean) // (BLOCK * BLOCK * 3)

    @classmethod
    def bundled(cls, name: str = "4") -> LinearBaseline:
        """A baseline in the package, one of `KINDS`, fitted to the training clips."""
        file = resources.files("temporal_vae") / "weights" / "linear_baseline.safetensors"
        return cls.read(str(file), name)

    @classmethod
    def read(cls, path: str | os.PathLike[str], name: str) -> LinearBaseline:
        """A baseline of a file that `write` made.

        Raises `ValueError` for another name than those in `KINDS`, and for a file without it.
        """
        check_name(name)
        try:
            stored = load_file(path)
            parts = (stored[f"{name}/{part}"] for part in ("mean", "basis", "deviation"))
            return cls(*(part.astype(np.float32) for part in parts))
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{os.fspath(path)} has no linear baseline pca:{name}") from error

    @classmethod
    def fit(
        cls, frames: Sequence[Uint8Frames], numbers: int, block_frames: int = 1
    ) -> LinearBaseline:
        """The leading `numbers` components of all blocks of `frames`, each uint8 (T, H, W, 3)."""
        sums = _Sums(block_frames)
        for clip in frames:
            sums.add(clip)
        return sums.baseline(numbers)

    def __call__(self, frames: Uint8Frames, noise: float = 0.0, seed: int = 0) -> Uint8Frames:
        """Project every block of uint8 (T, H, W, 3) and go back; edges repeat to whole blocks.

        `noise` is Gaussian noise on the numbers in between, as a share of their deviation.
        """
        count = len(frames)
        frames = np.concatenate([frames, *[frames[-1:]] * (-count % self.frames)])
        drawn = noise * self.noise(frames.shape, np.random.default_rng(seed)) if noise else None
        back = self.reconstruct(frames, drawn)[:count]
        return np.asarray(back.round().clip(0, 255).astype(np.uint8))

    def reconstruct(self, frames: Uint8Frames, noise: Floats | None = None) -> Floats:
        """Whole blocks in time (T, H, W, 3) and back, not rounded, with `noise` on the numbers."""
        _, height, width, _ = frames.shape
        blocks = _to_blocks(pad_frames(frames, BLOCK), self.frames).astype(np.float32) - self.mean
        numbers = blocks @ self.basis.T
        if noise is not None:
            numbers += noise
        back = np.asarray(numbers @ self.basis + self.mean, np.float32)
        return _from_blocks(back, self.frames)[:, :height, :width]

    def noise(self, shape: tuple[int, ...], drawn: np.random.Generator) -> Floats:
        """Noise of the deviation of each number, for frames of this shape in whole blocks."""
        blocks = shape[0] // self.frames, -(-shape[1] // BLOCK), -(-shape[2] // BLOCK)
        numbers = drawn.standard_normal((*blocks, len(self.basis)), np.float32)
        return self.deviation * numbers


def check_name(name: str) -> str:
    """The name of a baseline. Raises `ValueError` for another than those in `KINDS`."""
    if name not in KINDS:
        raise ValueError(f"no baseline pca:{name}: take one of pca:{', pca:'.join(KINDS)}")
    return name


def training_clip(path: str | os.PathLike[str]) -> Uint8Frames:
    """What of a video baselines are fitted to: its first 32 frames, 256 wide."""
    with VideoReader(path, 256, BLOCK, frames=32, alpha="drop") as video:
        frames = np.stack([frame.image for frame in video])
    return frames if frames.dtype == np.uint8 else (frames >> 8).astype(np.uint8)


def fit_all(clips: Sequence[Uint8Frames]) -> dict[str, LinearBaseline]:
    """The baselines of `KINDS`, each fitted to clips (T, H, W, 3).

    Raises `VideoError` for clips that are fewer frames than a block has.
    """
    sums = {frames: _Sums(frames) for _, frames in KINDS.values()}
    for each in sums.values():
        for clip in clips:
            each.add(clip)
        if not each.count:
            raise VideoError(f"no clip to fit a baseline to has {each.frames} frames")
    return {name: sums[frames].baseline(numbers * frames)
            for name, (numbers, frames) in KINDS.items()}  # fmt: skip


def write(baselines: dict[str, LinearBaseline], path: str | os.PathLike[str]) -> None:
    """Write baselines by their names, in float16."""
    tensors = {
        f"{name}/{part}": value.astype(np.float16)
        for name, baseline in baselines.items()
        for part, value in asdict(baseline).items()
    }
    with atomic_path(Path(path)) as file:
        save_file(tensors, file)


class _Sums:
    """Sums over blocks, from which their components follow."""

    def __init__(self, frames: int):
        self.frames, self.count = frames, 0
        size = BLOCK * BLOCK * 3 * frames
        self._total, self._products = np.zeros(size), np.zeros((size, size))

    def add(self, clip: Uint8Frames) -> None:
        """Count the blocks of a clip, without frames that do not fill one."""
        whole = clip[: len(clip) // self.frames * self.frames]
        blocks = _to_blocks(whole, self.frames).reshape(-1, len(self._total)).astype(np.float64)
        self.count, self._total = self.count + len(blocks), self._total + blocks.sum(0)
        self._products += blocks.T @ blocks

    def baseline(self, numbers: int) -> LinearBaseline:
        mean = self._total / self.count
        values, vectors = np.linalg.eigh(self._products / self.count - np.outer(mean, mean))
        basis = vectors[:, ::-1][:, :numbers].T
        deviation = np.sqrt(values[::-1][:numbers].clip(0))
        parts = (np.ascontiguousarray(x.astype(np.float32)) for x in (mean, basis, deviation))
        return LinearBaseline(*parts)


def _to_blocks(frames: Uint8Frames, each: int = 1) -> npt.NDArray[np.uint8]:
    """(T, H, W, 3) -> (T/each, H/8, W/8, each*192)."""
    t, h, w, c = frames.shape
    cut = frames.reshape(t // each, each, h // BLOCK, BLOCK, w // BLOCK, BLOCK, c)
    order = cut.transpose(0, 2, 4, 1, 3, 5, 6)
    return order.reshape(t // each, h // BLOCK, w // BLOCK, -1)


def _from_blocks(blocks: Floats, each: int = 1) -> Floats:
    t, h, w, _ = blocks.shape
    cut = blocks.reshape(t, h, w, each, BLOCK, BLOCK, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    return np.ascontiguousarray(cut.reshape(t * each, h * BLOCK, w * BLOCK, 3))
