"""Faults by their names: what the numbers of a clip say to who has not seen it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from temporal_vae.evaluation import series
from temporal_vae.evaluation.results import ModelOnClip

LEAST = {
    "luma_flicker": 0.5, "period_strength": 0.5, "luma_drift": 1.0, "chroma_drift": 1.0,
    "frozen_frames": 1.0, "first_frame_gap": 1.5, "last_frame_gap": 1.5,
}  # fmt: skip
"""What is worth a line: 8-bit units, frames, dB."""
DIP = 3.0
"""Decibels by which a frame must lie below its neighbours to be called bad."""


def diagnose(found: ModelOnClip) -> Iterator[str]:
    """A line for each fault."""
    values = {name: value for name, value in found.values.items() if _counts(name, value)}
    if found.bad_values:
        yield (
            f"not a number: {found.bad_values} values in {len(found.bad_frames)} frames, the first "
            f"one frame {found.bad_frames[0]}; means over them are not given"
        )
    if "luma_flicker" in values:
        yield (
            f"brightness flicker: the mean brightness of whole frames jumps by "
            f"{values['luma_flicker']:.1f} levels from one to the next"
        )
    if "period_strength" in values and found.period is not None:
        yield _of_period(found, found.period)
    if "frozen_frames" in values:
        first = found.frames["frozen"].index(1.0)
        yield (
            f"frozen picture: {values['frozen_frames']:.0f} frames stand still where the original "
            f"moves, the first one frame {first}"
        )
    elif found.period is None and (outliers := series.dips(found.frames.get("psnr", []), DIP)):
        yield (
            f"single bad frames: {len(outliers)} are {DIP:g} dB or more below those around them, "
            f"the first one frame {outliers[0]}"
        )
    for name, what in (("luma_drift", "brightness"), ("chroma_drift", "colour")):
        if name in values:
            yield f"{what} drift: {values[name]:+.1f} levels from the first third to the last"
    for name, which in (("first_frame_gap", "first"), ("last_frame_gap", "last")):
        if name in values:
            yield f"{which} frame: {values[name]:.1f} dB below the next ones"


def _counts(name: str, value: float) -> bool:
    drifts = name.endswith("_drift")
    return (
        name in LEAST and math.isfinite(value) and (abs(value) if drifts else value) >= LEAST[name]
    )


def _of_period(found: ModelOnClip, n: int) -> str:
    """What comes back every n frames: a frame that differs, or else a seam.

    The error jumps once at a seam, and twice, there and back, at a frame.
    """
    steps = [_mean([x for x in found.frames["flicker"][place::n] if x == x]) for place in range(n)]
    place = max(range(n), key=lambda i: steps[i])
    before, after = steps[place - 1], steps[(place + 1) % n]
    beside, usual = max(before, after), sorted(steps)[n // 2]
    if n > 2 and beside - usual < (steps[place] - usual) / 2:
        return (
            f"a seam every {n} frames: the error jumps by {steps[place]:.1f} levels at frame "
            f"{place} and so on, as where a clip was cut into pieces"
        )
    place = (place - 1) % n if before > after else place
    luma = found.frames.get("luma_error", [])
    darker = _mean([luma[i - 1] - luma[i] for i in range(place or n, len(luma), n)])
    kind = "different" if abs(darker) < 0.5 else "dark" if darker > 0 else "bright"
    by = "" if kind == "different" else f" by {abs(darker):.1f} levels,"
    return f"a {kind} frame every {n}:{by} frame {place} and so on"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
