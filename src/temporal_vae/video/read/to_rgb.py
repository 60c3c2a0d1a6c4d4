"""Decoded frames to arrays: colour, depth, alpha, size and orientation.

libswscale converts, and two of its faults are worked around. To packed 8-bit RGB it takes a short
cut that makes everything a level darker, so planar RGB with exact rounding is asked for. In 16-bit
RGB its white is 255 * 256 (or the source's own maximum, shifted left), which `stretch` corrects.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import Interpolation, VideoReformatter

from temporal_vae.video.colour import FULL, LIMITED, colour_of, is_grey, is_rgb
from temporal_vae.video.frames import Frame, Image, Uint16Frames, VideoError
from temporal_vae.video.read.orientation import OrientationCache, turn, turned_size
from temporal_vae.video.read.prefetch import Recycler

EXACT = int(Interpolation.BILINEAR) | 0x40000  # SWS_ACCURATE_RND
THREADS = max(1, (os.cpu_count() or 1) // 2)
"""Threads that convert one frame; decoding has the other half of the cores."""
KEPT_BYTES = 32 * 2**20
"""Memory of images that are gone, kept for the next ones."""
GREY_DEPTHS = (8, 9, 10, 12, 14, 16)
LUMA = (0.2126, 0.7152, 0.0722)
"""BT.709's weights, for the grey of an RGB picture."""
PACKED_FORMATS = {
    np.uint8: {1: "gray", 3: "rgb24", 4: "rgba"},
    np.uint16: {1: "gray16le", 3: "rgb48le", 4: "rgba64le"},
}
"""libav's pixel formats by type and number of channels."""
ALPHA_LOST = (
    "its alpha channel would be lost: keep it beside the picture with alpha='keep' (or as a fourth "
    "channel with channels=4), or leave it out with alpha='drop' (--alpha drop)"
)


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """What decoded frames are made into. Sizes are (height, width) of the upright picture.

    `crop` (top, left, height, width) is cut out first; a part of `cut_size`, the whole picture
    without a crop, is then scaled to `size`. `channels` is 1 for grey, 3 for RGB, 4 for RGB and
    alpha; `alpha_beside` gives alpha as a plane beside the image. `deep` is uint16 instead of
    uint8.
    """

    size: tuple[int, int]
    cut_size: tuple[int, int]
    crop: tuple[int, int, int, int] | None
    channels: int
    alpha_beside: bool
    deep: bool

    @property
    def squeeze(self) -> Fraction:
        """By how much scaling makes a pixel wider; 1 if it is no more than rounding to pixels."""
        (rows, columns), (height, width) = self.cut_size, self.size
        if abs(rows * width - columns * height) <= max(rows, columns) + max(width, height):
            return Fraction(1)
        return Fraction(columns * height, rows * width).limit_denominator(10_000)

    def notes(self, aspect_ratio: Fraction | None) -> Iterator[str]:
        """A line if scaling changes the shape of pixels, unless it makes them square."""
        if self.squeeze != 1 and (aspect_ratio or 1) * self.squeeze != 1:
            (rows, columns), (height, width) = self.cut_size, self.size
            yield f"{columns}x{rows} is squeezed to {width}x{height}: crop='centre' keeps its shape"


def depth_of(frame: VideoFrame) -> int:
    """Bits of a frame's largest component."""
    return max(component.bits for component in frame.format.components)


def has_alpha(frame: VideoFrame) -> bool:
    """Whether a frame's format has alpha; a palette always has."""
    return frame.format.has_palette or any(c.is_alpha for c in frame.format.components)


