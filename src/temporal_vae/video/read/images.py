"""Folders of images, and animated WebP, as clips."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.frame import VideoFrame

from temporal_vae.video.colour import colour_of, refuse_colour
from temporal_vae.video.frames import VideoError, is_regular_file
from temporal_vae.video.read.container import Source, Stamped, first_frame_info, refuse_size
from temporal_vae.video.read.orientation import refuse_mirrored

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
DEFAULT_RATE = Fraction(25)
"""Frames per second of a folder of images, which states no rate."""
MILLISECOND = Fraction(1, 1000)
SHORTEST, REPLACEMENT = 10, 100
"""Browsers and libav show a frame of at most 10 ms for 100 ms instead."""


class ImageFolder(Source):
    """The images of a folder, in the natural order of their names, at a rate of `fps`."""

    opaque_until_seen = True

    def __init__(self, path: str, fps: Fraction | None):
        visible = [entry for entry in Path(path).iterdir() if not entry.name.startswith(".")]
        self._files = image_files(path)
        if not self._files:
            raise VideoError(f"{path}: the folder holds no images ({', '.join(SUFFIXES)})")
        head, codec = _image(self._files[0])
        self._size = head.width, head.height
        rate = fps or DEFAULT_RATE
        notes = []
        if fps is None:
            notes.append(f"images state no rate: taken as {rate} frames per second (fps sets it)")
        if others := len(visible) - len(self._files):
            notes.append(f"{others} of {len(visible)} names in the folder are not images")
        self.info = first_frame_info(
            head, path, codec=codec, fps=rate, time_base=1 / rate, frames=len(self._files),
            notes=notes,
        )  # fmt: skip

    def frames(self, start: int) -> Iterator[Stamped]:
        """See `Source`."""
        for index, file in enumerate(self._files[start:], start):
            frame, _ = _image(file)
            if (frame.width, frame.height) != self._size:
                raise VideoError(
                    f"{file}: {frame.width}x{frame.height}, where the folder's first image is "
                    f"{self._size[0]}x{self._size[1]}: images of a clip are of one size"
                )
            yield frame, index


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The images of a folder that are read as a clip, in their order."""
    entries = sorted(Path(folder).iterdir(), key=lambda p: natural_order(p.name))
    return [e for e in entries if e.name[0] != "." and e.suffix.lower() in SUFFIXES]


class AnimatedWebP(Source):
    """The frames of a WebP animation through Pillow, since libav does not decode it."""

    opaque_until_seen = True

    def __init__(self, path: str, picture: PillowImage):
        self.path, self._picture = path, picture
        head = _webp_frame(picture, 0, path)
        frames: int = picture.n_frames  # type: ignore[attr-defined]
        picture.load()
        fps = (1 / (_duration(picture) * MILLISECOND)).limit_denominator(1001)
        self.info = first_frame_info(
            head, path, codec="webp", fps=fps, time_base=MILLISECOND, frames=frames
        )

    def frames(self, start: int) -> Iterator[Stamped]:
        """See `Source`; all frames come, as each is drawn over those before it."""
        pts = 0
        for index in range(self.info.frames or 0):
            yield _webp_frame(self._picture, index, self.path), pts
            pts += _duration(self._picture)

    def close(self) -> None:
        """See `Source`."""
        self._picture.close()


def is_animated_webp(path: str) -> bool:
    """Whether a file is a WebP with more than one frame."""
    if not is_regular_file(path):
        return False
    with open(path, "rb") as file:
        head = file.read(21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def open_folder(path: str, fps: Fraction | None) -> ImageFolder:
    """Raises `VideoError` for a folder without images, or one that cannot be read."""
    try:
        return ImageFolder(path, fps)
    except OSError as error:
        raise VideoError(f"{path}: the folder cannot be read ({error.strerror})") from error


def open_webp(path: str) -> AnimatedWebP:
    """Raises `VideoError` where Pillow is missing, or cannot read it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise VideoError(
            f"{path}: animated WebP is read through Pillow: pip install pillow"
        ) from error
    try:
        picture = Image.open(path)
        refuse_size(picture.width, picture.height, path)
        return AnimatedWebP(path, picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: not a WebP that can be read ({error})") from error


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def _image(file: Path) -> tuple[VideoFrame, str]:
    """The picture in a file, and its codec."""
    try:
        with av.open(str(file.absolute()), metadata_errors="replace") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise VideoError(f"{file}: holds no picture")
            refuse_size(stream.width, stream.height, str(file))
            frame = next(container.decode(stream), None)
            codec = stream.codec_context.name
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{file}: not an image that can be read ({error})") from error
    if frame is None or frame.is_corrupt:
        raise VideoError(f"{file}: not an image that can be read: it is damaged")
    refuse_colour(colour_of(frame), str(file))
    refuse_mirrored(str(file))
    return frame, codec


def _webp_frame(picture: PillowImage, index: int, path: str) -> VideoFrame:
    try:
        picture.seek(index)
        pixels = np.asarray(picture.convert("RGBA"))
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise VideoError(f"{path}: frame {index} cannot be read ({error})") from error
    return VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgba")


def _duration(picture: PillowImage) -> int:
    """Milliseconds that the current frame is shown."""
    stated = int(picture.info.get("duration", REPLACEMENT))
    return stated if stated > SHORTEST else REPLACEMENT
