"""Which way up a frame is to be shown: display matrices and Exif."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame

from temporal_vae.video.frames import VideoError
from temporal_vae.video.read.exif import Exif

Matrix = npt.NDArray[np.int64]
"""A display matrix ((a, b), (c, d)) of -1, 0 and 1: whole quarter turns and flips.

It takes a point (x, y) of the stored picture, as a row, to its place in the upright one.
"""
UPRIGHT: Matrix = np.eye(2, dtype=np.int64)
BY_EXIF: dict[int, Matrix] = {
    1: UPRIGHT, 2: np.array([[-1, 0], [0, 1]]), 3: -UPRIGHT, 4: np.array([[1, 0], [0, -1]]),
    5: np.array([[0, 1], [1, 0]]), 6: np.array([[0, 1], [-1, 0]]), 7: np.array([[0, -1], [-1, 0]]),
    8: np.array([[0, -1], [1, 0]]),
}  # fmt: skip
"""The matrices of Exif's numbers for an orientation."""


def orientation(frame: VideoFrame, path: str) -> Matrix:
    """The display matrix of a frame. Raises `VideoError` for other than quarter turns.

    `frame.opaque` is `Exif` where the frame comes of an image: libav makes a display matrix of it,
    but PyAV shows only its angle, in which a mirrored picture looks like a turned one.
    """
    if isinstance(frame.opaque, Exif):
        return BY_EXIF.get(frame.opaque.orientation, UPRIGHT)
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
    """The orientations of a video's frames, looked up only where the angle or Exif changes.

    In PyAV a frame and its side data hold references to each other. A frame whose side data were
    read therefore keeps its pixels until the garbage collector runs, hundreds of frames later.
    """

    def __init__(self, path: str):
        self._path = path
        self._known: tuple[int, object] | None = None
        self._matrix = UPRIGHT

    def __call__(self, frame: VideoFrame) -> Matrix:
        """See `orientation`, which also says what is raised."""
        if (frame.rotation, frame.opaque) != self._known:
            self._matrix = orientation(frame, self._path)
            self._known = frame.rotation, frame.opaque
        return self._matrix


def turned_size(height: int, width: int, matrix: Matrix) -> tuple[int, int]:
    """Height and width after a turn, which are swapped by one quarter or three."""
    return (width, height) if matrix[0, 0] == 0 else (height, width)


def turn(image: npt.NDArray[Any], matrix: Matrix) -> npt.NDArray[Any]:
    """(H, W, ...) as stored -> as shown: a view of it if it is upright.

    Else a copy, since a view with its rows or columns backwards cannot become a tensor.
    """
    if (matrix == UPRIGHT).all():
        return image
    if matrix[0, 0] == 0:  # stored rows become columns
        return image.swapaxes(0, 1)[:: matrix[0, 1], :: matrix[1, 0]].copy()
    return image[:: matrix[1, 1], :: matrix[0, 0]].copy()
