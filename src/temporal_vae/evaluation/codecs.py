"""What gives a reconstruction: models, the linear baselines, videos that are there already.

A codec takes the frames of a clip one by one, uint8 (H, W, 3), and gives as many: float tensors
(3, H, W) in 8-bit units, not rounded, NaN where a model gave NaN. It may take some ahead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from inspect import signature
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from temporal_vae.evaluation.baseline import LinearBaseline
from temporal_vae.evaluation.measures import missing
from temporal_vae.evaluation.perturbed import perturbations
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


class _InClips(_Perturbable):
    """What takes clips of whole latents: of a length, or one of all frames if that is None."""

    _length: int | None
    _frames_per_latent: int

    def perturbed(self, frames: Frames, shares: Sequence[float]) -> Iterator[list[Tensor]]:
        """Clip by clip; the last frame is repeated up to a whole latent. See `Codec`."""
        generator = torch.Generator().manual_seed(0)
        for clip in clips(frames, self._length):
            counted = Whole(clip, self._frames_per_latent)
            for given in self._decoded(_pieces(counted), shares, generator):
                yield from counted.cropped(given)

    def _decoded(
        self, pieces: Iterator[Uint8Frames], shares: Sequence[float], generator: torch.Generator
    ) -> Iterator[list[Tensor]]:
        """The frames (1, 3, n, H, W) of one clip, in whole latent cells, for each share."""
        raise NotImplementedError


class ModelCodec(_InClips):
    """A model by its posterior mean, as a stream, so in memory that is flat in the clip's length.

    A model with a norm over the clip walks clips of its own length; `clip_frames` cuts any model's
    frames into clips that know nothing of each other. With 1 it sees frame by frame.
    """

    def __init__(self, model: TemporalVAE, clip_frames: int | None = None):
        if model.input_channels != 3:
            raise ValueError(
                f"evaluate takes models of RGB, and this one has {model.input_channels} channels"
            )
        self._streams = model.encode_reach is not None and model.decode_reach is not None
        self._model, self._frames_per_latent = model, model.frames_per_latent
        its_own = None if self._streams else model.config.clip_frames
        self._length = clip_frames or its_own

    @torch.no_grad()
    def _decoded(
        self, pieces: Iterator[Uint8Frames], shares: Sequence[float], generator: torch.Generator
    ) -> Iterator[list[Tensor]]:
        model = self._model
        videos = _videos(pieces, model.downsample_factor, model.device, model.dtype)
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


class DiffusersCodec(_InClips):
    """A VAE of diffusers by its own code; a clip is whole in memory, so long ones need a length."""

    def __init__(self, vae: Any, clip_frames: int | None = None):
        self._vae, self._length = vae, clip_frames
        self._frames_per_latent = int(_config(vae, 1, *_TIME_RATIOS))
        blocks = len(_config(vae, (), "block_out_channels"))
        self._factor = int(_config(vae, 2 ** max(0, blocks - 1), *_SPACE_RATIOS))
        weights = next(p for p in vae.encoder.parameters() if p.ndim > 3)
        self._takes_videos = weights.ndim == 5
        named = "num_frames" in signature(vae.decode).parameters
        self._decode = (lambda z: vae.decode(z, num_frames=len(z))) if named else vae.decode

    @classmethod
    def load(
        cls, folder: str, dtype: torch.dtype, device: torch.device, clip_frames: int | None = None
    ) -> DiffusersCodec:
        """From a folder as `save_pretrained` of diffusers writes it, of safetensors.

        Raises `ValueError` for what is none.
        """
        try:
            import diffusers
        except ImportError as error:
            raise ValueError(missing("diffusers", "diffusers")) from error
        try:
            name = json.loads((Path(folder) / "config.json").read_text())["_class_name"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder} has no config.json that names a class of diffusers"
            ) from error
        kind = getattr(diffusers, name, None)
        if not name.startswith("Autoencoder") or kind is None:
            raise ValueError(f"{folder} holds {name}, which is no VAE of the installed diffusers")
        vae = kind.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype)
        return cls(vae.to(device).eval(), clip_frames)

    @torch.no_grad()
    def _decoded(
        self, pieces: Iterator[Uint8Frames], shares: Sequence[float], generator: torch.Generator
    ) -> Iterator[list[Tensor]]:
        videos = _videos(pieces, self._factor, self._vae.device, self._vae.dtype)
        video = torch.cat(list(videos), 2)
        if not self._takes_videos:
            video = video[0].transpose(0, 1)
        latents = self._vae.encode(video).latent_dist.mode()
        noise = torch.randn(latents.shape, generator=generator).to(latents) * self._deviation(
            latents
        )
        given = [self._decode(latents + share * noise).sample for share in shares]
        yield given if self._takes_videos else [each.transpose(0, 1)[None] for each in given]

    def _deviation(self, latents: Tensor) -> Tensor:
        """Of the latents, by the configuration: of each channel, or one for all."""
        stated = _config(self._vae, None, "latents_std")
        if stated is None:
            return torch.tensor(1 / _config(self._vae, 1.0, "scaling_factor")).to(latents)
        return torch.tensor(stated).view(-1, *[1] * (latents.ndim - 2)).to(latents)


_TIME_RATIOS = ("scale_factor_temporal", "temporal_compression_ratio")
_SPACE_RATIOS = ("scale_factor_spatial", "spatial_compression_ratio")


def _config(vae: Any, default: Any, *names: str) -> Any:
    """The first of these that a VAE of diffusers states."""
    stated = (vae.config.get(name) or vars(vae).get(name) for name in names)
    return next((value for value in stated if value is not None), default)


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
                    f"{self._name} has more frames than the {count} of the clip: a reconstruction "
                    "has as many as its original"
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
        self._height = self._width = 0

    def __iter__(self) -> Frames:
        for frame in self._frames:
            self.count += 1
            self._height, self._width, _ = frame.shape
            yield frame
        for _ in range((self._first - self.count) % self._each):
            yield frame

    def cropped(self, videos: list[Tensor]) -> Iterator[list[Tensor]]:
        """Frames (3, H, W) in 8-bit units of pieces (1, 3, n, H, W), without what was repeated."""
        for index in range(videos[0].shape[2]):
            self._given += 1
            if self._given <= self.count:
                frames = (video[0, :, index, : self._height, : self._width] for video in videos)
                yield [(frame.float().cpu() + 1) * 127.5 for frame in frames]


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


def _videos(
    pieces: Iterator[Uint8Frames], factor: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Pieces as a model takes them, (1, 3, n, H, W) in whole latent cells."""
    return (to_pixels(pad_frames(piece, factor)).to(device, dtype) for piece in pieces)


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
