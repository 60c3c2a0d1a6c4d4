"""The words of `tvae evaluate`: its options, the models it takes, how its numbers are shown."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from temporal_vae.cli.groups import OptionGroup, option
from temporal_vae.cli.inputs import find_inputs, some_of
from temporal_vae.cli.options import FrameOptions, RunOptions
from temporal_vae.cli.report import Meter, out, say, say_error
from temporal_vae.files.atomic import atomic_path
from temporal_vae.video import VIDEO_SUFFIXES, Options, VideoError, VideoReader

if TYPE_CHECKING:
    from torch import Tensor

    from temporal_vae.evaluation.baseline import LinearBaseline
    from temporal_vae.evaluation.clips import Protocol
    from temporal_vae.evaluation.codecs import Codec
    from temporal_vae.evaluation.results import Evaluation, ModelOnClip
    from temporal_vae.evaluation.shown import Pictures, ShownClip

FAILURES = (VideoError, ValueError, OSError, RuntimeError)
PREFIXES = ("pca", "video", "diffusers", "frames")


@dataclass(frozen=True)
class EvaluateOptions(OptionGroup):
    """What is measured, and where the numbers go."""

    panel = "Evaluation"
    model: list[str] | None = option(
        None, "NAME", "A model to evaluate; give several. What --model takes elsewhere, or "
        "frames:NAME (the same frame by frame), pca:4, pca:16, pca:4x4, pca:16x4 (linear baselines "
        "of so many numbers for 8x8 pixels, x4 in blocks of four frames), diffusers:FOLDER (a VAE "
        "by diffusers' own code), video:FILE (a video of the reconstruction). Default: tiny."
    )  # fmt: skip
    protocol: str = option(
        "standard", "NAME", "quick: 24 frames, at most 256 wide, what takes little time. standard: "
        "all frames at their own size, all that needs one decode. full: noise on the latents, four "
        "rounds and frame by frame as well. Default: standard.")  # fmt: skip
    json: Path | None = option(
        None, "FILE", "Write all numbers to this file, by frame, clip and set."
    )
    report: Path | None = option(
        None, "FILE", "Write a page of HTML to look at: original and reconstructions under a wipe, "
        "their error, curves, and the numbers. It needs no network and no other file.")  # fmt: skip
    width: int | None = option(
        None, "PIXELS", "Scale clips to this width, the height to the nearest multiple of 8."
    )
    baseline_fit: Path | None = option(
        None, "FOLDER", "Fit the linear baselines to the videos in this folder first, instead of "
        "those that come with the library.")  # fmt: skip
    display: str = option(
        "standard_4k", "NAME", "The display that cvvdp looks on, by its own names. Default: "
        "standard_4k.")  # fmt: skip
    lpips_trunk: Path | None = option(
        None, "FILE", "For LPIPS: the weights of torchvision's squeezenet1_1 or vgg16, as "
        "safetensors.")  # fmt: skip
    lpips_heads: Path | None = option(
        None, "FILE", "For LPIPS: the weights of the package lpips for that network, as "
        "safetensors.")  # fmt: skip
    quiet: bool = option(False, "", "Print nothing but errors and the table.")

    def __post_init__(self) -> None:
        if (self.lpips_trunk is None) != (self.lpips_heads is None):
            raise ValueError("LPIPS needs both --lpips-trunk and --lpips-heads")
        for file in (self.json, self.report):
            if file is not None and not file.resolve().parent.is_dir():
                raise ValueError(f"{file.parent}, where {file.name} is to be, is not a folder")

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


@dataclass
class _Run:
    """One call of the command: what all clips have in common, and what was found so far."""

    settings: EvaluateOptions
    frames: FrameOptions
    model: RunOptions
    protocol: Protocol
    baselines: Callable[[str], LinearBaseline]
    lpips: Callable[[Tensor, Tensor], Any] | None
    result: Evaluation
    codecs: dict[str, Callable[[], Codec]]
    pictures: Pictures | None

    def open(self, file: Path) -> VideoReader:
        """A clip as the protocol takes it, in RGB."""
        options: Options = self.frames.selected()
        options |= {"channels": 3, "frames": self.protocol.frames, "alpha": "drop"}
        width, reader = self.protocol.width, VideoReader(file, **options)
        # enlarged, a clip would be smooth, and its numbers better than they are
        if width is None or (self.settings.width is None and reader.info.width <= width):
            return reader
        reader.close()
        return VideoReader(file, width, 8, **options)

    def load(self, name: str) -> Callable[[], Codec]:
        """What gives the codec of a model; the model itself is loaded once."""
        from temporal_vae.convert.chunks import clip_length
        from temporal_vae.evaluation import codecs

        asked = self.frames.clip_frames
        kind, rest = _kind(name)
        if kind == "video":
            return lambda: codecs.VideoCodec(lambda: self.open(Path(rest)), rest)
        codec: Codec
        if kind == "pca":
            codec = codecs.LinearCodec(self.baselines(rest))
        elif kind == "diffusers":
            length = None if asked == "all" else asked
            codec = codecs.DiffusersCodec.load(rest, *self.model.numbers(), length)
        else:
            loaded = self.model.load(rest)
            loaded.set_memory_budget(self.model.memory)
            codec = codecs.ModelCodec(loaded, 1 if kind == "frames" else clip_length(loaded, asked))
        return lambda: codec

    def measure(self, file: Path, meter: Meter) -> None:
        """All models on one clip; what fails is told, and counted."""
        from temporal_vae.evaluation.results import ClipResult

        try:
            with self.open(file) as reader:
                (height, width), info = reader.size, reader.info
        except FAILURES as error:
            self._fail(str(file), str(error))
            return
        each = info.expected_frames
        fps = float(info.fps)
        shown = None if self.pictures is None else self.pictures.of(str(file), fps, each)
        passes = sum(1 if _is_video(name) else self.protocol.decodes for name in self.codecs)
        progress = _Progress(meter, each and each * passes)
        found = {}
        for name, codec in self.codecs.items():
            try:
                found[name] = self._measured(file, name, codec(), fps, progress, shown)
            except FAILURES as error:
                self._fail(f"{file}, {name}", str(error))
        if found:
            frames = max(model.count for model in found.values())
            self.result.clips.append(
                ClipResult(file.stem, str(file), frames, width, height, fps, found)
            )

    def _measured(self, file: Path, name: str, codec: Codec, fps: float,
                  tick: Callable[[], None], shown: ShownClip | None) -> ModelOnClip:  # fmt: skip
        from temporal_vae.evaluation.clips import Conditions, measure_clip

        conditions = Conditions(fps, self.settings.display, self.lpips)
        makes = conditions.makes(self.protocol.measures)
        if shown is not None:
            makes["pictures"] = shown.measure(name)
        return measure_clip(lambda: self.open(file), codec, self.protocol, tick, makes)

    def _fail(self, what: str, why: str) -> None:
        self.result.failed[what] = why
        say_error(why if why.startswith(what) else f"{what}: {why}")


class _Progress:
    """Counts frames for a meter."""

    def __init__(self, meter: Meter, total: int | None):
        self._meter, self._total, self._done = meter, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._meter(self._done, None if self._total is None else max(self._total, self._done))


def evaluate(
    files: Sequence[Path], settings: EvaluateOptions, frames: FrameOptions, model: RunOptions
) -> None:
    """Measure all models on all clips; print the table and the faults, write the JSON."""
    from temporal_vae.evaluation.results import Evaluation

    protocol = settings.chosen(frames)
    names = _with_alone(settings.names) if protocol.alone else settings.names
    result = Evaluation(protocol.to_json() | {"display": settings.display}, tuple(names))
    tell = (lambda _: None) if settings.quiet else say
    run = _Run(
        settings, frames, model, protocol, _baselines(settings), _lpips(settings), result, {},
        _pictures(settings, len(files), len(names)),
    )  # fmt: skip
    run.codecs.update({name: run.load(name) for name in names})
    if protocol.decodes > 1:
        tell(_cost(protocol, len(files), names))
    for index, file in enumerate(files):
        title = f"evaluating {file.name} ({index + 1} of {len(files)})"
        with Meter(title, settings.quiet) as meter:
            run.measure(file, meter)
        if settings.json is not None:  # after each clip, so that any end keeps the others
            with atomic_path(settings.json) as part:
                part.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
        if run.pictures is not None:
            _report(settings, result, run.pictures)
    show(result, tell)
    if result.failed:
        raise ValueError(f"{len(result.failed)} of {len(files) * len(names)} failed: see above")


def _kind(name: str) -> tuple[str, str]:
    """What a model's name begins with, if it is one of `PREFIXES`, and the rest of it."""
    kind, colon, rest = name.partition(":")
    return (kind, rest) if colon and kind in PREFIXES else ("", name)


