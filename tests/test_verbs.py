"""encode, decode, info and stats, end to end: law 4, and the same frames as reconstruct."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import awake, difference, thinned
from safetensors.torch import load_file
from test_bounded import SVD_LIKE
from test_cli import COMMAND, assert_one_line_error, times, tvae
from test_video import noise, smooth, write

from temporal_vae import (
    LatentDistribution,
    LatentFile,
    LatentFileError,
    ModelRecord,
    TemporalVAE,
    read_latents,
    write_latents,
)
from temporal_vae.cli import report
from temporal_vae.cli.inputs import plan_jobs
from temporal_vae.convert import chunks, ends, memory
from temporal_vae.convert import decode as decoding
from temporal_vae.convert import encode as encoding
from temporal_vae.convert import reconstruct as reconstructing
from temporal_vae.evaluation.evaluate import reconstruct_frames
from temporal_vae.video import VideoWriter, pad_frames, read_clip, to_pixels
from temporal_vae.walks.tracing import LiveBytes

Said = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def model() -> TemporalVAE:
    return awake(torch.float32)


@pytest.fixture(scope="module")
def record(model: TemporalVAE) -> ModelRecord:
    return model.latent_record("small")


def through_latents(
    source: Path,
    target: Path,
    model: TemporalVAE,
    how: encoding.Encoding | None = None,
    **options: Any,
) -> LatentFile:
    """`source` encoded to a file beside `target`, and decoded to `target`."""
    latents, record = target.with_suffix(".safetensors"), model.latent_record()
    encoding.encode(source, latents, model, record, how, overwrite=True)
    decoding.decode(latents, target, model, record, overwrite=True, **options)
    with LatentFile(latents) as file:
        return file


# Law 4 ---------------------------------------------------------------------------------------


def assert_shape_is_kept(source: Path, target: Path, model: TemporalVAE) -> None:
    """Frames in = frames out, size in = size out, timestamps kept, and reconstruct's frames."""
    file = through_latents(source, target, model)
    before, after = read_clip(source), read_clip(target)
    assert after.shape == before.shape
    assert (file.info.frames, file.info.height, file.info.width) == before.shape[:3]
    moments = model.encode_with_distribution(
        to_pixels(pad_frames(before, model.downsample_factor)).to(model.dtype)
    )
    stored, _ = read_latents(file.path)
    torch.testing.assert_close(stored, moments.mean, rtol=1e-4, atol=1e-4)
    tolerance = 1e-9 if target.suffix == ".mp4" else 0.0005001
    difference = np.abs(np.array(times(target)) - np.array(times(source)))
    assert difference.max() <= tolerance, "timestamps moved"
    whole = target.with_name(f"whole{target.suffix}")
    reconstructing.reconstruct(source, whole, model)
    assert times(whole) == times(target)
    apart = np.abs(read_clip(whole).astype(int) - after)
    if model.is_causal or model.decode_reach is None:  # the same pieces, the same sums
        assert not apart.any(), "the picture moved"
    elif target.suffix == ".mp4":  # H.264 makes more of a rounding
        assert apart.mean() < 2, "the picture moved"
    else:  # a rounding at a half now and then
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3, "the picture moved"


GRID = [
    (1, (17, 31), False, ".mkv"),
    (2, (1, 3), True, ".mkv"),
    (7, (32, 32), True, ".mp4"),
    (13, (33, 20), True, ".mkv"),
    (41, (16, 18), False, ".mkv"),
]


@pytest.mark.parametrize(
    ("options", "case"), thinned(2, [{}, {"causal_mode": True}, SVD_LIKE], GRID)
)
def test_shape_is_kept(
    tmp_path: Path, options: dict[str, Any], case: tuple[int, tuple[int, int], bool, str]
) -> None:
    """One frame, primes, odd sizes; constant and varying rates; streams and clips."""
    frames, size, varying, suffix = case
    pts = [40 * i + 7 * (i % 3) * varying for i in range(frames)]
    source = write(tmp_path / "in.mp4", smooth(frames, *size), pts, Fraction(1, 1000))
    assert_shape_is_kept(source, tmp_path / f"out{suffix}", awake(torch.float32, **options))


