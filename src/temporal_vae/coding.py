"""A video to a file of latents, and back."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from temporal_vae import checkpoint
from temporal_vae.app import (
    Progress,
    Summary,
    in_channels,
    open_reader,
    refuse_existing,
    timed,
    written_channels,
)
from temporal_vae.files import atomic_path
from temporal_vae.geometry import Padding
from temporal_vae.latents import (
    LatentFile,
    LatentFileError,
    LatentInfo,
    LatentWriter,
    ModelRecord,
    check_target,
    record_fields,
)
from temporal_vae.model import TemporalVAE
from temporal_vae.video import (
    PIPE,
    Alpha,
    Colour,
    Format,
    Options,
    VideoReader,
    VideoWriter,
    check_suffix,
    depth_for,
    depth_notes,
    tag_notes,
    writable,
)
from temporal_vae.walking import clip_length, decode_walk, encode_walk, memory_budget
from temporal_vae.walks.plan import Budget

COLOUR_TAGS = ("matrix", "primaries", "range", "transfer")
"""Of `Colour`, that a file of latents keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How `encode` walks a video, and what it stores. Raises `ValueError` for what cannot be."""

    sample: bool = False
    """A latent drawn from the posterior, instead of its moments."""
    seed: int | None = None
    """Of a sample; None draws one, which the file records."""
    dtype: torch.dtype | None = None
    """Of the file; None means the model's, which rounds nothing."""
    scaled: bool = False
    """Store latents as `scale_latent` gives them."""
    clip_frames: int | Literal["all"] | None = None
    """See `reconstruct`."""
    memory: Budget = None
    """See `reconstruct`."""

    def __post_init__(self) -> None:
        if self.seed is not None and not self.sample:
            raise ValueError("a seed is for a sample: give --sample too")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number in [0, 2**63), got {self.seed}")


@dataclass(frozen=True, slots=True)
class Encoded:
    """What `encode` wrote."""

    info: LatentInfo
    bytes: int
    seconds: float
    notes: tuple[str, ...]


def model_of(path: str | os.PathLike[str]) -> str:
    """The built-in model that a file of latents names. Raises `LatentFileError` for another one."""
    with LatentFile(path) as file:
        if file.info.model in checkpoint.builtin_names():
            return str(file.info.model)
        raise LatentFileError(
            f"{file.path} was encoded by {file.info.model or 'a model that it does not name'}, "
            "which is not a built-in one: name it with --model"
        )


