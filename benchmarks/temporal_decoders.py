"""The experiment the library rests on: what temporal layers buy a decoder, and what they cost it.

    python benchmarks/temporal_decoders.py --train FOLDER --clips FOLDER --out RUNS [--seeds 3]

For each seed an image autoencoder of base width 16 is trained from scratch on single frames. Three
decoders go on from it, with its encoder frozen: frame by frame, temporal (two-sided), and causal.
They have the same weights to begin with but for the temporal layers, which begin without effect,
and see the same clips of 8 frames of 64x64 in the same order for as many steps, a quarter of them
clean, the others with noise on the latents. Each is then decoded from perturbed latents of clips
that it has not seen. A run that is broken off is taken up by the same command.

The table has means over clips. The comparison has the mean difference, or ratio of flicker, over
seeds, with its 95 % Student's t interval: seeds, not clips, are what is drawn anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from perturbed import means

from temporal_vae import TemporalVAE
from temporal_vae.evaluation.perturbed import SHARES
from temporal_vae.evaluation.results import Mean
from temporal_vae.training.loop import train
from temporal_vae.training.recipe import Recipe
from temporal_vae.training.sources import Inputs

ARMS: dict[str, dict[str, bool]] = {
    "frame by frame": {"temporal_decoder": False},
    "temporal": {"temporal_decoder": True},
    "causal": {"temporal_decoder": True, "causal_mode": True},
}
Table = dict[str, Any]
Rows = list[list[float]]
"""PSNR, SSIM and flicker for each share of noise."""


def table(seed: int, steps: int, **sections: Table) -> Table:
    """What the recipes have in common."""
    data = {
        "widths": [128, 176, 224], "exclude": ["bbb_*", "building_pan.mp4"], "colours": 0.3,
        "workers": 1, "cache": "2GiB",
    }  # fmt: skip
    both = {"data": data | sections.pop("data"), "validation": {"every": 0, "clips": 0}}
    return {"seed": seed, "steps": steps, "save_minutes": 5, "keep": 1, **both, **sections}


def autoencoder(seed: int, steps: int) -> Table:
    """The recipe of the image autoencoder that all three begin with."""
    return table(
        seed, steps,
        model={
            "preset": "tiny",
            "config": {"base_channels": 16, "temporal_encoder": False, "temporal_decoder": False},
        },
        data={"batch": [{"samples": 8, "frames": 1, "crop": 64}]},
        optimizer={"name": "muon", "learning_rate": 2e-3, "ema": 0.99},
        loss={"log_mse": 1.0, "colour": 0.15, "kl": 3e-3, "sample": True},
    )  # fmt: skip


def decoder(seed: int, steps: int, init: Path, config: Table) -> Table:
    """The recipe of a decoder that goes on from it."""
    return table(
        seed, steps,
        model={"init": str(init), "config": config, "train": ["decoder"]},
        data={"batch": [{"samples": 1, "frames": 8, "crop": 64}]},
        optimizer={"learning_rate": 5e-4, "rates": {"decoder.temporal": 4.0}, "ema": 0.99},
        loss={"log_mse": 1.0, "colour": 0.15, "temporal": 0.3, "noise": 0.5, "clean": 0.25},
    )  # fmt: skip


def trained(recipe: Table, clips: Path, out: Path) -> Path:
    """The model of a recipe, trained as far as it is not yet."""
    if not (out / "done").exists():
        for record in train(Recipe.from_table(recipe), Inputs([clips]), out, resume=True):
            if record["step"] % 50 == 0:
                print(f"{out.name}: step {record['step']}, loss {record['loss']:.3f}", flush=True)
        (out / "done").touch()
    return out / "model"


def measured(model: Path, options: argparse.Namespace) -> Rows:
    """A model's rows, measured as far as they are not yet."""
    kept = model.parent / f"rows-{options.frames}-{options.width}.json"
    if not kept.exists():
        files = sorted(options.clips.glob("*.mp4"))
        vae = TemporalVAE.from_pretrained(model).float()
        found = means(vae, files, options.frames, options.width)
        kept.write_text(json.dumps([[row.psnr, row.ssim, row.flicker] for row in found]))
    rows: Rows = json.loads(kept.read_text())
    return rows


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Rows]:
    """The rows of every decoder of a seed."""
    start = autoencoder(seed, options.first)
    init = trained(start, options.train, options.out / f"{seed}-autoencoder")
    found = {}
    for name, config in ARMS.items():
        out = options.out / f"{seed}-{name.replace(' ', '-')}"
        recipe = decoder(seed, options.steps, init, config)
        found[name] = measured(trained(recipe, options.train, out), options)
    return found


def compared(seeds: list[dict[str, Rows]]) -> None:
    """Print what each kind of decoder has over frame by frame, and causal over temporal."""
    for ours, theirs in (("temporal", "frame by frame"), ("causal", "frame by frame"),
                         ("causal", "temporal")):  # fmt: skip
        print(f"\n{ours} against {theirs}; behind each interval what the seeds gave")
        for index, share in enumerate(SHARES):
            pairs = [(rows[ours][index], rows[theirs][index]) for rows in seeds]
            gains, ratios = [a[0] - b[0] for a, b in pairs], [a[2] / b[2] for a, b in pairs]
            each = " ".join(f"{gain:+.2f}" for gain in gains), " ".join(f"{r:.3f}" for r in ratios)
            gain, ratio = Mean.of(gains).text(2), Mean.of(ratios).text(3)
            print(f"{share:5.1f}  dB {gain}: {each[0]}   flicker {ratio}: {each[1]}")


def main() -> None:
    """Train, measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help="clips to train on")
    parser.add_argument("--clips", type=Path, required=True, help="clips to measure on")
    parser.add_argument("--out", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=400, help="steps of the autoencoder")
    parser.add_argument("--steps", type=int, default=400, help="steps of each decoder")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    seeds = [one_seed(seed, options) for seed in range(options.seeds)]
    clips = len(list(options.clips.glob("*.mp4")))
    print(
        f"\n{datetime.date.today()}  {options.seeds} seeds; {options.first} steps of an image "
        f"autoencoder, then {options.steps} of each decoder;\nfirst {options.frames} frames of "
        f"{clips} clips, {options.width} wide\n\n{'decoder':16}{'noise':>6}{'PSNR':>8}"
        f"{'flicker':>9}{'added':>8}   means over seeds"
    )
    for name in ARMS:
        model = TemporalVAE.from_pretrained(options.out / f"0-{name.replace(' ', '-')}" / "model")
        count = sum(p.numel() for p in model.decoder.parameters())
        print(f"{name}: {count:,} parameters")
        of = [rows[name] for rows in seeds]
        for index, share in enumerate(SHARES):
            psnr, flicker, clean = (
                sum(rows[at][value] for rows in of) / len(of)
                for at, value in ((index, 0), (index, 2), (0, 2))
            )
            print(f"{name:16}{share:6.1f}{psnr:8.2f}{flicker:9.2f}{flicker - clean:8.2f}")
    compared(seeds)


if __name__ == "__main__":
    main()
