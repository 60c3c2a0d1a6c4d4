"""What processes of a data set say to one another: kept as it is, and read as data."""

from __future__ import annotations

import io
import json
import pickle
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_video import smooth, write

from temporal_vae.dataset.buckets import Bucket
from temporal_vae.dataset.clips import Clip, Cutting, clips_of
from temporal_vae.dataset.entries import Entry
from temporal_vae.dataset.messages import packed, receive, send, unpacked
from temporal_vae.video import Frame
from temporal_vae.video.sources import Source


def entry(path: Path) -> Entry:
    return Entry(3, "a\udcff.mkv", Source(str(path)), Fraction(1, 25), 4, "caption", None)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 7, -0.5, "\ud800 text", Fraction(30000, 1001), (1, (2, [3])), [], {},
        {"a": (Fraction(1, 3), None), "dict": {"array": [1]}},
        Cutting(options={"start": Fraction(1, 3), "frames": None}, reading={"channels": 3},
                cut=4, buckets=(Bucket(32, 48, 5), Bucket(8, 16))),
    ],
)  # fmt: skip
def test_a_value_comes_as_it_went(value: object) -> None:
    found = unpacked(packed(value))
    assert found == value
    assert type(found) is type(value)


def test_a_clip_and_its_frames_come_as_they_went(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", smooth(5, 32, 48))
    [clip] = clips_of(entry(tmp_path / "a.mkv"), Cutting(options={}, reading={"channels": 3}))
    assert isinstance(clip, Clip)
    frames = list(clip.frames)
    came = unpacked(packed(clip))
    for name in ("entry", "name", "first", "sha256", "options", "info", "size", "begin", "notes"):
        assert getattr(came, name) == getattr(clip, name), name
    deep = Frame(np.arange(24, dtype=np.uint16).reshape(2, 4, 3)[::-1], 9,
                 np.ones((2, 4), np.uint16))  # fmt: skip
    stream = io.BytesIO()
    send(("frames", [*frames, deep]), stream)
    send(("done", None), stream)
    stream.seek(0)
    kind, found = receive(stream)
    assert kind == "frames"
    assert receive(stream) == ("done", None)
    for mine, theirs in zip(found, [*frames, deep], strict=True):
        assert mine.pts == theirs.pts
        assert mine.image.dtype == theirs.image.dtype
        assert np.array_equal(mine.image, theirs.image)
    assert deep.alpha is not None
    assert np.array_equal(found[-1].alpha, deep.alpha)
    error = unpacked(packed(OSError("the disk is full")))
    assert isinstance(error, OSError)
    assert str(error) == "the disk is full"


class Runs:
    """Whose pickle runs code."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def framed(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "message",
    [
        framed(pickle.dumps(Runs())), pickle.dumps(Runs()), framed(b"{"), framed(b"[" * 100_000),
        *(framed(json.dumps(it).encode()) for it in (
            {"Path": {"path": "x"}}, {"Entry": {"odd": 1}}, {"Fraction": "1/0"}, {"a": 1, "b": 2},
            {"array": ["object", 1]}, {"array": ["uint8", -1, -4]}, {"array": ["uint8", 2**40]},
            {"array": 3}, {"tuple": 3}, {"dict": 3},
        )),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused_and_runs_nothing(
    message: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        unpacked(message)
    assert not (tmp_path / "ran").exists()


def test_a_message_that_ends_early_is_the_end(tmp_path: Path) -> None:
    whole = packed(Frame(np.zeros((2, 2, 3), np.uint8), 0))
    for length in range(len(whole)):
        with pytest.raises(EOFError):
            unpacked(whole[:length])


def test_what_no_message_holds_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot hold PosixPath"):
        packed(Path())
