"""The command `tvae`."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
import typer

from temporal_vae import TemporalVAE
from temporal_vae.cli.info import (
    Rows,
    describe,
    describe_installation,
    describe_latents,
    describe_statistics,
    describe_video,
)
from temporal_vae.cli.inputs import VIDEO_SUFFIXES, Job, find_inputs, plan_jobs
from temporal_vae.cli.options import (
    AlphaWord,
    AnyModel,
    ClipFrames,
    Codec,
    Crop,
    Depth,
    Device,
    Dtype,
    Fps,
    Frames,
    Json,
    LatentDtype,
    LatentSources,
    LatentTarget,
    Memory,
    Model,
    NamedModel,
    Overwrite,
    Quality,
    Quiet,
    RawWord,
    Sample,
    Scaled,
    Seed,
    Size,
    Sources,
    Start,
    Stride,
    Suffix,
    Target,
    Thing,
    Verbose,
    choose_device,
    choose_dtype,
    load_model,
    reader_options,
)
from temporal_vae.cli.report import Meter, Result, Voice, say_error, show_rows
from temporal_vae.convert import decode as decoding
from temporal_vae.convert import encode as encoding
from temporal_vae.convert import ends
from temporal_vae.convert import reconstruct as reconstructing
from temporal_vae.latents import SUFFIX, latent_statistics
from temporal_vae.video import PIPE, Format, VideoError, check_suffix
from temporal_vae.walks import heap

command = typer.Typer(
    help="Temporal VAEs for video: pixels to latents and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
        model, dtype=choose_dtype(dtype), device=choose_device(device)
    )

    def work(source: Path, out: Path, index: int, meter: Meter) -> Result:
        done = reconstructing.reconstruct(source, out, vae, length, meter, memory, options, format,
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
    stored = None if latent_dtype is None else choose_dtype(latent_dtype)
    length = _clip_length(clip_frames)
    how = encoding.Encoding(sample=sample, seed=seed, dtype=stored, scaled=scaled,
                       clip_frames=length, memory=memory)  # fmt: skip
    jobs = plan_jobs(sources, target, VIDEO_SUFFIXES, SUFFIX, overwrite)
    vae, record = load_model(model, choose_dtype(dtype), choose_device(device))

    def work(source: Path, out: Path, index: int, meter: Meter) -> Result:
        its = how if seed is None else replace(how, seed=seed + index)  # no two share their noise
        done = encoding.encode(
            source, out, vae, record, its, options=options, overwrite=overwrite, progress=meter
        )
        summary = ends.Summary(done.info.frames, done.seconds, done.info.clip_frames, done.notes)
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
    name = model or decoding.model_of(jobs[0][0])
    vae, record = load_model(name, choose_dtype(dtype), choose_device(device))

    def work(source: Path, out: Path, index: int, meter: Meter) -> Result:
        its = None if seed is None else seed + index
        done = decoding.decode(
            source, out, vae, record, sample=sample, seed=its, any_model=any_model, alpha=alpha,
            format=format, memory=memory, overwrite=overwrite, progress=meter,
        )  # fmt: skip
        return done, _written(out)

    _work("decoding", jobs, work, Voice(quiet, verbose, as_json))


@command.command()
def info(thing: Thing = None, as_json: Json = False) -> None:
    """Describe a model, a video or latents; without any, this installation."""
    show_rows(describe_installation() if thing is None else describe(thing), as_json)


@command.command()
def stats(sources: LatentSources, any_model: AnyModel = False, as_json: Json = False) -> None:
    """Mean and deviation of each channel, and the scale and shift that follow, for latents."""
    files = find_inputs(sources, frozenset([SUFFIX]))
    with Meter("reading") as meter:
        found = latent_statistics(files, meter, any_model)
    show_rows(describe_statistics(found), as_json)


def _written(target: Path) -> Rows:
    with suppress(VideoError):  # of a pipe nothing can be read, and bare RGB says nothing of itself
        return {} if str(target) == PIPE else describe_video(str(target))
    return {}


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
            say_error(str(error))
        else:
            voice.tell(target, result)
    if failed:
        raise ValueError(f"{failed} of {len(jobs)} failed")


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
    say_error(message)
    sys.exit(1)


def _terminate(number: int, frame: FrameType | None) -> None:
    """A request to end unwinds like Ctrl-C, so that no half-written file stays."""
    sys.exit(128 + number)
