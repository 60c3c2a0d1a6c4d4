"""Speed of the SVD preset against diffusers, the same weights in both.

    python benchmarks/speed.py [--repeats 5] [--dtypes float32 bfloat16] [--shapes 4x128x128 ...]

Interleaved, medians; the ratio is (the faster of diffusers' NCHW and channels-last) / ours, so 1 is
even and above 1 is faster. Both walk the whole clip, without gradients; "bounded" is our decode in
1.68 times the widest activation of 128 channels, a fifth of what diffusers takes (or the least that
it can do with, where that is more).
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor

from temporal_vae import TemporalVAE
from temporal_vae.checkpoints import diffusers_names

Steps = dict[str, Callable[[], Tensor]]
WIDTHS = (128, 256, 512, 512)
FIFTH = 1.68
"""Of the memory of diffusers, in widest activations."""


def build() -> tuple[Any, Any, TemporalVAE]:
    """diffusers twice, the second channels-last, and ours; random weights, the same in all."""
    torch.manual_seed(0)
    models = [
        AutoencoderKLTemporalDecoder(
            block_out_channels=WIDTHS,
            down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
            layers_per_block=2,
        ).eval()
        for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for module in models[1].modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)
    config, state = diffusers_names.from_diffusers(models[0].state_dict(), models[0].config)
    ours = TemporalVAE.from_config(config)
    ours.load_state_dict(state)
    return models[0], models[1], ours.eval()


def encodings(nchw: Any, last: Any, ours: TemporalVAE, video: Tensor) -> Steps:
    """Encoding one video by each."""
    images = video.transpose(1, 2).flatten(0, 1).contiguous()
    return {
        "nchw": lambda: nchw.encode(images).latent_dist.mean,
        "last": lambda: last.encode(images).latent_dist.mean,
        "ours": lambda: ours.encode(video, sample_mode=False),
    }


def decodings(nchw: Any, last: Any, ours: TemporalVAE, latent: Tensor) -> Steps:
    """Decoding one latent by each."""
    cells, frames = latent.transpose(1, 2).flatten(0, 1).contiguous(), latent.shape[2]
    widest = 128 * 64 * latent[:, 0].numel() * latent.itemsize
    least = ours.plan(latent.shape, budget="least").peak_bytes
    plan = ours.plan(latent.shape, budget=max(least, int(FIFTH * widest)))
    print(plan.explain())
    return {
        "nchw": lambda: nchw.decode(cells, num_frames=frames).sample,
        "last": lambda: last.decode(cells, num_frames=frames).sample,
        "ours": lambda: ours.decode(latent),
        "bounded": lambda: ours.decode(latent, plan=plan),
    }


def medians(steps: Steps, repeats: int) -> dict[str, float]:
    """Median seconds of each step, taken in turn, after one run of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=["4x128x128", "8x256x256"])
    parser.add_argument("--verbs", nargs="+", default=["encode", "decode"])
    options = parser.parse_args()
    nchw, last, ours = build()
    print(
        f"{datetime.date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, SVD preset, median of {options.repeats}"
    )
    heads = ("diffusers", "ch.-last", "ours", "bounded")
    print(f"{'':28}" + "".join(f"{head:>10}" for head in heads) + f"{'ratio':>8}{'bounded':>8}")
    for dtype in options.dtypes:
        for model in (nchw, last, ours):
            model.to(getattr(torch, dtype))
        for shape in options.shapes:
            frames, height, width = map(int, shape.split("x"))
            video = torch.randn(1, 3, frames, height, width, dtype=ours.dtype)
            latent = torch.randn(1, 4, frames, height // 8, width // 8, dtype=ours.dtype)
            work = {
                "encode": partial(encodings, nchw, last, ours, video),
                "decode": partial(decodings, nchw, last, ours, latent),
            }
            for verb in options.verbs:
                steps = work[verb]()
                t = medians(steps, options.repeats)
                ratio = min(t["nchw"], t["last"]) / t["ours"]
                row = "".join(f"{seconds:9.2f}s" for seconds in t.values())
                end = f"{ratio:8.2f}"
                if "bounded" in t:
                    end += f"{min(t['nchw'], t['last']) / t['bounded']:8.2f}"
                else:
                    end = " " * 10 + end
                print(f"{f'{verb} {shape} {dtype}':28}{row}{end}", flush=True)


if __name__ == "__main__":
    main()
