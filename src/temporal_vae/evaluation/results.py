"""What an evaluation found, as plain values: by frame, by clip, and over the set of clips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

FORMAT = 1
"""Of the JSON. A change that breaks readers counts it up."""
INTERVAL = "95 % Student's t interval of the mean over clips, each clip counting the same"
_QUANTILES = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}
"""Of Student's t at 97.5 %, where the series of `student_quantile` is not exact to 0.1 %."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A value over clips, with its confidence interval."""

    mean: float
    low: float
    high: float
    clips: int
    """How many clips have the value."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean and its interval, see `INTERVAL`; of one clip the interval is NaN.

        A NaN among the values makes all NaN: it is not left out.
        """
        count = len(values)
        mean = math.fsum(values) / count
        if count < 2:
            return cls(mean, math.nan, math.nan, count)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        half = student_quantile(count - 1) * math.sqrt(variance / count)
        return cls(mean, mean - half, mean + half, count)

    def text(self, digits: int) -> str:
        """The mean, with its interval in brackets if it has one."""
        if math.isnan(self.mean):
            return "no number"
        if math.isnan(self.low):
            return f"{self.mean:z.{digits}f}"
        return f"{self.mean:z.{digits}f} [{self.low:z.{digits}f}, {self.high:z.{digits}f}]"


@dataclass(frozen=True, slots=True)
class ModelOnClip:
    """One model on one clip. Values that could not be measured are not there; NaN means NaN."""

    values: dict[str, float]
    """Of the clip, such as "psnr", "flicker", "psnr/noise 0.2", "psnr/round 3"."""
    frames: dict[str, list[float]]
    """Of each frame, such as "psnr", "flicker" (NaN for the first one), "luma_error"."""
    period: int | None = None
    """Frames after which the error stands out again and again; None where it does not."""
    spectrum: dict[int, float] = field(default_factory=dict)
    """How well each period explains `frames["flicker"]`, a correlation."""
    diagnosis: tuple[str, ...] = ()
    """Faults by their names, a line each."""
    missing: dict[str, str] = field(default_factory=dict)
    """Values that could not be measured, and why."""
    bad_frames: tuple[int, ...] = ()
    """Frames of the reconstruction that hold NaN or infinite numbers."""
    bad_values: int = 0
    """How many such numbers there are."""
    count: int = 0
    """Frames."""
    seconds: float = 0.0
    """That the reconstruction took, without any measuring."""
    measuring_seconds: float = 0.0
    """That the measures of the first pass took."""


@dataclass(frozen=True, slots=True)
class ClipResult:
    """All models on one clip."""

    name: str
    path: str
    frames: int
    width: int
    height: int
    fps: float
    models: dict[str, ModelOnClip]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A set of clips."""

    protocol: dict[str, Any]
    models: tuple[str, ...]
    clips: list[ClipResult] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Clips, or models on clips, that could not be evaluated, and why."""

    @property
    def mean(self) -> dict[str, dict[str, Mean]]:
        """By model and value, over the clips that have it."""
        return {
            name: means([clip.models[name].values for clip in self.clips if name in clip.models])
            for name in self.models
        }

    @property
    def missing(self) -> dict[str, list[str]]:
        """Reasons why something was not measured, with the values it concerns."""
        found: dict[str, list[str]] = {}
        for clip in self.clips:
            for model in clip.models.values():
                for name, reason in model.missing.items():
                    names = found.setdefault(reason, [])
                    names += [name] if name not in names else []
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values, with None for NaN."""
        whole = {"format": FORMAT, "interval": INTERVAL, "protocol": self.protocol,
                 "mean": {name: {value: asdict(mean) for value, mean in values.items()}
                          for name, values in self.mean.items()},
                 "clips": [_clip_json(clip) for clip in self.clips],
                 "failed": self.failed}  # fmt: skip
        plain: dict[str, Any] = _without_nan(whole)
        return plain


def means(values: Sequence[Mapping[str, float]]) -> dict[str, Mean]:
    """Each value over the clips that have it."""
    names = dict.fromkeys(name for one in values for name in one)
    return {name: Mean.of([one[name] for one in values if name in one]) for name in names}


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion about the normal's (Fisher 1926)."""
    if freedom in _QUANTILES:
        return _QUANTILES[freedom]
    z, n = NormalDist().inv_cdf(0.975), freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _clip_json(clip: ClipResult) -> dict[str, Any]:
    models = {}
    for name, model in clip.models.items():
        rest = asdict(model)
        models[name] = rest.pop("values") | {"per_frame": rest.pop("frames")} | rest
    return asdict(clip) | {"models": models}


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return value
