"""A model as one safetensors stream: configuration, weights and a checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from temporal_vae.checkpoints.pretrained import FORMAT_VERSION, Entry, Stored, check_fit, check_size
from temporal_vae.config import VAEConfig, config_from_dict
from temporal_vae.files import safetensors
from temporal_vae.files.streams import CheckpointError, read_into, require, write_all

_PIECE = 2**20
"""Bytes that are read at once: few enough to be in the cache still for the checksum."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_REQUIRED = {"format": "temporal_vae", "format_version": str(FORMAT_VERSION)}


def write_record(
    file: BinaryIO, config: VAEConfig, state: Mapping[str, Tensor], loss: str | None
) -> None:
    """Write a model from the file's current position on; the file is flushed, not closed.

    `loss` names the loss of the model if it is not the usual one. Tensors off the CPU are copied
    to it one by one, and twice: their checksum stands before them.

    Raises `TypeError` for what is no file, `ValueError` for one that cannot be written and for
    tensors that are on the meta device or no floating point.
    """
    require(file, "write")
    slots = safetensors.lay_out({name: _type_and_shape(name, t) for name, t in state.items()})
    checksum = 0
    for name in slots:
        checksum = zlib.crc32(_bytes(state[name]), checksum)
    metadata = _REQUIRED | {"config": json.dumps(config.to_dict())}
    if loss is not None:
        metadata["loss"] = loss
    metadata["crc32"] = f"{checksum:08x}"
    safetensors.write_header(file, safetensors.Header(metadata, slots))
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


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in order: its own memory if it is on the CPU and contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_record(file: BinaryIO, size: int | None = None) -> Record:
    """Read a record from the file's current position on, as far as its payload.

    With `size` the record must take exactly so many bytes.

    Raises `TypeError` for what is no file, `ValueError` for one that cannot be read, and
    `CheckpointError` for what is no record of this version, is damaged, or asks for a model larger
    than it is itself.
    """
    require(file, "read")
    header = safetensors.read_header(file, _REQUIRED)
    total = len(header.encode()) + header.payload_bytes
    if size is not None and size != total:
        raise CheckpointError(
            f"the record takes {total} bytes, but there are {size}: it "
            + ("is cut short" if size < total else "is followed by something else")
        )
    entries = {n: Entry(Path(), n, slot.shape, slot.dtype) for n, slot in header.slots.items()}
    try:
        values = json.loads(header.metadata.get("config", ""))
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        stored = Stored("the record", config_from_dict(values), entries)
        check_size(stored)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the record has no proper configuration: {error}") from error
    return Record(stored, header, file)


@dataclass(frozen=True)
class Record:
    """A record whose header was read and is sound; its payload comes next in the file."""

    _stored: Stored
    _header: safetensors.Header
    _file: BinaryIO

    @property
    def config(self) -> VAEConfig:
        """The architecture of its model."""
        return self._stored.config

    def check_config(self, config: VAEConfig) -> None:
        """Raise `CheckpointError` naming what differs from the architecture that is wanted."""
        theirs, ours = self.config.to_dict(), config.to_dict()
        if theirs.get("kind") != ours.get("kind"):
            raise CheckpointError(
                "the record is of another kind of model: read it with from_file or from_bytes, "
                "which make a model of its own"
            )
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
        loss = self._header.metadata.get("loss")
        if loss is not None and given != loss:
            raise CheckpointError(
                f"the record names a loss of its own, {loss!r}, which is code and so is not "
                "stored: give it again as loss_function, here or to the model's constructor"
            )

    def tensors(
        self,
        expected: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Read the payload, once: tensors of the names and shapes of `expected`.

        Each has its own memory, on the CPU in the record's type unless said otherwise. Each is
        converted as it comes, so no more is held than what is returned and one tensor.

        Raises `CheckpointError`, before the payload for tensors that do not fit, at one for which
        there is no memory, and after the payload if it is damaged.
        """
        check_fit(self._stored, expected)
        tensors: dict[str, Tensor] = {}
        checksum = 0
        for name, slot in self._header.slots.items():
            tensor = _empty(name, slot)
            view = _bytes(tensor)
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                read_into(self._file, piece)
                checksum = zlib.crc32(piece, checksum)
            tensors[name] = tensor.to(device=device, dtype=dtype)
        if f"{checksum:08x}" != self._header.metadata.get("crc32"):
            raise CheckpointError("the record is damaged: its checksum is another")
        return tensors


def _empty(name: str, slot: safetensors.Slot) -> Tensor:
    try:
        return torch.empty(slot.shape, dtype=_DTYPES[slot.dtype], device="cpu")
    except RuntimeError as error:  # a header can claim any size, and so can a file with holes
        raise CheckpointError(
            f"{name} takes {slot.end - slot.begin} bytes, for which there is no memory: {error}"
        ) from error