class Converter:
    """Turns decoded frames into `Frame`s as a `FrameSpec` says.

    With `watch_alpha`, alpha that the spec has no place for is a `VideoError` unless it is opaque.
    """

    def __init__(self, path: str, spec: FrameSpec, watch_alpha: bool):
        self._path, self._spec = path, spec
        self._keep_alpha = spec.channels == 4 or spec.alpha_beside
        self._read_alpha = self._keep_alpha or watch_alpha
        self._dtype: type[np.uint8 | np.uint16] = np.uint16 if spec.deep else np.uint8
        self._scaler, self._crop_scaler = VideoReformatter(), VideoReformatter()
        self._orientation, self._memory = OrientationCache(path), Recycler(KEPT_BYTES)

    def __call__(self, frame: VideoFrame, pts: int) -> Frame:
        """Convert one frame."""
        spec, matrix = self._spec, self._orientation(frame)
        if depth_of(frame) > 8 and not spec.deep:
            raise VideoError(
                f"{self._path}: frames of {depth_of(frame)} bits after frames of 8: split the file "
                "there"
            )
        if spec.crop is None:
            stored_size = turned_size(*spec.size, matrix)
            return self._finished(turn(self._image(frame, *stored_size), matrix), pts)
        top, left, rows, columns = spec.crop
        whole = turn(self._image(frame, frame.height, frame.width), matrix)
        return self._finished(self._resized(whole[top : top + rows, left : left + columns]), pts)

    def _finished(self, image: Image, pts: int) -> Frame:
        """A frame of an image that may have an alpha channel too many."""
        colours = 1 if self._spec.channels == 1 else 3
        alpha = image[..., colours] if image.shape[2] > colours else None
        if alpha is not None and not self._keep_alpha and alpha.min() < np.iinfo(alpha.dtype).max:
            raise VideoError(f"{self._path}: {ALPHA_LOST}")
        if self._spec.channels != 4:
            image = image[..., :colours]
        return Frame(image, pts, alpha if self._spec.alpha_beside else None)

    def _image(self, frame: VideoFrame, height: int, width: int) -> Image:
        """(H, W, C) as stored, scaled; the last channel is alpha if it is read and there is one."""
        alpha = self._read_alpha and has_alpha(frame)
        grey = self._spec.channels == 1
        if is_rgb(frame) or (is_grey(frame) and alpha):
            image = self._from_rgb(frame, height, width, alpha)
            return grey_of(image) if grey else self._with_alpha(image)
        if not grey and not is_grey(frame):
            return self._with_alpha(self._from_yuv(frame, height, width, alpha))
        image = self._luma(frame, height, width)
        if alpha:
            beside = self._from_yuv(frame, height, width, alpha)[..., 3:]
            return np.concatenate([image, beside], 2)
        return image if grey else self._with_alpha(np.repeat(image, 3, 2))

    def _with_alpha(self, image: Image) -> Image:
        """With an opaque alpha channel if four channels are asked for and there are three."""
        if self._spec.channels != 4 or image.shape[2] == 4:
            return image
        opaque = np.full((*image.shape[:2], 1), np.iinfo(image.dtype).max, image.dtype)
        return np.concatenate([image, opaque], 2)

    def _scaled(
        self, frame: VideoFrame, height: int, width: int, format: str, range_: int | None = None
    ) -> VideoFrame:
        return self._scaler.reformat(
            frame, width=width, height=height, format=format, dst_color_range=range_,
            interpolation=EXACT, threads=THREADS,
        )  # fmt: skip

    def _from_rgb(self, frame: VideoFrame, height: int, width: int, alpha: bool) -> Image:
        dtype = np.uint16 if depth_of(frame) > 8 else np.uint8
        format = PACKED_FORMATS[dtype][4 if alpha else 3]
        image: Image = self._scaled(frame, height, width, format).to_ndarray()
        return image.astype(np.uint16) * 257 if self._spec.deep and dtype == np.uint8 else image

    def _from_yuv(self, frame: VideoFrame, height: int, width: int, alpha: bool) -> Image:
        deep = self._spec.deep
        colour = colour_of(frame)
        frame.colorspace, frame.color_range = colour.matrix, colour.range
        format = ("gbrap" if alpha else "gbrp") + ("16le" if deep else "")
        gbr = self._scaled(frame, height, width, format)
        image = self._memory.empty((4 if alpha else 3, height, width), self._dtype)
        for index, plane in zip((1, 2, 0, 3), gbr.planes, strict=False):
            image[index] = plane_values(plane, self._dtype, width)
        if deep:
            bits = depth_of(frame)
            stretch(image[:3], 8 if colour.range == LIMITED else bits)
            stretch(image[3:], bits)
        return image.transpose(1, 2, 0)

    def _luma(self, frame: VideoFrame, height: int, width: int) -> Image:
        """(H, W, 1): the luma that the file stores, not one computed from RGB."""
        tagged, limited = frame.color_range, colour_of(frame).range == LIMITED
        bits = next(depth for depth in GREY_DEPTHS if depth >= depth_of(frame))
        # libswscale takes all grey for full range, so the file's range is applied below
        frame.color_range = FULL
        grey = self._scaled(frame, height, width, "gray" if bits == 8 else f"gray{bits}le", FULL)
        frame.color_range = tagged
        dtype = np.uint8 if bits == 8 else np.uint16
        levels = plane_values(grey.planes[0], dtype, width)[..., None]
        image: Image = luma_levels(bits, limited, self._spec.deep)[levels & (2**bits - 1)]
        return image

    def _resized(self, image: Image) -> Image:
        """(H, W, C) scaled to the size of the spec."""
        height, width = self._spec.size
        if image.shape[:2] == (height, width):
            return image
        if image.shape[2] == 2:  # grey and alpha
            parts = [self._resized(image[..., :1]), self._resized(image[..., 1:])]
            return np.concatenate(parts, 2)
        format = PACKED_FORMATS[image.dtype.type][image.shape[2]]
        packed = np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image)
        frame = VideoFrame.from_ndarray(packed, format=format)
        scaled = self._crop_scaler.reformat(frame, width=width, height=height, interpolation=EXACT)
        result: Image = scaled.to_ndarray().reshape(height, width, -1)
        return result


def grey_of(image: Image) -> Image:
    """RGB (H, W, 3 or 4) to grey (H, W, 1 or 2) by BT.709's luma; alpha stays as it is."""
    luma = np.einsum("hwc,c->hw", image[..., :3], np.array(LUMA, np.float32)).round()
    return np.concatenate([luma.astype(image.dtype)[..., None], image[..., 3:]], 2)


def plane_values(plane: VideoPlane, dtype: npt.DTypeLike, width: int) -> Image:
    """The numbers of a plane, (H, W), without the padding at the end of its lines."""
    data: Any = plane
    return np.frombuffer(data, dtype).reshape(plane.height, -1)[:, :width]


def stretch(image: Uint16Frames, bits: int) -> None:
    """Widen 16-bit values whose white is `bits` ones, then zeros, to a white of 65535, in place.

    Repeating the upper bits below them is exact to one level.
    """
    if bits < 16:
        np.minimum(image, (2**bits - 1) << (16 - bits), out=image)
        image += image >> bits


@lru_cache(maxsize=8)
def luma_levels(bits: int, limited: bool, deep: bool) -> Image:
    """The value over the full range of each stored level of luma: (2 ** bits,), uint8 or uint16."""
    levels = np.arange(2**bits, dtype=np.float64)
    if limited:
        levels = (levels - (16 << (bits - 8))) / (219 << (bits - 8))
    else:
        levels /= 2**bits - 1
    top = 65535 if deep else 255
    return (levels.clip(0, 1) * top).round().astype(np.uint16 if deep else np.uint8)
