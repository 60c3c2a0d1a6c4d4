"""Which way up a photograph is to be shown, by its Exif data.

libav turns the picture's matrix out of it, but PyAV cannot show a frame's matrix beside Exif: only
the angle, in which a mirrored picture passes for a turned one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from av.video.frame import VideoFrame

from temporal_vae.video.frames import VideoError

ORIENTATION = 0x0112
ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
MIRRORED = (2, 4, 5, 7)
HEADS = (b"Exif\0\0", b"eXIf")
"""What stands before Exif's own header in JPEG and WebP, and in PNG; in TIFF nothing does."""


def has_exif(frame: VideoFrame) -> bool:
    """Whether a frame has side data, as Exif is, that PyAV has no name for.

    To ask makes the frame stay until the garbage collector comes by.
    """
    try:
        return not hasattr(frame.side_data, "get")
    except ValueError:
        return True


def refuse_mirrored(path: str) -> None:
    """Raise `VideoError` for a photograph that Exif says to mirror."""
    if orientation_number(Path(path).read_bytes()) in MIRRORED:
        raise VideoError(f"{path}: its Exif data says to mirror it, which is not followed")


def orientation_number(data: bytes) -> int:
    """Exif's number for the way up, 1 to 8; 1, as it is, where nothing says otherwise."""
    starts = [0] + [data.find(head) + len(head) for head in HEADS if head in data]
    for start in starts:
        order = ORDERS.get(data[start : start + 4])
        if order is not None:
            return next(_values(data[start:], order, ORIENTATION), 1)
    return 1


def _values(tiff: bytes, order: Literal["little", "big"], tag: int) -> Iterator[int]:
    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    at = number(4, 4)
    for entry in range(at + 2, at + 2 + 12 * number(at, 2), 12):
        if number(entry, 2) == tag:
            yield number(entry + 8, 2)
