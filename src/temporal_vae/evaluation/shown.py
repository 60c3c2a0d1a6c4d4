"""Pictures of a clip and of its reconstructions, few and small enough to stand in one page.

Of each clip the first seconds are kept, without loss where there is room for it. Nothing else of a
frame stays in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from temporal_vae.evaluation.clips import Make
from temporal_vae.evaluation.measures import Found, Pair, need_pillow
from temporal_vae.video import Uint8Frames

ORIGINAL = "original"
CLIPS = 4
"""Clips of which pictures are kept: the first ones."""
SECONDS, FRAMES = 3.0, 120
"""How much of a clip is kept, at most."""
SIDE = 512
"""Pixels of the longer side of a picture; larger frames are scaled down."""
BYTES = 9_600_000
"""Of all pictures together; in a page's letters they are a third more."""
_Format = tuple[str, dict[str, Any]]
FORMATS: tuple[_Format, ...] = (
    ("WEBP", {"lossless": True, "method": 1}),
    *(("JPEG", {"quality": quality, "subsampling": 0}) for quality in (98, 95, 85)),
)
"""What pictures are written as: the first one with which there is room for those to come."""
FULL_ERROR = 32.0
"""8-bit levels of error, the mean over RGB, that are the end of the scale of an error's picture."""
HEAT = ((6, 4, 22), (70, 14, 105), (165, 45, 96), (237, 105, 37), (251, 185, 40), (252, 252, 190))
"""Colours of an error from 0 to `FULL_ERROR`, evenly apart."""


@dataclass
class Track:
    """The pictures of one video: the frames, their errors, and one column of pixels over time."""

    frames: list[bytes] = field(default_factory=list)
    errors: list[bytes] = field(default_factory=list)
    columns: list[Uint8Frames] = field(default_factory=list)
    format: int = 0
    """Of `FORMATS`, that of the last picture; those before may be better, never worse."""
    closeness: float = math.inf
    """The least PSNR of a picture as it is kept against the frame that it is of, dB."""

    @property
    def size(self) -> int:
        """Bytes of all pictures."""
        return sum(map(len, [*self.frames, *self.errors]))

    def time_slice(self, count: int) -> bytes:
        """The columns of the first frames, side by side, as a picture."""
        columns = np.ascontiguousarray(np.stack(self.columns[:count], 1))
        return _written(columns, FORMATS[self.format])


class ShownClip:
    """Takes in a clip's frames as its models give them, the original's with the first of them."""

    def __init__(self, fps: float, models: int, expected: int | None, room: int):
        self.fps, self.size = fps, (0, 0)
        self.limit = min(FRAMES, max(1, round(SECONDS * fps)))
        self.tracks: dict[str, Track] = {ORIGINAL: Track()}
        self._expected = min(self.limit, expected or self.limit)
        self._room = room // (models + 1)

    def measure(self, model: str) -> Make:
        """What makes a measure of this model that finds nothing, and keeps pictures."""
        return partial(_Keeper, self, model)

    def count(self, models: Iterable[str]) -> int:
        """How many frames there are of the original and of all these models."""
        tracks = (self.tracks.get(name, Track()) for name in (ORIGINAL, *models))
        return min(len(track.frames) for track in tracks)

    def add(self, model: str, index: int, pair: Pair) -> None:
        """Keep the frame at an index, if there is room."""
        original, track = self.tracks[ORIGINAL], self.tracks.setdefault(model, Track())
        if index == 0 and not original.frames:
            self._settle(pair)
        if index >= self.limit or len(track.frames) < index:
            return
        if len(original.frames) == index:
            self._keep(original, _image(pair.original))
        if len(original.frames) > index and self._keep(track, _image(pair.ours)):
            track.errors.append(self._error(pair))

    def _settle(self, pair: Pair) -> None:
        """Choose the size of pictures by the first frame."""
        height, width = pair.original.shape[1:]
        scale = min(1.0, SIDE / max(height, width))
        self.size = max(1, round(height * scale)), max(1, round(width * scale))

    def _keep(self, track: Track, frame: Uint8Frames) -> bool:
        image, left = self._scaled(frame), self._room - track.size
        each = left / max(1, self._expected - len(track.frames))
        picture = _written(image, FORMATS[track.format])
        while len(picture) > each and track.format + 1 < len(FORMATS):
            track.format += 1
            picture = _written(image, FORMATS[track.format])
        if len(picture) > left:
            return False
        if track.format:
            track.closeness = min(track.closeness, _closeness(picture, image))
        track.frames.append(picture)
        track.columns.append(image[:, image.shape[1] // 2])
        return True

    def _scaled(self, frame: Uint8Frames) -> Uint8Frames:
        from PIL import Image

        size = self.size[::-1]
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))

    def _error(self, pair: Pair) -> bytes:
        """The error of a frame before any compression, in half the size of the pictures."""
        error = pair.error.abs().mean(0).nan_to_num(FULL_ERROR)
        half = [-(-side // 2) for side in self.size]
        small = F.interpolate(error[None, None], half, mode="area")[0, 0]
        return _written(heat(small.numpy()), ("JPEG", {"quality": 90, "subsampling": 0}))


class _Keeper:
    """A measure that finds nothing, and keeps what it sees."""

    names: tuple[str, ...] = ()

    def __init__(self, clip: ShownClip, model: str):
        self._clip, self._model, self._index = clip, model, 0
        need_pillow()

    def add(self, pair: Pair) -> None:
        """Keep a frame of each."""
        self._clip.add(self._model, self._index, pair)
        self._index += 1

    def found(self) -> Found:
        """No value."""
        return Found({})


class Pictures:
    """The pictures of an evaluation: of its first clips, which share the room evenly."""

    def __init__(self, clips: int, models: int):
        self.clips: dict[str, ShownClip] = {}
        self._most, self._models = min(CLIPS, clips), models

    def of(self, path: str, fps: float, expected: int | None) -> ShownClip | None:
        """What keeps the pictures of a clip; None if there are enough clips."""
        if len(self.clips) == self._most:
            return None
        room = BYTES // self._most
        return self.clips.setdefault(path, ShownClip(fps, self._models, expected, room))


def heat(error: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Uint8Frames:
    """Errors (H, W) in 8-bit levels as colours (H, W, 3), see `HEAT`."""
    places = np.linspace(0, FULL_ERROR, len(HEAT))
    channels = [np.interp(error, places, channel) for channel in zip(*HEAT, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _image(frame: torch.Tensor) -> Uint8Frames:
    """A frame (3, H, W), NaN in black, as (H, W, 3)."""
    whole = frame.nan_to_num(0).to(torch.uint8)
    return np.asarray(whole.permute(1, 2, 0).contiguous().numpy())


def _written(image: Uint8Frames, format: _Format) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(image).save(file, format[0], **format[1])
    return file.getvalue()


def _closeness(picture: bytes, image: Uint8Frames) -> float:
    from PIL import Image

    kept = np.asarray(Image.open(BytesIO(picture)).convert("RGB")).astype(np.float32)
    square = float(np.square(kept - image).mean())
    return 10 * math.log10(255**2 / square) if square else math.inf
