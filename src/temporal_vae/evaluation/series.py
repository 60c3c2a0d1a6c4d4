"""What the numbers of a clip's frames say together: a drift, a period, a gap at the ends.

A series has one number a frame. A series with NaN gives NaN: nothing is left out in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEAST_FRAMES = 5
"""Of fewer frames neither a drift nor a gap is told."""
CERTAIN = 3.0
"""Standard errors that a drift, and deviations that a period must exceed to be told from chance."""
PEAK = 0.9
"""Of two periods that explain about as much, within this share, the shorter one is meant."""
DIVISOR = 0.5
"""The same of a period and one of which it is a multiple."""


def drift(series: Sequence[float]) -> float:
    """How far a series has moved from its first third to its last, in the series' own unit.

    The difference of the two thirds' medians, less three standard errors that are taken from the
    differences of neighbours; what comes back with a period is taken out before. So neither single
    bad frames count, nor flicker, nor seams, and what is left is 0 where nothing drifts for sure.
    """
    values = np.asarray(series, np.float64)
    if not np.isfinite(values).all():
        return math.nan
    values = _without_period(values)
    third = max(1, len(values) // 3)
    moved = float(np.median(values[-third:]) - np.median(values[:third]))
    # a median's standard error is 1.25 deviations over the root of the number; two medians differ
    error = 1.2533 * jitter(values) * math.sqrt(2 / third)
    return math.copysign(max(0.0, abs(moved) - CERTAIN * error), moved) if moved else 0.0


def _without_period(values: Floats) -> Floats:
    """The series less what its frames have in common at the same place of each period."""
    found = period(np.abs(np.diff(values))).frames
    if found is None:
        return values
    level = np.median(values)
    common = [np.median(values[place::found]) - level for place in range(found)]
    return values - np.resize(common, len(values))


def jitter(series: Sequence[float] | Floats) -> float:
    """The deviation of a series from frame to frame, by the median of its absolute differences.

    Of independent numbers it is their standard deviation; slow changes and rare jumps add little.
    """
    steps = np.diff(np.asarray(series, np.float64))
    if not len(steps):
        return 0.0
    return float(1.4826 * np.median(np.abs(steps - np.median(steps))) / math.sqrt(2))


def gap(series: Sequence[float], index: int) -> float:
    """How far the frame at an index, 0 or -1, is below the four next to it, if that is for sure.

    The difference to their median, less three deviations from frame to frame; below 0 it is above.
    """
    values = np.asarray(series, np.float64)
    if not np.isfinite(values).all():
        return math.nan
    beside = values[1:5] if index == 0 else values[-5:-1]
    below = float(np.median(beside) - values[index])
    return math.copysign(max(0.0, abs(below) - CERTAIN * jitter(values)), below) if below else 0.0


def dips(series: Sequence[float], least: float) -> list[int]:
    """Places of a series that lie below the running median of nine, by `least` and for sure."""
    values = np.asarray(series, np.float64)
    if len(values) < LEAST_FRAMES or not np.isfinite(values).all():
        return []
    below = _running(values, 0.5) - values
    return [int(i) for i in np.flatnonzero(below > max(least, 2 * CERTAIN * jitter(values)))]


@dataclass(frozen=True, slots=True)
class Period:
    """What comes back every so many frames."""

    frames: int | None
    """None where nothing does."""
    strength: float
    """The RMS of the part of the series that repeats, in its unit; 0 where nothing does."""
    spectrum: dict[int, float] = field(default_factory=dict)
    """How well each period explains the series, a correlation: by frames."""


def period(series: Sequence[float] | Floats) -> Period:
    """The period of what stands out of a series, such as a jump at every 16th frame.

    What lies above the lower quarter of the nine frames around is correlated with itself, moved by
    one and by two periods; the smaller of both counts, less what half a period gives, which slow
    changes have as well. Less than chance would give, 3 / sqrt(frames), is 0. A period must be seen
    three times.
    """
    values = np.asarray(series, np.float64)
    if not np.isfinite(values).all():
        return Period(None, math.nan)
    outstanding = np.maximum(values - _running(values, 0.25), 0)
    deviation = float(outstanding.std())
    if len(values) < 6 or deviation < 1e-9:
        return Period(None, 0.0)
    near = _correlations((outstanding - outstanding.mean()) / deviation)
    spectrum = {n: _score(near, n) for n in range(2, len(values) // 3 + 1)}
    best = max(spectrum.values())
    excess = best - CERTAIN / math.sqrt(len(values))
    if excess <= 0:
        return Period(None, 0.0, spectrum)
    longest = next(n for n, score in spectrum.items() if score >= PEAK * best)
    frames = next(
        n for n, score in spectrum.items() if longest % n == 0 and score >= DIVISOR * best
    )
    return Period(frames, deviation * math.sqrt(min(1.0, excess)), spectrum)


def _score(near: Floats, n: int) -> float:
    between = max(near[n // 2], near[(n + 1) // 2]) if n > 2 else near[1]
    return float(min(near[n], near[2 * n]) - max(0.0, between))


def _correlations(values: Floats) -> Floats:
    """Of values of mean 0 and deviation 1 with themselves, moved by 0, 1, 2, ... frames."""
    count = len(values)
    return np.array([values[: count - n] @ values[n:] / (count - n) for n in range(count)])


def _running(values: Floats, share: float) -> Floats:
    """The quantile of a share over nine values around each."""
    padded = np.pad(values, 4, mode="reflect" if len(values) > 4 else "edge")
    return np.asarray(np.quantile(np.lib.stride_tricks.sliding_window_view(padded, 9), share, 1))
