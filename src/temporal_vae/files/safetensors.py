"""The bytes before the numbers in a safetensors stream, and the headers of records.

A safetensors stream is 8 bytes with the length of the header (little-endian), the header, which is
JSON padded with spaces, and the payload: the numbers of all tensors. The header holds the metadata,
texts by name, and says of each tensor its type, shape and place in the payload.

A record is such a stream with one model (`checkpoints.records`). Records are written and read from
the current position on without seeking, so pipes and sockets will do, and more records can follow.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from temporal_vae.files.streams import CheckpointError, read_into, write_all

SUFFIX = ".safetensors"
HEADER_LIMIT = 4 * 2**20
"""Bytes of a record's header at most: tens of thousands of tensors. Parsed, it may take 20 times as
much memory."""
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Bytes of a number by type, in the order of a record's payload: then every tensor is aligned."""

_SEAL = "header_crc32"
_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor in a payload: its type, its shape, its first byte and the one past its last."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape} at bytes {self.begin} to {self.end}"


# Any safetensors stream -----------------------------------------------------------------------


def frame(metadata: Mapping[str, str], slots: Mapping[str, Slot], room: int = 0) -> bytes:
    """All bytes before the payload: a multiple of 8, and at least `room`."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, slot in slots.items():
        places = [slot.begin, slot.end]
        document[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": places}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = text.ljust(room - 8)
    return struct.pack("<Q", len(text)) + text


def read_text(file: BinaryIO, limit: int) -> bytes:
    """Read the header from the current position on, without the 8 bytes of its length.

    Raises `CheckpointError` where the file ends before, or the header claims over `limit` bytes.
    """
    prefix = bytearray(8)
    read_into(file, memoryview(prefix))
    (length,) = struct.unpack("<Q", prefix)
    if length > limit:
        raise CheckpointError(f"its header would have {length} bytes, the limit is {limit}")
    text = bytearray(length)
    read_into(file, memoryview(text))
    return bytes(text)


def parse(text: bytes) -> tuple[dict[str, str], dict[str, Slot]]:
    """Metadata and tensors of a header. Raises `ValueError` for what is no safetensors header.

    Of tensors it is checked that each is described, not that the descriptions fit each other.
    """
    try:
        document = json.loads(text.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: {error}") from error
    metadata = document.pop("__metadata__", None) if isinstance(document, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its header has no metadata, texts by name")
    return metadata, {name: _slot(name, value) for name, value in document.items()}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # readers differ on which of both they take
        raise ValueError("a name stands twice")
    return found


def _slot(name: str, value: object) -> Slot:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            if all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
                return Slot(dtype, tuple(shape), begin, end)
    raise ValueError(f"{name!r} has no proper place in it: {value!r:.120}")


# Records --------------------------------------------------------------------------------------


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
        """The bytes before the payload, with their own checksum as a last metadata field."""
        seal = f"{zlib.crc32(frame(self.metadata, self.slots)):08x}"
        return frame({**self.metadata, _SEAL: seal}, self.slots)


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
    text = read_text(file, HEADER_LIMIT)
    try:
        metadata, slots = parse(text)
    except ValueError as error:
        raise CheckpointError(f"no record, or a damaged one: {error}") from error
    for name, value in required.items():
        if metadata.get(name) != value:
            raise CheckpointError(
                f"no record that this version reads: its {name} is {metadata.get(name)!r}, "
                f"not {value!r}"
            )
    _check_places(slots)
    metadata.pop(_SEAL, None)
    header = Header(metadata, slots)
    if header.encode()[8:] != text:
        raise CheckpointError("the record is damaged: its header is not as it was written")
    return header


def _check_places(slots: Mapping[str, Slot]) -> None:
    """Raise `CheckpointError` unless tensors follow one another, aligned and as long as said."""
    place = 0
    for name, slot in slots.items():
        size = SIZES.get(slot.dtype, 0)
        fits = size and len(slot.shape) <= _DIMENSIONS and slot.begin % size == 0
        if not fits or slot.begin != place or slot.end - place != math.prod(slot.shape) * size:
            raise CheckpointError(f"the record is damaged: {name!r} has no proper place in it")
        place = slot.end
