"""The command `tvae`.

A verb first does what needs no model: it reads its options and looks for its files. Only then does
it import torch, which takes seconds; so help and mistakes come at once.
"""

from __future__ import annotations

import io
import signal
import sys
import warnings
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from temporal_vae.cli import (
    batch,
    comparing,
    dataset,
    evaluation,
    exporting,
    inputs,
    options,
    serving,
    training,
)
from temporal_vae.cli.groups import with_groups
from temporal_vae.cli.info import (
    describe,
    describe_installation,
    describe_latents,
    describe_written,
)
from temporal_vae.cli.report import (
    MessageOptions,
    Meter,
    Result,
    say,
    say_error,
    say_warning,
    show_rows,
)
from temporal_vae.convert import allocator
from temporal_vae.files.safetensors import SUFFIX
from temporal_vae.video import VIDEO_SUFFIXES, VideoError, check_suffix, choose

if TYPE_CHECKING:
    from temporal_vae.convert.origin import Origin

LATENTS = frozenset([SUFFIX])

Sources = Annotated[list[Path], typer.Argument(
    metavar="IN", help="Videos, images, folders of either (a folder of images is one clip), "
    "patterns such as '*.mp4'; - for a pipe.",
)]  # fmt: skip
LatentSources = Annotated[list[Path], typer.Argument(
    metavar="LATENTS", help="Files of latents, folders of them, or patterns.",
)]  # fmt: skip
VideoTarget = Annotated[Path, typer.Argument(
    metavar="OUT", help="Video to write: .mp4, .mov, .mkv (lossless), .webm, .gif, .webp, .y4m or "
    ".rgb; .png or .jpg for one frame; a name without a suffix for a folder of PNG images; - for a "
    "pipe (.mkv). For several inputs, a folder.",
)]  # fmt: skip
LatentTarget = Annotated[Path, typer.Argument(
    metavar="LATENTS", help="File to write, .safetensors. For several inputs, a folder.",
)]  # fmt: skip
Json = Annotated[bool, typer.Option(
    "--json", metavar="", help="Print one line of JSON instead of a table.",
)]  # fmt: skip

