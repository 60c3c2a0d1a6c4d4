"""What videos are written as: codecs, the containers that hold them, and their bit depths."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from temporal_vae.video.frames import PIPE, VideoError

SMALLEST_H265 = 64
"""Pixels of the shorter side; for smaller frames PyAV's libx265 writes past its buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a video is written; what is None follows from the name of the file.

    `codec` is h264, h265, vp9, ffv1 (lossless), png (an image, or a folder of them), jpeg, webp,
    gif, y4m (raw YUV) or rgb (raw RGB). `depth` is the bits of a component, 8 by default. `quality`
    of a lossy codec is from 0, the best, to 51 (the rate factor, CRF), or to 63 for VP9, 30 for
    JPEG and 100 for WebP.
    """

    codec: str | None = None
    depth: int | None = None
    quality: float | None = None


@dataclass(frozen=True, slots=True)
class Codec:
    """What a codec can do."""

    title: str
    depths: tuple[int, ...]
    encoder: str | None = None
    """libav's name of it, for a codec in one of libav's containers; else None."""
    quality: float | None = None
    """The default; None for a lossless codec."""
    worst: int = 51
    alpha: tuple[int, ...] = ()
    """The depths at which it takes alpha."""
    subsampled: bool = False
    """Whether it stores YUV, with colours of half the size where that can be."""


CODECS = {
    "h264": Codec("H.264", (8, 10), "libx264", 14, subsampled=True),
    "h265": Codec("H.265", (8, 10), "libx265", 14, subsampled=True),
    "vp9": Codec("VP9", (8,), "libvpx-vp9", 18, worst=63, subsampled=True),
    "ffv1": Codec("FFV1, lossless RGB", (8, 10, 12, 14, 16), "ffv1", alpha=(8, 10, 12, 16)),
    "png": Codec("PNG images", (8, 16), alpha=(8, 16)),
    "jpeg": Codec("JPEG", (8,), quality=1, worst=30, subsampled=True),
    "webp": Codec("WebP", (8,), quality=10, worst=100, alpha=(8,)),
    "gif": Codec("GIF", (8,)),
    "y4m": Codec("raw YUV", (8, 10, 12, 16)),
    "rgb": Codec("raw RGB without a header", (8, 16)),
}
FOLDER = ""
"""In place of a suffix: a name without one is that of a folder."""
CODECS_BY_SUFFIX = {
    ".mp4": ("h264", "h265"),
    ".mov": ("h264", "h265"),
    ".mkv": ("ffv1", "h264", "h265", "vp9"),
    ".webm": ("vp9",),
    ".png": ("png",),
    ".jpg": ("jpeg",),
    ".jpeg": ("jpeg",),
    ".webp": ("webp",),
    ".gif": ("gif",),
    ".y4m": ("y4m",),
    ".rgb": ("rgb",),
    FOLDER: ("png",),
    PIPE: ("ffv1", "h264", "h265", "vp9", "y4m", "rgb"),
}
"""What a file may hold; the first is the default."""
STILLS = (".png", ".jpg", ".jpeg")
"""Files of one frame."""
ANIMATIONS = (".webp", ".gif")
"""Images of one frame or several, with times."""


@dataclass(frozen=True, slots=True)
class ChosenFormat:
    """A `Format` in which everything is decided. `suffix` may be `FOLDER` or `PIPE`."""

    name: str
    suffix: str
    depth: int
    quality: float | None

    @property
    def codec(self) -> Codec:
        """What the codec can do."""
        return CODECS[self.name]

    @property
    def in_container(self) -> bool:
        """Whether one of libav's containers holds it, with timestamps and colour tags."""
        return self.codec.encoder is not None

    def check_frames(self, count: int | None) -> None:
        """Raise `VideoError` for more frames than a file can hold; None are unknown."""
        if self.suffix in STILLS and (count or 1) > 1:
            raise VideoError(
                f"a {self.suffix} file holds one frame, and there are several: take .gif, .webp, "
                "a video such as .mp4, or a name without a suffix for a folder of PNG"
            )

    def check(self, height: int, width: int, channels: int) -> None:
        """Raise `VideoError` for frames that this format cannot hold."""
        if channels not in (1, 3, 4):
            raise VideoError(f"frames have 1 (grey), 3 (RGB) or 4 (RGBA) channels, not {channels}")
        if channels == 4 and not self.codec.alpha:
            raise VideoError(
                f"{self.codec.title} is not written with alpha: take .mkv (FFV1), PNG or WebP, "
                "or drop the fourth channel"
            )
        if channels == 4 and self.depth not in self.codec.alpha:
            raise VideoError(f"alpha is written with {_bits(self.codec.alpha)}, not {self.depth}")
        if self.name == "h265" and min(height, width) < SMALLEST_H265:
            raise VideoError(
                f"H.265 is written from {SMALLEST_H265}x{SMALLEST_H265} on, not {width}x{height}: "
                "take codec h264 or ffv1"
            )


