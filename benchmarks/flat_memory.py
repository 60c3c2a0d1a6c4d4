"""Peak memory of `tvae reconstruct` for a video and for one ten times as long.

    python benchmarks/flat_memory.py [--frames 200] [--model tiny]

Each in a process of its own; peak = largest anonymous resident memory, sampled from /proc (Linux),
so the pages of libraries and weights on disk do not hide a growth. The shorter video is longer than
the model's reach (64 frames), else it never gets to where a long one spends its time.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from temporal_vae.video import VideoWriter


def make_video(path: Path, frames: int, height: int = 96, width: int = 128) -> None:
    """A moving gradient with noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    with VideoWriter(path, height, width, Fraction(25)) as writer:
        for t in range(frames):
            ramp = np.stack([x + 3 * t, y + t, x + y], -1) % 256
            writer.write((ramp * 0.9 + rng.integers(0, 25, ramp.shape)).astype(np.uint8), t)


def anonymous_memory(process: int) -> int:
    """Bytes of RssAnon now; 0 when the process is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def peak(source: Path, target: Path, model: str, *options: str, verb: str = "reconstruct") -> int:
    """Peak anonymous memory of the command, in bytes."""
    code = "from temporal_vae.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        verb,
        str(source),
        str(target),
        "--model",
        model,
        "--overwrite",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, anonymous_memory(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the command failed: {process.returncode}")
    return most


def main() -> None:
    """Print both peaks and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--model", default="tiny")
    options = parser.parse_args()
    print(f"{datetime.date.today()}  tvae reconstruct --model {options.model}, 128x96")
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for frames in (options.frames, 10 * options.frames):
            source = Path(folder) / f"{frames}.mkv"
            make_video(source, frames)
            peaks.append(peak(source, Path(folder) / "out.mp4", options.model))
            print(f"{frames:5} frames: peak {peaks[-1] / 2**20:.1f} MiB", flush=True)
    print(f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
