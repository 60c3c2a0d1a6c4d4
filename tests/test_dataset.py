"""A data set of videos to one of latents: names, resuming after kills, broken videos, layouts."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_verbs import mounted
from test_video import noise, smooth, write

from temporal_vae import LatentFile, TemporalVAE, read_latents
from temporal_vae.convert.encode import Encoding, encode
from temporal_vae.dataset import local
from temporal_vae.dataset.clips import Clip, Cutting, clips_of
from temporal_vae.dataset.encode import DatasetOptions, encode_dataset
from temporal_vae.dataset.entries import Entry, entries_of, quoted
from temporal_vae.dataset.latents import LatentDataset
from temporal_vae.dataset.manifest import COLUMNS, State
from temporal_vae.files.safetensors import SUFFIX
from temporal_vae.video import VideoReader
from temporal_vae.video.sources import Source

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, of the extra dataset, is not installed")
COMMAND = [sys.executable, "-m", "temporal_vae"]
Said = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of 32x32, two of one name, and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep").mkdir()
    for index in range(4):
        write(folder / f"{index}.mkv", smooth(3 + index, 32, 32))
    write(folder / "0.mp4", noise(3, 32, 32))
    write(folder / "deep" / "0.mkv", noise(2, 32, 32))
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def made(videos: Path, model: TemporalVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that one undisturbed run makes of `videos`."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert run(videos, out, model) == {"ok": 6, "failed": 1}
    return out


def run(
    source: Path, out: Path, model: TemporalVAE, how: Encoding | None = None, **options: Any
) -> dict[str, int]:
    given = DatasetOptions(**{"workers": 1, **options})
    return encode_dataset(source, out, model, model.latent_record("small"), how, given)


def contents(out: Path) -> dict[str, bytes]:
    """The files of a data set, but for the state of the run and the seconds it took."""
    files = (p for p in sorted(out.rglob("*")) if p.is_file() and ".tvae" not in p.parts)
    return {str(p.relative_to(out)): p.read_bytes() for p in files if p.suffix != ".parquet"}


def parquet() -> Any:
    from pyarrow import parquet

    return parquet


def rows(out: Path) -> list[dict[str, Any]]:
    table = parquet().read_table(out / "manifest.parquet")
    assert table.column_names == list(COLUMNS)
    return list(table.drop_columns(["seconds"]).to_pylist())


# What is made ------------------------------------------------------------------------------------


def test_each_video_becomes_the_file_that_encode_makes(
    videos: Path, made: Path, model: TemporalVAE, tmp_path: Path
) -> None:
    names = ["0.mkv", "0.mp4", "1.mkv", "2.mkv", "3.mkv", "deep/0.mkv"]
    assert list(contents(made)) == [f"{name}{SUFFIX}" for name in names]
    for name in names:
        encode(videos / name, tmp_path / f"a{SUFFIX}", model, model.latent_record("small"),
               overwrite=True)  # fmt: skip
        assert (tmp_path / f"a{SUFFIX}").read_bytes() == (made / f"{name}{SUFFIX}").read_bytes()


def test_the_manifest_says_what_the_files_hold(videos: Path, made: Path) -> None:
    found = {row["name"]: row for row in rows(made)}
    names = ["0.mkv", "0.mp4", "1.mkv", "2.mkv", "3.mkv", "broken.mp4", "deep/0.mkv"]
    assert list(found) == names
    for name, row in found.items():
        assert row["source"] == str(videos / name)
        if name == "broken.mp4":
            assert row["status"] == "failed" and "not a video" in row["error"]
            continue
        with LatentFile(made / f"{name}{SUFFIX}") as file:
            info = file.info
        for column in ("frames", "height", "width", "source_sha256", "encoder_sha256", "kind",
                       "latent_frames", "channels", "rows", "columns", "options"):  # fmt: skip
            assert row[column] == getattr(info, column), column
        assert row["status"] == "ok" and row["error"] is None and row["model"] == "small"
        assert row["bytes"] == (made / f"{name}{SUFFIX}").stat().st_size


def test_pandas_and_duckdb_open_the_manifest(made: Path) -> None:
    pandas, duckdb = pytest.importorskip("pandas"), pytest.importorskip("duckdb")
    table = pandas.read_parquet(made / "manifest.parquet")
    assert table[table.status == "ok"].frames.sum() == 3 + 3 + 4 + 5 + 6 + 2
    query = f"select count(*), sum(frames) from '{made / 'manifest.parquet'}' where status = 'ok'"
    assert duckdb.sql(query).fetchall() == [(6, 23)]


def test_the_command_ends_with_status_2_and_a_count(
    videos: Path, small_model: Path, tmp_path: Path, run: Callable[..., Said], made: Path
) -> None:
    words = ("encode-dataset", videos, tmp_path / "out", "--model", small_model, "--workers", 1)
    said = run(*words)
    assert said.returncode == 2 and "tvae: 1 of 7 failed" in said.stderr
    assert "6 clips" in said.stdout and "Traceback" not in said.stderr
    mine, theirs = contents(tmp_path / "out"), contents(made)
    assert mine.keys() == theirs.keys()
    assert run(*words).returncode == 2  # nothing is tried again, and it is still said
    said = run(*words, "--cut", "3")
    assert said.returncode == 1 and "begun with cut None, now it is 3" in said.stderr


# Names -------------------------------------------------------------------------------------------


def test_names_never_escape_and_never_collide(tmp_path: Path) -> None:
    paths = [
        "a.mp4", "../a.mp4", "/a.mp4", "//a.mp4", "./a.mp4", "b/../../a.mp4", ".a.mp4", "a/b.mp4",
        "a//b.mp4", "..", ".", "a\0.mp4", "a~1.mp4", "a%7E1.mp4", "c:\\a.mp4", "\udcff.mp4",
        "%FF.mp4", "a.mp4.safetensors/b.mp4", "manifest.parquet/b.mp4", ".tvae/clips.sqlite",
        "x" * 300, "x" * 301, "é" * 200 + ".mp4", "a" * 179 + "%",
    ]  # fmt: skip
    names = [quoted(path) for path in paths]
    assert len(set(names)) == len(names)
    files = [tmp_path / f"{name}{SUFFIX}" for name in names]
    for file in files:  # none is a folder of another one, or too long
        assert file.resolve().is_relative_to(tmp_path.resolve()) and ".." not in file.parts
        assert not any(part.startswith(".") for part in file.relative_to(tmp_path).parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(exist_ok=False)
    assert not (tmp_path / "manifest.parquet").exists()


def test_a_tar_with_names_that_lead_elsewhere_and_twice(
    videos: Path, model: TemporalVAE, tmp_path: Path
) -> None:
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src" / "a.tar", "w") as tar:
        for name in ("../../up.mkv", "/root.mkv", "same.mkv", "same.mkv", "s/caption.txt"):
            tar.add(videos / ("1.mkv" if tar.getmembers() else "0.mkv"), arcname=name)
    shutil.copy(tmp_path / "src" / "a.tar", tmp_path / "src" / "b.tar")
    (tmp_path / "src" / "cut.tar").write_bytes(b"x" * 700)
    out = tmp_path / "out"
    assert run(tmp_path / "src", out, model) == {"ok": 8, "failed": 1}
    assert len(contents(out)) == 8 and f"a.tar/same.mkv~2{SUFFIX}" in contents(out)
    assert {path.name for path in tmp_path.iterdir()} == {"src", "out"}
    assert read_latents(out / f"b.tar/same.mkv{SUFFIX}")[1].source == "same.mkv"


# Manifests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_manifest_names_videos_and_parts_of_them(
    videos: Path, model: TemporalVAE, tmp_path: Path, suffix: str
) -> None:
    listed: list[dict[str, str | None]] = [
        {"path": "0.mkv", "start": None, "frames": None, "caption": "a slope"},
        {"path": str(videos / "3.mkv"), "start": "0.04", "frames": "2", "caption": "part"},
        {"path": str(videos / "3.mkv"), "start": "0.12", "frames": "2", "caption": "another"},
        {"path": None, "start": None, "frames": None, "caption": "lost"},
        {"path": "gone.mkv", "start": "-1", "frames": None, "caption": None},
        {"path": "gone.mkv", "start": None, "frames": None, "caption": None},
    ]
    shutil.copy(videos / "0.mkv", tmp_path)
    table = tmp_path / f"list{suffix}"
    if suffix == ".csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(listed[0]))
            writer.writeheader()
            writer.writerows(listed)
    elif suffix == ".jsonl":
        table.write_text("\n".join(map(json.dumps, listed)) + "\n")
    else:
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(listed), table)
    out = tmp_path / "out"
    counts = run(table, out, model)
    found = rows(out)
    assert counts["ok"] == 3 and [row["status"] for row in found[:3]] == ["ok"] * 3
    assert [row["caption"] for row in found[:3]] == ["a slope", "part", "another"]
    assert [row["frames"] for row in found[:3]] == [3, 2, 2]
    assert [row["start"] for row in found[:3]] == [0, 0.04, 0.12]
    assert all("no column" in r["error"] or "0 or more" in r["error"] or "No such" in r["error"]
               for r in found[3:])  # fmt: skip


# Stopped at any moment ---------------------------------------------------------------------------


def forked(work: Callable[[], object]) -> int:
    """A process that does some work and ends, for it to be killed; its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(0)


