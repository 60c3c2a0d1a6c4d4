"""Mean and deviation of latents over a data set, for the scale of a diffusion model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from temporal_vae.latents.info import LatentFileError, LatentInfo
from temporal_vae.latents.reading import LatentFile


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """Of unscaled latents; cells of all latents along time count the same."""

    files: int
    frames: int
    """Of the videos."""
    cells: int
    """Latent cells over all files: numbers of each channel."""
    mean: tuple[float, ...]
    """Of each channel."""
    std: tuple[float, ...]
    """Of each channel, about its mean."""
    overall_std: float
    """Of all numbers about `shift_factor`."""
    scale_factor: float
    """1 / overall_std: (latent - shift_factor) * scale_factor has mean 0 and deviation 1."""
    shift_factor: float
    """Mean over all channels."""


class _Moments:
    """Running mean and squared deviations of each channel, in float64 (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.cells, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor, variance: Tensor | None) -> None:
        """Take in (L, n) means, or samples, and the variance of each about it."""
        x = x.double()
        count, mean = x.shape[1], x.mean(1)
        squares = (x - mean[:, None]).square().sum(1)
        if variance is not None:
            squares += variance.double().sum(1)
        total = self.cells + count
        apart = mean - self.mean
        self.squares = self.squares + squares + apart.square() * (self.cells * count / total)
        self.mean = self.mean + apart * (count / total)
        self.cells = total


def latent_statistics(
    paths: Iterable[str | os.PathLike[str]],
    progress: Callable[[int, int | None], None] | None = None,
    any_model: bool = False,
) -> LatentStatistics:
    """Mean and deviation of each channel over files of latents, in one pass and flat memory.

    The deviation is that of a sample of the posterior, for moments with the variance
    E[exp(log_variance)] + Var[mean].
    Scaled files are unscaled by what they record.

    Raises `LatentFileError` for a damaged file, or files of several models unless `any_model`.
    """
    moments, first, frames, files = _Moments(), None, 0, 0
    for path in paths:
        with LatentFile(path) as file:
            first = first or (file.path, file.info)
            _check_same(first, (file.path, file.info), any_model)
            for start, count in file.pieces():
                moments.add(*_numbers(file, start, count))
                if progress is not None:
                    progress(frames + start + count, None)
            frames += file.info.frames
        files += 1
    if not files:
        raise LatentFileError("no files of latents to take statistics of")
    variance, middle = moments.squares / moments.cells, float(moments.mean.mean())
    overall = float(variance.mean() + (moments.mean - middle).square().mean()) ** 0.5
    if not 0 < overall < math.inf:
        raise LatentFileError(
            "all latents are the same number: no scale brings them to deviation 1"
        )
    return LatentStatistics(
        files=files,
        frames=frames,
        cells=moments.cells,
        mean=tuple(moments.mean.tolist()),
        std=tuple(variance.sqrt().tolist()),
        overall_std=overall,
        scale_factor=1 / overall,
        shift_factor=middle,
    )


def _numbers(file: LatentFile, start: int, count: int) -> tuple[Tensor, Tensor | None]:
    """Means or samples, (L, n * h * w), and of means the variance of a sample about each."""
    if file.info.kind == "sample":
        return file.latents(start, count)[0].flatten(1), None
    mean, log_variance = file.moments(start, count)
    return mean[0].flatten(1), log_variance[0].double().exp().flatten(1)


def _check_same(
    first: tuple[str, LatentInfo], other: tuple[str, LatentInfo], any_model: bool
) -> None:
    (path, info), (path2, info2) = first, other
    cells = [(one.channels, one.frames_per_latent) for one in (info, info2)]
    if cells[0] != cells[1]:
        raise LatentFileError(
            f"{path} has {cells[0][0]} channels, for each {cells[0][1]} frames one latent, {path2} "
            f"{cells[1][0]} for {cells[1][1]}: take their statistics one by one"
        )
    hashes = {info.encoder_sha256, info2.encoder_sha256} - {None}
    if len(hashes) > 1 and not any_model:
        raise LatentFileError(
            f"{path} is of {info.model} (encoder {info.encoder_sha256:.12}), {path2} of "
            f"{info2.model} ({info2.encoder_sha256:.12}): take their statistics one by one, or "
            "give --any-model"
        )
