"""What the processes of a data set say to one another: JSON, and the bytes of frames behind it.

A process that decodes reads files of strangers through libav, so what it sends is read as data: of
the kinds in `KINDS`, plain values, fractions and frames. Nothing is unpickled.

    length of the JSON (8 bytes, little endian), JSON, bytes of each array in the JSON's order
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from temporal_vae.dataset.buckets import Bucket
from temporal_vae.dataset.clips import Clip, Cutting, Passed
from temporal_vae.dataset.entries import Entry
from temporal_vae.video import Frame, VideoInfo
from temporal_vae.video.frames import Colour
from temporal_vae.video.sources import Source

KINDS = {
    kind.__name__: kind
    for kind in (Bucket, Clip, Colour, Cutting, Entry, Frame, Passed, Source, VideoInfo)
}
"""Dataclasses that a message may hold, by their names."""
DTYPES = ("uint8", "uint16")
LONGEST = 2**28
"""Bytes of a message's JSON."""
LARGEST = 2**34
"""Bytes of a frame."""
Arrays = list[npt.NDArray[Any]]


def send(value: object, stream: IO[bytes]) -> None:
    """Write a message. Raises `TypeError` for a value of another kind."""
    arrays: Arrays = []
    text = json.dumps(_plain(value, arrays)).encode()
    stream.write(struct.pack("<Q", len(text)))
    stream.write(text)
    for array in arrays:
        stream.write(np.ascontiguousarray(array).data)


def receive(stream: IO[bytes]) -> Any:
    """Read a message. Raises `EOFError` where the stream ends, `ValueError` for what is none."""
    (length,) = struct.unpack("<Q", _exactly(stream, 8))
    if length > LONGEST:
        raise ValueError(f"a message of {length} bytes is none of this library")
    try:
        return _value(json.loads(_exactly(stream, length)), stream)
    except (TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"a message is none of this library: {error}") from error


def packed(value: object) -> bytes:
    """A message as bytes."""
    stream = io.BytesIO()
    send(value, stream)
    return stream.getvalue()


def unpacked(message: bytes) -> Any:
    """What `packed` was given. Raises `ValueError` and `EOFError` as `receive`."""
    return receive(io.BytesIO(message))


def _exactly(stream: IO[bytes], count: int) -> bytearray:
    found = bytearray(count)
    view = memoryview(found)
    while view:
        taken = cast(io.RawIOBase, stream).readinto(view)
        if not taken:
            raise EOFError("the stream ends within a message")
        view = view[taken:]
    return found


def _plain(value: Any, arrays: Arrays) -> Any:
    """The value as JSON has it; what JSON does not know is {its kind: what it is made of}."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Fraction):
        return {"Fraction": str(value)}
    if isinstance(value, OSError):
        return {"OSError": str(value)}
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": [str(value.dtype), *value.shape]}
    if is_dataclass(value) and type(value).__name__ in KINDS:
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        kept = {name: each for name, each in held.items() if not isinstance(each, Iterator)}
        return {type(value).__name__: {n: _plain(each, arrays) for n, each in kept.items()}}
    if isinstance(value, dict):
        return {"dict": {name: _plain(each, arrays) for name, each in value.items()}}
    if isinstance(value, list):
        return [_plain(each, arrays) for each in value]
    if isinstance(value, Collection):
        return {"tuple": [_plain(each, arrays) for each in value]}
    raise TypeError(f"a message cannot hold {type(value).__name__}")


def _value(plain: Any, stream: IO[bytes]) -> Any:
    if isinstance(plain, list):
        return [_value(each, stream) for each in plain]
    if not isinstance(plain, dict):
        return plain
    [(kind, held)] = plain.items()
    if kind == "Fraction":
        return Fraction(held)
    if kind == "OSError":
        return OSError(held)
    if kind == "array":
        return _array(*held, stream=stream)
    if kind == "tuple":
        return tuple(_value(each, stream) for each in held)
    values = {name: _value(each, stream) for name, each in held.items()}
    if kind == "dict":
        return values
    if kind not in KINDS:
        raise ValueError(f"a message holds a {kind}, which none of this library does")
    return KINDS[kind](**values)


def _array(dtype: str, *shape: int, stream: IO[bytes]) -> npt.NDArray[Any]:
    if dtype not in DTYPES:
        raise ValueError(f"frames are of {' or '.join(DTYPES)}, got {dtype}")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not 0 <= size <= LARGEST or min(shape, default=0) < 0:
        raise ValueError(f"a frame cannot be of {'x'.join(map(str, shape))}")
    return np.frombuffer(_exactly(stream, size), dtype).reshape(shape)
