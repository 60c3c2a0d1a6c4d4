"""What gives a reconstruction: models, the linear baselines, videos that are there already.

A codec takes the frames of a clip one by one, uint8 (H, W, 3), and gives as many: float tensors
(3, H, W) in 8-bit units, not rounded, NaN where a model gave NaN. It may take some ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from temporal_vae.evaluation.baseline import LinearBaseline
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Uint8Frames, VideoReader, pad_frames, to_pixels

Frames = Iterator[Uint8Frames]
T = TypeVar("T")

PIECE_PIXELS = 8 * 640 * 360
"""A stream takes in eight frames at a time, or as few as have so many pixels, at least one."""


class Codec(Protocol):
    """Reconstructs clips; noise may be put on what it keeps of them."""

    can_be_perturbed: bool
    """Whether there is something in between that noise can be put on."""
    can_be_repeated: bool
    """Whether it can reconstruct its own reconstruction."""

    def __call__(self, frames: Frames) -> Iterator[Tensor]:
        """The reconstruction of each frame, in order."""

    def perturbed(self, frames: Frames, shares: Sequence[float]) -> Iterator[list[Tensor]]:
        """The same for each share of noise, of the deviation of the latents; one noise for all."""


class _Perturbable:
    """What all codecs with numbers in between have in common."""

    can_be_perturbed = can_be_repeated = True

    def __call__(self, frames: Frames) -> Iterator[Tensor]:
        return (ours for (ours,) in self.perturbed(frames, (0.0,)))

    def perturbed(self, frames: Frames, shares: Sequence[float]) -> Iterator[list[Tensor]]:
        raise NotImplementedError


class ModelCodec(_Perturbable):
    """A model by its posterior mean, as a stream, so in memory that is flat in the clip's length.

    A model with a norm over the clip walks clips of its own length; `clip_frames` cuts any model's
    frames into clips that know nothing of each other. With 1 it sees frame by frame.
    """

    def __init__(self, model: TemporalVAE, clip_frames: int | None = None):
        if model.input_channels != 3:
            raise ValueError(
                f"evaluate takes models of RGB, and this one has {model.input_channels} channels"
            )
        streams = model.encode_reach is not None and model.decode_reach is not None
        self._model = model
        self._length = clip_frames or (None if streams else model.config.clip_frames)
        self._streams = streams

    def perturbed(self, frames: Frames, shares: Sequence[float]) -> Iterator[list[Tensor]]:
        """Frames come in pieces; see `Codec`."""
        generator = torch.Generator().manual_seed(0)
        for clip in clips(frames, self._length):
            counted = Whole(clip, self._model.frames_per_latent)
            for given in self._decoded(_pieces(counted), shares, generator):
                yield from counted.cropped(given)

    @torch.no_grad()
    def _decoded(
        self, pieces: Iterator[Uint8Frames], shares: Sequence[float], generator: torch.Generator
    ) -> Iterator[list[Tensor]]:
        """The frames (1, 3, n, H, W) of one clip, in whole latent cells, for each share."""
        model, factor = self._model, self._model.downsample_factor
        videos = (
            to_pixels(pad_frames(piece, factor)).to(model.device, model.dtype) for piece in pieces
        )
        if not self._streams:
            latents = model.encode(torch.cat(list(videos), 2), sample_mode=False)
            yield [model.decode(each) for each in perturbations(model, latents, shares, generator)]
            return
        streams = [model.decode_stream() for _ in shares]
        for latents in model.encode_stream(sample_mode=False).pull(videos):
            noisy = perturbations(model, latents, shares, generator)
            given = [stream.push(each) for stream, each in zip(streams, noisy, strict=True)]
            if given[0] is not None:
                yield [each for each in given if each is not None]
        for owed in zip(*(stream.flush() for stream in streams), strict=True):
            yield list(owed)


def perturbations(
    model: TemporalVAE, latents: Tensor, shares: Sequence[float], generator: torch.Generator
) -> list[Tensor]:
    """Unscaled latents (1, L, n, h, w) with noise, for each share of their deviation.

    The noise is Gaussian and drawn frame by frame, so that pieces of a clip get what the whole one
    does; its deviation is the share of 1 in each channel of scaled latents.
    """
    if not any(shares):
        return [latents] * len(shares)
    frame = latents.shape[1], *latents.shape[3:]
    drawn = [torch.randn(frame, generator=generator) for _ in range(latents.shape[2])]
    noise = torch.stack(drawn, 1)[None].to(latents)
    noise = model.unscale_latent(noise) - model.unscale_latent(torch.zeros_like(noise))
    return [latents + share * noise for share in shares]


class LinearCodec(_Perturbable):
    """A linear baseline; the last frame is repeated up to whole blocks in time."""

    def __init__(self, baseline: LinearBaseline):
        self._baseline = baseline

    def perturbed(self, frames: Frames, shares: Sequence[float]) -> Iterator[list[Tensor]]:
        """One block in time after the other; see `Codec`."""
        drawn, frames_each = np.random.default_rng(0), self._baseline.frames
        for clip in clips(frames, frames_each):
            counted = Whole(clip, frames_each, first=frames_each)
            block = np.stack(list(counted))
            noise = self._baseline.noise(block.shape, drawn) if any(shares) else None
            given = [
                self._baseline.reconstruct(block, None if noise is None else share * noise)
                for share in shares
            ]
            for index in range(counted.count):
                yield [torch.from_numpy(ours[index]).permute(2, 0, 1) for ours in given]


class VideoCodec:
    """A video of the reconstruction that was made elsewhere."""

    can_be_perturbed = can_be_repeated = False

    def __init__(self, opening: Callable[[], AbstractContextManager[VideoReader]], name: str):
        self._opening, self._name = opening, name

    def __call__(self, frames: Frames) -> Iterator[Tensor]:
        """Its frames beside the clip's. Raises `ValueError` where size or number differ."""
        count = 0
        with self._opening() as reader:
            theirs = iter(reader)
            for frame in frames:
                ours = next(theirs, None)
                if ours is None:
                    raise ValueError(
                        f"{self._name} ends after {count} frames, and the clip has more: a "
                        "reconstruction has as many frames as its original"
                    )
                image = eight_bits(ours.image)
                if image.shape != frame.shape:
                    (h, w), (height, width) = image.shape[:2], frame.shape[:2]
                    raise ValueError(
                        f"{self._name} is {w}x{h} and the clip {width}x{height}: a reconstruction "
                        "has the size of its original"
                    )
                count += 1
                yield torch.from_numpy(image).permute(2, 0, 1).float()
            if next(theirs, None) is not None:
                raise ValueError(
                    f"{self._name} has more than the clip's {count} frames: a reconstruction has as "
                    "many frames as its original"
                )

    def perturbed(self, frames: Frames, shares: Sequence[float]) -> Iterator[list[Tensor]]:
        """Nothing can be put on a video's latents."""
        raise ValueError(f"{self._name} is a video: its latents are not there")


