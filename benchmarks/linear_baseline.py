"""Fit the linear baseline to training clips and write it into the package.

    python benchmarks/linear_baseline.py --clips FOLDER

The recipe's clips and none else: what is excluded from training is excluded here.
"""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import asdict
from pathlib import Path

from safetensors.numpy import save_file

from temporal_vae.evaluation.baseline import BLOCK, LinearBaseline
from temporal_vae.files.atomic import atomic_path
from temporal_vae.video import read_clip

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "src/temporal_vae/weights/linear_baseline.safetensors"


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, required=True)
    clips = parser.parse_args().clips
    exclude = tomllib.loads((ROOT / "recipes/tiny.toml").read_text())["data"]["exclude"]
    files = [
        file
        for file in sorted(clips.glob("*.mp4"))
        if not any(file.match(pattern) for pattern in exclude)
    ]
    frames = [read_clip(file, 32, 256, multiple=BLOCK) for file in files]
    baseline = LinearBaseline.fit(frames, 4)
    with atomic_path(TARGET) as file:
        save_file(asdict(baseline), file)
    print(f"{len(files)} clips -> {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
