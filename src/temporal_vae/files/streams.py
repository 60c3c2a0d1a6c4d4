"""Reading and writing of open files to the last byte, pipes and sockets included."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from typing import BinaryIO, Literal


class CheckpointError(ValueError):
    """A stored model that is damaged, cut short, or of another version or architecture."""


def require(file: object, verb: Literal["read", "write"]) -> None:
    """Raise unless `file` is a binary file that can be read or written, as `verb` says.

    `TypeError` for what has no such method; `ValueError` for a text file, one that is open in the
    other direction only, and one that is closed.
    """
    if not callable(getattr(file, verb, None)):
        raise TypeError(f"file must be a binary file with {verb}(), got {file!r}")
    if isinstance(file, io.TextIOBase) or hasattr(file, "encoding"):
        raise ValueError(f"file must be binary, got one of text: open it with '{verb[0]}b'")
    able = getattr(file, "readable" if verb == "read" else "writable", None)
    if able is not None and not able():  # a closed file raises ValueError by itself
        raise ValueError(f"file is not open to {verb}: open it with '{verb[0]}b'")


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write every byte, also where the file takes fewer than it is given.

    Raises `OSError` for a file that is not blocking, or returns an impossible count.
    """
    rest = memoryview(data)
    while rest:
        count: int | None = file.write(rest)
        if count is None and isinstance(file, io.RawIOBase):
            raise BlockingIOError("the file takes no bytes now: make it blocking")
        if count is None:  # a plain object whose write() returns nothing has taken them all
            return
        if not 0 < count <= len(rest):
            raise OSError(f"write() of {len(rest)} bytes returned {count}")
        rest = rest[count:]


def read_into(file: BinaryIO, view: memoryview) -> None:
    """Fill a view from the current position on, also where the file gives less than asked for.

    Raises `CheckpointError` where the file ends before, `OSError` as `write_all`.
    """
    while view:
        try:
            count = _read_some(file, view)
        except EOFError as error:  # a compressed file that was cut
            raise CheckpointError(f"it is cut short: {error}") from error
        if not count:
            raise CheckpointError(f"it is cut short: at least {len(view)} bytes missing")
        view = view[count:]


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_at(file: BinaryIO, view: memoryview, position: int) -> int:
    """Fill a view from a position of a file on disk; the bytes read, fewer where the file ends.

    Where the system can, the file's own position is not used: forked processes share that.
    """
    if not hasattr(os, "preadv"):  # Windows, which has no fork
        with _SEEKING:
            file.seek(position)
            return file.readinto(view)  # type: ignore[attr-defined,no-any-return]
    total = 0
    while count := os.preadv(file.fileno(), [view[total:]], position + total):
        total += count
    return total


_SEEKING = threading.Lock()


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
