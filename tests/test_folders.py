"""Folders: what is skipped, what is told, and what stays after a run was killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from conftest import awake
from test_cli import COMMAND
from test_verbs import Said
from test_video import smooth, write

from temporal_vae import LatentFile
from temporal_vae.cli import report
from temporal_vae.convert import ahead, ends, origin
from temporal_vae.convert import encode as encoding
from temporal_vae.latents.info import LatentInfo
from temporal_vae.video import VideoError, VideoReader

Run = Callable[..., Said]


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three videos, below the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("in")
    folder.mkdir()
    for index, name in enumerate(("a.mp4", "b.mkv", "c.mkv")):
        write(folder / name, smooth(3 + index, 16, 16))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """The checksum of every file below a folder, by name; hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.*"))}


# What is skipped -----------------------------------------------------------------------------

VERBS = pytest.mark.parametrize(
    ("verb", "suffix"),
    [("encode", ".safetensors"), ("reconstruct", ".mp4"), ("reconstruct", ".mkv"),
     ("reconstruct", ".webm"), ("decode", ".mov")],
)  # fmt: skip


def words_of(verb: str, suffix: str, model: Path, run: Run) -> tuple[Any, ...]:
    """A verb from the folder "in", or its latents, to the folder "out"."""
    more = () if verb == "encode" else ("--suffix", suffix)
    if verb == "decode":
        assert run("encode", "in", "lat", "--model", model).returncode == 0
    source = "lat" if verb == "decode" else "in"
    return verb, source, "out", "--model", model, *more


@VERBS
def test_only_what_is_missing_is_made(
    clips: Path, small_model: Path, run: Run, verb: str, suffix: str
) -> None:
    words = words_of(verb, suffix, small_model, run)
    assert run(*words).returncode == 0
    whole = contents(Path("out"))
    said = run(*words)
    assert (
        said.returncode == 1 and "--skip-existing" in said.stderr and "--overwrite" in said.stderr
    )
    Path(f"out/b{suffix}").unlink()
    before = stamps(Path("out"))
    said = run(*words, "--skip-existing", "--json")
    assert said.returncode == 0, said.stderr
    assert "2 files are there already" in said.stderr
    rows = [json.loads(line) for line in said.stdout.splitlines()]
    assert [row.get("skipped", False) for row in rows] == [True, True, False]
    assert before.items() <= stamps(Path("out")).items()
    assert contents(Path("out")) == whole, "the same input gave other bytes"
    assert run(*words, "--skip-existing", "--quiet").stderr == ""


@VERBS
def test_what_differs_is_told(
    clips: Path, small_model: Path, run: Run, verb: str, suffix: str, tmp_path: Path
) -> None:
    """Of source, model and options; before anything is done, and with a way out."""
    words = words_of(verb, suffix, small_model, run)
    assert run(*words).returncode == 0
    whole = contents(Path("out"))
    other = tmp_path / "other"
    awake(torch.float32, seed=1).save_pretrained(other)
    differing = ("--sample",) if verb == "decode" else ("--clip-frames", 2)
    named = {"encode": "encoder_sha256", "reconstruct": "encoder_sha256", "decode": "decoder_sha"}
    for more, expected in (
        (("--dtype", "float64"), "with --dtype float32, not with --dtype float64"),
        (differing, f"it was made without {differing[0]}, not with {differing[0]}"),
        (("--model", other, "--any-model") if verb == "decode" else ("--model", other),
         f"another model, with {named[verb]}"),
    ):  # fmt: skip
        said = run(*words, *more, "--skip-existing")
        assert said.returncode == 1 and expected in said.stderr and "--overwrite" in said.stderr
        assert contents(Path("out")) == whole
    source = Path(words[1]) / ("a.safetensors" if verb == "decode" else "a.mp4")
    with source.open("r+b") as file:  # the last bytes: a number of latents, an index of frames
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3e")
    said = run(*words, "--skip-existing")
    assert said.returncode == 1 and f"other bytes than {source} has now" in said.stderr
    assert len(said.stderr.splitlines()) == 1
    before = stamps(Path("out"))
    run(*words, "--skip-existing", "--overwrite")
    changed = {name for name, stamp in stamps(Path("out")).items() if before[name] != stamp}
    assert changed == {f"out/a{suffix}"}


