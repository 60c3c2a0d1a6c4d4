"""Batches of clips, each a function of the recipe's seed and the number of the batch alone.

So a run that goes on after a stop sees the batches it would have seen, and processes that train
together split the very batch that one alone would have had.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator as Batched
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from temporal_vae.training.recipe import Batch, Data
from temporal_vae.training.sources import Clip, fitting_strides, fitting_widths
from temporal_vae.video import Options, Uint8Frames, VideoError, VideoReader, to_pixels
from temporal_vae.walks.budget import parse_budget

T = TypeVar("T")

KIND = 2**31
"""In place of a sample's number where the kind of a batch is drawn: a stream of its own."""
ATTEMPTS = 20
"""Clips drawn for a sample, one after the other, before the data is given up as unreadable."""
LARGEST_KEPT = 1 / 8
"""A clip is kept in memory, whole, if it takes no more than this part of the cache."""


class Samples(NamedTuple):
    """A batch, or one process's part of it."""

    number: int
    """Which batch of the run it is, from 0."""
    frames: Tensor
    """uint8 (B, T, H, W, 3)."""
    seeds: tuple[int, ...]
    """For whatever else is drawn for a sample."""
    broken: tuple[tuple[Clip, str], ...]
    """Clips that turned out unreadable, and why."""

    def pixels(self) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1]."""
        return torch.cat([to_pixels(frames.numpy()) for frames in self.frames])


@dataclass(frozen=True, slots=True)
class Share:
    """Which samples of a batch a process takes: number `rank` and every `of`-th after it."""

    rank: int = 0
    of: int = 1


class Batches(Dataset[Samples]):
    """The batches of one stage, by number."""

    def __init__(self, clips: Sequence[Clip], data: Data, seed: int, share: Share | None = None):
        self._clips, self._data, self._seed = list(clips), data, seed
        self._share = share or Share()
        for kind in data.batch:
            if kind.samples % self._share.of:
                raise ValueError(
                    f"a batch of {kind.samples} samples cannot be split evenly over "
                    f"{self._share.of} processes: make data.batch's samples a multiple"
                )
        self._cache = Cache(int(parse_budget(data.cache) or 0))
        self._fitting = {kind: self._clips_for(kind) for kind in data.batch}
        chances = np.array([k.chance if self._fitting[k] else 0.0 for k in data.batch])
        self._chances = chances / chances.sum()

    def _clips_for(self, kind: Batch) -> list[Clip]:
        return [
            clip
            for clip in self._clips
            if fitting_widths(clip, self._data, kind.crop)
            and fitting_strides(clip, self._data, kind.frames)
        ]

    def __getitem__(self, number: int) -> Samples:
        kinds = self._data.batch
        rng = np.random.default_rng((self._seed, number, KIND))
        kind = kinds[rng.choice(len(kinds), p=self._chances)]
        mine = range(self._share.rank, kind.samples, self._share.of)
        broken: list[tuple[Clip, str]] = []
        frames = [
            self._sample(kind, np.random.default_rng((self._seed, number, index)), broken)
            for index in mine
        ]
        seeds = tuple(hash((self._seed, number, index)) % 2**62 for index in mine)
        return Samples(number, torch.from_numpy(np.stack(frames)), seeds, tuple(broken))

    def _sample(self, kind: Batch, rng: Generator, broken: list[tuple[Clip, str]]) -> Uint8Frames:
        if rng.random() < self._data.fades:
            return fade(kind, rng)
        for _ in range(ATTEMPTS):
            clip = self._fitting[kind][rng.integers(len(self._fitting[kind]))]
            try:
                return augment(self._window(clip, kind, rng), self._data, rng)
            except (VideoError, OSError) as error:
                broken.append((clip, str(error)))
        raise VideoError(
            f"{ATTEMPTS} clips in a row could not be read, the last: {broken[-1][0].source}: "
            f"{broken[-1][1]}"
        )

    def _window(self, clip: Clip, kind: Batch, rng: Generator) -> Uint8Frames:
        """Some following frames of a clip, and a square of them."""
        width = _one_of(fitting_widths(clip, self._data, kind.crop), rng)
        stride = _one_of(fitting_strides(clip, self._data, kind.frames), rng)
        rate = self._data.fps or clip.fps
        length = (kind.frames - 1) * stride + 1
        start = int(rng.integers(max(1, round(clip.seconds * rate) - length + 1)))
        frames = self._cache.read(clip, width, self._data.fps, start, length)[::stride]
        if len(frames) < kind.frames:
            raise VideoError(f"{len(frames)} frames where there should be {kind.frames}")
        height, width = frames.shape[1:3]
        y, x = rng.integers(height - kind.crop + 1), rng.integers(width - kind.crop + 1)
        return frames[:, y : y + kind.crop, x : x + kind.crop]


def _one_of(options: Sequence[T], rng: Generator) -> T:
    return options[int(rng.integers(len(options)))]


class Cache:
    """Frames of clips at a size and a rate; short clips are kept whole, as long as there is room.

    Which frames come does not depend on what is kept, but for files of a variable frame rate and
    rates (`data.fps`) that do not divide a file's own.
    """

    def __init__(self, size: int):
        self._size, self._used = size, 0
        self._kept: OrderedDict[object, Uint8Frames] = OrderedDict()

    def read(
        self, clip: Clip, width: int | None, fps: float | None, start: int, length: int
    ) -> Uint8Frames:
        """`length` frames from number `start` on, uint8 (T, H, W, 3), scaled to `width`."""
        height, across = clip.scaled(width)
        if clip.frames * height * across * 3 > self._size * LARGEST_KEPT:
            rate = fps or clip.fps
            return _decode(clip, width, fps=fps, start=start / rate, frames=length)
        key = (clip.source, width, fps)
        if key not in self._kept:
            self._keep(key, _decode(clip, width, fps=fps))
        self._kept.move_to_end(key)
        frames = self._kept[key]
        start = max(0, min(start, len(frames) - length))  # a file may have fewer than it says
        return frames[start : start + length]

    def _keep(self, key: object, frames: Uint8Frames) -> None:
        self._used += frames.nbytes
        self._kept[key] = frames
        while self._used > self._size and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._used -= oldest.nbytes


def _decode(clip: Clip, width: int | None, **options: object) -> Uint8Frames:
    given = {name: value for name, value in options.items() if value is not None}
    wanted = cast(Options, {"alpha": "drop", **given})
    with clip.source.file() as path, VideoReader(path, width, **wanted) as video:
        frames = np.stack([frame.image for frame in video])
    if frames.dtype == np.uint16:
        frames = (frames >> 8).astype(np.uint8)
    return frames


# What is made of a clip ------------------------------------------------------------------------


def augment(frames: Uint8Frames, data: Data, rng: Generator) -> Uint8Frames:
    """Random flips, transpositions and changes of colour, the same for all frames of the clip."""
    if data.flips:
        frames = _turned(frames, rng)
    if rng.random() < data.colours:
        frames = _one_of((_exchanged, _grey, _brightened, _brightened), rng)(frames, rng)
    return np.ascontiguousarray(frames)


def _turned(frames: Uint8Frames, rng: Generator) -> Uint8Frames:
    if rng.random() < 0.5:
        frames = frames[:, :, ::-1]
    if rng.random() < 0.25:
        frames = frames[:, ::-1]
    return frames.transpose(0, 2, 1, 3) if rng.random() < 0.25 else frames


def _exchanged(frames: Uint8Frames, rng: Generator) -> Uint8Frames:
    return frames[..., rng.permutation(3)]


def _grey(frames: Uint8Frames, rng: Generator) -> Uint8Frames:
    grey: Uint8Frames = frames.mean(axis=3, keepdims=True).repeat(3, axis=3).astype(np.uint8)
    return grey


def _brightened(frames: Uint8Frames, rng: Generator) -> Uint8Frames:
    gain, lift = rng.uniform(0.6, 1.3), rng.uniform(-40, 40)
    return (frames * gain + lift).clip(0, 255).astype(np.uint8)


def fade(kind: Batch, rng: Generator) -> Uint8Frames:
    """A clip that goes from one flat colour to another: half are grey, half begin or end in pure
    colours."""
    start, stop = rng.uniform(0, 255, (2, 3)) if rng.random() < 0.5 else rng.uniform(0, 255, (2, 1))
    if rng.random() < 0.5:
        start, stop = np.round(start / 255) * 255, np.round(stop / 255) * 255
    steps = np.linspace(0, rng.random(), kind.frames)[:, None]
    colours = (start + (stop - start) * steps)[:, None, None, :]
    frames = np.broadcast_to(colours, (kind.frames, kind.crop, kind.crop, 3))
    return np.round(frames).astype(np.uint8)


# In the order of the run ------------------------------------------------------------------------


class _From(Sampler[int]):
    """Batch numbers from one on, without end."""

    def __init__(self, start: int):
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return count(self._start)


def in_order(batches: Batches, start: int, workers: int) -> Batched[Samples, None, None]:
    """The batches from number `start` on, read ahead by so many worker processes.

    Close it in the end: its workers leave requests to end to the process that trains.
    """
    loader: DataLoader[Samples] = DataLoader(
        batches, batch_size=None, sampler=_From(start), num_workers=workers,
        prefetch_factor=4 if workers else None, worker_init_fn=_quiet if workers else None,
    )  # fmt: skip
    try:
        yield from loader
    except VideoError as error:  # torch puts a worker's whole traceback before what it says
        raise VideoError(str(error).strip().rpartition("VideoError: ")[2]) from None


def _quiet(worker: int) -> None:
    """Ctrl-C, and often a request to end, goes to all processes: the training one answers it.

    A worker ends with the loader, or soon after the training process is gone.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
