"""The first bytes of a file of latents: a safetensors header with room to spare."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from temporal_vae.latents.info import (
    DTYPES,
    MOST_CELLS,
    MOST_FRAMES,
    LatentFileError,
    LatentInfo,
    from_metadata,
    to_metadata,
)

FORMAT = "temporal_vae.latents"
FORMAT_VERSION = 1
MOST_HEADER_BYTES = 2**20
_NUMBERS = 64
"""Bytes for a start and a step, which are known at the end only."""


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was read: where the data begin, and where the timestamps, if any are listed."""

    info: LatentInfo
    data_start: int
    stamps_start: int | None


def alignment(info: LatentInfo) -> int:
    """Bytes between the latents and the timestamps, so that these lie at a multiple of 8."""
    return -(info.frames * info.frame_bytes) % 8


def pack(info: LatentInfo, room: int | None = None) -> bytes:
    """The header of a finished file, of `room` bytes in all, or of as many as it takes.

    Raises `LatentFileError` where that is not enough.
    """
    dtype = next(name for name, dtype in DTYPES.items() if dtype == info.dtype)
    end = info.frames * info.frame_bytes
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)} | to_metadata(info)
    content: dict[str, Any] = {"__metadata__": metadata}
    content[info.kind] = _entry(dtype, info.shape, 0, end)
    if info.step is None:
        gap = alignment(info)
        if gap:
            content["alignment"] = _entry("U8", (gap,), end, end + gap)
        content["timestamps"] = _entry(
            "I64", (info.frames,), end + gap, end + gap + 8 * info.frames
        )
    text = json.dumps(content, separators=(",", ":")).encode()
    room = -(-(8 + len(text)) // 8) * 8 if room is None else room
    if 8 + len(text) > room or room > MOST_HEADER_BYTES:
        raise LatentFileError(f"a header of {len(text)} bytes does not fit into {room - 8}")
    return (room - 8).to_bytes(8, "little") + text.ljust(room - 8)


def room_for(info: LatentInfo) -> int:
    """Bytes that the header of this file can need at most, whatever its length will be."""
    late = {"frames": MOST_FRAMES, "step": None, "start": 0, "source_sha256": "0" * 64}
    return len(pack(replace(info, **late))) + _NUMBERS  # type: ignore[arg-type]


def _entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


# Reading -------------------------------------------------------------------------------------


def is_latents(start: bytes) -> bool:
    """Whether a file that starts so claims to hold latents, whole and sound or not."""
    return re.search(rb'"format"\s*:\s*"%b"' % re.escape(FORMAT.encode()), start) is not None


def unpack(text: bytes, file_bytes: int) -> Header:
    """Check the header `text` of a file of `file_bytes`, its length's 8 bytes not included.

    Raises `LatentFileError` for whatever is not as docs/formats.md says.
    """
    content = _parse(text)
    metadata = content.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise LatentFileError("it holds no latents, but other tensors")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise LatentFileError("its metadata must be text")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise LatentFileError(
            f"its format_version is {metadata.get('format_version')!r:.80}, this library reads "
            f"{FORMAT_VERSION}: take the version of the library that wrote it"
        )
    kind = metadata.get("kind")
    dtype, shape, *_ = _tensor(content, str(kind))
    if dtype not in DTYPES or len(shape) != 4:
        raise LatentFileError(f"{kind} must be floating point (T, C, h, w), got {dtype} {shape}")
    if max(shape[1:]) > 2 * MOST_CELLS or shape[0] > MOST_FRAMES:
        raise LatentFileError(f"{kind} claims to be {shape}")
    info = from_metadata(metadata, shape)
    if info.dtype != DTYPES[dtype]:
        raise LatentFileError(f"dtype is {info.dtype}, but {DTYPES[dtype]} is stored")
    expected = {kind: (0, info.frames * info.frame_bytes)}
    stamps_start = None
    if info.step is None:
        position, gap = info.frames * info.frame_bytes, alignment(info)
        if gap:
            expected["alignment"] = (position, position + gap)
        stamps_start = position + gap
        expected["timestamps"] = (stamps_start, stamps_start + 8 * info.frames)
        if _tensor(content, "timestamps")[:2] != ("I64", (info.frames,)):
            raise LatentFileError(f"timestamps must be I64 ({info.frames},)")
    if set(content) != set(expected):
        raise LatentFileError(
            f"it must hold {', '.join(map(str, expected))}, it holds {', '.join(content)}"[:400]
        )
    for name, place in expected.items():
        if _tensor(content, str(name))[2:] != place:
            raise LatentFileError(
                f"{name} must be at {place}, the header says {_tensor(content, str(name))[2:]}"
            )
    data_start = 8 + len(text)
    needed = data_start + max(end for _, end in expected.values())
    if file_bytes != needed:
        raise LatentFileError(
            f"it has {file_bytes} bytes, not the {needed} of {info.frames} frames: it is "
            + ("truncated" if file_bytes < needed else "followed by something else")
        )
    return Header(info, data_start, None if stamps_start is None else data_start + stamps_start)


def _parse(text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    try:
        content = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise LatentFileError(f"its header is damaged ({error})"[:200]) from error
    if not isinstance(content, dict):
        raise LatentFileError("its header is no object")
    return content


def _tensor(content: dict[str, Any], name: str) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, start and end of a tensor, each of the right kind."""
    match content.get(name):
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]}:
            if all(type(number) is int and number >= 0 for number in (*shape, start, end)):
                return dtype, tuple(shape), start, end
        case None:
            raise LatentFileError(f"it holds no {name}"[:200])
    raise LatentFileError(f"{name} is described wrongly: {content[name]!r:.120}")