def _is_video(name: str) -> bool:
    """Whether a model is a video of its reconstruction, which is read once whatever is measured."""
    return _kind(name)[0] == "video"


def _with_alone(names: Sequence[str]) -> list[str]:
    """The models, and each of ours frame by frame."""
    alone = [f"frames:{name}" for name in names if not _kind(name)[0]]
    return list(dict.fromkeys([*names, *alone]))


def _cost(protocol: Protocol, clips: int, names: Sequence[str]) -> str:
    """What a protocol of more than one decode takes."""
    models = sum(not _is_video(name) for name in names)
    return (
        f"{protocol.name} decodes each frame {protocol.decodes} times with each of {models} "
        f"models: once, {protocol.rounds - 1} rounds more, {len(protocol.shares)} shares of noise; "
        f"{clips} clips take about {protocol.decodes} times as long as with --protocol standard"
    )


def _baselines(settings: EvaluateOptions) -> Callable[[str], LinearBaseline]:
    """Linear baselines by their names: those of the package, or fitted to a folder."""
    from temporal_vae.evaluation import baseline

    if settings.baseline_fit is None:
        return baseline.LinearBaseline.bundled
    files = find_inputs([settings.baseline_fit], VIDEO_SUFFIXES)
    frames = []
    with Meter("reading videos for the baselines", settings.quiet, unit="files") as meter:
        for index, file in enumerate(files):
            meter(index, len(files))
            frames.append(baseline.training_clip(file))
    fitted = baseline.fit_all(frames)
    return lambda name: fitted[baseline.check_name(name)]


