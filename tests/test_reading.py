"""Reading: colours, depths, ways up, alpha, timestamps, parts of a video, images, and how fast."""

from __future__ import annotations

import gc
import itertools
import math
import os
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from hypothesis import given, settings
from hypothesis import strategies as st
from test_video import noise, smooth, write

from temporal_vae import load_video, save_video
from temporal_vae.video import (
    Image,
    Selection,
    VideoError,
    VideoReader,
    VideoWriter,
    read_clip,
    to_bytes,
    to_pixels,
)
from temporal_vae.video.frames import exact_rate
from temporal_vae.video.read.orientation import turn
from temporal_vae.video.read.prefetch import Prefetcher, Recycler
from temporal_vae.video.read.selection import even

WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114),
           7: (0.212, 0.087), 9: (0.2627, 0.0593)}  # fmt: skip
"""Red's and blue's part of luma: BT.709, FCC (47 CFR 73.682), BT.601 twice, SMPTE 240M, BT.2020."""


# Files made straight with a codec -------------------------------------------------------------


def plane_arrays(frame: VideoFrame) -> list[Image]:
    kind = np.uint8 if frame.format.components[0].bits <= 8 else np.uint16
    return [
        np.frombuffer(cast(Any, p), kind).reshape(p.height, -1)[:, : p.width] for p in frame.planes
    ]


