"""Which way up a frame is to be shown: display matrices and Exif."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame

from temporal_vae.video.frames import VideoError

Matrix = npt.NDArray[np.int64]
"""A display matrix ((a, b), (c, d)) of -1, 0 and 1: whole quarter turns and flips.

It takes a point (x, y) of the stored picture, as a row, to its place in the upright one.
"""
UPRIGHT: Matrix = np.eye(2, dtype=np.int64)

EXIF_ORIENTATION = 0x0112
"""The number of Exif's field for the orientation."""
EXIF_BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
EXIF_MIRRORED = (2, 4, 5, 7)
EXIF_PREFIXES = (b"Exif\0\0", b"eXIf")
"""What stands before Exif's own header in JPEG and WebP, and in PNG; in TIFF nothing does."""


def orientation(frame: VideoFrame, path: str) -> Matrix:
    """The display matrix of a frame. Raises `VideoError` for other than quarter turns."""
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV cannot list side data if it has no name for some of it: only the angle is left
        angle = np.deg2rad(-frame.rotation)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.rint([[cos, sin], [-sin, cos]]).astype(np.int64)
    if data is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].astype(np.int64)
    fixed_point = np.array([[a, b], [c, d]])  # 1 is 1 << 16
    matrix: Matrix = np.sign(fixed_point) * (np.abs(fixed_point) > 1 << 8)
    if not matrix.any():  # damaged: players show such a picture as it is
        return UPRIGHT
    if not np.array_equal(np.abs(matrix).sum(0), [1, 1]) or not np.abs(matrix.sum(1)).all():
        raise VideoError(
            f"{path}: turned by {frame.rotation} degrees in its metadata, and only quarter turns "
            "are followed: turn the frames first with ffmpeg"
        )
    return matrix


class OrientationCache:
    """The orientations of a video's frames, looked up only where the angle changes.

    In PyAV a frame and its side data hold references to each other. A frame whose side data were
    read therefore keeps its pixels until the garbage collector runs, hundreds of frames later.
    """

    def __init__(self, path: str):
        self._path = path
        self._angle: int | None = None
        self._matrix = UPRIGHT

    def __call__(self, frame: VideoFrame) -> Matrix:
        """See `orientation`, which also says what is raised."""
        if frame.rotation != self._angle:
            self._matrix = orientation(frame, self._path)
            self._angle = frame.rotation
        return self._matrix


def turned_size(height: int, width: int, matrix: Matrix) -> tuple[int, int]:
    """Height and width after a turn, which are swapped by one quarter or three."""
    return (width, height) if matrix[0, 0] == 0 else (height, width)


def turn(image: npt.NDArray[Any], matrix: Matrix) -> npt.NDArray[Any]:
    """(H, W, ...) as stored -> a view of it as shown."""
    if matrix[0, 0] == 0:  # stored rows become columns
        return image.swapaxes(0, 1)[:: matrix[0, 1], :: matrix[1, 0]]
    return image[:: matrix[1, 1], :: matrix[0, 0]]


def has_exif(frame: VideoFrame) -> bool:
    """Whether a frame has side data that PyAV has no name for, as Exif is.

    Reading the side data keeps the frame in memory: see `OrientationCache`.
    """
    try:
        return not hasattr(frame.side_data, "get")
    except ValueError:
        return True


def refuse_mirrored(path: str) -> None:
    """Raise `VideoError` for a photograph that Exif says to mirror.

    libav makes a display matrix of Exif's orientation, but PyAV shows only its angle, in which a
    mirrored picture looks like a turned one.
    """
    if exif_orientation(Path(path).read_bytes()) in EXIF_MIRRORED:
        raise VideoError(f"{path}: its Exif data says to mirror it, which is not followed")


def exif_orientation(data: bytes) -> int:
    """Exif's orientation, 1 to 8, in the bytes of an image; 1 (as stored) if there is none."""
    starts = [0] + [data.find(prefix) + len(prefix) for prefix in EXIF_PREFIXES if prefix in data]
    for start in starts:
        order = EXIF_BYTE_ORDERS.get(data[start : start + 4])
        if order is not None:
            return _tiff_orientation(data[start:], order)
    return 1


def _tiff_orientation(tiff: bytes, order: Literal["little", "big"]) -> int:
    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    at = number(4, 4)
    for entry in range(at + 2, at + 2 + 12 * number(at, 2), 12):
        if number(entry, 2) == EXIF_ORIENTATION:
            return number(entry + 8, 2)
    return 1
