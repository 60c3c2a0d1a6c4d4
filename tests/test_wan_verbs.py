"""The verbs and files of latents for models of Wan's kind, which hold four frames in a latent."""

from __future__ import annotations

import json
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import awake, difference, thinned
from test_cli import COMMAND, assert_one_line_error, gone_through, times
from test_video import smooth, write
from torch import Tensor, nn

from temporal_vae import (
    LatentFile,
    LatentFileError,
    ModelRecord,
    TemporalVAE,
    WanVAEConfig,
    read_latents,
    write_latents,
)
from temporal_vae.convert import chunks, ends, memory
from temporal_vae.convert import decode as decoding
from temporal_vae.convert import encode as encoding
from temporal_vae.convert import reconstruct as reconstructing
from temporal_vae.latents import latent_statistics, weights_sha256
from temporal_vae.network.kernels import work
from temporal_vae.video import pad_frames, read_clip, to_bytes, to_pixels
from temporal_vae.walks.budget import BudgetError
from temporal_vae.walks.tracing import LiveBytes

Said = subprocess.CompletedProcess[str]
MEAN, STD = (0.5, -0.25, 0.0, 1.0), (2.0, 0.5, 1.0, 1.5)
KINDS: dict[str, dict[str, Any]] = {
    "2.1": {},
    "2.2": {"decoder_base_channels": 16, "level_shortcuts": True, "patch_size": 2},
}
kind = pytest.mark.parametrize("name", KINDS)


