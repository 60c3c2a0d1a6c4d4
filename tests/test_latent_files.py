"""Latents on disk: what is written is read, by anyone; what is damaged is one clear line."""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import awake
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from temporal_vae import (
    LatentDistribution,
    LatentFile,
    LatentFileError,
    LatentInfo,
    ModelRecord,
    TemporalVAE,
    read_latents,
    write_latents,
)
from temporal_vae.latents import LatentWriter, latent_statistics, weights_sha256
from temporal_vae.latents.header import LATER_FIELDS

RECORD = ModelRecord(
    name="some", downsample_factor=4, scale_factor=0.5, shift_factor=0.25,
    encoder_sha256="a" * 64, decoder_sha256="b" * 64,
)  # fmt: skip
RECORD_2 = ModelRecord(
    name="some", downsample_factor=4, frames_per_latent=4, latent_mean=(0.5, -0.25, 0.0, 1.0),
    latent_std=(2.0, 0.5, 1.0, 1.5),
)  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def posterior(
    frames: int = 5, channels: int = 4, rows: int = 3, columns: int = 2
) -> LatentDistribution:
    generator = torch.Generator().manual_seed(frames)
    shape = (1, channels, frames, rows, columns)
    mean, log_variance = (torch.randn(shape, generator=generator) for _ in range(2))
    return LatentDistribution(mean, log_variance - 3)