def fill(frame: VideoFrame, values: list[Image]) -> VideoFrame:
    for plane, value in zip(frame.planes, values, strict=True):
        whole = np.zeros((plane.height, plane.line_size // value.itemsize), value.dtype)
        whole[:, : plane.width] = value
        plane.update(whole.tobytes())
    return frame


def bars(name: str, height: int, width: int, limited: bool, index: int = 0) -> VideoFrame:
    """Ramps of luma over three broad bars of even chroma: how chroma is spread matters not."""
    frame = VideoFrame(width, height, name)
    bits = frame.format.components[0].bits
    low, high = (16 << bits - 8, 235 << bits - 8) if limited else (0, (1 << bits) - 1)
    kind = np.uint8 if bits <= 8 else np.uint16
    values = []
    for number, plane in enumerate(frame.planes):
        if number in (0, 3):
            ramp = np.linspace(low, high, plane.height + 2 * index)[index : index + plane.height]
            value = np.repeat(ramp[:, None], plane.width, 1)
        else:
            tints = np.array([0.5, 0.36, 0.62] if number == 1 else [0.5, 0.61, 0.41])
            value = tints[np.arange(plane.width) * 3 // plane.width] * (1 << bits)
            value = np.repeat(value[None], plane.height, 0)
        values.append(value.round().astype(kind))
    return fill(frame, values)


def encode_frames(
    path: Path,
    frames: list[VideoFrame],
    codec: str,
    stamps: list[int] | None = None,
    options: dict[str, str] | None = None,
    base: Fraction = Fraction(1, 12800),
    **tags: int,
) -> Path:
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=25, options=options or {}))
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = frames[0].format.name
        stream.time_base = stream.codec_context.time_base = base
        for name, value in tags.items():
            before = stream.codec_context.flags if name == "flags" else 0
            setattr(stream.codec_context, name, value | before)
        for index, frame in enumerate(frames):
            frame.time_base = base
            frame.pts = round(index / 25 / base) if stamps is None else stamps[index]
            if "colorspace" in tags:
                frame.colorspace, frame.color_range = tags["colorspace"], tags["color_range"]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decoded(path: Path) -> list[VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


# Colour ---------------------------------------------------------------------------------------


def by_the_standard(frame: VideoFrame, matrix: int, limited: bool) -> Image:
    """RGB in 0..1 by the formulas of the standards; chroma taken from the nearest sample."""
    bits = frame.format.components[0].bits
    planes = [p.astype(np.float64) for p in plane_arrays(frame)]
    step, top = 1 << bits - 8, (1 << bits) - 1
    y = (planes[0] - 16 * step) / (219 * step) if limited else planes[0] / top
    if len(planes) == 1:
        return np.repeat(y.clip(0, 1)[..., None], 3, 2)
    height, width = y.shape
    rows = np.arange(height) * planes[1].shape[0] // height
    columns = np.arange(width) * planes[1].shape[1] // width
    span = 224 * step if limited else top
    blue, red = ((p[rows][:, columns] - 128 * step) / span for p in planes[1:3])
    kr, kb = WEIGHTS[matrix]
    r, b = y + 2 * (1 - kr) * red, y + 2 * (1 - kb) * blue
    g = (y - kr * r - kb * b) / (1 - kr - kb)
    return np.stack([r, g, b], -1).clip(0, 1)


def even_chroma(height: int, width: int) -> Image:
    """Where no chroma of another bar is near."""
    bar = np.arange(width) * 3 // width
    near = [np.roll(bar, shift) == bar for shift in range(-6, 7)]
    return np.broadcast_to(np.logical_and.reduce(near)[None], (height, width))


X265 = {"x265-params": "lossless=1:log-level=none"}
GRID: list[tuple[str, str, dict[str, str]]] = [
    ("libx264", "yuv420p", {"qp": "0"}),
    ("libx264", "yuv444p", {"crf": "4"}),
    ("libx264", "yuv420p10le", {"qp": "0", "bf": "2"}),
    ("libx265", "yuv420p", X265),
    ("libx265", "yuv422p10le", X265),
    ("libx265", "yuv444p12le", X265),
    ("libvpx-vp9", "yuv420p", {"lossless": "1", "cpu-used": "8"}),
    ("libvpx-vp9", "yuv444p", {"crf": "4", "cpu-used": "8"}),
    ("ffv1", "yuv420p", {}),
    ("ffv1", "yuv411p", {}),
    ("ffv1", "yuv422p10le", {}),
    ("ffv1", "yuv420p16le", {}),
    ("ffv1", "gray", {}),
    ("ffv1", "gray10le", {}),
    ("ffv1", "gray16le", {}),
]
EVEN_RATE = [0, 512, 1024, 1536]
UNEVEN_RATE = [512, 600, 2112, 3000]


@pytest.mark.parametrize("limited", [True, False], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize(("codec", "name", "options"), GRID, ids=lambda v: str(v))
def test_colours_are_those_of_the_standard(
    tmp_path: Path, codec: str, name: str, options: dict[str, str], matrix: int, limited: bool
) -> None:
    """Codec x depth x range x matrix x size parity x rate, against formulas in float64."""
    if codec == "libvpx-vp9" and matrix == 4:
        pytest.skip("VP9 has no number for FCC's matrix")
    suffix = ".mkv" if codec == "ffv1" else ".webm" if "vp9" in codec else ".mp4"
    sizes = [(40, 72)]
    if not (codec.startswith("libx26") and "444" not in name):  # they take even sizes only
        sizes.append((41, 75))
    for (height, width), stamps in itertools.product(sizes, (EVEN_RATE, UNEVEN_RATE)):
        path = tmp_path / f"{height}_{stamps[0]}{suffix}"
        frames = [bars(name, height, width, limited, index) for index in range(4)]
        tags = {"color_range": 1 if limited else 2, "colorspace": matrix}
        base = Fraction(1, 1000) if suffix != ".mp4" else Fraction(1, 12800)
        encode_frames(path, frames, codec, stamps, options, base, **tags)
        with VideoReader(path) as video:
            ours = list(video)
            info = video.info
        deep = "1" in name[-4:] and not name.endswith("411p")
        assert info.bit_depth == (int(name[-4:-2]) if deep else 8)
        assert info.colour.range == (1 if limited else 2)
        assert not info.colour.matrix_assumed
        assert not info.colour.range_assumed
        if "gray" not in name:
            assert info.colour.matrix == matrix
        assert [round(f.pts * info.time_base / base) for f in ours] == stamps
        even = even_chroma(height, width)
        for frame, raw in zip(ours, decoded(path), strict=True):
            assert frame.image.shape == (height, width, 3)
            assert frame.image.dtype == (np.uint16 if deep else np.uint8)
            top, allowed = (65535, 4) if deep else (255, 0.52)
            expected = by_the_standard(raw, matrix, limited) * top
            assert np.abs(frame.image - expected)[even].max() <= allowed


def test_the_colour_grid_sees_a_wrong_matrix_and_a_wrong_range() -> None:
    frame = bars("yuv444p", 40, 72, True)
    right = by_the_standard(frame, 1, True) * 255
    for matrix, limited in ((6, True), (4, True), (7, True), (9, True), (1, False)):
        assert np.abs(by_the_standard(frame, matrix, limited) * 255 - right).max() > 1.1


@pytest.mark.parametrize("name", ["yuv420p", "yuv422p", "yuv444p"])
def test_chroma_is_spread_as_the_scale_filter_spreads_it(tmp_path: Path, name: str) -> None:
    """Against libavfilter's scale with exact rounding, on a picture whose chroma varies."""
    picture = VideoFrame.from_ndarray(smooth(1, 48, 80)[0], format="rgb24")
    source = picture.reformat(format=name, dst_colorspace="ITU709", dst_color_range="MPEG")
    path = encode_frames(
        tmp_path / "a.mkv", [source], "ffv1", colorspace=1, color_range=1, color_primaries=1
    )
    graph = av.filter.Graph()
    nodes = [
        graph.add_buffer(width=80, height=48, format=source.format, time_base=Fraction(1, 25)),
        graph.add("scale", "flags=accurate_rnd+full_chroma_int+bicubic:in_color_matrix=bt709"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ]
    for one, other in itertools.pairwise(nodes):
        one.link_to(other)
    graph.configure()
    frame = decoded(path)[0]
    nodes[0].push(frame)
    expected = cast(VideoFrame, nodes[-1].pull()).to_ndarray().astype(int)
    assert np.abs(read_clip(path)[0] - expected).max() <= 2


@pytest.mark.parametrize("matrix", [8, 10, 14])
def test_a_matrix_that_is_not_read_is_refused(tmp_path: Path, matrix: int) -> None:
    frame = bars("yuv444p10le", 16, 24, True)
    path = encode_frames(tmp_path / "a.mkv", [frame], "libx264", colorspace=matrix, color_range=1)
    with pytest.raises(VideoError, match=r"matrix, .* is not read: .*zscale=m=bt709"):
        VideoReader(path)


@pytest.mark.parametrize(("transfer", "kind"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused_with_the_way_out(
    tmp_path: Path, transfer: int, kind: str
) -> None:
    frames = [bars("yuv420p10le", 16, 24, True)]
    tags: dict[str, Any] = {
        "colorspace": 9,
        "color_range": 1,
        "color_primaries": 9,
        "color_trc": transfer,
    }
    path = encode_frames(tmp_path / "a b.mp4", frames, "libx264", **tags)
    with pytest.raises(VideoError, match=rf"{kind}.*ffmpeg -i '.*a b.mp4' -vf zscale=.*tonemap"):
        VideoReader(path)


def test_wide_gamut_of_standard_range_is_read(tmp_path: Path) -> None:
    frames = [bars("yuv420p10le", 16, 24, True)]
    tags: dict[str, Any] = {
        "colorspace": 9,
        "color_range": 1,
        "color_primaries": 9,
        "color_trc": 14,
    }
    path = encode_frames(tmp_path / "a.mp4", frames, "libx264", **tags)
    colour = VideoReader(path).info.colour
    assert (colour.primaries, colour.transfer, colour.matrix) == (9, 14, 9)


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [(576, 1024, "BT.601"), (578, 64, "BT.709"), (544, 1280, "BT.709"), (16, 16, "BT.601")],
)
def test_what_is_assumed_is_said(tmp_path: Path, height: int, width: int, words: str) -> None:
    frame = VideoFrame(width, height, "yuv420p")
    with VideoReader(encode_frames(tmp_path / "a.mkv", [frame], "ffv1")) as video:
        assert video.info.colour.matrix_assumed
        assert any(f"not tagged: read as {words}, limited" in note for note in video.notes)


def test_jpeg_of_a_camera_is_full_range(tmp_path: Path) -> None:
    path = encode_frames(tmp_path / "a.avi", [bars("yuvj420p", 40, 72, False)], "mjpeg")
    info = VideoReader(path).info
    assert info.colour.range == 2
    expected = by_the_standard(decoded(path)[0], 6, False) * 255
    difference = np.abs(read_clip(path)[0] - expected)[even_chroma(40, 72)]
    assert np.median(difference) <= 0.5  # the codec has its own noise in chroma


@pytest.mark.parametrize("name", ["gbrp10le", "gbrp12le", "gbrp16le", "bgr0"])
def test_rgb_comes_as_it_is(tmp_path: Path, name: str) -> None:
    source = VideoFrame.from_ndarray(noise(1, 17, 33)[0], format="rgb24").reformat(format=name)
    path = encode_frames(tmp_path / "a.mkv", [source], "ffv1")
    clip = read_clip(path)[0]
    if name == "bgr0":
        assert np.array_equal(clip, noise(1, 17, 33)[0])
        return
    bits = int(name[4:-2])
    green, blue, red = plane_arrays(decoded(path)[0])
    expected = np.stack([red, green, blue], -1) / ((1 << bits) - 1) * 65535
    assert np.abs(clip - expected).max() <= 1


def test_samples_that_are_no_picture_are_refused(tmp_path: Path) -> None:
    path = encode_frames(tmp_path / "a.mov", [VideoFrame(16, 16, "gbrpf32le")], "exr")
    with pytest.raises(VideoError, match="gbrpf32le is no picture"):
        VideoReader(path)


# Depth, grey, alpha ---------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [8, 16])
def test_pixels_and_frames_of_both_depths_are_inverse(depth: int) -> None:
    levels = np.arange(2**depth, dtype=np.uint8 if depth == 8 else np.uint16)
    frames = levels.reshape(1, 16, -1, 1)
    video = to_pixels(frames)
    assert (float(video.min()), float(video.max())) == (-1.0, 1.0)
    back = to_bytes(video, depth)
    assert back.dtype == frames.dtype
    assert np.array_equal(back, frames)


def test_a_depth_between_is_no_depth() -> None:
    with pytest.raises(ValueError, match="8 or 16"):
        to_bytes(torch.zeros(1, 1, 1, 1, 1), 10)


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("name", ["yuv420p", "yuv422p10le", "yuv444p12le", "gray", "gray16le"])
def test_grey_is_the_luma_of_the_file(tmp_path: Path, name: str, limited: bool) -> None:
    frame = bars(name, 40, 72, limited)
    path = encode_frames(
        tmp_path / "a.mkv", [frame], "ffv1", colorspace=6, color_range=1 if limited else 2
    )
    with VideoReader(path, channels=1) as video:
        (ours,) = list(video)
    bits = frame.format.components[0].bits
    luma = plane_arrays(frame)[0].astype(float)
    step = 1 << bits - 8
    expected = (luma - 16 * step) / (219 * step) if limited else luma / ((1 << bits) - 1)
    assert ours.image.shape == (40, 72, 1)
    assert np.abs(ours.image[..., 0] - expected * (255 if bits == 8 else 65535)).max() <= 0.51


def test_grey_of_rgb_is_its_luma(tmp_path: Path) -> None:
    clip = noise(2, 8, 12)
    grey, _ = load_video(write(tmp_path / "a.mkv", clip), channels=1)
    expected = (clip * np.array([0.2126, 0.7152, 0.0722])).sum(-1)
    assert np.abs((grey[0, 0].numpy() + 1) * 127.5 - expected).max() <= 0.501


def test_an_untagged_grey_is_full_range_and_said_so(tmp_path: Path) -> None:
    path = encode_frames(tmp_path / "a.mkv", [bars("gray", 40, 72, False)], "ffv1")
    with VideoReader(path) as video:
        assert any("greys is not tagged: read as full range" in note for note in video.notes)
    assert (read_clip(path).min(), read_clip(path).max()) == (0, 255)


def alpha_file(tmp_path: Path, kind: str) -> tuple[Path, Image]:
    """A file with alpha, and the alpha that it should have, in 0..1 (H, W)."""
    if kind == "prores":
        frame, codec, suffix = bars("yuva444p10le", 48, 64, False), "prores_ks", ".mov"
    elif kind == "vp9":
        frame, codec, suffix = bars("yuva420p", 48, 64, False), "libvpx-vp9", ".webm"
    elif kind == "png":
        rgba = np.dstack([noise(1, 48, 64)[0], np.linspace(0, 255, 48 * 64).reshape(48, 64)])
        frame = VideoFrame.from_ndarray(rgba.astype(np.uint8), format="rgba")
        path = encode_frames(tmp_path / "a.mov", [frame], "png")
        return path, rgba[..., 3].astype(np.uint8) / 255
    else:
        frame, codec, suffix = bars("yuva420p", 48, 64, False), "ffv1", ".mkv"
    options = {"lossless": "1"} if codec == "libvpx-vp9" else {}
    path = encode_frames(tmp_path / f"a{suffix}", [frame, frame], codec, options=options)
    top = (1 << frame.format.components[3].bits) - 1
    return path, plane_arrays(frame)[3] / top


@pytest.mark.parametrize("kind", ["prores", "vp9", "ffv1", "png"])
def test_alpha_is_kept_or_missed(tmp_path: Path, kind: str) -> None:
    path, expected = alpha_file(tmp_path, kind)
    with pytest.raises(VideoError, match=r"alpha='keep'.*channels=4.*alpha='drop'"):
        read_clip(path)
    with VideoReader(path, alpha="keep") as video:
        kept = next(iter(video))
        assert video.info.alpha
    top = np.iinfo(kept.image.dtype).max
    assert kept.alpha is not None
    assert kept.image.shape == (48, 64, 3)
    assert np.abs(kept.alpha / top - expected).max() < 0.002
    with VideoReader(path, channels=4) as video:
        four = next(iter(video))
    assert np.array_equal(four.image, np.dstack([kept.image, kept.alpha]))
    with VideoReader(path, alpha="drop") as video:
        bare = next(iter(video))
    assert bare.alpha is None
    assert np.abs(bare.image.astype(int) - kept.image).max() <= (1 if top == 255 else 300)
    with VideoReader(path, alpha="keep", channels=1) as video:
        grey = next(iter(video))
    assert grey.image.shape == (48, 64, 1)
    assert np.array_equal(cast(Any, grey.alpha), kept.alpha)


def test_a_tensor_has_no_plane_for_alpha_beside_it(tmp_path: Path) -> None:
    path, expected = alpha_file(tmp_path, "vp9")
    with pytest.raises(ValueError, match="channels=4 gives it"):
        load_video(path, alpha="keep")
    video, _ = load_video(path, alpha="keep", channels=4)
    assert np.abs((video[0, 3, 0].numpy() + 1) / 2 - expected).max() < 0.01


def test_an_opaque_alpha_is_made_where_four_channels_are_asked_for(tmp_path: Path) -> None:
    clip = noise(2, 8, 12)
    video, _ = load_video(write(tmp_path / "a.mkv", clip), channels=4)
    assert video.shape == (1, 4, 2, 8, 12)
    assert torch.all(video[:, 3] == 1)


# The way up -----------------------------------------------------------------------------------

TURNS = [
    ((1, 0, 0, 1), lambda a: a),
    ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),  # clockwise: what a phone held upright writes
    ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
    ((0, -1, 1, 0), lambda a: np.rot90(a, 1)),
    ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
    ((1, 0, 0, -1), lambda a: a[::-1]),
    ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
    ((0, -1, -1, 0), lambda a: np.rot90(a, 2).swapaxes(0, 1)),
]


def turned_file(path: Path, turned: tuple[float, ...]) -> Path:
    """A display matrix (a, b, c, d) written into the track's header."""
    data = bytearray(path.read_bytes())
    upright = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    a, b, c, d = (round(value * (1 << 16)) for value in turned)
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    at = data.rindex(upright)  # the first is the movie's, the last the track's
    data[at : at + 36] = matrix
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("matrix", "expected"), TURNS)
def test_frames_come_upright(tmp_path: Path, matrix: tuple[int, ...], expected: Any) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 32, 48, Fraction(25), None, Fraction(4, 3)) as writer:
        for index, image in enumerate(smooth(3, 32, 48)):
            writer.write(image, index)
    stored = read_clip(path)
    turned_file(path, matrix)
    with VideoReader(path) as video:
        clip = np.stack([f.image for f in video])
        info = video.info
    assert np.array_equal(clip, np.stack([expected(image) for image in stored]))
    assert (info.height, info.width) == clip.shape[1:3] == video.size
    on_side = matrix[0] == 0
    assert info.sample_aspect_ratio == (Fraction(3, 4) if on_side else Fraction(4, 3))
    scaled = read_clip(path, width=16)
    assert scaled.shape[1:3] == ((24, 16) if on_side else (11, 16))
    small = expected(read_clip(path, width=24 if not on_side else 16)[0])
    assert small.shape[2] == 3


def test_turning_follows_the_matrix() -> None:
    """Against the definition: a point (x, y) goes to (a x + c y, b x + d y)."""
    image = np.arange(6).reshape(2, 3)
    for (a, b, c, d), _ in TURNS:
        points = {(a * x + c * y, b * x + d * y): image[y, x] for y in range(2) for x in range(3)}
        left, top = min(x for x, _ in points), min(y for _, y in points)
        shown = turn(image, np.array([[a, b], [c, d]]))
        for (x, y), value in points.items():
            assert shown[y - top, x - left] == value


def test_a_slant_is_refused(tmp_path: Path) -> None:
    path = turned_file(write(tmp_path / "a.mp4", smooth(3, 32, 32)), (0.866, 0.5, -0.5, 0.866))
    with pytest.raises(VideoError, match=r"turned by .* only quarter turns"):
        VideoReader(path)


def test_a_matrix_of_zeros_is_no_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", smooth(3, 32, 32))
    before = read_clip(path)
    assert np.array_equal(read_clip(turned_file(path, (0, 0, 0, 0))), before)


# Timestamps, parts ----------------------------------------------------------------------------


def h264(path: Path, frames: int = 60, **options: str) -> Path:
    """B-frames, a keyframe every 12, numbered by brightness, an uneven rate."""
    stamps = np.cumsum([512 if i % 3 else 900 for i in range(frames)]).tolist()
    made = []
    for index in range(frames):
        frame = VideoFrame(64, 48, "yuv420p")
        luma = np.full((48, 64), 20 + 3 * index, np.uint8)
        luma[index % 40 : index % 40 + 8, :16] ^= 64
        made.append(fill(frame, [luma, *[np.full((24, 32), 128, np.uint8)] * 2]))
    options = {"g": "12", "bf": "3", "crf": "10", "sc_threshold": "0"} | options
    base = Fraction(1, 12800) if path.suffix == ".mp4" else Fraction(1, 1000)
    if path.suffix != ".mp4":
        stamps = [round(s / 12.8) for s in stamps]
    return encode_frames(path, made, "libx264", stamps, options, base)


def read_all(path: Path, **options: Any) -> list[tuple[Fraction, Image]]:
    with VideoReader(path, **options) as video:
        return [(f.pts * video.info.time_base, f.image) for f in video]


SOUGHT = [
    (".mp4", {}),
    (".mkv", {}),
    (".ts", {}),
    (".mp4", {"x264-params": "open-gop=1"}),
    (".mkv", {"x264-params": "open-gop=1"}),
    (".ts", {"x264-params": "open-gop=1"}),
    (".mkv", {"x264-params": "intra-refresh=1"}),
    (".avi", {"bf": "0"}),
    (".avi", {}),
    (".avi", {"x264-params": "open-gop=1"}),
    (".h264", {}),
]


@pytest.mark.parametrize(("suffix", "options"), SOUGHT, ids=str)
def test_a_sought_part_equals_the_whole(
    tmp_path: Path, suffix: str, options: dict[str, Any]
) -> None:
    path = h264(tmp_path / f"a{suffix}", 60, **options)
    whole = read_all(path)
    begins = whole[0][0]
    times = [float(t - begins) for t, _ in whole]
    for start in (0, times[1], 0.3, times[13], times[24], times[25] + 1e-3, 1.9, times[-1]):
        part = read_all(path, start=start, frames=5)
        expected = [f for f in whole if f[0] - begins >= Fraction(start) - Fraction(1, 10**6)][:5]
        assert [t for t, _ in part] == [t for t, _ in expected], start
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(part, expected, strict=True))


def test_seeking_does_not_decode_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from temporal_vae.video.read import container

    path, count = h264(tmp_path / "a.mp4"), 0
    original = container.ContainerReader._decode

    def counted(self: Any) -> Iterator[VideoFrame]:
        nonlocal count
        for frame in original(self):
            count += 1
            yield frame

    monkeypatch.setattr(container.ContainerReader, "_decode", counted)
    assert len(read_all(path, start=1.9, frames=1)) == 1
    assert count < 30
    count = 0
    monkeypatch.setattr(container, "SEEK_BACK", ())  # as where nothing can be sought
    assert len(read_all(path, start=1.9, frames=1)) == 1
    assert count > 36


def test_a_seek_that_lands_elsewhere_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from temporal_vae.video.read import container

    path = h264(tmp_path / "a.mp4")
    expected = read_all(path, start=1.2, frames=3)

    class Liar:
        """Seeks to a second later than it is told."""

        def __init__(self, truth: Any):
            self.truth = truth

        def __getattr__(self, name: str) -> Any:
            return getattr(self.truth, name)

        def seek(self, at: int, **options: Any) -> None:
            self.truth.seek(at + 12800, **options)

    honest = container._open
    monkeypatch.setattr(container, "_open", lambda *source: Liar(honest(*source)))
    part = read_all(path, start=1.2, frames=3)
    assert [t for t, _ in part] == [t for t, _ in expected]
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(part, expected, strict=True))


