"""Writing: what ffmpeg, ffprobe and our reader find in the files, and that none is half there."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from conftest import awake

from temporal_vae import load_video, save_video
from temporal_vae.convert import ends
from temporal_vae.convert import reconstruct as reconstructing
from temporal_vae.files.atomic import atomic_folder
from temporal_vae.video import (
    Colour,
    CopiedStreams,
    Format,
    Image,
    VideoError,
    VideoReader,
    VideoWriter,
    choose,
    depth_for,
    writable,
)
from temporal_vae.video.colour import MATRICES, WEIGHTS
from temporal_vae.video.write.to_yuv import Yuv, to_depth

BARS = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0), (0.2, 0.8, 0.4)]
LOSSY = ("h264", "h265", "vp9")


def picture(height: int, width: int, channels: int, depth: int) -> Image:
    """A grey ramp above colour bars, each bar wider than two chroma samples; alpha is the ramp."""
    ramp = np.linspace(0, 1, width)[None, :, None].repeat(height, 0)
    columns = np.arange(width) * len(BARS) // width
    bars = np.array(BARS, np.float64)[columns][None].repeat(height, 0)
    image = np.where(np.arange(height)[:, None, None] < height // 2, ramp.repeat(3, 2), bars)
    image = {1: ramp, 3: image, 4: np.concatenate([image, ramp], 2)}[channels]
    top = 255 if depth == 8 else 65535
    return (image * top).round().astype(np.uint8 if depth == 8 else np.uint16)


def write(
    path: Path,
    image: Image,
    pts: list[int],
    base: Fraction = Fraction(1, 25),
    fps: Fraction = Fraction(25),
    **options: Any,
) -> VideoWriter:
    height, width, channels = image.shape
    with VideoWriter(path, height, width, fps, base, channels=channels, **options) as writer:
        for stamp in pts:
            writer.write(image, stamp)
    return writer


def read(path: Path, channels: int = 3) -> tuple[Image, list[Fraction]]:
    with VideoReader(path, channels=channels) as video:
        frames = list(video)
        base = video.info.time_base
    return np.stack([frame.image for frame in frames]), [frame.pts * base for frame in frames]


def furthest(a: Image, b: Image) -> float:
    """The largest difference, in levels of 255, away from the edges of the bars."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    scale = 255 / np.iinfo(b.dtype).max
    height, width = b.shape[:2]
    columns = np.arange(width) * len(BARS) // width
    edge = np.convolve(np.diff(columns, prepend=0) != 0, np.ones(7), "same") > 0
    away = np.ones((height, width), bool)
    away[height // 2 - 3 :, edge] = False
    away[height // 2 - 3 : height // 2 + 3] = False
    return float(np.abs(a.astype(np.float64) - b)[away].max() * scale)


# The numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_depths_are_converted_to_the_nearest(kind: type, depth: int) -> None:
    top = int(np.iinfo(kind).max)
    levels: Image = np.arange(top + 1).astype(kind)
    exact = [Fraction(int(level) * (2**depth - 1), top) for level in levels[:: max(1, top // 999)]]
    got = to_depth(levels, depth)[:: max(1, top // 999)]
    assert all(abs(int(g) - e) <= Fraction(1, 2) for g, e in zip(got, exact, strict=True))
    assert int(got[0]) == 0 and int(to_depth(levels, depth)[-1]) == 2**depth - 1


@pytest.mark.parametrize("depth", [8, 10, 16])
@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("matrix", sorted(MATRICES))
def test_yuv_is_that_of_the_standard(matrix: int, limited: bool, depth: int) -> None:
    """ITU-R BT.709 and BT.2020, table 'digital representation', in float64."""
    rgb = np.random.default_rng(0).integers(0, 65536, (16, 18, 3), dtype=np.uint16)
    rgb[0, :2] = [[0, 0, 0], [65535, 65535, 65535]]
    planes = Yuv(Colour(1, 1, matrix, 1 if limited else 2), depth, False)(rgb)
    red, blue = WEIGHTS[matrix]
    r, g, b = np.moveaxis(rgb / 65535, 2, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    unit, top = 2 ** (depth - 8), 2**depth - 1
    if limited:
        exact = [(219 * y + 16) * unit, (224 * u + 128) * unit, (224 * v + 128) * unit]
    else:
        exact = [y * top, u * top + 128 * unit, v * top + 128 * unit]
    for plane, value in zip(planes, exact, strict=True):
        assert np.abs(plane - value.clip(0, top)).max() <= 0.5 + 0.01
    white, black = int(planes[0][0, 1]), int(planes[0][0, 0])
    assert (black, white) == ((16 * unit, 235 * unit) if limited else (0, top))
    assert planes[1][0, 1] == planes[2][0, 1] == 128 * unit, "white is not grey"


def test_chroma_of_four_pixels_is_their_mean() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    full = Yuv(Colour(1, 1, 1, 1), 16, False)(rgb)
    half = Yuv(Colour(1, 1, 1, 1), 16, True)(rgb)
    assert np.array_equal(full[0], half[0])
    assert half[1].shape == (3, 4)
    means = full[1][:4, :6].reshape(2, 2, 3, 2).mean((1, 3))
    assert np.abs(half[1][:2, :3] - means).max() <= 1
    assert abs(int(half[1][2, 3]) - int(full[1][4, 6])) <= 1, "a corner stands for itself"


LOSSLESS = [
    (name, depth, channels)
    for name in ("a.mkv", "folder", "a.y4m")
    for depth in choose(name).codec.depths
    for channels in (1, 3, 4)
    if not (channels == 4 and (name == "a.y4m" or depth == 14))
]


@pytest.mark.parametrize(("name", "depth", "channels"), LOSSLESS)
@pytest.mark.parametrize("size", [(32, 48), (33, 49)])
def test_lossless_comes_back(
    tmp_path: Path, name: str, depth: int, channels: int, size: tuple[int, int]
) -> None:
    image = picture(*size, channels, depth)
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    writer = write(path, image, [0, 1, 2], format=Format(depth=depth))
    back, times = read(path, channels)
    assert times == [0, Fraction(1, 25), Fraction(2, 25)]
    assert all("matrix" in note for note in writer.notes)
    # RGB is rounded once to the depth, YUV of 4:4:4 thrice, and a level of it is more than one
    steps = 0.5 if choose(path, Format(depth=depth)).name != "y4m" or channels == 1 else 1.9
    assert np.abs(back.astype(int) - image).max() <= np.ceil(
        steps * np.iinfo(image.dtype).max / (2**depth - 1) + (depth > 8)
    ) * (depth not in (8, 16) or steps > 1)


# Beside ffmpeg ---------------------------------------------------------------------------------


def by_ffmpeg(ffmpeg: str, path: Path, channels: int, deep: bool) -> Image:
    """Frames as the command converts them."""
    name = ("gray16le" if deep else "gray") if channels == 1 else ("rgb48le" if deep else "rgb24")
    said = subprocess.run(
        [ffmpeg, "-v", "error", "-i", str(path), "-vsync", "passthrough", "-f", "rawvideo",
         "-pix_fmt", name, "-sws_flags", "bilinear+accurate_rnd+full_chroma_int", "-"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert not said.stderr
    with VideoReader(path, channels=channels) as video:
        shape = (-1, video.info.height, video.info.width, channels)
    return np.frombuffer(said.stdout, "<u2" if deep else np.uint8).reshape(shape)


def by_ffprobe(path: Path, *what: str) -> Any:
    said = subprocess.run(
        ["ffprobe", "-v", "error", *what, "-of", "json", str(path)],
        check=True, capture_output=True,
    )  # fmt: skip
    return json.loads(said.stdout)


RATES: dict[str, tuple[list[int], Fraction]] = {
    "constant": ([0, 1, 2, 3, 4], Fraction(1, 25)),
    "ntsc": ([0, 1001, 2002, 3003, 4004], Fraction(1, 30000)),
    "variable": ([300, 1500, 2400, 9000, 12000], Fraction(1, 30000)),
}
MATRIX_NAMES = {1: "bt709", 6: "smpte170m", 9: "bt2020nc"}
GRID = [
    (name, codec, depth, matrix, range_, parity, rate)
    for name, codec, depths in (
        ("a.mp4", "h264", (8, 10)), ("a.mov", "h265", (8, 10)), ("a.mkv", "h264", (8, 10)),
        ("b.mkv", "h265", (8, 10)), ("a.webm", "vp9", (8,)), ("c.mkv", "ffv1", (8, 10, 16)),
    )
    for depth in depths
    for matrix in MATRIX_NAMES
    for range_ in (1, 2)
    for parity in ("even", "odd")
    for rate in RATES
]  # fmt: skip
QUICK = {
    ("a.mp4", "h264", 8, 1, 1, "even", "variable"), ("a.mp4", "h264", 10, 6, 2, "odd", "ntsc"),
    ("a.mov", "h265", 10, 9, 1, "even", "ntsc"), ("a.webm", "vp9", 8, 1, 1, "odd", "constant"),
    ("c.mkv", "ffv1", 10, 1, 1, "odd", "variable"), ("b.mkv", "h265", 8, 6, 1, "odd", "variable"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "codec", "depth", "matrix", "range_", "parity", "rate"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in GRID
    ],
)  # fmt: skip
def test_ffmpeg_sees_what_was_written(
    tmp_path: Path, ffmpeg: str, name: str, codec: str, depth: int, matrix: int, range_: int,
    parity: str, rate: str,
) -> None:  # fmt: skip
    path, (pts, base) = tmp_path / name, RATES[rate]
    size = (64, 96) if parity == "even" else (67, 101)
    image = picture(*size, 3, depth)
    colour = Colour(9 if matrix == 9 else 1, 14 if matrix == 9 else 1, matrix, range_)
    quality = 1 if codec in LOSSY else None
    fps = Fraction(25) if rate == "constant" else Fraction(30000, 1001)
    form = Format(codec=codec, depth=depth, quality=quality)
    writer = write(path, image, pts, base, fps, format=form, colour=colour)
    assert writer.notes == []

    ours, theirs = read(path)[0], by_ffmpeg(ffmpeg, path, 3, depth > 8)
    assert len(ours) == len(theirs) == len(pts)
    # a rate factor of 1 is nearly lossless; ffmpeg's RGB of 16 bits has its white at 65280
    bound = 0.51 if codec == "ffv1" else 3.0
    for frame in range(len(pts)):
        assert furthest(ours[frame], image) <= bound
        assert furthest(theirs[frame], image) <= bound + (depth > 8) * (codec != "ffv1")

    stream = by_ffprobe(path, "-show_streams")["streams"][0]
    wanted: dict[str, object] = {"width": size[1], "height": size[0]}
    if codec != "ffv1":  # whose numbers are red, green and blue
        wanted |= {"color_space": MATRIX_NAMES[matrix], "color_range": ("tv", "pc")[range_ - 1]}
    wanted["color_primaries"] = "bt2020" if matrix == 9 else "bt709"
    assert wanted.items() <= stream.items()
    assert stream["codec_name"] == {"h265": "hevc"}.get(codec, codec)
    if codec in ("h264", "h265") and parity == "even":
        assert stream["chroma_location"] == "center"
    if name.endswith(".mov") and codec == "h265":
        assert stream["codec_tag_string"] == "hvc1"

    frames = by_ffprobe(path, "-show_frames", "-select_streams", "v")["frames"]
    times = [float(frame["pts_time"]) for frame in frames]
    slack = 0.0005 if name.endswith(("mkv", "webm")) else 0
    assert times == pytest.approx([float(stamp * base) for stamp in pts], abs=slack + 1e-6)


@pytest.mark.parametrize("codec", ["h264", "h265", "vp9", "ffv1"])
def test_grey_is_grey_to_ffmpeg(tmp_path: Path, ffmpeg: str, codec: str) -> None:
    image, path = picture(64, 96, 1, 8), tmp_path / ("a.webm" if codec == "vp9" else "a.mkv")
    write(path, image, [0, 1], format=Format(codec=codec, quality=1 if codec in LOSSY else None))
    colours = by_ffmpeg(ffmpeg, path, 3, False)[0]
    assert np.abs(colours.astype(int) - image).max() <= (2 if codec in LOSSY else 0)
    assert np.abs(read(path, 1)[0][0].astype(int) - image).max() <= (2 if codec in LOSSY else 0)


@pytest.mark.parametrize("depth", [8, 16])
def test_raw_rgb_is_the_numbers(tmp_path: Path, depth: int) -> None:
    image = picture(9, 11, 3, depth)
    writer = write(tmp_path / "a.rgb", image, [0, 1], format=Format(depth=depth))
    kind = np.uint8 if depth == 8 else "<u2"
    assert np.array_equal(np.fromfile(tmp_path / "a.rgb", kind).reshape(2, 9, 11, 3), [image] * 2)
    pixels = "rgb24" if depth == 8 else "rgb48le"
    assert writer.notes == [
        "headerless RGB states neither size nor rate: read it with ffmpeg -f rawvideo "
        f"-pix_fmt {pixels} -s 11x9 -r 25"
    ]


def test_pipes(tmp_path: Path, ffmpeg: str) -> None:
    """What goes into standard output is a video for another program."""
    codecs = ("y4m", "rgb", "ffv1", "h264")
    script = (
        "import os, sys, numpy as np; from fractions import Fraction\n"
        "from temporal_vae.video import Format, VideoWriter\n"
        "for codec in sys.argv[1:]:\n"
        "    os.dup2(os.open(codec, os.O_CREAT | os.O_WRONLY), 1)\n"
        "    with VideoWriter('-', 64, 96, Fraction(25), format=Format(codec=codec)) as writer:\n"
        "        for i in range(3): writer.write(np.full((64, 96, 3), 80 * i, np.uint8), i)\n"
    )
    subprocess.run([sys.executable, "-c", script, *codecs], check=True, cwd=tmp_path)
    for codec in codecs:
        shape = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x64"] if codec == "rgb" else []
        said = subprocess.run(
            [ffmpeg, "-v", "error", *shape, "-i", str(tmp_path / codec), "-f", "rawvideo",
             "-pix_fmt", "rgb24", "-sws_flags", "accurate_rnd+full_chroma_int", "-"],
            check=True, capture_output=True,
        )  # fmt: skip
        frames = np.frombuffer(said.stdout, np.uint8).reshape(3, 64, 96, 3)
        assert np.abs(frames - np.array([0, 80, 160]).reshape(3, 1, 1, 1)).max() <= 2


# Timestamps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm"])
def test_timestamps_with_b_frames(tmp_path: Path, name: str) -> None:
    stamps = [500, 1500, 2000, 4500, 5500, 9500, 10000, 11000, 12500]
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    codec = "vp9" if name == "a.webm" else "h264"
    write(tmp_path / name, image, stamps, Fraction(1, 30000), format=Format(codec=codec))
    slack = 0.0005 if name in ("a.mkv", "a.webm") else 0
    times = [float(time) for time in read(tmp_path / name)[1]]
    assert times == pytest.approx([stamp / 30000 for stamp in stamps], abs=slack + 1e-9)


def test_timestamps_that_are_lost_are_told(tmp_path: Path) -> None:
    image = picture(8, 8, 3, 8)
    for stamps, lost in (([0, 1, 2], None), ([3, 4, 5], "start"), ([0, 1, 5], "timestamps")):
        folder = tmp_path / str(lost)
        folder.mkdir()
        said = " ".join(write(folder, image, stamps).notes)
        assert (lost is None and said == "") or f"its {lost} cannot be kept" in said


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_frames_within_a_millisecond(tmp_path: Path, name: str) -> None:
    with pytest.raises(VideoError, match=r"less than a millisecond apart .*: take .mp4"):
        write(tmp_path / name, picture(64, 64, 3, 8), [0, 30], Fraction(1, 90000))


# What is refused -------------------------------------------------------------------------------

REFUSED = [
    ("a.avi", Format(), (8, 8, 3), r"must end in .mp4 .*\.webm \(VP9\).*folder"),
    ("a.mp4", Format(codec="vp9"), (8, 8, 3), "h264 or h265, and vp9 is written to .mkv, .webm"),
    ("a.mkv", Format(codec="av1"), (8, 8, 3), "no codec 'av1': there are h264"),
    ("a.mkv", Format(codec=""), (8, 8, 3), "no codec '': there are h264"),
    ("a.mp4", Format(depth=0), (8, 8, 3), "with 8, 10 bits, not 0"),
    ("a.webm", Format(depth=10), (8, 8, 3), "with 8 bits, not 10: take h264 or h265 or ffv1"),
    ("a.mp4", Format(quality=52), (8, 8, 3), r"0 \(best\) to 51, not 52"),
    ("a.mkv", Format(quality=3), (8, 8, 3), "loses nothing"),
    ("a.mp4", Format(), (8, 8, 4), r"alpha: take .mkv \(FFV1\), PNG or WebP"),
    ("a.mkv", Format(depth=14), (8, 8, 4), "alpha is written with 8, 10, 12, 16 bits"),
    ("a.mp4", Format(codec="h265"), (63, 64, 3), "from 64x64 on, not 64x63: take codec h264"),
    ("a.mkv", Format(), (8, 8, 2), "not 2"),
    ("folder", Format(codec="ffv1"), (8, 8, 3), "a folder, .* holds png"),
]


@pytest.mark.parametrize(("name", "form", "shape", "message"), REFUSED)
def test_what_cannot_be_written(
    tmp_path: Path, name: str, form: Format, shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(VideoError, match=message) as error:
        write(tmp_path / name, np.zeros(shape, np.uint8), [0], format=form)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_frames_of_another_shape_are_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mkv", 8, 8, Fraction(25)) as writer:
        writer.write(np.zeros((8, 8, 3), np.uint8), 0)
        for wrong in (np.zeros((8, 9, 3), np.uint8), np.zeros((8, 8, 3), np.float32)):
            with pytest.raises(ValueError, match="frames must be uint8 or uint16"):
                writer.write(wrong, 1)


def test_the_depth_that_keeps_a_source() -> None:
    found = {
        (name, bits): depth_for(name, Format(), bits)
        for name in ("a.mkv", "a.mp4", "a.webm", "a")
        for bits in (8, 10, 12)
    }
    assert [found["a.mkv", bits] for bits in (8, 10, 12)] == [8, 10, 12]
    assert [found["a.mp4", bits] for bits in (8, 10, 12)] == [8, 10, 10]
    assert [found["a.webm", bits] for bits in (8, 10, 12)] == [8, 8, 8]
    assert [found["a", bits] for bits in (8, 10, 12)] == [8, 16, 16]
    assert depth_for("a.mkv", Format(depth=16), 8) == 16


# Sound and subtitles ---------------------------------------------------------------------------

SUBTITLES = """1
00:00:00,500 --> 00:00:01,500
first

2
00:00:02,000 --> 00:00:03,000
second
"""


@pytest.fixture(scope="session")
def talking(ffmpeg: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of four seconds with sound, or with sound and subtitles, by name."""
    folder = tmp_path_factory.mktemp("talking")
    (folder / "a.srt").write_text(SUBTITLES)
    inputs = ["-f", "lavfi", "-i", "testsrc2=s=32x32:r=10:d=4", "-f", "lavfi", "-i", "sine=440:d=4",
              "-i", str(folder / "a.srt")]  # fmt: skip
    made = {
        "aac.mp4": ["-c:a", "aac", "-c:s", "mov_text", "-metadata:s:a:0", "language=deu"],
        "pcm.mkv": ["-c:a", "pcm_s16le", "-c:s", "srt", "-disposition:s:0", "forced"],
        "late.mp4": ["-c:a", "aac", "-c:s", "mov_text", "-output_ts_offset", "1.5"],
        "flac.mkv": ["-c:a", "flac", "-c:s", "ass"],
    }
    for name, words in made.items():
        subprocess.run(
            [ffmpeg, "-v", "error", *inputs, "-c:v", "libx264", *words, str(folder / name)],
            check=True,
        )  # fmt: skip
    return {name: folder / name for name in made}


def packets(path: Path, kind: str) -> list[tuple[float, float, bytes]]:
    """Time, duration and bytes of the packets of a stream."""
    with av.open(str(path)) as container:
        streams = [s for s in container.streams if s.type == kind]
        if not streams:
            return []
        return [
            (float(p.pts * p.time_base), float((p.duration or 0) * p.time_base), bytes(p))
            for p in container.demux(streams)
            if p.size and p.pts is not None
        ]


def copy(source: Path, target: Path, **options: Any) -> list[str]:
    with VideoReader(source) as reader, CopiedStreams(source, **options) as copied:
        info = reader.info
        shape = (info.height, info.width, info.fps, info.time_base)
        with VideoWriter(target, *shape, copied=copied) as writer:
            for frame in reader:
                writer.write(frame.image, frame.pts)
    return writer.notes


HELD = [
    ("aac.mp4", "o.mp4", {"audio", "subtitle"}), ("aac.mp4", "o.mkv", {"audio"}),
    ("aac.mp4", "o.mov", {"audio", "subtitle"}), ("aac.mp4", "o.webm", set()),
    ("pcm.mkv", "o.mkv", {"audio", "subtitle"}), ("pcm.mkv", "o.mp4", {"audio"}),
    ("late.mp4", "o.mp4", {"audio", "subtitle"}), ("late.mp4", "o.mkv", {"audio"}),
    ("flac.mkv", "o.mkv", {"audio", "subtitle"}), ("flac.mkv", "o.mov", set()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "target", "held"), HELD, ids=[f"{n}-{t}" for n, t, _ in HELD])
def test_streams_are_copied_to_the_byte(
    tmp_path: Path, talking: dict[str, Path], name: str, target: str, held: set[str]
) -> None:
    source, out = talking[name], tmp_path / target
    notes = copy(source, out)
    for kind, index in (("audio", 1), ("subtitle", 2)):
        before, after = packets(source, kind), packets(out, kind)
        left_out = f"{kind} stream {index} is left out: "
        assert len(before) >= 2
        if kind not in held:
            assert after == [] and any(note.startswith(left_out) for note in notes)
            continue
        assert not any(note.startswith(left_out) for note in notes)
        assert [data for *_, data in after] == [data for *_, data in before]
        times = [time for time, *_ in before]
        assert [time for time, *_ in after] == pytest.approx(times, abs=0.00051)
    assert [float(t) for t in read(out)[1]] == pytest.approx(
        [float(t) for t in read(source)[1]], abs=0.00051
    )
    if name == "aac.mp4" and target in ("o.mp4", "o.mkv"):
        with av.open(str(out)) as container:
            assert container.streams.audio[0].language == "deu"
    if name == "pcm.mkv" and target == "o.mkv":
        with av.open(str(out)) as container:
            assert container.streams.subtitles[0].disposition == av.stream.Disposition.forced


def test_sound_keeps_its_own_clock(tmp_path: Path, talking: dict[str, Path]) -> None:
    """mp4 counts starts in the clock of the movie, which frames alone would make too coarse."""
    late = Fraction(1513, 1000)
    with CopiedStreams(talking["aac.mp4"], shift=late) as copied:
        write(tmp_path / "a.mp4", picture(32, 32, 3, 8), [0, 1, 2], copied=copied)
    before, after = (packets(p, "audio")[0][0] for p in (talking["aac.mp4"], tmp_path / "a.mp4"))
    assert after == pytest.approx(before + late, abs=1e-4)


def test_packets_are_interleaved_in_time(tmp_path: Path) -> None:
    """No stream runs ahead of the other by more than a frame, or a player must seek."""
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * 30), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with CopiedStreams(tmp_path / "a.wav") as copied:
        image, seconds = picture(8, 8, 3, 8), list(range(30))
        write(tmp_path / "a.mkv", image, seconds, Fraction(1), Fraction(1), copied=copied)
    with av.open(str(tmp_path / "a.mkv")) as container:
        latest = {0: 0.0, 1: 0.0}
        for packet in container.demux():
            if packet.size and packet.dts is not None:
                latest[packet.stream.index] = float(packet.dts * packet.time_base)
                assert abs(latest[0] - latest[1]) < 2
    assert latest[1] > 29


def test_a_cut_takes_the_sound_of_the_cut(tmp_path: Path, talking: dict[str, Path]) -> None:
    source = talking["pcm.mkv"]
    copy(source, tmp_path / "a.mkv", start=1, end=2.5, shift=-1)
    before = [p for p in packets(source, "audio") if 1 <= p[0] < 2.5]
    after = packets(tmp_path / "a.mkv", "audio")
    assert [data for *_, data in after] == [data for *_, data in before]
    assert [p[0] for p in after] == pytest.approx([p[0] - 1 for p in before], abs=0.0011)
    said = [(round(time, 3), round(length, 3), data) for time, length, data in
            packets(tmp_path / "a.mkv", "subtitle")]  # fmt: skip
    assert said == [(0, 0.5, b"first"), (1, 0.5, b"second")]


def test_sound_moves_with_frames_from_below_zero(tmp_path: Path) -> None:
    source, base = tmp_path / "a.mkv", Fraction(1, 1000)
    with av.open(str(source), "w", options={"avoid_negative_ts": "disabled"}) as container:
        video, sound = (
            container.add_stream("ffv1", rate=25),
            container.add_stream("pcm_s16le", 8000),
        )
        video.width, video.height, video.pix_fmt = 32, 32, "bgr0"
        video.time_base = video.codec_context.time_base = base
        for index in range(6):
            frame = av.VideoFrame(32, 32, "bgr0")
            frame.pts, frame.time_base = 40 * index - 120, base
            container.mux(video.encode(frame))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), "s16", "mono")
            samples.sample_rate, samples.pts = 8000, 320 * index - 960
            samples.time_base = Fraction(1, 8000)
            container.mux(sound.encode(samples))
    reconstructing.reconstruct(source, tmp_path / "b.mkv", awake(torch.float32))
    assert [time for time, *_ in packets(source, "audio")] == pytest.approx(
        [time - 0.12 for time, *_ in packets(tmp_path / "b.mkv", "audio")], abs=0.0011
    )


def test_sound_may_end_with_the_frames(tmp_path: Path, talking: dict[str, Path]) -> None:
    source = talking["pcm.mkv"]
    with CopiedStreams(source, to_last_frame=True) as copied:
        write(tmp_path / "a.mkv", picture(32, 32, 3, 8), list(range(10)), copied=copied)
    assert 0.3 < packets(tmp_path / "a.mkv", "audio")[-1][0] < 0.4


def test_a_stream_that_only_fails_at_the_end_is_left_out_before(tmp_path: Path) -> None:
    """A container that takes a stream's header, and not its packets."""
    source = tmp_path / "a.mkv"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("pcm_s24le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int32), "s32", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    for name in ("b.mp4", "b.mov", "b.mkv", "b.webm"):
        with CopiedStreams(source) as copied:
            writer = write(tmp_path / name, picture(32, 32, 3, 8), [0, 1], copied=copied)
        assert len(read(tmp_path / name)[0]) == 2
        told = any("audio stream 0 is left out" in note for note in writer.notes)
        assert told != bool(packets(tmp_path / name, "audio"))


def test_a_pipe_has_nothing_to_copy(tmp_path: Path) -> None:
    with CopiedStreams("-") as copied:
        writer = write(tmp_path / "a.mkv", picture(8, 8, 3, 8), [0], copied=copied)
    assert writer.notes == ["sound and subtitles of a pipe, which is read once, are left out"]


def test_sound_that_an_edit_list_hides_stays_hidden(
    tmp_path: Path, ffmpeg: str, talking: dict[str, Path]
) -> None:
    """Cut without encoding, the file has all from a keyframe on, and a list of what to show."""
    source, out = tmp_path / "a.mp4", tmp_path / "b.mkv"
    cut = ["-ss", "1", "-i", str(talking["aac.mp4"]), "-c", "copy", "-sn"]
    subprocess.run([ffmpeg, "-v", "error", *cut, str(source)], check=True)
    copy(source, out)
    before, after = packets(source, "audio"), packets(out, "audio")
    assert before[0][0] < -0.9 and len(after) < len(before)
    heard = [data for time, _, data in before if time > -0.1]
    assert [data for *_, data in after] == heard


def test_sound_beside_a_stream_that_begins_on_the_way(
    tmp_path: Path, talking: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end PyAV may look for such a stream where it is not."""
    from temporal_vae.video.write import remux

    class Stumbling:
        def __init__(self, truth: Any):
            self.truth = truth

        def __getattr__(self, name: str) -> Any:
            return getattr(self.truth, name)

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            self.truth.close()

        def demux(self, streams: Any) -> Iterator[Any]:
            yield from self.truth.demux(streams)
            raise IndexError("list index out of range")

    honest = remux._open
    monkeypatch.setattr(remux, "_open", lambda path: Stumbling(honest(path)))
    source, out = talking["pcm.mkv"], tmp_path / "a.mkv"
    copy(source, out)
    assert packets(out, "audio") == packets(source, "audio")


def test_packets_that_a_container_refuses_are_told(
    tmp_path: Path, talking: dict[str, Path]
) -> None:
    class Refusing:
        def __init__(self, truth: Any):
            self.truth = truth

        def __getattr__(self, name: str) -> Any:
            return getattr(self.truth, name)

        def mux_one(self, packet: Any) -> None:
            if packet.stream.type == "audio":
                raise av.error.InvalidDataError(1, "damaged")
            self.truth.mux_one(packet)

    source = talking["aac.mp4"]
    with CopiedStreams(source) as copied:
        writer = VideoWriter(tmp_path / "a.mp4", 8, 8, Fraction(25), copied=copied)
        file: Any = writer._output
        file._container = Refusing(file._container)
        with writer:
            writer.write(picture(8, 8, 3, 8), 0)
    count = len(packets(source, "audio"))
    assert writer.notes == [f"{count} packets of stream 1 are damaged, and left out"]
    assert len(packets(tmp_path / "a.mp4", "subtitle")) == len(packets(source, "subtitle"))


def test_sound_beside_a_title_in_another_alphabet(tmp_path: Path) -> None:
    source = tmp_path / "a.mkv"
    with av.open(str(source), "w") as container:
        container.metadata["title"] = "abcdef"
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    source.write_bytes(source.read_bytes().replace(b"abcdef", "déjàvu".encode("latin-1")))
    with CopiedStreams(source) as copied:
        write(tmp_path / "b.mkv", picture(8, 8, 3, 8), [0], copied=copied)
    assert len(packets(tmp_path / "b.mkv", "audio")) == 1


def test_a_named_pipe_is_read_once(tmp_path: Path) -> None:
    """Neither sought, nor opened again for its sound, which would take from the frames or wait."""
    write(tmp_path / "a.mkv", picture(16, 16, 3, 8), list(range(9)))
    fifo, model = tmp_path / "fifo", awake(torch.float32)
    os.mkfifo(fifo)
    found: list[ends.Summary] = []

    def work() -> None:
        found.append(
            reconstructing.reconstruct(fifo, tmp_path / "b.mkv", model, options={"start": 0.2})
        )

    threads = [threading.Thread(target=work, daemon=True) for work in
               (work, lambda: fifo.write_bytes((tmp_path / "a.mkv").read_bytes()))]  # fmt: skip
    for thread in threads:
        thread.start()
    threads[0].join(20)
    assert found and found[0].frames == 4
    assert "sound and subtitles of a pipe" in " ".join(found[0].notes)


# Whole or not at all ---------------------------------------------------------------------------


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "frames"
    with pytest.raises(KeyError), writable(target) as partial:
        write(Path(partial), picture(8, 8, 3, 8), [0, 1])
        assert not target.exists()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with writable(target) as partial:
        write(Path(partial), picture(8, 8, 3, 8), [0, 1])
    assert sorted(p.name for p in target.iterdir()) == ["000001.png", "000002.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["frames"]
    with pytest.raises(FileExistsError, match="exists: a new folder needs a name that is free"):
        atomic_folder(target).__enter__()
    with pytest.raises(FileNotFoundError, match="nothing is not a folder"):
        atomic_folder(tmp_path / "nothing" / "frames").__enter__()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.y4m", "a.rgb", "a"])
def test_a_full_disk_is_one_line_and_no_file(small_disk: Path, name: str) -> None:
    noise = torch.rand(3, 16, 96, 96) * 2 - 1
    quality = 0 if name in ("a.mp4", "a.mov", "a.webm") else None
    with pytest.raises(VideoError, match=r"(?i)no space left") as error:
        save_video(noise, small_disk / name, fps=25, quality=quality)
    assert "\n" not in str(error.value)
    assert not list(small_disk.iterdir())


def test_a_place_that_is_read_only(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("a.mp4", "folder"):
        with pytest.raises(PermissionError, match="cannot write in"):
            save_video(torch.zeros(3, 1, 8, 8), small_disk / name, fps=25)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.y4m", "frames"])
def test_a_killed_process_leaves_no_name(tmp_path: Path, name: str) -> None:
    script = (
        "import os, signal, torch; from temporal_vae.video.write import save\n"
        "honest, count = save.VideoWriter.write, 0\n"
        "def write(self, image, pts):\n"
        "    honest(self, image, pts)\n"
        "    if pts == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "save.VideoWriter.write = write\n"
        f"save.save_video(torch.rand(3, 9, 64, 64), {str(tmp_path / name)!r}, fps=25)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.startswith("."), "it died before it wrote, or after"


# Tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mkv", "folder"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_save_and_load_are_inverse(tmp_path: Path, name: str, depth: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, channels, 3, 9, 11, generator=generator) * 2 - 1
    notes = save_video(video, tmp_path / name, fps=24, depth=depth)
    rate = 24 if name == "folder" else None  # which a folder does not state
    back, info = load_video(tmp_path / name, channels=channels, fps=rate)
    assert notes == () and back.shape == video.shape
    assert float((back - video).abs().max()) <= 1 / (2**depth - 1) + 1e-6
    again = tmp_path / f"again{Path(name).suffix}"
    save_video(back, again, info)
    once_more, info_again = load_video(again, channels=channels, fps=rate)
    assert torch.equal(back, once_more) and info_again.fps == 24


def test_frames_that_are_no_tensor_are_told_how_to_become_one(tmp_path: Path) -> None:
    """Such as pipelines give: arrays, and lists of pictures."""
    frames = [np.full((8, 8, 3), 40 * n, np.uint8) for n in range(3)]
    for given in (np.stack(frames), frames):
        with pytest.raises(ValueError, match=r"a video is a torch\.Tensor.*, got (ndarray|list)"):
            save_video(given, tmp_path / "a.mkv", fps=25)  # type: ignore[arg-type]
    clip = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 127.5 - 1  # as it is told
    save_video(clip, tmp_path / "a.mkv", fps=25)
    with VideoReader(tmp_path / "a.mkv") as reader:
        assert all(np.array_equal(f.image, g) for f, g in zip(reader, frames, strict=True))


def test_save_video_keeps_what_it_is_told(tmp_path: Path) -> None:
    video, base = torch.zeros(3, 3, 16, 16), Fraction(1, 30000)
    path = tmp_path / "a.mp4"
    colour = Colour(1, 1, 6, 2)
    save_video(video, path, fps=29.97, timestamps=[0, 900, 5000], time_base=base, colour=colour)
    with VideoReader(path) as reader:
        info = reader.info
        assert [frame.pts * info.time_base / base for frame in reader] == [0, 900, 5000]
    assert (info.colour.matrix, info.colour.range) == (6, 2)
    save_video(video, tmp_path / "b.mp4", info)
    assert load_video(tmp_path / "b.mp4")[1].colour == info.colour
    deep = replace(info, bit_depth=10)
    save_video(video, tmp_path / "c.mp4", deep)
    assert load_video(tmp_path / "c.mp4")[1].pixel_format == "yuv420p10le"
    (note,) = save_video(video, tmp_path / "c.webm", deep)
    assert note == "its 10 bits are written as 8, the most that VP9 is written with"
    assert save_video(video, tmp_path / "c.webm", deep, depth=8) == ()
    save_video(video, tmp_path / "d.mp4", fps=29.97)
    with VideoReader(tmp_path / "d.mp4") as reader:
        times = [frame.pts * reader.info.time_base for frame in reader]
    assert times == [Fraction(1001, 30000) * index for index in range(3)]


def test_save_video_refuses(tmp_path: Path) -> None:
    video = torch.zeros(3, 2, 8, 8)
    for wrong, options, message in (
        (torch.zeros(2, 3, 2, 8, 8), {"fps": 1}, "one by one"),
        (torch.zeros(3, 8, 8), {"fps": 1}, r"\(1, C, T, H, W\)"),
        (torch.zeros(3, 0, 8, 8), {"fps": 1}, r"\(1, C, T, H, W\)"),
        (video, {}, "give it, or an info"),
        (video, {"fps": 1, "timestamps": [1]}, "2 frames need as many timestamps, got 1"),
        (video * torch.nan, {"fps": 1}, "NaN"),
        (video.to(torch.uint8), {"fps": 1}, "not in uint8: bytes are"),
        (video, {"fps": 1, "timestamps": [1, 1]}, "got 1 after 1 at frame 1"),
        (
            video,
            {"fps": 1, "timestamps": [-1, 0]},
            "whole numbers that grow from 0 or above, got -1",
        ),
        (video, {"fps": 1, "timestamps": [0, 1.5]}, "got 1.5 after 0"),
        (video, {"fps": 0}, "fps must be above 0"),
        (video, {"fps": -25}, "fps must be above 0"),
        (video, {"fps": math.nan}, "fps must be above 0"),
    ):
        for name in ("a.mkv", "a.mp4"):
            with pytest.raises((ValueError, VideoError), match=message):
                save_video(wrong, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


# Through a model -------------------------------------------------------------------------------


def test_reconstruct_passes_on_what_the_source_has(
    tmp_path: Path, ffmpeg: str, talking: dict[str, Path]
) -> None:
    model = awake(torch.float32)
    source = tmp_path / "in.mkv"
    subprocess.run(
        [ffmpeg, "-v", "error", "-i", str(talking["pcm.mkv"]), "-t", "0.5", "-c:a", "copy",
         "-c:s", "copy", "-c:v", "libx264", "-pix_fmt", "yuv420p10le", "-color_primaries", "bt2020",
         "-color_trc", "bt2020-10", "-colorspace", "bt2020nc", str(source)], check=True,
    )  # fmt: skip
    out = tmp_path / "out.mp4"
    summary = reconstructing.reconstruct(source, out, model)
    info = VideoReader(out).info
    assert (info.pixel_format, info.codec) == ("yuv420p10le", "h264")
    assert info.colour == VideoReader(source).info.colour
    assert (info.colour.primaries, info.colour.transfer, info.colour.matrix) == (9, 14, 9)
    assert [p[2] for p in packets(out, "audio")] == [p[2] for p in packets(source, "audio")]
    said = " ".join(summary.notes)
    assert "not copied" not in said and "tag" not in said
    assert "subtitle stream 2 is left out: mp4 does not hold subrip, .mkv may" in said

    summary = reconstructing.reconstruct(source, tmp_path / "out", model, format=Format(depth=8))
    assert len(list((tmp_path / "out").iterdir())) == summary.frames == 5
    assert "audio stream 1 is not copied" in " ".join(summary.notes)
    assert "primaries' tag (9) is not carried over" in " ".join(summary.notes)


def test_reconstruct_cuts_the_sound(tmp_path: Path, talking: dict[str, Path]) -> None:
    model, source = awake(torch.float32), talking["pcm.mkv"]
    reconstructing.reconstruct(
        source, tmp_path / "a.mkv", model, options={"start": 1.0, "frames": 5}
    )
    before = [p for p in packets(source, "audio") if 1 <= p[0] < 1.5]
    after = packets(tmp_path / "a.mkv", "audio")
    assert [data for *_, data in after] == [data for *_, data in before]
    assert [p[0] for p in after] == pytest.approx([p[0] - 1 for p in before], abs=0.0011)
    assert read(tmp_path / "a.mkv")[1][0] == 0

    notes = reconstructing.reconstruct(
        source, tmp_path / "b.mkv", model, options={"stride": 8}
    ).notes
    assert packets(tmp_path / "b.mkv", "audio") == []
    assert "sound and subtitles are left out" in " ".join(notes)
