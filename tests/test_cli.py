"""The command, end to end: law 4, and errors that are one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from test_video import audio_only, smooth, text_file, write

from temporal_vae import TemporalVAE, app, geometry
from temporal_vae.metrics import psnr
from temporal_vae.video import VideoReader, VideoWriter, read_clip

COMMAND = [sys.executable, "-c", "from temporal_vae.cli import main; main()"]


def tvae(*words: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = COMMAND + [str(word) for word in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def assert_one_line_error(result: subprocess.CompletedProcess[str], words: str) -> None:
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tvae: "), result.stderr
    assert words in lines[0]
    assert "Traceback" not in result.stderr


def times(path: Path) -> list[float]:
    with VideoReader(path) as video:
        return [float(frame.pts * video.info.time_base) for frame in video]


def assert_shape_is_kept(source: Path, target: Path, model: Path) -> None:
    """Law 4: frames in = frames out, size in = size out, timestamps kept."""
    app.reconstruct(source, target, TemporalVAE.from_pretrained(model), clip_frames=4)
    assert read_clip(target).shape == read_clip(source).shape
    tolerance = 1e-9 if target.suffix == ".mp4" else 0.0005001
    difference = np.abs(np.array(times(target)) - np.array(times(source)))
    assert difference.max() <= tolerance, "timestamps moved"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("frames", "size"), [(1, (17, 31)), (7, (32, 32)), (13, (33, 20)), (2, (1, 3))]
)
def test_shape_is_kept(
    tmp_path: Path, small_model: Path, suffix: str, frames: int, size: tuple[int, int]
) -> None:
    pts = [3 * i + i % 2 for i in range(frames)]
    source = write(tmp_path / "in.mp4", smooth(frames, *size), pts, Fraction(1, 75))
    assert_shape_is_kept(source, tmp_path / f"out{suffix}", small_model)


def test_law_4_sees_a_lost_column(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = geometry.Padding.to_cells
    monkeypatch.setattr(
        geometry.Padding, "to_cells", lambda h, w, f: exact(h // f * f, w // f * f, f)
    )
    source = write(tmp_path / "in.mkv", smooth(3, 17, 31))
    with pytest.raises((AssertionError, ValueError)):
        assert_shape_is_kept(source, tmp_path / "out.mkv", small_model)


def test_law_4_sees_moved_timestamps(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda s, image, pts: honest(s, image, pts // 2))
    source = write(tmp_path / "in.mkv", smooth(3, 16, 16), [0, 40, 90], Fraction(1, 1000))
    with pytest.raises(AssertionError, match="timestamps moved"):
        assert_shape_is_kept(source, tmp_path / "out.mkv", small_model)


def test_reconstruct_a_real_clip(tmp_path: Path, real_clip: Path) -> None:
    """The bundled weights on real frames, through the command, against what was written."""
    source, target = tmp_path / "clip.mkv", tmp_path / "out.mp4"
    clip = read_clip(real_clip, frames=5, width=181)
    write(source, clip)
    result = tvae("reconstruct", source, target)
    assert result.returncode == 0, result.stderr
    assert "5 frames" in result.stdout and "in clips of 16 frames" in result.stdout
    assert "frames/s" in result.stdout
    back = read_clip(target)
    assert back.shape == clip.shape
    assert psnr(clip, back) > 22
    assert {p.name for p in tmp_path.iterdir()} == {"clip.mkv", "out.mp4"}


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", lambda p: None, "no such file"),
    ("empty", lambda p: p.touch(), "not a video"),
    ("text", text_file, "not a video"),
    ("audio", audio_only, "no video stream"),
    ("folder", lambda p: p.mkdir(), "folder"),
]


@pytest.mark.parametrize(("make", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_sources(
    tmp_path: Path, small_model: Path, make: Callable[[Path], object], words: str
) -> None:
    source = tmp_path / "in.mp4"
    make(source)
    result = tvae("reconstruct", source, tmp_path / "out.mp4", "--model", small_model)
    assert_one_line_error(result, words)
    assert not [p for p in tmp_path.iterdir() if p != source], "something was left behind"


@pytest.mark.parametrize(
    ("target", "words"),
    [("out.avi", "must end in"), ("nowhere/out.mp4", "does not exist"), ("in.mp4/out.mkv", "not")],
)
def test_bad_targets(tmp_path: Path, small_model: Path, target: str, words: str) -> None:
    source = write(tmp_path / "in.mp4", smooth(3, 16, 16))
    result = tvae("reconstruct", source, tmp_path / target, "--model", small_model)
    assert_one_line_error(result, words)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "nothing"), "no model 'nothing'"),
        (("--dtype", "int8"), "dtype must be one of"),
        (("--device", "abacus"), "no device 'abacus'"),
    ],
)
def test_bad_options(tmp_path: Path, options: tuple[str, str], words: str) -> None:
    source = write(tmp_path / "in.mp4", smooth(3, 16, 16))
    assert_one_line_error(tvae("reconstruct", source, tmp_path / "out.mp4", *options), words)


def test_an_unwritable_folder(tmp_path: Path, small_model: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/out.mp4")  # root may write anywhere else
    else:
        target = tmp_path / "locked" / "out.mp4"
        target.parent.mkdir(mode=0o500)
    source = write(tmp_path / "in.mp4", smooth(3, 16, 16))
    result = tvae("reconstruct", str(source), str(target), "--model", str(small_model))
    assert_one_line_error(result, "cannot write in")


def test_a_truncated_video_is_processed_and_the_loss_is_said(
    tmp_path: Path, small_model: Path
) -> None:
    path = write(
        tmp_path / "in.mkv", np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)
    )
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)
    result = tvae("reconstruct", path, tmp_path / "out.mkv", "--model", small_model)
    assert result.returncode == 0, result.stderr
    assert "tvae: note: " in result.stderr and "frames end at" in result.stderr
    assert 0 < len(read_clip(tmp_path / "out.mkv")) < 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_file(tmp_path: Path, small_model: Path, number: int) -> None:
    source = write(tmp_path / "in.mkv", smooth(400, 160, 160))
    target = tmp_path / "out.mp4"
    target.write_text("old")
    words = ["reconstruct", str(source), str(target), "--model", str(small_model)]
    process = subprocess.Popen(COMMAND + words, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.part.mp4")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, -number)
    assert b"Traceback" not in said
    assert {p.name for p in tmp_path.iterdir()} == {"in.mkv", "out.mp4"}
    assert target.read_text() == "old"


def test_info(tmp_path: Path, small_model: Path) -> None:
    here = tvae("info").stdout
    assert "tiny" in here and "torch" in here
    model = tvae("info", small_model).stdout
    assert "parameters" in model and "base_channels" in model and "on each side" in model
    source = write(tmp_path / "in.mp4", smooth(3, 16, 18))
    video = tvae("info", source).stdout
    assert "18x16" in video and "h264" in video and "yuv420p" in video
    assert_one_line_error(tvae("info", tmp_path / "nothing"), "no such file")


def test_help_needs_no_work() -> None:
    assert "reconstruct" in tvae("--help").stdout
    assert "--clip-frames" in tvae("reconstruct", "--help").stdout


@pytest.mark.slow
def test_memory_is_flat_in_the_length(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    said = subprocess.run(
        [sys.executable, root / "benchmarks/flat_memory.py"], capture_output=True, text=True
    ).stdout
    assert float(said.rsplit("ratio", 1)[1]) < 1.05, said
