"""A training loop, to be read from top to bottom.

    python -m temporal_vae.training.loop RECIPE --clips FOLDER --out FOLDER [--start MODEL]

A recipe is a TOML file of stages that follow one another. Each lasts a stated number of minutes, so
that its schedule of the learning rate is complete on any machine. The weights are written every
`save_minutes` in float32; at the end the latent scale is measured, and they are saved in bfloat16.
"""

from __future__ import annotations

import argparse
import math
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temporal_vae import TemporalVAE, TemporalVAEConfig, losses
from temporal_vae.training.data import BatchShape, draw_batch, load_clips
from temporal_vae.video import Uint8Frames

COLOUR_WEIGHT = 0.15
"""Weight of the error of mean colours beside that of pixels; see `reconstruction_terms`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One part of a recipe: what is trained, on batches of which shapes, for how long.

    Each batch has one of `shapes`, drawn with the probabilities `chances`. Without `temporal` only
    the spatial layers are used and trained, as an image VAE. `final_rate` is a fraction of
    `learning_rate`.
    """

    name: str
    minutes: float
    shapes: tuple[BatchShape, ...]
    chances: tuple[float, ...]
    temporal: bool
    learning_rate: float
    final_rate: float = 0.02
    kl_weight: float = 3e-3
    warmup_steps: int = 50

    @classmethod
    def from_toml(cls, table: dict[str, object]) -> Stage:
        """A stage from a recipe's table, in which `batches` are [chance, samples, frames, crop]."""
        values = dict(table)
        batches = values.pop("batches")
        assert isinstance(batches, list)
        return cls(
            shapes=tuple(BatchShape(*batch[1:]) for batch in batches),
            chances=tuple(batch[0] for batch in batches),
            **values,  # type: ignore[arg-type]
        )


