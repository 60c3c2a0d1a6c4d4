"""Arrays to the planes of a pixel format: depth, matrix, range and chroma.

libswscale is not used, since in YUV of 10 bits its white is three levels too light. Everything is
computed in float32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame

from temporal_vae.video.colour import (
    BT470BG,
    BT709,
    FULL,
    LIMITED,
    MATRICES,
    WEIGHTS,
    assumed_matrix,
)
from temporal_vae.video.frames import Colour, Image, Uint8Frames
from temporal_vae.video.write.formats import ChosenFormat

STANDARD = Colour(primaries=1, transfer=1, matrix=BT709, range=LIMITED)
"""BT.709 in limited range, the default for video."""

Plane = npt.NDArray[Any]
"""Numbers (rows, columns); a plane of packed pixels has the components of a pixel side by side."""


def yuv_colour(colour: Colour | None) -> Colour:
    """The colours to write YUV in: those given, but a matrix and a range that YUV can have."""
    if colour is None:
        return STANDARD
    known = colour.matrix in MATRICES
    matrix = colour.matrix if known else BT709
    range_ = colour.range if known and colour.range in (LIMITED, FULL) else LIMITED
    return Colour(colour.primaries, colour.transfer, matrix, range_)


def rgb_colour(colour: Colour | None) -> Colour:
    """The colours to write RGB in, or grey over the full range."""
    colour = colour or STANDARD
    return Colour(colour.primaries, colour.transfer, 0, FULL)


def to_depth(image: Image, depth: int) -> Image:
    """uint8 or uint16 over the full range to `depth` bits, uint8 for 8 and else uint16, rounded."""
    top, new = int(np.iinfo(image.dtype).max), 2**depth - 1
    if top == new:
        return image
    scaled = (image.astype(np.uint32) * np.uint32(new) + top // 2) // top
    return scaled.astype(np.uint8 if depth == 8 else np.uint16)


@dataclass(frozen=True, slots=True)
class Yuv:
    """YUV of some depth; with `halved` one chroma sample, in the middle, serves 2x2 pixels."""

    colour: Colour
    depth: int
    halved: bool

    def __call__(self, image: Image) -> list[Plane]:
        """(H, W, 1 or 3) uint8 or uint16 -> Y, U and V, rounded to nearest."""
        unit = image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)
        small = _half(unit) if self.halved else unit
        if image.shape[2] == 1:
            neutral = np.zeros(small.shape[:2])
            return [self._luma(unit[..., 0]), self._chroma(neutral), self._chroma(neutral)]
        red, blue = WEIGHTS[self.colour.matrix]
        luma = self._weighted(small)
        u = (small[..., 2] - luma) / (2 - 2 * blue)
        v = (small[..., 0] - luma) / (2 - 2 * red)
        return [self._luma(self._weighted(unit)), self._chroma(u), self._chroma(v)]

    def _weighted(self, rgb: Plane) -> Plane:
        """(H, W, 3) -> luma (H, W), in the same unit."""
        red, blue = WEIGHTS[self.colour.matrix]
        return red * rgb[..., 0] + (1 - red - blue) * rgb[..., 1] + blue * rgb[..., 2]

    def _luma(self, unit: Plane) -> Plane:
        if self.colour.range == LIMITED:
            return self._rounded(unit * (219 << (self.depth - 8)) + (16 << (self.depth - 8)))
        return self._rounded(unit * (2**self.depth - 1))

    def _chroma(self, unit: Plane) -> Plane:
        limited = self.colour.range == LIMITED
        swing = 224 << (self.depth - 8) if limited else 2**self.depth - 1
        return self._rounded(unit * swing + 2 ** (self.depth - 1))

    def _rounded(self, levels: Plane) -> Plane:
        kind = np.uint8 if self.depth == 8 else np.uint16
        return np.rint(levels).clip(0, 2**self.depth - 1).astype(kind)


def _half(image: Plane) -> Plane:
    """Means of 2x2 pixels of (H, W, C); the last row or column of an odd side counts twice."""
    rows, columns = image.shape[0] % 2, image.shape[1] % 2
    if rows or columns:
        image = np.pad(image, ((0, rows), (0, columns), (0, 0)), mode="edge")
    pairs = image[0::2] + image[1::2]
    means: Plane = (pairs[:, 0::2] + pairs[:, 1::2]) / 4
    return means


def rgb_planes(image: Image, pixel_format: str) -> list[Plane]:
    """(H, W, C) of the right depth as the planes of a pixel format of RGB or grey."""
    if pixel_format.startswith("gbr"):
        order = (1, 2, 0, 3)[: image.shape[2]]
        return [image[..., channel] for channel in order]
    if image.shape[2] == 3 and pixel_format in ("bgr0", "bgra"):
        padded: Uint8Frames = np.full((*image.shape[:2], 4), 255, np.uint8)
        padded[..., :3] = image[..., ::-1]
        image = padded
    elif pixel_format == "bgra":
        image = image[..., [2, 1, 0, 3]]
    return [image.reshape(len(image), -1)]


def to_frame(planes: list[Plane], size: tuple[int, int], pixel_format: str) -> VideoFrame:
    """A frame of libav, of size (height, width), made of its planes."""
    frame = VideoFrame(size[1], size[0], pixel_format)
    for plane, values in zip(frame.planes, planes, strict=True):
        data: Any = plane
        kind = values.dtype.newbyteorder(">" if pixel_format.endswith("be") else "<")
        lines = np.frombuffer(data, kind).reshape(plane.height, -1)
        lines[:, : values.shape[1]] = values
    return frame


@dataclass(frozen=True, slots=True)
class PixelLayout:
    """How frames of shape (height, width, channels) are stored: pixel format, depth and colours."""

    shape: tuple[int, int, int]
    pixel_format: str
    depth: int
    colour: Colour
    yuv: Yuv | None
    """The conversion to YUV; None where RGB or grey is stored."""

    def planes(self, image: Image) -> list[Plane]:
        """A frame, uint8 or uint16 over the full range, as its planes."""
        if image.shape != self.shape or image.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"frames must be uint8 or uint16 {self.shape}, got {image.dtype} {image.shape}"
            )
        if self.yuv is not None:
            return self.yuv(image)
        if self.shape[2] == 1 and not self.pixel_format.startswith("gray"):
            image = np.repeat(image, 3, 2)
        return rgb_planes(to_depth(image, self.depth), self.pixel_format)

    def frame(self, image: Image) -> VideoFrame:
        """A frame as one of libav, with its colour tags."""
        height, width, _ = self.shape
        frame = to_frame(self.planes(image), (height, width), self.pixel_format)
        frame.colorspace, frame.color_range = self.colour.matrix, self.colour.range
        frame.color_primaries, frame.color_trc = self.colour.primaries, self.colour.transfer
        return frame


def layout_of(
    chosen: ChosenFormat, shape: tuple[int, int, int], colour: Colour | None
) -> PixelLayout:
    """The layout of frames (height, width, channels) in a format."""
    height, width, channels = shape
    depth, bits = chosen.depth, "" if chosen.depth == 8 else f"{chosen.depth}le"
    if chosen.codec.subsampled:
        halved = chosen.name == "vp9" or not (height % 2 or width % 2)
        tags = yuv_colour(colour)
        name = ("yuv420p" if halved else "yuv444p") + bits
        if chosen.name == "jpeg":  # which is always of this matrix and range
            name, tags = name.replace("yuv", "yuvj"), replace(tags, matrix=BT470BG, range=FULL)
        return PixelLayout(shape, name, depth, tags, Yuv(tags, depth, halved))
    if chosen.name == "y4m" and channels == 3:
        # a y4m file does not state its matrix, so it has to be the one that players assume
        tags = replace(yuv_colour(colour), matrix=assumed_matrix(height, width), range=LIMITED)
        return PixelLayout(shape, "yuv444p" + bits, depth, tags, Yuv(tags, depth, False))
    name = {
        "ffv1": {1: "gray", 3: "gbrp", 4: "gbrap"} if bits else {1: "gray", 3: "bgr0", 4: "bgra"},
        "png": {1: "gray", 3: "rgb48", 4: "rgba64"} if bits else {1: "gray", 3: "rgb24", 4: "rgba"},
        "webp": dict.fromkeys((1, 3, 4), "bgra"),
        "gif": dict.fromkeys((1, 3), "rgb24"),
        "y4m": {1: "gray"},
        "rgb": dict.fromkeys((1, 3), "rgb48" if bits else "rgb24"),
    }[chosen.name][channels]
    if bits:
        name += {"png": "16be" if name == "gray" else "be", "rgb": "le"}.get(chosen.name, bits)
    return PixelLayout(shape, name, depth, rgb_colour(colour), None)