def test_a_stream_that_begins_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end PyAV may look for such a stream where it is not: all frames have come by then."""
    from temporal_vae.video.read import container

    class Stumbling:
        def __init__(self, truth: Any):
            self.truth = truth

        def __getattr__(self, name: str) -> Any:
            return getattr(self.truth, name)

        def demux(self, stream: Any) -> Iterator[Any]:
            yield from self.truth.demux(stream)
            raise IndexError("list index out of range")

    path = h264(tmp_path / "a.ts")
    expected = read_all(path)
    honest = container._open
    monkeypatch.setattr(container, "_open", lambda *source: Stumbling(honest(*source)))
    assert [t for t, _ in read_all(path)] == [t for t, _ in expected]


def test_a_start_after_the_end_is_said(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no frame begins at 100 s or later"):
        read_all(h264(tmp_path / "a.mp4"), start=100)


def test_an_edit_list_is_followed(tmp_path: Path) -> None:
    """The track's edit starts 10 frames in: those before are decoded, not shown."""
    path = write(tmp_path / "a.mp4", smooth(30, 32, 32))
    whole = read_clip(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst")
    with av.open(str(path)) as container:
        base = container.streams.video[0].time_base
    entry = data[at + 12 : at + 24]
    media = int.from_bytes(entry[4:8], "big") + round(Fraction(10, 25) / cast(Fraction, base))
    data[at + 16 : at + 20] = media.to_bytes(4, "big")
    path.write_bytes(data)
    with VideoReader(path) as video:
        part = list(video)
        assert np.array_equal(np.stack([f.image for f in part]), whole[10:])
        assert part[0].pts == 0
        assert video.info.frames == 20
        assert not any("damaged" in note for note in video.notes)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_the_start_of_a_file_is_stated(tmp_path: Path, suffix: str) -> None:
    path = h264(tmp_path / f"a{suffix}")
    with VideoReader(path) as video:
        first = next(iter(video))
    assert video.info.start == pytest.approx(float(first.pts * video.info.time_base))
    assert video.info.start > 0


def test_frames_that_nobody_asked_for_are_not_missed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", smooth(9, 32, 32))
    for options in ({"frames": 3}, {"start": 0.2, "frames": 2}, {"start": 0.2}, {"stride": 2}):
        with VideoReader(path, **cast(Any, options)) as video:
            before = list(video.notes)
            assert list(video) and video.notes == before


def test_every_nth_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", noise(11, 8, 12))
    with VideoReader(path, stride=3, start=0.08, frames=3) as video:
        frames = list(video)
    assert [f.pts * video.info.time_base for f in frames] == [Fraction(i, 25) for i in (2, 5, 8)]
    assert video.info.fps == Fraction(25, 3)
    assert video.info.expected_frames == 3
    for frame, index in zip(frames, (2, 5, 8), strict=True):
        assert np.array_equal(frame.image, noise(11, 8, 12)[index])


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=20),
    st.integers(0, 500),
    st.sampled_from([Fraction(24), Fraction(30000, 1001), Fraction(7, 2), Fraction(1000)]),
)
@settings(max_examples=60, deadline=None)
def test_an_even_rate_shows_what_is_on_screen(steps: list[int], first: int, rate: Fraction) -> None:
    stamps = [first + int(s) for s in np.cumsum([0, *steps])]
    base = Fraction(1, 1000)
    ticks = Fraction(1, 1000 * rate.numerator)
    out = list(even(iter(enumerate(stamps)), base, rate, ticks, ""))
    times = [pts * ticks for _, pts in out]
    assert times == [first * base + k / rate for k in range(len(out))]
    for time_, (index, _) in zip(times, out, strict=True):
        assert index == max(i for i, s in enumerate(stamps) if s * base <= time_)
    assert times[-1] + 1 / rate >= (stamps[-1] + steps[-1]) * base