# What is written is read ---------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    frames=st.integers(1, 150),
    channels=st.integers(1, 5),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from(DTYPES),
    moments=st.booleans(),
    gaps=st.lists(st.integers(1, 3), min_size=150, max_size=150) | st.none(),
    data=st.data(),
)
def test_a_file_gives_back_what_was_written(
    frames: int,
    channels: int,
    cells: tuple[int, int],
    dtype: torch.dtype,
    moments: bool,
    gaps: list[int] | None,
    data: st.DataObject,
) -> None:
    """Every kind and dtype, odd numbers of bytes, constant and varying rates, any range."""
    latents = posterior(frames, channels, *cells)
    stamps = [sum(gaps[:i]) for i in range(frames)] if gaps else list(range(7, 7 + 2 * frames, 2))
    size = (4 * cells[0] - data.draw(st.integers(0, 3)), 4 * cells[1] - 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        written = latents if moments else latents.mean
        info = write_latents(path, written, RECORD, size=size, timestamps=stamps, dtype=dtype)
        start = data.draw(st.integers(0, frames - 1))
        count = data.draw(st.integers(1, frames - start))
        back, read = read_latents(path, start, count)
        assert read == info and (info.height, info.width) == size and info.frames == frames
        expected = latents.mean[:, :, start : start + count].to(dtype)
        assert torch.equal(back.to(dtype), expected)
        assert back.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        plain = load_file(path)  # any reader of safetensors
        with LatentFile(path) as file:
            assert file.timestamps() == stamps
            assert file.timestamps(start, count) == stamps[start : start + count]
            assert torch.equal(file.read()[0].transpose(0, 1), plain[info.kind])
        if info.step is None:
            assert plain["timestamps"].tolist() == stamps
            assert (path.stat().st_size - 8 * frames) % 8 == 0  # where they can be mapped
        else:
            assert [info.start + i * info.step for i in range(frames)] == stamps


def test_timestamps_lie_where_they_can_be_mapped(tmp_path: Path) -> None:
    path, stamps = tmp_path / "a.safetensors", [5, 6, 8]
    numbers = torch.zeros(1, 1, 3, 1, 1, dtype=torch.bfloat16)  # 6 bytes
    info = write_latents(path, numbers, ModelRecord(), timestamps=stamps)
    assert (info.start, info.step) == (0, None), "they are listed"
    plain = load_file(path)
    assert plain["alignment"].shape == (2,) and plain["timestamps"].tolist() == stamps
    assert path.stat().st_size % 8 == 0


def test_every_field_is_kept(tmp_path: Path) -> None:
    info = LatentInfo(
        kind="sample", dtype=torch.float16, frames=1, channels=4, rows=3, columns=2, height=11,
        width=8, padding_bottom=1, scaled=True, scale_factor=0.3461, shift_factor=-1 / 3,
        fps=Fraction(30000, 1001), time_base=Fraction(1, 90000), start=5, step=1,
        sample_aspect_ratio=Fraction(64, 45), clip_frames=14, seed=2**63 - 1, bit_depth=10,
        frames_per_latent=4,
        model="ein Modell é",
        encoder_sha256="0" * 64, decoder_sha256="1" * 64, colour=(("matrix", "bt709"),),
        source="é\ud800.mp4".encode(errors="replace").decode(), source_sha256="2" * 64,
        options='{"dtype": "float32"}', library="x",
    )  # fmt: skip
    defaults = LatentInfo(kind="moments", dtype=torch.float32, frames=1, channels=4, rows=3,
                          columns=2, height=12, width=8)  # fmt: skip
    same = {f.name for f in fields(info) if getattr(info, f.name) == getattr(defaults, f.name)}
    assert same == {"frames", "channels", "rows", "columns", "step", "width", "padding_right",
                    "latent_mean", "latent_std"}  # fmt: skip
    path = tmp_path / "a.safetensors"
    each = replace(info, scale_factor=None, shift_factor=None, latent_mean=(-1 / 3, 0.0, 1e-9, 4.5),
                   latent_std=(2 / 3, 1.0, 3e5, 1e-7))  # fmt: skip
    for one in (info, replace(info, frames_per_latent=1), each):
        with LatentWriter(path, one) as writer:
            writer.write(torch.zeros(1, 4, 1, 3, 2), [5])
            writer.finish(source_sha256="3" * 64)
        with LatentFile(path) as file:
            assert file.info == replace(one, source_sha256="3" * 64)


def test_bfloat16_takes_little_more_than_its_numbers(tmp_path: Path) -> None:
    """Two seconds of 256x144: the header counts; the numbers themselves are two bytes each."""
    latents = posterior(48, 4, 18, 32)
    for stamps in (None, [i * i for i in range(48)]):
        path = tmp_path / "a.safetensors"
        write_latents(
            path, latents, RECORD, dtype=torch.bfloat16, timestamps=stamps, overwrite=True
        )
        assert path.stat().st_size <= 1.02 * 48 * 8 * 18 * 32 * 2


def test_the_writer_is_read_by_five_lines() -> None:
    """The example of docs/formats.md, on a file of moments and on one of samples."""
    text = (Path(__file__).parent.parent / "docs/formats.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len([line for line in code.splitlines() if line]) == 5 and "temporal_vae" not in code
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.safetensors"
        for latents in (posterior(), posterior().mean):
            for scaled in (False, True):
                write_latents(path, latents, RECORD, scaled=scaled, overwrite=True)
                names: dict[str, Any] = {}
                here = os.getcwd()
                os.chdir(folder)
                try:
                    exec(compile(code, "formats.md", "exec"), names)
                finally:
                    os.chdir(here)
                expected, _ = read_latents(path, scaled=scaled)
                got = names["latents"].transpose(0, 1).unsqueeze(0)
                torch.testing.assert_close(got, expected)


def test_the_documented_fields_are_the_stored_ones(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs/formats.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", text.split("### Metadata")[1], re.M))
    unstored = {"channels", "rows", "columns", "colour"}  # shape and colour_* say these
    own = {field.name for field in fields(LatentInfo)} - unstored
    assert documented == own | {"format", "format_version", "colour_NAME"}


# Version 1 -----------------------------------------------------------------------------------

HASHES = f'"encoder_sha256":"{"a" * 64}","decoder_sha256":"{"b" * 64}"'
VERSION_1 = {
    "moments": (
        976,
        '{"__metadata__":{"format":"temporal_vae.latents","format_version":"1","kind":"moments",'
        '"dtype":"bfloat16","frames":"3","height":"3","width":"8","padding_bottom":"1",'
        '"padding_right":"0","scaled":"false","scale_factor":"0.5","shift_factor":"0.25",'
        '"fps":"30000/1001","time_base":"1001/30000","start":"0","step":"1","clip_frames":"2",'
        f'"bit_depth":"10","model":"some",{HASHES},"source":"in.mp4","options":"{{}}",'
        '"library":"temporal-video-vae 0.1.0","colour_matrix":"1"},'
        '"moments":{"dtype":"BF16","shape":[3,4,1,2],"data_offsets":[0,48]}}',
        "0000003e403f603f008000be40bf60bf803ec03e803f903f80bec0be80bf90bf003f203fa03fb03f00bf20bf"
        "a0bfb0bf",
    ),
    "sample": (
        880,
        '{"__metadata__":{"format":"temporal_vae.latents","format_version":"1","kind":"sample",'
        '"dtype":"float16","frames":"3","height":"4","width":"8","padding_bottom":"0",'
        '"padding_right":"0","scaled":"true","scale_factor":"0.5","shift_factor":"0.25",'
        f'"fps":"25/1","time_base":"1/1000","start":"0","seed":"3","model":"some",{HASHES},'
        '"library":"temporal-video-vae 0.1.0"},'
        '"sample":{"dtype":"F16","shape":[3,2,1,2],"data_offsets":[0,24]},'
        '"timestamps":{"dtype":"I64","shape":[3],"data_offsets":[24,48]}}',
        "00000030003a003b00340036003c803c00380039003d803d"
        "000000000000000028000000000000006100000000000000",
    ),
}
"""Files of version 1 as they were written before there was another: header and numbers."""


@pytest.mark.parametrize("name", VERSION_1)
def test_files_of_version_1_are_read_and_written_as_ever(tmp_path: Path, name: str) -> None:
    length, header, numbers = VERSION_1[name]
    old = length.to_bytes(8, "little") + header.encode().ljust(length) + bytes.fromhex(numbers)
    path, latents = tmp_path / "old.safetensors", torch.arange(12.0).reshape(1, 2, 3, 1, 2) / 8
    path.write_bytes(old)
    read, info = read_latents(path)
    own: dict[str, Any] = {}
    stored: Tensor | LatentDistribution = latents
    if name == "moments":
        stored, dtype, size = LatentDistribution(latents, -latents), torch.bfloat16, (3, 8)
        own = {"fps": Fraction(30000, 1001), "colour": (("matrix", "1"),), "source": "in.mp4",
               "clip_frames": 2, "options": "{}", "bit_depth": 10}  # fmt: skip
        assert torch.equal(read, latents) and (info.height, info.padding_bottom) == (3, 1)
        with LatentFile(path) as file:
            assert torch.equal(file.moments().log_variance, -latents)
            assert file.timestamps() == [0, 1, 2] and list(file.pieces(2)) == [(0, 2), (2, 1)]
    else:
        dtype, size = torch.float16, (4, 8)
        own = {"timestamps": [0, 40, 97], "time_base": Fraction(1, 1000), "seed": 3, "scaled": True}
        assert torch.equal(read, latents / 0.5 + 0.25)
        with LatentFile(path) as file:
            assert file.timestamps() == [0, 40, 97] and file.timestamps(1, 1) == [40]
    assert (info.frames, info.latent_frames, info.frames_per_latent) == (3, 3, 1)
    assert (info.scale_factor, info.shift_factor, info.latent_mean) == (0.5, 0.25, None)
    new = tmp_path / "new.safetensors"
    assert write_latents(new, stored, RECORD, size=size, dtype=dtype, **own) == info
    assert new.read_bytes() == old

    def later(content: dict[str, Any]) -> None:
        content["__metadata__"] |= {"frames_per_latent": "4", "latent_std": "x", "latent_mean": ""}

    assert read_latents(rewritten(path, later))[1] == info, "unknown to that version"


# Scaled or not -------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_nothing_is_scaled_twice(tmp_path: Path, moments: bool, scaled: bool) -> None:
    """Asked for scaled or unscaled, a file of either gives what the model's own functions give."""
    vae = awake(torch.float64, latent_scale_factor=0.3, latent_shift_factor=0.7)
    record, path = vae.latent_record(), tmp_path / "a.safetensors"
    mean, log_variance = (x.double() for x in posterior())
    stored: Tensor | LatentDistribution = vae.scale_latent(mean) if scaled else mean
    if moments:
        shift = 2 * math.log(0.3) if scaled else 0
        stored = LatentDistribution(torch.as_tensor(stored), log_variance + shift)
    write_latents(path, stored, record, scaled=scaled)
    torch.testing.assert_close(read_latents(path)[0], mean)
    torch.testing.assert_close(read_latents(path, scaled=True)[0], vae.scale_latent(mean))
    as_it_is, info = read_latents(path, scaled=scaled)
    assert info.scaled == scaled
    assert torch.equal(as_it_is, stored.mean if isinstance(stored, LatentDistribution) else stored)
    if moments:
        drawn = [
            read_latents(path, sample_mode=True, generator=seeded(3), scaled=asked)[0]
            for asked in (False, True)
        ]
        torch.testing.assert_close(vae.scale_latent(drawn[0]), drawn[1])
        expected = LatentDistribution(mean, log_variance).sample(seeded(3))
        torch.testing.assert_close(drawn[0], expected)
        with LatentFile(path) as file:
            torch.testing.assert_close(file.moments().log_variance, log_variance)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_narrow_file_is_unscaled_in_float32(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", ModelRecord(scale_factor=0.18215, shift_factor=0.3)
    stored = posterior().mean.bfloat16()
    write_latents(path, stored, model, scaled=True)
    torch.testing.assert_close(read_latents(path)[0], stored.float() / 0.18215 + 0.3)


def test_a_sample_is_not_drawn_from(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior().mean, RECORD)
    with LatentFile(path) as file:
        for ask in (file.moments, lambda: file.latents(generator=seeded(0))):
            with pytest.raises(LatentFileError, match="holds a sample"):
                ask()


def test_ranges_are_drawn_in_the_order_of_time(tmp_path: Path) -> None:
    """A file read in pieces by one generator is drawn as a whole one is."""
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(9), RECORD)
    whole, _ = read_latents(path, sample_mode=True, generator=seeded(1))
    generator = seeded(1)
    with LatentFile(path) as file:
        parts = [file.latents(start, count, sample_mode=True, generator=generator)
                 for start, count in file.pieces(4)]  # fmt: skip
    assert [part.shape[2] for part in parts] == [4, 4, 1]
    assert torch.equal(torch.cat(parts, 2), whole)


# What cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": torch.zeros(2, 4, 5, 3, 2)}, "one clip"),
        ({"latents": torch.zeros(1, 4, 3)}, "one clip"),
        ({"latents": torch.zeros(1, 4, 0, 3, 2)}, "no frames"),
        ({"model": ModelRecord(latent_mean=(0, 0, 0, 0), latent_std=(1, 1, 0, 1))}, "above 0"),
        ({"latents": torch.full((1, 4, 5, 3, 2), math.nan)}, "NaN"),
        ({"latents": torch.full((1, 4, 5, 3, 2), 1e6), "dtype": torch.float16}, "overflow"),
        ({"latents": torch.zeros(1, 4, 5, 3, 2, dtype=torch.int64)}, "dtype"),
        ({"timestamps": [0, 1, 2]}, "5 latents along time, but 3 timestamps are those of 3"),
        ({"timestamps": range(6)}, "5 latents along time, but 6 timestamps are those of 6"),
        ({"timestamps": [0, 1, 2, 2, 3]}, "must grow"),
        ({"timestamps": [-1, 1, 2, 3, 4]}, "must grow"),
        ({"timestamps": [0, 1, 2, 3, 2**63]}, "must grow"),
        ({"size": (13, 8)}, "padding_bottom"),
        ({"size": (8, 8)}, "no whole number"),
        ({"fps": -1}, "fps"),
        ({"fps": 0}, "fps must be above 0"),
        ({"fps": math.nan}, "fps must be above 0"),
        ({"time_base": 0.04}, "time_base must be a Fraction"),
        ({"sample_aspect_ratio": 1}, "sample_aspect_ratio must be a Fraction"),
        ({"scaled": 1}, "scaled must be True or False"),
        ({"colour": (("matrix", 1),)}, "colour tag matrix must be text"),
        ({"source": Path("a.mp4")}, "source must be text"),
        ({"model": ModelRecord(name="\udcff")}, "model must be text that UTF-8 can hold"),
        ({"source_sha256": "xyz"}, "source_sha256"),
        ({"clip_frames": 0}, "clip_frames"),
        ({"path": "a.pt"}, "end in .safetensors"),
        ({"path": "-"}, "written last"),
        ({"path": "/dev/null"}, "written last"),
        ({"model": ModelRecord(scale_factor=0.0)}, "scale_factor"),
        ({"model": ModelRecord(scale_factor=math.inf)}, "scale_factor"),
    ],
    ids=str,
)
def test_what_cannot_be_written(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"path": "a.safetensors", "latents": posterior(), "model": RECORD}
    arguments |= change
    path, latents, model = (arguments.pop(name) for name in ("path", "latents", "model"))
    with pytest.raises(LatentFileError, match=words):
        write_latents(tmp_path / path if path[0] == "a" else path, latents, model, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_if_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(), RECORD)
    before = path.read_bytes()
    with pytest.raises(LatentFileError, match="exists"):
        write_latents(path, posterior(3), RECORD)
    assert path.read_bytes() == before
    write_latents(path, posterior(3), RECORD, overwrite=True)
    assert read_latents(path)[1].frames == 3


def test_a_pipe_is_refused() -> None:
    read, write = os.pipe()
    info = LatentInfo(kind="sample", dtype=torch.float32, frames=1, channels=1, rows=1, columns=1,
                      height=8, width=8)  # fmt: skip
    try:
        with pytest.raises(LatentFileError, match="is a pipe"):
            LatentWriter(f"/proc/self/fd/{write}", info)
    finally:
        os.close(read)
        os.close(write)


CHILD = """
import resource, sys, torch
from pathlib import Path
from temporal_vae import LatentFileError, ModelRecord, write_latents
path, endless = Path(sys.argv[1]), resource.RLIM_INFINITY
for limit in (100, 10_000, 14_745_600, endless):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, endless))
    try:
        write_latents(path, torch.zeros(1, 4, 900, 32, 32), ModelRecord(), overwrite=True)
    except LatentFileError as error:
        print(error, path.read_text(), len(list(path.parent.iterdir())))
"""


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """In the header, among the frames, at the last bytes; without a limit it succeeds."""
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True
    )
    said = child.stdout.splitlines()
    assert len(said) == 3 and list(tmp_path.iterdir()) == [path]
    for line in said:
        assert line.startswith("cannot write latents: File too large") and line.endswith("old 1")
    assert read_latents(path)[1].frames == 900


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/a.safetensors")  # root may write anywhere else
    else:
        target = tmp_path / "locked" / "a.safetensors"
        target.parent.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="cannot write in"):
        write_latents(target, posterior(), RECORD)


