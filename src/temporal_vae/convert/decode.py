"""A file of latents to a video."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from temporal_vae.checkpoints import pretrained
from temporal_vae.convert import chunks, ends
from temporal_vae.convert import origin as origins
from temporal_vae.convert.encode import Encoding
from temporal_vae.convert.memory import PiecePlanner
from temporal_vae.latents import LatentFile, LatentFileError, LatentInfo, ModelRecord
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Alpha, Colour, Format, VideoInfo
from temporal_vae.video.write.to_yuv import STANDARD
from temporal_vae.walks.budget import Budget, memory_budget


def model_of(path: str | os.PathLike[str]) -> str:
    """The built-in model that a file of latents names. Raises `LatentFileError` for another one."""
    with LatentFile(path) as file:
        if file.info.model in pretrained.builtin_names():
            return str(file.info.model)
        raise LatentFileError(
            f"{file.path} was encoded by {file.info.model or 'a model that it does not name'}, "
            "which is not a built-in one: name it with --model"
        )


def origin(
    target: str | os.PathLike[str], model: TemporalVAE, record: ModelRecord, *,
    sample: bool = False, seed: int | None = None, alpha: Alpha | None = None,
    format: Format | None = None,
) -> origins.Origin:  # fmt: skip
    """What decides the video that `decode` makes, but for the source."""
    chosen = origins.options_as_typed(dtype=model.dtype, sample=sample, seed=seed, alpha=alpha)
    its = {"decoder_sha256": str(record.decoder_sha256)}
    return origins.Origin(model=its, options=chosen | origins.format_as_typed(target, format))


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
    progress: ends.Progress | None = None,
) -> ends.Summary:
    """Decode a file of latents to a video of the frame count, size and timestamps it was made of.

    Of moments the mean is decoded, or with `sample` a draw by `seed`. Clips are those of the file.
    `alpha` "drop" lets go of the alpha that a model of four channels gives.
    `format` says more than its name of how `target` is written; frames are as deep as those that
    were encoded where that can be. `target` appears whole or not at all; "-" is standard output.

    Raises `LatentFileError` for a file that is damaged, or of another model unless `any_model`;
    `VideoError` for a target that cannot be written, `ValueError` for memory that cannot do.
    """
    output = ends.VideoTarget.checked(target, format, model, alpha, overwrite)
    generator = Encoding(sample=sample, seed=seed).generator()
    start, limit = time.monotonic(), memory_budget(memory, model.device)
    made = origin(target, model, record, sample=sample, seed=seed, alpha=alpha, format=format)
    with LatentFile(source) as file:
        info = file.info
        notes = _compare(file, model, record, any_model)
        clip = info.clip_frames or (None if model.decode_reach is not None else info.frames)
        planner = PiecePlanner(
            model, ("decode",), (info.height, info.width), limit, clip, info.frames,
            info.bit_depth or 8,
        )  # fmt: skip
        latents, shown = _stored(file, planner, generator), _video_info(file)
        walk = chunks.decode_walk(latents, planner, output.depth(shown.bit_depth))
        done, lost = output.write(walk, shown, progress, comment=made.of(source).comment)
    return ends.Summary.since(start, done, info.clip_frames, notes + lost)


def _video_info(file: LatentFile) -> VideoInfo:
    """What a file of latents says of the video that it was made of."""
    info = file.info
    return VideoInfo(
        file.path, info.width, info.height, info.fps, info.time_base, codec="", pixel_format="",
        frames=info.frames, sample_aspect_ratio=info.sample_aspect_ratio,
        bit_depth=info.bit_depth or 8, colour=colour_of(info) if info.colour else STANDARD,
    )  # fmt: skip


def _stored(
    file: LatentFile, planner: PiecePlanner, generator: torch.Generator | None
) -> chunks.Walk[Tensor]:
    """The latents of a file, in the pieces of a planner."""
    stamps: deque[int] = deque()
    model, sampled = planner.model, generator is not None

    def pieces() -> Iterator[Tensor]:
        first = read = 0
        for length in planner.lengths():
            frames = min(length, file.info.frames - first)
            if not frames:
                break
            count, _ = planner.filled(frames, first == 0)
            stamps.extend(file.timestamps(first, frames))
            latents = file.latents(read, count, sample_mode=sampled, generator=generator)
            yield latents.to(model.device, model.dtype)
            first, read = first + frames, read + count

    return chunks.Walk(pieces(), stamps, planner)


def colour_of(info: LatentInfo) -> Colour:
    """The source's colours of a file of latents; what it does not say, or not so, is unknown."""
    tags = {name: int(text) for name, text in info.colour if re.fullmatch("[0-9]{1,3}", text)}
    primaries, transfer, matrix = (
        tags.get(name, 2) for name in ("primaries", "transfer", "matrix")
    )
    return Colour(primaries, transfer, matrix, tags.get("range", 0))


def _cells(channels: int, frames: int, side: int) -> str:
    """What a latent cell is, in words."""
    together = f"{frames} frames of " if frames > 1 else ""
    return f"{channels} channels for {together}{side}x{side} pixels"


def _scaling(record: LatentInfo | ModelRecord) -> str:
    """How latents are scaled, in words."""
    if record.latent_std is None:
        return "by one factor for all channels"
    return "by a mean and a deviation of each channel"


def _compare(
    file: LatentFile, model: TemporalVAE, record: ModelRecord, any_model: bool
) -> list[str]:
    """Refuse latents of another latent space; notes on what else differs.

    The encoder decides what latents mean: a decoder that was trained on may decode them.
    """
    info = file.info
    theirs = f"{info.model or 'another model'} (encoder {info.encoder_sha256 or '?':.12})"
    ours = f"{record.name or 'this model'} ({record.encoder_sha256 or '?':.12})"
    cells = _cells(info.channels, info.frames_per_latent, info.downsample_factor)
    own = _cells(model.latent_channels, model.frames_per_latent, model.downsample_factor)
    if cells != own:
        raise LatentFileError(
            f"{file.path} was encoded by {theirs}: {cells}, where {ours} takes {own}: decode it "
            "with its own model"
        )
    if info.scaled and (info.latent_std is None) != (record.latent_std is None) and not any_model:
        raise LatentFileError(
            f"{file.path} was scaled {_scaling(info)}, but the latents of {ours} are scaled "
            f"{_scaling(record)}: scale them as their model does, or give --any-model"
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
