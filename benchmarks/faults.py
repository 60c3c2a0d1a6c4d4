"""Which metric sees which fault: a matrix, in multiples of what each metric says of no fault.

    python benchmarks/faults.py --clip VIDEO [--frames 102] [--width 96] [--linear 16]

Faults are put on the clip itself with noise as small as rounding, or with --linear on what a linear
baseline of so many numbers makes of it. A metric's floor is what it says there, or the least that
it tells apart if that is more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from temporal_vae.evaluation.baseline import BLOCK, LinearBaseline
from temporal_vae.evaluation.clips import CHEAP, Recorder
from temporal_vae.evaluation.diagnosis import diagnose
from temporal_vae.evaluation.results import ModelOnClip
from temporal_vae.video import Uint8Frames, read_clip

FLOORS = {
    "flicker": 0.1, "luma_flicker": 0.1, "period_strength": 0.1, "luma_drift": 0.2,
    "chroma_drift": 0.2, "frozen_frames": 0.2, "first_frame_gap": 0.3, "last_frame_gap": 0.3,
}  # fmt: skip
"""The least that a metric tells apart: 8-bit units, frames, dB."""
OWN = {
    "gain flicker": "flicker", "dark frame every 17": "period_strength",
    "colour drift": "chroma_drift", "frozen frame": "frozen_frames",
    "chunk seam every 16": "period_strength",
}  # fmt: skip
"""The metric of each fault."""
NAMED = {
    "gain flicker": "brightness flicker", "dark frame every 17": "a dark frame every 17",
    "colour drift": "colour drift", "frozen frame": "frozen picture",
    "chunk seam every 16": "a seam every 16 frames",
}  # fmt: skip
"""How the line of diagnosis of each fault begins."""


def noisy(frames: Uint8Frames, deviation: float = 0.5) -> Uint8Frames:
    """The frames with noise, another one in each."""
    drawn = np.random.default_rng(0).normal(0, deviation, frames.shape)
    return to_bytes(frames + drawn)


def to_bytes(frames: np.ndarray) -> Uint8Frames:
    """Rounded and clipped."""
    return np.asarray(frames.round().clip(0, 255).astype(np.uint8))


def scaled(frames: Uint8Frames, gains: np.ndarray) -> Uint8Frames:
    """Each frame times its gain."""
    return to_bytes(frames * gains.reshape(-1, 1, 1, 1))


def gain_flicker(frames: Uint8Frames) -> Uint8Frames:
    """Each frame up to 6 percent brighter or darker."""
    return scaled(frames, 1 + np.random.default_rng(1).uniform(-0.06, 0.06, len(frames)))


def dark_frames(frames: Uint8Frames) -> Uint8Frames:
    """Every 17th frame 15 percent darker."""
    return scaled(frames, np.where(np.arange(len(frames)) % 17 == 16, 0.85, 1.0))


def colour_drift(frames: Uint8Frames) -> Uint8Frames:
    """Blue up and red down, by 8 levels at the end, at about the same luma."""
    ramp = np.linspace(0, 8, len(frames)).reshape(-1, 1, 1)
    shifted = frames.astype(float)
    shifted[..., 2] += ramp
    shifted[..., 0] -= ramp * 0.0722 / 0.2126
    return to_bytes(shifted)


def frozen_frame(frames: Uint8Frames) -> Uint8Frames:
    """The frame in the middle is shown for three frames more."""
    found, middle = frames.copy(), len(frames) // 2
    found[middle + 1 : middle + 4] = found[middle]
    return found


def chunk_seam(frames: Uint8Frames) -> Uint8Frames:
    """Brighter by up to 6 percent towards the end of each 16 frames."""
    return scaled(frames, 1 + 0.06 * (np.arange(len(frames)) % 16) / 15)


FAULTS: dict[str, Callable[[Uint8Frames], Uint8Frames]] = {
    "gain flicker": gain_flicker, "dark frame every 17": dark_frames,
    "colour drift": colour_drift, "frozen frame": frozen_frame, "chunk seam every 16": chunk_seam,
}  # fmt: skip


def measured(original: Uint8Frames, ours: Uint8Frames) -> ModelOnClip:
    """What the cheap measures say of a reconstruction."""
    recorder = Recorder({name: make for name, make in CHEAP.items() if name != "ssim"})
    for frame, reconstruction in zip(original, ours, strict=True):
        recorder.add(frame, torch.from_numpy(reconstruction).permute(2, 0, 1).float())
    return recorder.found()


def matrix(
    original: Uint8Frames, base: Uint8Frames
) -> tuple[dict[str, float], dict[str, ModelOnClip]]:
    """Floors by metric, and what is found of each fault."""
    none = measured(original, base).values
    floors = {name: max(abs(none[name]), least) for name, least in FLOORS.items()}
    return floors, {name: measured(original, fault(base)) for name, fault in FAULTS.items()}


def main() -> None:
    """Print the matrix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=102)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--linear")
    options = parser.parse_args()
    original = read_clip(options.clip, options.frames, options.width, BLOCK)
    base = noisy(original) if options.linear is None else (
        LinearBaseline.bundled(options.linear)(original))  # fmt: skip
    floors, found = matrix(original, base)
    print(f"{options.clip.name}, {len(original)} frames, {options.width} wide")
    print(f"{'':22}" + "".join(f"{name:>17}" for name in floors))
    print(f"{'floor':22}" + "".join(f"{value:17.2f}" for value in floors.values()))
    for fault, result in found.items():
        times = (abs(result.values[name]) / floor for name, floor in floors.items())
        print(f"{fault:22}" + "".join(f"{value:16.1f}x" for value in times))
    for fault, result in found.items():
        print(f"{fault}: {'; '.join(diagnose(result)) or 'nothing said'}")
    print(f"no fault: {'; '.join(diagnose(measured(original, base))) or 'nothing said'}")


if __name__ == "__main__":
    main()
