"""Video in and out: what comes back, and what is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from temporal_vae.cli.info import describe_video
from temporal_vae.video import (
    Uint8Frames,
    VideoError,
    VideoReader,
    VideoWriter,
    read_clip,
    to_bytes,
    to_pixels,
)


def noise(frames: int, height: int, width: int) -> Uint8Frames:
    shape = (frames, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def smooth(frames: int, height: int, width: int) -> Uint8Frames:
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    return np.stack([255 * x, 255 * y, 255 * t], -1).round().astype(np.uint8)


def write(
    path: Path, clip: Uint8Frames, pts: list[int] | None = None, base: Fraction | None = None
) -> Path:
    with VideoWriter(path, clip.shape[1], clip.shape[2], Fraction(25), base) as writer:
        for index, image in enumerate(clip):
            writer.write(image, index if pts is None else pts[index])
    return path


def encode(
    path: Path, pixel_format: str, codec: str, frames: int = 4, size: int = 32, **tags: int
) -> Path:
    """A file made straight with a codec, for what our writer never writes."""
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=25))
        stream.width = stream.height = size
        stream.pix_fmt = pixel_format
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for image in smooth(frames, size, size):
            frame = VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixel_format)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("frames", [1, 2, 13])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1), (2, 7)])
def test_mkv_is_lossless(tmp_path: Path, frames: int, size: tuple[int, int]) -> None:
    clip = noise(frames, *size)
    assert np.array_equal(read_clip(write(tmp_path / "a.mkv", clip)), clip)


@pytest.mark.parametrize("frames", [1, 2, 13, 97])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (16, 17)])
def test_mp4_keeps_count_and_size(tmp_path: Path, frames: int, size: tuple[int, int]) -> None:
    clip = smooth(frames, *size)
    back = read_clip(write(tmp_path / "a.mp4", clip))
    assert back.shape == clip.shape
    assert np.abs(back.astype(int) - clip).mean() < 3


def test_mp4_is_h264_at_a_low_crf(tmp_path: Path) -> None:
    with av.open(str(write(tmp_path / "a.mp4", smooth(3, 32, 32)))) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert context.colorspace == context.color_primaries == context.color_trc == 1
    odd = VideoReader(write(tmp_path / "b.mp4", smooth(3, 33, 32)))
    assert odd.info.pixel_format == "yuv444p"
    assert b"crf=14" in (tmp_path / "a.mp4").read_bytes()


def test_colours_survive(tmp_path: Path) -> None:
    """Bars of pure colours, through BT.709 and back."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (30, 200, 120)]
    clip = np.repeat(np.array(colours, np.uint8)[None, None], 32, 2).repeat(64, 1).repeat(3, 0)
    for name in ("a.mp4", "a.mkv"):
        back = read_clip(write(tmp_path / name, clip)).astype(int)
        assert np.abs(back[:, :, 16::32] - clip[:, :, 16::32]).max() <= 2


