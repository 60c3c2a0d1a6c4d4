"""The header of a file of latents: which tensors it holds, and where."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from temporal_vae.files.safetensors import Slot, frame, parse
from temporal_vae.latents.info import (
    DTYPES,
    MOST_FRAMES,
    LatentFileError,
    LatentInfo,
    from_metadata,
    to_metadata,
)

FORMAT = "temporal_vae.latents"
LATER_FIELDS = {"frames_per_latent", "latent_mean", "latent_std"}
"""That version 2 of the format brought. A file that needs none of them is written as version 1, so
that readers of that one take it."""
MOST_HEADER_BYTES = 2**20


def tensors(info: LatentInfo) -> dict[str, Slot]:
    """The tensors of a file in their order: latents, then timestamps where the file lists them.

    Timestamps begin at a multiple of 8 bytes, so that they can be mapped.
    """
    dtype = next(name for name, dtype in DTYPES.items() if dtype == info.dtype)
    end = info.latent_frames * info.frame_bytes
    slots: dict[str, Slot] = {info.kind: Slot(dtype, info.shape, 0, end)}
    if info.step is None:
        begin = end + -end % 8
        if begin > end:
            slots["alignment"] = Slot("U8", (begin - end,), end, begin)
        slots["timestamps"] = Slot("I64", (info.frames,), begin, begin + 8 * info.frames)
    return slots


def pack(info: LatentInfo, room: int | None = None) -> bytes:
    """All bytes before the latents: `room` of them, or as few as it takes.

    Raises `LatentFileError` where that is not enough, or more than a reader takes.
    """
    later = info.frames_per_latent > 1 or info.latent_std is not None
    fields = to_metadata(info)
    kept = fields if later else {n: text for n, text in fields.items() if n not in LATER_FIELDS}
    metadata = {"format": FORMAT, "format_version": "2" if later else "1"} | kept
    data = frame(metadata, tensors(info), room or 0)
    most = min(room or MOST_HEADER_BYTES, MOST_HEADER_BYTES)
    if len(data) > most:
        raise LatentFileError(f"a header of {len(data)} bytes does not fit into {most}")
    return data


def room_for(info: LatentInfo) -> int:
    """Bytes that the header of this file can need at most, whatever its length will be."""
    late: dict[str, Any] = {
        "frames": MOST_FRAMES, "step": None, "start": 0, "source_sha256": "0" * 64
    }  # fmt: skip
    start_and_step = 64
    return len(pack(replace(info, **late))) + start_and_step


def is_latents(start: bytes) -> bool:
    """Whether a file that begins with these bytes claims to hold latents, damaged or not."""
    return re.search(rb'"format"\s*:\s*"%b"' % re.escape(FORMAT.encode()), start) is not None


def unpack(text: bytes, payload_bytes: int) -> LatentInfo:
    """Check the header `text` of a file with so many bytes behind it.

    Raises `LatentFileError` for whatever is not as docs/formats.md says.
    """
    try:
        metadata, found = parse(text)
    except ValueError as error:
        raise LatentFileError(
            f"it is damaged, or holds other tensors than latents: {error}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise LatentFileError(f"it holds other tensors than latents: {', '.join(found)}")
    version = metadata.get("format_version")
    if version not in ("1", "2"):
        raise LatentFileError(
            f"its format_version is {version!r:.80}, this library reads 1 and 2: take the version "
            "of the library that wrote it"
        )
    if version == "1":  # to which these are unknown fields
        metadata = {n: text for n, text in metadata.items() if n not in LATER_FIELDS}
        metadata["frames_per_latent"] = "1"
    kind = metadata.get("kind", "")
    stored = found.get(kind)
    if stored is None or stored.dtype not in DTYPES or len(stored.shape) != 4:
        raise LatentFileError(
            f"{kind!r} must be floating point (T, C, h, w), it is {stored or 'missing'}"
        )
    info = from_metadata(metadata, stored.shape)
    if info.dtype != DTYPES[stored.dtype]:
        raise LatentFileError(f"dtype is {info.dtype}, but {DTYPES[stored.dtype]} is stored")
    _check_tensors(found, tensors(info), payload_bytes)
    return info


def _check_tensors(found: dict[str, Slot], expected: dict[str, Slot], payload_bytes: int) -> None:
    if found.keys() != expected.keys():
        raise LatentFileError(f"it must hold {', '.join(expected)}, it holds {', '.join(found)}")
    for name, slot in expected.items():
        same = found[name] == slot
        if name == "alignment":  # only its place matters: nobody reads it
            same = (found[name].begin, found[name].end) == (slot.begin, slot.end)
        if not same:
            raise LatentFileError(f"{name} must be {slot}, the header says {found[name]}")
    needed = max(slot.end for slot in expected.values())
    if payload_bytes != needed:
        raise LatentFileError(
            f"it has {payload_bytes} bytes of tensors, its frames take {needed}: it is "
            + ("truncated" if payload_bytes < needed else "followed by something else")
        )
