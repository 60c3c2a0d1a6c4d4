"""The command `tvae`."""

from __future__ import annotations

import io
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from temporal_vae import TemporalVAE, app, coding
from temporal_vae.describing import (
    Rows,
    describe,
    describe_installation,
    describe_latents,
    describe_statistics,
    describe_video,
    shown,
    to_json,
)
from temporal_vae.jobs import VIDEO_SUFFIXES, Job, find_inputs, plan_jobs
from temporal_vae.latents import SUFFIX, latent_statistics
from temporal_vae.video import PIPE, Format, VideoError, check_suffix
from temporal_vae.walks import heap
from temporal_vae.words import reader_options

command = typer.Typer(
    help="Temporal VAEs for video: pixels to latents and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True, highlight=False)
out = Console(highlight=False)

Target = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        help="Video to write: .mp4, .mov, .mkv (lossless), .webm, .y4m, .rgb; a name without a "
        "suffix for a folder of PNG; - for a pipe (.mkv).",
    ),
]
Codec = Annotated[
    str | None, typer.Option(help="h264, h265, vp9, ffv1, png, y4m or rgb, where OUT holds it.")
]
Depth = Annotated[
    int | None, typer.Option(help="Bits of a component; as many as the source if none.")
]
Quality = Annotated[
    float | None, typer.Option(help="Rate factor of a lossy codec: 0 is best, 51 worst.")
]
Model = Annotated[str, typer.Option(help="Built-in name, or folder of a saved model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
ClipFrames = Annotated[
    str | None,
    typer.Option(metavar="N|all", help="Cut the video into clips of N frames, or take it as one."),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE|auto", help="Bound of the memory over the weights: 2GiB, least."),
]
Start = Annotated[str | None, typer.Option(metavar="TIME", help="Begin there: seconds, or 1:02.5.")]
Frames = Annotated[int | None, typer.Option(help="The most frames to take.")]
Stride = Annotated[int | None, typer.Option(help="Take every n-th frame.")]
Fps = Annotated[
    str | None,
    typer.Option(metavar="RATE", help="Take an even rate, such as 24 or 30000/1001; of images."),
]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Scale to WIDTHxHEIGHT.")]
Crop = Annotated[
    str | None,
    typer.Option(metavar="WxH+X+Y", help="Cut out first; or centre, the shape of --size."),
]
RawWord = Annotated[
    str | None,
    typer.Option("--raw", metavar="WxH@FPS", help="IN is bare rgb24 of this size and rate."),
]
AlphaWord = Annotated[
    Literal["keep", "drop"] | None,
    typer.Option("--alpha", help="keep an alpha channel (a model of 4 channels), or drop it."),
]
Thing = Annotated[
    str | None, typer.Argument(metavar="[MODEL|FILE]", help="A model, a video, or latents.")
]
Sources = Annotated[
    list[Path],
    typer.Argument(metavar="IN...", help="Videos, images, folders, patterns; - from a pipe."),
]
LatentSources = Annotated[
    list[Path],
    typer.Argument(metavar="LATENTS...", help="Files of latents, folders of them, patterns."),
]
LatentTarget = Annotated[
    Path,
    typer.Argument(
        metavar="LATENTS", help="File to write, .safetensors; a folder for several videos."
    ),
]
NamedModel = Annotated[
    str | None, typer.Option("--model", help="As for encode; the built-in one that they name.")
]
Sample = Annotated[bool, typer.Option("--sample", help="Draw from the posterior.")]
Seed = Annotated[
    int | None, typer.Option(help="Of the samples; the n-th of several files takes n more.")
]
LatentDtype = Annotated[
    str | None, typer.Option(help="Of the file: float32, bfloat16 or float16; the model's if none.")
]
Scaled = Annotated[
    bool, typer.Option("--scaled", help="Store latents scaled for diffusion; the file records it.")
]
AnyModel = Annotated[
    bool, typer.Option("--any-model", help="Take latents of another encoder's weights too.")
]
Suffix = Annotated[str, typer.Option(help="What several files end in, as one OUT would.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Say what the written file holds.")]
Json = Annotated[bool, typer.Option("--json", help="A line of JSON for each file, on stdout.")]


@command.command()
def reconstruct(
    sources: Sources,
    target: Target,
    model: Model = "tiny",
    device: Device = "auto",
    dtype: Dtype = "float32",
    clip_frames: ClipFrames = None,
    memory: Memory = None,
    start: Start = None,
    frames: Frames = None,
    stride: Stride = None,
    fps: Fps = None,
    size: Size = None,
    crop: Crop = None,
    alpha: AlphaWord = None,
    raw: RawWord = None,
    codec: Codec = None,
    depth: Depth = None,
    quality: Quality = None,
    suffix: Suffix = ".mp4",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Encode videos to the posterior mean, decode it, and write the results; - is a pipe."""
    options = reader_options(start=start, frames=frames, stride=stride, fps=fps, size=size,
                             crop=crop, alpha=alpha, raw=raw)  # fmt: skip
    voice = Voice(quiet, verbose, as_json)
    jobs = plan_jobs(sources, target, VIDEO_SUFFIXES, suffix, overwrite)
    for source, out in jobs:
        _refuse_terminal(source, out)
    format = Format(codec=codec, depth=depth, quality=quality)
    check_suffix(jobs[0][1], format)
    length = _clip_length(clip_frames)
    vae = TemporalVAE.from_pretrained(
        model, dtype=app.choose_dtype(dtype), device=app.choose_device(device)
    )

    def work(source: Path, out: Path, index: int, meter: Meter) -> Result:
        done = app.reconstruct(source, out, vae, length, meter, memory, options, format,
                               overwrite=overwrite)  # fmt: skip
        return done, _written(out)

    _work("reconstructing", jobs, work, voice)


@command.command()
def encode(
    sources: Sources,
    target: LatentTarget,
    model: Model = "tiny",
    device: Device = "auto",
    dtype: Dtype = "float32",
    clip_frames: ClipFrames = None,
    memory: Memory = None,
    sample: Sample = False,
    seed: Seed = None,
    latent_dtype: LatentDtype = None,
    scaled: Scaled = False,
    start: Start = None,
    frames: Frames = None,
    stride: Stride = None,
    fps: Fps = None,
    size: Size = None,
    crop: Crop = None,
    alpha: AlphaWord = None,
    raw: RawWord = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Encode videos to files of latents, which `decode`, and any reader of safetensors, reads."""
    options = reader_options(start=start, frames=frames, stride=stride, fps=fps, size=size,
                             crop=crop, alpha=alpha, raw=raw)  # fmt: skip
    stored = None if latent_dtype is None else app.choose_dtype(latent_dtype)
    length = _clip_length(clip_frames)
    how = coding.Encoding(sample=sample, seed=seed, dtype=stored, scaled=scaled,
                       clip_frames=length, memory=memory)  # fmt: skip
    jobs = plan_jobs(sources, target, VIDEO_SUFFIXES, SUFFIX, overwrite)
    vae, record = app.load_model(model, app.choose_dtype(dtype), app.choose_device(device))

    def work(source: Path, out: Path, index: int, meter: Meter) -> Result:
        its = how if seed is None else replace(how, seed=seed + index)  # no two share their noise
        done = coding.encode(source, out, vae, record, its, options=options, overwrite=overwrite,
                             progress=meter)  # fmt: skip
        summary = app.Summary(done.info.frames, done.seconds, done.info.clip_frames, done.notes)
        return summary, describe_latents(str(out))

    _work("encoding", jobs, work, Voice(quiet, verbose, as_json))


@command.command()
def decode(
    sources: LatentSources,
    target: Target,
    model: NamedModel = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    memory: Memory = None,
    sample: Sample = False,
    seed: Seed = None,
    any_model: AnyModel = False,
    alpha: AlphaWord = None,
    codec: Codec = None,
    depth: Depth = None,
    quality: Quality = None,
    suffix: Suffix = ".mp4",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Decode files of latents to videos of the same frame count, size and timestamps."""
    jobs = plan_jobs(sources, target, frozenset([SUFFIX]), suffix, overwrite)
    _refuse_terminal(Path(), target)
    format = Format(codec=codec, depth=depth, quality=quality)
    check_suffix(jobs[0][1], format)
    name = model or coding.model_of(jobs[0][0])
    vae, record = app.load_model(name, app.choose_dtype(dtype), app.choose_device(device))

    def work(source: Path, out: Path, index: int, meter: Meter) -> Result:
        its = None if seed is None else seed + index
        done = coding.decode(source, out, vae, record, sample=sample, seed=its, any_model=any_model,
                          alpha=alpha, format=format, memory=memory, overwrite=overwrite,
                          progress=meter)  # fmt: skip
        return done, _written(out)

    _work("decoding", jobs, work, Voice(quiet, verbose, as_json))


@command.command()
def info(thing: Thing = None, as_json: Json = False) -> None:
    """Describe a model, a video or latents; without any, this installation."""
    _show(describe_installation() if thing is None else describe(thing), as_json)


@command.command()
def stats(sources: LatentSources, any_model: AnyModel = False, as_json: Json = False) -> None:
    """Mean and deviation of each channel, and the scale and shift that follow, for latents."""
    files = find_inputs(sources, frozenset([SUFFIX]))
    with Meter("reading") as meter:
        found = latent_statistics(files, meter, any_model)
    _show(describe_statistics(found), as_json)


Result = tuple[app.Summary, Rows]
"""What was done, and what there is to say of the file that was written."""


def _written(target: Path) -> Rows:
    with suppress(VideoError):  # of a pipe nothing can be read, and bare RGB says nothing of itself
        return {} if str(target) == PIPE else describe_video(str(target))
    return {}


@dataclass(frozen=True)
class Voice:
    """How much a command says."""

    quiet: bool
    verbose: bool
    as_json: bool

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise ValueError("--quiet and --verbose exclude each other")

    def tell(self, target: Path, result: Result) -> None:
        """What was done: notes on stderr; on stdout a line, or what is known of the file.

        On stderr all of it where the video is on stdout.
        """
        done, rows = result
        for note in () if self.quiet else done.notes:
            err.print(f"tvae: note: {note}", markup=False, soft_wrap=True)
        console = err if str(target) == PIPE else out
        if self.as_json:
            # last, as a file may not state how many frames it has
            known: Rows = {"frames": done.frames, "seconds": done.seconds,
                           "clip_frames": done.clip_frames, "notes": done.notes}  # fmt: skip
            rows = {"path": str(target), **rows, **known}
            console.print(to_json(rows), markup=False, soft_wrap=True)
        elif not self.quiet:
            cut, rate = done.clip_frames, done.frames / max(done.seconds, 1e-9)
            clips = "as one clip" if cut is None else f"in clips of {cut} frames"
            line = f"{target}: {done.frames} frames in {done.seconds:.1f} s, {rate:.2f} frames/s"
            console.print(f"{line}, {clips}", markup=False, soft_wrap=True)
            for name, value in shown(rows).items() if self.verbose else ():
                console.print(f"  {name}: {value}", markup=False, soft_wrap=True)


def _work(
    title: str, jobs: list[Job], work: Callable[[Path, Path, int, Meter], Result], voice: Voice
) -> None:
    """Job after job; of several one that fails is said and passed over, and the status tells."""
    failed = 0
    for index, (source, target) in enumerate(jobs):
        name = title if len(jobs) == 1 else f"{title} {source.name} ({index + 1} of {len(jobs)})"
        try:
            with Meter(name, quiet=voice.quiet) as meter:
                result = work(source, target, index, meter)
        except (VideoError, ValueError, OSError) as error:
            if len(jobs) == 1:
                raise
            failed += 1
            _say_error(str(error))
        else:
            voice.tell(target, result)
    if failed:
        raise ValueError(f"{failed} of {len(jobs)} failed")


def _show(rows: Rows, as_json: bool) -> None:
    if as_json:
        out.print(to_json(rows), markup=False, soft_wrap=True)
        return
    table = Table(show_header=False, box=None)
    for name, value in shown(rows).items():
        table.add_row(name, value)
    out.print(table, markup=False, soft_wrap=True)


def _refuse_terminal(source: Path, target: Path) -> None:
    if str(source) == PIPE and sys.stdin.isatty():
        raise ValueError("- reads a video that is piped in, and this is a terminal: ffmpeg ... |")
    if str(target) == PIPE and sys.stdout.isatty():
        raise ValueError("- writes a video for another program, and this is a terminal: | ffplay -")


def _clip_length(text: str | None) -> int | Literal["all"] | None:
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"--clip-frames must be a number of frames or 'all', got {text!r}")
    return int(text)


class Meter:
    """Progress on stderr: a bar with frames/s and time left; in a log, a line every ten seconds."""

    def __init__(self, title: str, quiet: bool = False):
        self._quiet = quiet
        self._title, self._start, self._said = title, time.monotonic(), time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            TextColumn("{task.completed:.0f} frames, {task.fields[rate]}"), TimeRemainingColumn(),
            console=err, transient=True, disable=quiet or not err.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=None, rate="")

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """Show that `done` frames of `total` are done."""
        now = time.monotonic()
        rate = done / max(now - self._start, 1e-9)
        self._bar.update(self._task, completed=done, total=total, rate=f"{rate:.2f} frames/s")
        if not err.is_terminal and not self._quiet and now - self._said > 10:
            self._said = now
            of = "" if total is None else f" of {total}"
            # before the first frame nobody knows
            left = f", {max(0, total - done) / rate:.0f} s left" if total and done else ""
            err.print(f"{self._title}: {done} frames{of}{left}, {rate:.2f} frames/s")


def main() -> None:
    """Run the command; a mistake of the user is one line and exit status 1."""
    heap.keep_freed()
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _terminate)
    for stream in (sys.stdout, sys.stderr):  # a name that cannot be printed is no failure
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        command()
    except (VideoError, ValueError, OSError) as error:
        _fail(str(error))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        _fail("out of memory: give --memory a bound, or take --dtype bfloat16")


def _fail(message: str) -> None:
    _say_error(message)
    sys.exit(1)


def _say_error(message: str) -> None:
    err.print(f"tvae: {' '.join(message.split())}", markup=False, soft_wrap=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    """A request to end unwinds like Ctrl-C, so that no half-written file stays."""
    sys.exit(128 + number)
