"""Files written whole or not at all; records: what a stream holds between two positions.

A record is one safetensors stream: 8 bytes with the length of the header (little-endian), the
header, which is JSON padded with spaces to 8 bytes, and the payload. The header holds the metadata,
texts by name, and says of each tensor its type, shape and place in the payload. Records are written
and read from the current position on, never seeking, so that pipes and sockets will do, and more
records can follow.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import struct
import uuid
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

HEADER_LIMIT = 4 * 2**20
"""Bytes of a header at most: tens of thousands of tensors. Parsed, it may take 20 times as much."""
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Bytes of a number by type, in the order of the payload: then every tensor is aligned."""
PIECE = 2**20
"""Bytes that are read at once: few enough to be in the cache still when they are summed up."""

_SEAL = "header_crc32"
_DIMENSIONS = 8


class CheckpointError(ValueError):
    """A stored model that is damaged, cut short, or of another version or architecture."""


# Whole files ----------------------------------------------------------------------------------


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file beside `target` to write to; it takes the name of `target` at the end.

    When the block raises, Ctrl-C included, the new file is removed and `target` is as before. The
    temporary name keeps the suffix, since writers choose a format by it.

    Raises `IsADirectoryError`, `FileExistsError`, `FileNotFoundError` or `PermissionError` before
    the block starts when `target` could not be written.
    """
    final = Path(os.path.realpath(target))  # a link stays a link, to the new file
    if final.is_dir():
        raise IsADirectoryError(f"{target} is a folder, not a file to write")
    if final.exists() and not final.is_file():
        raise FileExistsError(f"{target} is a device or a pipe, which a new file would replace")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final.parent} is not a folder")
    suffix = Path(target).suffix  # of the name that was given: it may choose the format
    partial = final.with_name(f".{_stem(final)}.{uuid.uuid4().hex[:8]}.part{suffix}")
    try:
        partial.touch(exist_ok=False)
    except OSError as error:
        raise PermissionError(f"cannot write in {final.parent}: {error.strerror}") from error
    try:
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # some writers make a file of their own, for their user alone
        with partial.open("r+b") as written:
            os.fsync(written.fileno())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside `target` to fill with files; it takes the name of `target` at the end.

    When the block raises, the new folder is removed, and there is none by the name of `target`.

    Raises `FileExistsError`, `FileNotFoundError` or `PermissionError` before the block starts when
    `target` could not be made: only an empty folder is replaced.
    """
    final = Path(os.path.realpath(target))
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise FileExistsError(f"{target} exists: a new folder needs a name that is free")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final.parent} is not a folder")
    # without a suffix, as folders are known by
    partial = final.with_name(f".{_stem(final).replace('.', '-')}-{uuid.uuid4().hex[:8]}-part")
    try:
        partial.mkdir()
    except OSError as error:
        raise PermissionError(f"cannot write in {final.parent}: {error.strerror}") from error
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("r+b") as written:
                os.fsync(written.fileno())
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stem(file: Path) -> str:
    return os.fsencode(file.stem)[:80].decode(errors="ignore")  # names have 255 bytes at most


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write in, which becomes `path` at the end; folders are made as needed.

    Raises `TypeError` for what is no path, `ValueError` for a blank one, and as `atomic_path`.
    """
    target = _path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as partial, partial.open("wb") as file:
        yield file


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """A file to read in binary, and its bytes.

    Raises as `new_file`, `FileNotFoundError`, and `ValueError` for a pipe or a device.
    """
    source = _path(path)
    if source.exists() and not (source.is_file() or source.is_dir()):  # opening one might wait
        raise ValueError(f"{source} is a device or a pipe: open it and read from the stream")
    with source.open("rb", buffering=0) as file:
        yield file, os.fstat(file.fileno()).st_size


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or os.PathLike, got {path!r}")
    text = os.fsdecode(path)
    if not text.strip():
        raise ValueError(f"path must name a file, got {text!r}")
    return Path(text)


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


# Headers of records ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor in a record: a type of `SIZES`, its shape, its first byte and the one past it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before a record's payload; slots in the order of the payload."""

    metadata: Mapping[str, str]
    slots: Mapping[str, Slot]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payload."""
        return max((slot.end for slot in self.slots.values()), default=0)

    def encode(self) -> bytes:
        """The bytes before the payload, sealed with a checksum of their own in the metadata."""
        seal = f"{zlib.crc32(_framed(self.metadata, self.slots)):08x}"
        return _framed({**self.metadata, _SEAL: seal}, self.slots)


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Slot]:
    """Places in the payload for tensors (type, shape): widest numbers first, then by name."""
    rank, begin = list(SIZES).index, 0
    slots = {}
    for name in sorted(tensors, key=lambda name: (rank(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        end = begin + math.prod(shape) * SIZES[dtype]
        slots[name] = Slot(dtype, shape, begin, end)
        begin = end
    return slots


def write_header(file: BinaryIO, header: Header) -> None:
    """Write what stands before the payload. Raises `ValueError` for more than can be read again."""
    data = header.encode()
    if len(data) - 8 > HEADER_LIMIT:
        raise ValueError(
            f"{len(header.slots)} tensors need a header of {len(data) - 8} bytes, the limit is "
            f"{HEADER_LIMIT}"
        )
    write_all(file, data)


def read_header(file: BinaryIO, required: Mapping[str, str]) -> Header:
    """Read as far as the payload; `required` is metadata that must be so.

    Raises `CheckpointError` for anything that `Header.encode` would not have written. Takes no more
    memory than `HEADER_LIMIT` allows, whatever the bytes claim.
    """
    prefix = bytearray(8)
    read_into(file, memoryview(prefix))
    (length,) = struct.unpack("<Q", prefix)
    if length > HEADER_LIMIT:
        raise CheckpointError(
            f"no record: its header would have {length} bytes, the limit is {HEADER_LIMIT}"
        )
    text = bytearray(length)
    read_into(file, memoryview(text))
    try:
        document = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"no record, or a damaged one: its header is no JSON: {error}"
        ) from error
    metadata = _metadata(document, required)
    slots = _slots(document)
    metadata.pop(_SEAL, None)
    header = Header(metadata, slots)
    if header.encode() != prefix + text:
        raise CheckpointError("the record is damaged: its header is not as it was written")
    return header


def _framed(metadata: Mapping[str, str], slots: Mapping[str, Slot]) -> bytes:
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, slot in slots.items():
        places = [slot.begin, slot.end]
        document[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": places}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _metadata(document: object, required: Mapping[str, str]) -> dict[str, str]:
    metadata = document.get("__metadata__") if isinstance(document, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("no record: its header has no metadata")
    for name, value in required.items():
        if metadata.get(name) != value:
            raise CheckpointError(
                f"no record that this version reads: its {name} is {metadata.get(name)!r}, "
                f"not {value!r}"
            )
    return metadata


def _slots(document: dict[str, Any]) -> dict[str, Slot]:
    slots, place = {}, 0
    for name, value in document.items():
        if name == "__metadata__":
            continue
        slot = _slot(value)
        if slot is None or slot.begin != place:
            raise CheckpointError(f"the record is damaged: {name!r} has no proper place in it")
        slots[name], place = slot, slot.end
    return slots


def _slot(value: object) -> Slot | None:
    """A tensor's place if it is aligned and as long as its shape says, else None."""
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            return None
    whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if dtype not in SIZES or len(shape) > _DIMENSIONS or not whole:
        return None
    if begin % SIZES[dtype] or end - begin != math.prod(shape) * SIZES[dtype]:
        return None
    return Slot(dtype, tuple(shape), begin, end)
