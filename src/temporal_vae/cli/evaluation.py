"""The words of `tvae evaluate`: its options, the models it takes, how its numbers are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from temporal_vae.cli.groups import OptionGroup, option
from temporal_vae.cli.inputs import some_of
from temporal_vae.cli.options import FrameOptions, RunOptions
from temporal_vae.cli.report import Meter, out, say, say_error
from temporal_vae.files.atomic import atomic_path
from temporal_vae.video import VideoError, VideoReader

if TYPE_CHECKING:
    from temporal_vae.evaluation.clips import Make, Protocol
    from temporal_vae.evaluation.codecs import Codec
    from temporal_vae.evaluation.results import Evaluation, Mean, ModelOnClip

PREFIXES = ("pca", "video", "diffusers", "frames")
SHOWN = {
    "psnr": ("PSNR", 2), "ssim": ("SSIM", 4), "flicker": ("flicker", 2), "warp_error": ("warp", 2),
    "cvvdp": ("JOD", 3), "vmaf": ("VMAF", 2), "lpips": ("LPIPS", 4),
    "luma_drift": ("luma drift", 2), "chroma_drift": ("chroma drift", 2),
}  # fmt: skip
"""Columns of the table that have a value, with their digits; the JSON has all."""


@dataclass(frozen=True)
class EvaluateOptions(OptionGroup):
    """What is measured, and where the numbers go."""

    panel = "Evaluation"
    model: list[str] | None = option(
        None, "NAME", "A model to evaluate; give several. What --model takes elsewhere, or "
        "frames:NAME (the same frame by frame), pca:4, pca:16, pca:4x4, pca:16x4 (linear baselines "
        "of so many numbers for 8x8 pixels, x4 in blocks of four frames), diffusers:FOLDER (a VAE "
        "by diffusers' own code), video:FILE (a video of the reconstruction). Default: tiny.")  # fmt: skip
    protocol: str = option(
        "standard", "NAME", "quick: 24 frames, 256 wide, what takes little time. standard: all "
        "frames at their own size, all that needs one decode. full: noise on the latents, four "
        "rounds and frame by frame as well. Default: standard.")  # fmt: skip
    json: Path | None = option(
        None, "FILE", "Write all numbers to this file, by frame, clip and set."
    )
    width: int | None = option(
        None, "PIXELS", "Scale clips to this width, the height to the nearest multiple of 8."
    )
    baseline_fit: Path | None = option(
        None, "FOLDER", "Fit the linear baselines to the videos in this folder first, instead of "
        "those that come with the library.")  # fmt: skip
    quiet: bool = option(False, "", "Print nothing but errors and the table.")

    @property
    def names(self) -> list[str]:
        """The models, each once."""
        return list(dict.fromkeys(self.model or ["tiny"]))

    def chosen(self, frames: FrameOptions) -> Protocol:
        """The protocol, on the part of clips that is asked for."""
        from temporal_vae.evaluation.clips import PROTOCOLS

        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"--protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}"
            )
        preset = PROTOCOLS[self.protocol]
        width = None if frames.size else self.width or preset.width
        return replace(preset, frames=frames.frames or preset.frames, width=width)


def evaluate(
    files: Sequence[Path], settings: EvaluateOptions, frames: FrameOptions, model: RunOptions
) -> None:
    """Measure all models on all clips; print the table and the faults, write the JSON."""
    from temporal_vae.evaluation.results import Evaluation

    protocol, extras = settings.chosen(frames), _measures(settings)
    names = _with_alone(settings.names) if protocol.alone else settings.names
    makers = {name: _codec_maker(name, settings, frames, protocol, model) for name in names}
    result = Evaluation(protocol.to_json() | {"display": "standard_4k"}, tuple(names))
    tell = (lambda _: None) if settings.quiet else say
    if protocol.decodes > 1:
        tell(
            f"{protocol.name} decodes each frame up to {protocol.decodes} times a model "
            f"({protocol.rounds} rounds, {len(protocol.shares)} shares of noise), and "
            f"{len(names)} models: about {protocol.decodes} times as long as standard"
        )
    for index, file in enumerate(files):
        title = f"evaluating {file.name} ({index + 1} of {len(files)})"
        with Meter(title, settings.quiet) as meter:
            _evaluate_clip(file, makers, settings, frames, protocol, extras, result, meter)
    if settings.json is not None:
        with atomic_path(settings.json) as part:
            part.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
    show(result, tell)
    if result.failed:
        raise ValueError(f"{len(result.failed)} of {len(files) * len(names)} failed")


def _evaluate_clip(
    file: Path, makers: dict[str, Callable[[Path], Codec]], settings: EvaluateOptions,
    frames: FrameOptions, protocol: Protocol, makes: dict[str, Make], result: Evaluation,
    meter: Meter,
) -> None:  # fmt: skip
    from temporal_vae.evaluation.clips import measure_clip
    from temporal_vae.evaluation.results import ClipResult

    done = 0

    def opening() -> VideoReader:
        return open_clip(file, frames, protocol)

    def tick() -> None:
        nonlocal done
        done += 1
        meter(done, total)

    try:
        with opening() as reader:
            (height, width), info = reader.size, reader.info
        total = info.expected_frames and info.expected_frames * protocol.decodes * len(makers)
    except (VideoError, OSError) as error:
        result.failed[str(file)] = str(error)
        say_error(str(error))
        return
    found: dict[str, ModelOnClip] = {}
    for name, make in makers.items():
        try:
            found[name] = measure_clip(opening, make(file), protocol, tick, makes)
        except (VideoError, ValueError, OSError) as error:
            result.failed[f"{file}: {name}"] = str(error)
            say_error(f"{file}, {name}: {error}")
    if found:
        count = len(next(iter(found.values())).frames.get("psnr", [])) or info.expected_frames or 0
        clip = ClipResult(file.stem, str(file), count, width, height, float(info.fps), found)
        result.clips.append(clip)


def open_clip(file: Path, frames: FrameOptions, protocol: Protocol) -> VideoReader:
    """A clip as the protocol takes it, in RGB."""
    options = frames.selected() | {"channels": 3, "frames": protocol.frames}
    if options.get("alpha") is None:
        options["alpha"] = "drop"
    return VideoReader(file, protocol.width, 8 if protocol.width else 1, **options)


def _measures(settings: EvaluateOptions) -> dict[str, Make]:
    from temporal_vae.evaluation.clips import PROTOCOLS, STANDARD

    return {name: STANDARD[name] for name in PROTOCOLS[settings.protocol].measures}


def _with_alone(names: Sequence[str]) -> list[str]:
    """The models, and frame by frame those that see several."""
    alone = [f"frames:{name}" for name in names if name.split(":")[0] not in PREFIXES]
    return list(dict.fromkeys([*names, *alone]))


def _codec_maker(
    name: str, settings: EvaluateOptions, frames: FrameOptions, protocol: Protocol,
    model: RunOptions,
) -> Callable[[Path], Codec]:  # fmt: skip
    """What makes the codec of a model for a clip; the model is loaded once."""
    from temporal_vae.evaluation import codecs
    from temporal_vae.evaluation.baseline import LinearBaseline

    prefix, _, rest = name.partition(":")
    if prefix == "pca":
        linear = codecs.LinearCodec(LinearBaseline.bundled(rest))
        return lambda _: linear
    if prefix == "video":
        path = Path(rest)
        return lambda _: codecs.VideoCodec(lambda: open_clip(path, frames, protocol), rest)
    length = frames.clip_frames if isinstance(frames.clip_frames, int) else None
    if prefix == "frames":
        name, length = rest, 1
    loaded = model.load(name)
    loaded.set_memory_budget(model.memory)
    codec = codecs.ModelCodec(loaded, length)
    return lambda _: codec


def show(result: Evaluation, tell: Callable[[str], None]) -> None:
    """Print the means as a table, faults and what is missing as lines."""
    means = result.mean
    columns = [name for name in SHOWN if any(name in values for values in means.values())]
    table = Table(box=None)
    table.add_column("model")
    for name in columns:
        table.add_column(SHOWN[name][0], justify="right")
    for model, values in means.items():
        table.add_row(model, *(shown(values.get(name), SHOWN[name][1]) for name in columns))
    if result.clips:
        out.print(table, markup=False)
        tell_interval(result, tell)
    for clip in result.clips:
        for model, found in clip.models.items():
            for line in found.diagnosis:
                out.print(f"{clip.name}, {model}: {line}", markup=False, soft_wrap=True)
    for reason, names in result.missing.items():
        tell(f"not measured: {some_of(names)}: {reason}")


def shown(mean: Mean | None, digits: int) -> str:
    """A mean with its interval."""
    if mean is None:
        return "-"
    if math.isnan(mean.mean):
        return "no number"
    if math.isnan(mean.low):
        return f"{mean.mean:.{digits}f}"
    return f"{mean.mean:.{digits}f} [{mean.low:.{digits}f}, {mean.high:.{digits}f}]"


def tell_interval(result: Evaluation, tell: Callable[[str], None]) -> None:
    """Say what the brackets are."""
    from temporal_vae.evaluation.results import INTERVAL

    if len(result.clips) > 1:
        tell(f"in brackets: {INTERVAL}")