# Damage --------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The file with another header, of the same length where it fits."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    change(content)
    text = json.dumps(content, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


WRONG = {
    "format": ["", "pt"],
    "format_version": ["2", "one"],
    "kind": ["sample", "mean", "timestamps", ""],
    "dtype": ["float16", "int8", "F32"],
    "frames": ["4", "0", "-5", "5.0", "99999999999999999999", "x", "\u0665"],
    "height": ["13", "7", "0", "-1", "1e3", "9999999999"],
    "width": ["9", "4", "0", "x"],
    "padding_bottom": ["1", "4", "-1", "x"],
    "padding_right": ["1", "5", "-1"],
    "scaled": ["yes", "True", "1", ""],
    "scale_factor": ["0", "-1", "nan", "inf", "1e999", "x"],
    "shift_factor": ["nan", "-inf", "x"],
    "fps": ["0/1", "25", "25/0", "-1/2", "99999999999/1", "9999999999/1", "x"],
    "time_base": ["0/1", "1/0", "1/9999999999", "1.5"],
    "start": ["-1", "9223372036854775807", "x"],
    "step": ["0", "-1", "9223372036854775807", "x"],
    "sample_aspect_ratio": ["0/1", "1:1", "1/0"],
    "clip_frames": ["0", "-2", "all"],
    "seed": ["-1", "9999999999999999999", "x"],
    "bit_depth": ["0", "64", "8.0"],
    "encoder_sha256": ["", "g" * 64, "a" * 63],
    "decoder_sha256": ["A" * 64],
    "source_sha256": ["0x" + "0" * 62],
    "colour_MATRIX": ["bt709"],
}


WRONG_2 = {
    "format_version": ["1", "3"],
    "frames": ["18", "13", "21", "0"],
    "frames_per_latent": ["0", "-4", "1", "2", "5", "1025", "4.0", "99999999999999999999", "x", ""],
    "scale_factor": ["0.5"],
    "shift_factor": ["0.0"],
    "latent_mean": ["", "0", "0,0,0", "0,0,0,0,0", "0,0,0,nan", "0,0,inf,0", "0 0 0 0", "0,0,,0"],
    "latent_std": ["", "1", "1,1,1", "1,1,1,0", "1,-1,1,1", "1,1,1,1e999", "x,1,1,1", "None"],
    "clip_frames": ["1", "4", "0"],
}
"""In a file of version 2, of 5 latents of four frames each, 16 of which are of the video."""


def test_no_field_is_left_out() -> None:
    """All but those of the shape, and of free text."""
    free = {"model", "source", "options", "library", "channels", "rows", "columns", "colour"}
    assert {f.name for f in fields(LatentInfo)} - free == {*WRONG, *WRONG_2} - {
        "format", "format_version", "colour_MATRIX"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_every_wrong_field_is_one_line(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(), RECORD)
    rewritten(path, lambda content: content["__metadata__"].update({name: value}))
    assert_refused(path)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_2.items() for value in values]
)
def test_every_wrong_field_of_several_frames_a_latent_is_one_line(
    tmp_path: Path, name: str, value: str
) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(), RECORD_2, timestamps=range(16))
    assert read_latents(path)[1].padding_frames == 1
    rewritten(path, lambda content: content["__metadata__"].update({name: value}))
    assert_refused(path)