def test_a_gap_too_long_to_fill_is_refused() -> None:
    stamped = iter([(0, 0), (1, 10**9)])
    with pytest.raises(VideoError, match="without a frame"):
        list(even(stamped, Fraction(1, 1000), Fraction(25), Fraction(1, 25), "x"))


def test_rates_are_meant_exactly() -> None:
    assert exact_rate(29.97) == Fraction(30000, 1001)
    assert exact_rate(23.976) == Fraction(24000, 1001)
    assert exact_rate(59.94) == Fraction(60000, 1001)
    assert [exact_rate(fps) for fps in (25, 12.5, 30)] == [25, 12.5, 30]
    for none in (0, -1, math.nan, math.inf, 1e-9, 1e9):  # 1e-9 would be rounded to 0
        with pytest.raises(ValueError, match="fps must be above 0"):
            exact_rate(none)


def test_a_rate_with_which_a_clock_would_count_too_finely(tmp_path: Path) -> None:
    """libav has 31 bits for the ticks of a second."""
    path = write(
        tmp_path / "a.mp4", smooth(9, 32, 32), list(range(0, 32_400, 3600)), Fraction(1, 90_000)
    )
    with VideoReader(path, fps=29.987) as video:
        stamps = [frame.pts for frame in video]
    assert video.info.time_base == 1 / video.info.fps == Fraction(1000, 29987)
    assert stamps == list(range(len(stamps)))
    with VideoReader(path, fps=29.987, start=0.08) as video:
        assert next(iter(video)).pts >= video.begin == 2


