"""Quality of a model over a folder of clips, beside the linear baseline.

    python benchmarks/quality.py --clips FOLDER [--model tiny] [--frames 32] [--width 256]

PSNR: 8-bit RGB, per frame, mean over frames, then over clips; posterior mean; no video codec.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import numpy as np

from temporal_vae import TemporalVAE
from temporal_vae.evaluation.evaluate import evaluate, mean_scores, reconstruct_frames
from temporal_vae.evaluation.metrics import Scores
from temporal_vae.video import Uint8Frames


def synthetic() -> dict[str, Uint8Frames]:
    """Flat clips, and a fade of two seconds at 25 frames/s."""
    flats = {"black": 0, "grey": 128, "white": 255}
    clips = {name: np.full((8, 96, 128, 3), value, np.uint8) for name, value in flats.items()}
    levels = np.linspace(0, 255, 50).round().astype(np.uint8)
    clips["fade"] = np.broadcast_to(levels[:, None, None, None], (50, 96, 128, 3)).copy()
    return clips


def line(name: str, model: Scores, linear: Scores) -> str:
    """One row of the table."""
    ours, theirs = (f"{s.psnr:8.2f}{s.ssim:9.4f}{s.flicker:8.2f}" for s in (model, linear))
    return f"{name:20}{ours}   {theirs}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    model = TemporalVAE.from_pretrained(options.model)
    print(
        f"{datetime.date.today()}  {Path(options.model).name}, first {options.frames} frames, "
        f"{options.width} wide"
    )
    header = f"{'PSNR':>8}{'SSIM':>9}{'flicker':>8}"
    print(f"{'':20}{header}   {header}\n{'clip':20}{'model':>25}   {'linear baseline':>25}")
    rows = []
    files = sorted(options.clips.glob("*.mp4"))
    for row in evaluate(files, model, options.frames, options.width):
        rows.append(row)
        print(line(row.name, row.model, row.linear), flush=True)
    means = [mean_scores([getattr(row, side) for row in rows]) for side in ("model", "linear")]
    print(line("mean over clips", *means))
    for name, frames in synthetic().items():
        error = np.abs(reconstruct_frames(frames, model).astype(float) - frames).mean()
        print(f"{name:20}mean |error| {error:.2f} of 255")


if __name__ == "__main__":
    main()
