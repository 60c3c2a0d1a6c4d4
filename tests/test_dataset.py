"""A data set of videos to one of latents: names, resuming after kills, broken videos, layouts."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_video import noise, smooth, write

from temporal_vae import LatentFile, TemporalVAE, read_latents
from temporal_vae.convert.encode import Encoding, encode
from temporal_vae.dataset import local
from temporal_vae.dataset.clips import Clip, Cutting, Passed, clips_of
from temporal_vae.dataset.encode import DatasetOptions, Encoder, encode_dataset
from temporal_vae.dataset.entries import entries_of, quoted
from temporal_vae.dataset.manifest import COLUMNS, State
from temporal_vae.files.safetensors import SUFFIX

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
def model(small_model: Path) -> TemporalVAE:
    return TemporalVAE.from_pretrained(small_model)


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


def rows(out: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    table = parquet.read_table(out / "manifest.parquet")
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
    assert list(found) == [n.removesuffix(SUFFIX) for n in contents(made)][:5] + [
        "broken.mp4", "deep/0.mkv"
    ]  # fmt: skip
    for name, row in found.items():
        assert row["source"] == str(videos / name)
        if name == "broken.mp4":
            assert row["status"] == "failed" and "not a video" in row["error"]
            continue
        with LatentFile(made / f"{name}{SUFFIX}") as file:
            info = file.info
        for column in ("frames", "height", "width", "source_sha256", "encoder_sha256", "options",
                       "latent_frames", "channels", "rows", "columns", "model", "kind"):  # fmt: skip
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
    listed = [
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