@pytest.mark.parametrize("size", [576, 720])
def test_an_untagged_file_is_read_as_players_do(tmp_path: Path, size: int) -> None:
    """Untagged YUV is BT.601 below 720 lines and BT.709 from there on."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, size, "yuv444p"
        matrix = "ITU601" if size < 720 else "ITU709"
        image = np.full((size, 64, 3), (200, 40, 90), np.uint8)
        frame = VideoFrame.from_ndarray(image, format="rgb24")
        frame = frame.reformat(format="yuv444p", dst_colorspace=matrix)
        frame.colorspace = 2
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(read_clip(path)[0].astype(int) - image).max() <= 3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_timestamps_are_kept(tmp_path: Path, suffix: str) -> None:
    """A variable frame rate with a start that is not zero."""
    pts, base = [500, 1500, 2000, 4500, 5500, 9500, 10000], Fraction(1, 30000)
    path = write(tmp_path / f"a{suffix}", smooth(7, 32, 32), pts, base)
    with VideoReader(path) as video:
        times = [float(frame.pts * video.info.time_base) for frame in video]
    tolerance = 1e-9 if suffix == ".mp4" else 0.0005001  # Matroska counts milliseconds
    assert np.abs(np.array(times) - np.array(pts) / 30000).max() <= tolerance


def test_scaling_keeps_the_shape_of_the_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", smooth(2, 90, 160))
    assert read_clip(path, width=80).shape == (2, 45, 80, 3)
    assert read_clip(path, frames=1, width=80, multiple=8).shape == (1, 48, 80, 3)
    with VideoReader(path, width=80, multiple=8) as video:
        assert video.size == (48, 80)


def test_pixels_and_bytes_are_inverse() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    video = to_pixels(levels)
    assert video.shape == (1, 3, 1, 16, 16)
    assert (float(video.min()), float(video.max())) == (-1.0, 1.0)
    assert np.array_equal(to_bytes(video), levels)
    assert to_bytes(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 1, 2)).flatten().tolist() == [0, 255]


# Refused or reported -------------------------------------------------------------------------


def text_file(path: Path) -> None:
    path.write_text("this is not a video\n" * 100)


def audio_only(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))


UNREADABLE: list[tuple[str, Callable[[Path], object], str]] = [
    ("a folder", lambda p: p.mkdir(), "folder"),
    ("missing", lambda p: None, "no such file"),
    ("empty", lambda p: p.touch(), "not a video that can be read"),
    ("text", text_file, "not a video that can be read"),
    ("audio only", audio_only, "no video stream, only audio"),
]


@pytest.mark.parametrize(
    ("make", "message"), [u[1:] for u in UNREADABLE], ids=[u[0] for u in UNREADABLE]
)
def test_what_is_no_video(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "thing.mp4"
    make(path)
    with pytest.raises(VideoError, match=message) as error:
        read_clip(path)
    assert "\n" not in str(error.value)


UNSUPPORTED = [
    ("yuva420p", "ffv1", {}, "alpha"),
    ("bgra", "ffv1", {}, "alpha"),
    ("yuv420p", "libx264", {"color_trc": 16}, "PQ"),
    ("yuv420p", "libx264", {"color_trc": 18}, "HLG"),
]


@pytest.mark.parametrize(("pixel_format", "codec", "tags", "message"), UNSUPPORTED)
def test_what_would_be_lost_is_refused(
    tmp_path: Path, pixel_format: str, codec: str, tags: dict[str, int], message: str
) -> None:
    path = encode(tmp_path / "a.mkv", pixel_format, codec, **tags)
    with pytest.raises(VideoError, match=message):
        VideoReader(path)


def test_alpha_beside_a_vp9_stream_is_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.webm", "yuva420p", "libvpx-vp9")
    with pytest.raises(VideoError, match="alpha"):
        VideoReader(path)


def test_grey_is_read(tmp_path: Path) -> None:
    grey = read_clip(encode(tmp_path / "a.mkv", "gray", "ffv1"))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert grey.max() > grey.min() + 100


@pytest.mark.parametrize("full", [False, True])
def test_both_ranges_are_read(tmp_path: Path, full: bool) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        stream.codec_context.color_range = 2 if full else 1
        image = np.full((64, 64, 3), (250, 128, 6), np.uint8)
        frame = VideoFrame.from_ndarray(image, format="rgb24").reformat(
            format="yuv444p", dst_colorspace="ITU601", dst_color_range=2 if full else 1
        )
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(read_clip(path)[0].astype(int) - image).max() <= 3


def test_timestamps_below_zero_are_moved_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index, image in enumerate(smooth(6, 32, 32)):
            frame = VideoFrame.from_ndarray(image, format="rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = 40 * index - 120, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with VideoReader(path) as video:
        times = [round(float(frame.pts * video.info.time_base), 3) for frame in video]
        assert times == [0.0, 0.04, 0.08, 0.12, 0.16, 0.2]
        assert any("start at -0.120 s: moved to 0" in note for note in video.notes)


def test_a_name_that_looks_like_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.mp4", smooth(9, 32, 32))
    for name in ("file:x.mp4", "12:30.mp4", "concat:x.mp4|x.mp4"):
        (tmp_path / "y.mp4").unlink(missing_ok=True)
        write(tmp_path / "y.mp4", smooth(3, 32, 32)).rename(tmp_path / name)
        assert len(read_clip(name)) == 3
        with VideoWriter(name, 32, 32, Fraction(25)) as writer:
            writer.write(smooth(1, 32, 32)[0], 0)
        assert len(read_clip(name)) == 1


def test_the_shape_of_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 32, 32, Fraction(25), None, Fraction(4, 3)) as writer:
        writer.write(smooth(1, 32, 32)[0], 0)
    assert VideoReader(path).info.sample_aspect_ratio == Fraction(4, 3)


def test_what_is_tagged_and_not_carried_is_said(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", "yuv420p", "libx264", color_trc=8, color_primaries=9)
    assert [note.split("tag")[0] for note in VideoReader(path).info.notes] == [
        "the colour primaries' ",
        "the transfer's ",
        "its colours are not ",
    ]


def test_audio_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(audio.encode(sound))
        for image in smooth(3, 32, 32):
            container.mux(video.encode(VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
    assert "audio stream 1 is not copied" in VideoReader(path).info.notes
    told = describe_video(str(path))  # says what is there: `reconstruct` copies it
    assert told["beside it"] == "audio stream 1" and "copied" not in str(told)


def test_a_truncated_video_gives_its_frames_and_says_so(real_clip: Path, tmp_path: Path) -> None:
    moved = tmp_path / "index_first.mp4"
    with (
        av.open(str(real_clip)) as source,
        av.open(str(moved), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = moved.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: len(data) // 2])
    with VideoReader(cut) as video:
        count = sum(1 for _ in video)
        assert 0 < count < 132
        assert any(f"{count} of 132 frames" in note for note in video.notes)
    with VideoReader(moved) as video:
        assert sum(1 for _ in video) == 132
        assert [note for note in video.notes if "not tagged" not in note] == []


def test_a_video_without_its_index_is_refused(real_clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(real_clip.read_bytes()[:200_000])
    with pytest.raises(VideoError):
        read_clip(path)


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"must end in .mp4 \(H.264.* .mkv \(FFV1.* folder"):
        VideoWriter(tmp_path / "a.avi", 8, 8, Fraction(25))


def test_players_see_what_we_write(tmp_path: Path) -> None:
    """ffprobe, where it is installed, counts the frames and reads the tags."""
    try:
        subprocess.run(["ffprobe", "-version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("ffprobe is not installed")
    path = write(tmp_path / "a.mp4", smooth(11, 33, 47))
    fields = "width,height,nb_read_frames,color_space,color_range,pix_fmt"
    said = subprocess.run(
        ["ffprobe", "-v", "error", "-count_frames", "-show_entries", f"stream={fields}",
         "-of", "default=nw=1", str(path)],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert {"width=47", "height=33", "nb_read_frames=11", "color_space=bt709"} <= set(said)
