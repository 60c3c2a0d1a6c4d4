"""Records: a model in a stream, whole or refused; and a refusal changes nothing."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import math
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pixels, redraw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor, nn

from temporal_vae import CheckpointError, TemporalVAE
from temporal_vae.checkpoints import records
from temporal_vae.files import safetensors, streams

TINY: dict[str, Any] = {
    "input_channels": 1,
    "latent_channels": 1,
    "base_channels": 2,
    "channel_multipliers": (1,),
    "blocks_per_level": 1,
    "num_temporal_layers": 0,
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> TemporalVAE:
    """A model of a few hundred numbers, every one drawn."""
    model = TemporalVAE(seed=seed, **(TINY | options))
    redraw(model, seed)
    return model.to(dtype)


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor, among which a NaN equals itself."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().tobytes()


def weights(model: TemporalVAE) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (tensor.dtype, bits(tensor)) for name, tensor in model.state_dict().items()}


def everything(model: TemporalVAE) -> list[object]:
    """What must be as before when nothing was changed."""
    return [
        weights(model),
        [(id(p), p.requires_grad, p.stride(), p.data_ptr()) for p in model.parameters()],
        [module.training for module in model.modules()],
        (model.config, model.default_loss_function, bits(model._generator.get_state())),
        (model.slicing_enabled, model.tiling_enabled, model.memory_budget),
        (model.encoder.stream_scale, model.decoder.stream_scale),
    ]


def assert_refused(model: TemporalVAE, data: bytes, match: str = "r") -> None:
    """No way of reading takes these bytes, and the model stays what it was."""
    before = everything(model)
    ways: list[Callable[[], object]] = [
        lambda: model.load_state(io.BytesIO(data)),
        lambda: model.deserialize(data),
        lambda: TemporalVAE.from_bytes(data),
    ]
    for way in ways:
        with pytest.raises(CheckpointError, match=match):
            way()
    assert everything(model) == before


# The format, once more, from its description


def framed(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def opened(record: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a record."""
    length = int.from_bytes(record[:8], "little")
    return json.loads(record[8 : 8 + length]), record[8 + length :]


def sealed(document: dict[str, Any], payload: bytes) -> bytes:
    """A record of this header and payload, with checksums that are right: a forgery."""
    metadata = {k: v for k, v in document["__metadata__"].items() if k != "header_crc32"}
    metadata["crc32"] = f"{zlib.crc32(payload):08x}"
    crc = zlib.crc32(framed({**document, "__metadata__": metadata}))
    metadata["header_crc32"] = f"{crc:08x}"
    return framed({**document, "__metadata__": metadata}) + payload


# Round trips ---------------------------------------------------------------------------------


def through_a_stream(saved: TemporalVAE, other: TemporalVAE, folder: Path) -> TemporalVAE:
    file = io.BytesIO()
    saved.save_state(file)
    file.seek(0)
    other.load_state(file)
    return other


def through_bytes(saved: TemporalVAE, other: TemporalVAE, folder: Path) -> TemporalVAE:
    other.deserialize(saved.serialize())
    return other


def through_a_file(saved: TemporalVAE, other: TemporalVAE, folder: Path) -> TemporalVAE:
    saved.save_model(folder / "a" / "b.safetensors")
    other.load_model(str(folder / "a" / "b.safetensors"))
    return other


def into_a_new_model(saved: TemporalVAE, other: TemporalVAE, folder: Path) -> TemporalVAE:
    return TemporalVAE.from_bytes(saved.serialize())


def into_a_new_model_from_a_file(
    saved: TemporalVAE, other: TemporalVAE, folder: Path
) -> TemporalVAE:
    saved.save_model(str(folder / "model"))
    return TemporalVAE.from_file(folder / "model")


WAYS = [
    through_a_stream, through_bytes, through_a_file, into_a_new_model,
    into_a_new_model_from_a_file,
]  # fmt: skip


