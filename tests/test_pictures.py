"""Pictures as outputs: stills and animations, by Pillow as the reference, and by the command."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_video import smooth

from temporal_vae import save_video
from temporal_vae.video import (
    Format,
    Image,
    VideoError,
    VideoReader,
    VideoWriter,
    read_clip,
    to_pixels,
    writable,
)

pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

CLOSE = {"png": 0.0, "jpg": 1.5, "jpeg": 1.5, "webp": 2.0, "gif": 5.0}
"""Levels by which an image may differ in the mean: GIF has 256 colours."""


def shown(path: Path, channels: str = "RGB") -> list[Image]:
    with pillow.open(path) as image:
        frames = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(np.asarray(image.convert(channels)).astype(int))
    return frames


@pytest.mark.parametrize("size", [(24, 40), (37, 53), (1, 1)])
@pytest.mark.parametrize("suffix", CLOSE)
def test_one_frame_is_a_picture(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    clip, path = smooth(1, *size), tmp_path / f"a.{suffix}"
    save_video(to_pixels(clip), path, fps=25)
    (image,) = shown(path)
    assert image.shape == (*size, 3)
    assert np.abs(image - clip[0]).mean() <= CLOSE[suffix]
    assert np.abs(read_clip(path)[0].astype(int) - clip[0]).mean() <= CLOSE[suffix]


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_picture_keeps_its_alpha(tmp_path: Path, suffix: str) -> None:
    clip = smooth(1, 24, 40)
    clip = np.concatenate([clip, clip[..., :1]], 3)
    path = tmp_path / f"a.{suffix}"
    save_video(to_pixels(clip), path, fps=25)
    assert np.array_equal(shown(path, "RGBA")[0][..., 3], clip[0, ..., 3])


def test_a_png_keeps_sixteen_bits_and_others_refuse_them(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 65536, (1, 9, 14, 3), dtype=np.uint16)
    save_video(to_pixels(image), tmp_path / "a.png", fps=25, depth=16)
    assert np.array_equal(read_clip(tmp_path / "a.png"), image)
    with pytest.raises(VideoError, match="JPEG is written with 8 bits, not 16"):
        save_video(to_pixels(image), tmp_path / "a.jpg", fps=25, depth=16)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_quality_is_followed(tmp_path: Path, suffix: str) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    sizes = []
    for quality in (0, 5, 30):
        path = tmp_path / f"{quality}.{suffix}"
        save_video(to_pixels(clip), path, fps=25, quality=quality)
        sizes.append(path.stat().st_size)
    assert sizes[0] > 1.1 * sizes[1] > 1.2 * sizes[2]
    with pytest.raises(VideoError, match=r"0 .best. to"):
        save_video(to_pixels(clip), tmp_path / f"a.{suffix}", fps=25, quality=101)


@pytest.mark.parametrize(("suffix", "clock"), [("gif", 100), ("webp", 1000)])
def test_an_animation_keeps_its_times(tmp_path: Path, suffix: str, clock: int) -> None:
    clip, path = smooth(4, 25, 41), tmp_path / f"a.{suffix}"
    stamps = [0, 4, 30, 50]
    notes = save_video(to_pixels(clip), path, fps=25, timestamps=stamps, time_base=Fraction(1, 100))
    assert notes == ()
    assert [np.abs(a - b).mean() <= 5 for a, b in zip(shown(path), clip, strict=True)] == [True] * 4
    with VideoReader(path) as video:
        frames = list(video)
    assert [f.pts * video.info.time_base for f in frames] == [Fraction(s, 100) for s in stamps]
    if suffix == "gif":
        assert video.info.fps == Fraction(4 * 100, 54)  # the last is shown for 1 / fps
    with pillow.open(path) as image:
        assert image.info["loop"] == 0  # for ever
    notes = save_video(to_pixels(clip), path, fps=30, timestamps=[1, 2, 3, 4])
    assert [note.split(":")[0] for note in notes] == [
        "its start cannot be kept", f"its timestamps are rounded to 1/{clock} s"
    ]  # fmt: skip


@pytest.mark.parametrize(("suffix", "most"), [("gif", 50), ("webp", 90)])
def test_an_animation_that_players_would_slow_down(tmp_path: Path, suffix: str, most: int) -> None:
    clip, path = to_pixels(smooth(3, 16, 16)), tmp_path / f"a.{suffix}"
    save_video(clip, path, fps=most)
    with pytest.raises(VideoError, match="ms apart cannot be kept"):
        save_video(clip, tmp_path / f"b.{suffix}", fps=most * 2)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_still_of_several_frames_is_refused(tmp_path: Path, suffix: str) -> None:
    clip, path = smooth(2, 16, 16), tmp_path / f"a.{suffix}"
    with pytest.raises(VideoError, match=r"holds one frame, and there are several: take .gif"):
        save_video(to_pixels(clip), path, fps=25)
    with (
        pytest.raises(VideoError, match=r"holds one frame"),
        writable(path) as partial,
        VideoWriter(partial, 16, 16, Fraction(25), format=Format()) as writer,
    ):
        for index, image in enumerate(clip):
            writer.write(image, index)
    assert not list(tmp_path.iterdir())


def test_photo_in_and_photo_out(tmp_path: Path, run: Any, small_model: Path) -> None:
    save_video(to_pixels(smooth(1, 23, 37)), tmp_path / "photo.jpg", fps=25)
    model = ["--model", small_model]
    for suffix in CLOSE:
        done = run("reconstruct", tmp_path / "photo.jpg", tmp_path / f"out.{suffix}", *model)
        assert done.returncode == 0, done.stderr
        assert shown(tmp_path / f"out.{suffix}")[0].shape == (23, 37, 3)
    assert run("encode", tmp_path / "photo.jpg", tmp_path / "a.safetensors", *model).returncode == 0
    assert run("decode", tmp_path / "a.safetensors", tmp_path / "b.png", *model).returncode == 0
    assert np.array_equal(shown(tmp_path / "b.png"), shown(tmp_path / "out.png"))


def test_a_clip_as_a_picture(tmp_path: Path, run: Any, small_model: Path) -> None:
    save_video(to_pixels(smooth(3, 16, 24)), tmp_path / "a.mp4", fps=25)
    model = ["--model", small_model]
    run("encode", tmp_path / "a.mp4", tmp_path / "a.safetensors", *model)
    before = sorted(tmp_path.iterdir())
    for source, verb in (("a.mp4", "reconstruct"), ("a.safetensors", "decode")):
        done = run(verb, tmp_path / source, tmp_path / "out.png", *model)
        assert done.returncode == 1 and "a .png file holds one frame" in done.stderr
        assert sorted(tmp_path.iterdir()) == before
        done = run(verb, tmp_path / source, tmp_path / f"{verb}.gif", *model)
        assert done.returncode == 0, done.stderr
        assert len(shown(tmp_path / f"{verb}.gif")) == 3
        (tmp_path / f"{verb}.gif").unlink()
    done = run("reconstruct", tmp_path / "a.mp4", tmp_path / "one.jpg", "--frames", 1, *model)
    assert done.returncode == 0, done.stderr
