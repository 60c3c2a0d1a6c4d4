"""Forward and backward of a training step beside diffusers' modules of the same sizes.

    python benchmarks/training_step.py [--rows tiny tiny-wan] [--repeats 7]

Interleaved, medians of seconds, float32, clips of 64x64 pixels. "tiny" stands beside diffusers'
temporal decoder at its widths, which has temporal layers in the decoder alone and of another kind:
operations are printed, and the rate at which each side does them. "tiny-wan" is the same network.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from temporal_vae import TemporalVAE, TemporalVAEConfig, WanVAEConfig

Step = Callable[[], None]
ROWS = {"tiny": (2, 8), "tiny-wan": (2, 9)}
"""Samples and frames of a batch."""


def ours(row: str, video: torch.Tensor) -> Step:
    """A step of ours, without the optimizer."""
    config: Any = TemporalVAEConfig.tiny() if row == "tiny" else WanVAEConfig.tiny()
    vae = TemporalVAE.from_config(config, seed=0)

    def step() -> None:
        latent = vae.encoder(video)[:, : vae.latent_channels]
        (vae.decoder(latent) - video).square().mean().backward()

    return step


def theirs(row: str, video: torch.Tensor) -> Step:
    """A step of diffusers' modules."""
    if row == "tiny-wan":
        wan: Any = AutoencoderKLWan(base_dim=24, dim_mult=[1, 2, 3, 4], z_dim=16)

        def of_clips() -> None:
            latent = wan.encode(video).latent_dist.mean
            (wan.decode(latent).sample - video).square().mean().backward()

        return of_clips
    config = TemporalVAEConfig.tiny()
    widths = tuple(config.base_channels * times for times in config.channel_multipliers)
    vae: Any = AutoencoderKLTemporalDecoder(
        block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * len(widths),
        layers_per_block=config.blocks_per_level,
    )  # fmt: skip
    frames = video.transpose(1, 2).flatten(0, 1).contiguous()

    def of_frames() -> None:
        latent = vae.encode(frames).latent_dist.mean
        made = vae.decode(latent, num_frames=video.shape[2]).sample
        (made - frames).square().mean().backward()

    return of_frames


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, medians of "
        f"{options.repeats}"
    )
    for row in options.rows:
        samples, frames = ROWS[row]
        video = torch.rand(samples, 3, frames, 64, 64) * 2 - 1
        steps = {"diffusers": theirs(row, video), "ours": ours(row, video)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(options.repeats + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        for name, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            done = counter.get_total_flops()
            print(
                f"{row:10}{name:12}{medians[name]:8.3f} s  {done / 1e12:.3f} x 10^12 operations, "
                f"{done / medians[name] / 1e9:.0f} x 10^9 a second, "
                f"{medians['diffusers'] / medians[name]:.2f} of diffusers' speed"
            )


if __name__ == "__main__":
    main()