def test_a_rate_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", smooth(25, 32, 32))
    with VideoReader(path, fps=10) as video:
        frames = list(video)
    assert len(frames) == 10
    assert video.info.fps == 10
    assert [f.pts * video.info.time_base for f in frames] == [Fraction(i, 10) for i in range(10)]
    assert video.info.expected_frames == 10


def test_crop_and_size(tmp_path: Path) -> None:
    clip = noise(2, 20, 32)
    path = write(tmp_path / "a.mkv", clip)
    assert np.array_equal(
        np.stack([i for _, i in read_all(path, crop=(3, 5, 8, 9))]), clip[:, 3:11, 5:14]
    )
    grey = read_all(path, crop="centre", size=(10, 10), channels=1)
    assert grey[0][1].shape == (10, 10, 1)
    flat = write(tmp_path / "b.mkv", np.full((1, 20, 32, 3), (200, 10, 60), np.uint8))
    ((_, image),) = read_all(flat, crop=(2, 2, 10, 16), size=(5, 8), channels=4)
    assert image.reshape(-1, 4).tolist() == [[200, 10, 60, 255]] * 40
    with VideoReader(path, size=(16, 16)) as video:
        assert any("squeezed to 16x16" in note for note in video.notes)
        assert video.size == (16, 16)
    with VideoReader(path, size=(10, 16)) as video:
        assert not any("squeezed" in note for note in video.notes)
    with pytest.raises(VideoError, match="does not lie in 32x20"):
        VideoReader(path, crop=(15, 0, 6, 6))


