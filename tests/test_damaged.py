"""Damaged video: the right result or one clear line, in bounded time and memory.

Cases run in child processes, many to each, so that a crash of a library is a failure of its case.
"""

from __future__ import annotations

import os
import resource
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from conftest import SHARED
from test_reading import encode_frames, h264, save
from test_video import noise, smooth, write

from temporal_vae.video import VideoError, VideoReader

SECONDS = 20.0
"""That a case may take."""
START = 30.0
"""More, that a child may take for its start."""
MEMORY = 1 << 30
"""Bytes that a child may grow by over all its cases."""
PROBES = 25
"""Cases between two counts of what a child holds open."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case: "read", "refused" or a failure, with a word on it."""

    kind: str
    words: str
    seconds: float
    peak: int
    """Bytes of the child, at most so far, above what it had at its first case."""


# The cases ------------------------------------------------------------------------------------


def sources(folder: Path, real: list[Path]) -> list[Path]:
    """Small files of many formats, and parts of real ones."""
    made = [h264(folder / f"a{suffix}", 24) for suffix in (".mp4", ".mkv", ".ts")]
    made.append(h264(folder / "fragments.mp4", 24))
    made.append(write(folder / "lossless.mkv", noise(3, 24, 32)))
    codecs = {".webm": ("libvpx-vp9", "yuva420p"), ".avi": ("mpeg4", "yuv420p"),
              ".mov": ("prores_ks", "yuv422p10le"), ".gif": ("gif", "rgb8")}  # fmt: skip
    for suffix, (codec, name) in codecs.items():
        frames = [
            av.VideoFrame.from_ndarray(i, format="rgb24").reformat(format=name)
            for i in smooth(4, 48, 64)
        ]
        stamps = [4 * i for i in range(4)]
        made.append(
            encode_frames(folder / f"b{suffix}", frames, codec, stamps, base=Fraction(1, 100))
        )
    hevc = [av.VideoFrame.from_ndarray(i, format="rgb24").reformat(format="yuv420p10le")
            for i in smooth(6, 64, 64)]  # fmt: skip
    made.append(
        encode_frames(folder / "c.mp4", hevc, "libx265", options={"x265-params": "log-level=none"})
    )
    save(folder / "d.png", smooth(1, 24, 32)[0], "png", "rgb24")
    save(folder / "d.jpg", smooth(1, 24, 32)[0], "mjpeg", "yuvj420p")
    return [*made, folder / "d.png", folder / "d.jpg", *real]


def numbers(data: bytearray, at: int, random: np.random.Generator) -> None:
    """A 16 or 32 bit number at an edge of its range."""
    edges = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 100_000, 65_535, 0x7FFF)
    value = int(edges[int(random.integers(len(edges)))])
    data[at : at + 4] = struct.pack(">I" if random.integers(2) else "<I", value)


BOXES = (b"stsz", b"stts", b"ctts", b"stco", b"stsc", b"stss", b"tkhd", b"mdhd", b"mvhd", b"elst",
         b"avc1", b"hvc1", b"avcC", b"hvcC", b"stsd", b"moov", b"trak", b"mdat", b"moof", b"avih",
         b"strh", b"strf", b"idx1", b"\x1a\x45\xdf\xa3", b"\x16\x54\xae\x6b", b"\x1f\x43\xb6\x75",
         b"IHDR", b"IDAT", b"\xff\xc0", b"\xff\xda")  # fmt: skip


def in_a_header(data: bytearray, random: np.random.Generator) -> None:
    """Numbers inside boxes and elements: sizes, counts, dimensions, timestamps."""
    found = [at for box in BOXES if (at := data.find(box)) >= 0]
    at = found[int(random.integers(len(found)))] if found else 0
    for _ in range(int(random.integers(1, 4))):
        where = max(0, at - 4) + int(random.integers(0, 120))
        if where + 4 < len(data):
            numbers(data, where, random)


def backward(data: bytearray, random: np.random.Generator) -> None:
    """Timestamps that run backward: entries of a table of times, or bytes, swapped."""
    for box in (b"ctts", b"stts", b"stco"):
        at = data.find(box)
        if at >= 0:
            one, other = (at + 12 + 8 * int(random.integers(0, 12)) for _ in range(2))
            data[one : one + 8], data[other : other + 8] = (
                data[other : other + 8],
                data[one : one + 8],
            )
            numbers(data, at + 12 + 8 * int(random.integers(0, 4)), random)