command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@command.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn videos into the latents of a temporal VAE, and latents into videos."""
    if show_version:
        typer.echo(f"tvae {version('temporal-video-vae')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@command.command()
@with_groups
def reconstruct(
    sources: Sources,
    target: VideoTarget,
    model: options.ModelOptions,
    frames: options.FrameOptions,
    folder: options.VideoFolderOptions,
    output: options.VideoFileOptions,
    result: comparing.ResultOptions,
    messages: MessageOptions,
) -> None:
    """Encode videos and decode them again, to see what a model keeps of them.

    Examples:
      tvae reconstruct in.mp4 out.mp4
      tvae reconstruct in.mov out.mkv --dtype bfloat16 --memory 2GiB
      tvae reconstruct clips/ out/ --suffix .mkv
    """
    selected, format = frames.selected(), output.format()
    jobs = _plan(sources, target, VIDEO_SUFFIXES, output.suffix, folder, output.overwrite,
                 messages)  # fmt: skip
    inputs.refuse_terminal(*jobs[0])
    _check_output(jobs[0][1], output, folder)
    result.check(jobs, output.overwrite)
    allocator.settle(model.memory)
    from temporal_vae.convert import reconstruct as reconstructing
    from temporal_vae.convert.ahead import ReadAhead

    vae, record = model.load_with_record()

    def work(source: Path, out: Path, index: int, meter: Meter) -> Result:
        done = reconstructing.reconstruct(
            source, out, vae, frames.clip_frames, meter, model.memory, selected, format,
            overwrite=output.overwrite, record=record, opening=lambda: ahead.take(source),
        )  # fmt: skip
        looked = result.look(source, out, selected, several=len(jobs) > 1)
        return done, describe_written(out) | looked

    def origin(out: Path, index: int) -> Origin:
        return reconstructing.origin(out, vae, record, frames.clip_frames, selected, format)

    todo = batch.left_to_do(jobs, origin, folder, output.overwrite, messages)
    with ReadAhead([source for _, source, _ in todo], vae, selected, folder.jobs) as ahead:
        batch.run("reconstructing", todo, work, origin, folder, messages)


@command.command()
@with_groups
def encode(
    sources: Sources,
    target: LatentTarget,
    model: options.ModelOptions,
    latents: options.EncodeOptions,
    frames: options.FrameOptions,
    folder: options.VideoFolderOptions,
    output: options.FileOptions,
    messages: MessageOptions,
) -> None:
    """Encode videos to files of latents, for `tvae decode` and for training diffusion models.

    Examples:
      tvae encode in.mp4 clip.safetensors
      tvae encode clips/ latents/ --latent-dtype bfloat16
      tvae encode in.mp4 clip.safetensors --start 1:02.5 --frames 49 --size 256x256 --crop centre
    """
    selected = frames.selected()
    jobs = _plan(sources, target, VIDEO_SUFFIXES, SUFFIX, folder, output.overwrite, messages)
    allocator.settle(model.memory)
    from temporal_vae.convert import encode as encoding
    from temporal_vae.convert.ahead import ReadAhead
    from temporal_vae.convert.ends import Summary

    how = latents.encoding(frames.clip_frames, model.memory)
    vae, record = model.load_with_record()

    def work(source: Path, out: Path, index: int, meter: Meter) -> Result:
        its = replace(how, seed=latents.seed_of(index))
        done = encoding.encode(source, out, vae, record, its, options=selected,
                               overwrite=output.overwrite, progress=meter,
                               opening=lambda: ahead.take(source))  # fmt: skip
        summary = Summary(done.info.frames, done.seconds, done.info.clip_frames, done.notes)
        return summary, describe_latents(str(out))

    def origin(out: Path, index: int) -> Origin:
        its = replace(how, seed=latents.seed_of(index))
        return encoding.origin(vae, record, its, selected)

    todo = batch.left_to_do(jobs, origin, folder, output.overwrite, messages)
    with ReadAhead([source for _, source, _ in todo], vae, selected, folder.jobs) as ahead:
        batch.run("encoding", todo, work, origin, folder, messages)


@command.command()
@with_groups
def encode_dataset(
    source: Annotated[Path, typer.Argument(
        metavar="SRC", help="A folder of videos (with those inside it), a .tar file as webdataset "
        "has it, or a manifest: .csv, .jsonl or .parquet with a column path, or .txt.",
    )],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the latents.")],
    data: dataset.DataSetOptions,
    model: options.ModelOptions,
    latents: options.EncodeOptions,
    frames: options.FrameOptions,
) -> None:  # fmt: skip
    """Encode a data set of videos to one of latents; stopped, it goes on where it was.

    OUT/manifest.parquet has a row for each clip. A broken video is a row too, and in the end exit
    status 2.

    Examples:
      tvae encode-dataset clips/ latents/
      tvae encode-dataset clips.csv latents/ --buckets 512x320x49,320x512x49 --cut scenes
      tvae encode-dataset shards/ latents/ --layout webdataset --engine ray --address auto
    """
    dataset.encode_dataset(source, target, data, model, latents, frames)


@command.command()
@with_groups
def export_dataset(
    folder: Annotated[
        Path, typer.Argument(metavar="LATENTS", help="A data set that encode-dataset made.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    layout: dataset.ExportOptions,
) -> None:
    """Write a data set of latents as musubi-tuner or CogVideo's fine-tuning keep theirs.

    Examples:
      tvae export-dataset latents/ cache/ --architecture wan
      tvae export-dataset latents/ data/ --layout cogvideo --resolution 49x480x720
    """
    dataset.export_dataset(folder, target, layout)


@command.command()
@with_groups
def decode(
    sources: LatentSources,
    target: VideoTarget,
    model: options.ModelOptions,
    latents: options.DecodeOptions,
    folder: options.FolderOptions,
    output: options.VideoFileOptions,
    messages: MessageOptions,
) -> None:
    """Decode files of latents to videos of the frames, size and timestamps that were encoded.

    Examples:
      tvae decode clip.safetensors out.mp4
      tvae decode latents/ videos/ --suffix .mkv
      tvae decode clip.safetensors out.mov --codec h265 --depth 10 --quality 18
    """
    jobs = _plan(sources, target, LATENTS, output.suffix, folder, output.overwrite, messages)
    inputs.refuse_terminal(*jobs[0])
    _check_output(jobs[0][1], output, folder)
    allocator.settle(model.memory)
    from temporal_vae.convert import decode as decoding

    vae, record = model.load_with_record(model.model or decoding.model_of(jobs[0][0]))

    def work(source: Path, out: Path, index: int, meter: Meter) -> Result:
        done = decoding.decode(
            source, out, vae, record, sample=latents.sample, seed=latents.seed_of(index),
            any_model=latents.any_model, alpha=latents.alpha, format=output.format(),
            memory=model.memory, overwrite=output.overwrite, progress=meter)  # fmt: skip
        return done, describe_written(out)

    def origin(out: Path, index: int) -> Origin:
        return decoding.origin(out, vae, record, sample=latents.sample, alpha=latents.alpha,
                               seed=latents.seed_of(index), format=output.format())  # fmt: skip

    todo = batch.left_to_do(jobs, origin, folder, output.overwrite, messages)
    batch.run("decoding", todo, work, origin, folder, messages)


@command.command()
@with_groups
def train(
    recipe: Annotated[str, typer.Argument(
        metavar="RECIPE", help="A recipe: a .toml file, or the name of one of the library's, such "
        "as tiny, svd-decoder, finetune.",
    )],
    data: training.DataOptions,
    options: training.RunOptions,
) -> None:  # fmt: skip
    """Train a model by a recipe, or fine-tune one on your own clips.

    Examples:
      tvae train finetune --data clips/ --out run/ --init tiny --check
      tvae train finetune --data clips/ --out run/ --init tiny
      tvae train recipe.toml --data a/ b/ --out run/ --set steps=5000 --set data.workers=4
      tvae train recipe.toml --data a/ b/ --out run/ --resume
      torchrun --nproc-per-node 2 $(which tvae) train finetune --data clips/ --out run/
    """
    training.train(recipe, data, options)


@command.command()
@with_groups
def evaluate(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CLIPS",
            help="Videos, folders of them or patterns; a folder of images is one clip.",
        ),
    ],
    settings: evaluation.EvaluateOptions,
    model: options.RunOptions,
    frames: options.FrameOptions,
) -> None:
    """Measure how well models reconstruct clips: quality, flicker, drift, and faults by name.

    Examples:
      tvae evaluate clips/ --model tiny --model pca:4 --protocol quick
      tvae evaluate clip.mp4 --model my-model/ --model frames:my-model/ --json out.json
      tvae evaluate clip.mp4 --model video:reconstruction.mkv
    """  # fmt: skip
    files = inputs.find_inputs(sources, VIDEO_SUFFIXES)
    inputs.refuse_missing(files)
    allocator.settle(model.memory)
    evaluation.evaluate(files, settings, frames, model)


@command.command()
@with_groups
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A video, such as an original.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one of the same length.")],
    target: VideoTarget,
    settings: comparing.CompareOptions,
    frames: options.FrameOptions,
    output: options.VideoFileOptions,
) -> None:
    """Write two videos beside each other, with their difference, or under a wipe.

    Examples:
      tvae compare in.mp4 out.mp4 side.mp4
      tvae compare in.mp4 out.mp4 wipe.mp4 --wipe --label-a original --label-b tiny
    """
    inputs.refuse_missing([first, second])
    comparing.compare(first, second, target, settings, frames.selected(), output.format(),
                      output.overwrite, of_both=True)  # fmt: skip


@command.command()
@with_groups
def serve(page: serving.ServeOptions, model: options.RunOptions) -> None:
    """Serve a page on which one uploads a clip or a photo, and sees what a model keeps of it.

    Examples:
      tvae serve
      tvae serve --model tiny --model my-model/ --memory 2GiB
      tvae serve --host 0.0.0.0 --port 8000 --max-frames 120 --max-mib 20
    """
    serving.check_installed()
    allocator.settle("auto")
    serving.serve(page, model)


@command.command()
@with_groups
def export(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="A built-in name, the folder or .safetensors file of a saved model, "
        "or owner/name on the Hugging Face Hub.",
    )],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    settings: exporting.ExportOptions,
) -> None:  # fmt: skip
    """Write a model as graphs for other programs: encode, decode and the steps of streams.

    Examples:
      tvae export tiny graphs/
      tvae export my-model/ packages/ --format pt2
    """
    exporting.export(model, target, settings)


@command.command()
def info(
    thing: Annotated[
        str | None, typer.Argument(metavar="THING", help="A model, a video or a file of latents.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Describe a model, a video or a file of latents; without any, this installation.

    Examples:
      tvae info
      tvae info tiny
      tvae info clip.safetensors --json
    """
    show_rows(describe_installation() if thing is None else describe(thing), as_json)


