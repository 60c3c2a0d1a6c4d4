"""Directories of TIFF, which Exif has too: the way up of a photograph, and the pages of a file."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
"""What TIFF and Exif begin with."""
EXIF_PREFIXES = ((b"Exif\0\0", 6), (b"eXIf", 4), (b"EXIF", 8))
"""What stands before Exif in JPEG, PNG and WebP, and how far it is from there."""
ORIENTATION, SUBFILE_TYPE = 0x0112, 0x00FE
"""The numbers of two fields."""
SMALLER_COPY = 1
"""In the subfile type of a page: it shows another page with fewer pixels."""
SHORT = 3
"""The type of a field of two bytes; others of one number have four."""


@dataclass(frozen=True, slots=True)
class Exif:
    """What is read of Exif. Each image needs its own: PyAV forgets an `opaque` that two share."""

    orientation: int
    """From 1 to 8; 1, as stored, if there is none."""


def exif_of(data: bytes) -> Exif:
    """The Exif in the bytes of an image."""
    found = next(_directories(data), None)
    for prefix, distance in EXIF_PREFIXES:
        at = data.find(prefix)
        if found is None and at >= 0:
            found = next(_directories(data[at + distance :]), None)
    return Exif(1 if found is None else found[1].get(ORIENTATION, 1))


def tiff_pages(path: str) -> list[int]:
    """Where the pages of a TIFF lie, without smaller copies of others; [] of what is no TIFF."""
    with (
        suppress(OSError, ValueError),  # the reader says what is wrong with such a file
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return [
            place
            for place, fields in _directories(data)
            if not fields.get(SUBFILE_TYPE, 0) & SMALLER_COPY
        ]
    return []


def turn_to_page(data: memoryview, place: int) -> None:
    """Make a page the first of a TIFF, in place: decoders read that one."""
    data[4:8] = place.to_bytes(4, BYTE_ORDERS[bytes(data[:4])])


def _directories(tiff: bytes | mmap.mmap) -> Iterator[tuple[int, dict[int, int]]]:
    """The place of each page, and its fields whose value is one number."""
    order = BYTE_ORDERS.get(tiff[:4])
    if order is None:
        return

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    at, seen = number(4, 4), set[int]()
    while 0 < at < len(tiff) and at not in seen:  # of a damaged file, which may be a circle
        seen.add(at)
        entries = range(at + 2, at + 2 + 12 * number(at, 2), 12)
        sizes = (2 if number(entry + 2, 2) == SHORT else 4 for entry in entries)
        fields = {number(e, 2): number(e + 8, size) for e, size in zip(entries, sizes, strict=True)}
        yield at, fields
        at = number(entries.stop, 4)
