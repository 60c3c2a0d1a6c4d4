"""Error at the left and right edge of pictures beside that of their middle.

    python benchmarks/edges.py --clips FOLDER --models tiny tiny-frames

The encoder of Stable Diffusion's layout pads on the right and below only, so latents differ at the
right edge, and a decoder that has not seen wide pictures in training shows it. RMS error in 8-bit
levels over bands of 8 columns: of a flat sky, and of the first frame of every clip.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch
from torch import Tensor

from temporal_vae import TemporalVAE
from temporal_vae.evaluation.evaluate import as_clip
from temporal_vae.video import read_clip

EDGE = 8


def sky(width: int, height: int) -> Tensor:
    """A smooth gradient (1, 3, 1, H, W), bluer than grey, as it is above a landscape."""
    fall = torch.linspace(0.2, 0.75, height).view(1, 1, 1, height, 1)
    tint = torch.tensor([-0.25, 0.0, 0.15]).view(1, 3, 1, 1, 1)
    return (fall + tint).expand(1, 3, 1, height, width).contiguous()


@torch.no_grad()
def bands(model: TemporalVAE, pictures: list[Tensor]) -> str:
    """The left band's error, the middle's, the right band's, and right over middle."""
    squares = torch.stack([
        torch.stack([part.mean() for part in (square[:EDGE], square[EDGE:-EDGE], square[-EDGE:])])
        for picture in pictures
        for square in [((model.predict(picture) - picture) * 127.5).square().mean((0, 1, 2, 3))]
    ])  # fmt: skip
    left, middle, right = squares.sqrt().mean(0).tolist()
    return f"{left:8.2f}{middle:8.2f}{right:8.2f}{right / middle:8.2f}"


def main() -> None:
    """Print a row for every model and kind of picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-frames"])
    options = parser.parse_args()
    files = sorted(options.clips.glob("*.mp4"))
    clips = [read_clip(file, 1, 256, multiple=8) for file in files]
    print(
        f"{datetime.date.today()}  first frames of {len(files)} clips, 256 wide\n"
        f"{'model':20}{'picture':12}{'left':>8}{'middle':>8}{'right':>8}{'ratio':>8}"
    )
    for name in options.models:
        model = TemporalVAE.from_pretrained(name).float()
        kinds = {f"sky {width}": [sky(width, width * 9 // 16 // 8 * 8)] for width in (64, 256, 448)}
        kinds["clips"] = [as_clip(clip, model) for clip in clips]
        for kind, pictures in kinds.items():
            print(f"{Path(name).name:20}{kind:12}{bands(model, pictures)}", flush=True)


if __name__ == "__main__":
    main()
