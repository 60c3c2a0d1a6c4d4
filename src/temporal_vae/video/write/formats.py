"""What videos are written as: codecs, the containers that hold them, and how deep they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from temporal_vae.video.frames import PIPE, VideoError

SMALLEST_H265 = 64
"""Pixels of the shortest side: below, libx265 as PyAV bundles it writes past its buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a video is written; None leaves it to the name of the file.

    `codec` is h264, h265, vp9, ffv1 (lossless), png (a folder of images), y4m or rgb (no codec at
    all). `depth` is the bits of a component, 8 unless told. `quality` is the rate factor of a lossy
    codec, the lower the better: 0 to 51, of VP9 to 63.
    """

    codec: str | None = None
    depth: int | None = None
    quality: float | None = None


@dataclass(frozen=True, slots=True)
class Codec:
    """What one can do. `alpha` are the depths at which it takes RGBA."""

    title: str
    depths: tuple[int, ...]
    encoder: str | None = None
    quality: float | None = None
    worst: int = 51
    alpha: tuple[int, ...] = ()

    @property
    def subsampled(self) -> bool:
        """Whether colours are stored at half the size, in YUV."""
        return self.quality is not None


DEEP = (8, 10, 12, 14, 16)
CODECS = {
    "h264": Codec("H.264", (8, 10), "libx264", 14),
    "h265": Codec("H.265", (8, 10), "libx265", 14),
    "vp9": Codec("VP9", (8,), "libvpx-vp9", 18, worst=63),
    "ffv1": Codec("FFV1, lossless RGB", DEEP, "ffv1", alpha=(8, 10, 12, 16)),
    "png": Codec("PNG images", (8, 16), "png", alpha=(8, 16)),
    "y4m": Codec("raw YUV", (8, 10, 12, 16)),
    "rgb": Codec("raw RGB without a header", (8, 16)),
}
HELD = {
    ".mp4": ("h264", "h265"),
    ".mov": ("h264", "h265"),
    ".mkv": ("ffv1", "h264", "h265", "vp9"),
    ".webm": ("vp9",),
    ".y4m": ("y4m",),
    ".rgb": ("rgb",),
    "": ("png",),
    PIPE: ("ffv1", "h264", "h265", "vp9", "y4m", "rgb"),
}
"""By suffix what a file may hold, first what it holds unless told; "" is a folder."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A format with nothing left open."""

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
        """Whether libav's containers hold it, with timestamps and tags."""
        return self.name not in ("png", "y4m", "rgb")

    def check(self, height: int, width: int, channels: int) -> None:
        """Raise `VideoError` for frames that it cannot hold."""
        if channels not in (1, 3, 4):
            raise VideoError(f"frames have 1 (grey), 3 (RGB) or 4 (RGBA) channels, not {channels}")
        if channels == 4 and self.codec.alpha and self.depth not in self.codec.alpha:
            depths = ", ".join(map(str, self.codec.alpha))
            raise VideoError(f"alpha is written with {depths} bits, not {self.depth}")
        if channels == 4 and not self.codec.alpha:
            raise VideoError(
                f"{self.codec.title} is not written with alpha: take .mkv (FFV1), a folder of PNG, "
                "or drop the fourth channel"
            )
        if self.name == "h265" and min(height, width) < SMALLEST_H265:
            raise VideoError(
                f"H.265 is written from {SMALLEST_H265}x{SMALLEST_H265} on, not {width}x{height}: "
                "take codec h264 or ffv1"
            )


def choose(path: str | os.PathLike[str], format: Format | None = None) -> Chosen:
    """What is written under a name. Raises `VideoError` for what cannot be."""
    format = format or Format()
    name = os.fspath(path)
    suffix = PIPE if name == PIPE else Path(name).suffix.lower()
    if suffix not in HELD:
        raise VideoError(f"cannot write {name}: the name must end in {_known()}")
    codec = HELD[suffix][0] if format.codec is None else format.codec
    if codec not in CODECS:
        raise VideoError(f"no codec {codec!r}: there are {', '.join(CODECS)}")
    if codec not in HELD[suffix]:
        where = {PIPE: "a pipe", "": "a folder, as a name without a suffix is,"}.get(suffix, suffix)
        others = [_place(s) for s, held in HELD.items() if codec in held]
        raise VideoError(
            f"cannot write {name}: {where} holds {' or '.join(HELD[suffix])}, and {codec} is "
            f"written to {', '.join(others)}"
        )
    able = CODECS[codec]
    depth = 8 if format.depth is None else format.depth
    if depth not in able.depths:
        depths = ", ".join(map(str, able.depths))
        raise VideoError(f"{able.title} is written with {depths} bits, not {depth}{_deeper(depth)}")
    quality = able.quality if format.quality is None else format.quality
    if format.quality is not None and able.quality is None:
        raise VideoError(f"{able.title} loses nothing: it has no quality to choose")
    if quality is not None and not 0 <= quality <= able.worst:
        raise VideoError(f"quality of {able.title} is 0 (best) to {able.worst}, not {quality:g}")
    return Chosen(codec, suffix, depth, quality)


def depth_for(path: str | os.PathLike[str], format: Format, bits: int) -> int:
    """The depth that is asked for, else the least that keeps `bits`, else the most there is."""
    if format.depth is not None:
        return format.depth
    depths = choose(path, format).codec.depths
    return next((depth for depth in depths if depth >= bits), depths[-1])


def depth_notes(path: str | os.PathLike[str], format: Format, bits: int) -> list[str]:
    """A line where `depth_for` keeps fewer bits than a source has, which nobody asked for."""
    depth, title = depth_for(path, format, bits), choose(path, format).codec.title
    if format.depth is not None or depth >= bits:
        return []
    return [f"its {bits} bits are written as {depth}, the most that {title} is written with"]


def _place(suffix: str) -> str:
    return {PIPE: "- (a pipe)", "": "a folder (a name without a suffix)"}.get(suffix, suffix)


def _known() -> str:
    names = [
        f"{suffix} ({', '.join(CODECS[codec].title for codec in held)})"
        for suffix, held in HELD.items()
        if suffix not in (PIPE, "")
    ]
    return f"{', '.join(names)}, or be that of a folder without a suffix ({CODECS['png'].title})"


def _deeper(depth: int) -> str:
    able = [name for name, codec in CODECS.items() if depth in codec.depths]
    return f": take {' or '.join(able)}" if able else ""
