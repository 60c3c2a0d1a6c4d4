"""What a step of every recipe costs: operations, counted on shapes alone, and seconds that follow.

    python benchmarks/training_cost.py [--rate 0.06] [--recipes decoder tiny]

Operations are those of forward and backward, a multiplication and an addition counting as two, on
the mean over a recipe's kinds of batches and stages. `--rate` is how many of them a processor does
in a second, in units of 10^12; seconds are operations over rate. Recipes that begin with an image
VAE are counted with one of Stable Diffusion's layout. The critic is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from temporal_vae import TemporalVAE, TemporalVAEConfig
from temporal_vae.training import optimizers, recipe
from temporal_vae.training.build import PRESETS, image_twin
from temporal_vae.training.step import Pass

RECIPES = Path(__file__).parent.parent / "recipes"


def layout(spec: recipe.Model) -> TemporalVAE:
    """A recipe's model on the meta device, with new weights whatever it begins with."""
    begins = {"tiny": PRESETS["tiny"](), None: PRESETS[spec.preset]()}
    config = begins.get(spec.init) or TemporalVAEConfig(num_temporal_layers=0, norm_groups=32)
    with torch.device("meta"), contextlib.redirect_stderr(io.StringIO()):
        return TemporalVAE.from_config(replace(config, **spec.config))


def operations(stage: recipe.Recipe) -> tuple[float, float]:
    """Operations, and frames, of a step of a stage, on the mean over its kinds of batches."""
    model = layout(stage.model)
    network = model if stage.model.temporal else image_twin(model)
    optimizers.freeze(model, stage.model)
    found = frames = chances = 0.0
    for kind in stage.data.batch:
        video = torch.empty(kind.samples, 3, kind.frames, kind.crop, kind.crop, device="meta")
        with FlopCounterMode(display=False) as counter:
            reconstruction, mean, log_variance = Pass(network, recipe.Loss())(video, [0])
            (reconstruction.mean() + mean.mean() + log_variance.mean()).backward()
        found += kind.chance * counter.get_total_flops() * stage.optimizer.accumulate
        frames += kind.chance * kind.samples * kind.frames * stage.optimizer.accumulate
        chances += kind.chance
    return found / chances, frames / chances


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=0.06)
    names = [file.stem for file in sorted(RECIPES.glob("*.toml"))]
    parser.add_argument("--recipes", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    print(f"{datetime.date.today()}  torch {torch.__version__}, {options.rate} x 10^12 a second")
    heads = ("steps", "frames a step", "10^12 a step", "s a step", "hours")
    print(f"{'':14}" + "".join(f"{head:>15}" for head in heads))
    for name in options.recipes:
        its = recipe.Recipe.read(RECIPES / f"{name}.toml")[0]
        ends, steps = its.bounds(), its.steps or 0
        shares = [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]
        each = [operations(stage) for stage in its.stages()]
        work = sum(share * found for share, (found, _) in zip(shares, each, strict=True)) / 1e12
        frames = sum(share * count for share, (_, count) in zip(shares, each, strict=True))
        seconds = work / options.rate
        print(
            f"{name:14}{steps:15}{frames:15.1f}{work:15.3f}{seconds:15.1f}"
            f"{steps * seconds / 3600:15.1f}"
        )


if __name__ == "__main__":
    main()
