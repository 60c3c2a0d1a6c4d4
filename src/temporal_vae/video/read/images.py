"""Folders of images, the pages of a TIFF, and animated WebP, as clips."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from av.video.frame import VideoFrame

from temporal_vae.video.frames import VideoError, is_regular_file
from temporal_vae.video.read.container import (
    ContainerReader,
    Source,
    Stamped,
    first_frame_info,
    refuse_size,
)
from temporal_vae.video.read.exif import ORIENTATION, Exif, tiff_pages

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
DEFAULT_RATE = Fraction(25)
"""Frames per second of images, which state no rate."""
MILLISECOND = Fraction(1, 1000)
SHORTEST, REPLACEMENT = 10, 100
"""Browsers show a frame of a WebP of at most 10 ms for 100 ms instead."""
LISTED_GAPS = 3
"""Gaps between numbers that are told one by one."""

Pages = list[int]
"""As `tiff_pages` gives them: of any other image [], which is one page."""


class Pictures(Source):
    """Images one after another at a rate of `fps`: those of a folder, and all pages of a TIFF."""

    opaque_until_seen = True
    takes_rate = True

    def __init__(
        self, path: str, files: list[tuple[Path, Pages]], fps: Fraction | None,
        notes: Sequence[str] = (),
    ):  # fmt: skip
        self._files, self._animated = files, list[str]()
        with closing(_opened(*files[0])) as first:
            (head, _), codec = next(first.frames(0)), first.info.codec
        self._size = head.width, head.height
        rate = fps or DEFAULT_RATE
        if fps is None:
            unsaid = f"images state no rate: taken as {rate} frames per second (fps sets it)"
            notes = [unsaid, *notes]
        self.info = first_frame_info(
            head, path, codec=codec, fps=rate, time_base=1 / rate,
            frames=sum(max(1, len(pages)) for _, pages in files), notes=notes,
        )  # fmt: skip

    def frames(self, start: int) -> Iterator[Stamped]:
        """See `Source`."""
        index = 0
        for file, pages in self._files:
            count = max(1, len(pages))
            if index + count > start:
                for at, frame in enumerate(self._images(file, pages, count), index):
                    yield frame, at
            index += count

    def notes(self, complete: bool) -> Iterator[str]:
        """See `Source`."""
        for name in self._animated:
            yield f"{name} holds more frames than its first, which is taken"

    def _images(self, file: Path, pages: Pages, count: int) -> Iterator[VideoFrame]:
        with closing(_opened(file, pages)) as source:
            images = source.frames(0)
            for page in range(count):
                frame, _ = next(images, (None, 0))
                if frame is None or frame.is_corrupt:
                    what = f"page {page + 1}" if pages else "it"
                    raise VideoError(f"{file}: not an image that can be read: {what} is damaged")
                if (frame.width, frame.height) != self._size:
                    raise VideoError(
                        f"{file}: {frame.width}x{frame.height}, where the first image is "
                        f"{self._size[0]}x{self._size[1]}: images of a clip are of one size"
                    )
                yield frame
            if next(images, None) is not None:
                self._animated.append(file.name)


def _opened(file: Path, pages: Pages) -> ContainerReader:
    return ContainerReader(str(file), alpha=False, pages=pages)


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The images of a folder that are read as a clip, in their order."""
    entries = sorted(Path(folder).iterdir(), key=lambda p: natural_order(p.name))
    return [e for e in entries if e.name[0] != "." and e.suffix.lower() in SUFFIXES]


