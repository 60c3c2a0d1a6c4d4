"""Decoders on perturbed latents: what time buys where latents are not an encoder's own.

    python benchmarks/perturbed.py --clips FOLDER --models tiny tiny-frames [--frames 24]

Gaussian noise, independent per frame, of a share of the latents' deviation. Each model's rows are
means over clips; "added" is the flicker beyond the model's own on clean latents. The last rows are
the first model's flicker over each other's, and how many dB it is above. 8-bit RGB, posterior mean.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from temporal_vae import TemporalVAE
from temporal_vae.evaluation.baseline import BLOCK, LinearBaseline
from temporal_vae.evaluation.evaluate import mean_scores
from temporal_vae.evaluation.metrics import Scores, score
from temporal_vae.evaluation.perturbed import SHARES, decoded_perturbed
from temporal_vae.video import read_clip

Means = list[Scores]


def means(model: TemporalVAE | None, files: list[Path], frames: int, width: int) -> Means:
    """Mean scores over clips for each share of noise; of the linear baseline without a model."""
    found: list[list[Scores]] = [[] for _ in SHARES]
    baseline = LinearBaseline.bundled()
    for file in files:
        clip = read_clip(file, frames, width, multiple=BLOCK)
        decoded = (
            [baseline(clip, share) for share in SHARES]
            if model is None
            else decoded_perturbed(model, clip, SHARES)
        )
        for scores, ours in zip(found, decoded, strict=True):
            scores.append(score(clip, ours))
    return [mean_scores(scores) for scores in found]


def table(name: str, rows: Means) -> None:
    """Print a model's rows."""
    for share, row in zip(SHARES, rows, strict=True):
        added = row.flicker - rows[0].flicker
        print(f"{name:20}{share:6.1f}{row.psnr:9.2f}{row.ssim:9.4f}{row.flicker:9.2f}{added:9.2f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-frames"])
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    files = sorted(options.clips.glob("*.mp4"))
    print(
        f"{datetime.date.today()}  {len(files)} clips, first {options.frames} frames, "
        f"{options.width} wide\n{'model':20}{'noise':>6}{'PSNR':>9}{'SSIM':>9}{'flicker':>9}"
        f"{'added':>9}"
    )
    found: dict[str, Means] = {}
    for name in options.models:
        model = TemporalVAE.from_pretrained(name).float()
        found[Path(name).name] = means(model, files, options.frames, options.width)
        table(Path(name).name, found[Path(name).name])
    table("linear baseline", means(None, files, options.frames, options.width))
    first, *others = found
    for other in others:
        for share, ours, theirs in zip(SHARES, found[first], found[other], strict=True):
            ratio, gain = ours.flicker / theirs.flicker, ours.psnr - theirs.psnr
            print(f"{first} against {other} at {share:.1f}: flicker {ratio:.3f}, {gain:+.2f} dB")


if __name__ == "__main__":
    main()