def _lpips(settings: EvaluateOptions) -> Callable[[Tensor, Tensor], Any] | None:
    if settings.lpips_trunk is None or settings.lpips_heads is None:
        return None
    from temporal_vae.training.critics import Lpips

    return Lpips.from_files(settings.lpips_trunk, settings.lpips_heads)


def _pictures(settings: EvaluateOptions, clips: int, models: int) -> Pictures | None:
    if settings.report is None:
        return None
    from temporal_vae.evaluation.measures import need_pillow
    from temporal_vae.evaluation.shown import Pictures

    need_pillow()
    return Pictures(clips, models)


def _report(settings: EvaluateOptions, result: Evaluation, pictures: Pictures) -> None:
    """Write the page of a result."""
    from temporal_vae.checkpoints.pretrained import read_card
    from temporal_vae.evaluation.report import write_report

    kinds = dict.fromkeys(_kind(name) for name in settings.names)
    cards = {name: read_card(name) for kind, name in kinds if kind not in ("pca", "video")}
    command = shlex.join(["tvae", *sys.argv[1:]])
    assert settings.report is not None
    write_report(settings.report, result, pictures.clips, cards, command)


def show(result: Evaluation, tell: Callable[[str], None]) -> None:
    """Print the means as a table, faults and what is missing as lines."""
    from temporal_vae.evaluation.values import SHOWN

    means = result.mean
    columns = [name for name in SHOWN if any(name in values for values in means.values())]
    table = Table(box=None)
    table.add_column("model", overflow="fold")
    for name in columns:
        table.add_column(SHOWN[name].title, justify="right")
    for model, values in means.items():
        cells = (values[name].text(SHOWN[name].digits) if name in values else "-"
                 for name in columns)  # fmt: skip
        table.add_row(model, *cells)
    if result.clips:
        out.print(table, markup=False)
        tell_interval(result, tell)
    for clip in result.clips:
        for model, found in clip.models.items():
            for line in found.diagnosis:
                out.print(f"{clip.name}, {model}: {line}", markup=False, soft_wrap=True)
    for reason, names in result.missing.items():
        tell(f"not measured: {some_of(names)}: {reason}")


def tell_interval(result: Evaluation, tell: Callable[[str], None]) -> None:
    """Say what the brackets are."""
    from temporal_vae.evaluation.results import INTERVAL

    if len(result.clips) > 1:
        tell(f"in brackets: {INTERVAL}")