def awaken(module: nn.Module) -> None:
    """Give every parameter a value that matters, and pixels that are not clipped for the most."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "gamma" in name:
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(noise * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
            if "decoder.conv_out" in name:
                p.mul_(0.3)


MODELS: dict[str, TemporalVAE] = {}


def wan(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> TemporalVAE:
    """A small awake model of this kind: 4 frames of 8x8 pixels, or of 16x16, in 4 channels.

    In float64 any way to cut a clip gives the same 8-bit pixels; in float32 one of some thousands
    is rounded otherwise.
    """
    key = f"{name} {dtype} {options}"
    if key not in MODELS:
        small = {"base_channels": 8, "latent_channels": 4, "blocks_per_level": 1}
        scale: dict[str, Any] = {"latent_mean": MEAN, "latent_std": STD}
        config = WanVAEConfig(**(scale | small | KINDS[name] | options))
        MODELS[key] = TemporalVAE.from_config(config)
        awaken(MODELS[key])
        MODELS[key].to(dtype)
    return MODELS[key]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    wan("2.1", torch.float32).save_pretrained(tmp_path / "wan")
    return tmp_path / "wan"


def varied(frames: int) -> list[int]:
    """Timestamps at a rate that varies, in thousandths."""
    return [7 + 40 * i + 9 * (i % 3) for i in range(frames)]


def clip_file(path: Path, frames: int, size: tuple[int, int] = (17, 31)) -> Path:
    return write(path, smooth(frames, *size), varied(frames), Fraction(1, 1000))


def padded(frames: Any, model: TemporalVAE) -> Tensor:
    """Frames as the clip that the model takes: the last one repeated, and rows and columns."""
    missing = -(len(frames) - 1) % model.frames_per_latent
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, 0)])
    return to_pixels(pad_frames(frames, model.downsample_factor)).to(model.dtype)


@torch.no_grad()
def in_memory(frames: Any, model: TemporalVAE) -> Any:
    """What the library gives for frames, as 8-bit frames of the same number and size."""
    pixels = to_bytes(model.decode(model.encode(padded(frames, model), sample_mode=False)))
    return pixels[: len(frames), : frames.shape[1], : frames.shape[2]]


def there_and_back(
    source: Path,
    model: TemporalVAE,
    how: encoding.Encoding | None = None,
    **options: Any,
) -> tuple[Path, Any]:
    """`source` encoded to a file of latents beside it, and the frames that this decodes to."""
    latents, target = source.with_suffix(".safetensors"), source.with_name("decoded.mkv")
    record = model.latent_record("small")
    encoding.encode(source, latents, model, record, how, overwrite=True)
    decoding.decode(latents, target, model, record, overwrite=True, **options)
    return latents, read_clip(target)


# Law 4, and law 2 through files --------------------------------------------------------------


def assert_kept(source: Path, model: TemporalVAE) -> None:
    """Frames, size and timestamps; the file's latents and both ways are the library's numbers."""
    target, before = source.with_name("out.mkv"), read_clip(source)
    reconstructing.reconstruct(source, target, model)
    assert read_clip(target).shape == before.shape
    assert times(target) == times(source) == pytest.approx([t / 1000 for t in varied(len(before))])
    expected = in_memory(before, model)
    assert np.array_equal(read_clip(target), expected), "the picture moved"
    latents, decoded = there_and_back(source, model)
    assert np.array_equal(decoded, expected), "the picture moved on its way through a file"
    assert times(source.with_name("decoded.mkv")) == times(source)
    with torch.no_grad():
        whole = model.encode_with_distribution(padded(before, model))
    with LatentFile(latents) as file:
        found, info = file.moments(), file.info
        assert file.timestamps() == varied(len(before))
    assert difference(found.mean, whole.mean) < 1e-12
    assert difference(found.log_variance, whole.log_variance) < 1e-12
    assert (info.frames, info.latent_frames) == (len(before), whole.mean.shape[2])
    assert info.padding_frames == padded(before, model).shape[2] - len(before)


@pytest.mark.parametrize(("name", "frames"), thinned(2, KINDS, [1, 2, 3, 4, 5, 6, 17, 23]))
def test_any_number_of_frames_is_kept(tmp_path: Path, name: str, frames: int) -> None:
    assert_kept(clip_file(tmp_path / "in.mkv", frames), wan(name))


@pytest.mark.parametrize(
    ("downsample", "each"), [((False, False, False), 1), ((True, False, False), 2)], ids=str
)
def test_other_numbers_of_frames_in_a_latent(
    tmp_path: Path, downsample: tuple[bool, ...], each: int
) -> None:
    model = wan("2.1", temporal_downsample=downsample)
    assert model.frames_per_latent == each
    assert_kept(clip_file(tmp_path / "in.mkv", 8), model)


honest_filled = memory.PiecePlanner.filled
MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "filled up with nothing": lambda patch: patch.setattr(
        memory.PiecePlanner, "filled", lambda *its: (honest_filled(*its)[0], 0)
    ),
    "a later piece counted as the first one": lambda patch: patch.setattr(
        memory.PiecePlanner, "filled", lambda self, frames, _: honest_filled(self, frames, True)
    ),
    "a frame too many": lambda patch: patch.setattr(
        chunks.Walk, "take", lambda self, n: [self.stamps.popleft() for _ in range(n - 1)]
    ),
    "a piece that begins anew": lambda patch: patch.setattr(
        memory, "chain", lambda *_: repeat(5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_these_laws_see(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = clip_file(tmp_path / "in.mkv", 16)
    MUTATIONS[name](monkeypatch)
    with pytest.raises((AssertionError, LatentFileError, IndexError, ValueError)):
        assert_kept(source, wan("2.1"))


@kind
@pytest.mark.parametrize("whole", [0, memory.PIECE_PIXELS], ids=["streamed", "whole"])
def test_float32_is_one_picture_through_a_file(
    tmp_path: Path, name: str, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, as both go in the same pieces."""
    monkeypatch.setattr(memory, "WHOLE_PIXELS", whole)
    model, source = wan(name, torch.float32), clip_file(tmp_path / "in.mkv", 14)
    reconstructing.reconstruct(source, tmp_path / "out.mkv", model)
    _, decoded = there_and_back(source, model)
    assert np.array_equal(read_clip(tmp_path / "out.mkv"), decoded)
    apart = np.abs(in_memory(read_clip(source), model).astype(int) - decoded)
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3