def choose(path: str | os.PathLike[str], format: Format | None = None) -> ChosenFormat:
    """What is written under a name. Raises `VideoError` for what the name does not allow."""
    format, name = format or Format(), os.fspath(path)
    suffix = PIPE if name == PIPE else Path(name).suffix.lower()
    if suffix not in CODECS_BY_SUFFIX:
        raise VideoError(f"cannot write {name}: the name must end in {_known_suffixes()}")
    key = CODECS_BY_SUFFIX[suffix][0] if format.codec is None else format.codec
    if key not in CODECS:
        raise VideoError(f"no codec {key!r}: there are {', '.join(CODECS)}")
    if key not in CODECS_BY_SUFFIX[suffix]:
        where = {PIPE: "a pipe", FOLDER: "a folder, as a name without a suffix is,"}
        others = [_place(other) for other, held in CODECS_BY_SUFFIX.items() if key in held]
        raise VideoError(
            f"cannot write {name}: {where.get(suffix, suffix)} holds "
            f"{' or '.join(CODECS_BY_SUFFIX[suffix])}, and {key} is written to {', '.join(others)}"
        )
    codec = CODECS[key]
    depth = 8 if format.depth is None else format.depth
    if depth not in codec.depths:
        able = [name for name, other in CODECS.items() if depth in other.depths]
        hint = f": take {' or '.join(able)}" if able else ""
        raise VideoError(f"{codec.title} is written with {_bits(codec.depths)}, not {depth}{hint}")
    return ChosenFormat(key, suffix, depth, _quality(format.quality, codec))


def _quality(wanted: float | None, codec: Codec) -> float | None:
    if wanted is None:
        return codec.quality
    if codec.quality is None:
        raise VideoError(f"{codec.title} loses nothing: it has no quality to choose")
    if not 0 <= wanted <= codec.worst:
        raise VideoError(f"quality of {codec.title} is 0 (best) to {codec.worst}, not {wanted:g}")
    return wanted


def depth_for(path: str | os.PathLike[str], format: Format, bits: int) -> int:
    """The depth that is asked for, else the least that keeps `bits`, else the most there is."""
    if format.depth is not None:
        return format.depth
    depths = choose(path, format).codec.depths
    return next((depth for depth in depths if depth >= bits), depths[-1])


def depth_notes(path: str | os.PathLike[str], format: Format, bits: int) -> list[str]:
    """A line if `depth_for` keeps fewer bits than a source has, though nobody asked for that."""
    depth = depth_for(path, format, bits)
    if format.depth is not None or depth >= bits:
        return []
    title = choose(path, format).codec.title
    return [f"its {bits} bits are written as {depth}, the most that {title} is written with"]


def _bits(depths: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, depths))} bits"


def _place(suffix: str) -> str:
    names = {PIPE: "- (a pipe)", FOLDER: "a folder (a name without a suffix)"}
    return names.get(suffix, suffix)


def _known_suffixes() -> str:
    names = [
        f"{suffix} ({', '.join(CODECS[codec].title for codec in held)})"
        for suffix, held in CODECS_BY_SUFFIX.items()
        if suffix not in (PIPE, FOLDER)
    ]
    return f"{', '.join(names)}, or be that of a folder without a suffix ({CODECS['png'].title})"
