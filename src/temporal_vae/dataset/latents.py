"""A data set of latents to train on: any clip by its number, and batches of equal shape."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from temporal_vae.dataset.manifest import read_manifest
from temporal_vae.latents import SUFFIX, LatentFile

_SHAPE = ("channels", "latent_frames", "rows", "columns")


class LatentClip(TypedDict):
    """One clip, as torch's default collation makes a batch of several."""

    latents: Tensor
    """(L, T, h, w)."""
    name: str
    caption: str
    """Empty where the data set has none."""
    fps: float
    index: int


class LatentDataset(Dataset[LatentClip]):
    """The clips of a folder that `tvae encode-dataset` made, files or shards alike.

    Each is read when it is asked for; in memory are the columns of the manifest that it takes to
    find it. Worker processes of a `DataLoader` may share it. Captions come from the manifest.

    Args:
        folder: with `manifest.parquet`.
        scaled: latents as a diffusion model takes them, of about zero mean and unit variance, or as
            the encoder gives them; whichever of both is stored, they are never scaled twice.
        sample: where the distribution is stored, draw latents from it, by torch's generator of the
            process that reads them; without it they are its mean.
        dtype: of the latents.

    Raises `ValueError` where the folder has no manifest.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        scaled: bool = True,
        sample: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        self._folder, self._scaled = Path(folder), scaled
        self._sample, self._dtype = sample, dtype
        columns = ["name", "caption", "fps", "kind", "bytes", "shard", "offset", *_SHAPE]
        self._table = read_manifest(self._folder, columns).combine_chunks()
        shapes = [self._table[name].to_numpy() for name in _SHAPE]
        self._shapes = np.stack(shapes, 1).astype(np.int64)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, index: int) -> tuple[int, ...]:
        """(L, T, h, w) of a clip, without reading it."""
        return tuple(self._shapes[index].tolist())

    def buckets(self) -> dict[tuple[int, ...], list[int]]:
        """The clips of each shape, by their numbers."""
        kinds, which = np.unique(self._shapes, axis=0, return_inverse=True)
        which = which.reshape(-1)
        return {tuple(kind.tolist()): np.flatnonzero(which == number).tolist()
                for number, kind in enumerate(kinds)}  # fmt: skip

    def row(self, index: int) -> dict[str, Any]:
        """What the manifest says of a clip, as far as it is needed to read it."""
        found: dict[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        return found

    def open(self, index: int) -> LatentFile:
        """The file of latents of a clip, on its own or inside of a shard."""
        row = self.row(index)
        if row["shard"] is None:
            return LatentFile(self._folder / f"{row['name']}{SUFFIX}")
        return LatentFile(self._folder / row["shard"], row["offset"], row["bytes"])

    def __getitem__(self, index: int) -> LatentClip:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} clips, none is number {index}")
        index %= len(self)
        row = self.row(index)
        with self.open(index) as file:
            drawn = self._sample and row["kind"] == "moments"
            latents = file.latents(sample_mode=drawn, scaled=self._scaled)
        return LatentClip(latents=latents[0].to(self._dtype), name=row["name"], fps=row["fps"],
                          caption=row["caption"] or "", index=index)  # fmt: skip


class EqualShapes(Sampler[list[int]]):
    """Batches of clips of one shape, in an order that is a function of the seed and the epoch.

    `DataLoader(dataset, batch_sampler=EqualShapes(dataset, 8))`. Clips that fill no batch of their
    shape are left out, others in each epoch. Each epoch that is iterated is followed by the next.

    An order goes on after a stop: `state_dict` of a loader that gave so many `batches` of the
    present epoch, and `load_state_dict` before the next iteration. Of several processes that train
    together each gives its `rank`, and takes every `world`-th batch.
    """

    def __init__(
        self, dataset: LatentDataset, batch_size: int, *, seed: int = 0, shuffle: bool = True,
        rank: int = 0, world: int = 1,
    ):  # fmt: skip
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(
                f"batch_size must be 1 or more and rank below world, got {batch_size=}, {rank=}, "
                f"{world=}"
            )
        self._buckets, self._size, self._seed = dataset.buckets(), batch_size, seed
        self._shuffle, self._rank, self._world = shuffle, rank, world
        self.epoch, self._skip = 0, 0
        self._current: int | None = None
        if not len(self):
            most = max(map(len, self._buckets.values()), default=0)
            raise ValueError(
                f"no shape has {batch_size * world} clips for a batch of {batch_size} in each of "
                f"{world} processes, the most common one has {most}: take a smaller batch"
            )

    def __len__(self) -> int:
        """Batches of a whole epoch, for each process."""
        each = sum(len(clips) // self._size for clips in self._buckets.values())
        return each // self._world

    def __iter__(self) -> Iterator[list[int]]:
        batches, skip = self.batches(self.epoch), self._skip
        self._current, self.epoch, self._skip = self.epoch, self.epoch + 1, 0
        yield from batches[skip:]

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, for this process."""
        rng = np.random.default_rng((self._seed, epoch))
        found = []
        for clips in self._buckets.values():
            order = rng.permutation(clips) if self._shuffle else np.asarray(clips)
            whole = len(order) // self._size * self._size
            found += order[:whole].reshape(-1, self._size).tolist()
        if self._shuffle:
            found = [found[number] for number in rng.permutation(len(found))]
        return found[self._rank : len(self) * self._world : self._world]

    def state_dict(self, batches: int) -> dict[str, int]:
        """Where a training is that took so many batches of the epoch that is being iterated."""
        if self._current is None:  # none is, yet
            return {"epoch": self.epoch, "batches": self._skip + batches}
        return {"epoch": self._current, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on from there."""
        self.epoch, self._skip, self._current = state["epoch"], state["batches"], None
