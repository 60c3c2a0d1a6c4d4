"""Decoded frames to arrays: colour, depth, alpha, size and the way up.

libswscale converts, with two cares. Planar RGB with exact rounding is asked for, since its packed
RGB of 8 bits takes a short cut that darkens everything by a level. And its RGB of 16 bits has its
white at 255 * 256 (or at the source's own maximum, shifted left), which is set right here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import Interpolation, VideoReformatter

from temporal_vae.video.colour import FULL, LIMITED, colour_of, is_grey, is_rgb
from temporal_vae.video.frames import Frame, Image, Uint16Frames, VideoError
from temporal_vae.video.read.prefetch import Recycler

EXACT = int(Interpolation.BILINEAR) | 0x40000  # SWS_ACCURATE_RND
THREADS = max(1, (os.cpu_count() or 1) // 2)
"""That convert one frame: decoding has the other half of the cores."""
KEPT_BYTES = 32 * 2**20
"""Memory of images that waits for the next ones."""
GREY_DEPTHS = (8, 9, 10, 12, 14, 16)
LUMA = (0.2126, 0.7152, 0.0722)
"""BT.709's weights, for the grey of a picture that is RGB."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What frames become. Sizes are those of the upright picture.

    `crop` (top, left, height, width) is cut out first, then scaled to `size` (height, width).
    `channels` is 1 for grey, 3 for RGB, 4 for RGB and alpha; `plane` keeps alpha beside the image.
    """

    size: tuple[int, int]
    crop: tuple[int, int, int, int] | None
    channels: int
    plane: bool
    deep: bool


def depth_of(frame: VideoFrame) -> int:
    """Bits of its largest component."""
    return max(component.bits for component in frame.format.components)


def has_alpha(frame: VideoFrame) -> bool:
    """Whether its format has alpha; a palette has it always."""
    return frame.format.has_palette or any(c.is_alpha for c in frame.format.components)


def orientation(frame: VideoFrame) -> npt.NDArray[np.int64] | None:
    """Its display matrix as whole quarter turns and flips, ((a, b), (c, d)) of -1, 0 and 1.

    None when it stands upright; raises `ValueError` for another angle.
    """
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside what PyAV has no name for, only the angle is to be had
        turns = np.deg2rad(-frame.rotation)
        matrix = np.rint([[np.cos(turns), np.sin(turns)], [-np.sin(turns), np.cos(turns)]])
        return None if frame.rotation == 0 else matrix.astype(np.int64)
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].astype(np.int64)
    matrix = np.sign([[a, b], [c, d]]) * (np.abs([[a, b], [c, d]]) > 1 << 8)
    if not matrix.any():  # damaged: players show such a picture as it is
        return None
    if not np.array_equal(np.abs(matrix).sum(0), [1, 1]) or not np.abs(matrix.sum(1)).all():
        raise ValueError(f"turned by {frame.rotation} degrees")
    return None if np.array_equal(matrix, np.eye(2)) else matrix


class WayUp:
    """The orientations of a video's frames, looked up where the angle changes.

    PyAV's side data and their frame hold each other: a frame that was asked for them stays, with
    its pixels, until the garbage collector comes by, hundreds of frames later.
    """

    def __init__(self) -> None:
        self._angle: int | None = None
        self._matrix: npt.NDArray[np.int64] | None = None

    def __call__(self, frame: VideoFrame) -> npt.NDArray[np.int64] | None:
        """See `orientation`, which also says what is raised."""
        angle = frame.rotation
        if angle != self._angle:
            self._matrix = orientation(frame)
            self._angle = angle
        return self._matrix


def turn(image: npt.NDArray[Any], matrix: npt.NDArray[np.int64] | None) -> npt.NDArray[Any]:
    """(H, W, ...) as stored -> as shown: the matrix maps (x, y) stored to (x, y) shown, as rows."""
    if matrix is None:
        return image
    if matrix[0, 0] == 0:  # stored rows become columns
        image = image.swapaxes(0, 1)
        across, down = matrix[1, 0], matrix[0, 1]
    else:
        across, down = matrix[0, 0], matrix[1, 1]
    return image[::down, ::across]


class Converter:
    """Turns decoded frames into `Frame`s of one shape.

    With `watched`, alpha that would get lost is a `VideoError` unless it is all opaque.
    """

    def __init__(self, path: str, shape: Shape, watched: bool):
        self._path, self._shape, self._watched = path, shape, watched
        self._scaler, self._second = VideoReformatter(), VideoReformatter()
        self._orientation, self._memory = WayUp(), Recycler(KEPT_BYTES)

    def __call__(self, frame: VideoFrame, pts: int) -> Frame:
        """Convert one frame."""
        shape = self._shape
        if depth_of(frame) > 8 and not shape.deep:
            raise VideoError(
                f"{self._path}: frames of {depth_of(frame)} bits after frames of 8: split it there"
            )
        matrix = self._orientation(frame)
        height, width = shape.size
        if shape.crop is not None:
            height, width = frame.height, frame.width
        elif matrix is not None and matrix[0, 0] == 0:
            height, width = width, height
        wanted = shape.channels == 4 or shape.plane
        planes = self._planes(frame, height, width, wanted or self._watched)
        image = turn(planes, matrix)
        if shape.crop is not None:
            top, left, rows, columns = shape.crop
            image = self._resized(image[top : top + rows, left : left + columns])
        return self._finished(image, pts)

    def _finished(self, image: Image, pts: int) -> Frame:
        shape = self._shape
        colours = 1 if shape.channels == 1 else 3
        alpha = image[..., colours] if image.shape[2] > colours else None
        if alpha is not None and not (shape.channels == 4 or shape.plane):
            if alpha.min() < np.iinfo(alpha.dtype).max:
                raise VideoError(f"{self._path}: {ALPHA_LOST}")
            alpha = None
        if shape.channels == 4:
            return Frame(image, pts, alpha if shape.plane else None)
        return Frame(image[..., :colours], pts, alpha if shape.plane else None)

    def _planes(self, frame: VideoFrame, height: int, width: int, alpha: bool) -> Image:
        """(H, W, C); with alpha as the last channel where it is there and asked for."""
        alpha = alpha and has_alpha(frame)
        grey = self._shape.channels == 1
        if is_rgb(frame) or (is_grey(frame) and alpha):
            image = self._rgb(frame, height, width, alpha)
            return grey_of(image) if grey else self._opaque(image)
        if not grey and not is_grey(frame):
            return self._opaque(self._from_yuv(frame, height, width, alpha))
        image = self._luma(frame, height, width)
        if alpha:
            beside = self._from_yuv(frame, height, width, alpha)[..., 3:]
            return np.concatenate([image, beside], 2)
        return image if grey else self._opaque(np.repeat(image, 3, 2))

    def _opaque(self, image: Image) -> Image:
        """With an alpha channel that is all opaque, where four channels are asked for."""
        if self._shape.channels != 4 or image.shape[2] == 4:
            return image
        edge = np.full((*image.shape[:2], 1), np.iinfo(image.dtype).max, image.dtype)
        return np.concatenate([image, edge], 2)

    def _rgb(self, frame: VideoFrame, height: int, width: int, alpha: bool) -> Image:
        deep = self._shape.deep and depth_of(frame) > 8
        name = "rgba" if alpha else "rgb24"
        if deep:
            name = "rgba64le" if alpha else "rgb48le"
        rgb = self._scaler.reformat(
            frame, width=width, height=height, format=name, interpolation=EXACT, threads=THREADS
        )
        image: Image = rgb.to_ndarray()
        return image.astype(np.uint16) * 257 if self._shape.deep and not deep else image

    def _from_yuv(self, frame: VideoFrame, height: int, width: int, alpha: bool) -> Image:
        deep = self._shape.deep
        colour = colour_of(frame)
        frame.colorspace, frame.color_range = colour.matrix, colour.range
        name = ("gbrap" if alpha else "gbrp") + ("16le" if deep else "")
        gbr = self._scaler.reformat(
            frame, width=width, height=height, format=name, interpolation=EXACT, threads=THREADS
        )
        kind = np.uint16 if deep else np.uint8
        image = self._memory.empty((4 if alpha else 3, height, width), kind)
        for index, plane in zip((1, 2, 0, 3), gbr.planes, strict=False):
            image[index] = values(plane, kind, width)
        if deep:
            bits = depth_of(frame)
            stretch(image[:3], 8 if colour.range == LIMITED else bits)
            stretch(image[3:], bits)
        return image.transpose(1, 2, 0)

    def _luma(self, frame: VideoFrame, height: int, width: int) -> Image:
        """(H, W, 1) over the full range: the luma of the file, not one made from its colours."""
        tagged, limited = frame.color_range, colour_of(frame).range == LIMITED
        bits = next(depth for depth in GREY_DEPTHS if depth >= depth_of(frame))
        # libswscale takes every grey for full range: what range there is is undone below
        frame.color_range = FULL
        grey = self._scaler.reformat(
            frame, width=width, height=height, format="gray" if bits == 8 else f"gray{bits}le",
            dst_color_range=FULL, interpolation=EXACT, threads=THREADS,
        )  # fmt: skip
        frame.color_range = tagged
        kind = np.uint8 if bits == 8 else np.uint16
        levels = values(grey.planes[0], kind, width)[..., None]
        table = luma_levels(bits, limited, self._shape.deep)
        image: Image = table[levels & (2**bits - 1)]
        return image

    def _resized(self, image: Image) -> Image:
        if image.shape[:2] == self._shape.size:
            return image
        height, width = self._shape.size
        kind = "16le" if image.dtype == np.uint16 else "8"
        packed = {1: "gray", 3: "rgb24", 4: "rgba"} if kind == "8" else DEEP_NAMES
        if image.shape[2] == 2:  # grey and alpha
            parts = [self._resized(image[..., :1]), self._resized(image[..., 1:])]
            return np.concatenate(parts, 2)
        whole = np.ascontiguousarray(image)
        name = packed[image.shape[2]]
        frame = VideoFrame.from_ndarray(whole[..., 0] if name[:4] == "gray" else whole, format=name)
        scaled = self._second.reformat(frame, width=width, height=height, interpolation=EXACT)
        result: Image = scaled.to_ndarray().reshape(height, width, -1)
        return result


DEEP_NAMES = {1: "gray16le", 3: "rgb48le", 4: "rgba64le"}
ALPHA_LOST = (
    "its alpha channel would be lost: keep it beside the picture with alpha='keep' (or as a fourth "
    "channel with channels=4), or let it go with alpha='drop' (--alpha drop)"
)


def grey_of(image: Image) -> Image:
    """RGB (H, W, 3 or 4) to grey by BT.709's luma, with the alpha it had."""
    luma = np.einsum("hwc,c->hw", image[..., :3], np.array(LUMA, np.float32)).round()
    return np.concatenate([luma.astype(image.dtype)[..., None], image[..., 3:]], 2)


def values(plane: VideoPlane, kind: npt.DTypeLike, width: int) -> Image:
    """The numbers of a plane, (H, W), without the padding of its lines."""
    data: Any = plane
    return np.frombuffer(data, kind).reshape(plane.height, -1)[:, :width]


def stretch(image: Uint16Frames, bits: int) -> None:
    """Widen 16-bit values whose white is `bits` ones and then zeros to 65535, in place.

    Repeating the upper bits below them is exact to a level.
    """
    if bits < 16:
        np.minimum(image, (2**bits - 1) << (16 - bits), out=image)
        image += image >> bits


@lru_cache(maxsize=8)
def luma_levels(bits: int, limited: bool, deep: bool) -> Image:
    """What each level of luma is over the full range, uint8 or uint16 (2 ** bits,)."""
    levels = np.arange(2**bits, dtype=np.float64)
    if limited:
        levels = (levels - (16 << (bits - 8))) / (219 << (bits - 8))
    else:
        levels /= 2**bits - 1
    top = 65535 if deep else 255
    return (levels.clip(0, 1) * top).round().astype(np.uint16 if deep else np.uint8)