class Optimizers:
    """Muon for weights inside the network, AdamW for first and last layers, norms and biases.

    torch's Muon takes matrices only, so it is given (out, rest) views of the convolutions' weights.
    """

    def __init__(self, model: nn.Module, rate: float):
        ends = ("conv_in", "conv_out", "quant_conv", "distance_bias")
        inner = {
            name
            for name, p in model.named_parameters()
            if p.ndim >= 2 and not any(end in name for end in ends)
        }
        self._matrices = [p for name, p in model.named_parameters() if name in inner]
        self._others = [p for name, p in model.named_parameters() if name not in inner]
        self._views = [nn.Parameter(p.detach().flatten(1)) for p in self._matrices]
        self._muon = torch.optim.Muon(
            self._views, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self._adam = torch.optim.AdamW(self._others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, rate: float) -> None:
        """One update at this learning rate; the gradients are then gone."""
        for optimizer in (self._muon, self._adam):
            for group in optimizer.param_groups:
                group["lr"] = rate
        nn.utils.clip_grad_norm_(self._others, 1.0)
        for parameter, view in zip(self._matrices, self._views, strict=True):
            view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
            parameter.grad = None
        for optimizer in (self._muon, self._adam):
            optimizer.step()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()


def reconstruction_terms(reconstruction: Tensor, video: Tensor) -> dict[str, Tensor]:
    """Losses of (B, C, T, H, W): the mean log of each frame's squared error, in two resolutions.

    By the logarithm a decibel counts the same in every frame. The second resolution is an eighth,
    at which the error is that of mean colours: without it a small model spends its few latent
    channels on edges, and turns green into brown. "error" is the mean squared error, for progress.
    """
    difference = reconstruction - video
    error = difference.square().mean(dim=(1, 3, 4))  # (B, T)
    colour = F.avg_pool3d(difference, (1, 8, 8)).square().mean(dim=(1, 3, 4))
    # the added constants are PSNRs of 36 and 46 dB: beyond them a frame hardly counts any more
    return {
        "reconstruction/log_error": (error + 1e-3).log().mean(),
        "reconstruction/log_colour": (colour + 1e-4).log().mean(),
        "error": error.mean().detach(),
    }


def train_step(
    model: TemporalVAE, optimizers: Optimizers, video: Tensor, kl_weight: float, rate: float
) -> dict[str, float]:
    """One update on a batch (B, 3, T, H, W) in [-1, 1]; returns the losses."""
    with torch.autocast(video.device.type, torch.bfloat16):
        reconstruction, posterior = model(video)
    terms = reconstruction_terms(reconstruction.float(), video)
    mean, log_variance = (moment.float() for moment in posterior)
    terms["kl"] = losses.kl_divergence(mean, log_variance) / mean[0].numel()
    loss = (
        terms["reconstruction/log_error"]
        + COLOUR_WEIGHT * terms["reconstruction/log_colour"]
        + kl_weight * terms["kl"]
    )
    loss.backward()
    optimizers.step(rate)
    return {name: term.item() for name, term in terms.items()}


def learning_rate(stage: Stage, progress: float, step: int) -> float:
    """Warm-up over the first steps, and a half cosine over `progress`, 0 to 1, of the stage."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    decay = stage.final_rate + (1 - stage.final_rate) * cosine
    return stage.learning_rate * min(1.0, (step + 1) / stage.warmup_steps) * decay


def run_stage(
    stage: Stage, model: TemporalVAE, clips: Sequence[Uint8Frames], rng: np.random.Generator
) -> Iterator[str]:
    """Train `model` in place; yields a line about the progress twice a minute."""
    optimizers = Optimizers(model, stage.learning_rate)
    start = said = time.monotonic()
    step, errors = 0, []
    while (elapsed := time.monotonic() - start) < 60 * stage.minutes:
        shape = stage.shapes[rng.choice(len(stage.shapes), p=stage.chances)]
        video = draw_batch(clips, shape, rng).to(model.device)
        rate = learning_rate(stage, elapsed / (60 * stage.minutes), step)
        terms = train_step(model, optimizers, video, stage.kl_weight, rate)
        step += 1
        errors.append(terms["error"])
        if time.monotonic() - said > 30:
            said = time.monotonic()
            decibels = 10 * math.log10(4 / float(np.mean(errors)))
            yield (
                f"{stage.name}: {elapsed / 60:.1f} of {stage.minutes:g} min, step {step}, "
                f"{decibels:.2f} dB, kl {terms['kl']:.2f}, rate {rate:.1e}"
            )
            errors = []


@torch.no_grad()
def latent_scale(
    model: TemporalVAE, clips: Sequence[Uint8Frames], rng: np.random.Generator
) -> float:
    """1 / the standard deviation of latent samples of random clips, to four decimal places."""
    crop = min(64, *(min(clip.shape[1:3]) // 8 * 8 for clip in clips))
    latents = [
        model.encode(draw_batch(clips, BatchShape(2, 8, crop), rng).to(model.device)).flatten()
        for _ in range(32)
    ]
    return round(1 / float(torch.cat(latents).std()), 4)


def image_twin(model: TemporalVAE) -> TemporalVAE:
    """An image VAE that shares the spatial parameters of `model`."""
    config = replace(model.config, num_temporal_layers=0)
    twin = TemporalVAE.from_config(config)
    parameters = dict(model.named_parameters())
    for name, _ in list(twin.named_parameters()):
        path, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(path), leaf, parameters[name])
    return twin


def train(
    recipe: dict[str, Any],
    model: TemporalVAE,
    clips: Sequence[Uint8Frames],
    rng: np.random.Generator,
    out: Path,
) -> None:
    """Train stage after stage, and write the weights to `out` now and then."""
    saved = time.monotonic()
    for table in recipe.get("stage", []):
        stage = Stage.from_toml(table)
        part = model if stage.temporal else image_twin(model)
        for line in run_stage(stage, part, clips, rng):
            print(line, flush=True)
            if time.monotonic() - saved > 60 * recipe["save_minutes"]:
                saved = time.monotonic()
                model.save_pretrained(out)
        model.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the recipe and the clips, train, measure the latent scale, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--clips", type=Path, required=True, help="folder of .mp4 files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--start", help="model to continue from; new weights without it")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    recipe = tomllib.loads(options.recipe.read_text(encoding="utf-8"))
    data, seed = recipe["data"], recipe["seed"]

    files = [
        file
        for file in sorted(options.clips.glob("*.mp4"))
        if not any(file.match(pattern) for pattern in data["exclude"])
    ]
    clips = load_clips(files, data["widths"], lambda name: print(f"reading {name}", flush=True))
    if options.start:
        model, rng = TemporalVAE.from_pretrained(options.start), np.random.default_rng()
    else:
        model = TemporalVAE.from_config(TemporalVAEConfig.tiny(), seed=seed)
        rng = np.random.default_rng(seed)
    train(recipe, model.to(options.device), clips, rng, options.out)
    scale = latent_scale(model, clips, rng)
    model.config = replace(model.config, latent_scale_factor=scale)
    model.to(torch.bfloat16).save_pretrained(options.out)
    print(f"latent scale factor {scale}; saved in bfloat16")


if __name__ == "__main__":
    main()
