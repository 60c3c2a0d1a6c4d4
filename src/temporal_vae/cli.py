"""The command `tvae`."""

from __future__ import annotations

import ctypes
import io
import platform
import signal
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from temporal_vae import TemporalVAE, app, checkpoint
from temporal_vae.video import PIPE, VideoError, VideoInfo, VideoReader

command = typer.Typer(
    help="Temporal VAEs for video: pixels to latents and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True, highlight=False)
out = Console(highlight=False)

Source = Annotated[Path, typer.Argument(metavar="IN", help="Video to read; - from a pipe.")]
Target = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Video to write: .mp4, .mkv (lossless); - .mkv to a pipe."),
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
Thing = Annotated[str | None, typer.Argument(metavar="[MODEL|FILE]", help="A model, or a video.")]


@command.command()
def reconstruct(
    source: Source,
    target: Target,
    model: Model = "tiny",
    device: Device = "auto",
    dtype: Dtype = "float32",
    clip_frames: ClipFrames = None,
    memory: Memory = None,
) -> None:
    """Encode a video to the posterior mean, decode it, and write the result; - is a pipe."""
    _refuse_terminal(source, target)
    vae = TemporalVAE.from_pretrained(
        model, dtype=app.choose_dtype(dtype), device=app.choose_device(device)
    )
    with Meter("reconstructing") as meter:
        summary = app.reconstruct(source, target, vae, _clip_length(clip_frames), meter, memory)
    for note in summary.notes:
        err.print(f"tvae: note: {note}", markup=False, soft_wrap=True)
    rate = summary.frames / max(summary.seconds, 1e-9)
    cut = summary.clip_frames
    clips = "as one clip" if cut is None else f"in clips of {cut} frames"
    console = err if str(target) == PIPE else out
    console.print(
        f"{target}: {summary.frames} frames in {summary.seconds:.1f} s, {rate:.2f} frames/s, "
        f"{clips}",
        markup=False,
        soft_wrap=True,
    )


@command.command()
def info(thing: Thing = None) -> None:
    """Describe a model or a video; without either, this installation."""
    if thing is None:
        rows = _describe_installation()
    elif thing in checkpoint.builtin_names() or Path(thing).is_dir():
        rows = _describe_model(TemporalVAE.from_pretrained(thing))
    elif not Path(thing).exists():
        raise ValueError(f"{thing}: neither a model nor a file")
    else:
        with VideoReader(thing) as reader:
            rows = _describe_video(reader.info)
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, str(value))
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


def _describe_installation() -> dict[str, object]:
    return {
        "temporal-video-vae": version("temporal-video-vae"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": app.choose_device("auto"),
        "built-in models": ", ".join(checkpoint.builtin_names()),
    }


def _describe_model(vae: TemporalVAE) -> dict[str, object]:
    return {
        **{f.name: getattr(vae.config, f.name) for f in fields(vae.config)},
        "parameters": f"{vae.parameter_count:,}",
        "of the encoder": f"{sum(p.numel() for p in vae.encoder.parameters()):,}",
        "of the decoder": f"{sum(p.numel() for p in vae.decoder.parameters()):,}",
        "pixels per latent cell": vae.downsample_factor,
        "frames a latent depends on": _reach(vae.encode_reach, vae.is_causal),
        "latent frames a frame depends on": _reach(vae.decode_reach, vae.is_causal),
    }


def _reach(frames: int | None, causal: bool) -> str:
    if frames is None:
        return "the whole clip"
    return f"{frames} back" if causal else f"{frames} on each side"


def _describe_video(video: VideoInfo) -> dict[str, object]:
    rows: dict[str, object] = {
        "size": f"{video.width}x{video.height}",
        "frames": "not stated" if video.frames is None else video.frames,
        "frames per second": f"{float(video.fps):.6g} ({video.fps})",
        "time base": video.time_base,
        "codec": video.codec,
        "pixel format": video.pixel_format,
    }
    return rows | {f"note {i}": note for i, note in enumerate(video.notes, 1)}


class Meter:
    """Progress on stderr: a bar with frames/s and time left; in a log, a line every ten seconds."""

    def __init__(self, title: str):
        self._title, self._start, self._said = title, time.monotonic(), time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            TextColumn("{task.completed:.0f} frames, {task.fields[rate]}"), TimeRemainingColumn(),
            console=err, transient=True, disable=not err.is_terminal,
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
        if not err.is_terminal and now - self._said > 10:
            self._said = now
            left = "" if total is None else f" of {total}, {max(0, total - done) / rate:.0f} s left"
            err.print(f"{self._title}: {done} frames{left}, {rate:.2f} frames/s")


def main() -> None:
    """Run the command; a mistake of the user is one line and exit status 1."""
    _keep_freed_memory()
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


def _keep_freed_memory() -> None:
    """Let glibc reuse freed memory for the next piece of a stream, instead of returning it.

    Returned, it comes back page by page and in other places, which costs time and lets the peak
    wander; docs/decisions.md has the runs.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _fail(message: str) -> None:
    err.print(f"tvae: {' '.join(message.split())}", markup=False, soft_wrap=True)
    sys.exit(1)


def _terminate(number: int, frame: FrameType | None) -> None:
    """A request to end unwinds like Ctrl-C, so that no half-written file stays."""
    sys.exit(128 + number)