def mutated(files: list[bytes], seed: int) -> tuple[str, bytes]:
    """A kind of damage, and damaged bytes; the same for the same seed."""
    random = np.random.default_rng(seed)
    data = bytearray(files[seed % len(files)])
    size = len(data)
    kind = ("cut", "flips", "splice", "header", "backward", "hole", "repeat", "front")[
        (seed // len(files)) % 8
    ]
    at = int(random.integers(0, size))
    if kind == "cut":
        del data[at:]
    elif kind == "flips":
        for _ in range(int(random.integers(1, 40))):
            data[int(random.integers(0, size))] ^= 1 << int(random.integers(8))
    elif kind == "splice":
        other = files[int(random.integers(len(files)))]
        data[at:] = other[int(random.integers(0, len(other))) :]
    elif kind == "header":
        in_a_header(data, random)
    elif kind == "backward":
        backward(data, random)
    elif kind == "hole":
        end = min(size, at + int(random.integers(1, 4000)))
        data[at:end] = bytes(end - at)
    elif kind == "repeat":
        data[at:at] = data[at : at + int(random.integers(1, 4000))]
    else:
        del data[: int(random.integers(1, 200))]
    return kind, bytes(data)


# A child --------------------------------------------------------------------------------------


def attempt(path: Path, seed: int) -> tuple[str, str]:
    """Read a file as a user would, and look at what comes."""
    choices: list[dict[str, Any]] = [
        {}, {"start": 0.4}, {"channels": 4}, {"fps": 12}, {"width": 16}
    ]  # fmt: skip
    options = choices[seed % 5]
    last, shapes = None, set()
    count = 0
    try:
        with VideoReader(path, **options) as video:
            for frame in video:
                if last is not None and frame.pts <= last:
                    return "wrong", f"timestamps fall: {last}, {frame.pts}"
                last = frame.pts
                shapes.add(frame.image.shape)
                count += 1
                if count >= 400:
                    break
            if shapes != {(*video.size, options.get("channels", 3))}:
                return "wrong", f"shapes {shapes}, where {video.size} was said"
    except VideoError as error:
        if "\n" in str(error) or str(path) not in str(error):
            return "wrong", f"not one clear line: {error}"
        return "refused", str(error)
    except BaseException as error:
        return "wrong", f"{type(error).__name__}: {error}"
    return "read", f"{count} frames"


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process. Its own: ru_maxrss also counts the parent that it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def held_open() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def child(work: Connection, folder: str, files: list[bytes]) -> None:
    """Run cases by their seeds until None comes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path = Path(folder) / f"case_{os.getpid()}"
    attempt(path, 0)  # what is loaded once is there
    before, base = held_open(), resident()
    while (seed := work.recv()) is not None:
        kind, data = mutated(files, seed)
        path.write_bytes(data)
        started = time.monotonic()
        outcome, words = attempt(path, seed)
        if outcome != "wrong" and seed % PROBES == 0 and held_open() != before:
            outcome, words = "wrong", f"left open: {before} before, {held_open()} after"
        peak = resident("VmHWM") - base
        work.send(Outcome(outcome, f"{kind}: {words}", time.monotonic() - started, peak))


Worker = Callable[[Connection, str, list[bytes]], None]


def run_cases(
    seeds: range, files: list[bytes], folder: Path, worker: Worker = child
) -> Iterator[tuple[int, Outcome]]:
    """Each seed's outcome; a child that dies or does not answer is replaced."""
    context = get_context("spawn")
    process: Any = None
    ours: Any = None
    for seed in seeds:
        fresh = process is None
        if fresh:
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, str(folder), files), daemon=True)
            process.start()
            theirs.close()
        ours.send(seed)
        try:
            answered = ours.poll(SECONDS + (START if fresh else 0))
            yield seed, ours.recv() if answered else Outcome("hangs", "no answer", SECONDS, 0)
        except EOFError:
            process.join()
            yield seed, Outcome("crashes", f"exit code {process.exitcode}", 0, 0)
            answered = False
        if not answered:
            process.kill()
            process.join()
            process = None
    if process is not None:
        with suppress(OSError):
            ours.send(None)
        process.join(10)


def real_files(real_clip: Path) -> list[Path]:
    """The clip that the tests have, and two more where they lie beside the project."""
    more = [SHARED / "clips" / "demo" / f"{n}_480x270.mp4" for n in ("flower", "bbb")]
    return [real_clip, *(path for path in more if path.exists())]


