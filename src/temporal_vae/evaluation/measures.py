"""Measures that take a clip frame by frame, so that memory does not grow with its length.

A measure is given pairs of frames and says in the end what it found. Values of a frame that holds
NaN are NaN, and so is every mean over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from temporal_vae.evaluation import series

PSNR_CEILING = 100.0
"""Decibels given to a frame that comes back exactly, so that means stay finite."""
MOVES = 1.0
"""RMS change of an original, in 8-bit units, from which on a frame that stands still is a fault."""
STILL = 0.1
"""The share of the original's change below which a reconstruction stands still."""
VISIBLE = 20.0
"""8-bit units within which the original's own pixel must be found by its flow to count."""


class NotMeasuredError(ValueError):
    """A measure that cannot be taken; the message is the reason, for the user."""


@dataclass
class Pair:
    """A frame and its reconstruction, float (3, H, W) in whole numbers from 0 to 255, or NaN."""

    original: Tensor
    ours: Tensor

    @cached_property
    def error(self) -> Tensor:
        """The reconstruction less the original."""
        return self.ours - self.original


@dataclass
class Found:
    """What a measure found in a clip: values, and their parts by frame."""

    values: dict[str, float]
    frames: dict[str, list[float]] = field(default_factory=dict)
    period: series.Period | None = None


class Measure(Protocol):
    """Takes one pair after the other."""

    names: tuple[str, ...]
    """Of the values it gives."""

    def add(self, pair: Pair) -> None:
        """Take the next pair. Raises `NotMeasuredError` for frames that it cannot measure."""

    def found(self) -> Found:
        """What there was in all pairs. Raises `NotMeasuredError` where they are too few."""


class PerFrame:
    """A distance of two frames, by a function of (1, 3, H, W) each; then the mean over frames."""

    def __init__(self, name: str, distance: Callable[[Tensor, Tensor], Any]):
        self.names: tuple[str, ...] = (name,)
        self._distance, self._values = distance, list[float]()

    def add(self, pair: Pair) -> None:
        """Measure one frame."""
        self._values.append(float(self._distance(pair.ours[None], pair.original[None])))

    def found(self) -> Found:
        """The mean over frames."""
        (name,) = self.names
        return Found({name: mean(self._values)}, {name: self._values})


def psnr() -> Measure:
    """Peak signal-to-noise ratio in dB, over H, W and RGB."""
    image = _torchmetrics()

    def distance(ours: Tensor, original: Tensor) -> Any:
        decibels = image.peak_signal_noise_ratio(
            ours, original, data_range=255.0, dim=(1, 2, 3), reduction="none"
        )
        return decibels.clamp(max=PSNR_CEILING)

    return PerFrame("psnr", distance)


def ssim() -> Measure:
    """Structural similarity in [-1, 1] (Wang et al. 2004)."""
    of = _torchmetrics().structural_similarity_index_measure
    return PerFrame("ssim", lambda ours, original: of(ours, original, data_range=255.0))


def ms_ssim() -> Measure:
    """Structural similarity at five scales (Wang et al. 2003)."""
    of = _torchmetrics().multiscale_structural_similarity_index_measure

    def distance(ours: Tensor, original: Tensor) -> Any:
        if min(ours.shape[2:]) <= 160:
            raise NotMeasuredError("it needs frames of more than 160 pixels each way")
        return of(ours, original, data_range=255.0)

    return PerFrame("ms_ssim", distance)


class Changes:
    """How a clip changes from frame to frame, beside how it should."""

    names: tuple[str, ...] = ("flicker", "period_strength", "frozen_frames")

    def __init__(self) -> None:
        self._last: Pair | None = None
        self._flicker: list[float] = [math.nan]
        self._frozen: list[float] = [0.0]

    def add(self, pair: Pair) -> None:
        """Compare with the pair before."""
        if self._last is not None:
            should = pair.original - self._last.original
            wrong = pair.error - self._last.error
            self._flicker.append(rms(wrong))
            moves, moved = rms(should), rms(should + wrong)
            still = moves > MOVES and moved < STILL * moves
            self._frozen.append(math.nan if math.isnan(moved) else float(still))
        self._last = pair

    def found(self) -> Found:
        """Flicker over the clip, frames that stand still, and what comes back every n frames."""
        if len(self._flicker) < 2:
            raise NotMeasuredError("one frame does not change")
        steps = self._flicker[1:]
        found = series.period(steps)
        values = {
            "flicker": math.sqrt(mean([step**2 for step in steps])),
            "period_strength": found.strength,
            "frozen_frames": float(sum(self._frozen)),
        }
        return Found(values, {"flicker": self._flicker, "frozen": self._frozen}, found)


