"""What a run has written down about its steps, thinned out to what a picture can show.

A file has a JSON object a line, with a number "step" and others by name. It may have millions of
lines: they are read once, in a stream, only some if they are many, and of each of some hundred
bins of steps the count, the mean and both ends are kept.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from temporal_vae.evaluation.charts import BINS, Curve, Floats

NAMES = 60
"""Quantities that are kept at most: a page has an end."""

LINES = 50_000
"""Lines that are read at most, or not many more: each takes some ten microseconds."""

_READ_BYTES = 2**20
_LAST_BYTES = 2**16
_STEPS = 2**53
_MOST = 4e38
_KINDS = {float, int, type(None)}
Record = dict[str, Any]


class Thinned:
    """Curves of records, which come in any number and are not kept.

    Bins begin one step wide. When the steps no longer fit, neighbours are merged.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._width = 1
        self._series: dict[str, _Series] = {}

    def add(self, records: Sequence[Record], without: Container[str] = ()) -> None:
        """Take in records but for some names; what is no number is passed over."""
        if not records:
            return
        steps = np.array([record["step"] for record in records])
        if self._first is None:
            self._first = int(steps.min())
        while (int(steps.max()) - self._first) // self._width >= BINS:
            self._width *= 2
            for series in self._series.values():
                series.merge_pairs()
        bins = ((steps - self._first) // self._width).clip(0)
        for name in dict.fromkeys(chain.from_iterable(records)):
            known = name in self._series or len(self._series) < NAMES
            if known and name != "step" and name not in without:
                values = _numbers([record.get(name) for record in records])
                self._series.setdefault(name, _Series()).add(bins, steps, *values)

    def curves(self) -> dict[str, Curve]:
        """What there is by now, by name in the order of appearance; no curve is empty."""
        found = {name: series.curve() for name, series in self._series.items()}
        return {name: curve for name, curve in found.items() if len(curve.steps)}


@dataclass(slots=True)
class _Series:
    count: Floats = field(default_factory=lambda: np.zeros(BINS))
    steps: Floats = field(default_factory=lambda: np.zeros(BINS))
    total: Floats = field(default_factory=lambda: np.zeros(BINS))
    low: Floats = field(default_factory=lambda: np.full(BINS, np.inf))
    high: Floats = field(default_factory=lambda: np.full(BINS, -np.inf))
    not_finite: int = 0

    def add(self, bins: npt.NDArray[np.int64], steps: Floats, values: Floats, absent: int) -> None:
        finite = np.abs(values) < _MOST  # NaN is not
        self.not_finite += int((~finite).sum()) - absent
        bins, steps, values = bins[finite], steps[finite], values[finite]
        self.count += np.bincount(bins, minlength=BINS)
        self.steps += np.bincount(bins, steps, minlength=BINS)
        self.total += np.bincount(bins, values, minlength=BINS)
        np.minimum.at(self.low, bins, values)
        np.maximum.at(self.high, bins, values)

    def merge_pairs(self) -> None:
        for sums in (self.count, self.steps, self.total):
            sums[:] = np.append(sums.reshape(-1, 2).sum(1), np.zeros(BINS // 2))
        self.low[:] = np.append(self.low.reshape(-1, 2).min(1), np.full(BINS // 2, np.inf))
        self.high[:] = np.append(self.high.reshape(-1, 2).max(1), np.full(BINS // 2, -np.inf))

    def curve(self) -> Curve:
        used = self.count > 0
        count = self.count[used]
        steps, mean = self.steps[used] / count, self.total[used] / count
        return Curve(steps, mean, self.low[used], self.high[used], self.not_finite)


def _numbers(values: list[object]) -> tuple[Floats, int]:
    """Values as floats, NaN for what is none; and how many those are."""
    if not _KINDS.issuperset(map(type, values)):
        values = [number(value) for value in values]
    try:
        return np.array(values, np.float64), values.count(None)
    except OverflowError:  # an integer beyond any float
        return _numbers([number(value) for value in values])


def number(value: object) -> float | None:
    """A number out of JSON, NaN and infinity included; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def reading_stride(file: Path) -> int:
    """Every how many lines to read so that `LINES` are read, by the length of the first ones."""
    try:
        with file.open("rb") as lines:
            first = lines.readlines(_LAST_BYTES)
        expected = file.stat().st_size * len(first) / max(1, sum(map(len, first)))
    except OSError:
        return 1
    return max(1, round(expected / LINES))


def read_records(file: Path, every: int = 1) -> Iterator[list[Record]]:
    """The records of a file, some thousand at a time; none if it cannot be read.

    Of every so many lines one is read, on the mean: which ones is drawn, the same each time.

    Lines that are no record are passed over, such as a last one that is being written.
    """
    try:
        with file.open("rb") as lines:
            drawn = Random(0).random  # since what comes back every few steps would be missed
            while chunk := lines.readlines(_READ_BYTES):
                yield _records([line for line in chunk if every == 1 or drawn() * every < 1])
    except OSError:
        return


def read_last(file: Path, count: int) -> list[Record]:
    """The last records of a file, or fewer where lines are long."""
    try:
        with file.open("rb") as lines:
            lines.seek(max(0, file.stat().st_size - _LAST_BYTES))
            return _records(lines.readlines())[-count:]
    except OSError:
        return []


def _records(lines: list[bytes]) -> list[Record]:
    return [
        value
        for value in _parsed(lines)
        if type(value) is dict and type(step := value.get("step")) is int and 0 <= step < _STEPS
    ]


def _parsed(lines: list[bytes]) -> list[Any]:
    try:  # all at once takes half the time
        found: list[Any] = json.loads(b"[" + b",".join(lines) + b"]")
        return found
    except (ValueError, RecursionError):
        return [value for line in lines if (value := _parsed_line(line)) is not None]


def _parsed_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