@pytest.mark.parametrize(
    ("option", "first", "then", "said"),
    [
        ("--size", "16x12", "12x16", "with --size 16x12, not with --size 12x16"),
        ("--crop", "8x6+2+4", None, "with --crop 8x6+2+4, not without --crop"),
        ("--start", None, "0.04", "without --start, not with --start 1/25"),
        ("--frames", "2", "1", "with --frames 2, not with --frames 1"),
        ("--stride", "2", None, "with --stride 2, not without --stride"),
        ("--fps", "24", "30000/1001", "with --fps 24, not with --fps 30000/1001"),
        ("--alpha", "drop", None, "with --alpha drop, not without --alpha"),
        ("--latent-dtype", "bfloat16", "float16", "--latent-dtype bfloat16, not with"),
        ("--scaled", "", None, "with --scaled, not without --scaled"),
        ("--clip-frames", "2", None, "with --clip-frames 2, not without --clip-frames"),
        ("--memory", "64MiB", "least", ""),
        ("--jobs", "1", "3", ""),
    ],
)
def test_every_option_that_changes_latents_is_compared(
    clips: Path, small_model: Path, run: Run, option: str, first: str | None, then: str | None,
    said: str,
) -> None:  # fmt: skip
    words = ("encode", "in/a.mp4", "a.safetensors", "--model", small_model)

    def given(value: str | None) -> tuple[str, ...]:
        return () if value is None else (option, value) if value else (option,)

    assert run(*words, *given(first)).returncode == 0
    assert run(*words, *given(first), "--skip-existing").returncode == 0
    found = run(*words, *given(then), "--skip-existing")
    assert said in found.stderr and found.returncode == bool(said), found.stderr


def test_seeds_are_compared_where_one_is_asked_for(
    clips: Path, small_model: Path, run: Run
) -> None:
    words = ("encode", "in", "out", "--model", small_model, "--sample")
    assert run(*words, "--seed", 5).returncode == 0
    assert run(*words, "--skip-existing", "--seed", 5).returncode == 0
    assert run(*words, "--skip-existing").returncode == 0
    assert "with --seed 5, not with --seed 4" in run(*words, "--skip-existing", "--seed", 4).stderr


def test_a_folder_of_images_has_a_checksum(tmp_path: Path, small_model: Path, run: Run) -> None:
    """That of what `sha256sum` prints."""
    folder, latents = tmp_path / "clip", tmp_path / "a.safetensors"
    words = ("encode", folder, latents, "--model", small_model, "--skip-existing")
    assert run("reconstruct", write(tmp_path / "a.mkv", smooth(3, 16, 16)), folder,
               "--model", small_model).returncode == 0  # fmt: skip
    lines = [f"{digest}  {name}\n" for name, digest in sorted(contents(folder).items())]
    assert run(*words).returncode == 0
    with LatentFile(latents) as file:
        assert file.info.source_sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert run(*words).returncode == 0
    (folder / "000003.png").rename(folder / "000000.png")
    assert "other bytes" in run(*words).stderr


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("a.safetensors", lambda path: path.write_text("foreign"), "does not begin like one"),
        ("a.safetensors", lambda path: os.truncate(path, path.stat().st_size - 9), "truncated"),
        ("a.mkv", lambda path: path.write_text("foreign"), "not a video that can be read"),
        ("a.mkv", lambda path: os.truncate(path, path.stat().st_size * 2 // 3), "cut short"),
        ("a.mkv", lambda path: write(path, smooth(3, 16, 16)), "does not say what it was made of"),
    ],
)
def test_what_is_damaged_or_foreign_is_told(
    tmp_path: Path, small_model: Path, run: Run, name: str, damage: Callable[[Path], Any], said: str
) -> None:
    source, target = write(tmp_path / "in.mkv", smooth(30, 16, 16)), tmp_path / name
    verb = "encode" if name.endswith("s") else "reconstruct"
    words = (verb, source, target, "--model", small_model, "--skip-existing")
    assert run(*words).returncode == 0
    assert run(*words).returncode == 0
    damage(target)
    found = run(*words)
    assert found.returncode == 1 and said in found.stderr and "--overwrite" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert run(*words, "--overwrite").returncode == 0
    assert run(*words).returncode == 0