def encode(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    model: TemporalVAE,
    record: ModelRecord,
    how: Encoding | None = None,
    *,
    options: Options | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Encoded:
    """Encode a video to a file of latents, in memory that does not grow with its length.

    Walks as `reconstruct` does, by the same `options`, and records what `decode` needs to give back
    the same frames. With a decoder as well, the picture is that of `reconstruct`. `target` appears
    whole or not at all.

    Raises `VideoError` for a source that cannot be read, `LatentFileError` for a target that cannot
    be written, `ValueError` for memory that cannot do.
    """
    how = how or Encoding()
    check_target(target, overwrite)
    length, budget = clip_length(model, how.clip_frames), memory_budget(how.memory, model)
    start, done = time.monotonic(), 0
    generator = _generator(how.sample, how.seed)
    with (
        open_reader(source, model, options) as reader,
        _checksum(source) as checksum,
        atomic_path(target) as partial_file,
        LatentWriter(
            partial_file, _latent_info(reader, model, record, how, length, generator)
        ) as writer,
    ):
        walk = encode_walk(timed(reader), model, length, reader.size, budget, generator)
        for latents in walk.latents:
            if latents is not None:
                count = latents.shape[2]
                stamps = [walk.stamps.popleft() for _ in range(count)]
                writer.write(writer.unscaled.rescale(latents, how.scaled), stamps)
                done += count
            if progress is not None:
                progress(done + len(walk.stamps) // 2, reader.info.expected_frames)
        info = writer.finish(source_sha256=checksum())
        kept = tag_notes(reader.info.colour)  # which the header has
        notes = [f"{os.fspath(source)}: {note}" for note in reader.notes if note not in kept]
    if info.source_sha256 is None:
        notes.append(f"{os.fspath(source)} is no file, so it has no checksum in the latents")
    return Encoded(info, os.path.getsize(target), time.monotonic() - start, tuple(notes))


def decode(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    model: TemporalVAE,
    record: ModelRecord,
    *,
    sample: bool = False,
    seed: int | None = None,
    any_model: bool = False,
    alpha: Alpha | None = None,
    format: Format | None = None,
    memory: Budget = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Decode a file of latents to a video of the frame count, size and timestamps it was made of.

    Of moments the mean is decoded, or with `sample` a draw by `seed`. Clips are those of the file.
    `alpha` "drop" lets go of the alpha that a model of four channels gives.
    `format` says more than its name of how `target` is written; frames are as deep as those that
    were encoded where that can be. `target` appears whole or not at all; "-" is standard output.

    Raises `LatentFileError` for a file that is damaged, or of another model unless `any_model`;
    `VideoError` for a target that cannot be written, `ValueError` for memory that cannot do.
    """
    format = format or Format()
    check_suffix(target, format)
    if not overwrite:
        refuse_existing(target)
    channels = written_channels(target, format, model, alpha)
    generator = _generator(sample, Encoding(sample=sample, seed=seed).seed)
    start, done, budget = time.monotonic(), 0, memory_budget(memory, model)
    with LatentFile(source) as file, writable(target, format) as partial_file:
        info = file.info
        notes = _compare(file, model, record, any_model)
        if sample and info.kind == "sample":
            raise LatentFileError(f"{file.path} holds a sample already: nothing is drawn")
        read = partial(file.latents, sample_mode=sample, generator=generator)
        length = info.clip_frames or (None if model.decode_reach is not None else info.frames)
        notes += depth_notes(target, format, info.bit_depth or 8)
        format = replace(format, depth=depth_for(target, format, info.bit_depth or 8))
        cells, depth = (info.rows, info.columns), 8 if format.depth == 8 else 16
        frames = decode_walk(read, info.frames, model, length, cells, budget, depth)
        shape = (info.height, info.width, info.fps, info.time_base, info.sample_aspect_ratio)
        colour = colour_of(info) if info.colour else None
        with VideoWriter(
            partial_file, *shape, channels=channels, format=format, colour=colour
        ) as writer:
            for images in frames:
                stamps = file.timestamps(done, len(images)) if len(images) else []
                for image, stamp in zip(in_channels(images, channels), stamps, strict=True):
                    writer.write(image[: info.height, : info.width], stamp)
                done += len(images)
                if progress is not None:
                    progress(done, info.frames)
            if info.sample_aspect_ratio not in (None, 1) and not writer.keeps_aspect:
                notes.append(
                    f"the shape of its pixels, {info.sample_aspect_ratio}, is kept in .mp4 only"
                )
        if done != info.frames:
            raise LatentFileError(f"{file.path}: {done} frames came of {info.frames}")
    notes = [f"{os.fspath(source)}: {note}" for note in notes + writer.notes]
    return Summary(done, time.monotonic() - start, info.clip_frames, tuple(notes))


def _generator(sample: bool, seed: int | None) -> torch.Generator | None:
    """What draws samples, by a seed of its own if there is none; None for moments and means."""
    if not sample:
        return None
    return torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)


def _latent_info(
    reader: VideoReader,
    model: TemporalVAE,
    record: ModelRecord,
    how: Encoding,
    length: int | None,
    generator: torch.Generator | None,
) -> LatentInfo:
    """The header of a video's latents, as far as it is known before the first frame."""
    factor, video = model.downsample_factor, reader.info
    height, width = reader.size
    padding = Padding.to_cells(height, width, factor)
    name = os.path.basename(video.path)
    return LatentInfo(
        kind="moments" if generator is None else "sample",
        dtype=how.dtype or model.dtype,
        frames=1,
        channels=model.latent_channels,
        rows=padding.padded[0] // factor,
        columns=padding.padded[1] // factor,
        height=height,
        width=width,
        padding_bottom=padding.rows,
        padding_right=padding.columns,
        scaled=how.scaled,
        fps=video.fps,
        time_base=video.time_base,
        sample_aspect_ratio=reader.sample_aspect_ratio,
        colour=colour_fields(video.colour),
        bit_depth=video.bit_depth,
        clip_frames=None if length in (None, sys.maxsize) else length,
        seed=None if generator is None else generator.initial_seed(),
        source=None if name == PIPE else os.fsencode(name).decode(errors="replace"),
        **record_fields(record),
    )


def colour_fields(colour: Colour) -> tuple[tuple[str, str], ...]:
    """A source's colours as the header of its latents has them."""
    return tuple((name, str(getattr(colour, name))) for name in COLOUR_TAGS)


def colour_of(info: LatentInfo) -> Colour:
    """The source's colours of a file of latents; what it does not say, or not so, is unknown."""
    known: dict[str, Any] = {
        name: int(text)
        for name, text in info.colour
        if name in COLOUR_TAGS and re.fullmatch("[0-9]{1,3}", text)
    }
    return Colour(**known)


def _compare(
    file: LatentFile, model: TemporalVAE, record: ModelRecord, any_model: bool
) -> list[str]:
    """Refuse latents of another latent space; notes on what else differs.

    The encoder decides what latents mean: a decoder that was trained on may decode them.
    """
    info = file.info
    theirs = f"{info.model or 'another model'} (encoder {info.encoder_sha256 or '?':.12})"
    ours = f"{record.name or 'this model'} ({record.encoder_sha256 or '?':.12})"
    cells = (info.channels, info.downsample_factor)
    if cells != (model.latent_channels, model.downsample_factor):
        raise LatentFileError(
            f"{file.path} was encoded by {theirs}: {cells[0]} channels for {cells[1]}x{cells[1]} "
            f"pixels, where {ours} takes {model.latent_channels} for {model.downsample_factor}"
            f"x{model.downsample_factor}: decode it with its own model"
        )
    if info.encoder_sha256 is None:
        return ["it does not say which encoder made it"]
    if info.encoder_sha256 != record.encoder_sha256:
        if not any_model:
            raise LatentFileError(
                f"{file.path} was encoded by {theirs}, not by {ours}: decode it with that model, "
                "or give --any-model if both have one latent space"
            )
        return [f"it was encoded by {theirs}, and is decoded by {ours}"]
    if info.decoder_sha256 not in (None, record.decoder_sha256):
        return ["the decoder is another one than was beside the encoder"]
    return []


@contextmanager
def _checksum(source: str | os.PathLike[str]) -> Iterator[Callable[[], str | None]]:
    """SHA-256 of a file, taken by a thread in the meantime; None of what is no file."""
    if not os.path.isfile(source):
        yield lambda: None
        return
    ended = threading.Event()

    def take() -> str:
        digest = hashlib.sha256()
        with open(source, "rb") as file:
            while not ended.is_set() and (block := file.read(2**20)):
                digest.update(block)
        return digest.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(take).result
        finally:
            ended.set()
