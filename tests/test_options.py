"""The reader's options, folders of images, and grey and RGBA models, through every verb."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import awake, thinned
from test_cli import Echo, assert_one_line_error, times
from test_reading import alpha_file, bars, encode_frames, h264, pillow, save
from test_verbs import Said
from test_video import noise, smooth, write

from temporal_vae import LatentFile, LatentInfo, TemporalVAE, read_latents
from temporal_vae.cli.inputs import find_inputs
from temporal_vae.cli.options import FrameOptions, cut, rate, seconds, sides
from temporal_vae.convert import decode as decoding
from temporal_vae.convert import encode as encoding
from temporal_vae.convert import reconstruct as reconstructing
from temporal_vae.video import VIDEO_SUFFIXES, Image, VideoError, VideoReader, read_clip


@pytest.fixture(scope="module")
def causal() -> TemporalVAE:
    return awake(torch.float32, causal_mode=True)


def chosen(source: Path, **options: Any) -> tuple[Image, list[Fraction]]:
    """What a reader gives, with times from the start that was asked for."""
    with VideoReader(source, **options) as video:
        frames = list(video)
        start = Fraction(options.get("start", 0))
        return np.stack([f.image for f in frames]), [
            f.pts * video.info.time_base - start for f in frames
        ]


def latents_of(
    source: Path, target: Path, model: TemporalVAE, **options: Any
) -> tuple[LatentInfo, list[Fraction]]:
    """Header and times of a file encoded with options beside `target`, and decoded to it."""
    path, record = target.with_suffix(".safetensors"), model.latent_record()
    encoding.encode(source, path, model, record, options=options, overwrite=True)  # type: ignore[arg-type]
    decoding.decode(path, target, model, record, alpha=options.get("alpha"), overwrite=True)
    with LatentFile(path) as file:
        return file.info, [stamp * file.info.time_base for stamp in file.timestamps()]


# Law 4 with options --------------------------------------------------------------------------

CHOICES: list[dict[str, Any]] = [
    {"start": Fraction(13, 10), "frames": 7},
    {"start": Fraction(1, 2)},
    {"fps": Fraction(30000, 1001), "frames": 11, "start": Fraction(1)},
    {"frames": 1},
    {"crop": (3, 5, 17, 22), "stride": 5},
    {"stride": 3, "start": Fraction(1, 5)},
    {"crop": "centre", "size": (20, 20), "frames": 5},
    {"size": (31, 40)},
]


@pytest.mark.parametrize("options", thinned(2, CHOICES))
def test_what_is_chosen_goes_through_every_verb(
    tmp_path: Path, causal: TemporalVAE, options: dict[str, Any]
) -> None:
    """Frames, size and times are those that the reader chooses, of an uneven rate and B-frames."""
    source, echo = h264(tmp_path / "in.mp4"), Echo(base_channels=8, channel_multipliers=(1, 2))
    expected, stamps = chosen(source, **options)
    reconstructing.reconstruct(source, tmp_path / "echo.mkv", echo, options=options)  # type: ignore[arg-type]
    assert np.array_equal(read_clip(tmp_path / "echo.mkv"), expected)
    apart = np.array(times(tmp_path / "echo.mkv")) - np.array(stamps, float)
    assert np.abs(apart).max() <= 0.0005001, "timestamps moved"
    reconstructing.reconstruct(source, tmp_path / "whole.mkv", causal, options=options)  # type: ignore[arg-type]
    info, stored = latents_of(source, tmp_path / "out.mkv", causal, **options)
    assert stored == stamps
    assert (info.frames, info.height, info.width) == expected.shape[:3]
    assert np.array_equal(read_clip(tmp_path / "out.mkv"), read_clip(tmp_path / "whole.mkv"))
    assert times(tmp_path / "out.mkv") == times(tmp_path / "echo.mkv")


def test_a_start_offset_is_kept_and_a_start_is_not(tmp_path: Path, causal: TemporalVAE) -> None:
    """A file whose first frame is late stays late; what is cut out takes no time."""
    stamps = [800 + 40 * i for i in range(20)]
    source = write(tmp_path / "in.mp4", smooth(20, 16, 16), stamps, Fraction(1, 1000))
    _, stored = latents_of(source, tmp_path / "a.mp4", causal)
    assert stored[0] == Fraction(4, 5)
    assert times(tmp_path / "a.mp4") == times(source)
    latents_of(source, tmp_path / "b.mp4", causal, start=0.4)
    assert times(tmp_path / "b.mp4") == pytest.approx([0.8 + 0.04 * i for i in range(10)])


@pytest.mark.parametrize(
    ("ratio", "size", "expected"),
    [(None, (16, 16), Fraction(2)), (Fraction(4, 3), (16, 32), Fraction(4, 3)),
     (Fraction(1, 2), (16, 16), Fraction(1))],
)  # fmt: skip
def test_a_squeezed_picture_is_shown_in_its_shape(
    tmp_path: Path, ratio: Fraction | None, size: tuple[int, int], expected: Fraction
) -> None:
    from temporal_vae.video import VideoWriter

    source = tmp_path / "a.mp4"
    with VideoWriter(source, 16, 32, Fraction(25), None, ratio) as writer:
        writer.write(smooth(1, 16, 32)[0], 0)
    echo = Echo(base_channels=8, channel_multipliers=(1, 2))
    notes = reconstructing.reconstruct(
        source, tmp_path / "b.mp4", echo, options={"size": size}
    ).notes
    assert any("squeezed" in note for note in notes) == (expected == 2)
    with VideoReader(tmp_path / "b.mp4") as video:
        assert (video.info.sample_aspect_ratio or 1) == expected
    latents = tmp_path / "a.safetensors"
    info = encoding.encode(source, latents, echo, echo.latent_record(), options={"size": size}).info
    assert (info.sample_aspect_ratio or 1) == expected


def test_the_words_of_the_options(
    tmp_path: Path, small_model: Path, run: Callable[..., Said]
) -> None:
    source = write(tmp_path / "in.mp4", smooth(50, 24, 40))
    words = ("--model", small_model, "--start", "0:00.4", "--frames", 9, "--stride", 2,
             "--size", "16x12", "--crop", "20x15+3+2", "--alpha", "drop")  # fmt: skip
    said = run("encode", source, tmp_path / "a.safetensors", *words, "--json")
    assert said.returncode == 0, said.stderr
    row = json.loads(said.stdout)
    assert (row["frames"], row["size"], row["frames_per_second"]) == (9, [16, 12], "25/2")
    said = run("reconstruct", source, tmp_path / "b.mkv", *words)
    assert said.returncode == 0 and "9 frames" in said.stdout, said.stderr
    assert read_clip(tmp_path / "b.mkv").shape == (9, 12, 16, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--start", "soon"), "seconds, or [hours:]minutes:seconds, got 'soon'"),
        (("--start", "100"), "no frame begins at 100 s or later"),
        (("--frames", "0"), "frames must be 1 or more"),
        (("--stride", "-1"), "stride must be 1 or more"),
        (("--stride", "2", "--fps", "5"), "give one of them"),
        (("--fps", "1/0"), "30000/1001, got '1/0'"),
        (("--fps", "0"), "fps must be above 0"),
        (("--size", "16"), "WIDTHxHEIGHT, such as 640x360, got '16'"),
        (("--size", "0x16"), "1 to 32768 pixels"),
        (("--crop", "middle"), "WIDTHxHEIGHT+X+Y"),
        (("--crop", "centre"), "needs the size"),
        (("--crop", "16x16+1+0"), "16x16 at column 1, row 0 does not lie in 16x16"),
        (("--alpha", "keep"), "none of them alpha"),
    ],
    ids=str,
)
@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_options_that_cannot_be(
    tmp_path: Path,
    small_model: Path,
    run: Callable[..., Said],
    verb: str,
    words: tuple[str, ...],
    message: str,
) -> None:
    source = write(tmp_path / "in.mkv", smooth(2, 16, 16))
    target = tmp_path / ("a.safetensors" if verb == "encode" else "a.mkv")
    assert_one_line_error(run(verb, source, target, "--model", small_model, *words), message)
    assert list(tmp_path.iterdir()) == [source]


def test_words_are_read() -> None:
    assert [seconds(t) for t in ("2.5", ".5", "1:02", "1:00:00.25")] == [2.5, 0.5, 62, 3600.25]
    assert [rate(t) for t in ("24", "12.5", "30000/1001")] == [24, 12.5, Fraction(30000, 1001)]
    assert sides("640x360") == (360, 640)
    assert cut("10x20+3+4") == (4, 3, 20, 10)
    assert FrameOptions().selected() == {}
    for wrong in ("-1", "1:2:3:4", "1e3", "", "٣"):
        with pytest.raises(ValueError, match="--start takes"):
            seconds(wrong)


# Folders of images, and single ones ----------------------------------------------------------


def images(folder: Path, count: int = 3, suffix: str = "png") -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(smooth(count, 18, 20)):
        save(folder / f"f{index}.{suffix}", image, "png", "rgb24")
    return folder


def test_folders_of_images_are_clips(
    tmp_path: Path, small_model: Path, run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images(Path("set/walk.v2"))
    images(Path("set/run"), 5)
    Path("set/empty").mkdir()
    write(Path("set/b.mkv"), smooth(2, 16, 16))
    Path("set/notes.txt").write_text("")
    options = ("--model", small_model, "--json")

    def frames(*words: object) -> dict[str, int]:
        said = run("encode", *words, *options, "--overwrite")
        assert said.returncode == 0, said.stderr
        rows = [json.loads(line) for line in said.stdout.splitlines()]
        return {os.path.basename(row["path"]).removesuffix(".safetensors"): row["frames"]
                for row in rows}  # fmt: skip

    assert frames("set/run", "one.safetensors", "--fps", "10") == {"one": 5}
    assert read_latents("one.safetensors")[1].fps == 10
    assert frames("set", "all") == {"walk.v2": 3, "run": 5, "b": 2}
    assert frames("set/[!n]*", "again") == {"walk.v2": 3, "run": 5, "b": 2}
    assert frames("set/run/*.png", "each") == {f"f{i}": 1 for i in range(5)}
    assert frames("set/run/f1.png", "single.safetensors") == {"single": 1}
    monkeypatch.chdir("set/run")
    assert frames(".", "../../here.safetensors") == {"here": 5}
    Path("../../some").mkdir()
    assert frames(".", "../../some") == {"run": 5}


def test_a_folder_of_images_through_reconstruct_and_back(tmp_path: Path) -> None:
    echo = Echo(base_channels=8, channel_multipliers=(1, 2))
    folder = images(tmp_path / "clip", 4)
    summary = reconstructing.reconstruct(folder, tmp_path / "out.mkv", echo, options={"fps": 12})
    assert np.array_equal(read_clip(tmp_path / "out.mkv"), smooth(4, 18, 20))
    assert times(tmp_path / "out.mkv") == pytest.approx([0, 1 / 12, 2 / 12, 3 / 12], abs=6e-4)
    assert summary.frames == 4


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_through_the_verbs(tmp_path: Path, causal: TemporalVAE, suffix: str) -> None:
    module = pillow()
    frames = [module.new("RGB", (24, 16), c) for c in ("red", "lime", "blue")]
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / f"a.{suffix}"
    frames[0].save(source, save_all=True, append_images=frames[1:], duration=[100, 50, 200],
                   lossless=True)  # fmt: skip
    assert find_inputs([tmp_path / "in"], VIDEO_SUFFIXES) == [source]  # and not one still
    _, stored = latents_of(source, tmp_path / "out.mkv", causal)
    assert stored == [0, Fraction(1, 10), Fraction(3, 20)]
    assert read_clip(tmp_path / "out.mkv").shape == (3, 16, 24, 3)


def test_a_folder_that_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="holds none of"):
        find_inputs([tmp_path], VIDEO_SUFFIXES)


# Grey, and RGB with alpha --------------------------------------------------------------------


def test_a_grey_model_sees_the_luma(tmp_path: Path) -> None:
    """It gives grey, which a file has as three equal colours; law 4 as for any other."""
    grey = awake(torch.float32, input_channels=1, causal_mode=True)
    source = write(tmp_path / "in.mkv", noise(7, 17, 31))
    reconstructing.reconstruct(source, tmp_path / "whole.mkv", grey)
    info, _ = latents_of(source, tmp_path / "out.mkv", grey)
    assert (info.frames, info.height, info.width) == (7, 17, 31)
    clip = read_clip(tmp_path / "out.mkv")
    assert np.array_equal(clip, read_clip(tmp_path / "whole.mkv"))
    assert np.array_equal(clip[..., 0], clip[..., 1]) and np.array_equal(clip[..., 1], clip[..., 2])
    assert clip.std() > 1 and times(tmp_path / "out.mkv") == times(source)
    echo = Echo(input_channels=1, base_channels=8, channel_multipliers=(1, 2))
    reconstructing.reconstruct(source, tmp_path / "echo.mkv", echo)
    assert np.array_equal(read_clip(tmp_path / "echo.mkv")[..., :1], chosen(source, channels=1)[0])


@pytest.mark.parametrize("kind", ["vp9", "png", "ffv1"])
def test_a_model_of_four_channels_sees_the_alpha(tmp_path: Path, kind: str) -> None:
    source, _ = alpha_file(tmp_path, kind)
    model = awake(torch.float32, input_channels=4, causal_mode=True)
    with pytest.raises(VideoError, match=r"no place for the alpha .* --alpha drop"):
        reconstructing.reconstruct(source, tmp_path / "out.mp4", model)
    with pytest.raises(VideoError, match=r"no place for the alpha .* --alpha drop"):
        latents_of(source, tmp_path / "out.mp4", model)
    reconstructing.reconstruct(source, tmp_path / "whole.mkv", model, options={"alpha": "drop"})
    latents_of(source, tmp_path / "out.mkv", model, alpha="drop")
    whole = read_clip(tmp_path / "whole.mkv")
    assert np.array_equal(read_clip(tmp_path / "out.mkv"), whole)
    four = chosen(source, channels=4)[0]
    assert whole.shape == (*four.shape[:3], 3)
    echo = Echo(input_channels=4, base_channels=8, channel_multipliers=(1, 2))
    reconstructing.reconstruct(source, tmp_path / "echo.mkv", echo, options={"alpha": "drop"})
    assert np.array_equal(read_clip(tmp_path / "echo.mkv"), four[..., :3])
    reconstructing.reconstruct(source, tmp_path / "kept.mkv", echo)
    assert np.array_equal(chosen(tmp_path / "kept.mkv", channels=4)[0], four)
    reconstructing.reconstruct(source, tmp_path / "whole4.mkv", model)
    latents_of(source, tmp_path / "out4.mkv", model)
    both = [chosen(tmp_path / f"{name}4.mkv", channels=4)[0] for name in ("whole", "out")]
    assert np.array_equal(both[0], both[1]) and np.array_equal(both[0][..., :3], whole)


def test_alpha_is_dropped_only_if_told(tmp_path: Path, causal: TemporalVAE) -> None:
    source, _ = alpha_file(tmp_path, "vp9")
    for options, message in (({}, "--alpha drop"), ({"alpha": "keep"}, "none of them alpha")):
        with pytest.raises(VideoError, match=message):
            latents_of(source, tmp_path / "out.mkv", causal, **options)
    latents_of(source, tmp_path / "out.mkv", causal, alpha="drop")
    assert read_clip(tmp_path / "out.mkv").shape == (2, 48, 64, 3)


def test_info_describes_what_has_alpha(tmp_path: Path, run: Callable[..., Said]) -> None:
    source, _ = alpha_file(tmp_path, "vp9")
    found = json.loads(run("info", source, "--json").stdout)
    assert found["alpha"] is True
    assert (found["colour_matrix"], found["colour_matrix_assumed"]) == (6, True)
    assert "Colour(" not in run("info", source).stdout, "a person reads it"


# What the source was -------------------------------------------------------------------------


def test_colours_and_depth_of_the_source_are_recorded(tmp_path: Path, causal: TemporalVAE) -> None:
    """As they are tagged, and the video that is decoded has them again."""
    tags: dict[str, Any] = {"colorspace": 9, "color_range": 1, "color_primaries": 9,
                            "color_trc": 14}  # fmt: skip
    source = encode_frames(tmp_path / "a.mp4", [bars("yuv420p10le", 16, 24, True)], "libx264",
                           **tags)  # fmt: skip
    path, record = tmp_path / "a.safetensors", causal.latent_record()
    encoded = encoding.encode(source, path, causal, record)
    info = encoded.info
    assert encoded.notes == (), "what the header keeps is not lost"
    assert dict(info.colour) == {"matrix": "9", "primaries": "9", "range": "1", "transfer": "14"}
    assert info.bit_depth == 10
    assert decoding.colour_of(info) == VideoReader(source).info.colour
    for name, pixels in (("b.mp4", "yuv420p10le"), ("b.mkv", "gbrp10le")):
        assert decoding.decode(path, tmp_path / name, causal, record).notes == ()
        again = VideoReader(tmp_path / name).info
        assert again.pixel_format == pixels
        assert (again.colour.primaries, again.colour.transfer) == (9, 14)
    for notes in (
        decoding.decode(path, tmp_path / "d.webm", causal, record).notes,
        reconstructing.reconstruct(source, tmp_path / "e.webm", causal).notes,
    ):
        assert "its 10 bits are written as 8" in notes[0]


def test_bare_rgb_comes_in_as_it_goes_out(tmp_path: Path, run: Callable[..., Said]) -> None:
    """What `-f rawvideo -pix_fmt rgb24` pipes: pixels alone, so size and rate are told."""
    frames = smooth(3, 34, 50)
    (tmp_path / "a.rgb").write_bytes(np.ascontiguousarray(frames).tobytes())
    with VideoReader(tmp_path / "a.rgb", raw=(34, 50, Fraction(30000, 1001))) as video:
        assert np.array_equal(np.stack([frame.image for frame in video]), frames)
        assert video.info.fps == Fraction(30000, 1001)
    write(tmp_path / "b.mkv", frames)
    said = run("reconstruct", tmp_path / "a.rgb", tmp_path / "a.mkv", "--raw", "50x34@25")
    assert said.returncode == 0, said.stderr
    assert run("reconstruct", tmp_path / "b.mkv", tmp_path / "c.mkv").returncode == 0
    assert np.array_equal(read_clip(tmp_path / "a.mkv"), read_clip(tmp_path / "c.mkv"))
    out = tmp_path / "a.safetensors"
    assert run("encode", tmp_path / "a.rgb", out, "--raw", "50x34@25").returncode == 0
    for wrong in ("50x34", "50@25", "0x34@25"):
        said = run("reconstruct", tmp_path / "a.rgb", tmp_path / "d.mkv", "--raw", wrong)
        assert_one_line_error(said, "raw")


def test_both_verbs_that_write_video_take_its_format(
    tmp_path: Path, small_model: Path, run: Callable[..., Said]
) -> None:
    source, by = write(tmp_path / "a.mkv", smooth(3, 64, 80)), ("--model", small_model)
    assert run("encode", source, tmp_path / "a.safetensors", *by).returncode == 0
    for verb, given in (("reconstruct", source), ("decode", tmp_path / "a.safetensors")):
        out = tmp_path / f"{verb}.mkv"
        said = run(verb, given, out, "--codec", "h265", "--depth", 10, "--quality", 30, *by)
        assert said.returncode == 0, said.stderr
        info = VideoReader(out).info
        assert (info.codec, info.bit_depth) == ("hevc", 10)
        said = run(verb, given, tmp_path / "b.mp4", "--codec", "vp9", *by)
        assert said.returncode == 1 and ".mp4 holds h264 or h265" in said.stderr
        assert not (tmp_path / "b.mp4").exists()
        fine, coarse = (tmp_path / f"{verb}_{quality}.mp4" for quality in (5, 45))
        for path, quality in ((fine, 5), (coarse, 45)):
            assert run(verb, given, path, "--quality", quality, *by).returncode == 0
        assert fine.stat().st_size > coarse.stat().st_size
