"""Reading and writing of open files, to the last byte, and a checksum of what went by."""

from __future__ import annotations

import io
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import BinaryIO, Literal, Self

PIECE = 2**20
"""Bytes that are read at once: few enough to be in the cache still when they are summed up."""


class CheckpointError(ValueError):
    """A stored model that is damaged, cut short, or of another version or architecture."""


# Streams --------------------------------------------------------------------------------------


def require(file: object, verb: Literal["read", "write"]) -> None:
    """Raise unless `file` is a binary file, open to be read or written.

    `TypeError` for what has no such method, `ValueError` for text, the other direction, closed.
    """
    if not callable(getattr(file, verb, None)):
        raise TypeError(f"file must be a binary file with {verb}(), got {file!r}")
    if isinstance(file, io.TextIOBase) or hasattr(file, "encoding"):
        raise ValueError(f"file must be binary, got one of text: open it with '{verb[0]}b'")
    able = getattr(file, "readable" if verb == "read" else "writable", None)
    if able is not None and not able():  # a closed file raises ValueError by itself
        raise ValueError(f"file is not open to {verb}: open it with '{verb[0]}b'")


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write every byte, in as many steps as the file makes of it."""
    rest = memoryview(data)
    while rest:
        count: int | None = file.write(rest)
        if count is None and isinstance(file, io.RawIOBase):
            raise BlockingIOError("the file takes no bytes now: make it blocking")
        if count is None:  # what a plain object with write() returns: it took them all
            return
        if not 0 < count <= len(rest):
            raise OSError(f"write() of {len(rest)} bytes returned {count}")
        rest = rest[count:]


def read_into(file: BinaryIO, view: memoryview) -> None:
    """Fill a view from the current position, in as many steps as the file makes of it."""
    while view:
        try:
            count = _read_some(file, view)
        except EOFError as error:  # a compressed file that was cut
            raise CheckpointError(f"the record is cut short: {error}") from error
        if not count:
            raise CheckpointError(f"the record is cut short: at least {len(view)} bytes missing")
        view = view[count:]


def _read_some(file: BinaryIO, view: memoryview) -> int:
    count: int | None
    if hasattr(file, "readinto"):
        count = file.readinto(view)
    else:
        data: bytes | str | None = file.read(len(view))
        if isinstance(data, str):
            raise ValueError("file must be binary, but read() gave text")
        count = None if data is None else len(data)
        if data and len(data) <= len(view):
            view[: len(data)] = data
    if count is None:
        raise BlockingIOError("the file has no bytes now: make it blocking")
    if not 0 <= count <= len(view):
        raise OSError(f"reading {len(view)} bytes gave {count}")
    return count


class Checksum:
    """crc32 of bytes that come in pieces, taken in other threads: a context manager."""

    _THREADS = 4

    def __init__(self) -> None:
        self._sum = 0
        self._threads = ThreadPoolExecutor(self._THREADS)
        self._waiting: deque[tuple[Future[int], int]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, view: memoryview) -> None:
        """The next bytes, which must stay as they are until `value` is asked for."""
        self._waiting.append((self._threads.submit(zlib.crc32, view), len(view)))
        if len(self._waiting) > 2 * self._THREADS:  # or a fast reader would pile up pieces
            self._append_oldest()

    def value(self) -> str:
        """The sum of everything so far, eight hexadecimal digits."""
        while self._waiting:
            self._append_oldest()
        return f"{self._sum:08x}"

    def _append_oldest(self) -> None:
        piece, length = self._waiting.popleft()
        self._sum = _product(_power(8 * length), self._sum) ^ piece.result()


# A crc32 is the remainder of a polynomial whose coefficients are 0 and 1, the first of them in the
# highest of 32 bits. Of two texts in a row it is that of the first, times x to the number of bits
# of the second, plus that of the second.


def _product(a: int, b: int) -> int:
    """The remainder of a product of two remainders."""
    total = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            total ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return total


@lru_cache(maxsize=1024)
def _power(exponent: int) -> int:
    """The remainder of x to this power."""
    result, factor = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = _product(result, factor)
        factor = _product(factor, factor)
        exponent >>= 1
    return result