def assert_survived(seeds: range, real: list[Path], folder: Path) -> None:
    files = [path.read_bytes() for path in sources(folder, real)]
    outcomes = dict(run_cases(seeds, files, folder))
    bad = {seed: o for seed, o in outcomes.items() if o.kind not in ("read", "refused")}
    peak = max(o.peak for o in outcomes.values())
    slowest = max(outcomes.values(), key=lambda o: o.seconds)
    kinds = [o.kind for o in outcomes.values()]
    print(
        f"\n{len(outcomes)} cases: {kinds.count('read')} read, {kinds.count('refused')} refused, "
        f"{len(bad)} bad; {peak / 2**20:.0f} MiB at most above a child's start, "
        f"slowest {slowest.seconds:.1f} s ({slowest.words})"
    )
    assert bad == {}
    assert len(outcomes) == len(seeds)
    assert peak < MEMORY
    assert min(kinds.count("read"), kinds.count("refused")) > len(seeds) // 20


def test_damaged_files_are_read_or_refused(real_clip: Path, tmp_path: Path) -> None:
    assert_survived(range(60), [real_clip], tmp_path)


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused(real_clip: Path, tmp_path: Path) -> None:
    assert_survived(range(1000, 3400), real_files(real_clip), tmp_path)


def dies(work: Connection, folder: str, files: list[bytes]) -> None:
    work.recv()
    os.abort()


def sleeps(work: Connection, folder: str, files: list[bytes]) -> None:
    work.recv()
    time.sleep(600)


@pytest.mark.parametrize(
    ("worker", "kind", "words"), [(dies, "crashes", "exit code -6"), (sleeps, "hangs", "no answer")]
)
def test_the_damage_tests_see_a_crash_and_a_hang(
    worker: Worker, kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_damaged.SECONDS", 1.0 if worker is sleeps else 30.0)
    monkeypatch.setattr("test_damaged.START", 0.0)
    ((_, outcome),) = run_cases(range(1), [], tmp_path, worker)
    assert (outcome.kind, outcome.words) == (kind, words)


# Particular damage ----------------------------------------------------------------------------


def patched(path: Path, box: bytes, offset: int, value: int, size: int = 4) -> Path:
    data = bytearray(path.read_bytes())
    at = data.index(box) + offset
    data[at : at + size] = value.to_bytes(size, "big")
    path.write_bytes(data)
    return path


def test_a_hundred_thousand_claimed_frames(tmp_path: Path) -> None:
    """One run of the table of times, and the table of sizes, claim 100,000."""
    path = write(tmp_path / "a.mp4", smooth(12, 32, 32))
    patched(patched(path, b"stts", 8, 100_000), b"stsz", 8, 100_000)
    with suppress(VideoError), VideoReader(path) as video:
        count = sum(1 for _ in video)
        assert count <= 12
        assert any("frames could be read" in n or "damaged" in n for n in video.notes)


def test_absurd_dimensions_are_refused(tmp_path: Path) -> None:
    """A PNG that says it is a million pixels wide and high."""
    save(tmp_path / "a.png", smooth(1, 8, 8)[0], "png", "rgb24")
    patched(patched(tmp_path / "a.png", b"IHDR", 4, 1_000_000), b"IHDR", 8, 1_000_000)
    for path in (tmp_path, tmp_path / "a.png"):
        with pytest.raises(VideoError):
            VideoReader(path)


def test_a_large_picture_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("temporal_vae.video.read.container.MAX_PIXELS", 1000)
    path = write(tmp_path / "a.mkv", smooth(1, 32, 32))
    with pytest.raises(VideoError, match=r"32x32 are larger than the 1000 pixels"):
        VideoReader(path)


def test_no_frames_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "bgr0"
        container.start_encoding()
    with pytest.raises(VideoError, match=r"a\.mkv: (no frame|not a video|the video stream)"):
        VideoReader(path)


def test_timestamps_that_fall_are_repaired_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", noise(6, 16, 16))
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.avi"), "w") as target:
        template = source.streams.video[0]
        stream = target.add_stream_from_template(template)
        packets = [p for p in source.demux(template) if p.dts is not None]
        for index, packet in enumerate(packets):
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = index
            target.mux(packet)
    data = bytearray((tmp_path / "b.avi").read_bytes())
    (tmp_path / "b.avi").write_bytes(data)
    with VideoReader(tmp_path / "b.avi") as video:
        stamps = [frame.pts for frame in video]
    assert stamps == sorted(set(stamps))
    assert len(stamps) == 6


def test_a_title_in_another_alphabet(tmp_path: Path) -> None:
    """Old files name themselves in Latin-1, which is no UTF-8."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "abcdef"
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        container.mux(stream.encode(av.VideoFrame(16, 16, "bgr0")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"abcdef", "déjàvu".encode("latin-1")))
    before = held_open()
    assert attempt(path, 0) == ("read", "1 frames")
    assert held_open() == before
