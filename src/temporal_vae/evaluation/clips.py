"""A clip through a codec, with everything that is measured of it, in memory flat in its length."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from temporal_vae.evaluation import measures, perceptual
from temporal_vae.evaluation.codecs import Codec, Frames, eight_bits
from temporal_vae.evaluation.diagnosis import diagnose
from temporal_vae.evaluation.measures import Measure, NotMeasuredError, Pair
from temporal_vae.evaluation.results import ModelOnClip
from temporal_vae.video import Uint8Frames, VideoReader

Make = Callable[[], Measure]
"""Makes a measure for one clip. Raises `NotMeasuredError` where it cannot be taken."""
Tick = Callable[[], None]
"""Called for each frame that is done, in each pass."""

CHEAP: dict[str, Make] = {
    "psnr": measures.psnr,
    "ssim": measures.ssim,
    "flicker": measures.Changes,
    "drift": measures.Drifts,
    "ends": measures.Ends,
}
"""What takes little time and no package but torchmetrics."""
STANDARD = (*CHEAP, "ms_ssim", "warp_error", "cvvdp", "vmaf", "lpips", "fvd")
"""What needs one decode."""
SHORT: dict[str, Make] = {"psnr": measures.psnr, "flicker": measures.Changes}
"""What is measured of further decodes."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What some metrics need to know beside the frames."""

    fps: float
    display: str = perceptual.DISPLAY
    lpips: Callable[[Tensor, Tensor], Any] | None = None
    """The distance of two videos in [-1, 1], by weights that the caller has."""

    def makes(self, names: Sequence[str]) -> dict[str, Make]:
        """What makes the measures of these names."""
        known = CHEAP | {
            "ms_ssim": measures.ms_ssim,
            "warp_error": measures.WarpError,
            "cvvdp": partial(perceptual.Cvvdp, self.fps, self.display),
            "vmaf": perceptual.Vmaf,
            "lpips": partial(perceptual.lpips, self.lpips),
            "fvd": perceptual.fvd,
        }
        return {name: known[name] for name in names}


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is measured, on which part of the clips."""

    name: str
    measures: tuple[str, ...]
    frames: int | None = None
    """The first frames of each clip; None for all."""
    width: int | None = None
    """What wider clips are scaled to, the height to the nearest multiple of 8; None leaves them."""
    shares: tuple[float, ...] = ()
    """Of noise on the latents, see `Codec.perturbed`."""
    rounds: int = 1
    """How often a reconstruction is reconstructed again."""
    alone: bool = False
    """Whether each model is also measured frame by frame."""

    @property
    def decodes(self) -> int:
        """How often each frame of a clip is decoded, if the codec can do all of it."""
        return self.rounds + len(self.shares)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


PROTOCOLS = {
    each.name: each
    for each in (
        Protocol("quick", tuple(CHEAP), frames=24, width=256),
        Protocol("standard", STANDARD),
        Protocol("full", STANDARD, shares=(0.1, 0.2, 0.4), rounds=4, alone=True),
    )
}  # fmt: skip
"""The presets by their names."""


class Recorder:
    """Takes pairs of frames, gives them to measures, and counts what is no number."""

    def __init__(self, makes: dict[str, Make]):
        self.missing: dict[str, str] = {}
        self.bad_frames: list[int] = []
        self.bad_values, self.seconds, self.count = 0, 0.0, 0
        self._measures: dict[str, Measure] = {}
        for name, make in makes.items():
            try:
                self._measures[name] = make()
            except NotMeasuredError as error:
                self.missing[name] = str(error)

    def add(self, original: Uint8Frames, ours: Tensor) -> Tensor:
        """Take a frame (H, W, 3) and its reconstruction (3, H, W); gives that in whole numbers.

        What is NaN or infinite is counted, and is NaN in what is measured.
        """
        start = time.monotonic()
        bad = int((~ours.isfinite()).sum())
        if bad:
            self.bad_values += bad
            self.bad_frames.append(self.count)
            ours = ours.masked_fill(~ours.isfinite(), torch.nan)
        self.count += 1
        rounded = ours.round().clamp(0, 255)
        pair = Pair(torch.from_numpy(original).permute(2, 0, 1).float(), rounded)
        for name, measure in list(self._measures.items()):
            try:
                measure.add(pair)
            except NotMeasuredError as error:
                self._drop(name, error)
        self.seconds += time.monotonic() - start
        return rounded

    def found(self) -> ModelOnClip:
        """What all measures found."""
        start = time.monotonic()
        result = ModelOnClip({}, {}, missing=self.missing)
        for name, measure in list(self._measures.items()):
            try:
                found = measure.found()
            except NotMeasuredError as error:
                self._drop(name, error)
                continue
            result.values.update(found.values)
            result.frames.update(found.frames)
            if found.period is not None:
                result = replace(result, period=found.period.frames, spectrum=found.period.spectrum)
        self.seconds += time.monotonic() - start
        return replace(
            result, bad_frames=tuple(self.bad_frames), bad_values=self.bad_values,
            count=self.count, measuring_seconds=self.seconds,
        )  # fmt: skip

    def _drop(self, name: str, error: NotMeasuredError) -> None:
        self.missing |= dict.fromkeys(self._measures.pop(name).names, str(error))


def measure_clip(
    opening: Callable[[], VideoReader], codec: Codec, protocol: Protocol, tick: Tick,
    makes: dict[str, Make],
) -> ModelOnClip:  # fmt: skip
    """One codec on one clip, by a protocol. `opening` opens the clip, once for each pass.

    Raises `VideoError` for a clip that cannot be read, and `ValueError` for a reconstruction that
    is not one of it.
    """
    rounds = protocol.rounds if codec.can_be_repeated else 1
    recorders = [Recorder(makes)] + [Recorder(SHORT) for _ in range(rounds - 1)]
    start = time.monotonic()
    with opening() as reader:
        repeated(_images(reader), codec, recorders, tick)
    seconds = time.monotonic() - start
    result = recorders[0].found()
    further = {f"round {number}": recorder for number, recorder in enumerate(recorders[1:], 2)}
    if protocol.shares and codec.can_be_perturbed:
        noisy = [Recorder(SHORT) for _ in protocol.shares]
        with opening() as reader:
            _perturb(_images(reader), codec, protocol.shares, noisy, tick)
        names = (f"noise {share:g}" for share in protocol.shares)
        further |= dict(zip(names, noisy, strict=True))
    bad = [line for what, recorder in further.items() for line in _include(result, recorder, what)]
    spent = (seconds - sum(each.seconds for each in recorders)) / rounds
    return replace(result, seconds=max(0.0, spent), diagnosis=(*diagnose(result), *bad))


def repeated(
    frames: Frames, codec: Codec, recorders: Sequence[Recorder], tick: Tick = lambda: None
) -> None:
    """A clip through a codec as often as there are recorders, each of which sees one round.

    All rounds run at once, each behind the one before by what the codec takes ahead.
    """
    waiting: list[deque[Uint8Frames]] = [deque() for _ in recorders]
    source = _watched(frames, waiting)
    for recorder, originals in zip(recorders, waiting, strict=True):
        source = _recorded(codec(source), originals, recorder, tick)
    for _ in source:
        pass
    if waiting[-1]:
        count = recorders[-1].count
        raise ValueError(
            f"the reconstruction has {count} frames, and the clip {count + len(waiting[-1])}"
        )


def _watched(frames: Frames, waiting: Sequence[deque[Uint8Frames]]) -> Frames:
    for frame in frames:
        for each in waiting:
            each.append(frame)
        yield frame


def _recorded(
    given: Iterator[Tensor], originals: deque[Uint8Frames], recorder: Recorder, tick: Tick
) -> Frames:
    for ours in given:
        rounded = recorder.add(originals.popleft(), ours)
        tick()
        # what is NaN has been counted; a next round needs numbers
        yield rounded.nan_to_num(0).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _perturb(
    frames: Frames, codec: Codec, shares: Sequence[float], recorders: Sequence[Recorder], tick: Tick
) -> None:
    waiting: deque[Uint8Frames] = deque()
    for given in codec.perturbed(_watched(frames, [waiting]), shares):
        original = waiting.popleft()
        for recorder, ours in zip(recorders, given, strict=True):
            recorder.add(original, ours)
            tick()


def _include(result: ModelOnClip, recorder: Recorder, what: str) -> list[str]:
    """Put what a further decode gave under names of its own; a line for numbers that are none."""
    found = recorder.found()
    for name in ("psnr", "flicker"):
        if name in found.values:
            result.values[f"{name}/{what}"] = found.values[name]
    return [f"{what}: {next(diagnose(found))}"] if found.bad_values else []


def _images(reader: VideoReader) -> Frames:
    return (np.ascontiguousarray(eight_bits(frame.image)) for frame in reader)