class AnimatedWebP(Source):
    """The frames of a WebP animation through Pillow, since libav does not decode it."""

    opaque_until_seen = True

    def __init__(self, path: str, picture: PillowImage):
        self.path, self._picture = path, picture
        self._delays = _webp_delays(path)
        if not self._delays:
            raise VideoError(f"{path}: not a WebP that can be read: it holds no frame")
        self._orientation = picture.getexif().get(ORIENTATION, 1)
        fps = len(self._delays) / (sum(self._delays) * MILLISECOND)
        self.info = first_frame_info(
            self._frame(0), path, codec="webp", fps=fps, time_base=MILLISECOND,
            frames=len(self._delays),
        )  # fmt: skip

    def frames(self, start: int) -> Iterator[Stamped]:
        """See `Source`; all frames come, as each is drawn over those before it."""
        for index, begin in enumerate(accumulate(self._delays[:-1], initial=0)):
            yield self._frame(index), begin

    def close(self) -> None:
        """See `Source`."""
        self._picture.close()

    def _frame(self, index: int) -> VideoFrame:
        try:
            self._picture.seek(index)
            pixels = np.asarray(self._picture.convert("RGBA"))
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            raise VideoError(f"{self.path}: frame {index} cannot be read ({error})") from error
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgba")
        frame.opaque = Exif(self._orientation)
        return frame


def is_animated_webp(path: str) -> bool:
    """Whether a file is a WebP with more than one frame."""
    if not is_regular_file(path):
        return False
    with open(path, "rb") as file:
        head = file.read(21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def open_folder(path: str, fps: Fraction | None) -> Pictures:
    """Raises `VideoError` for a folder without images, or one that cannot be read."""
    try:
        visible = [entry for entry in Path(path).iterdir() if not entry.name.startswith(".")]
        files = image_files(path)
    except OSError as error:
        raise VideoError(f"{path}: the folder cannot be read ({error.strerror})") from error
    if not files:
        raise VideoError(f"{path}: the folder holds no images ({', '.join(SUFFIXES)})")
    notes = gap_notes([file.name for file in files])
    if others := len(visible) - len(files):
        notes.append(f"{others} of {len(visible)} names in the folder are not images")
    return Pictures(path, [(file, tiff_pages(str(file))) for file in files], fps, notes)


def open_pages(path: str, fps: Fraction | None) -> Pictures | None:
    """A TIFF of several pages; None for any other file."""
    pages = tiff_pages(path) if is_regular_file(path) else []
    return Pictures(path, [(Path(path), pages)], fps) if len(pages) > 1 else None


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


def gap_notes(names: Sequence[str]) -> list[str]:
    """Lines that name what is missing between files whose names are numbered.

    Numbers that all grow by more than one, as of every tenth frame, miss nothing.
    """
    found = [(b, *growth) for a, b in pairwise(names) if (growth := _growth(a, b))]
    least = min((step for *_, step in found), default=0)
    gaps = [gap for gap in found if gap[-1] > least]
    notes = []
    for after, parts, at, step in gaps[:LISTED_GAPS]:
        number, digits = int(parts[at]), len(parts[at])
        missing = [
            "".join([*parts[:at], str(number + more).zfill(digits), *parts[at + 1 :]])
            for more in (least, (step - 1) // least * least)
        ]
        which = f"{missing[0]} is" if missing[0] == missing[1] else f"{' to '.join(missing)} are"
        notes.append(f"{which} missing: {after} comes in its place")
    if len(gaps) > LISTED_GAPS:
        notes.append(f"numbers are missing in {len(gaps) - LISTED_GAPS} more places")
    return notes


def _growth(a: str, b: str) -> tuple[list[str], int, int] | None:
    """The parts of a name, which of them is the number that grows to the next name, and its step.

    None where more differs, or nothing grows.
    """
    parts, others = re.split(r"(\d+)", a), re.split(r"(\d+)", b)
    changed = [at for at, (x, y) in enumerate(zip(parts, others, strict=False)) if x != y]
    if len(parts) != len(others) or len(changed) != 1 or changed[0] % 2 == 0:
        return None
    at = changed[0]
    step = int(others[at]) - int(parts[at])
    return (parts, at, step) if step > 0 else None  # 1 and 01 are one number


def _webp_delays(path: str) -> list[int]:
    """Milliseconds that each frame of an animation is shown."""
    delays = []
    with open(path, "rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            end = file.tell() + size + size % 2
            if head[:4] == b"ANMF":
                stated = int.from_bytes(file.read(16)[12:15], "little")
                delays.append(stated if stated > SHORTEST else REPLACEMENT)
            file.seek(end)
    return delays