@pytest.mark.parametrize("name", ["frames_per_latent", "latent_mean", "latent_std"])
def test_a_missing_field_of_several_frames_a_latent_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(), RECORD_2)
    rewritten(path, lambda content: content["__metadata__"].pop(name))
    assert_refused(path)


@pytest.mark.parametrize("count", [0, 5, 13, 15, 16, 18])
def test_timestamps_are_of_frames_not_of_latents(tmp_path: Path, count: int) -> None:
    """As many as the video has frames: 14 to 17 are 5 latents."""
    path, stamps = tmp_path / "a.safetensors", [i * i for i in range(17)]
    write_latents(path, posterior(), RECORD_2, timestamps=stamps)
    place = {"dtype": "I64", "shape": [count], "data_offsets": [960, 960 + 8 * count]}
    fitting = count == 16

    def shorten(content: dict[str, Any]) -> None:
        content["timestamps"] = place
        if fitting:
            content["__metadata__"]["frames"] = "16"

    rewritten(path, shorten)
    path.write_bytes(path.read_bytes()[: -8 * (17 - count) or None])
    if fitting:
        with LatentFile(path) as file:
            assert file.timestamps() == stamps[:16] and file.info.padding_frames == 1
    else:
        assert_refused(path)


def assert_refused(path: Path) -> str:
    with pytest.raises(LatentFileError) as caught:
        read_latents(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 600, message
    return message


@pytest.mark.parametrize("name", sorted({f.name for f in fields(LatentInfo)} | {"format"}))
def test_a_missing_field_is_one_line(tmp_path: Path, name: str) -> None:
    """Of those that a file must have; the others may be unknown."""
    path = tmp_path / "a.safetensors"
    info = write_latents(path, posterior(), RECORD)
    optional = {"step", "sample_aspect_ratio", "clip_frames", "seed", "model", "encoder_sha256",
                "decoder_sha256", "source", "source_sha256", "options", "library",
                "bit_depth"}  # fmt: skip
    rewritten(path, lambda content: content["__metadata__"].pop(name, None))
    unstored = {"channels", "rows", "columns", "colour", *LATER_FIELDS}
    if name == "step":  # then the timestamps must be listed
        assert "timestamps" in assert_refused(path)
    elif name in optional | unstored:
        assert read_latents(path)[1] == (
            info if name not in optional else replace(info, **{name: None})  # type: ignore[arg-type]
        )
    else:
        assert_refused(path)


HUGE = 2**62
TENSORS: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("no tensor", lambda c: c.pop("moments")),
    ("another name", lambda c: c.update(latents=c.pop("moments"))),
    ("one more", lambda c: c.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})),
    ("a list", lambda c: c.update(moments=[])),
    ("no type", lambda c: c["moments"].pop("dtype")),
    ("whole numbers", lambda c: c["moments"].update(dtype="I32")),
    ("another type", lambda c: c["moments"].update(dtype="BF16")),
    ("a type that is none", lambda c: c["moments"].update(dtype=["F32"])),
    ("flat", lambda c: c["moments"].update(shape=[240])),
    ("negative", lambda c: c["moments"].update(shape=[-5, -8, 3, 2])),
    ("empty", lambda c: c["moments"].update(shape=[5, 8, 0, 2])),
    ("odd", lambda c: c["moments"].update(shape=[5, 7, 3, 2])),
    ("transposed", lambda c: c["moments"].update(shape=[8, 5, 3, 2])),
    ("huge", lambda c: c["moments"].update(shape=[HUGE, 8, 3, 2])),
    ("wide", lambda c: c["moments"].update(shape=[5, 8, HUGE, 2])),
    ("overflowing", lambda c: c["moments"].update(shape=[5, 2**32, 2**32, 2**32])),
    ("true", lambda c: c["moments"].update(shape=[5, 8, 3, True])),
    ("fraction", lambda c: c["moments"].update(shape=[5.0, 8, 3, 2])),
    ("shifted", lambda c: c["moments"].update(data_offsets=[8, 968])),
    ("short", lambda c: c["moments"].update(data_offsets=[0, 952])),
    ("backwards", lambda c: c["moments"].update(data_offsets=[960, 0])),
    ("numbers", lambda c: c["__metadata__"].update(frames=5)),
    ("no metadata", lambda c: c.pop("__metadata__")),
    ("metadata a list", lambda c: c.update(__metadata__=[])),
]
VARYING: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("unlisted", lambda c: c.pop("timestamps")),
    ("floats", lambda c: c["timestamps"].update(dtype="F64")),
    ("fewer", lambda c: c["timestamps"].update(shape=[4])),
    ("elsewhere", lambda c: c["timestamps"].update(data_offsets=[0, 40])),
    ("both", lambda c: c["__metadata__"].update(step="1")),
]


