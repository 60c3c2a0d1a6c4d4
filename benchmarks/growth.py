"""How the time of a decode grows: with frames, with height and width, and with less memory.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--svg docs/images/growth.svg] [--repeats 3]

`tiny`'s layout with random weights, float32, medians, in turn. A clip is 8 frames of 128x128 where
nothing else is said. For memory the clip is 12 frames of 192x192, and budgets go from what the
whole walk takes down to the least. The plot has a panel for each, its axes logarithmic.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from temporal_vae import Plan, TemporalVAE, TemporalVAEConfig

PANEL, MARGIN = 220, 46
Points = list[tuple[float, float]]


class Case(NamedTuple):
    """A decode: where it stands on its panel's axis, its latent, and how it is walked."""

    at: float
    latent: torch.Tensor
    plan: Plan | None


def cases(vae: TemporalVAE) -> dict[str, list[Case]]:
    """The decodes of each panel."""

    def latent(frames: int, height: int, width: int) -> torch.Tensor:
        return torch.randn(1, vae.latent_channels, frames, height // 8, width // 8)

    found = {
        "frames": [Case(n, latent(n, 128, 128), None) for n in (2, 4, 8, 16, 32)],
        "height, at 128 pixels of width": [Case(n, latent(8, n, 128), None)
                                           for n in (64, 128, 256, 512)],
        "height and width": [Case(n, latent(8, n, n), None) for n in (64, 128, 192, 256)],
    }  # fmt: skip
    large = latent(12, 192, 192)
    shape = tuple(large.shape)
    whole, least = (vae.plan(shape, "decode", budget=b) for b in (None, "least"))
    plans = {whole.peak_bytes: whole, least.peak_bytes: least}
    for share in (0.8, 0.65, 0.5, 0.4):
        plan = vae.plan(
            shape, "decode", budget=max(least.peak_bytes, int(share * whole.peak_bytes))
        )
        plans[plan.peak_bytes] = plan
    found["MiB at the most, by plan"] = [
        Case(size / 2**20, large, plan) for size, plan in sorted(plans.items())
    ]
    return found


def measure(vae: TemporalVAE, asked: list[Case], repeats: int) -> Points:
    """(where it stands, median seconds) of each case, taken in turn."""
    seconds: list[list[float]] = [[] for _ in asked]
    for repeat in range(repeats + 1):
        for case, taken in zip(asked, seconds, strict=True):
            begin = time.perf_counter()
            vae.decode(case.latent, plan=case.plan)
            if repeat:
                taken.append(time.perf_counter() - begin)
    return [(case.at, statistics.median(s)) for case, s in zip(asked, seconds, strict=True)]


def svg(panels: dict[str, Points]) -> str:
    """A picture of all panels side by side."""
    drawn = "".join(_panel(name, points, i * (PANEL + MARGIN)) for i, (name, points)
                    in enumerate(panels.items()))  # fmt: skip
    width, height = len(panels) * (PANEL + MARGIN) + 10, PANEL + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="white"/>{drawn}</svg>\n'
    )


def _panel(name: str, points: Points, left: float) -> str:
    x, y = ([math.log(p[axis]) for p in points] for axis in (0, 1))
    low, high = min(y) - 0.2, max(y) + 0.2
    places = [
        (
            left + MARGIN + (a - min(x)) / (max(x) - min(x)) * (PANEL - 30),
            MARGIN + PANEL - (b - low) / (high - low) * PANEL,
        )
        for a, b in zip(x, y, strict=True)
    ]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    marks = "".join(
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="#1f6fb2"/>'
        f'<text x="{a:.1f}" y="{MARGIN + PANEL + 16}" text-anchor="middle">{at:.0f}</text>'
        f'<text x="{a:.1f}" y="{b - 8:.1f}" text-anchor="middle">{seconds:.2g} s</text>'
        for (a, b), (at, seconds) in zip(places, points, strict=True)
    )
    return (
        f'<polyline points="{line}" fill="none" stroke="#1f6fb2" stroke-width="2"/>{marks}'
        f'<text x="{left + MARGIN}" y="{MARGIN - 22}" font-weight="bold">{name}</text>'
        f'<path d="M{left + MARGIN - 14} {MARGIN - 10}V{MARGIN + PANEL}h{PANEL}" fill="none" '
        'stroke="#888"/>'
    )


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, medians of "
        f"{options.repeats}"
    )
    vae = TemporalVAE.from_config(TemporalVAEConfig.tiny(), seed=0).requires_grad_(False)
    panels = {}
    for name, asked in cases(vae).items():
        panels[name] = measure(vae, asked, options.repeats)
        print(f"{name}: " + ", ".join(f"{at:.0f} {s:.2f} s" for at, s in panels[name]), flush=True)
    if options.svg is not None:
        options.svg.write_text(svg(panels), encoding="utf-8")


if __name__ == "__main__":
    main()
