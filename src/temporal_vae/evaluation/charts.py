"""Curves as pictures: SVG to stand inside a page, with `style()` for its colours.

Nothing in a picture refers to anything outside of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Self

import numpy as np
import numpy.typing as npt

BINS = 400
"""Bins of a curve at most, an even number; a long one has at least half as many."""
COLOURS = 6
WIDTH, HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 28
_EDGE = 4
"""Room for half a dot on both sides."""
_WINDOW = ('<svg x="{0}" y="{1}" width="{2}" height="{3}" viewBox="{0} {1} {2} {3}">').format(
    _LEFT - _EDGE, _TOP, WIDTH - _LEFT - _RIGHT + 2 * _EDGE, HEIGHT - _TOP - _BOTTOM
)
"""The plot alone, in the units of the whole picture: what is drawn outside is cut off."""
_MARKERS = 40
"""Points that get a dot each; of more only the line is drawn."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """One quantity over the steps: of each bin the mean step, and the mean, least and most."""

    steps: Floats
    mean: Floats
    low: Floats
    high: Floats
    not_finite: int = 0
    """Values that were NaN, or beyond any float32 as infinity is, and are in no bin."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Values by their index from 0, with NaN left out; None where nothing else is there."""
        all_values = np.asarray(values, np.float64)
        steps = np.flatnonzero(np.isfinite(all_values))
        if not len(steps):
            return None
        width = -(-len(all_values) // BINS)
        starts = np.flatnonzero(np.diff(steps // width, prepend=-1))
        finite, count = all_values[steps], np.diff(starts, append=len(steps))
        steps_mean, mean = (np.add.reduceat(each, starts) / count for each in (steps, finite))
        low, high = (most.reduceat(finite, starts) for most in (np.minimum, np.maximum))
        return cls(steps_mean, mean, low, high, len(all_values) - len(steps))


@dataclass(frozen=True, slots=True)
class Line:
    """A curve as it is drawn; `dashed` is for what it is compared with."""

    curve: Curve
    name: str = ""
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """From numbers to places on the page, in SVG's units; `ticks` are the numbers to write."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, values: Floats) -> Floats:
        """Where the values are; beyond the ends for those outside."""
        low, high = self.low, self.high
        if self.log:
            values = np.log(np.maximum(values, low * 1e-3))
            low, high = math.log(low), math.log(high)
        return self.start + (values - low) / (high - low) * (self.stop - self.start)


def chart(
    title: str,
    lines: Sequence[Line],
    steps: tuple[float, float] | None = None,
    stages: Sequence[tuple[int, str]] = (),
    by: str = "step",
) -> str:
    """An SVG element of curves over steps, or what `by` names, on a scale that fits their means.

    Of the bands from the least to the most of each bin the scale holds most, and of peaks of the
    means a few may be beyond it: what is beyond is cut off at the edges. Where means are positive
    and span more than a factor of 20 it is logarithmic, and then holds them all.

    `steps` are the ends of the axis below, those of the curves by default. `stages` are vertical
    lines: step and name. Without any line the chart is an empty text.

    `data-axis` of the element has both ends of the axis below: their places, then their steps.
    """
    if not lines:
        return ""
    x, y = _step_axis(lines, steps), _value_axis(lines)
    parts = [_grid(x, y), *(_stage(x, *stage) for stage in stages)]
    parts += [_WINDOW]
    parts += [_drawn(line, x, y, by) for line in sorted(lines, key=lambda line: not line.dashed)]
    parts += ["</svg>"]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'data-axis="{x.start:g} {x.stop:g} {x.low:g} {x.high:g}" '
        f'aria-label="{escape(title)} by {escape(by)}">{"".join(parts)}</svg>'
    )


# Axes -----------------------------------------------------------------------------------------


def _step_axis(lines: Sequence[Line], ends: tuple[float, float] | None) -> Axis:
    steps = np.concatenate([line.curve.steps for line in lines])
    low, high = ends or (float(steps.min()), float(steps.max()))
    if high - low < 2:
        low, high = low - 1, high + 1
    return Axis(low, high, _LEFT, WIDTH - _RIGHT, _round_numbers(low, high, 7, least=1.0))


def _value_axis(lines: Sequence[Line]) -> Axis:
    means = np.concatenate([line.curve.mean for line in lines])
    low, high = float(means.min()), float(means.max())
    start, stop = HEIGHT - _BOTTOM, _TOP
    if low > 0 and high / low > 20:
        low, high = low / 1.2, high * 1.2
        return Axis(low, high, start, stop, _decades(low, high), log=True)
    low, high = _without_peaks(means)
    low = min(low, *(float(np.quantile(line.curve.low, 0.2)) for line in lines))
    high = max(high, *(float(np.quantile(line.curve.high, 0.8)) for line in lines))
    low, high = _widened(low, high, 0.06)
    return Axis(low, high, start, stop, _round_numbers(low, high, 6))


def _without_peaks(means: Floats) -> tuple[float, float]:
    """The least and the most, but for one in fifty if they leave the others a fifth or less."""
    low, high = float(means.min()), float(means.max())
    usual = np.quantile(means, (0.02, 0.98))
    if len(means) >= 50 and high - low > 5 * (usual[1] - usual[0]):
        return float(usual[0]), float(usual[1])
    return low, high


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """A range that is not empty, with some room."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.1 * abs(low) or 1.0
        return low - room, high + room
    room = share * (high - low)
    return low - room, high + room


def _round_numbers(low: float, high: float, most: int, least: float = 0.0) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten, `least` or more from each other."""
    rough = max((high - low) / most, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10, 20) if m * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(i * step for i in range(first, last + 1))


def _decades(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten; of few of them also what is between."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 6))
    between = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    ticks = [m * 10.0**i for i in range(first, last + 1, every) for m in between]
    return tuple(tick for tick in ticks if low <= tick <= high)


def style() -> str:
    """The style of charts and of the pages that they stand in: colours, figures, tables."""
    return (resources.files(__package__) / "page.css").read_text(encoding="utf-8")


def figure(title: str, drawn: str, note: str = "") -> str:
    """A chart, or another picture, under its title and a note of what it says."""
    said = f'<span class="value">{escape(note)}</span>' if note else ""
    return f"<figure><figcaption>{escape(title)} {said}</figcaption>{drawn}</figure>\n"


def legend(names: Sequence[str], dashed: str = "") -> str:
    """A list of names beside a line in the colour of each; `dashed` names what dashes are."""
    kinds = [(f"c{index % COLOURS}", name) for index, name in enumerate(names)]
    kinds += [("dashed plain", dashed)] if dashed else []
    keys = [
        f'<span><svg class="key" viewBox="0 0 24 8" aria-hidden="true">'
        f'<path class="line {kind}" d="M0 4H24"/></svg>{escape(name)}</span>'
        for kind, name in kinds
    ]
    return f'<p class="legend">{"".join(keys)}</p>'


def label(value: float) -> str:
    """A number in few letters: 12000 is 12k, 0.0001 is 1e-4.

    >>> label(1500000)
    '1.5M'
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1000 * size:
            return f"{value / size:.4g}{letter}"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e3:
        mantissa, _, power = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.4g}"


# Drawing --------------------------------------------------------------------------------------


def _grid(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    found = []
    for tick, place in zip(y.ticks, y(np.array(y.ticks)), strict=True):
        found += [
            f'<path class="grid" d="M{_LEFT} {place:.1f}H{right}"/>'
            f'<text class="tick" x="{_LEFT - 7}" y="{place + 4:.1f}" text-anchor="end">'
            f"{label(tick)}</text>"
        ]
    for tick, place in zip(x.ticks, x(np.array(x.ticks)), strict=True):
        # a label at the right edge would be cut off
        anchor = "end" if place > right - 12 else "middle"
        found += [
            f'<path class="grid" d="M{place:.1f} {bottom}v4"/>'
            f'<text class="tick" x="{place:.1f}" y="{bottom + 18}" text-anchor="{anchor}">'
            f"{label(tick)}</text>"
        ]
    return "".join([*found, f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>'])


def _stage(x: Axis, step: int, name: str) -> str:
    """A line where a stage begins; not at the very edge, where nothing was before."""
    place = float(x(np.array([float(step)]))[0])
    if not _LEFT + 2 < place < WIDTH - _RIGHT:
        return ""
    side = ("end", -4) if place > 0.7 * WIDTH else ("start", 4)
    return (
        f'<path class="stage" d="M{place:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>'
        f'<text class="tick" x="{place + side[1]:.1f}" y="{_TOP + 9}" text-anchor="{side[0]}">'
        f"{escape(name[:24])}</text>"
    )


def _drawn(line: Line, x: Axis, y: Axis, by: str) -> str:
    curve, colour = line.curve, f"c{line.colour % COLOURS}"
    across = x(curve.steps)
    means = list(zip(across, y(curve.mean), strict=True))
    if line.dashed and len(means) == 1:  # a point is no line, and this one is to be compared with
        means = [(_LEFT, means[0][1]), (WIDTH - _RIGHT, means[0][1])]
    found = []
    if np.any(curve.high > curve.low):
        outline = [*zip(across, _near(y(curve.high)), strict=True)]
        outline += reversed([*zip(across, _near(y(curve.low)), strict=True)])
        found += [f'<path class="band {colour}" d="{_path(outline)}Z"/>']
    kind = "line dashed" if line.dashed else "line"
    found += [f'<path class="{kind} {colour}" d="{_path(means)}"/>']
    if not line.dashed and len(means) <= _MARKERS:
        found += [_dot(*means[i], line, i, by) for i in range(len(means))]
    return "".join(found)


def _near(places: Floats) -> Floats:
    """Far outside of the picture is as good as just outside, and shorter to write."""
    return places.clip(-HEIGHT, 2 * HEIGHT)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)


def _dot(px: float, py: float, line: Line, index: int, by: str) -> str:
    step, value = line.curve.steps[index], line.curve.mean[index]
    said = escape(f"{line.name} {value:.4g} at {by} {step:.0f}".strip())
    return (
        f'<circle class="dot c{line.colour % COLOURS}" cx="{px:.1f}" cy="{py:.1f}" r="2.5">'
        f"<title>{said}</title></circle>"
    )
