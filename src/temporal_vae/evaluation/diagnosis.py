"""Faults by their names: what the numbers of a clip say to who has not seen it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from temporal_vae.evaluation.results import ModelOnClip

LEAST = {
    "luma_flicker": 0.5, "period_strength": 0.5, "luma_drift": 1.0, "chroma_drift": 1.0,
    "frozen_frames": 1.0, "first_frame_gap": 1.5, "last_frame_gap": 1.5,
}  # fmt: skip
"""What is worth a line: 8-bit units, frames, dB."""


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
    for name, what in (("luma_drift", "brightness"), ("chroma_drift", "colour")):
        if name in values:
            yield f"{what} drift: {values[name]:+.1f} levels from the first third to the last"
    for name, which in (("first_frame_gap", "first"), ("last_frame_gap", "last")):
        if name in values:
            yield f"{which} frame: {values[name]:.1f} dB below the others"


def _counts(name: str, value: float) -> bool:
    drifts = name.endswith("_drift")
    return (
        name in LEAST and math.isfinite(value) and (abs(value) if drifts else value) >= LEAST[name]
    )


def _of_period(found: ModelOnClip, n: int) -> str:
    """What comes back every n frames: a frame that is brighter or darker, or else a seam."""
    steps = found.frames["flicker"]
    phase = max(range(n), key=lambda p: _mean([x for x in steps[p::n] if x == x]))
    errors = found.frames.get("luma_error", [])
    dips = [
        errors[i] - (errors[i - 1] + errors[i + 1]) / 2
        for i in range(phase, len(errors) - 1, n)
        if i
    ]
    jumps = [errors[i] - errors[i - 1] for i in range(phase, len(errors), n) if i]
    size = _mean([abs(x) for x in steps[phase::n] if x == x])
    if dips and abs(_mean(dips)) > 0.75 * abs(_mean(jumps)) > 0.5 * 0.5:
        kind = "dark" if _mean(dips) < 0 else "bright"
        return (f"a {kind} frame every {n}: by {abs(_mean(dips)):.1f} levels, frame "
                f"{phase} and so on")  # fmt: skip
    return (
        f"a seam every {n} frames: the error jumps by {size:.1f} levels at frame {phase} and so "
        "on, as where a clip was cut into pieces"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