def test_latents_that_do_not_say_how_they_were_made(
    tmp_path: Path, small_model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a file that an older version wrote."""
    source, target = write(tmp_path / "in.mkv", smooth(3, 16, 16)), tmp_path / "a.safetensors"
    words = ("encode", source, target, "--model", small_model)
    honest = encoding._latent_info
    from dataclasses import replace

    monkeypatch.setattr(encoding, "_latent_info", lambda *a: replace(honest(*a), options=None))
    assert run(*words).returncode == 0
    found = run(*words, "--skip-existing")
    assert found.returncode == 1 and "does not say with which options" in found.stderr


@pytest.mark.parametrize("suffix", ["", ".y4m", ".rgb"])
def test_a_video_without_a_place_for_it_is_refused(
    clips: Path, small_model: Path, run: Run, suffix: str
) -> None:
    words = ("reconstruct", "in", "out", "--model", small_model, "--suffix", suffix)
    said = run(*words, "--skip-existing")
    assert said.returncode == 1 and "only .mp4, .mov, .mkv and .webm have a place" in said.stderr


def test_a_source_that_changes_meanwhile_is_not_taken_for_what_was_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is still being copied: the checksum is of the bytes before, not after."""
    model, record = awake(torch.float32), awake(torch.float32).latent_record()
    source, target = write(tmp_path / "a.mkv", smooth(3, 16, 16)), tmp_path / "a.safetensors"
    honest = VideoReader.__exit__

    def late(self: VideoReader, *error: object) -> None:
        honest(self, *error)
        write(source, smooth(4, 16, 16))

    with monkeypatch.context() as patch:
        patch.setattr(VideoReader, "__exit__", late)
        encoding.encode(source, target, model, record)
    wanted = encoding.origin(model, record, encoding.Encoding())
    with pytest.raises(origin.OriginError, match="other bytes"):
        origin.check_made(target, source, wanted)
    encoding.encode(source, target, model, record, overwrite=True)
    origin.check_made(target, source, wanted)


def test_large_files_are_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(200 * 2**20)
    code = (
        "import resource, sys; from temporal_vae.convert.origin import checksum\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "checksum(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    said = subprocess.run([COMMAND[0], "-c", code, path], capture_output=True, text=True)
    assert int(said.stdout) < 20_000, said.stderr


# Trees -----------------------------------------------------------------------------------------


def test_a_tree_is_the_same_tree_of_results(clips: Path, small_model: Path, run: Run) -> None:
    for folder in ("sub/deep", ".hidden", "empty"):
        (clips / folder).mkdir(parents=True)
    for name in ("sub/a.mkv", "sub/deep/a.mkv", ".hidden/a.mkv"):
        write(clips / name, smooth(2, 16, 16))
    (clips / "sub" / "loop").symlink_to("..")
    words = ("reconstruct", "in", "in/out", "--model", small_model, "--suffix", ".mkv")
    said = run(*words)
    assert said.returncode == 0
    assert (
        "passed over: in/empty, in/sub: --recursive" in said.stderr and ".hidden" not in said.stderr
    )
    said = run(*words, "--recursive", "--skip-existing")
    assert said.returncode == 0 and "3 files are there" in said.stderr, said.stderr
    assert "passed over" not in said.stderr
    whole = contents(Path("in/out"))
    assert sorted(whole) == ["a.mkv", "b.mkv", "c.mkv", "sub/a.mkv", "sub/deep/a.mkv"]
    again = run(*words, "--recursive", "--skip-existing")  # results are no sources
    assert "5 files are there" in again.stderr and contents(Path("in/out")) == whole


def test_a_folder_with_nothing_but_folders_says_so(
    tmp_path: Path, small_model: Path, run: Run
) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    write(tmp_path / "in" / "sub" / "a.mkv", smooth(2, 16, 16))
    words = ("encode", tmp_path / "in", tmp_path / "out", "--model", small_model)
    said = run(*words)
    assert said.returncode == 1 and "--recursive looks into" in said.stderr
    assert run(*words, "--recursive").returncode == 0
    assert list(contents(tmp_path / "out")) == ["sub/a.safetensors"]


@pytest.mark.parametrize(
    ("names", "suffix", "said"),
    [
        (("x/a.mp4", "x/a.avi"), ".mkv", "would both be written to"),
        (("a.mkv", "a/b.mkv"), "", "needs a folder"),
    ],
)
def test_clashes_are_named_before_any_work(
    tmp_path: Path, run: Run, names: tuple[str, ...], suffix: str, said: str
) -> None:
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    found = run("reconstruct", tmp_path / "in", tmp_path / "out", "--recursive", "--suffix", suffix)
    assert found.returncode == 1 and said in found.stderr and not (tmp_path / "out").exists()


# What is told ----------------------------------------------------------------------------------


def test_a_note_is_said_once_for_all_files_it_holds_for(
    clips: Path, small_model: Path, run: Run
) -> None:
    for index in range(6):
        with av.open(str(clips / f"d{index}.mkv"), "w") as out:
            stream = out.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            for value in range(2):
                image = np.full((16, 16, 3), 9 * value, np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode(None))
    (clips / "e.mkv").write_text("no video")
    said = run("encode", "in", "out", "--model", small_model)
    notes = [line for line in said.stderr.splitlines() if "not tagged" in line]
    assert len(notes) == 1 and "in/d0.mkv" in notes[0] and "(6 of 10 files)" in notes[0]
    assert "and 1 more" in notes[0] and "e.mkv: not a video" in said.stderr
    assert "note" not in run("encode", "in", "out2", "--model", small_model, "--quiet").stderr


def test_two_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    clock = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    screen = io.StringIO()
    monkeypatch.setattr(report, "err", Console(file=screen, force_terminal=True, width=150))
    whole = report.Whole("encoding", 3)
    with report.Meter("encoding a.mp4", whole=whole) as meter:
        meter(5, 10)
    with report.Meter("encoding b.mp4", whole=whole) as meter:
        meter(2, 8)
        meter._bar.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if "2 of 3" in line or "b.mp4" in line]
    assert lines and lines[-2].startswith("encoding ") and "2 of 3, " in lines[-2]
    assert " left" in lines[-2] and "frames/s" in lines[-2]
    assert lines[-1].startswith("encoding b.mp4") and "2 frames of 8" in lines[-1]


def test_plain_lines_in_a_log_are_rare_and_tell_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    whole = report.Whole("encoding", 40)
    for index in range(40):  # each takes two seconds, so that none is ten seconds old
        with report.Meter(f"encoding {index}.mp4", whole=whole) as meter:
            for done in (4, 8):
                now[0] += 1
                meter(done, 8)
    said = capsys.readouterr().err.splitlines()
    assert 5 <= len(said) <= 8
    assert re.match(
        r"encoding 6 of 40, 4\.\d\d frames/s, 0:01:\d\d left; encoding 5.mp4: ", said[0]
    )
    with report.Meter("encoding", quiet=True, whole=whole) as meter:
        now[0] += 60
        meter(1, 2)
    assert capsys.readouterr().err == ""


# Reading ahead -----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_reading_ahead_changes_nothing(clips: Path, small_model: Path, run: Run, verb: str) -> None:
    (clips / "b2.mkv").write_text("no video")
    for jobs in (1, 2, 9):
        said = run(verb, "in", f"out{jobs}", "--model", small_model, "--jobs", jobs)
        assert said.returncode == 1 and "b2.mkv: not a video" in said.stderr
    assert contents(Path("out1")) == contents(Path("out2")) == contents(Path("out9"))
    assert len(contents(Path("out1"))) == 3
    assert "from 1 to 64, got 0" in run(verb, "in", "out", "--jobs", 0).stderr


def test_a_video_that_is_let_go_at_once_is_closed_in_order(tmp_path: Path) -> None:
    """Closing a file that a thread still reads ends the process."""
    source = write(tmp_path / "a.mkv", smooth(30, 32, 32))
    code = (
        "import sys; from temporal_vae.video import VideoReader\n"
        "for _ in range(80):\n"
        "    reader = VideoReader(sys.argv[1])\n    reader.start()\n    reader.close()"
    )
    assert subprocess.run([COMMAND[0], "-c", code, source]).returncode == 0


def test_as_many_videos_are_open_as_asked_for(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, opened = awake(torch.float32), []
    sources = sorted(clips.iterdir())
    honest = ends.open_video

    def open_video(source: Path, *rest: Any) -> ends.OpenVideo:
        opened.append(honest(source, *rest))
        return opened[-1]

    monkeypatch.setattr(ends, "open_video", open_video)
    with ahead.ReadAhead(sources, model, None, jobs=2) as reading:
        first = reading.take(sources[0])
        deadline = time.monotonic() + 30
        while len(opened) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(opened) == 2, "the next one is open, and not the one after"
        with first.reader as reader:
            assert sum(1 for _ in reader) == 3
        with reading.take(sources[2]).reader as reader:  # b.mkv is let go
            assert sum(1 for _ in reader) == 5
    with (
        pytest.raises(VideoError, match="no such file"),
        ahead.ReadAhead([Path("none.mkv")], model, None, jobs=3) as reading,
    ):
        reading.take(Path("none.mkv"))


# Killed, and run again ---------------------------------------------------------------------------


def killed_and_run_again(
    folder: Path, model: Path, words: tuple[str, ...], kills: int, seed: int
) -> None:
    """As often as said at any moment: then the same bytes as of a run that nobody disturbed.

    Every second time the run is killed in the midst of a file, else anywhere from its start on.
    """
    verb, *rest = words

    def start(out: str, *more: str) -> subprocess.Popen[str]:
        command = [*COMMAND, verb, "in", out, *rest, "--model", str(model), *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder)

    begin, chance = time.monotonic(), random.Random(seed)
    start("whole").communicate(timeout=110)
    length, cut = time.monotonic() - begin, 0
    for number in range(kills):
        run = start("out", "--skip-existing")
        midst = number % 2 == 0
        while midst and run.poll() is None and not partials(folder / "out"):
            time.sleep(0.01)
        if number:  # the first one is killed as soon as there is something to leave behind
            time.sleep(chance.random() * (0.5 if midst else length))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        cut += bool(partials(folder / "out"))
    assert cut, "no kill left a file that was not finished: the test tests nothing"
    last = start("out", "--skip-existing")
    said = last.communicate(timeout=110)[1]
    assert last.returncode == 0, said
    assert len(contents(folder / "whole")) == 3
    assert contents(folder / "out") == contents(folder / "whole")


def partials(out: Path) -> list[Path]:
    return [path for path in out.rglob(".*part*")] if out.exists() else []


def long_clips(folder: Path) -> None:
    (folder / "in" / "sub").mkdir(parents=True)
    for index, name in enumerate(("a.mkv", "b.mkv", "sub/c.mkv")):
        write(folder / "in" / name, smooth(60 + index, 96, 96))


def test_a_killed_run_is_taken_up(tmp_path: Path, small_model: Path) -> None:
    long_clips(tmp_path)
    killed_and_run_again(tmp_path, small_model, ("encode", "--recursive"), 4, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("encode", "--recursive", "--jobs", "3"),
              ("reconstruct", "--recursive", "--suffix", ".mkv")], ids=str
)  # fmt: skip
def test_a_run_that_is_killed_often_is_taken_up(
    tmp_path: Path, small_model: Path, words: tuple[str, ...]
) -> None:
    long_clips(tmp_path)
    killed_and_run_again(tmp_path, small_model, words, 12, 1)


def test_two_runs_at_once_do_not_hurt_each_other(tmp_path: Path, small_model: Path) -> None:
    long_clips(tmp_path)
    words = [*COMMAND, "encode", "in", "out", "--recursive", "--skip-existing", "--model"]
    runs = [
        subprocess.Popen([*words, small_model], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=110)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sorted(contents(tmp_path / "out")) == [
        "a.safetensors", "b.safetensors", "sub/c.safetensors",
    ]  # fmt: skip


def test_a_run_with_other_options_does_not_replace_what_another_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither was told to overwrite: the file of the one that ends first stays."""
    model, record = awake(torch.float32), awake(torch.float32).latent_record()
    source, target = write(tmp_path / "a.mkv", smooth(3, 16, 16)), tmp_path / "a.safetensors"
    honest: Callable[..., LatentInfo] = encoding._latent_info

    def late(*words: Any) -> LatentInfo:
        monkeypatch.setattr(encoding, "_latent_info", honest)
        encoding.encode(source, target, model, record, encoding.Encoding(scaled=True))
        return honest(*words)

    monkeypatch.setattr(encoding, "_latent_info", late)
    with pytest.raises(FileExistsError, match="is kept"):
        encoding.encode(source, target, model, record)
    with LatentFile(target) as file:
        assert file.info.scaled
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mkv", "a.safetensors"]
