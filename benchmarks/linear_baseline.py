"""Fit the linear baselines to training clips and write them into the package.

    python benchmarks/linear_baseline.py --clips FOLDER [--out FILE] [--check FOLDER]

The recipe's clips and none else: what is excluded from training is excluded here. With --check it
prints the mean PSNR of each over the first 24 frames, 256 wide, of other clips.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import numpy as np

from temporal_vae.evaluation import baseline
from temporal_vae.evaluation.baseline import BLOCK, LinearBaseline
from temporal_vae.evaluation.metrics import psnr
from temporal_vae.video import read_clip

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "src/temporal_vae/weights/linear_baseline.safetensors"


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--check", type=Path)
    options = parser.parse_args()
    exclude = tomllib.loads((ROOT / "recipes/tiny.toml").read_text())["data"]["exclude"]
    files = [
        file
        for file in sorted(options.clips.glob("*.mp4"))
        if not any(file.match(pattern) for pattern in exclude)
    ]
    fitted = baseline.fit_all([baseline.training_clip(file) for file in files])
    baseline.write(fitted, options.out)
    print(f"{len(files)} clips -> {options.out}, {options.out.stat().st_size} bytes")
    if options.check:
        clips = [read_clip(f, 24, 256, BLOCK) for f in sorted(options.check.glob("*.mp4"))]
        for name in baseline.KINDS:
            codec = LinearBaseline.read(options.out, name)
            print(f"pca:{name:5}{np.mean([psnr(clip, codec(clip)) for clip in clips]):7.2f} dB")


if __name__ == "__main__":
    main()
