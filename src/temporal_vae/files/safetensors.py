"""Files written whole or not at all; records: what a stream holds between two positions.

A record is one safetensors stream: 8 bytes with the length of the header (little-endian), the
header, which is JSON padded with spaces to 8 bytes, and the payload. The header holds the metadata,
texts by name, and says of each tensor its type, shape and place in the payload. Records are written
and read from the current position on, never seeking, so that pipes and sockets will do, and more
records can follow.
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
"""Bytes of a header at most: tens of thousands of tensors. Parsed, it may take 20 times as much."""
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Bytes of a number by type, in the order of the payload: then every tensor is aligned."""

_SEAL = "header_crc32"
_DIMENSIONS = 8


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
