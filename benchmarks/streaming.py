"""The command on a long video within a budget: its peak against a short one's, and its speed.

    python benchmarks/streaming.py [--frames 1000] [--memory 512MiB] [--repeats 3]

256x144, `tiny`. Peaks: largest anonymous resident memory of the command, sampled from /proc
(Linux), for 50 frames and for many. Speed: frames a second of the streamed walk, in the pieces and
plans that the command makes for the budget, against the whole walk, interleaved in one process.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from flat_memory import make_video, peak

from temporal_vae import TemporalVAE
from temporal_vae.convert import allocator, chunks
from temporal_vae.convert.memory import PiecePlanner
from temporal_vae.video import Frame, Uint8Frames
from temporal_vae.walks.budget import parse_budget

HEIGHT, WIDTH = 144, 256
WHOLE_FRAMES = 64
"""Frames of the whole walk, which must fit in memory."""


def walked(frames: Uint8Frames, planner: PiecePlanner) -> int:
    """The walk of the command, without the codec."""
    video = (Frame(image, index) for index, image in enumerate(frames))
    walk = chunks.decode_walk(chunks.encode_walk(video, planner), planner)
    return sum(len(images) for images in walk.pieces if images is not None)


def speeds(budget: str, repeats: int, frames: int) -> tuple[float, float]:
    """Median frames a second: streamed and whole."""
    allocator.settle(None)  # as the command does
    model = TemporalVAE.from_pretrained("tiny")
    limit = parse_budget(budget)
    assert isinstance(limit, int)
    planner = PiecePlanner(model, ("encode", "decode"), (HEIGHT, WIDTH), limit, None)
    whole = PiecePlanner(model, planner.operations, planner.size, None, WHOLE_FRAMES)
    pieces = planner.pieces()
    print(f"pieces of {pieces.latents} latents, {pieces.total / 2**20:.0f} MiB")
    print(*(plan.explain() for plan in pieces.plans.values()), sep="\n", flush=True)
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
    seconds: dict[str, list[float]] = {"streamed": [], "whole": []}
    for _ in range(repeats):
        start = time.perf_counter()
        walked(clip, planner)
        seconds["streamed"].append((time.perf_counter() - start) / len(clip))
        start = time.perf_counter()
        walked(clip[:WHOLE_FRAMES], whole)
        seconds["whole"].append((time.perf_counter() - start) / WHOLE_FRAMES)
    return tuple(1 / statistics.median(times) for times in seconds.values())  # type: ignore[return-value]


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speed-frames", type=int, default=256)
    parser.add_argument("--only-speed", action="store_true")
    options = parser.parse_args()
    print(f"{datetime.date.today()}  torch {torch.__version__}, tiny, {WIDTH}x{HEIGHT}", flush=True)
    stream, whole = speeds(options.memory, options.repeats, options.speed_frames)
    print(
        f"streamed {stream:.2f} frames/s, whole {whole:.2f}: ratio {stream / whole:.3f}", flush=True
    )
    if options.only_speed:
        return
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for frames in (50, options.frames):
            source = Path(folder) / f"{frames}.mkv"
            make_video(source, frames, HEIGHT, WIDTH)
            out = Path(folder) / "out.mp4"
            peaks.append(peak(source, out, "tiny", "--memory", options.memory))
            print(f"{frames:5} frames: peak {peaks[-1] / 2**20:.1f} MiB", flush=True)
    print(f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
