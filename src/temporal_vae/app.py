"""What the commands do, as functions: files in, files out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from temporal_vae import checkpoint
from temporal_vae.latents import ModelRecord
from temporal_vae.model import TemporalVAE
from temporal_vae.video import (
    PIPE,
    Alpha,
    CopiedStreams,
    Format,
    Frame,
    Image,
    Options,
    VideoError,
    VideoReader,
    VideoWriter,
    check_suffix,
    choose,
    depth_for,
    depth_notes,
    tag_notes,
    writable,
)
from temporal_vae.video.copying import NOT_COPIED
from temporal_vae.walking import clip_length, memory_budget, start_walk
from temporal_vae.walks.plan import Budget

Progress = Callable[[int, int | None], None]
"""Called with the frames done, one on the way counting half, and the frames the file claims."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did."""

    frames: int
    seconds: float
    clip_frames: int | None
    """Frames of each clip; None when the video was taken as one."""
    notes: tuple[str, ...]
    """What was not carried over, or could not be read; a line each."""


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
    is_path = name not in checkpoint.builtin_names() and os.path.exists(name)
    record = model.latent_record(Path(name).resolve().name if is_path else name)
    return model.to(device=device, dtype=dtype), record


def reconstruct(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    model: TemporalVAE,
    clip_frames: int | Literal["all"] | None = None,
    progress: Progress | None = None,
    memory: Budget = None,
    options: Options | None = None,
    format: Format | None = None,
    *,
    overwrite: bool = True,
) -> Summary:
    """Encode a video to the posterior mean, decode it, and write the result.

    Frame count, size and timestamps are kept: frames are padded to whole latent cells by repeating
    their edge, and cropped back. `options` choose frames and a part of them, see `Selection`;
    timestamps are counted from their `start`. The video is one clip, streamed, so that its length
    changes neither the result nor the memory. A model with a norm over the clip cannot stream: it
    walks clips of its own length. `clip_frames` cuts any model's video into clips of that length,
    or with "all" takes it as one.
    `memory` bounds what the model takes over its weights, reserved before the first frame: bytes,
    words such as "2GiB", "auto" for most of what is free, None for no bound; it never changes the
    result. `target` appears whole or not at all; "-" is standard input, and standard output.
    One that exists is replaced, unless `overwrite` is False.
    `format` says more than its name of how it is written; a source deeper than 8 bits is written as
    deep where that can be. Its colours' tags, its sound and its subtitles are passed on.

    Raises `VideoError` for a source that cannot be read or a target that cannot be written,
    `ValueError` for memory that cannot do.
    """
    format = format or Format()
    check_suffix(target, format)
    exist = os.path.exists(source) and os.path.exists(target)
    if exist and os.path.samefile(source, target):
        raise VideoError(f"{os.fspath(source)} would be overwritten by its reconstruction")
    if not overwrite:
        refuse_existing(target)
    channels = written_channels(target, format, model, (options or {}).get("alpha"))
    length, budget = clip_length(model, clip_frames), memory_budget(memory, model)
    start, done = time.monotonic(), 0
    with (
        open_reader(source, model, options) as reader,
        copied_streams(source, reader, options or {}) as copied,
        writable(target, format) as partial,
    ):
        info, ratio = reader.info, reader.sample_aspect_ratio
        size, rate = reader.size, (info.fps, info.time_base)
        lost = depth_notes(target, format, info.bit_depth)
        format = replace(format, depth=depth_for(target, format, info.bit_depth))
        depth = 8 if format.depth == 8 else 16
        walk = start_walk(timed(reader), model, length, size, budget, depth)
        with VideoWriter(
            partial, *size, *rate, ratio, channels=channels, format=format, colour=info.colour,
            copied=copied,
        ) as writer:  # fmt: skip
            for images in walk.frames:
                for image in in_channels(images, channels):
                    writer.write(image[: size[0], : size[1]], walk.stamps.popleft())
                done += len(images)
                if progress is not None:  # a frame taken in, and not given yet, is half done
                    progress(done + len(walk.stamps) // 2, info.expected_frames)
            if ratio not in (None, 1) and not writer.keeps_aspect:
                reader.notes.append(f"the shape of its pixels, {ratio}, is kept in .mp4 only")
        settled = set(tag_notes(info.colour) if writer.keeps_tags else ())
        settled |= set() if copied is None else copied.settled
        notes = [note for note in reader.notes if note not in settled] + lost + writer.notes
    cut = None if length == sys.maxsize else length
    told = tuple(f"{os.fspath(source)}: {note}" for note in notes)
    return Summary(done, time.monotonic() - start, cut, told)


def refuse_existing(target: str | os.PathLike[str]) -> None:
    """Raise `VideoError` where a file would be replaced that was not said to be."""
    if os.fspath(target) != PIPE and os.path.exists(target):
        raise VideoError(f"{os.fspath(target)} exists: give --overwrite to replace it")


def open_reader(
    source: str | os.PathLike[str], model: TemporalVAE, options: Options | None = None
) -> VideoReader:
    """A reader of the pixels that a model takes: grey, RGB, or RGB and alpha.

    Raises `VideoError` where an alpha channel is to be kept that the model has no place for.
    """
    asked: Options = {**(options or {}), "channels": model.input_channels}
    if asked.get("alpha") == "keep" and model.input_channels != 4:
        raise VideoError(
            f"the model takes {model.input_channels} channels, none of them alpha: take one with "
            "input_channels=4, or --alpha drop"
        )
    if model.input_channels == 4:
        asked["alpha"] = None  # it is the fourth channel, and needs no plane of its own
    return VideoReader(source, **asked)


def copied_streams(
    source: str | os.PathLike[str], reader: VideoReader, options: Options
) -> AbstractContextManager[CopiedStreams | None]:
    """Sound and subtitles of the frames that were asked for; none where their rate is another."""
    if options.get("stride", 1) != 1 or options.get("fps") is not None:
        if any(note.endswith(NOT_COPIED) for note in reader.notes):
            reader.notes.append("sound and subtitles are left out, as frames are at another rate")
        return nullcontext()
    if options.get("raw") is not None:  # there is nothing else in it
        return nullcontext()
    skipped = reader.begin * reader.info.time_base
    start = Fraction(reader.info.start) + skipped - reader.shift if skipped else None
    ends = options.get("frames") is not None
    return CopiedStreams(source, start, shift=reader.shift - skipped, to_last_frame=ends)


def written_channels(
    target: str | os.PathLike[str], format: Format, model: TemporalVAE, alpha: Alpha | None
) -> int:
    """3, or 4 where the model gives alpha, and `alpha` does not say to drop it.

    Raises `VideoError` where it would get lost in silence.
    """
    if model.input_channels != 4 or alpha == "drop":
        return 3
    if not choose(target, format).codec.alpha:
        raise VideoError(
            f"{os.fspath(target)} has no place for the alpha channel that the model gives: take "
            ".mkv (FFV1) or a folder of PNG, or --alpha drop, which writes the colours alone"
        )
    return 4


def timed(reader: VideoReader) -> Iterator[Frame]:
    """Its frames, with timestamps that are counted from the `start` that was asked for."""
    begin = reader.begin
    return (replace(frame, pts=frame.pts - begin) for frame in reader)


def in_channels(images: Image, channels: int) -> Image:
    """(n, H, W, C) as a model gives them -> (n, H, W, channels) as written: grey in each."""
    return np.repeat(images, channels, 3) if images.shape[3] == 1 else images[..., :channels]