class Drifts:
    """How far the mean brightness and colour have moved from the original's over a clip.

    In 8-bit units: luma, and the two chroma differences, of BT.709.
    """

    names: tuple[str, ...] = ("luma_drift", "chroma_drift", "luma_flicker")

    def __init__(self) -> None:
        self._errors: dict[str, list[float]] = {"luma_error": [], "cb_error": [], "cr_error": []}

    def add(self, pair: Pair) -> None:
        """Take the mean colours of one frame."""
        r, g, b = pair.error.mean((1, 2)).tolist()
        luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
        for name, value in zip(
            self._errors, (luma, (b - luma) / 1.8556, (r - luma) / 1.5748), strict=True
        ):
            self._errors[name].append(value)

    def found(self) -> Found:
        """Drifts, and how the mean brightness jumps from frame to frame."""
        luma, cb, cr = self._errors.values()
        if len(luma) < series.LEAST_FRAMES:
            raise NotMeasuredError(f"fewer than {series.LEAST_FRAMES} frames do not drift")
        values = {
            "luma_drift": series.drift(luma),
            "chroma_drift": math.hypot(series.drift(cb), series.drift(cr)),
            "luma_flicker": series.jitter(luma),
        }
        return Found(values, dict(self._errors))


class Ends:
    """How much worse the first and the last frame are than the others, in dB of PSNR."""

    names: tuple[str, ...] = ("first_frame_gap", "last_frame_gap")

    def __init__(self) -> None:
        self._values: list[float] = []

    def add(self, pair: Pair) -> None:
        """Take the PSNR of one frame."""
        square = float(pair.error.square().mean())
        floor = 255.0**2 / 10 ** (PSNR_CEILING / 10)
        self._values.append(10 * math.log10(255.0**2 / max(square, floor)) if square == square
                            else math.nan)  # fmt: skip

    def found(self) -> Found:
        """Both gaps; below 0 where an end is better than the others."""
        if len(self._values) < series.LEAST_FRAMES:
            raise NotMeasuredError(
                f"fewer than {series.LEAST_FRAMES} frames have no ends to tell apart"
            )
        gaps = (series.gap(self._values, index) for index in (0, -1))
        return Found(dict(zip(self.names, gaps, strict=True)))


class WarpError:
    """Flicker along the original's motion: RMS of the error less the one that moved here, 8-bit.

    The flow is OpenCV's DIS of the original. Pixels that it does not find again in the original
    itself, within 20 units, are covered or badly matched, and do not count.
    """

    names: tuple[str, ...] = ("warp_error",)

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as error:
            raise NotMeasuredError(missing("OpenCV", "report")) from error
        self._cv2: Any = cv2
        preset = self._cv2.DISOPTICAL_FLOW_PRESET_MEDIUM
        self._flow = self._cv2.DISOpticalFlow_create(preset)
        self._last: tuple[Any, Any, Any] | None = None
        self._squares, self._pixels = [math.nan], [0]

    def add(self, pair: Pair) -> None:
        """Compare with the pair before, moved by the flow between the originals."""
        image, error = (
            x.permute(1, 2, 0).contiguous().numpy() for x in (pair.original, pair.error)
        )
        grey = self._cv2.cvtColor(image.astype(np.uint8), self._cv2.COLOR_RGB2GRAY)
        if min(grey.shape) < 16:
            raise NotMeasuredError("it needs frames of 16 pixels or more each way")
        if self._last is not None:
            self._compare(image, error, grey, *self._last)
        self._last = image, error, grey

    def _compare(self, image: Any, error: Any, grey: Any, *last: Any) -> None:
        last_image, last_error, last_grey = last
        flow = self._flow.calc(grey, last_grey, None)
        rows, columns = np.indices(grey.shape, np.float32)
        places = columns + flow[..., 0], rows + flow[..., 1]
        inside = ((places[0] >= 0) & (places[0] <= grey.shape[1] - 1)
                  & (places[1] >= 0) & (places[1] <= grey.shape[0] - 1))  # fmt: skip
        moved, before = (
            self._cv2.remap(
                x, *places, self._cv2.INTER_LINEAR, borderMode=self._cv2.BORDER_REPLICATE
            )
            for x in (last_error, last_image)
        )
        seen = inside & (np.abs(image - before).max(2) < VISIBLE)
        square = float(np.square(error - moved)[seen].sum(dtype=np.float64))
        whole = np.isfinite(error).all()  # also where nothing is found again
        self._squares.append(square if whole else math.nan)
        self._pixels.append(3 * int(seen.sum()))

    def found(self) -> Found:
        """Over the clip, and by frame."""
        if sum(self._pixels) == 0:
            raise NotMeasuredError("no pixel of a frame is found again in a next one")
        value = math.sqrt(sum(self._squares[1:]) / sum(self._pixels[1:]))
        by_frame = [
            math.sqrt(square / count) if count else math.nan
            for square, count in zip(self._squares, self._pixels, strict=True)
        ]
        return Found({"warp_error": value}, {"warp_error": by_frame})


def rms(x: Tensor) -> float:
    """The root of the mean square."""
    return float(x.square().mean().sqrt())


def mean(values: list[float]) -> float:
    """The mean, NaN where a value is NaN."""
    return math.fsum(values) / len(values) if values else math.nan


def missing(what: str, extra: str) -> str:
    """That a package is missing, and the line that installs it."""
    return f"{what} is not installed: pip install 'temporal-video-vae[{extra}]'"


def need_pillow() -> None:
    """Raise `NotMeasuredError` where Pillow is not installed."""
    if find_spec("PIL") is None:
        raise NotMeasuredError(missing("Pillow", "report"))


def _torchmetrics() -> Any:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise NotMeasuredError(missing("torchmetrics", "report")) from error
    return image
