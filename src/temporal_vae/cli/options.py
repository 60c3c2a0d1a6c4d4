"""What is typed for the options of a reader, as values."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
import typer

from temporal_vae.checkpoints import pretrained
from temporal_vae.latents import ModelRecord
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Options, Raw, Selection


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises `ValueError` for a device that is not there.
    """
    if name.split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here: take auto") from error
    return device


def choose_dtype(name: str) -> torch.dtype:
    """float32, bfloat16, float16 or float64. Raises `ValueError` for another name."""
    dtypes = {str(d).removeprefix("torch."): d for d in _DTYPES}
    if name not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    name: str, dtype: torch.dtype, device: torch.device
) -> tuple[TemporalVAE, ModelRecord]:
    """A model in a dtype, and what files record of it: of the weights before they were rounded."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    model = TemporalVAE.from_pretrained(name, dtype=wide)
    is_path = name not in pretrained.builtin_names() and os.path.exists(name)
    record = model.latent_record(Path(name).resolve().name if is_path else name)
    return model.to(device=device, dtype=dtype), record


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


def reader_options(
    *,
    start: str | None,
    frames: int | None,
    stride: int | None,
    fps: str | None,
    size: str | None,
    crop: str | None,
    alpha: str | None,
    raw: str | None = None,
) -> Options:
    """Those that were given, checked against each other; see `Selection`.

    Raises `ValueError` for what cannot be read, or cannot be.
    """
    found = {
        "start": None if start is None else seconds(start),
        "frames": frames,
        "stride": stride,
        "fps": None if fps is None else rate(fps),
        "size": None if size is None else sides(size),
        "crop": None if crop is None else cut(crop),
        "alpha": alpha,
        "raw": None if raw is None else bare(raw),
    }
    options = cast(Options, {name: value for name, value in found.items() if value is not None})
    Selection(**options)
    return options


def seconds(text: str) -> Fraction:
    """Seconds, or minutes and hours before them: 2.5, 1:02.5, 1:00:02."""
    parts = re.fullmatch(r"(?:(?:([0-9]+):)?([0-9]+):)?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)", text)
    if parts is None:
        raise ValueError(f"--start takes seconds, or [hours:]minutes:seconds, got {text!r}")
    hours, minutes, rest = parts.groups()
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + Fraction(rest)


def rate(text: str) -> Fraction:
    """Frames per second: 25, 29.97 or 30000/1001."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?|[0-9]+/[0-9]*[1-9][0-9]*", text):
        raise ValueError(f"--fps takes a number or a fraction such as 30000/1001, got {text!r}")
    return Fraction(text)


def sides(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT as (height, width)."""
    parts = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if parts is None:
        raise ValueError(f"--size takes WIDTHxHEIGHT, such as 640x360, got {text!r}")
    return int(parts[2]), int(parts[1])


def bare(text: str) -> Raw:
    """WIDTHxHEIGHT@FPS as (height, width, frames per second)."""
    size, at, fps = text.partition("@")
    try:
        return (*sides(size), rate(fps if at else ""))
    except ValueError as error:
        raise ValueError(
            f"--raw takes WIDTHxHEIGHT@FPS, such as 640x360@25, got {text!r}"
        ) from error


def cut(text: str) -> str | tuple[int, int, int, int]:
    """WIDTHxHEIGHT+X+Y as (top, left, height, width), or "centre"."""
    if text in ("centre", "center"):
        return "centre"
    parts = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})\+([0-9]{1,6})\+([0-9]{1,6})", text)
    if parts is None:
        raise ValueError(
            f"--crop takes centre, or WIDTHxHEIGHT+X+Y from the upper left corner, got {text!r}"
        )
    width, height, left, top = map(int, parts.groups())
    return top, left, height, width