def killed(pid: int, whom: str, after: float) -> None:
    """Kill the process, those that decode for it, or all, after some seconds unless it has ended;
    wait for its end."""
    import psutil

    process, deadline = psutil.Process(pid), time.monotonic() + after
    children: list[psutil.Process] = []
    while process.status() != psutil.STATUS_ZOMBIE:
        children = process.children()
        if time.monotonic() > deadline and (children or whom == "driver"):
            break
        time.sleep(0.005)
    for one in {"driver": [process], "workers": children, "all": [process, *children]}[whom]:
        one.kill()
    os.waitpid(pid, 0)


def known(out: Path) -> dict[str, int]:
    """The clips that the state of a run knows of, and when their files were written."""
    file = out / ".tvae" / "clips.sqlite"
    if not file.exists():
        return {}
    base = sqlite3.connect(file)
    try:
        found = [name for (name,) in base.execute("select name from clips where status = 'ok'")]
    except sqlite3.OperationalError:  # killed before there were tables
        found = []
    base.close()
    return {name: (out / f"{name}{SUFFIX}").stat().st_mtime_ns for name in found}


def assert_kills_change_nothing(
    videos: Path, made: Path, out: Path, model: TemporalVAE, kills: int, **options: Any
) -> None:
    """Kill runs until so many were killed, beginning anew where one came to its end."""
    chance = random.Random(kills)
    begun = time.monotonic()
    run(videos, out, model, **options)
    whole, count, done = time.monotonic() - begun, 0, dict[str, int]()
    while count < kills:
        if count % 3 == 0:  # so that there is something left to do
            shutil.rmtree(out)
            done = {}
        whom = ("workers", "driver", "all")[count % 3]
        pid = forked(lambda: run(videos, out, model, **options))
        killed(pid, whom, chance.uniform(0, whole))
        if options.get("layout", "files") == "files":
            now = known(out)  # what is known is whole, and was not made again
            assert done.items() <= now.items()
            done = now
        for file in out.rglob(f"[!.]*{SUFFIX}"):
            LatentFile(file).__exit__()
        count += 1
    run(videos, out, model, **options)
    assert contents(out) == contents(made) and rows(out) == rows(made)
    assert not list(out.rglob("*.part*")) and not list(out.rglob(".*.tvae-*"))