@pytest.mark.parametrize(("length", "memory"), [(6, None), (6, "least"), (5, None), (1, None)])
def test_clips_are_filled_up_each(tmp_path: Path, length: int, memory: str | None) -> None:
    model, source = wan("2.1"), clip_file(tmp_path / "in.mkv", 16)
    before = read_clip(source)
    parts = [in_memory(before[start : start + length], model) for start in range(0, 16, length)]
    reconstructing.reconstruct(source, tmp_path / "out.mkv", model, length, memory=memory)
    assert np.array_equal(read_clip(tmp_path / "out.mkv"), np.concatenate(parts))
    how = encoding.Encoding(clip_frames=length, memory=memory)
    latents, decoded = there_and_back(source, model, how, memory=memory)
    assert np.array_equal(decoded, np.concatenate(parts))
    with LatentFile(latents) as file:
        assert (file.info.clip_frames, file.info.frames) == (length, 16)
        assert file.info.latent_frames == {6: 3 + 3 + 2, 5: 2 + 2 + 2 + 1, 1: 16}[length]
        assert file.info.padding_frames == {6: 3 + 3 + 1, 5: 0, 1: 0}[length]
        assert file.timestamps() == varied(16)


# Law 1: memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 14])
@kind
def test_a_budget_never_changes_the_files(tmp_path: Path, name: str, frames: int) -> None:
    model, source = wan(name), clip_file(tmp_path / "in.mkv", frames)
    expected, whole = in_memory(read_clip(source), model), None
    for budget in (None, "least", "1GiB"):
        reconstructing.reconstruct(source, tmp_path / "out.mkv", model, memory=budget)
        assert np.array_equal(read_clip(tmp_path / "out.mkv"), expected)
        how = encoding.Encoding(memory=budget)
        latents, decoded = there_and_back(source, model, how, memory=budget)
        assert np.array_equal(decoded, expected)
        stored, _ = read_latents(latents)
        whole = stored if whole is None else whole
        assert difference(stored, whole) < 1e-12