class Whole:
    """The frames of a clip, the last one repeated until they make up whole latents.

    The first latent has `first` frames, each later one `each`. `count` is how many there were.
    """

    def __init__(self, frames: Frames, each: int, first: int = 1):
        self._frames, self._each, self._first = frames, each, first
        self.count, self._given = 0, 0
        self._ended = False

    def __iter__(self) -> Frames:
        for frame in self._frames:
            self.count += 1
            yield frame
        self._ended = True
        for _ in range((self._first - self.count) % self._each):
            yield frame

    def cropped(self, videos: list[Tensor]) -> Iterator[list[Tensor]]:
        """Frames (3, H, W) in 8-bit units of pieces (1, 3, n, H, W), without those repeated."""
        for index in range(videos[0].shape[2]):
            self._given += 1
            if self._given <= self.count:
                yield [(video[0, :, index].float().cpu() + 1) * 127.5 for video in videos]


def clips(frames: Iterator[T], length: int | None) -> Iterator[Iterator[T]]:
    """The frames in clips of this length, the last one shorter; in one if None."""
    if length is None:
        yield frames
        return
    for first in frames:
        clip = chain([first], islice(frames, length - 1))
        yield clip
        for _ in clip:  # what was not taken of it
            pass


def _pieces(frames: Iterable[Uint8Frames]) -> Iterator[Uint8Frames]:
    """Frames in pieces (n, H, W, 3) as a stream takes them."""
    frames = iter(frames)
    for first in frames:
        length = max(1, min(8, PIECE_PIXELS // (first.shape[0] * first.shape[1])))
        yield np.stack([first, *islice(frames, length - 1)])


def eight_bits(image: np.ndarray[Any, Any]) -> Uint8Frames:
    """A frame of 8 or 16 bits, rounded to 8."""
    if image.dtype == np.uint8:
        return image
    return np.asarray((image.astype(np.float32) / 257).round().astype(np.uint8))
