"""Files as ffmpeg, players and browsers see them: turned, cut, animated, numbered."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_reading import TURNS, turned_file
from test_video import smooth, write

from temporal_vae import load_video
from temporal_vae.video import Image, VideoReader, read_clip, to_bytes, to_pixels

MILLISECOND = Fraction(1, 1000)


@pytest.fixture
def make(ffmpeg: str, tmp_path: Path) -> Callable[..., Path]:
    """Files made by ffmpeg; `SOURCE` is 30 frames of a moving test picture, 25 a second."""

    def made(name: str, *words: object) -> Path:
        target = tmp_path / name
        source = "testsrc2=size=64x48:rate=25:duration=1.2"
        inputs = [] if "-i" in words else ["-f", "lavfi", "-i", source]
        subprocess.run(
            [ffmpeg, "-v", "error", "-y", *inputs, *map(str, words), str(target)], check=True
        )
        return target

    return made


def probed(path: Path, entries: str, *more: str) -> Any:
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", *more]
    words = [*command, "-show_entries", entries, "-of", "json", str(path)]
    return json.loads(subprocess.run(words, check=True, capture_output=True).stdout)


def seconds_by_ffprobe(path: Path) -> list[Fraction | None]:
    """When frames are shown; None where ffprobe does not know."""
    found = probed(path, "frame=best_effort_timestamp_time")["frames"]
    times = [frame.get("best_effort_timestamp_time") for frame in found]
    return [None if time is None else Fraction(time) for time in times]


def read(path: Path, **options: Any) -> tuple[list[Fraction], list[Image], VideoReader]:
    with VideoReader(path, **options) as video:
        frames = list(video)
    return [f.pts * video.info.time_base for f in frames], [f.image for f in frames], video


def assert_whole(video: VideoReader) -> None:
    assert not [n for n in video.notes if "damaged" in n or "made up" in n or "could be" in n]


# Turned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("matrix", "expected"), TURNS)
def test_a_turned_video_is_a_tensor(
    tmp_path: Path, matrix: tuple[int, ...], expected: Callable[[Image], Image]
) -> None:
    path = write(tmp_path / "a.mp4", smooth(3, 32, 48))
    stored = read_clip(path)
    turned_file(path, matrix)
    video, info = load_video(path)
    assert np.array_equal(to_bytes(video), np.stack([expected(image) for image in stored]))
    assert tuple(video.shape[3:]) == (info.height, info.width)
    with VideoReader(path) as reader:
        assert all(min(frame.image.strides) > 0 for frame in reader)  # for torch.from_numpy


def test_frames_backwards_are_pixels() -> None:
    clip = smooth(3, 8, 10)
    assert (to_pixels(clip[:, ::-1]) == to_pixels(clip[:, ::-1].copy())).all()


def photograph(path: Path, orientation: int) -> Image:
    """An image that Exif turns; returns it upright, as Pillow turns it."""
    pillow, ops = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    exif = pillow.Exif()
    exif[0x0112] = orientation
    picture = pillow.fromarray(np.ascontiguousarray(smooth(1, 24, 40)[0]))
    picture.save(path, exif=exif, quality=95)
    with pillow.open(path) as stored:
        return np.asarray(ops.exif_transpose(stored.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
def test_a_photograph_comes_as_exif_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    if suffix == "avif":
        features = pytest.importorskip("PIL.features")
        if not features.check("avif"):
            pytest.skip("Pillow without AVIF")
    path = tmp_path / f"a.{suffix}"
    expected = photograph(path, orientation).astype(int)
    for source in (path, tmp_path):
        if suffix == "avif" and source == tmp_path:
            continue
        video, info = load_video(source)
        got = to_bytes(video)[0]
        assert got.shape == expected.shape == (info.height, info.width, 3)
        assert np.abs(got - expected).mean() < 3


def test_photographs_of_a_folder_are_turned_each_its_own_way(tmp_path: Path) -> None:
    """libav's angles of 2 and 3, and of 5 and 6, are the same."""
    for numbers in ((2, 3, 1, 4), (5, 6, 7, 8)):
        folder = tmp_path / str(numbers[0])
        folder.mkdir()
        expected = [photograph(folder / f"{i}.png", n) for i, n in enumerate(numbers)]
        assert np.array_equal(read_clip(folder), np.stack(expected))


