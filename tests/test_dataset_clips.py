"""Which clips are made of videos: by buckets, by length, by scenes; in a data set of latents."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from test_dataset import contents, rows, run
from test_video import noise, smooth, write

from temporal_vae import TemporalVAE, read_latents
from temporal_vae.cli.options import cut as typed_crop
from temporal_vae.convert.encode import encode
from temporal_vae.dataset.buckets import Bucket, fitting, parse_buckets
from temporal_vae.dataset.clips import Clip, Cutting, Passed, clips_of
from temporal_vae.dataset.entries import Entry
from temporal_vae.files.safetensors import SUFFIX
from temporal_vae.video import Options, Uint8Frames, VideoError, VideoReader, read_clip
from temporal_vae.video.sources import Source


def cut_up(
    path: Path, cut: Any = None, buckets: str = "", done: tuple[str, ...] = (), **options: Any
) -> list[tuple[str, Any]]:
    """Names and frames of the clips of a video; reasons of those that are left out."""
    cutting = Cutting(options=cast(Options, options), reading={"channels": 3}, cut=cut,
                      buckets=parse_buckets(buckets) if buckets else ())  # fmt: skip
    found: list[tuple[str, Any]] = []
    for clip in clips_of(Entry(0, "v", Source(str(path))), cutting, done):
        if isinstance(clip, Passed):
            found.append((clip.name, clip.reason))
        else:
            found.append((clip.name, np.stack([frame.image for frame in clip])))
    return found


def scenes() -> Uint8Frames:
    """Three scenes of 20, 25 and 18 frames."""
    parts = [smooth(n, 48, 64) // 4 + shade for n, shade in ((20, 0), (25, 180), (18, 60))]
    parts[1] = parts[1][:, ::-1, :, ::-1]
    return np.ascontiguousarray(np.concatenate(parts)).astype(np.uint8)


# Buckets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "chosen"), [
    ((720, 1280), "640x360"), ((1280, 720), "360x640"), ((100, 100), "256x256"),
    ((1080, 1000), "512x512"), ((200, 350), "320x180"), ((360, 640), "640x360"),
])  # fmt: skip
def test_the_bucket_of_the_nearest_shape_is_taken(size: tuple[int, int], chosen: str) -> None:
    buckets = parse_buckets("640x360,320x180 360x640,256x256,512x512")
    found = fitting(buckets, size, Fraction(size[1], size[0]))
    assert [str(bucket) for bucket in found] == [chosen]


def test_lengths_of_a_bucket_come_the_longest_first() -> None:
    buckets = parse_buckets("64x64x5,64x64x17,64x64,32x64x9")
    assert fitting(buckets, (64, 64), Fraction(1)) == (
        Bucket(64, 64, 17), Bucket(64, 64, 5), Bucket(64, 64)
    )  # fmt: skip


@pytest.mark.parametrize("typed", ["", "64", "64x", "0x64", "64x64x0", "64x64x9x9", "axb"])
def test_what_is_no_bucket_is_refused(typed: str) -> None:
    with pytest.raises(ValueError, match="bucket"):
        parse_buckets(typed)


def test_a_clip_of_a_bucket_is_cut_in_the_middle_and_as_long_as_it_says(
    tmp_path: Path, model: TemporalVAE
) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    source.mkdir()
    write(source / "wide.mkv", noise(7, 32, 96))
    write(source / "high.mkv", noise(12, 64, 40))
    write(source / "short.mkv", noise(2, 32, 64))
    buckets = parse_buckets("64x32x3,64x32x6,32x64x10")
    assert run(source, out, model, buckets=buckets) == {"ok": 2, "skipped": 1}
    found = {row["name"]: row for row in rows(out)}
    assert found["wide.mkv"]["bucket"] == "64x32x6" and found["high.mkv"]["bucket"] == "32x64x10"
    assert "2 frames are fewer" in found["short.mkv"]["error"]
    sizes = [(r["width"], r["height"], r["frames"]) for r in found.values() if r["frames"]]
    assert sizes == [(32, 64, 10), (64, 32, 6)]
    options = json.loads(found["wide.mkv"]["options"])
    assert typed_crop(options["crop"]) == "centre" and options["size"] == "64x32"
    encode(source / "wide.mkv", tmp_path / f"a{SUFFIX}", model, model.latent_record("small"),
           options={"size": (32, 64), "crop": "centre", "frames": 6})  # fmt: skip
    assert (out / f"wide.mkv{SUFFIX}").read_bytes() == (tmp_path / f"a{SUFFIX}").read_bytes()


def test_a_file_that_is_shorter_than_it_says_is_no_clip_of_that_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from temporal_vae.video import VideoInfo

    path = write(tmp_path / "a.mkv", noise(5, 32, 32))
    monkeypatch.setattr(VideoInfo, "expected_frames", property(lambda self: 9))
    with pytest.raises(VideoError, match="ends after 5 of 8 frames"):
        cut_up(path, buckets="32x32x8")
    monkeypatch.setattr(VideoInfo, "expected_frames", property(lambda self: None))
    with pytest.raises(VideoError, match="does not say how long"):
        cut_up(path, buckets="32x32x8")
    assert len(cut_up(path, buckets="32x32")[0][1]) == 5


# By length ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"start": 0.12}, {"fps": 10}, {"frames": 9}], ids=str
)
def test_clips_of_a_length_join_to_the_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path / "a.mkv", noise(23, 16, 16))
    [(_, whole)] = cut_up(path, **options)
    clips = cut_up(path, 4, **options)
    assert [name for name, _ in clips] == [f"v~{4 * i:06d}" for i in range(-(-len(whole) // 4))]
    assert all(len(frames) == 4 for _, frames in clips[:-1])
    assert np.array_equal(np.concatenate([frames for _, frames in clips]), whole)
    done = tuple(name for name, _ in clips[::2])
    left = cut_up(path, 4, done=done, **options)
    assert [name for name, _ in left] == [name for name, _ in clips[1::2]]
    for (_, now), (_, before) in zip(left, clips[1::2], strict=True):
        assert np.array_equal(now, before)


def test_a_clip_nobody_reads_to_its_end_does_not_move_the_next(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", noise(12, 16, 16))
    cutting = Cutting(options={}, reading={}, cut=4)
    first = []
    for clip in clips_of(Entry(0, "v", Source(str(path))), cutting):
        assert isinstance(clip, Clip)
        first.append(next(iter(clip)).image)
    assert np.array_equal(np.stack(first), read_clip(path)[::4])


def test_a_part_is_what_encode_makes_from_its_start(tmp_path: Path, model: TemporalVAE) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    source.mkdir()
    path = write(source / "a.mkv", noise(11, 32, 32))
    assert run(source, out, model, cut=4) == {"ok": 3}
    assert [row["start"] for row in rows(out)] == [0, 0.16, 0.32]
    assert [row["first"] for row in rows(out)] == [0, 4, 8]
    for name, row in zip(contents(out), rows(out), strict=True):
        options: Options = {"start": Fraction(row["first"], 25), "frames": 4}
        target = tmp_path / f"b{SUFFIX}"
        encode(path, target, model, model.latent_record("small"), options=options, overwrite=True)
        assert target.read_bytes() == (out / name).read_bytes()


# By scenes ---------------------------------------------------------------------------------------


def test_a_scene_is_a_clip(tmp_path: Path) -> None:
    pytest.importorskip("scenedetect")
    path = write(tmp_path / "a.mkv", scenes())
    whole = read_clip(path)
    clips = cut_up(path, "scenes")
    assert [name for name, _ in clips] == ["v~000000", "v~000020", "v~000045"]
    assert np.array_equal(np.concatenate([frames for _, frames in clips]), whole)
    fitted = cut_up(path, "scenes", "64x48x24,64x48x19")
    assert [len(frames) for _, frames in fitted[:2]] == [19, 24] and "fewer" in fitted[2][1]
    with VideoReader(path, stride=2) as reader:
        halved = [frame.image for frame in reader]
    clips = cut_up(path, "scenes", stride=2)
    assert np.array_equal(np.concatenate([frames for _, frames in clips]), np.stack(halved))


def test_scenes_without_the_package_are_refused_before_anything_is_done(
    tmp_path: Path, model: TemporalVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *r: None if n == "scenedetect" else find(n, *r)
    )
    with pytest.raises(ValueError, match=r"temporal-video-vae\[scenes\]"):
        run(tmp_path, tmp_path / "out", model, cut="scenes")
    assert not (tmp_path / "out").exists()


# Samples -----------------------------------------------------------------------------------------


def test_samples_of_clips_are_their_own_and_the_same_in_each_run(
    tmp_path: Path, model: TemporalVAE
) -> None:
    from temporal_vae.convert.encode import Encoding

    source = tmp_path / "src"
    source.mkdir()
    for name in ("a", "b"):
        write(source / f"{name}.mkv", smooth(3, 32, 32))
    for out, seed in (("one", None), ("two", 0), ("three", 1)):
        run(source, tmp_path / out, model, Encoding(sample=True, seed=seed, scaled=True))
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and one != three
    a, b = (read_latents(tmp_path / "one" / f"{n}.mkv{SUFFIX}")[0] for n in ("a", "b"))
    assert not a.equal(b)
