"""Reading beside the ffmpeg command line: it makes files, and converts and stamps them too."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from temporal_vae.video import Image, VideoReader

FLAGS = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
MATRICES = {"bt709": ("bt709", "709", 1), "smpte170m": ("bt601", "170m", 6),
            "bt470bg": ("bt601", "470bg", 5), "bt2020nc": ("bt2020", "2020_ncl", 9)}  # fmt: skip
"""A tag's names for an encoder, the scale filter and zscale, and its number."""
RATES = {
    "constant": ("25", "null"),
    "ntsc": ("30000/1001", "null"),
    "varying": ("25", "select='mod(n,3)+eq(mod(n,4),1)'"),
    "late": ("25", "setpts=PTS+0.36/TB"),
}
"""Frames a second, and a filter."""


@dataclass(frozen=True)
class Codec:
    """How to encode with the command."""

    words: str
    suffix: str
    pixel_formats: tuple[str, ...]
    odd: bool = False
    """Whether it takes odd sizes."""
    ranges: tuple[str, ...] = ("tv", "pc")
    matrices: tuple[str, ...] = tuple(MATRICES)
    left: tuple[str, ...] = ()
    """Formats whose chroma its decoder says to lie left of a pixel's middle."""


CODECS = {
    "h264": Codec("libx264 -preset ultrafast -qp 2", ".mp4",
                  ("yuv420p", "yuv422p", "yuv420p10le", "yuv444p10le"),
                  left=("yuv420p", "yuv422p", "yuv420p10le")),
    "h264_444": Codec("libx264 -preset ultrafast -qp 2", ".mp4", ("yuv444p",), odd=True),
    "h265": Codec("libx265 -preset ultrafast -x265-params crf=4:log-level=error", ".mp4",
                  ("yuv420p", "yuv420p10le", "yuv422p10le", "yuv444p12le"),
                  left=("yuv420p", "yuv420p10le")),
    "vp9": Codec("libvpx-vp9 -cpu-used 8 -crf 4 -b:v 0", ".webm",
                 ("yuv420p", "yuv444p", "yuv420p10le", "yuv422p12le"), odd=True),
    "ffv1": Codec("ffv1", ".mkv",
                  ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p16le"), odd=True),
    "grey": Codec("ffv1", ".mkv", ("gray",), odd=True, matrices=("bt709",)),
    # the command widens deep greys of limited range by a shift; test_reading has their formula
    "grey_deep": Codec("ffv1", ".mkv", ("gray10le", "gray16le"), odd=True, matrices=("bt709",),
                       ranges=("pc",)),
    "mpeg2": Codec("mpeg2video -q:v 2", ".ts", ("yuv420p", "yuv422p"), odd=True, ranges=("tv",),
                   left=("yuv420p", "yuv422p")),
    "prores": Codec("prores_ks", ".mov", ("yuv422p10le", "yuv444p10le"), ranges=("tv",)),
    "jpeg": Codec("mjpeg -q:v 2 -strict unofficial", ".mkv", ("yuv420p", "yuv444p"), odd=True,
                  matrices=("bt470bg",)),
}  # fmt: skip


def run(*words: object) -> bytes:
    """What a command writes to standard output."""
    done = subprocess.run([str(word) for word in words], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def make(
    ffmpeg: str,
    path: Path,
    codec: Codec,
    pixel_format: str,
    matrix: str,
    range_: str,
    size: tuple[int, int],
    rate: str,
) -> Path:
    """Six moving frames (height, width) in a codec, tagged."""
    per_second, pace = RATES[rate]
    height, width = size
    filters = (
        f"{pace},scale=flags={FLAGS}:out_color_matrix={MATRICES[matrix][0]}:out_range={range_},"
        f"format={pixel_format},setparams=colorspace={matrix}:range={range_}:"
        "color_primaries=bt709:color_trc=bt709"
    )
    run(ffmpeg, "-v", "error", "-f", "lavfi", "-i",
        f"testsrc2=size={width}x{height}:rate={per_second}", "-vf", filters, "-frames:v", 6,
        "-fps_mode", "passthrough", "-muxdelay", 0, "-c:v", *codec.words.split(),
        "-pix_fmt", pixel_format, "-colorspace", matrix, "-color_range", range_,
        "-color_primaries", "bt709", "-color_trc", "bt709", path)  # fmt: skip
    return path


def in_levels(image: Image) -> Image:
    """In levels of 8 bits, 0..255, with fractions."""
    levels: Image = image * (255 / np.iinfo(image.dtype).max)
    return levels


def converted(ffmpeg: str, path: Path, filters: str, name: str, shape: tuple[int, ...]) -> Image:
    """Frames (T, H, W, 3) in 0..255 of one of the command's pixel formats, in order R, G, B."""
    data = run(ffmpeg, "-v", "error", "-i", path, "-vf", f"{filters},format={name}",
               "-fps_mode", "passthrough", "-f", "rawvideo", "-")  # fmt: skip
    values: Image = np.frombuffer(data, np.uint16 if "16" in name or "48" in name else np.uint8)
    values = in_levels(values)
    if name.startswith("gbrp"):
        return values.reshape(-1, 3, *shape)[:, [2, 0, 1]].transpose(0, 2, 3, 1)
    return values.reshape(-1, *shape, 3)


def probed(path: Path) -> list[Fraction]:
    """The frames' times by ffprobe."""
    said = run("ffprobe", "-v", "error", "-select_streams", "v", "-show_frames", "-show_streams",
               "-show_entries", "frame=best_effort_timestamp:stream=time_base", "-of", "json",
               path)  # fmt: skip
    found = json.loads(said)
    base = Fraction(found["streams"][0]["time_base"])
    return [int(frame["best_effort_timestamp"]) * base for frame in found["frames"]]


def range_code(name: str) -> int:
    return {"tv": 1, "pc": 2}[name]


def assert_read_as_ffmpeg_does(
    ffmpeg: str, path: Path, codec: Codec, pixel_format: str, matrix: str, range_: str
) -> None:
    """Times of ffprobe; colours of zimg and of libswscale, each told what the tags say.

    zimg is also told where chroma lies: where a decoder leaves that open, libswscale, and so the
    reader, takes the middle. libswscale is asked only where it cannot matter: the command's passes
    over what a decoder says. It knows no limited range of greys, and its white of 16 bits is up to
    a level of 8 bits below.
    """
    with VideoReader(path) as video:
        frames = list(video)
        info = video.info
    assert [frame.pts * info.time_base for frame in frames] == probed(path)
    assert info.colour.range == range_code(range_)
    grey, subsampled = pixel_format.startswith("gray"), "444" not in pixel_format
    assert grey or (info.colour.matrix, info.colour.matrix_assumed) == (MATRICES[matrix][2], False)
    ours = np.stack([frame.image for frame in frames])
    deep = ours.dtype == np.uint16
    assert deep == pixel_format.endswith("le")
    ours = in_levels(ours)
    _, zimg, _ = MATRICES[matrix]
    place = "left" if pixel_format in codec.left else "center"
    told = f"zscale=min={zimg}:rin={range_}:m=gbr:r=pc:f=bilinear:cin={place}"
    theirs = converted(ffmpeg, path, told, "gbrp16le" if deep else "gbrp", ours.shape[1:3])
    assert ours.shape == theirs.shape
    apart = np.abs(ours - theirs)
    most = 0.03 if deep else 1.01
    assert apart.mean() < 0.01 and apart.max() <= most, "zimg sees other colours"
    if not (subsampled or grey):
        told = f"scale=in_color_matrix={MATRICES[matrix][0]}:in_range={range_}:flags={FLAGS}"
        theirs = converted(ffmpeg, path, told, "rgb48le" if deep else "rgb24", ours.shape[1:3])
        assert np.abs(ours - theirs).max() <= 1.01, "libswscale sees other colours"


QUICK = [
    ("h264", "yuv420p", "bt709", "tv", (64, 96), "varying"),
    ("h265", "yuv422p10le", "bt2020nc", "pc", (64, 96), "late"),
    ("vp9", "yuv420p10le", "smpte170m", "tv", (65, 97), "ntsc"),
    ("ffv1", "yuv444p16le", "bt470bg", "tv", (65, 97), "constant"),
    ("grey_deep", "gray10le", "bt709", "pc", (65, 97), "varying"),
    ("prores", "yuv444p10le", "bt709", "tv", (64, 96), "ntsc"),
]


@pytest.mark.parametrize(
    ("codec", "pixel_format", "matrix", "range_", "size", "rate"), QUICK, ids=str
)
def test_video_is_read_as_ffmpeg_reads_it(
    tmp_path: Path,
    ffmpeg: str,
    codec: str,
    pixel_format: str,
    matrix: str,
    range_: str,
    size: tuple[int, int],
    rate: str,
) -> None:
    way = CODECS[codec]
    path = tmp_path / f"a{way.suffix}"
    make(ffmpeg, path, way, pixel_format, matrix, range_, size, rate)
    assert_read_as_ffmpeg_does(ffmpeg, path, way, pixel_format, matrix, range_)


GRID = [
    (name, pixel_format, matrix, range_)
    for name, codec in CODECS.items()
    for pixel_format in codec.pixel_formats
    for matrix in codec.matrices
    for range_ in codec.ranges
]


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "pixel_format", "matrix", "range_"), GRID, ids=str)
def test_every_video_is_read_as_ffmpeg_reads_it(
    tmp_path: Path, ffmpeg: str, codec: str, pixel_format: str, matrix: str, range_: str
) -> None:
    """Size parity and kinds of rate within."""
    way = CODECS[codec]
    for size in [(64, 96), *([(65, 97)] if way.odd else [])]:
        for rate in RATES:
            path = tmp_path / f"{size[0]}_{rate}{way.suffix}"
            make(ffmpeg, path, way, pixel_format, matrix, range_, size, rate)
            assert_read_as_ffmpeg_does(ffmpeg, path, way, pixel_format, matrix, range_)


@pytest.mark.parametrize(
    ("matrix", "range_", "moved"), [("bt2020nc", "tv", False), ("bt709", "pc", False),
                                    ("bt709", "tv", True)]
)  # fmt: skip
def test_the_comparison_sees_another_matrix_range_or_place(
    tmp_path: Path, ffmpeg: str, monkeypatch: pytest.MonkeyPatch, matrix: str, range_: str,
    moved: bool,
) -> None:  # fmt: skip
    way = CODECS["h264"]
    path = make(ffmpeg, tmp_path / "a.mp4", way, "yuv420p", "bt709", "tv", (64, 96), "constant")
    for name in MATRICES:  # what the reader is believed to have read
        monkeypatch.setitem(MATRICES, name, (*MATRICES[name][:2], 1))
    monkeypatch.setattr("test_ffmpeg.range_code", lambda _: 1)
    with pytest.raises(AssertionError, match="zimg sees other colours"):
        wrong = replace(way, left=()) if moved else way
        assert_read_as_ffmpeg_does(ffmpeg, path, wrong, "yuv420p", matrix, range_)