def test_an_animated_webp_is_turned(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    exif = pillow.Exif()
    exif[0x0112] = 6
    images = [pillow.fromarray(image) for image in smooth(2, 24, 40)]
    images[0].save(
        tmp_path / "a.webp", save_all=True, append_images=images[1:], exif=exif, lossless=True
    )
    assert np.array_equal(read_clip(tmp_path / "a.webp"), np.rot90(smooth(2, 24, 40), -1, (1, 2)))


# AVI, which has no presentation times ---------------------------------------------------------

AVI: dict[str, list[Any]] = {
    "h264 without B-frames": ["-c:v", "libx264", "-bf", 0],
    "h264 with one": ["-c:v", "libx264", "-bf", 1, "-g", 12],
    "h264 with three": ["-c:v", "libx264", "-bf", 3, "-g", 12],
    "h264 with references to B": ["-c:v", "libx264", "-x264-params", "bframes=5:b-pyramid=normal"],
    "mpeg4": ["-c:v", "mpeg4", "-bf", 0],
    "mpeg4 with B-frames": ["-c:v", "mpeg4", "-bf", 2],
    "packed B-frames": ["-c:v", "libxvid", "-bf", 2],
    "mpeg2": ["-c:v", "mpeg2video", "-bf", 2],
    "mjpeg": ["-c:v", "mjpeg"],
}


@pytest.mark.parametrize("kind", AVI)
def test_frames_of_an_avi_come_evenly(make: Callable[..., Path], kind: str) -> None:
    path = make("a.avi", *AVI[kind], "-pix_fmt", "yuvj420p" if kind == "mjpeg" else "yuv420p")
    times, images, video = read(path)
    expected = seconds_by_ffprobe(path)
    assert len(times) == len(expected)
    assert {b - a for a, b in pairwise(times)} == {Fraction(1, 25)}
    known = [(a, b) for a, b in zip(times, expected, strict=True) if b is not None]
    assert len(known) > 20 and all(abs(a - b) < MILLISECOND for a, b in known)
    assert video.info.fps == 25 and video.info.frames == len(images)
    assert_whole(video)


def test_an_avi_with_numbers_that_are_passed_over(make: Callable[..., Path]) -> None:
    """ffmpeg counts at twice the rate there: every other number is of no frame."""
    source = make("a.mp4", "-c:v", "libx264", "-bf", 3, "-g", 12)
    path = make("a.avi", "-i", source, "-c", "copy")
    times, images, video = read(path)
    assert np.array_equal(np.stack(images), read_clip(source))
    assert {b - a for a, b in pairwise(times)} == {Fraction(1, 25)}
    assert (video.info.fps, video.info.frames) == (Fraction(25), 30)
    assert_whole(video)


def test_an_avi_that_is_cut_off_is_damaged(make: Callable[..., Path]) -> None:
    path = make("a.avi", "-c:v", "libx264", "-bf", 3, "-g", 12)
    path.write_bytes(path.read_bytes()[:9000])
    *_, video = read(path)
    assert any("damaged" in note for note in video.notes)


# Animations -----------------------------------------------------------------------------------

DELAYS = [100, 50, 200, 20, 30, 100]


def animation(path: Path, delays: list[int]) -> Path:
    pillow = pytest.importorskip("PIL.Image")
    if path.suffix == ".avif" and not pytest.importorskip("PIL.features").check("avif"):
        pytest.skip("Pillow without AVIF")
    images = [pillow.new("RGB", (24, 16), (40 * index, 0, 0)) for index in range(len(delays))]
    images[0].save(path, save_all=True, append_images=images[1:], duration=delays, lossless=True)
    return path


@pytest.mark.parametrize("suffix", ["avif", "webp", "gif", "png"])
def test_animations_keep_their_times(tmp_path: Path, suffix: str, ffmpeg: str) -> None:
    path = animation(tmp_path / f"a.{suffix}", DELAYS)
    times, images, video = read(path)
    begins = [Fraction(sum(DELAYS[:i]), 1000) for i in range(len(DELAYS))]
    assert times == begins
    assert [int(image[0, 0, 0]) // 30 for image in images] == [0, 1, 2, 4, 5, 6]
    if suffix != "png":  # whose end libav does not know on opening
        assert video.info.fps == Fraction(6, sum(DELAYS)) * 1000
        assert video.info.frames == 6
    if suffix in ("gif", "png"):
        assert seconds_by_ffprobe(path) == begins
    if suffix != "png":  # half of all the time, and what libav says of APNG is its start alone
        part = [f for f in begins if f >= Fraction(3, 10)]
        assert read(path, start=0.3)[0] == part
    assert_whole(video)


@pytest.mark.parametrize("delays", [[10] * 6, [0] * 6, [100, 10, 20, 10, 50, 10]])
def test_the_shortest_delays_of_a_gif_are_a_tenth_of_a_second(
    tmp_path: Path, delays: list[int], ffmpeg: str
) -> None:
    path = animation(tmp_path / "a.gif", delays)
    shown = [delay if delay > 10 else 100 for delay in delays]
    times, _, video = read(path)
    assert times == [Fraction(sum(shown[:i]), 1000) for i in range(6)] == seconds_by_ffprobe(path)
    assert video.info.fps == Fraction(6000, sum(shown))
    assert video.info.end == pytest.approx(sum(shown) / 1000)
    assert video.info.expected_frames == 6


# Which stream ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("default", [0, 1])
def test_the_default_stream_is_read(
    make: Callable[..., Path], suffix: str, default: int, ffmpeg: str
) -> None:
    flags = [f"-disposition:v:{i} {'default' if i == default else 0}".split() for i in (0, 1)]
    path = make(
        f"a.{suffix}", "-f", "lavfi", "-i", "testsrc2=size=64x48:duration=1",
        "-f", "lavfi", "-i", "testsrc2=size=96x64:duration=1", "-map", 0, "-map", 1,
        "-c:v", "libx264", *flags[0], *flags[1],
    )  # fmt: skip
    *_, video = read(path)
    assert (video.info.width, video.info.height) == ((64, 48), (96, 64))[default]
    assert f"video stream {1 - default} is not copied" in video.notes


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_cover_is_not_the_video(make: Callable[..., Path], suffix: str) -> None:
    cover = make("cover.jpg", "-frames:v", 1, "-vf", "scale=640:480")
    source = "testsrc2=size=64x48:duration=1"
    how = ["-map", 1, "-map", 0, "-c:v:1", "copy", "-c:v:0", "libx264"]
    how += ["-disposition:v:1", "attached_pic"]
    path = make(f"a.{suffix}", "-i", cover, "-f", "lavfi", "-i", source, *how)
    *_, video = read(path)
    assert (video.info.width, video.info.codec) == (64, "h264")


# Lengths, cuts --------------------------------------------------------------------------------

SHIFTED: dict[str, list[Any]] = {
    "mpg": ["-c:v", "mpeg2video", "-bf", 2], "ts": ["-c:v", "libx264"],
    "mkv": ["-c:v", "libx264"], "mp4": ["-c:v", "libx264"], "nut": ["-c:v", "libx264"],
    "wmv": ["-c:v", "wmv2"], "webm": ["-c:v", "libvpx-vp9", "-cpu-used", 8],
}  # fmt: skip


@pytest.mark.parametrize("suffix", SHIFTED)
def test_the_end_of_a_file_that_starts_late(make: Callable[..., Path], suffix: str) -> None:
    source = "testsrc2=size=64x48:rate=25:duration=8"
    words = [*SHIFTED[suffix], "-pix_fmt", "yuv420p", "-output_ts_offset", 5]
    path = make(f"a.{suffix}", "-f", "lavfi", "-i", source, *words)
    times, images, video = read(path)
    info = video.info
    assert len(images) == 200
    assert info.start == pytest.approx(float(seconds_by_ffprobe(path)[0] or 0), abs=1e-3)
    assert info.end == pytest.approx(info.start + 8, abs=0.1)
    assert info.expected_frames == pytest.approx(200, abs=2)
    assert_whole(video)
    later, parts, selected = read(path, start=2)
    assert [t - times[0] for t in later] == [t - times[0] for t in times if t - times[0] >= 2]
    assert np.array_equal(np.stack(parts), np.stack(images[50:]))
    assert selected.info.frames == pytest.approx(150, abs=2)
    assert_whole(selected)


def test_the_end_of_an_flv(make: Callable[..., Path]) -> None:
    """It starts late by the frames that are decoded ahead, which its length includes."""
    *_, video = read(make("a.flv", "-c:v", "libx264", "-bf", 3))
    assert video.info.start == pytest.approx(0.08)
    assert video.info.end == pytest.approx(1.28)
    assert_whole(video)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize(
    "cut", [["-ss", 0.6], ["-to", 0.6], ["-ss", 0.3, "-to", 0.9]], ids=["start", "end", "both"]
)
def test_a_cut_without_decoding_is_not_damage(
    make: Callable[..., Path], suffix: str, cut: list[Any]
) -> None:
    source = make("whole.mp4", "-c:v", "libx264", "-bf", 3, "-g", 12)
    path = make(f"a.{suffix}", *cut, "-i", source, "-c", "copy")
    times, images, video = read(path)
    assert [float(t) for t in times] == pytest.approx(
        [float(t or 0) for t in seconds_by_ffprobe(path)], abs=1e-3
    )
    assert video.info.frames == len(images) < 30
    assert_whole(video)


def test_an_edit_list_may_hide_the_end(make: Callable[..., Path]) -> None:
    path = make("a.mp4", "-c:v", "libx264", "-bf", 3)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") // 2).to_bytes(4, "big")
    path.write_bytes(data)
    _, images, video = read(path)
    assert video.info.frames == len(images) == len(seconds_by_ffprobe(path)) < 30
    assert_whole(video)


# Pages and numbers ----------------------------------------------------------------------------


def pages(path: Path, clip: Image, **options: Any) -> Path:
    pillow = pytest.importorskip("PIL.Image")
    images = [pillow.fromarray(image) for image in clip]
    images[0].save(path, save_all=True, append_images=images[1:], **options)
    return path


def test_all_pages_of_a_tiff_are_frames(tmp_path: Path) -> None:
    clip = smooth(5, 24, 40)
    path = pages(tmp_path / "a.tiff", clip)
    times, images, video = read(path, fps=10, start=0.1)
    assert np.array_equal(np.stack(images), clip[1:])
    assert times == [Fraction(i, 10) for i in range(1, 5)]
    assert (video.info.fps, video.info.frames) == (Fraction(10), 4)
    assert any("no rate: taken as 25" in note for note in read(path)[2].notes)
    pages(tmp_path / "b.tiff", clip[:2])
    assert np.array_equal(read_clip(tmp_path), np.concatenate([clip, clip[:2]]))


def test_pages_of_two_sizes_are_no_clip(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    small = pillow.new("RGB", (8, 8))
    pillow.new("RGB", (16, 8)).save(tmp_path / "a.tiff", save_all=True, append_images=[small])
    with pytest.raises(Exception, match="16x8 to 8x8 at frame 1"):
        read_clip(tmp_path / "a.tiff")


def test_only_the_first_of_several_frames_in_a_folder_is_told(tmp_path: Path) -> None:
    animation(tmp_path / "a.png", DELAYS)
    _, images, video = read(tmp_path)
    assert len(images) == 1
    assert "a.png holds more frames than its first, which is taken" in video.notes


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["img_001", "img_002", "img_004"], ["img_003.png is missing: img_004.png comes"]),
        (["7", "8", "12"], ["9.png to 11.png are missing: 12.png comes"]),
        (["s2_0001_v3", "s2_0002_v3", "s2_0009_v3"], ["s2_0003_v3.png to s2_0008_v3.png are"]),
        (["a10", "a20", "a40"], ["a30.png is missing"]),
        (["a10", "a20", "a30"], []),
        (["b1", "b01", "c5", "title"], []),
        ([f"{n:03d}" for n in (1, 2, 4, 6, 8, 10)], ["003", "005", "007", "in 1 more places"]),
    ],
)
def test_gaps_in_numbers_are_named(tmp_path: Path, names: list[str], missing: list[str]) -> None:
    photograph(tmp_path / "first.png", 1)
    data = (tmp_path / "first.png").read_bytes()
    (tmp_path / "first.png").unlink()
    for name in names:
        (tmp_path / f"{name}.png").write_bytes(data)
    _, images, video = read(tmp_path)
    told = [note for note in video.notes if "missing" in note]
    assert len(images) == len(names)
    assert len(told) == len(missing)
    assert all(words in note for words, note in zip(missing, told, strict=True))


def test_an_empty_packet_is_not_the_end(make: Callable[..., Path]) -> None:
    """Theora has one where a frame is shown for longer; frames after it were left out."""
    path = make("a.ogv", "-c:v", "libtheora", "-pix_fmt", "yuv420p")
    times, _, video = read(path)
    assert times == seconds_by_ffprobe(path) and times[-1] == Fraction(29, 25)
    assert_whole(video)