@command.command()
def stats(
    sources: LatentSources,
    any_model: Annotated[
        bool, typer.Option("--any-model", metavar="", help="Take latents of several encoders.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the mean and deviation of latents, and the scale and shift to unit variance.

    Examples:
      tvae stats latents/
      tvae stats 'latents/*.safetensors' --json
    """
    files = inputs.find_inputs(sources, LATENTS)
    inputs.refuse_missing(files)
    from temporal_vae.latents import latent_statistics

    with Meter("reading") as meter:
        found = latent_statistics(files, meter, any_model)
    show_rows(asdict(found), as_json)


def _plan(
    sources: list[Path], target: Path, suffixes: frozenset[str], suffix: str,
    folder: options.FolderOptions, overwrite: bool, messages: MessageOptions,
) -> list[inputs.Job]:  # fmt: skip
    """What is to be made, and a word on folders that are not looked into."""
    jobs = inputs.plan_jobs(
        sources, target, suffixes, suffix, overwrite or folder.skip_existing, folder.recursive
    )
    over = [] if folder.recursive else inputs.passed_over(sources, suffixes, target)
    if over and not messages.quiet:
        say(f"note: passed over: {inputs.some_of(over)}: --recursive looks into folders too")
    return jobs


def _check_output(
    out: Path, output: options.VideoFileOptions, folder: options.FolderOptions
) -> None:
    """Raise `VideoError` for a video that cannot be written, or cannot tell what it was made of."""
    check_suffix(out, output.format())
    if folder.skip_existing and not choose(out, output.format()).in_container:
        raise VideoError(
            f"{out}: --skip-existing compares what a file says it was made of, and only .mp4, "
            ".mov, .mkv and .webm have a place for that: take one of them, or leave it out"
        )


def main() -> None:
    """Run the command. A mistake of the user is one line on stderr, and exit status 1 or 2."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _terminate)
    for stream in (sys.stdout, sys.stderr):  # a name that cannot be printed is no failure
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = say_warning
    try:
        words = training.spread_lists(sys.argv[1:])
        status = command(words, prog_name="tvae", standalone_mode=False)
    except typer.TyperException as error:  # of the command line: what typer cannot make sense of
        context = getattr(error, "ctx", None)
        verb = "tvae" if context is None else context.command_path
        _fail(f"{error.format_message()} (see {verb} --help)", error.exit_code)
    except (VideoError, ValueError, OSError) as error:
        _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        from temporal_vae.walks.budget import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _fail("out of memory: give --memory a bound, or take --dtype bfloat16")
    sys.exit(status)


def _fail(message: str, status: int = 1) -> NoReturn:
    say_error(message)
    sys.exit(status)


def _terminate(number: int, frame: FrameType | None) -> None:
    """A request to end unwinds like Ctrl-C, so that no half-written file stays."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