def test_kills_change_nothing(videos: Path, made: Path, tmp_path: Path, model: TemporalVAE) -> None:
    assert_kills_change_nothing(videos, made, tmp_path / "out", model, 6)


@pytest.mark.slow
def test_kills_change_nothing_in_shards(videos: Path, tmp_path: Path, model: TemporalVAE) -> None:
    options: dict[str, Any] = {"layout": "webdataset", "shard_clips": 2}
    run(videos, tmp_path / "made", model, **options)
    assert len(contents(tmp_path / "made")) == 3
    assert_kills_change_nothing(videos, tmp_path / "made", tmp_path / "out", model, 6, **options)


@pytest.mark.slow
def test_sixty_kills_change_nothing(
    videos: Path, made: Path, tmp_path: Path, model: TemporalVAE
) -> None:
    assert_kills_change_nothing(videos, made, tmp_path / "out", model, 60)


def decoded_by(monkeypatch: pytest.MonkeyPatch, script: Path, text: str) -> None:
    """Have another program in place of the one that decodes."""
    script.write_text(text)
    monkeypatch.setattr(local, "COMMAND", (sys.executable, str(script)))


def test_a_process_that_decodes_and_dies_each_time_fails_its_video_only(
    videos: Path, model: TemporalVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded_by(
        monkeypatch, tmp_path / "decoder.py",
        "import os\nfrom temporal_vae.dataset import decoder\nmessages = decoder.messages\n"
        "def dies(entry, *rest):\n"
        "    for message in messages(entry, *rest):\n"
        "        yield message\n"
        "        if entry.name == '2.mkv' and message[0] == 'clip':\n"
        "            os.kill(os.getpid(), 9)\n"
        "decoder.messages = dies\ndecoder.main()\n",
    )  # fmt: skip
    out = tmp_path / "out"
    assert run(videos, out, model) == {"ok": 5, "failed": 2}
    failed = {row["name"]: row["error"] for row in rows(out) if row["status"] == "failed"}
    assert failed["2.mkv"] == "the process that decodes it was ended 2 times"
    monkeypatch.undo()
    assert run(videos, out, model) == {"ok": 5, "failed": 2}  # not tried again unless asked
    assert run(videos, out, model, retry_failed=True) == {"ok": 6, "failed": 1}


def test_what_a_process_says_that_decodes_is_data_and_runs_nothing(
    videos: Path, model: TemporalVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may take over the process that libav reads it in; it gets no further."""
    decoded_by(
        monkeypatch, tmp_path / "decoder.py",
        "import os, pickle, pathlib, sys\n"
        "class Runs:\n"
        "    def __reduce__(self):\n"
        f"        return pathlib.Path.touch, (pathlib.Path({str(tmp_path / 'ran')!r}),)\n"
        "sys.stdin.buffer.read(16)\n"
        "sys.stdout.buffer.write(pickle.dumps(Runs()))\n",
    )  # fmt: skip
    assert run(videos, tmp_path / "out", model) == {"failed": 7}
    assert not (tmp_path / "ran").exists()


def test_what_changed_or_is_gone_is_made_again(
    videos: Path, model: TemporalVAE, tmp_path: Path
) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    source.mkdir()
    for name in ("0.mkv", "1.mkv", "2.mkv"):
        shutil.copy(videos / name, source)
    run(source, out, model)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob(f"*{SUFFIX}")}
    (out / f"0.mkv{SUFFIX}").unlink()
    shutil.copy(videos / "3.mkv", source / "1.mkv")
    shutil.copy(videos / "0.mkv", source / "00.mkv")
    assert run(source, out, model) == {"ok": 4}
    after = {p.name: p.stat().st_mtime_ns for p in out.glob(f"*{SUFFIX}")}
    assert [name for name in before if before[name] == after[name]] == [f"2.mkv{SUFFIX}"]
    assert [row["frames"] for row in rows(out)] == [3, 3, 6, 5]


def test_two_runs_at_a_time_are_refused(
    videos: Path, model: TemporalVAE, tmp_path: Path, made: Path
) -> None:
    from temporal_vae.files.atomic import held

    with held(made / ".tvae" / "lock"), pytest.raises(ValueError, match="another process"):
        run(videos, made, model)


def test_a_full_disk_leaves_what_a_next_run_goes_on_with(
    videos: Path, made: Path, model: TemporalVAE, small_model: Path, tmp_path: Path,
    run: Callable[..., Said],
) -> None:  # fmt: skip
    words = ["--model", small_model, "--workers", 1]
    with mounted(tmp_path / "disk", "size=150k") as disk:
        out = disk / "out"
        said = run("encode-dataset", videos, out, *words)
        assert said.returncode == 1 and ("No space" in said.stderr or "full" in said.stderr)
        assert said.stderr.count("\n") == 1 and "Traceback" not in said.stderr
        partial = contents(out)
        assert partial.items() <= contents(made).items() and len(partial) < 6
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert run("encode-dataset", videos, out, *words).returncode == 2
        assert contents(out).keys() == contents(made).keys()


# Found by readers --------------------------------------------------------------------------------


def test_a_changed_video_leaves_the_shards_of_the_others(
    model: TemporalVAE, tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for index, name in enumerate("abc"):
        write(source / f"{name}.mkv", smooth(3 + index, 32, 32))
    options: dict[str, Any] = {"layout": "webdataset", "shard_clips": 1}
    assert run(source, out, model, **options) == {"ok": 3}
    before = LatentDataset(out)[2]["latents"]
    write(source / "a.mkv", noise(3, 32, 32))
    assert run(source, out, model, **options) == {"ok": 3}
    found = {row["name"]: row["shard"] for row in rows(out)}
    assert len(set(found.values())) == 3
    assert torch.equal(LatentDataset(out)[2]["latents"], before)
    last = out / found["c.mkv"]
    last.write_bytes(last.read_bytes()[:1024])  # cut short: it is made again
    assert run(source, out, model, **options) == {"ok": 3}
    assert torch.equal(LatentDataset(out)[2]["latents"], before)


def test_a_lost_clip_is_made_again_though_the_run_that_saw_it_was_stopped(
    videos: Path, made: Path, model: TemporalVAE, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (out / f"1.mkv{SUFFIX}").unlink()
    settings = json.loads(
        sqlite3.connect(out / ".tvae" / "clips.sqlite").execute("select settings from run")
        .fetchone()[0]
    )  # fmt: skip
    state = State(out, settings)
    [entry] = [entry for entry in entries_of(videos) if entry.name == "1.mkv"]
    assert state.begin(entry) == set()  # and the process is gone
    state.close()
    assert run(videos, out, model) == {"ok": 6, "failed": 1}
    assert contents(out) == contents(made)


@pytest.mark.parametrize("what", ["begin", "forget_failed"])
def test_changes_of_the_state_that_belong_together_are_made_together(
    videos: Path, made: Path, tmp_path: Path, what: str
) -> None:
    """A process that is killed between two of them leaves what was there before the first."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    file = out / ".tvae" / "clips.sqlite"
    settings = json.loads(sqlite3.connect(file).execute("select settings from run").fetchone()[0])
    state, count = State(out, settings), 0
    before = [sqlite3.connect(file).execute(f"select * from {t} order by name").fetchall()
              for t in ("clips", "sources")]  # fmt: skip

    def killed(statement: str) -> None:
        nonlocal count
        count += statement.lower().startswith(("delete", "update", "insert"))
        if count == 2:
            os._exit(9)

    changed = tmp_path / "in"
    shutil.copytree(videos, changed)
    write(changed / "1.mkv", noise(4, 32, 32))
    if os.fork() == 0:
        try:
            state = State(out, settings)
            state._base.set_trace_callback(killed)
            if what == "forget_failed":
                state.forget_failed()
            else:
                [entry] = [entry for entry in entries_of(changed) if entry.name == "1.mkv"]
                state.begin(entry)
        finally:
            os._exit(0)
    assert os.WEXITSTATUS(os.wait()[1]) == 9
    after = [sqlite3.connect(file).execute(f"select * from {t} order by name").fetchall()
             for t in ("clips", "sources")]  # fmt: skip
    assert after == before
    state.close()


def test_trying_again_keeps_the_clips_that_are_there(model: TemporalVAE, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write(source / "a.mkv", smooth(4, 32, 32))
    (source / "b.mkv").write_bytes(b"no video")
    assert run(source, out, model) == {"ok": 1, "failed": 1}
    stamp = (out / f"a.mkv{SUFFIX}").stat().st_mtime_ns
    assert run(source, out, model, retry_failed=True) == {"ok": 1, "failed": 1}
    assert run(source, out, model) == {"ok": 1, "failed": 1}
    assert (out / f"a.mkv{SUFFIX}").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_another_caption_encodes_nothing_again(
    layout: Any, model: TemporalVAE, tmp_path: Path
) -> None:
    """But in shards, where it lies beside the latents."""
    write(tmp_path / "a.mkv", smooth(4, 32, 32))
    write(tmp_path / "b.mkv", noise(4, 32, 32))
    listed, out = tmp_path / "list.csv", tmp_path / "out"

    def captions(*words: str) -> list[tuple[str, str, float]]:
        listed.write_text(f"path,caption\na.mkv,{words[0]}\nb.mkv,{words[1]}\n")
        assert run(listed, out, model, layout=layout) == {"ok": 2}
        table = parquet().read_table(out / "manifest.parquet").to_pylist()
        return [(row["caption"], row["shard"], row["seconds"]) for row in table]

    first, second = captions("one", "two"), captions("one", "two words")
    assert [caption for caption, *_ in second] == ["one", "two words"]
    assert second[0] == first[0]
    if layout == "files":
        assert second[1][1:] == first[1][1:]
        assert [caption for caption, *_ in captions("", "two")] == [None, "two"]
    else:
        assert second[1][1] == "shard-000001.tar"
        with tarfile.open(out / second[1][1]) as shard:
            told = shard.extractfile(shard.getnames()[1])
            assert told is not None and json.load(told)["caption"] == "two words"
    write(tmp_path / "b.mkv", smooth(4, 32, 32))
    third = captions("one", "two words")
    assert third[1][2] != second[1][2], "another file is encoded"


def test_a_file_that_is_cut_off_is_said(model: TemporalVAE, tmp_path: Path) -> None:
    write(tmp_path / "whole.mp4", noise(24, 32, 32))
    ffmpeg: list[str | Path] = ["ffmpeg", "-v", "error", "-i", tmp_path / "whole.mp4", "-c", "copy"]
    subprocess.run([*ffmpeg, "-movflags", "faststart", tmp_path / "a.mp4"], check=True)
    data = (tmp_path / "a.mp4").read_bytes()
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.mp4").write_bytes(data)
    (source / "b.mp4").write_bytes(data[: len(data) * 6 // 10])
    assert run(source, tmp_path / "out", model) == {"ok": 2}
    whole, cut = rows(tmp_path / "out")
    assert whole["notes"] is None
    assert re.search(r"1\d of 24 frames could be read: the file is damaged", cut["notes"])


@pytest.mark.parametrize("wait", [0.0, 0.03])
@pytest.mark.parametrize("length", [10, 12])
def test_the_last_clip_of_a_file_that_is_cut_off_has_the_note(
    length: int, wait: float, tmp_path: Path
) -> None:
    """However far ahead frames are decoded, and also where the last clip is a full one."""
    write(tmp_path / "a.mkv", noise(40, 32, 32))
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(data[: len(data) * 6 // 10])
    with VideoReader(tmp_path / "a.mkv") as reader:
        whole = sum(1 for _ in reader)
    assert any("the file is damaged" in note for note in reader.notes)
    cutting = Cutting(options={}, reading={}, cut=whole // 2 if length == 12 else length)
    noted = []
    for clip in clips_of(Entry(0, "v", Source(str(tmp_path / "a.mkv"))), cutting):
        assert isinstance(clip, Clip)
        for _ in clip.frames:
            time.sleep(wait)
        noted.append(any("the file is damaged" in note for note in clip.notes))
    assert len(noted) > 1 and noted == [False] * (len(noted) - 1) + [True]


def test_odd_rows_of_a_manifest_fail_alone(model: TemporalVAE, tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", smooth(4, 32, 32))
    os.mkfifo(tmp_path / "pipe.mkv")
    table = [
        {"path": "a.mkv", "caption": "one"}, {"path": "a.mkv", "caption": "two"},
        {"path": "\ud800.mp4"}, {"path": "a.mkv", "frames": 2.0, "start": float("nan")},
        {"path": "a.mkv", "frames": 2.5}, {"path": "pipe.mkv"}, {"path": "."},
        {"path": "a.mkv", "start": "0." + "0" * 300, "caption": "\ud83d"},
        {"path": "a.mkv", "start": "1e99999"},
    ]  # fmt: skip
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in table))
    assert run(listed, tmp_path / "out", model) == {"ok": 4, "failed": 5}
    found = rows(tmp_path / "out")
    assert len({row["name"] for row in found}) == len(table)
    captions = [row["caption"] for row in found if row["status"] == "ok"]
    assert sorted(filter(None, captions)) == ["?", "one", "two"]
    assert run(listed, tmp_path / "out", model) == {"ok": 4, "failed": 5}
    wide = tmp_path / "wide.csv"
    wide.write_text(f"path,caption\na.mkv,{'x' * 200_000}\n")
    assert run(wide, tmp_path / "wide", model) == {"ok": 1}