@pytest.mark.parametrize("change", [w[1] for w in TENSORS], ids=[w[0] for w in TENSORS])
def test_a_wrong_tensor_is_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(), RECORD)
    rewritten(path, lambda content: (change(content), None)[1])
    assert_refused(path)


@pytest.mark.parametrize("change", [w[1] for w in VARYING], ids=[w[0] for w in VARYING])
def test_wrong_timestamps_are_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(), RECORD, timestamps=[0, 1, 4, 9, 16])
    rewritten(path, lambda content: (change(content), None)[1])
    assert_refused(path)


@pytest.mark.parametrize("stamps", [[0, 1, 4, 4, 16], [-1, 1, 4, 9, 16], [0, 1, 4, 9, 2**63 - 1]])
def test_timestamps_that_do_not_grow_are_one_line(tmp_path: Path, stamps: list[int]) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(), RECORD, timestamps=[0, 1, 4, 9, 16])
    data = path.read_bytes()
    path.write_bytes(data[:-40] + b"".join(s.to_bytes(8, "little", signed=True) for s in stamps))
    with LatentFile(path) as file, pytest.raises(LatentFileError, match="do not grow"):
        file.timestamps()
    with LatentFile(path) as file, pytest.raises(LatentFileError, match="do not grow"):
        for index in range(5):  # from one range to the next
            file.timestamps(index, 1)


