"""Clips a second of `tvae encode-dataset`, beside the bare encoder on tensors in memory.

    python benchmarks/dataset.py [--engines local ray] [--clips 10] [--frames 25] [--size 256x144]
    python benchmarks/dataset.py --many 10000      # tiny clips: memory, seconds, bytes a clip

Clips are made here: a picture that moves. The rate is taken between the first and the last file of
latents, so that what a process takes to begin stands apart, as "start". "bare" is `encode` of the
same clips in this process, on tensors, again and again. Medians of `--repeats` of each, in turn.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from temporal_vae import TemporalVAE
from temporal_vae.video import VideoReader, VideoWriter, to_pixels


def make_clips(folder: Path, count: int, frames: int, size: tuple[int, int]) -> list[Path]:
    """Videos of a smooth picture that drifts, each its own."""
    width, height = size
    folder.mkdir()
    made = []
    for index in range(count):
        drawn = np.random.default_rng(index)
        waves = drawn.uniform(0.02, 0.2, (3, 2, 1, 1))
        y, x = np.mgrid[:height, :width]
        made.append(folder / f"{index:05d}.mp4")
        with VideoWriter(made[-1], height, width, Fraction(25)) as writer:
            for frame in range(frames):
                phase = waves[:, 0] * (x + 2 * frame) + waves[:, 1] * y
                image = np.moveaxis((np.sin(phase) * 100 + 128).astype(np.uint8), 0, -1)
                writer.write(np.ascontiguousarray(image), frame)
    return made


def bare(vae: TemporalVAE, videos: list[torch.Tensor]) -> float:
    """Clips a second of the encoder alone."""
    begin = time.perf_counter()
    for video in videos:
        vae.encode(video)
    return len(videos) / (time.perf_counter() - begin)


def encoded(source: Path, target: Path, engine: str, *words: str) -> tuple[float, float, int]:
    """Clips a second, seconds until the first, and the largest memory of the driving process."""
    command = [
        sys.executable, "-m", "temporal_vae", "encode-dataset", str(source), str(target),
        "--engine", engine, "--quiet", "--model", "tiny", "--dtype", "float32", *words,
    ]  # fmt: skip
    begin, largest = time.time(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            largest = max(largest, resident(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    times = sorted(file.stat().st_mtime for file in target.glob("*.safetensors"))
    return (len(times) - 1) / (times[-1] - times[0]), times[0] - begin, largest


def resident(process: int) -> int:
    """Bytes of anonymous memory."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) * 1024 if found else 0


def rates(options: argparse.Namespace, folder: Path) -> None:
    """Print what each engine does beside the bare encoder."""
    width, height = (int(n) for n in options.size.split("x"))
    made = make_clips(folder / "clips", options.clips, options.frames, (width, height))
    vae = TemporalVAE.from_pretrained("tiny", dtype=torch.float32).requires_grad_(False)
    videos = []
    for path in made:
        with VideoReader(path) as video:
            videos.append(to_pixels(np.stack([frame.image for frame in video])))
    bare(vae, videos[:1])
    seen: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(options.repeats):
        seen.setdefault("bare", []).append((bare(vae, videos), 0.0))
        for engine in options.engines:
            found = encoded(folder / "clips", folder / f"{engine}{repeat}", engine)
            seen.setdefault(engine, []).append(found[:2])
        print({name: [round(number, 3) for number in each[-1]] for name, each in seen.items()})
    rate = {name: statistics.median(r for r, _ in each) for name, each in seen.items()}
    for name, each in seen.items():
        start = statistics.median(s for _, s in each)
        print(
            f"{name:8}{rate[name]:8.3f} clips/s  {rate[name] / rate['bare']:.2f} of bare  "
            f"start {start:.1f} s"
        )
    if {"local", "ray"} <= rate.keys():
        print(f"ray takes {rate['local'] / rate['ray'] - 1:+.0%} over local")


def many(count: int, folder: Path) -> None:
    """Print what a run of so many tiny clips takes, and what a million would."""
    source, target = folder / "clips", folder / "latents"
    [first] = make_clips(source, 1, 1, (16, 16))
    for index in range(1, count):
        (source / f"{index:07d}.mp4").hardlink_to(first)
    begin = time.perf_counter()
    rate, start, largest = encoded(source, target, "local")
    took = time.perf_counter() - begin
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "temporal_vae", "encode-dataset", str(source), str(target),
         "--quiet", "--model", "tiny", "--dtype", "float32"], check=True,
    )  # fmt: skip
    again = time.perf_counter() - begin
    manifest = (target / "manifest.parquet").stat().st_size
    print(
        f"{count} clips of one frame of 16x16: {took:.0f} s, {rate:.1f} clips/s, start {start:.1f} "
        f"s, largest memory of the driver {largest >> 20} MiB, manifest {manifest / count:.0f} "
        f"bytes a clip; a second run, with nothing to do, {again:.1f} s"
    )
    print(
        f"a million, by these: manifest {manifest / count:.0f} MB; a run with nothing to do "
        f"{again / count * 1e6 / 60:.0f} min; at this rate, all of it, {1e6 / rate / 3600:.1f} h"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=["local"], choices=["local", "ray"])
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--size", default="256x144", help="width and height")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, help="tiny clips in one run")
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )
    with tempfile.TemporaryDirectory() as name:
        if options.many:
            many(options.many, Path(name))
        else:
            rates(options, Path(name))


if __name__ == "__main__":
    main()