def test_law_4_sees_a_lost_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "pad_frames", lambda frames, factor: frames[:, :-1, :-1])
    source = write(tmp_path / "in.mkv", smooth(3, 17, 31))
    with pytest.raises((AssertionError, LatentFileError, ValueError)):
        assert_shape_is_kept(source, tmp_path / "out.mkv", awake(torch.float32))


def test_law_4_sees_moved_timestamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda s, image, pts: honest(s, image, pts // 2))
    source = write(tmp_path / "in.mkv", smooth(3, 16, 16), [0, 40, 90], Fraction(1, 1000))
    with pytest.raises(AssertionError, match="timestamps moved"):
        assert_shape_is_kept(source, tmp_path / "out.mkv", awake(torch.float32))


def test_law_4_sees_latents_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = LatentFile.read
    monkeypatch.setattr(LatentFile, "read", lambda *a: honest(*a).flip(2))
    source = write(tmp_path / "in.mkv", smooth(9, 16, 16))
    with pytest.raises(AssertionError):
        assert_shape_is_kept(source, tmp_path / "out.mkv", awake(torch.float32))


@pytest.mark.parametrize("asked", [None, 7, "all"])
def test_clips_are_reconstructed_bit_for_bit(tmp_path: Path, asked: Any) -> None:
    """A model that walks clips does the same sums on either way; the file keeps the bounds."""
    svd = awake(torch.float32, temporal_norm="clip", clip_frames=5, temporal_encoder=False)
    source = write(tmp_path / "in.mkv", smooth(12, 9, 14))
    reconstructing.reconstruct(source, tmp_path / "whole.mkv", svd, asked)
    file = through_latents(source, tmp_path / "out.mkv", svd, encoding.Encoding(clip_frames=asked))
    assert file.info.clip_frames == (5 if asked is None else None if asked == "all" else asked)
    assert np.array_equal(read_clip(tmp_path / "out.mkv"), read_clip(tmp_path / "whole.mkv"))


def test_clips_of_a_model_that_streams(tmp_path: Path, model: TemporalVAE) -> None:
    clip = smooth(12, 8, 8)
    source = write(tmp_path / "in.mkv", clip)
    file = through_latents(source, tmp_path / "out.mkv", model, encoding.Encoding(clip_frames=5))
    assert file.info.clip_frames == 5
    parts = [reconstruct_frames(clip[start : start + 5], model) for start in (0, 5, 10)]
    assert np.array_equal(read_clip(tmp_path / "out.mkv"), np.concatenate(parts))


@pytest.mark.parametrize(
    ("memory", "options"),
    thinned(2, ["least", "24MiB"], [{}, {"causal_mode": True}, SVD_LIKE]),
)
def test_a_budget_never_changes_the_files(
    tmp_path: Path, options: dict[str, Any], memory: str
) -> None:
    model = awake(torch.float32, **options)
    source = write(tmp_path / "in.mkv", smooth(11, 19, 30))
    whole = through_latents(source, tmp_path / "whole.mkv", model)
    how = encoding.Encoding(memory=memory)
    bounded = through_latents(source, tmp_path / "bounded.mkv", model, how, memory=memory)
    expected, got = (read_latents(file.path)[0] for file in (whole, bounded))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    clips = [read_clip(tmp_path / f"{name}.mkv").astype(int) for name in ("whole", "bounded")]
    assert np.abs(clips[0] - clips[1]).max() <= 1


@pytest.mark.parametrize(
    "options", [pytest.param({"causal_mode": True}, marks=pytest.mark.slow), SVD_LIKE], ids=str
)
def test_the_least_memory_can_be_met(tmp_path: Path, options: dict[str, Any]) -> None:
    model = awake(torch.float32, **options)
    record, latents = model.latent_record(), tmp_path / "a.safetensors"
    source = write(tmp_path / "in.mkv", smooth(5, 16, 16))

    def encode(memory: int) -> None:
        encoding.encode(
            source, latents, model, record, encoding.Encoding(memory=memory), overwrite=True
        )

    def decode(memory: int) -> None:
        decoding.decode(latents, tmp_path / "a.mkv", model, record, memory=memory, overwrite=True)

    for work in (encode, decode):
        with pytest.raises(ValueError, match="below the least that a") as error:
            work(1000)
        work(int(re.findall(r"with: (\d+) bytes", str(error.value))[0]))
    assert len(read_clip(tmp_path / "a.mkv")) == 5


# What is stored ------------------------------------------------------------------------------


def test_a_sample_is_that_of_its_seed(tmp_path: Path, model: TemporalVAE) -> None:
    """Encoded as a sample, or drawn when moments are decoded: the same latents, the same frames."""
    clip = smooth(11, 10, 14)
    source = write(tmp_path / "in.mkv", clip)
    how = encoding.Encoding(sample=True, seed=5)
    file = through_latents(source, tmp_path / "a.mkv", model, how)
    assert file.info.kind == "sample" and file.info.seed == 5
    video = to_pixels(pad_frames(clip, model.downsample_factor))
    expected = model.encode(video, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(read_latents(file.path)[0], expected, rtol=1e-4, atol=1e-4)
    through_latents(source, tmp_path / "b.mkv", model, sample=True, seed=5)
    a, b = (read_clip(tmp_path / f"{name}.mkv").astype(int) for name in "ab")
    assert np.abs(a - b).max() <= 1
    through_latents(source, tmp_path / "c.mkv", model)
    assert np.abs(read_clip(tmp_path / "c.mkv").astype(int) - a).max() > 1  # the mean is another
    unseeded = through_latents(
        source, tmp_path / "d.mkv", model, encoding.Encoding(sample=True)
    ).info
    again = encoding.Encoding(sample=True, seed=unseeded.seed)
    through_latents(source, tmp_path / "e.mkv", model, again)
    assert np.array_equal(read_clip(tmp_path / "d.mkv"), read_clip(tmp_path / "e.mkv"))


@pytest.mark.parametrize("sample", [False, True])
def test_a_scaled_file_decodes_to_the_same(tmp_path: Path, sample: bool) -> None:
    """By the factor in the file, whatever the model at hand says: no double, no missing scale."""
    options: dict[str, Any] = {"latent_scale_factor": 0.3, "latent_shift_factor": 0.5}
    model = awake(torch.float32, **options)
    source, seed = write(tmp_path / "in.mkv", smooth(9, 16, 16)), 1 if sample else None
    plain = through_latents(
        source, tmp_path / "a.mkv", model, encoding.Encoding(sample=sample, seed=seed)
    )
    how = encoding.Encoding(sample=sample, seed=seed, scaled=True)
    scaled = through_latents(source, tmp_path / "b.mkv", model, how)
    assert (plain.info.scaled, scaled.info.scaled) == (False, True)
    for asked in (False, True):
        torch.testing.assert_close(
            *(read_latents(file.path, scaled=asked)[0] for file in (plain, scaled))
        )
    other = awake(torch.float32)  # the same weights, another factor in its configuration
    decoding.decode(scaled.path, tmp_path / "c.mkv", other, other.latent_record())
    a, b, c = (read_clip(tmp_path / f"{name}.mkv").astype(int) for name in "abc")
    assert np.abs(a - b).max() <= 1 and np.array_equal(b, c)


def test_the_source_is_recorded(
    tmp_path: Path, model: TemporalVAE, record: ModelRecord, run: Callable[..., Said]
) -> None:
    import hashlib

    source = tmp_path / "a.mp4"
    with VideoWriter(source, 16, 18, Fraction(25), None, Fraction(4, 3)) as writer:
        for index, image in enumerate(smooth(3, 16, 18)):
            writer.write(image, index)
    done = encoding.encode(source, tmp_path / "a.safetensors", model, record)
    info = done.info
    assert info.source == "a.mp4"
    assert info.source_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert info.sample_aspect_ratio == Fraction(4, 3) and info.fps == 25
    assert done.bytes == (tmp_path / "a.safetensors").stat().st_size and done.notes == ()
    said = run("info", tmp_path / "a.safetensors")
    assert "18x16" in said.stdout and "a.mp4" in said.stdout and "moments" in said.stdout
    found = json.loads(run("info", tmp_path / "a.safetensors", "--json").stdout)
    assert found["size"] == [18, 16] and found["frames"] == 3 and found["scaled"] is False
    assert found["encoder_sha256"] == record.encoder_sha256
    summary = decoding.decode(tmp_path / "a.safetensors", tmp_path / "b.mkv", model, record)
    assert "4/3" in summary.notes[0]


def test_the_dtype_of_the_file(tmp_path: Path, run: Callable[..., Said], small_model: Path) -> None:
    """bfloat16 in half the bytes; a model run in bfloat16 is still known by its hash."""
    source = write(tmp_path / "in.mkv", smooth(40, 64, 64))
    for name, options in (
        ("a", ()), ("b", ("--latent-dtype", "bfloat16")), ("c", ("--dtype", "bfloat16")),
    ):  # fmt: skip
        words = ("encode", source, tmp_path / f"{name}.safetensors", "--model", small_model)
        assert run(*words, *options).returncode == 0
    infos = {n: read_latents(tmp_path / f"{n}.safetensors")[1] for n in "abc"}
    assert [str(info.dtype) for info in infos.values()] == [
        "torch.float32", "torch.bfloat16", "torch.bfloat16",
    ]  # fmt: skip
    assert len({info.encoder_sha256 for info in infos.values()}) == 1
    for name, info in infos.items():
        payload = info.frames * info.frame_bytes
        assert (tmp_path / f"{name}.safetensors").stat().st_size <= 1.02 * payload
    decoded = run("decode", tmp_path / "c.safetensors", tmp_path / "c.mp4", "--model", small_model)
    assert decoded.returncode == 0, decoded.stderr


# Whose latents -------------------------------------------------------------------------------


def test_another_models_latents_are_refused(tmp_path: Path, model: TemporalVAE) -> None:
    source, latents = write(tmp_path / "in.mkv", smooth(3, 16, 16)), tmp_path / "a.safetensors"
    record = model.latent_record("one")
    encoding.encode(source, latents, model, record)
    other = awake(torch.float32, seed=1)
    its = other.latent_record("two")
    assert record.encoder_sha256 is not None and its.encoder_sha256 is not None
    with pytest.raises(LatentFileError, match=r"by one .* not by two .* --any-model") as error:
        decoding.decode(latents, tmp_path / "b.mkv", other, its)
    assert record.encoder_sha256[:12] in str(error.value)
    assert its.encoder_sha256[:12] in str(error.value)
    assert not (tmp_path / "b.mkv").exists()
    (note,) = decoding.decode(latents, tmp_path / "b.mkv", other, its, any_model=True).notes
    assert "by one" in note
    for options in ({"latent_channels": 5}, {"channel_multipliers": (1, 1, 2)}):
        strange = awake(torch.float32, **options)
        with pytest.raises(LatentFileError, match="its own model"):
            decoding.decode(
                latents, tmp_path / "c.mkv", strange, strange.latent_record(), any_model=True
            )


def test_a_decoder_that_was_trained_on_passes(tmp_path: Path) -> None:
    model = awake(torch.float32)
    source, latents = write(tmp_path / "in.mkv", smooth(3, 16, 16)), tmp_path / "a.safetensors"
    encoding.encode(source, latents, model, model.latent_record("one"))
    with torch.no_grad():
        model.decoder.conv_out.bias.add_(0.1)
    (note,) = decoding.decode(latents, tmp_path / "b.mkv", model, model.latent_record()).notes
    assert "decoder is another" in note
    write_latents(latents, torch.zeros(1, 4, 2, 3, 3), ModelRecord(downsample_factor=2),
                  overwrite=True)  # fmt: skip
    (note,) = decoding.decode(latents, tmp_path / "c.mkv", model, model.latent_record()).notes
    assert "does not say which encoder" in note
    assert read_clip(tmp_path / "c.mkv").shape == (2, 6, 6, 3)


# The command ---------------------------------------------------------------------------------


def test_the_verbs_end_to_end(tmp_path: Path, run: Callable[..., Said]) -> None:
    """One in a process of its own, with the bundled model, which the file names."""
    source = write(tmp_path / "in.mp4", smooth(5, 31, 46))
    encoded = tvae("encode", source, tmp_path / "a.safetensors")
    assert encoded.returncode == 0, encoded.stderr
    assert "5 frames" in encoded.stdout and "frames/s" in encoded.stdout
    decoded = run("decode", tmp_path / "a.safetensors", tmp_path / "out.mkv", "--verbose")
    assert decoded.returncode == 0, decoded.stderr
    assert "46x31" in decoded.stdout
    assert read_clip(tmp_path / "out.mkv").shape == (5, 31, 46, 3)
    assert {p.name for p in tmp_path.iterdir()} == {"in.mp4", "a.safetensors", "out.mkv"}


def test_folders_and_patterns(
    tmp_path: Path, small_model: Path, run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    for index, name in enumerate(("a.mp4", "b.mkv", "c.mkv")):
        write(Path("clips") / name, smooth(2 + index, 16, 16))
    Path("clips/notes.txt").write_text("no video")
    options = ("--model", small_model, "--sample", "--seed", 7, "--json")
    said = run("encode", "clips", "lat", *options)
    assert said.returncode == 0, said.stderr
    rows = [json.loads(line) for line in said.stdout.splitlines()]
    assert [row["frames"] for row in rows] == [2, 3, 4]
    assert [row["seed"] for row in rows] == [7, 8, 9]  # no two clips share their noise
    names = ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert sorted(os.listdir("lat")) == names
    assert "exist: give" in run("encode", "clips", "lat", *options).stderr
    assert run("encode", "clips/*.mkv", "more", *options).returncode == 0
    assert sorted(os.listdir("more")) == names[1:]
    assert run("encode", "clips/a*", "one.safetensors", *options).returncode == 0
    assert read_latents("one.safetensors")[1].frames == 2
    assert run("encode", "clips/a.mp4", "clips/b.mkv", "two", *options).returncode == 0
    assert sorted(os.listdir("two")) == names[:2]
    back = run("decode", "lat", "out", "--model", small_model, "--suffix", ".mkv", "--quiet")
    assert (back.returncode, back.stdout, back.stderr) == (0, "", "")
    assert [len(read_clip(f"out/{name}.mkv")) for name in "abc"] == [2, 3, 4]
    stats = run("stats", "lat", "--json")
    assert json.loads(stats.stdout)["frames"] == 9
    assert "scale_factor" in run("stats", "lat/*.safetensors").stdout


def test_bare_rgb_says_nothing_of_itself_and_is_no_failure(
    tmp_path: Path, small_model: Path, run: Callable[..., Said]
) -> None:
    source, latents = write(tmp_path / "a.mkv", smooth(2, 16, 16)), tmp_path / "a.safetensors"
    assert run("encode", source, latents, "--model", small_model).returncode == 0
    for verb, path in (("reconstruct", source), ("decode", latents)):
        said = run(verb, path, tmp_path / f"{verb}.rgb", "--model", small_model, "--json")
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout)["frames"] == 2
        assert (tmp_path / f"{verb}.rgb").stat().st_size == 2 * 16 * 16 * 3


def test_several_videos_through_a_model(
    tmp_path: Path, small_model: Path, run: Callable[..., Said]
) -> None:
    (tmp_path / "in").mkdir()
    for index, name in enumerate(("a.mp4", "b.mkv")):
        write(tmp_path / "in" / name, smooth(2 + index, 16, 16))
    words = ("reconstruct", tmp_path / "in", tmp_path / "out", "--model", small_model)
    said = run(*words, "--suffix", ".mkv", "--clip-frames", 2, "--json")
    assert said.returncode == 0, said.stderr
    rows = [json.loads(line) for line in said.stdout.splitlines()]
    assert [(row["frames"], row["clip_frames"]) for row in rows] == [(2, 2), (3, 2)]
    assert [row["what"] for row in rows] == ["video", "video"]
    assert [len(read_clip(tmp_path / "out" / f"{name}.mkv")) for name in "ab"] == [2, 3]
    (tmp_path / "in" / "a.mp4").write_text("no video")
    said = run(*words, "--suffix", ".mkv", "--overwrite", "--quiet")
    assert (said.returncode, said.stdout) == (1, "")
    assert "a.mp4: not a video" in said.stderr and "1 of 2 failed" in said.stderr
    one = run("reconstruct", tmp_path / "in/b.mkv", tmp_path / "b.mp4", "--model", small_model,
              "--verbose")  # fmt: skip
    assert "3 frames" in one.stdout and "as one clip" in one.stdout and "codec: " in one.stdout


def test_several_folders_of_images_go_into_a_new_one(tmp_path: Path) -> None:
    sources = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    jobs = plan_jobs(sources, tmp_path / "out", frozenset([".safetensors"]), "", False)
    assert jobs == [(s, tmp_path / "out" / s.stem) for s in sources] and (tmp_path / "out").is_dir()


@pytest.mark.parametrize("how", [(False, False, False), (False, True, False), (True, False, True)])
def test_what_is_said_of_a_pipe_stays_out_of_it(
    capsys: pytest.CaptureFixture[str], how: tuple[bool, bool, bool]
) -> None:
    report.MessageOptions(*how).tell(Path("-"), (ends.Summary(3, 1.0, None, ()), {"what": "video"}))
    said = capsys.readouterr()
    assert said.out == "" and "frames" in said.err


def test_one_bad_file_of_several_stops_nothing(
    tmp_path: Path, small_model: Path, run: Callable[..., Said]
) -> None:
    for name in ("a.mkv", "c.mkv"):
        write(tmp_path / name, smooth(2, 16, 16))
    (tmp_path / "b.mkv").write_text("no video")
    said = run("encode", tmp_path, tmp_path / "out", "--model", small_model)
    assert said.returncode == 1
    assert "b.mkv: not a video" in said.stderr and "1 of 3 failed" in said.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["a.safetensors", "c.safetensors"]


def test_existing_files_are_kept(
    tmp_path: Path, small_model: Path, run: Callable[..., Said]
) -> None:
    source = write(tmp_path / "a.mkv", smooth(2, 16, 16))
    latents, target = tmp_path / "a.safetensors", tmp_path / "b.mkv"
    again = ("reconstruct", source, tmp_path / "c.mkv")
    for words in (("encode", source, latents), ("decode", latents, target), again):
        assert run(*words, "--model", small_model).returncode == 0
        before = Path(str(words[-1])).read_bytes()
        assert_one_line_error(run(*words, "--model", small_model), "--overwrite")
        assert Path(str(words[-1])).read_bytes() == before
        assert run(*words, "--model", small_model, "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("encode", "missing.mp4", "a.safetensors"), "no such file"),
        (("encode", "text.mp4", "a.safetensors"), "not a video"),
        (("encode", "in.mkv", "a.pt"), "must end in .safetensors"),
        (("encode", "in.mkv", "-"), "written last"),
        (("encode", "in.mkv", "nowhere/a.safetensors"), "is not a folder"),
        (("encode", "*.avi", "a.safetensors"), "no file matches"),
        (("encode", "empty", "out"), "holds none of"),
        (("encode", "in.mkv", "in.mkv", "out"), "both be written"),
        (("encode", "in.mkv", "text.mp4", "in.mkv"), "need a folder"),
        (("encode", "in.mkv", "text.mp4", "a.safetensors"), "need a folder"),
        (("encode", "-", "in.mkv", "out"), "name files"),
        (("encode", "in.mkv", "a.safetensors", "--seed", "3"), "--sample"),
        (("encode", "in.mkv", "a.safetensors", "--sample", "--seed", "-1"), "seed must be"),
        (("encode", "in.mkv", "a.safetensors", "--latent-dtype", "int8"), "dtype must be one of"),
        (("encode", "in.mkv", "a.safetensors", "--quiet", "--verbose"), "exclude"),
        (("encode", "in.mkv", "a.safetensors", "--memory", "0.1MiB"), "below the least"),
        (("decode", "in.mkv", "out.mkv"), "does not begin like one"),
        (("decode", "missing.safetensors", "out.mkv"), "no such file"),
        (("decode", "ok.safetensors", "out.avi"), "must end in"),
        (("decode", "cut.safetensors", "out.mkv"), "truncated"),
        (("decode", "ok.safetensors", "out.mkv", "--seed", "3"), "--sample"),
        (("decode", "ok.safetensors", "nowhere/out.mkv"), "is not a folder"),
        (("decode", "ok.safetensors", "out", "--suffix", "mp4"), "begins with a dot"),
        (("info", "cut.safetensors"), "truncated"),
        (("stats", "cut.safetensors"), "truncated"),
        (("stats", "empty"), "holds none of"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    small_model: Path,
    run: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
    model: TemporalVAE,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("in.mkv"), smooth(3, 16, 16))
    Path("text.mp4").write_text("no video")
    Path("empty").mkdir()
    zeros = torch.zeros(1, 4, 3, 8, 8)
    write_latents("ok.safetensors", LatentDistribution(zeros, zeros), model.latent_record())
    Path("cut.safetensors").write_bytes(Path("ok.safetensors").read_bytes()[:-9])
    before = set(tmp_path.iterdir())
    takes = ("--model", str(small_model)) if words[0] in ("encode", "decode") else ()
    assert_one_line_error(run(*words, *takes), message)
    assert set(tmp_path.iterdir()) == before, "something was left behind"


def test_the_model_that_latents_name(
    tmp_path: Path, model: TemporalVAE, run: Callable[..., Said]
) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, torch.zeros(1, 4, 3, 8, 8), model.latent_record("mine"))
    assert_one_line_error(run("decode", path, tmp_path / "a.mkv"), "name it with --model")
    write_latents(path, torch.zeros(1, 4, 3, 8, 8), replace(model.latent_record("tiny"),
                  downsample_factor=8), overwrite=True)  # fmt: skip
    assert_one_line_error(run("decode", path, tmp_path / "a.mkv"), "not by tiny")


def test_a_pipe_in_and_out(tmp_path: Path, small_model: Path) -> None:
    source, latents = write(tmp_path / "in.mkv", smooth(7, 19, 30)), tmp_path / "a.safetensors"
    encode = [*COMMAND, "encode", "-", str(latents), "--model", str(small_model)]
    with subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as feed:  # cannot be rewound
        said = subprocess.run(encode, stdin=feed.stdout, capture_output=True, text=True)
    assert said.returncode == 0 and "no checksum" in said.stderr
    info = read_latents(latents)[1]
    assert info.frames == 7 and info.source is info.source_sha256 is None
    decode = [*COMMAND, "decode", str(latents), "-", "--model", str(small_model)]
    piped = subprocess.run(decode, capture_output=True)
    assert piped.returncode == 0, piped.stderr
    (tmp_path / "out.mkv").write_bytes(piped.stdout)
    assert read_clip(tmp_path / "out.mkv").shape == (7, 19, 30, 3)


# Interruptions and disks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interruption_leaves_no_file(tmp_path: Path, small_model: Path, number: int) -> None:
    """Killed, a nameless piece stays that no reader takes; else nothing. The old file is whole."""
    source = write(tmp_path / "in.mkv", smooth(300, 96, 96))
    target = tmp_path / "out.safetensors"
    target.write_text("old")
    words = ["encode", str(source), str(target), "--model", str(small_model), "--overwrite"]
    process = subprocess.Popen(COMMAND + words, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not [p for p in tmp_path.glob(".out.*.part.safetensors") if p.stat().st_size > 50_000]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and b"Traceback" not in said
    assert target.read_text() == "old"
    left = {p for p in tmp_path.iterdir()} - {source, target}
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    for piece in left:
        with pytest.raises(LatentFileError, match="does not begin like one"):
            LatentFile(piece)


@pytest.mark.parametrize("verb", ["encode", pytest.param("decode", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line(tmp_path: Path, small_model: Path, verb: str) -> None:
    source, latents = write(tmp_path / "in.mkv", smooth(40, 64, 64)), tmp_path / "in.safetensors"
    model = TemporalVAE.from_pretrained(small_model)
    encoding.encode(source, latents, model, model.latent_record())
    words = {"encode": ["encode", str(source), str(tmp_path / "out.safetensors")],
             "decode": ["decode", str(latents), str(tmp_path / "out.mkv")]}[verb]  # fmt: skip

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    said = subprocess.run([*COMMAND, *words, "--model", str(small_model)], preexec_fn=limit,
                          capture_output=True, text=True)  # fmt: skip
    assert_one_line_error(said, "File too large")
    assert set(tmp_path.iterdir()) == {source, latents}


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or subprocess.run(
        command, capture_output=True
    ).returncode:  # fmt: skip
        pytest.skip("file systems may not be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("options", "message"), [
    ("size=64k", "No space left on device"), ("ro,size=64k", "Read-only file system"),
])  # fmt: skip
def test_a_disk_that_is_full_or_read_only(
    tmp_path: Path, model: TemporalVAE, small_model: Path, run: Callable[..., Said],
    options: str, message: str,
) -> None:  # fmt: skip
    """Of 64 KiB, for files that take more: one line, and not a byte of them."""
    source, latents = write(tmp_path / "in.mkv", noise(24, 64, 64)), tmp_path / "in.safetensors"
    encoding.encode(source, latents, model, model.latent_record())
    with mounted(tmp_path / "disk", options) as disk:
        for words in (
            ("encode", source, disk / "out.safetensors"),
            ("decode", latents, disk / "out.mkv"),
            ("reconstruct", source, disk / "out.mkv"),
        ):
            assert_one_line_error(run(*words, "--model", small_model), message)
            assert list(disk.iterdir()) == []


# Memory --------------------------------------------------------------------------------------


def peak_growth(tmp_path: Path, model: Path, frames: tuple[int, int], side: int) -> dict[str, int]:
    """Bytes that encode and decode take more for a long clip than for a short one."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    try:
        from flat_memory import make_video, peak
    finally:
        sys.path.pop(0)
    most: dict[str, list[int]] = {"encode": [], "decode": []}
    for count in frames:
        source = tmp_path / f"{count}.mkv"
        make_video(source, count, side, side)
        latents, target = source.with_suffix(".safetensors"), tmp_path / f"{count}.mp4"
        most["encode"].append(peak(source, latents, str(model), verb="encode"))
        most["decode"].append(peak(latents, target, str(model), verb="decode"))
    return {verb: long - short for verb, (short, long) in most.items()}


@pytest.mark.parametrize("options", [{}, {"causal_mode": True}], ids=str)
def test_short_videos_are_walked_whole(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a budget, which streams them; the latents and the picture are the same."""
    model, source = awake(torch.float64, **options), write(tmp_path / "in.mkv", smooth(9, 24, 40))
    record, pieces = model.latent_record(), list[int]()
    encode = TemporalVAE.encode

    def noted(self: TemporalVAE, clip: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        pieces.append(clip.shape[2])
        return encode(self, clip, *rest, **more)

    found = []
    for at_once, seed, limit in (
        (0, None, None), (9 * 24 * 40, None, None), (9 * 24 * 40 - 1, None, None),
        (10**9, None, "1GiB"), (9 * 24 * 40 - 1, 5, None), (9 * 24 * 40, 5, None),
    ):  # fmt: skip
        monkeypatch.setattr(memory, "WHOLE_PIXELS", at_once)
        how = encoding.Encoding(sample=seed is not None, seed=seed, memory=limit)
        with monkeypatch.context() as patch:
            patch.setattr(TemporalVAE, "encode", noted)
            done = encoding.encode(
                source, tmp_path / "a.safetensors", model, record, how, overwrite=True
            )
        decoding.decode(
            tmp_path / "a.safetensors", tmp_path / "a.mkv", model, record, overwrite=True
        )
        latents = load_file(tmp_path / "a.safetensors")
        found.append((latents, read_clip(tmp_path / "a.mkv"), done.info.clip_frames))
    assert pieces == [9], "of those with a sample, the one that is walked whole"
    for kept, picture, clip_frames in found[1:4]:
        assert clip_frames is None and kept.keys() == found[0][0].keys()
        assert all(difference(kept[name], found[0][0][name]) < 1e-6 for name in kept)
        assert np.array_equal(picture, found[0][1])
    assert all(difference(found[4][0][name], found[5][0][name]) < 1e-6 for name in found[4][0])


@torch.no_grad()
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """All tensors alive while a file is written, and read: as many for 50 frames as for 110."""
    model = awake(torch.float32, causal_mode=True)
    record, most = model.latent_record(), []
    for frames in (50, 110):
        source = write(tmp_path / f"{frames}.mkv", smooth(frames, 32, 32))
        latents = str(tmp_path / f"{frames}.safetensors")
        for work in (
            lambda source=source, out=latents: encoding.encode(source, out, model, record),
            lambda source=latents: decoding.decode(source, f"{source}.mkv", model, record),
        ):
            with LiveBytes() as alive:
                for parameter in model.parameters():
                    alive.leave_out(parameter)
                work()
            most.append(alive.most)
    assert most[0] == most[2] > 100_000 and most[1] == most[3] > 100_000


@pytest.mark.slow
def test_memory_is_flat_over_ten_minutes(tmp_path: Path, small_model: Path) -> None:
    growth = peak_growth(tmp_path, small_model, (600, 15_000), 64)
    assert max(growth.values()) < 8e6, growth