def test_the_middle_is_cut_out() -> None:
    assert Selection(size=(10, 10), crop="centre").cut(20, 32, "") == (0, 6, 20, 20)
    assert Selection(size=(9, 16), crop="centre").cut(480, 640, "") == (60, 0, 360, 640)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"start": -1}, "start"),
    ({"start": float("nan")}, "start"),
    ({"frames": 0}, "frames"),
    ({"stride": 0}, "stride"),
    ({"fps": 0}, "fps"),
    ({"fps": 25, "stride": 2}, "one of them"),
    ({"channels": 2}, "channels"),
    ({"alpha": "maybe"}, "alpha"),
    ({"size": (0, 3)}, "size"),
    ({"size": (8, 8), "width": 8}, "one of them"),
    ({"crop": "centre"}, "needs the size"),
    ({"crop": (0, 0, 0, 4)}, "crop"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_what_cannot_be_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**options)


# A tensor -------------------------------------------------------------------------------------


def test_load_video_is_a_tensor_and_what_the_file_says(tmp_path: Path) -> None:
    clip = noise(5, 8, 12)
    video, info = load_video(write(tmp_path / "a.mkv", clip), frames=4)
    assert video.shape == (1, 3, 4, 8, 12)
    assert video.dtype == torch.float32
    assert torch.equal(video, to_pixels(clip[:4]))
    assert [info.fps, info.expected_frames] == [25, 4]
    half, _ = load_video(tmp_path / "a.mkv", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_name_may_be_bytes(tmp_path: Path) -> None:
    path = h264(tmp_path / "\u00fc.mp4")
    video, info = load_video(os.fsencode(path))  # type: ignore[arg-type]
    assert torch.equal(video, load_video(path)[0]) and info.path == str(path)


def test_load_video_of_ten_bits_has_ten_bits(tmp_path: Path) -> None:
    frame = bars("yuv444p10le", 256, 48, True)
    path = encode_frames(tmp_path / "a.mkv", [frame], "ffv1", colorspace=1, color_range=1)
    video, info = load_video(path)
    assert info.bit_depth == 10
    assert len(video[0, 1].unique()) > 256
    expected = torch.from_numpy(by_the_standard(frame, 1, True)).permute(2, 0, 1) * 2 - 1
    even = torch.from_numpy(even_chroma(256, 48).copy())
    assert (video[0, :, 0] - expected).abs()[:, even].max() < 2e-4


# Images ---------------------------------------------------------------------------------------


def save(path: Path, image: Image, codec: str, name: str) -> None:
    source = "rgb48le" if image.dtype == np.uint16 else "rgb24"
    frame = VideoFrame.from_ndarray(image, format=source).reformat(format=name)
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=1))
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, name
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("suffix", "codec", "name"),
    [("png", "png", "rgb24"), ("tiff", "tiff", "rgb24"), ("jpg", "mjpeg", "yuvj444p"),
     ("bmp", "bmp", "bgr24")],
)  # fmt: skip
def test_a_folder_of_images_is_a_clip(tmp_path: Path, suffix: str, codec: str, name: str) -> None:
    clip = smooth(12, 24, 40)
    for index, image in enumerate(clip):
        save(tmp_path / f"frame{index}.{suffix}", image, codec, name)
    (tmp_path / "notes.txt").write_text("not an image")
    with VideoReader(tmp_path) as video:
        frames = list(video)
        assert any("no rate: taken as 25 frames per second" in note for note in video.notes)
        assert any("1 of 13 names" in note for note in video.notes)
        assert video.info.expected_frames == 12
    back = np.stack([f.image for f in frames]).astype(int)
    assert np.abs(back - clip).max() <= (8 if codec == "mjpeg" else 0)
    assert [f.pts * video.info.time_base for f in frames] == [Fraction(i, 25) for i in range(12)]
    part = read_all(tmp_path, fps=10, start=0.5, stride=1, frames=2)
    assert [t for t, _ in part] == [Fraction(5, 10), Fraction(6, 10)]
    assert np.abs(part[0][1].astype(int) - back[5]).max() == 0