@every_dtype
@pytest.mark.parametrize("way", WAYS)
def test_what_was_saved_comes_back_bit_for_bit(
    way: Callable[[TemporalVAE, TemporalVAE, Path], TemporalVAE], dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = tiny(0, dtype, num_temporal_layers=1, causal_mode=True, latent_scale_factor=0.7)
    other = tiny(1, dtype, num_temporal_layers=1, causal_mode=True, latent_scale_factor=0.7)
    before = everything(saved)
    loaded = way(saved, other, tmp_path)
    assert weights(loaded) == weights(saved) and loaded.config == saved.config
    assert everything(saved) == before
    assert torch.equal(loaded.predict(clip(dtype)), saved.predict(clip(dtype)))


def clip(dtype: torch.dtype) -> Tensor:
    return pixels(3, 8, 8, channels=1).to(dtype)


def test_every_value_comes_back() -> None:
    model, values = tiny(), [float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38]
    with torch.no_grad():
        model.encoder.conv_in.weight.view(-1)[:6] = torch.tensor(values)
    assert weights(TemporalVAE.from_bytes(model.serialize())) == weights(model)


@pytest.mark.parametrize(
    "options",
    [
        {"temporal_norm": "clip", "clip_frames": 5, "temporal_encoder": False},
        {"time_conv_out": True, "num_temporal_layers": 2, "temporal_kernel_size": 5},
        {"channel_multipliers": (1, 3, 2), "norm_groups": 2, "input_channels": 4},
        {"quant_conv": False, "post_quant_conv": False, "latent_shift_factor": 0.1},
        {"latent_scale_factor": 0.1 + 0.2, "latent_channels": 3, "temporal_attention_reach": 0},
    ],
    ids=str,
)
def test_a_record_rebuilds_any_architecture(options: dict[str, Any]) -> None:
    model = tiny(**({"num_temporal_layers": 1} | options))
    again = TemporalVAE.from_bytes(model.serialize())
    assert again.config == model.config and weights(again) == weights(model)


def test_loading_leaves_the_rest_alone() -> None:
    saved, model = tiny(0), tiny(1)
    model.eval().set_tiling_enabled(True)
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.SGD(model.decoder.parameters(), lr=1.0)
    before, state = everything(model), torch.random.get_rng_state()
    model.deserialize(saved.serialize())
    TemporalVAE.from_bytes(saved.serialize())
    assert everything(model)[1:] == before[1:]
    assert torch.equal(torch.random.get_rng_state(), state)
    for parameter in model.decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    change = model.decoder.conv_in.bias - saved.decoder.conv_in.bias
    assert torch.allclose(change, -torch.ones_like(change))


@every_dtype
def test_values_are_cast_to_the_model(dtype: torch.dtype) -> None:
    for stored in DTYPES:
        saved, model = tiny(0, stored), tiny(1, dtype)
        model.deserialize(saved.serialize())
        assert weights(model) == weights(tiny(0, stored).to(dtype))
        made = TemporalVAE.from_bytes(saved.serialize(), dtype=dtype, device="cpu")
        assert weights(made) == weights(model)


def test_a_new_model_is_where_it_is_wanted() -> None:
    made = TemporalVAE.from_bytes(tiny().serialize(), device="meta")
    assert all(p.is_meta for p in made.parameters())


def test_a_dtype_must_be_floating_point() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        TemporalVAE.from_bytes(tiny().serialize(), dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bits_are_kept(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    assert weights(TemporalVAE.from_bytes(model.serialize())) == weights(model)


def test_float16_is_carried_as_the_loaded_weights_need() -> None:
    loud = tiny(base_channels=8)
    with torch.no_grad():
        loud.decoder.conv_in.weight.mul_(1e4)
    expected = TemporalVAE.from_bytes(loud.serialize()).half()
    assert expected.stream_scales["decoder"] < 1
    model = tiny(1, torch.float16, base_channels=8)
    model.deserialize(loud.serialize())
    made = TemporalVAE.from_bytes(loud.serialize(), dtype=torch.float16)
    assert model.stream_scales == made.stream_scales == expected.stream_scales
    model.deserialize(tiny(2, base_channels=8).serialize())
    assert model.stream_scales["decoder"] == 1


def test_new_models_hold_memory_of_their_own() -> None:
    data = bytearray(tiny().serialize())
    model = TemporalVAE.from_bytes(data)
    before = weights(model)
    data[:] = bytes(len(data))
    assert weights(model) == before
    places = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(places) == len(list(model.parameters()))


def test_any_strides_and_mixed_dtypes() -> None:
    saved, model = tiny(0), tiny(1)
    for each in (saved, model):
        each.decoder.to(torch.float16)
        each.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        weight = each.encoder.conv_in.weight
        weight.data = weight.data.transpose(2, 3)
        assert not weight.is_contiguous()
    model.deserialize(saved.serialize())
    assert weights(model) == weights(saved)
    assert weights(TemporalVAE.from_bytes(saved.serialize())) == weights(saved)


def test_tied_weights_stay_tied() -> None:
    tied = tiny(1)
    first, second = (tied.encoder.mid_block.resnets[i] for i in range(2))
    second.conv1.weight = first.conv1.weight  # type: ignore[union-attr]
    data = tied.serialize()
    copy = TemporalVAE.from_bytes(data)
    assert weights(copy) == weights(tied)
    with torch.no_grad():
        first.conv1.weight.zero_()  # type: ignore[union-attr, operator]
    tied.deserialize(data)
    assert weights(tied) == weights(copy)
    assert second.conv1.weight is first.conv1.weight  # type: ignore[union-attr]


# safetensors ---------------------------------------------------------------------------------


def test_a_record_is_a_safetensors_file(tmp_path: Path) -> None:
    model = tiny(num_temporal_layers=1)
    model.decoder.to(torch.bfloat16)
    model.encoder.conv_out.to(torch.float16)
    model.encoder.conv_in.to(torch.float64)
    model.save_model(tmp_path / "model.safetensors")
    data, state = (tmp_path / "model.safetensors").read_bytes(), model.state_dict()
    read = safetensors_load(data)
    assert {name: (t.dtype, bits(t)) for name, t in read.items()} == weights(model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "temporal_vae" and metadata["format_version"] == "1"
    assert json.loads(metadata["config"])["base_channels"] == 2
    ours, theirs = opened(data), opened(safetensors_save(state))
    ours[0].pop("__metadata__")
    assert list(ours[0].items()) == list(theirs[0].items()) and ours[1] == theirs[1]
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_the_format_is_as_described() -> None:
    data = tiny().serialize()
    assert sealed(*opened(data)) == data


# Streams -------------------------------------------------------------------------------------


class Forward(io.RawIOBase):
    """A raw stream that goes forward only, in steps of 1 to `most` bytes."""

    def __init__(self, data: bytes = b"", most: int = 7, only_read: bool = False):
        self.data, self.at, self.flushed = bytearray(data), 0, 0
        self.steps, self.only_read = itertools.cycle(range(1, most + 1)), only_read

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return not self.only_read

    def seekable(self) -> bool:
        return False

    def seek(self, *args: object) -> int:
        raise AssertionError("it was sought")

    tell = close = seek  # type: ignore[assignment]

    def __del__(self) -> None:
        pass

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), next(self.steps), len(self.data) - self.at)
        buffer[:count] = self.data[self.at : self.at + count]
        self.at += count
        return count

    def write(self, data: Any) -> int:
        count = min(len(data), next(self.steps))
        self.data += data[:count]
        return count

    def flush(self) -> None:
        self.flushed += 1


def test_records_follow_each_other_in_steps_of_any_size() -> None:
    first, second, model = tiny(0), tiny(1, torch.float64), tiny(2)
    file = Forward(b"before")
    first.save_state(file)  # type: ignore[arg-type]
    end = len(file.data)
    second.save_state(file)  # type: ignore[arg-type]
    file.data += b"after"
    assert file.flushed == 2
    assert bytes(file.data) == b"before" + first.serialize() + second.serialize() + b"after"
    file.at = 6
    model.load_state(file)  # type: ignore[arg-type]
    assert weights(model) == weights(first) and file.at == end
    model.double().load_state(file)  # type: ignore[arg-type]
    assert weights(model) == weights(second)
    assert bytes(file.data[file.at :]) == b"after"


@pytest.mark.parametrize("buffering", [0, -1, 16])
def test_a_place_inside_a_file(tmp_path: Path, buffering: int) -> None:
    path, record = tmp_path / "file", tiny().serialize()
    path.write_bytes(b"x" * (len(record) + 20))
    with path.open("r+b", buffering) as file:
        file.seek(5)
        tiny().save_state(file)
        assert file.tell() == 5 + len(record) and not file.closed
    assert path.read_bytes() == b"x" * 5 + record + b"x" * 15
    with path.open("rb", buffering) as file:
        file.seek(5)
        model = tiny(1)
        model.load_state(file)
        assert file.tell() == 5 + len(record) and not file.closed
    assert weights(model) == weights(tiny())


def test_a_file_is_flushed(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        tiny().save_state(file)
        assert (tmp_path / "file").read_bytes() == tiny().serialize()


class Plain:
    """Methods `read` and `write` alone, of the simplest kind."""

    def __init__(self, data: bytes = b""):
        self.data = data

    def read(self, count: int) -> bytes:
        taken, self.data = self.data[: min(count, 100)], self.data[min(count, 100) :]
        return taken

    def write(self, data: bytes) -> None:
        self.data += bytes(data)


def test_plain_objects_will_do() -> None:
    plain, model = Plain(), tiny(1)
    tiny().save_state(plain)  # type: ignore[arg-type]
    assert plain.data == tiny().serialize()
    plain.data += b"after"
    model.load_state(plain)  # type: ignore[arg-type]
    assert weights(model) == weights(tiny()) and plain.data == b"after"


def test_pipes_sockets_and_compressed_files(tmp_path: Path) -> None:
    record, model = tiny().serialize() + tiny(1).serialize(), tiny(2)
    ends = os.pipe()
    ours, theirs = socket.socketpair()
    with ours, theirs, os.fdopen(ends[0], "rb", 0) as source, os.fdopen(ends[1], "wb", 0) as sink:
        for reader, writer in ((source, sink), (ours.makefile("rb"), theirs.makefile("wb"))):

            def write(writer: Any = writer) -> None:
                tiny().save_state(writer)
                for at in range(0, len(record), 97):
                    writer.write(record[at : at + 97])
                writer.flush()

            thread = threading.Thread(target=write)
            thread.start()
            for seed in (0, 0, 1):
                model.load_state(reader)
                assert weights(model) == weights(tiny(seed))
            thread.join()
    with gzip.open(tmp_path / "file.gz", "wb") as packed:
        tiny().save_state(packed)  # type: ignore[arg-type]
        tiny(1).save_state(packed)  # type: ignore[arg-type]
    with gzip.open(tmp_path / "file.gz", "rb") as packed:
        for seed in (0, 1):
            model.load_state(packed)  # type: ignore[arg-type]
            assert weights(model) == weights(tiny(seed))
    whole = (tmp_path / "file.gz").read_bytes()
    (tmp_path / "file.gz").write_bytes(whole[: len(whole) // 3])
    with (
        gzip.open(tmp_path / "file.gz", "rb") as packed,
        pytest.raises(CheckpointError, match="cut"),
    ):
        model.load_state(packed)  # type: ignore[arg-type]


class Bad(io.RawIOBase):
    """A raw stream whose every step gives this."""

    def __init__(self, gives: Any):
        self.gives = gives

    def readable(self) -> bool:
        return True

    writable = readable

    def readinto(self, buffer: object) -> Any:
        return self.gives

    def write(self, data: object) -> Any:
        return self.gives


@pytest.mark.parametrize(
    ("gives", "error"), [(None, BlockingIOError), (10**9, OSError), (-1, OSError)]
)
def test_streams_that_break_their_promise(gives: Any, error: type[OSError]) -> None:
    model = tiny()
    before = everything(model)
    with pytest.raises(error):
        model.load_state(Bad(gives))  # type: ignore[arg-type]
    with pytest.raises(error):
        model.save_state(Bad(gives))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="returned 0"):
        model.save_state(Bad(0))  # type: ignore[arg-type]
    assert everything(model) == before


@pytest.mark.parametrize("file", [None, 3, "name", Path("name"), b"bytes", object()])
def test_what_is_no_file(file: Any) -> None:
    for method in (tiny().save_state, tiny().load_state):
        with pytest.raises(TypeError, match="binary file"):
            method(file)


def test_files_of_the_wrong_kind(tmp_path: Path) -> None:
    path, model = tmp_path / "file", tiny()
    path.write_bytes(model.serialize())
    before = everything(model)
    closed = io.BytesIO(model.serialize())
    closed.close()
    with path.open("rb") as file, pytest.raises(ValueError, match="not open to write"):
        model.save_state(file)
    with path.open("r+") as text:
        for method in (model.save_state, model.load_state):
            for wrong in (text, io.StringIO()):
                with pytest.raises(ValueError, match="must be binary"):
                    method(wrong)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="closed"):
                method(closed)
    with path.open("ab") as file, pytest.raises(ValueError, match="not open to read"):
        model.load_state(file)
    with pytest.raises(ValueError, match="must be binary"):
        model.load_state(Text())  # type: ignore[arg-type]
    assert path.read_bytes() == model.serialize() and everything(model) == before


class Text:
    def read(self, count: int) -> str:
        return "x" * count


@pytest.mark.parametrize("data", [None, "text", 3, [1]], ids=str)
def test_what_are_no_bytes(data: Any) -> None:
    for read in (tiny().deserialize, TemporalVAE.from_bytes):
        with pytest.raises(TypeError, match="data must be bytes"):
            read(data)


def test_any_bytes_will_do() -> None:
    data = tiny().serialize()
    for kind in (bytearray, memoryview):
        assert weights(TemporalVAE.from_bytes(kind(data))) == weights(tiny())


# Paths ---------------------------------------------------------------------------------------


def test_paths_that_are_none(tmp_path: Path) -> None:
    model = tiny()
    for method in (model.save_model, model.load_model, TemporalVAE.from_file):
        for path in ("", "  ", "\n"):
            with pytest.raises(ValueError, match="must name a file"):
                method(path)
        for wrong in (None, 3, io.BytesIO()):
            with pytest.raises(TypeError, match="PathLike"):
                method(wrong)  # type: ignore[arg-type]
        with pytest.raises(IsADirectoryError):
            method(tmp_path)
    for method in (model.load_model, TemporalVAE.from_file):
        with pytest.raises(FileNotFoundError):
            method(tmp_path / "none")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="a device or a pipe"):
            method(tmp_path / "pipe")
        (tmp_path / "pipe").unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x" / "y" / "model"
    tiny().save_model(path)
    old, broken = path.read_bytes(), tiny(1)
    whole = nn.Parameter(broken.decoder.conv_in.weight.long(), requires_grad=False)
    broken.decoder.conv_in.weight = whole
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight is torch\.int64"):
        broken.save_model(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "write_all", full)
        patch.setattr("temporal_vae.checkpoints.records.write_all", full)
        with pytest.raises(OSError, match="No space"):
            tiny(1).save_model(path)
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]
    tiny(1).save_model(path)
    assert path.read_bytes() == tiny(1).serialize()


def full(file: Any, data: Any) -> None:
    file.write(bytes(data)[:5])
    raise OSError(28, "No space left on device")


def test_bytes_after_a_record_are_refused(tmp_path: Path) -> None:
    model, data = tiny(1), tiny().serialize()
    before = everything(model)
    for longer in (data + b"x", data + data):
        (tmp_path / "file").write_bytes(longer)
        ways: list[Callable[[], object]] = [
            lambda longer=longer: model.deserialize(longer),  # type: ignore[misc]
            lambda longer=longer: TemporalVAE.from_bytes(longer),  # type: ignore[misc]
            lambda: model.load_model(tmp_path / "file"),
            lambda: TemporalVAE.from_file(tmp_path / "file"),
        ]
        for way in ways:
            with pytest.raises(CheckpointError, match="followed by something else"):
                way()
    assert everything(model) == before


def test_from_pretrained_says_who_reads_a_record(tmp_path: Path) -> None:
    tiny().save_model(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="from_file reads it"):
        TemporalVAE.from_pretrained(tmp_path / "model.safetensors")


# Damage --------------------------------------------------------------------------------------


def test_cut_anywhere() -> None:
    data, model = tiny().serialize(), tiny(1)
    before = everything(model)
    head = len(data) - len(opened(data)[1])
    for end in [*range(head + 9), *range(head + 9, len(data), 13), len(data) - 1]:
        with pytest.raises(CheckpointError):
            model.load_state(io.BytesIO(data[:end]))
    assert everything(model) == before
    assert_refused(model, data[:-1])
    assert_refused(model, b"", "cut short")


def test_a_flipped_byte_anywhere() -> None:
    data, model = bytearray(tiny().serialize()), tiny(1)
    before, rng = everything(model), random.Random(0)
    head = len(data) - len(opened(bytes(data))[1])
    for at in [*range(0, 1000, 2), *range(1000, head, 17), *range(head, len(data), 13)]:
        mask = rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        data[at] ^= mask
        with pytest.raises(CheckpointError):
            model.load_state(io.BytesIO(data))
        data[at] ^= mask
    assert everything(model) == before
    model.deserialize(data)


def document() -> dict[str, Any]:
    return opened(tiny().serialize())[0]


FIRST, SECOND, *_, LAST = list(document())[1:]


def metadata(**changes: str | None) -> Callable[[dict[str, Any]], object]:
    def change(document: dict[str, Any]) -> None:
        document["__metadata__"].update(changes)
        for name in [name for name, value in changes.items() if value is None]:
            del document["__metadata__"][name]

    return change


def configured(**changes: Any) -> Callable[[dict[str, Any]], object]:
    def change(document: dict[str, Any]) -> None:
        config = json.loads(document["__metadata__"]["config"]) | changes
        document["__metadata__"]["config"] = json.dumps(config)

    return change


def tensor(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document[name].update(changes)


def claims(slot: dict[str, Any]) -> dict[str, Any]:
    """Of a last tensor: that it had 2**58 numbers."""
    begin = slot["data_offsets"][0]
    return {"shape": [2**58], "data_offsets": [begin, begin + 2**60]}


def renamed(document: dict[str, Any]) -> None:
    items = [(name + "x" * (name == FIRST), value) for name, value in document.items()]
    document.clear()
    document.update(items)


def swapped(document: dict[str, Any]) -> None:
    first, second = document.pop(FIRST), document.pop(SECOND)
    document.update({SECOND: second, FIRST: first})


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no metadata": (lambda d: d["__metadata__"].clear(), "its format is None"),
    "format": (metadata(format="pt"), "its format is 'pt'"),
    "no format": (metadata(format=None), "its format is None"),
    "version": (metadata(format_version="2"), "its format_version is '2'"),
    "no version": (metadata(format_version=None), "its format_version is None"),
    "no config": (metadata(config=None), "configuration"),
    "config": (metadata(config="{"), "configuration"),
    "config list": (metadata(config="[]"), "no object"),
    "config deep": (metadata(config="[" * 100_000), "configuration"),
    "config field": (configured(kernel=3), "unknown configuration fields"),
    "config type": (configured(causal_mode="no"), "causal_mode must be"),
    "config nan": (configured(latent_scale_factor=float("nan")), "must be finite"),
    "config terabytes": (configured(base_channels=2**20), "asks for at least|architecture"),
    "config endless": (configured(blocks_per_level=2**40), "asks for at least|architecture"),
    "config digits": (configured(base_channels=10**4000), "configuration|architecture"),
    "config layers": (configured(num_temporal_layers=1), "asks for at least|fit|architecture"),
    "text as number": (lambda d: d["__metadata__"].update(format_version=1), "no metadata"),
    "dtype": (tensor(FIRST, dtype="F128"), "no proper place"),
    "dtype kind": (tensor(FIRST, dtype="I32"), "no proper place"),
    "dtype type": (tensor(FIRST, dtype=32), "no proper place"),
    "dtype narrower": (tensor(FIRST, dtype="F16"), "no proper place"),
    "shape": (tensor(FIRST, shape=[3]), "no proper place"),
    "shape rank": (tensor(FIRST, shape=[2, 1]), "do not fit"),
    "shape huge": (tensor(FIRST, shape=[2**60]), "no proper place"),
    "shape deep": (tensor(FIRST, shape=[1] * 100), "no proper place"),
    "shape negative": (tensor(FIRST, shape=[-1, -2]), "no proper place"),
    "shape float": (tensor(FIRST, shape=[2.0]), "no proper place"),
    "shape bool": (tensor(FIRST, shape=[2, True]), "no proper place"),
    "shape none": (tensor(FIRST, shape=None), "no proper place"),
    "offset gap": (tensor(SECOND, data_offsets=[12, 12]), "no proper place"),
    "offset overlap": (tensor(SECOND, data_offsets=[4, 12]), "no proper place"),
    "offset reversed": (tensor(SECOND, data_offsets=[16, 8]), "no proper place"),
    "offset negative": (tensor(FIRST, data_offsets=[-8, 0]), "no proper place"),
    "offset three": (tensor(FIRST, data_offsets=[0, 8, 8]), "no proper place"),
    "offset huge": (tensor(FIRST, data_offsets=[0, 2**60]), "no proper place"),
    "offset claims": (lambda d: d[LAST].update(claims(d[LAST])), "there are|do not fit"),
    "order": (swapped, "no proper place"),
    "no tensor": (lambda d: d.pop(list(d)[-1]), "bytes, but|fit"),
    "no object": (lambda d: d.update({FIRST: 3}), "no proper place"),
    "a field more": (tensor(FIRST, more=1), "not as it was written"),
    "another name": (renamed, "missing"),
    "loss": (metadata(loss="my.loss"), "a loss of its own, 'my.loss'"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_every_field_wrong_in_turn(forgery: str) -> None:
    change, match = FORGERIES[forgery]
    document, payload = opened(tiny().serialize())
    change(document)
    assert_refused(tiny(1), sealed(document, payload), match)


def test_tensors_that_are_not_aligned() -> None:
    """Two bytes before everything of four: the offsets have no gap, and fit shapes and types."""
    document, payload = opened(tiny().serialize())
    narrow = "decoder.conv_out.bias"
    place, rest = 0, {narrow: document.pop(narrow)}
    for name in list(document)[1:]:
        rest[name] = document.pop(name)
    for name, slot in rest.items():
        slot["dtype"] = "F16" if name == narrow else "F32"
        size = (2 if name == narrow else 4) * math.prod(slot["shape"])
        slot["data_offsets"] = [place, place + size]
        place += size
    assert_refused(tiny(1), sealed(document | rest, payload[:place]), "no proper place")


def test_a_model_of_terabytes_is_not_made(tmp_path: Path) -> None:
    """Shapes and configuration agree, only the bytes are missing."""
    with torch.device("meta"):
        state = TemporalVAE(**(TINY | {"base_channels": 2**18})).state_dict()
    slots = safetensors.lay_out(
        {name: ("F32", tuple(tensor.shape)) for name, tensor in state.items()}
    )
    document, payload = opened(tiny().serialize())
    configured(base_channels=2**18)(document)
    metadata = without_seal(document)["__metadata__"]
    data = safetensors.Header(metadata, slots).encode() + payload
    assert max(slot.end for slot in slots.values()) > 10**12
    assert_refused(tiny(1), data, "there are|another architecture")
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(CheckpointError, match="cut short"):
        TemporalVAE.from_file(tmp_path / "file")


def test_a_tensor_without_memory_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file with holes, whose size is as claimed."""

    def full(*shape: object, **options: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model, data = tiny(1), tiny().serialize()
    before = everything(model)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(CheckpointError, match="there is no memory"):
        model.deserialize(data)
    assert everything(model) == before


def test_every_metadata_is_needed() -> None:
    data, model = tiny().serialize(), tiny(1)
    for name in ("crc32", "header_crc32"):
        document, payload = opened(data)
        del document["__metadata__"][name]
        if name == "crc32":
            crc = zlib.crc32(framed(without_seal(document)))
            document["__metadata__"].pop("header_crc32")
            document["__metadata__"]["header_crc32"] = f"{crc:08x}"
        assert_refused(model, framed(document) + payload, "damaged")


def without_seal(document: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in document["__metadata__"].items() if k != "header_crc32"}
    return {**document, "__metadata__": rest}


def header(text: bytes, claims: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if claims is None else claims) + text


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (header(b"{}", claims=2**60), "would have 1152921504606846976 bytes"),
        (header(b"{}", claims=2**64 - 1), "would have"),
        (header(b"{}", claims=safetensors.HEADER_LIMIT), "cut short"),
        (header(b"{}"), "no metadata"),
        (header(b""), "no JSON"),
        (header(b"[]"), "no metadata"),
        (header(b"[" * 10**6), "no JSON"),
        (header(b'{"a":' * 10**5), "no JSON"),
        (header(b"\xff" * 100), "no JSON"),
        (header(b'{"__metadata__":' + b"1" * 10**6 + b"}"), "no JSON"),
        (header(b'{"__metadata__":"format"}'), "no metadata"),
        (b"PK\x03\x04" + bytes(100), "cut short|would have|no JSON"),
        (bytes(100), "no JSON"),
        (safetensors_save(tiny().state_dict()), "no metadata"),
        (safetensors_save(tiny().state_dict(), {"format": "pt"}), "its format is 'pt'"),
    ],
    ids=range(15),
)  # fmt: skip
def test_what_is_no_record(data: bytes, match: str) -> None:
    assert_refused(tiny(1), data, match)


def test_a_header_is_written_one_way_only() -> None:
    """Other spellings of the same header: spaces, an escape, a repeated name."""
    data = tiny().serialize()
    head, payload = data[8:].split(b"}}", 1)[0] + b"}}", opened(data)[1]
    for text in (
        head + b" " * (8 - len(head) % 8) + b" " * 8,
        head.replace(b'"F32"', b'"F\\u00332"', 1),
        head.replace(b'"__metadata__"', b'"__metadata__":{"format":"x"},"__metadata__"', 1),
        head.replace(b'"shape":[2]', b'"shape":[3],"shape":[2]', 1),
        head.replace(b":[2]", b":[2 ]", 1),
    ):
        assert_refused(tiny(1), header(text) + payload, "not as it was written|a name stands twice")


def test_more_tensors_than_a_header_holds() -> None:
    model = tiny()
    model.decoder.extra = nn.ParameterDict(
        {f"{'x' * 1000}{i}": nn.Parameter(torch.zeros(1)) for i in range(4200)}
    )
    with pytest.raises(ValueError, match="the limit is"):
        records.write_record(io.BytesIO(), model.config, model.state_dict(), None)


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = TemporalVAE(**TINY)
    with pytest.raises(ValueError, match="on the meta device"):
        model.serialize()
    with pytest.raises(ValueError, match="on the meta device"):
        model.deserialize(tiny().serialize())
    assert all(parameter.is_meta for parameter in model.parameters())


# Another architecture, another loss ----------------------------------------------------------

OTHERS: dict[str, Any] = {
    "input_channels": 3,
    "latent_channels": 2,
    "base_channels": 3,
    "channel_multipliers": (2,),
    "num_temporal_layers": 2,
    "temporal_kernel_size": 5,
    "causal_mode": True,
    "latent_scale_factor": 0.5,
    "latent_shift_factor": 0.5,
    "blocks_per_level": 2,
    "norm_groups": 2,
    "quant_conv": False,
    "post_quant_conv": False,
    "temporal_encoder": False,
    "temporal_decoder": False,
    "temporal_attention_reach": 1,
    "temporal_norm": "clip",
    "time_conv_out": True,
    "clip_frames": 5,
}


def test_the_whole_configuration_is_changed_in_turn() -> None:
    assert OTHERS.keys() == tiny().config.to_dict().keys()


@pytest.mark.parametrize("field", OTHERS)
def test_another_architecture_is_refused(field: str) -> None:
    base: dict[str, Any] = {"num_temporal_layers": 1, "clip_frames": 4}
    model = tiny(**base)
    data = tiny(1, **(base | {field: OTHERS[field]})).serialize()
    before = everything(model)
    for read in (model.deserialize, lambda data: model.load_state(io.BytesIO(data))):
        with pytest.raises(CheckpointError, match=f"another architecture: .*{field} is"):
            read(data)
    assert everything(model) == before
    assert weights(TemporalVAE.from_bytes(data))


def absolute(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().mean()


class Scaled(nn.Module):
    """A loss with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return absolute(prediction, target) * self.scale.sum()


@pytest.mark.parametrize("loss", [absolute, Scaled(), nn.L1Loss(), lambda a, b: a.sum()])
def test_a_loss_is_named_and_given_again(loss: Any, tmp_path: Path) -> None:
    model = tiny(loss_function=loss)
    data = model.serialize()
    named = opened(data)[0]["__metadata__"]["loss"]
    assert named.split(".")[-1] in (
        getattr(loss, "__qualname__", ""),
        type(loss).__name__,
        "<lambda>",
    )
    assert not any("loss" in name for name in list(opened(data)[0])[1:])
    assert_refused(tiny(1), data, "a loss of its own")
    assert_refused(tiny(1, loss_function=torch.nn.functional.huber_loss), data, "a loss of its own")
    other = tiny(1, loss_function=loss)
    other.deserialize(data)
    assert weights(other) == weights(model)
    made = TemporalVAE.from_bytes(data, loss_function=loss)
    assert made.default_loss_function is loss and weights(made) == weights(model)
    model.save_model(tmp_path / "model")
    with pytest.raises(CheckpointError, match="a loss of its own"):
        TemporalVAE.from_file(tmp_path / "model")
    assert TemporalVAE.from_file(tmp_path / "model", loss).default_loss_function is loss


def test_seed_and_loss_are_not_compared() -> None:
    model = tiny(5, loss_function=absolute)
    model.deserialize(tiny(6).serialize())
    assert weights(model) == weights(tiny(6)) and model.default_loss_function is absolute


# Memory --------------------------------------------------------------------------------------

MEASURE = '''
import ctypes, gc, json, sys
from pathlib import Path
import torch
from temporal_vae import TemporalVAE

def resident(what):
    status = Path("/proc/self/status").read_text()
    return int(next(l for l in status.splitlines() if l.startswith(what)).split()[1]) * 1024

def peak(step):
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what was freed must not serve again
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = step()
    return resident("VmHWM") - before, result

folder = Path(sys.argv[1])
small = TemporalVAE(base_channels=16, seed=0)  # what the first load of any takes
TemporalVAE.from_bytes(small.serialize()); small.deserialize(small.serialize())
model = TemporalVAE(base_channels=64, num_temporal_layers=0, seed=0)
payload = 4 * model.parameter_count
save, _ = peak(lambda: model.save_model(folder / "model"))
load, _ = peak(lambda: model.load_model(folder / "model"))
del model
made, _ = peak(lambda: TemporalVAE.from_file(folder / "model"))
half, _ = peak(lambda: TemporalVAE.from_file(folder / "model", dtype=torch.bfloat16))
print(json.dumps([x / payload for x in (save, load, made, half)] + [payload / 2**20]))
'''  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_one_payload(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    save, load, made, half, mib = json.loads(result.stdout)
    assert mib > 70
    assert save < 0.1, f"saving takes {save:.2f} of the weights"
    assert load < 1.1, f"loading in place takes {load:.2f} of the weights"
    assert made < 1.1, f"a new model takes {made:.2f} of its weights"
    assert half < 1, f"a model in half the bytes takes {half:.2f} of its record"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_records_on_a_gpu() -> None:
    model, data = tiny(1).to("cuda"), tiny().serialize()
    model.deserialize(data)
    assert model.device.type == "cuda" and model.serialize() == data
    made = TemporalVAE.from_bytes(data, device="cuda", dtype=torch.float64)
    assert made.device.type == "cuda" and weights(made) == weights(tiny().double())


# Anything ------------------------------------------------------------------------------------

CASES = itertools.count()
RECORDS = [tiny(0).serialize(), tiny(1).serialize(), tiny(0, latent_scale_factor=2.0).serialize()]
TARGET = tiny(2)
BEFORE = everything(TARGET)
RESTORE = {name: value.clone() for name, value in TARGET.state_dict().items()}
DAMAGES = ["cut", "flip", "splice", "repeat", "zero"]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A record after truncations, flips and splices, a few in a row."""
    data = bytearray(draw(st.sampled_from(RECORDS)))
    head = 8 + int.from_bytes(data[:8], "little")
    for kind in draw(st.lists(st.sampled_from(DAMAGES), max_size=3)):
        # the header is the larger part of so small a record, the payload must have its share
        place = st.one_of(
            st.integers(0, len(data)), st.integers(0, 16), st.integers(head, head + 40)
        )
        at = min(draw(place), len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "splice":
            other = draw(st.sampled_from(RECORDS))
            data[at:] = other[draw(st.sampled_from([at, 0, head, len(other) // 2])) :]
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(0, 64))]
        elif kind == "zero":
            data[at : at + 8] = bytes(len(data[at : at + 8]))
    return bytes(data)


def assert_whole_or_refused(data: bytes) -> None:
    """What begins with a record of the architecture is loaded, whatever else changes nothing."""
    next(CASES)
    begins = [seed for seed in (0, 1) if data.startswith(RECORDS[seed])]
    equals = [seed for seed in begins if data == RECORDS[seed]]
    for read, fits in ((TARGET.deserialize, equals), (from_stream, begins)):
        try:
            read(data)
        except CheckpointError:
            assert not fits and everything(TARGET) == BEFORE
        else:
            assert fits and weights(TARGET) == weights(tiny(fits[0]))
            TARGET.load_state_dict(RESTORE)


def from_stream(data: bytes) -> None:
    TARGET.load_state(io.BytesIO(data))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(damaged())
def test_damaged_records(data: bytes) -> None:
    assert_whole_or_refused(data)


@pytest.mark.slow
def test_ten_thousand_damaged_records(capsys: pytest.CaptureFixture[str]) -> None:
    start = next(CASES)

    @settings(max_examples=12_000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged())
    def run(data: bytes) -> None:
        assert_whole_or_refused(data)

    run()
    ran = next(CASES) - start - 1
    with capsys.disabled():
        print(f"\n{ran} damaged records")
    assert ran >= 10_000
