"""How good a model is while it is trained, on clips that it is not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from temporal_vae.evaluation import pictures
from temporal_vae.evaluation.baseline import BLOCK, LinearBaseline
from temporal_vae.evaluation.evaluate import mean_scores
from temporal_vae.evaluation.metrics import Scores, score
from temporal_vae.evaluation.perturbed import decoded_perturbed
from temporal_vae.files.atomic import atomic_path
from temporal_vae.model import TemporalVAE
from temporal_vae.training import recipe
from temporal_vae.training.sources import Skipped
from temporal_vae.video import Uint8Frames, VideoError, VideoReader
from temporal_vae.video.sources import Source

PICTURES = 3
"""Clips of which a picture is made at every measurement."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The clips to measure on, and what the linear baseline makes of them."""

    spec: recipe.Validation
    clips: dict[str, Uint8Frames]
    linear: list[Scores]
    """Means over clips, for each share of noise."""

    @classmethod
    def read(cls, sources: Sequence[Source], spec: recipe.Validation, skipped: Skipped) -> HeldOut:
        """The first frames of so many sources; those that cannot be read are skipped."""
        clips: dict[str, Uint8Frames] = {}
        for source in sources:
            if len(clips) == spec.clips:
                break
            try:
                name = Path(source.name).stem
                name = f"{name}-{len(clips)}" if name in clips else name
                clips[name] = _first_frames(source, spec)
            except (VideoError, OSError) as error:
                skipped.add(source, str(error))
        baseline = LinearBaseline.bundled()
        linear = [
            mean_scores([score(frames, baseline(frames, share)) for frames in clips.values()])
            for share in (spec.noise if clips else ())
        ]
        return cls(spec, clips, linear)

    def measure(self, model: TemporalVAE, step: int, samples: Path | None) -> dict[str, Any]:
        """The record of one measurement; pictures of some clips are put into `samples`."""
        found: list[list[Scores]] = [[] for _ in self.spec.noise]
        for index, (name, frames) in enumerate(self.clips.items()):
            decoded = decoded_perturbed(model, frames, self.spec.noise)
            for scores, ours in zip(found, decoded, strict=True):
                scores.append(score(frames, ours))
            if samples is not None and index < PICTURES:
                self._picture(name, frames, decoded, step, samples)
        noise = {
            f"{share:g}": {**asdict(mean_scores(scores)), "linear": asdict(linear)}
            for share, scores, linear in zip(self.spec.noise, found, self.linear, strict=True)
        }
        return {"step": step, "clips": len(self.clips), "noise": noise}

    def _picture(
        self, name: str, frames: Uint8Frames, decoded: list[Uint8Frames], step: int, samples: Path
    ) -> None:
        sheet = pictures.beside(
            {"original": frames}
            | {
                f"noise {share:g}": ours
                for share, ours in zip(self.spec.noise, decoded, strict=True)
            },
            f"{name}, step {step}",
        )
        with atomic_path(samples / f"step-{step:06d}-{name}.png") as part:
            sheet.save(part)


def _first_frames(source: Source, spec: recipe.Validation) -> Uint8Frames:
    with (
        source.file() as path,
        VideoReader(path, spec.width, BLOCK, frames=spec.frames, alpha="drop") as video,
    ):
        frames = np.stack([frame.image for frame in video])
    return frames if frames.dtype == np.uint8 else (frames >> 8).astype(np.uint8)


def flat_scores(record: Mapping[str, Any]) -> dict[str, float]:
    """The model's scores in a record, by names such as "psnr/noise 0.2"."""
    return {
        f"{name}/noise {share}": value
        for share, scores in record["noise"].items()
        for name, value in scores.items()
        if name != "linear"
    }