@pytest.mark.parametrize("codec", ["png", "tiff"])
def test_images_of_sixteen_bits(tmp_path: Path, codec: str) -> None:
    image = np.random.default_rng(0).integers(0, 65536, (9, 14, 3), dtype=np.uint16)
    save(tmp_path / f"a.{codec}", image, codec, "rgb48be" if codec == "png" else "rgb48le")
    assert np.array_equal(read_clip(tmp_path)[0], image)
    assert np.array_equal(read_clip(tmp_path / f"a.{codec}")[0], image)


def test_images_of_two_sizes_and_depths_are_no_clip(tmp_path: Path) -> None:
    save(tmp_path / "a1.png", noise(1, 8, 8)[0], "png", "rgb24")
    save(tmp_path / "a2.png", noise(1, 8, 9)[0], "png", "rgb24")
    with pytest.raises(VideoError, match=r"a2.png: 9x8, where .* 8x8"):
        read_clip(tmp_path)
    save(tmp_path / "a2.png", np.zeros((8, 8, 3), np.uint16), "png", "rgb48be")
    with pytest.raises(VideoError, match="16 bits after frames of 8"):
        read_clip(tmp_path)


def test_images_of_eight_bits_among_those_of_sixteen(tmp_path: Path) -> None:
    """All come in sixteen, of which 257 levels are one of eight."""
    clip = noise(1, 9, 11)
    for index, depth in enumerate((16, 8)):
        video = to_pixels(clip)
        save_video(video, tmp_path / str(depth), fps=25, depth=depth)
        (tmp_path / str(depth) / "000001.png").rename(tmp_path / f"{index}.png")
    with VideoReader(tmp_path) as reader:
        deep, shallow = (frame.image for frame in reader)
    assert np.array_equal(shallow, clip[0].astype(np.uint16) * 257)
    assert np.array_equal(deep, shallow)


def test_a_folder_without_images_and_a_broken_image(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="holds no images"):
        read_clip(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(VideoError, match=r"a.png: the video stream cannot be decoded"):
        read_clip(tmp_path)


def pillow() -> Any:
    return pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_are_clips(tmp_path: Path, suffix: str) -> None:
    module = pillow()
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    images = [module.new("RGB", (24, 16), colour) for colour in colours]
    path = tmp_path / f"a.{suffix}"
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=[100, 50, 200, 100], lossless=True
    )
    frames = read_all(path)
    assert [t for t, _ in frames] == [Fraction(i, 1000) for i in (0, 100, 150, 350)]
    for (_, image), colour in zip(frames, colours, strict=True):
        assert np.abs(image.astype(int) - colour).max() <= 1
    assert len(read_all(path, start=0.12)) == 2


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_a_picture_with_holes_is_refused_unless_asked(tmp_path: Path, suffix: str) -> None:
    module = pillow()
    images, hole = [], 0 if suffix == "gif" else 100
    for shade in (90, 200):
        image = module.new("RGBA", (24, 16), (shade, 0, 0, 255))
        image.paste((0, 0, 0, hole), (0, 0, 12, 16))
        images.append(image)
    path = tmp_path / f"a.{suffix}"
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=100, disposal=2, lossless=True
    )
    with pytest.raises(VideoError, match="alpha='keep'"):
        read_clip(path)
    with VideoReader(path, alpha="keep") as video:
        frame = next(iter(video))
    assert frame.alpha is not None
    assert frame.alpha[0].tolist() == [hole] * 12 + [255] * 12


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_photograph_held_upright_is_turned(tmp_path: Path, suffix: str) -> None:
    module = pillow()
    image = module.fromarray(smooth(1, 24, 40)[0])
    exif = image.getexif()
    exif[0x0112] = 6  # turn clockwise to show
    image.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    with VideoReader(tmp_path) as video:
        frame = next(iter(video))
        assert (video.info.height, video.info.width) == (40, 24)
    expected = np.rot90(smooth(1, 24, 40)[0], -1).astype(int)
    assert np.abs(frame.image - expected).mean() < 3


# Fields ---------------------------------------------------------------------------------------


FIELDS = 0x40000 | 0x20000000  # AV_CODEC_FLAG_INTERLACED_DCT and _ME