@pytest.mark.parametrize("name", ["2.1", pytest.param("2.2", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_stream_is_planned_within_its_budget(name: str) -> None:
    """All that is alive while a walk runs, and the more memory the longer the pieces."""
    model, frames, lengths = wan(name, torch.float32), smooth(22, 64, 96), []

    def planner(limit: int) -> memory.PiecePlanner:
        return memory.PiecePlanner(model, ("encode", "decode"), (64, 96), limit, None)

    with pytest.raises(BudgetError, match="below the least that a stream of 96x64") as error:
        planner(1000).pieces()
    least = error.value.least
    for limit in (least, 2 * least, 40 * least):
        plans = planner(limit)
        total = plans.pieces().total
        assert all(plan.stream for plan in plans.pieces().plans.values()) and total <= limit
        lengths.append(plans.pieces().latents)
        given, most = gone_through(plans, frames)
        assert given == 25 and most <= total, "22 frames, filled up"
        assert limit > 2 * least or most > 0.4 * total
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[-1] > 2


def test_frames_without_a_timestamp_are_not_lost_without_a_word() -> None:
    """Where a latent is not full, a few are; where more are missing, something is wrong."""
    for per_latent, spare in ((1, 0), (4, 6)):
        planner = cast(Any, SimpleNamespace(model=SimpleNamespace(frames_per_latent=per_latent)))
        walk = chunks.Walk(iter(list[Tensor]()), deque([5, 7]), planner)
        with pytest.raises(RuntimeError, match="where 2 timestamps are left"):
            walk.take(3 + spare)
        assert walk.take(2 + spare) == [5, 7]


def test_a_refusal_of_memory_names_clips_that_fit(tmp_path: Path) -> None:
    model, source = wan("2.1", torch.float32), clip_file(tmp_path / "in.mkv", 9, (80, 120))
    with pytest.raises(BudgetError, match=r"--clip-frames (1|5|17): (\d+) bytes") as error:
        reconstructing.reconstruct(source, tmp_path / "out.mkv", model, memory="100KiB")
    assert "--clip-frames 1:" in str(error.value)
    with pytest.raises(BudgetError, match="below the least that a clip of 9 frames of 120x80"):
        reconstructing.reconstruct(source, tmp_path / "out.mkv", model, 8, memory="100KiB")


@torch.no_grad()
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    model, most = wan("2.1", torch.float32), []
    record = model.latent_record()
    for frames in (30, 62):
        source = clip_file(tmp_path / f"{frames}.mkv", frames, (32, 32))
        latents = str(tmp_path / f"{frames}.safetensors")
        for verb in ("encode", "decode"):
            with LiveBytes() as alive:
                for parameter in model.parameters():
                    alive.leave_out(parameter)
                if verb == "encode":
                    encoding.encode(source, latents, model, record)
                else:
                    decoding.decode(latents, f"{latents}.mkv", model, record)
            most.append(alive.most)
    assert most[0] == most[2] > 100_000 and most[1] == most[3] > 100_000


@kind
def test_the_operations_that_are_foreseen_are_those_that_are_done(name: str) -> None:
    model, done = wan(name, torch.float32), list[int]()
    planner = memory.PiecePlanner(model, ("encode", "decode"), (32, 48), None, None)
    x = padded(smooth(33, 32, 48), model)
    with torch.no_grad(), work.told_to(done.append):
        model.decode(model.encode(x, False))
    assert 0.8 * sum(done) < 33 * planner.frame_operations() < 1.2 * sum(done)


def test_progress_counts_frames_of_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "TOLD_SECONDS", 0.0)
    seen: list[tuple[float, int | None]] = []
    source = write(tmp_path / "in.mp4", smooth(15, 32, 48))
    reconstructing.reconstruct(
        source, tmp_path / "out.mkv", wan("2.1"), None,
        lambda done, total, how: seen.append((done, total)),
    )  # fmt: skip
    done = [frames for frames, _ in seen]
    assert done == sorted(done) and done[-1] == 15 and {total for _, total in seen} == {15}
    assert max(b - a for a, b in pairwise(done)) < 8


# What is stored ------------------------------------------------------------------------------


@torch.no_grad()
def test_samples_and_scaled_latents_are_those_of_the_library(tmp_path: Path) -> None:
    model, source = wan("2.1"), clip_file(tmp_path / "in.mkv", 15)
    posterior = model.encode_with_distribution(padded(read_clip(source), model))
    drawn = model.sample(*posterior, seed=5)
    for scaled in (False, True):
        how = encoding.Encoding(sample=True, seed=5, scaled=scaled)
        latents, decoded = there_and_back(source, model, how)
        assert difference(read_latents(latents)[0], drawn) < 1e-12
        assert difference(read_latents(latents, scaled=True)[0], model.scale_latent(drawn)) < 1e-12
        pixels = to_bytes(model.decode(drawn))[:15, :17, :31]
        assert np.array_equal(decoded, pixels)
        latents, decoded = there_and_back(
            source, model, encoding.Encoding(scaled=scaled), sample=True, seed=5
        )
        assert np.array_equal(decoded, pixels), "drawn by decode"
        found = read_latents(latents, scaled=True)[0]
        assert difference(found, model.scale_latent(posterior.mean)) < 1e-12
        with LatentFile(latents) as file:
            assert file.info.scaled == scaled
            assert difference(file.moments().log_variance, posterior.log_variance) < 1e-12
            std = torch.tensor(STD, dtype=torch.float64).view(1, 4, 1, 1, 1)
            stored = file.read().chunk(2, 1)[1]
            more = 2 * std.log() if scaled else 0
            assert difference(stored, posterior.log_variance - more) < 1e-12
    plain = wan("2.1", latent_mean=None, latent_std=None).latent_record()
    assert (plain.scale_factor, plain.shift_factor, plain.latent_std) == (1.0, 0.0, None)
    half = wan("2.1", latent_mean=None).latent_record()
    assert (half.latent_mean, half.latent_std) == ((0.0,) * 4, STD)


@torch.no_grad()
def test_latents_are_written_and_read_in_python(tmp_path: Path) -> None:
    """Ranges are of latents, timestamps of frames; those of fewer frames say what is padding."""
    model, path = wan("2.2"), tmp_path / "a.safetensors"
    posterior = model.encode_with_distribution(padded(smooth(14, 32, 48), model))
    record = model.latent_record("small")
    info = write_latents(path, posterior, record, fps=16)
    assert (info.frames, info.latent_frames, info.padding_frames) == (17, 5, 0)
    info = write_latents(path, posterior, record, fps=16, timestamps=range(14), overwrite=True)
    assert (info.frames, info.latent_frames, info.padding_frames) == (14, 5, 3)
    read, same = read_latents(path, 1, 3)
    assert same == info and torch.equal(read, posterior.mean[:, :, 1:4])
    with LatentFile(path) as file:
        assert list(file.pieces(2)) == [(0, 2), (2, 2), (4, 1)]
        assert len(file.timestamps()) == 14 and file.timestamps(12) == [12, 13]
        with pytest.raises(LatentFileError, match="has 5 frames"):
            file.read(4, 2)
    for count in (13, 18):
        with pytest.raises(LatentFileError, match=f"5 latents along time, but {count} timestamps"):
            write_latents(path, posterior, record, timestamps=range(count), overwrite=True)
    assert read_latents(path)[1] == info, "it is still there"
    decoding.decode(path, tmp_path / "a.mkv", model, record)
    assert np.array_equal(read_clip(tmp_path / "a.mkv"), in_memory(smooth(14, 32, 48), model))


def test_statistics_are_those_of_all_latents(tmp_path: Path) -> None:
    model, paths = wan("2.1"), []
    for index, frames in enumerate((1, 7, 12)):
        source = clip_file(tmp_path / f"{index}.mkv", frames)
        scaled = encoding.Encoding(scaled=index == 1)
        paths.append(there_and_back(source, model, scaled)[0])
    found = latent_statistics(paths)
    means = torch.cat([read_latents(path)[0] for path in paths], 2)
    assert (found.files, found.frames) == (3, 20)
    assert found.cells == (1 + 3 + 4) * 3 * 4 == means[0, 0].numel()
    assert found.mean == pytest.approx(means.mean((0, 2, 3, 4)).tolist())
    image = awake(torch.float64)
    write_latents(tmp_path / "i.safetensors", torch.randn(1, 4, 2, 3, 3), image.latent_record("i"))
    with pytest.raises(LatentFileError, match=r"for each 4 frames one latent.* 4 for 1"):
        latent_statistics([*paths, tmp_path / "i.safetensors"], any_model=True)


# Whose latents -------------------------------------------------------------------------------


def test_latents_of_another_model_are_refused(tmp_path: Path) -> None:
    """Always, if their cells are others; else unless both are said to have one latent space."""
    model, target = wan("2.1"), tmp_path / "out.mkv"
    latents, _ = there_and_back(clip_file(tmp_path / "in.mkv", 6), model)
    others = {
        "4 channels for 4 frames of 16x16 pixels": wan("2.2"),
        "5 channels for 4 frames of 8x8": wan("2.1", latent_channels=5, latent_mean=None,
                                             latent_std=None),
        "4 channels for 2 frames of 8x8": wan("2.1", temporal_downsample=(True, False, False)),
        "4 channels for 8x8 pixels": awake(torch.float64, channel_multipliers=(1, 1, 1, 1)),
    }  # fmt: skip
    for words, other in others.items():
        record = other.latent_record("other")
        with pytest.raises(LatentFileError, match=f"other .* takes {words}.* its own model"):
            decoding.decode(latents, target, other, record, any_model=True)
        other_latents, _ = there_and_back(write(tmp_path / "i.mkv", smooth(3, 16, 16)), other)
        with pytest.raises(LatentFileError, match="takes 4 channels for 4 frames of 8x8 pixels"):
            decoding.decode(other_latents, target, model, model.latent_record(), any_model=True)
    other = wan("2.1").clone()
    with torch.no_grad():
        other.encoder.conv_in.bias.add_(0.1)
    with pytest.raises(LatentFileError, match=r"by small .* not by other .* --any-model"):
        decoding.decode(latents, target, other, other.latent_record("other"))
    assert not target.exists()
    decoding.decode(latents, target, other, other.latent_record("other"), any_model=True)


def test_latents_scaled_in_another_way_are_refused(tmp_path: Path) -> None:
    """By one factor for all channels, where the model has one for each; unscaled ones pass."""
    model, path, target = wan("2.1"), tmp_path / "a.safetensors", tmp_path / "out.mkv"
    latents, record = torch.randn(1, 4, 2, 2, 2), ModelRecord(frames_per_latent=4)
    write_latents(path, latents, record, scaled=True)
    with pytest.raises(LatentFileError, match=r"by one factor .* a mean and a deviation of each"):
        decoding.decode(path, target, model, model.latent_record())
    assert not target.exists()
    write_latents(path, latents, record, overwrite=True)
    decoding.decode(path, target, model, model.latent_record())
    assert len(read_clip(target)) == 5
    for wrong in ({"latent_std": STD}, {"latent_mean": MEAN},
                  {"latent_mean": MEAN[:3], "latent_std": STD[:3]}):  # fmt: skip
        with pytest.raises(LatentFileError, match="latent_mean"):
            write_latents(path, latents, replace(record, **wrong), overwrite=True)


def test_the_hash_tells_what_shapes_do_not() -> None:
    """Equal weights, but pixels that enter otherwise, or levels that halve time elsewhere."""
    shapes: dict[str, Any] = {"latent_channels": 4, "base_channels": 8, "blocks_per_level": 1}
    hashes = set()
    halved = {"temporal_downsample": (True, True, False)}
    kinds: list[dict[str, Any]] = [
        {}, {"patch_size": 2, "input_channels": 1}, {"input_channels": 4}, halved,
        {"level_shortcuts": True}, {"level_shortcuts": True} | halved,
    ]  # fmt: skip
    for options in kinds:
        model = TemporalVAE.from_config(WanVAEConfig(**(shapes | options)), seed=0)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
        record = model.latent_record()
        hashes |= {record.encoder_sha256, record.decoder_sha256}
    assert len(hashes) == 2 * len(kinds)
    model = wan("2.1")
    found = weights_sha256(model.encoder.named_parameters(), "encoder patch_size=1")
    assert model.latent_record().encoder_sha256 == found


# The command ---------------------------------------------------------------------------------


def probed(path: Path) -> list[float]:
    """When ffprobe says that frames are shown."""
    said = subprocess.run(
        ["ffprobe", "-v", "error", "-show_entries", "frame=pts_time", "-of", "json", path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [float(frame["pts_time"]) for frame in json.loads(said.stdout)["frames"]]


@pytest.mark.usefixtures("ffmpeg")
def test_the_verbs_end_to_end(tmp_path: Path, folder: Path, run: Callable[..., Said]) -> None:
    model = ("--model", folder)
    for frames in (6, 1):
        source = clip_file(tmp_path / f"{frames}.mkv", frames)
        latents, whole, back = (tmp_path / f"{frames}{name}" for name in
                                (".safetensors", "-whole.mp4", "-back.mp4"))  # fmt: skip
        for words in (("reconstruct", source, whole), ("encode", source, latents),
                      ("decode", latents, back)):  # fmt: skip
            said = run(*words, *model)
            assert said.returncode == 0, said.stderr
        assert probed(back) == probed(whole) == pytest.approx(probed(source), abs=1e-4)
        assert whole.read_bytes() != source.read_bytes()
        assert np.array_equal(read_clip(whole), read_clip(back))
    told = json.loads(run("info", tmp_path / "6.safetensors", "--json").stdout)
    assert told["frames"] == 6 and told["latent_frames"] == 3 and told["padding_frames"] == 3
    assert told["frames_per_latent"] == 4 and told["pixels_per_latent_cell"] == 8
    assert told["latent_mean"] == list(MEAN) and told["latent_std"] == list(STD)
    assert told["shape"] == [3, 8, 3, 4]
    assert told["bytes_over_the_payload"] == round(told["bytes"] / (3 * 8 * 3 * 4 * 4), 5)
    told = json.loads(run("info", folder, "--json").stdout)
    assert told["frames_per_latent"] == 4 and told["latent_std"] == list(STD)
    assert told["encoder_sha256"] == wan("2.1", torch.float32).latent_record().encoder_sha256
    told = json.loads(run("stats", tmp_path, "--json").stdout)
    assert (told["files"], told["frames"], told["cells"]) == (2, 7, (3 + 1) * 12)


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        (("--start", "0.1", "--frames", "6"), 6),
        (("--stride", "3", "--size", "40x24", "--crop", "centre"), 5),
        (("--fps", "10"), None),
        (("--clip-frames", "all", "--latent-dtype", "bfloat16", "--memory", "least"), 14),
        (("--sample", "--seed", "3", "--scaled", "--dtype", "bfloat16"), 14),
    ],
    ids=str,
)
def test_options_that_choose_frames_and_latents(
    tmp_path: Path, folder: Path, run: Callable[..., Said], options: tuple[str, ...],
    frames: int | None,
) -> None:  # fmt: skip
    source = write(tmp_path / "in.mkv", smooth(14, 24, 40))
    words = (tmp_path / "a.safetensors", "--model", folder)
    assert run("encode", source, *words, *options).returncode == 0
    with LatentFile(words[0]) as file:
        info, stamps = file.info, file.timestamps()
    assert frames in (None, info.frames) and len(stamps) == info.frames
    said = run("decode", words[0], tmp_path / "b.mkv", "--model", folder)
    assert said.returncode == 0, said.stderr
    assert read_clip(tmp_path / "b.mkv").shape == (info.frames, 24, 40, 3)
    expected = [float(stamp * info.time_base) for stamp in stamps]
    assert times(tmp_path / "b.mkv") == pytest.approx(expected, abs=0.0005001)
    again = run("encode", source, *words, *options, "--skip-existing")
    assert again.returncode == 0 and "skipped" in again.stderr
    wan("2.1", torch.float32, latent_std=(1.0, 1.0, 2.0, 1.0)).save_pretrained(folder)
    other = run("encode", source, *words, *options, "--skip-existing")
    assert_one_line_error(other, "it was made by another model, with latent_std")


def test_pictures_folders_and_pipes(tmp_path: Path, folder: Path, run: Callable[..., Said]) -> None:
    """A picture is a clip of one frame, a folder of them a clip, and - a video in a pipe."""
    model, one = ("--model", folder), clip_file(tmp_path / "one.mkv", 1, (20, 33))
    for source, target in ((one, "a.png"), (tmp_path / "a.png", "b.png")):
        said = run("reconstruct", source, tmp_path / target, *model)
        assert said.returncode == 0, said.stderr
        assert read_clip(tmp_path / target).shape == (1, 20, 33, 3)
    clip_file(tmp_path / "six.mkv", 6)
    assert run("reconstruct", tmp_path / "six.mkv", tmp_path / "pngs", *model).returncode == 0
    assert len(list((tmp_path / "pngs").iterdir())) == 6
    (tmp_path / "clips").mkdir()
    for name in ("one.mkv", "six.mkv", "pngs"):
        (tmp_path / name).rename(tmp_path / "clips" / name)
    said = run("encode", tmp_path / "clips", tmp_path / "latents", *model, "--jobs", "2")
    assert said.returncode == 0, said.stderr
    said = run("decode", tmp_path / "latents", tmp_path / "back", *model, "--suffix", ".mkv")
    assert said.returncode == 0, said.stderr
    counts = {path.stem: len(read_clip(path)) for path in (tmp_path / "back").iterdir()}
    assert counts == {"one": 1, "six": 6, "pngs": 6}
    words = [*COMMAND, "reconstruct", "-", "-", "--model", str(folder)]
    piped = subprocess.run(
        words, input=(tmp_path / "clips" / "six.mkv").read_bytes(), capture_output=True
    )
    (tmp_path / "piped.mkv").write_bytes(piped.stdout)
    assert times(tmp_path / "piped.mkv") == times(tmp_path / "clips" / "six.mkv")


def test_bad_latents_are_one_line(tmp_path: Path, folder: Path, run: Callable[..., Said]) -> None:
    """Of another model of the kind, of one latent a frame, and with a header that lies."""
    wan("2.2", torch.float32).save_pretrained(tmp_path / "other")
    source, latents = clip_file(tmp_path / "in.mkv", 6), tmp_path / "a.safetensors"
    assert run("encode", source, latents, "--model", folder).returncode == 0
    target = ("decode", latents, tmp_path / "out.mkv", "--model")
    assert_one_line_error(run(*target, tmp_path / "other"), "decode it with its own model")
    assert_one_line_error(run(*target, "tiny"), "4 channels for 4 frames of 8x8 pixels, where tiny")
    data = latents.read_bytes()
    for old, new in ((b'per_latent":"4"', b'per_latent":"8"'), (b'"frames":"6"', b'"frames":"5"')):
        latents.write_bytes(data.replace(old, new))
        assert_one_line_error(run(*target, folder), "latents along time, but 3 are stored")
    assert not (tmp_path / "out.mkv").exists()
