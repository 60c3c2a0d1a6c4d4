"""A file of latents to a video."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from functools import partial
from typing import Any

from temporal_vae.checkpoints import pretrained
from temporal_vae.convert.chunks import decode_walk
from temporal_vae.convert.encode import Encoding, sample_generator
from temporal_vae.convert.ends import (
    COLOUR_TAGS,
    Progress,
    Summary,
    in_channels,
    refuse_existing,
    written_channels,
)
from temporal_vae.convert.memory import memory_budget
from temporal_vae.latents import LatentFile, LatentFileError, LatentInfo, ModelRecord
from temporal_vae.model import TemporalVAE
from temporal_vae.video import (
    Alpha,
    Colour,
    Format,
    VideoWriter,
    check_suffix,
    depth_for,
    depth_notes,
    writable,
)
from temporal_vae.walks.budget import Budget


def model_of(path: str | os.PathLike[str]) -> str:
    """The built-in model that a file of latents names. Raises `LatentFileError` for another one."""
    with LatentFile(path) as file:
        if file.info.model in pretrained.builtin_names():
            return str(file.info.model)
        raise LatentFileError(
            f"{file.path} was encoded by {file.info.model or 'a model that it does not name'}, "
            "which is not a built-in one: name it with --model"
        )


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
    generator = sample_generator(sample, Encoding(sample=sample, seed=seed).seed)
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