def test_interlaced_is_recognised(tmp_path: Path) -> None:
    path = encode_frames(
        tmp_path / "a.mkv", [bars("yuv420p", 64, 64, True)] * 3, "libx264",
        flags=FIELDS,
    )  # fmt: skip
    with VideoReader(path) as video:
        assert video.info.interlaced
        assert any("interlaced" in note for note in video.notes)


# Ahead ----------------------------------------------------------------------------------------


def threads() -> int:
    return sum(t.name == "video decoder" for t in threading.enumerate())


def test_an_error_in_the_thread_is_the_readers(tmp_path: Path) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise VideoError("lost")

    ahead = Prefetcher(broken(), 2)
    frames = iter(ahead)
    assert next(frames) == 1
    with pytest.raises(VideoError, match="lost"):
        next(frames)
    assert ahead.close()


def test_the_thread_is_at_most_so_far_ahead() -> None:
    made = 0

    def items() -> Iterator[int]:
        nonlocal made
        while made < 1000:
            made += 1
            yield made

    ahead = Prefetcher(items(), 3)
    frames = iter(ahead)
    assert next(frames) == 1
    time.sleep(0.2)
    assert made <= 5
    assert ahead.close()


def test_a_reader_left_early_leaves_nothing(tmp_path: Path) -> None:
    path = h264(tmp_path / "a.mp4")
    for taken in (0, 1, 7):
        with VideoReader(path) as video:
            for _ in zip(range(taken), video, strict=False):
                pass
        assert threads() == 0
    started = time.monotonic()
    with pytest.raises(KeyError), VideoReader(path) as video:
        for _ in video:
            raise KeyError
    assert time.monotonic() - started < 2
    assert threads() == 0


def test_a_reader_reads_once(tmp_path: Path) -> None:
    with VideoReader(h264(tmp_path / "a.mp4")) as video:
        assert len(list(video)) == 60
        with pytest.raises(VideoError, match="open it again"):
            list(video)


def test_what_waits_is_few_frames(tmp_path: Path) -> None:
    """Of a video only what is ahead is held: counted in frames that are alive."""
    path = write(tmp_path / "a.mkv", noise(40, 16, 16))
    alive: list[weakref.ref[Any]] = []
    with VideoReader(path) as video:
        original = video._converter.__call__

        def counted(frame: VideoFrame, pts: int) -> Any:
            made = original(frame, pts)
            alive.append(weakref.ref(made.image))
            assert sum(image() is not None for image in alive) <= 10
            return made

        video._converter = counted  # type: ignore[assignment]
        for index, frame in enumerate(video):
            time.sleep(0.002)
            assert frame.pts >= index
    assert len(alive) == 40


def test_frames_go_when_they_are_done_with(tmp_path: Path) -> None:
    """Without the garbage collector, whose time comes after hundreds of frames."""
    path = h264(tmp_path / "a.mp4")
    (tmp_path / "images").mkdir()
    for index, image in enumerate(noise(9, 8, 8)):
        save(tmp_path / "images" / f"{index}.png", image, "png", "rgb24")
    gc.collect()
    before = sum(type(o) is VideoFrame for o in gc.get_objects())
    gc.disable()
    try:
        assert len(read_all(path)) == 60
        assert len(read_all(tmp_path / "images")) == 9
        left = sum(type(o) is VideoFrame for o in gc.get_objects())
    finally:
        gc.enable()
    assert left - before <= 4


def test_memory_goes_round_only_when_all_views_are_gone() -> None:
    memory = Recycler(kept=200)
    first = memory.empty((3, 4, 5), np.int16)
    place, view = first.ctypes.data, first.transpose(1, 2, 0)[1:, ::2]
    view[:] = 7
    del first
    other = memory.empty((3, 4, 5), np.int16)
    assert other.ctypes.data != place and not np.shares_memory(other, view)
    other[:] = 0
    assert (view == 7).all()
    tensor = torch.from_numpy(view)
    del view
    assert memory.empty((3, 4, 5), np.int16).ctypes.data != place and int(tensor.min()) == 7
    del tensor, other
    again = {memory.empty((5, 12), np.int16).ctypes.data for _ in range(3)}
    assert len(again) == 1  # one of 120 bytes is kept, and goes round in any shape of its size
    assert memory.empty((5, 13), np.int16).shape == (5, 13)


def test_frames_that_are_kept_stay_what_they_are(tmp_path: Path) -> None:
    source = write(tmp_path / "in.mp4", smooth(40, 24, 32))
    with VideoReader(source) as video:
        kept, copies = [], []
        for frame in video:
            kept.append(frame.image)
            copies.append(frame.image.copy())
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_closing_frees_who_waits_for_a_stuck_maker() -> None:
    stuck, ended = threading.Event(), threading.Event()

    def never() -> Iterator[int]:
        stuck.wait(20)
        yield 1

    inner = Prefetcher(never(), 1)

    def wait() -> None:
        assert list(inner) == []
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not inner.close(0.2)
    assert ended.wait(5)
    stuck.set()
    thread.join()
    assert inner.close()


@pytest.mark.parametrize("name", ["a.webm", "a.mkv", "a.mp4"])
@pytest.mark.parametrize(
    ("select", "options"),
    [
        ("lt(n,60)+not(mod(n,20))", {}),
        ("lt(n,10)+gt(n,100)", {"start": 0.5, "fps": 5}),
        ("not(mod(n,3))+lt(n,40)", {"start": 1.5}),
    ],
)
def test_a_variable_rate_is_not_taken_for_a_damaged_file(
    name: str, select: str, options: Any, tmp_path: Path
) -> None:
    source = "testsrc=size=64x48:rate=30:duration=4"
    codec = "libvpx" if name.endswith("webm") else "mpeg4"
    subprocess.run(
        ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-vf", f"select='{select}'",
         "-vsync", "vfr", "-c:v", codec, tmp_path / name], check=True,
    )  # fmt: skip
    with VideoReader(tmp_path / name, **options) as video:
        assert sum(1 for _ in video)
    assert not [note for note in video.notes if "damaged" in note]
