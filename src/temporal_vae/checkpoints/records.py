"""A model as one safetensors stream: configuration, weights and a checksum."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from temporal_vae.checkpoints.pretrained import FORMAT_VERSION, Entry, Stored, check_fit, check_size
from temporal_vae.config import TemporalVAEConfig
from temporal_vae.files.safetensors import Header, Slot, lay_out, read_header, write_header
from temporal_vae.files.streams import (
    PIECE,
    CheckpointError,
    Checksum,
    read_into,
    require,
    write_all,
)

# ---------------------------------------------------------------------------------------------
# Records

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_RECORD = {"format": "temporal_vae", "format_version": str(FORMAT_VERSION)}


def write_record(
    file: BinaryIO, config: TemporalVAEConfig, state: Mapping[str, Tensor], loss: str | None
) -> None:
    """Write a model from the file's current position on; flushed, not closed, never rewound.

    `loss` names the loss of the model if it is not the usual one. Tensors off the CPU come over a
    few at a time, and twice: their checksum stands before them.

    Raises `TypeError` for what is no file, `ValueError` for one that cannot be written and for
    tensors that are on the meta device or no floating point.
    """
    require(file, "write")
    slots = lay_out({name: _type_and_shape(name, t) for name, t in state.items()})
    metadata = _RECORD | {"config": json.dumps(config.to_dict())}
    if loss is not None:
        metadata["loss"] = loss
    with Checksum() as checksum:
        for name in slots:
            checksum.add(_bytes(state[name]))
        metadata["crc32"] = checksum.value()
    write_header(file, Header(metadata, slots))
    for name in slots:
        write_all(file, _bytes(state[name]))
    if hasattr(file, "flush"):
        file.flush()


def _type_and_shape(name: str, tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    if tensor.is_meta:
        raise ValueError(f"{name} has no values: it is on the meta device")
    if tensor.dtype not in _NAMES:
        raise ValueError(f"{name} is {tensor.dtype}: a record holds {', '.join(map(str, _NAMES))}")
    return _NAMES[tensor.dtype], tuple(tensor.shape)


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in order: its own memory if it is on the CPU and contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _bytes(tensor: Tensor) -> memoryview:
    return _flat(tensor).numpy().data


@dataclass(frozen=True)
class Record:
    """A record whose header was read and is sound; its payload comes next in the file."""

    config: TemporalVAEConfig
    loss: str | None
    """Name of the loss, if it is not the usual one."""
    _file: BinaryIO
    _header: Header

    def check_config(self, config: TemporalVAEConfig) -> None:
        """Raise `CheckpointError` naming what differs from the architecture that is wanted."""
        theirs, ours = self.config.to_dict(), config.to_dict()
        unlike = [
            f"{n} is {v!r} there, {ours[n]!r} here" for n, v in theirs.items() if v != ours[n]
        ]
        if unlike:
            raise CheckpointError(
                f"the record is of another architecture: {'; '.join(unlike)}: read it with "
                "from_file or from_bytes, which make a model of its own"
            )

    def check_loss(self, given: str | None) -> None:
        """Raise `CheckpointError` if the record names a loss, and another one is given."""
        if self.loss is not None and given != self.loss:
            raise CheckpointError(
                f"the record names a loss of its own, {self.loss!r}, which is code and so is not "
                "stored: give it again as loss_function, here or to the model's constructor"
            )

    def tensors(
        self,
        expected: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Read the payload, once: tensors such as `expected`, of any floating-point type.

        Each has its own memory, on the CPU in the record's type unless said otherwise; each is
        converted as it comes, so that no more is held than what is returned, and one tensor.

        Raises `CheckpointError`, before the payload for tensors that do not fit, at one for which
        there is no memory, and after the payload if it is damaged.
        """
        check_fit(_stored(self.config, self._header), expected)
        tensors: dict[str, Tensor] = {}
        with Checksum() as checksum:
            for name, slot in self._header.slots.items():
                tensor = _room(name, slot)
                for piece in _pieces(_bytes(tensor)):
                    read_into(self._file, piece)
                    checksum.add(piece)
                tensors[name] = tensor.to(device=device, dtype=dtype)
            if checksum.value() != self._header.metadata.get("crc32"):
                raise CheckpointError("the record is damaged: its checksum is another")
        _check_ties(expected, tensors)
        return tensors


def read_record(file: BinaryIO, size: int | None = None) -> Record:
    """Read a record from the file's current position on, as far as its payload: never rewinding.

    With `size` the record must take exactly so many bytes.

    Raises `TypeError` for what is no file, `ValueError` for one that cannot be read, and
    `CheckpointError` for what is no record of this version, is damaged, or asks for a model larger
    than it is itself.
    """
    require(file, "read")
    header = read_header(file, _RECORD)
    total = len(header.encode()) + header.payload_bytes
    if size is not None and size != total:
        raise CheckpointError(
            f"the record takes {total} bytes, but there are {size}: it "
            + ("is cut short" if size < total else "is followed by something else")
        )
    return Record(_config_of(header), header.metadata.get("loss"), file, header)


def _config_of(header: Header) -> TemporalVAEConfig:
    try:
        values = json.loads(header.metadata.get("config", ""))
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        config = TemporalVAEConfig.from_dict(values)
        check_size(_stored(config, header))
        return config
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the record has no proper configuration: {error}") from error


def _stored(config: TemporalVAEConfig, header: Header) -> Stored:
    entries = {n: Entry(Path(), n, slot.shape, slot.dtype) for n, slot in header.slots.items()}
    return Stored("the record", config, entries)


def _room(name: str, slot: Slot) -> Tensor:
    try:
        return torch.empty(slot.shape, dtype=_TYPES[slot.dtype], device="cpu")
    except RuntimeError as error:  # a file with holes is as large as it likes
        raise CheckpointError(
            f"{name} takes {slot.end - slot.begin} bytes, for which there is no memory: {error}"
        ) from error


def _pieces(view: memoryview) -> Iterator[memoryview]:
    return (view[start : start + PIECE] for start in range(0, len(view), PIECE))


def _check_ties(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` if tensors that are one in the model have two values."""
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in expected.items():
        if tensor.is_meta:
            continue
        other = first.setdefault((tensor.device, tensor.data_ptr(), tensor.stride()), name)
        if other != name and not torch.equal(_flat(tensors[other]), _flat(tensors[name])):
            raise CheckpointError(
                f"{other} and {name} are one tensor in the model, but not in the record"
            )