def test_a_field_that_stands_twice_is_one_line(tmp_path: Path) -> None:
    """Readers differ on which of both they take."""
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(), RECORD)
    data, field = path.read_bytes(), b'"kind":"moments"'
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip().replace(field, field + b"," + field).ljust(length)
    path.write_bytes(data[:8] + text + data[8 + length :])
    assert "twice" in assert_refused(path)


FILES: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("short", b"\0" * 7),
    ("no header", b"\0" * 100),
    ("a header too long", (2**63).to_bytes(8, "little") + b"{}"),
    ("a header of 2 MiB", (2**21).to_bytes(8, "little") + b" " * 2**21),
    ("no json", (100).to_bytes(8, "little") + b"x" * 100),
    ("no text", (4).to_bytes(8, "little") + b"\xff\xfe{}"),
    ("a list", (2).to_bytes(8, "little") + b"[]"),
    ("nothing", (2).to_bytes(8, "little") + b"{}"),
    ("deep", (60000).to_bytes(8, "little") + b"[" * 60000),
    ("long number", (60000).to_bytes(8, "little") + b"9" * 60000),
    ("twice", (22).to_bytes(8, "little") + b'{"moments":1,"moments":2}'[:22]),
]


@pytest.mark.parametrize("data", [f[1] for f in FILES], ids=[f[0] for f in FILES])
def test_what_is_no_file_of_latents(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert_refused(path)


def test_other_things_are_refused(tmp_path: Path) -> None:
    save_file({"moments": torch.zeros(1, 8, 1, 1)}, tmp_path / "plain.safetensors")
    assert "other tensors" in assert_refused(tmp_path / "plain.safetensors")
    assert "no such file" in assert_refused(tmp_path / "missing.safetensors")
    assert "a folder" in assert_refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in assert_refused(tmp_path / "pipe")


def test_a_file_that_is_cut_or_longer(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(), RECORD, timestamps=[0, 1, 4, 9, 16])
    data = path.read_bytes()
    for length in (*range(0, len(data), 37), len(data) - 1):
        path.write_bytes(data[:length])
        assert_refused(path)
    path.write_bytes(data + b"\0")
    assert "followed by" in assert_refused(path)
    path.write_bytes(data[:-48] + torch.full((2,), math.nan).numpy().tobytes() + data[-40:])
    assert "NaN" in assert_refused(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(400), RECORD)  # more than a buffer holds
    with LatentFile(path) as file:
        os.truncate(path, path.stat().st_size - 10)
        with pytest.raises(LatentFileError, match="became shorter"):
            file.read()


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 0), (5, 1), (3, 3), (0, 2**62), (0, -1)])
def test_ranges_outside_the_file(tmp_path: Path, start: int, count: int) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(), RECORD)
    with pytest.raises(LatentFileError, match="frames"):
        read_latents(path, start, count)


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Flips, cuts, doubled and swapped pieces, numbers replaced; most of them in the header."""
    rng = random.Random(seed)
    header = int.from_bytes(data[:8], "little") + 8
    digits = [m.span() for m in re.finditer(rb"\d+", data[8:header])]
    for _ in range(count):
        new = bytearray(data)
        kind, at = rng.randrange(5), rng.randrange(header if rng.random() < 0.8 else len(data))
        if kind == 0:
            for _ in range(rng.randrange(1, 4)):
                new[rng.randrange(header)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del new[at:]
        elif kind == 2:
            del new[at : at + rng.randrange(1, 20)]
        elif kind == 3:
            end = at + rng.randrange(1, 60)
            new[end:end] = new[at:end]
        else:
            first, last = rng.choice(digits)
            number = str(rng.choice([0, 1, 7, 2**31, 2**63, 2**64, 10**30, -1])).encode()
            new[8 + first : 8 + last] = number
            if rng.random() < 0.7:
                new[:8] = (header - 8 + len(number) - last + first).to_bytes(8, "little")
        yield bytes(new)


def assert_mutations_are_refused_or_read(tmp_path: Path, count: int, seed: int) -> None:
    """Each gives latents of the stated shape, or one line; never anything else, or much memory."""
    path = tmp_path / "a.safetensors"
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for model, frames in ((RECORD, 5), (RECORD_2, 15)):
        stamps = [i * i for i in range(frames)]
        write_latents(path, posterior(), model, timestamps=stamps, seed=3, source="x.mp4",
                      overwrite=True)  # fmt: skip
        for mutated in mutations(path.read_bytes(), count // 2, seed):
            path.write_bytes(mutated)
            try:
                with LatentFile(path) as file:
                    assert file.read().shape[2] == file.info.latent_frames
                    assert len(file.timestamps()) == file.info.frames
            except LatentFileError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 0.5 * count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_mutated_files(tmp_path: Path) -> None:
    assert_mutations_are_refused_or_read(tmp_path, 300, 0)


@pytest.mark.slow
def test_many_mutated_files(tmp_path: Path) -> None:
    assert_mutations_are_refused_or_read(tmp_path, 20_000, 1)


# Whose latents -------------------------------------------------------------------------------


def test_the_hash_is_of_the_weights_alone(tmp_path: Path) -> None:
    """Not of the dtype or layout of a file; one number more, or another structure, is another."""
    model = awake(torch.float32)
    record = model.latent_record("a")
    assert model.double().latent_record("a") == record
    model.float().save_pretrained(tmp_path)
    assert TemporalVAE.from_pretrained(tmp_path).latent_record("a") == record
    hashes = {record.encoder_sha256, record.decoder_sha256}
    assert len(hashes) == 2
    with torch.no_grad():
        model.decoder.conv_in.bias[0] += 1
    tuned = model.latent_record("a")
    assert tuned.encoder_sha256 == record.encoder_sha256
    assert tuned.decoder_sha256 != record.decoder_sha256
    with torch.no_grad():
        model.encoder.conv_in.bias[0] += 1
    assert model.latent_record().encoder_sha256 != record.encoder_sha256
    numbers, found = awake(torch.float32, temporal_attention_reach=0).state_dict(), set()
    for options in ({}, {"causal_mode": True}, {"norm_groups": 1}):
        other = awake(torch.float32, temporal_attention_reach=0, **options)
        other.load_state_dict(numbers)
        found.add(other.latent_record().encoder_sha256)
    assert len(found) == 3


def test_the_hash_is_as_documented() -> None:
    import hashlib

    weights = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3.0]], dtype=torch.bfloat16)}
    text = b"x\na 1x1\n" + b"\x00\x00\x40\x40" + b"b 2\n" + b"\x00\x00\x80\x3f\x00\x00\x00\x40"
    assert weights_sha256(weights.items(), "x") == hashlib.sha256(text).hexdigest()


# Statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_statistics_equal_their_definition(tmp_path: Path, moments: bool, scaled: bool) -> None:
    """Against a float64 sum over everything at once; far from zero, where short sums cancel."""
    paths, means, variances = [], [], []
    for index, frames in enumerate((1, 7, 20)):
        mean, log_variance = posterior(frames)
        mean = mean * torch.tensor([1, 2, 3, 4.0]).view(1, 4, 1, 1, 1) + 1000 * (1 + index)
        paths.append(tmp_path / f"{index}.safetensors")
        info = LatentInfo(kind="moments" if moments else "sample", dtype=torch.float64, frames=1,
                          channels=4, rows=3, columns=2, height=12, width=8, scale_factor=0.5,
                          shift_factor=0.25)  # fmt: skip
        stored = torch.cat([mean, log_variance], 1) if moments else mean
        stored = info.rescale(stored.double(), scaled)
        with LatentWriter(paths[-1], replace(info, scaled=scaled)) as writer:
            writer.write(stored, range(frames))
            writer.finish()
        means.append(mean[0].double().flatten(1))
        variances.append(log_variance[0].double().exp().flatten(1))
    found = latent_statistics(paths)
    all_means, all_variances = torch.cat(means, 1), torch.cat(variances, 1)
    variance = all_means.var(1, correction=0) + (all_variances.mean(1) if moments else 0)
    overall = all_means.var(correction=0) + (all_variances.mean() if moments else 0)
    assert (found.files, found.frames, found.cells) == (3, 28, 28 * 6)
    torch.testing.assert_close(
        torch.tensor(found.mean).double(), all_means.mean(1), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(torch.tensor(found.std).double(), variance.sqrt(), rtol=1e-6, atol=0)
    assert found.overall_std == pytest.approx(float(overall.sqrt()), rel=1e-9)
    assert found.scale_factor == pytest.approx(1 / found.overall_std)
    assert found.shift_factor == pytest.approx(float(all_means.mean()), rel=1e-12)


def test_the_factor_that_follows_brings_samples_to_unit_deviation(tmp_path: Path) -> None:
    mean, log_variance = posterior(400)
    path = tmp_path / "a.safetensors"
    write_latents(path, LatentDistribution(3 * mean + 2, log_variance + 2), RECORD)
    found = latent_statistics([path])
    drawn, _ = read_latents(path, sample_mode=True, generator=seeded(0))
    scaled = (drawn - found.shift_factor) * found.scale_factor
    assert abs(float(scaled.std()) - 1) < 0.02 and abs(float(scaled.mean())) < 0.02


def test_statistics_of_two_models_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    write_latents(paths[0], posterior(), RECORD)
    write_latents(paths[1], posterior(), replace(RECORD, name="other", encoder_sha256="c" * 64))
    with pytest.raises(LatentFileError, match=r"a.safetensors is of some .*b.safetensors of other"):
        latent_statistics(paths)
    assert latent_statistics(paths, any_model=True).files == 2
    write_latents(paths[1], posterior(channels=3), RECORD, overwrite=True)
    with pytest.raises(LatentFileError, match="4 channels"):
        latent_statistics(paths)
    write_latents(paths[1], torch.ones(1, 4, 1, 1, 1), RECORD, overwrite=True)
    with pytest.raises(LatentFileError, match="the same number"):
        latent_statistics(paths[1:])
    with pytest.raises(LatentFileError, match="no files"):
        latent_statistics([])


def test_a_slice_is_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, posterior(9), RECORD)
    with safe_open(path, "pt") as file, LatentFile(path) as ours:
        part = file.get_slice("moments")[2:5]
        assert torch.equal(part.transpose(0, 1).unsqueeze(0), ours.read(2, 3))
