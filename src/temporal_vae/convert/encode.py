"""A video to a file of latents, and back."""

from __future__ import annotations

import os
import secrets
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from temporal_vae.convert import chunks, ends
from temporal_vae.convert import origin as origins
from temporal_vae.convert.memory import PiecePlanner, frames_at_once
from temporal_vae.files.atomic import atomic_path
from temporal_vae.geometry import Padding
from temporal_vae.latents import LatentInfo, LatentWriter, ModelRecord, check_target, record_fields
from temporal_vae.model import TemporalVAE
from temporal_vae.video import PIPE, Options, VideoReader, tag_notes
from temporal_vae.walks.budget import Budget, memory_budget

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

    def generator(self) -> torch.Generator | None:
        """What draws samples, by a seed of its own if there is none; None for moments and means."""
        if not self.sample:
            return None
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed)


def origin(
    model: TemporalVAE, record: ModelRecord, how: Encoding, options: Options | None = None
) -> origins.Origin:
    """What decides the latents that `encode` makes, but for the source."""
    length = origins.length_as_typed(chunks.clip_length(model, how.clip_frames))
    chosen = origins.options_as_typed(
        dtype=model.dtype, latent_dtype=how.dtype or model.dtype, sample=how.sample, seed=how.seed,
        scaled=how.scaled, clip_frames=length, **(options or {}),
    )  # fmt: skip
    return origins.Origin(model=origins.encoder_of(record), options=chosen)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What `encode` wrote."""

    info: LatentInfo
    bytes: int
    seconds: float
    notes: tuple[str, ...]


def encode(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    model: TemporalVAE,
    record: ModelRecord,
    how: Encoding | None = None,
    *,
    options: Options | None = None,
    overwrite: bool = False,
    progress: ends.Progress | None = None,
    opening: ends.Opening | None = None,
) -> Encoded:
    """Encode a video to a file of latents, in memory that does not grow with its length.

    Walks as `reconstruct` does, by the same `options`, and records what `decode` needs to give back
    the same frames. With a decoder as well, the picture is that of `reconstruct`. `target` appears
    whole or not at all. `opening` gives the video where it is opened elsewhere, see `ReadAhead`.

    Raises `VideoError` for a source that cannot be read, `LatentFileError` for a target that cannot
    be written, `ValueError` for memory that cannot do.
    """
    how = how or Encoding()
    check_target(target, overwrite)
    limit = memory_budget(how.memory, model.device)
    length, generator = chunks.clip_length(model, how.clip_frames), how.generator()
    start = time.monotonic()
    opened = opening() if opening else ends.open_video(source, model, options)
    made = replace(origin(model, record, how, options), source=opened.sha256)
    with (
        opened.reader as reader,
        atomic_path(target, overwrite) as path,
        LatentWriter(
            path, _latent_info(reader, model, record, how, length, generator, made)
        ) as writer,
    ):
        at_once = frames_at_once(reader.info.path, reader.size, limit)
        frames, known = chunks.counted(ends.timed(reader), at_once)
        planner = PiecePlanner(
            model, ("encode",), reader.size, limit, length, known, reader.info.bit_depth
        )
        walk = chunks.encode_walk(frames, planner, generator, moments=generator is None)

        def write(latents: Tensor) -> int:
            stamps = walk.take(latents.shape[2] * model.frames_per_latent)
            writer.write(writer.unscaled.rescale(latents, how.scaled), stamps)
            return len(stamps)

        ends.write_pieces(walk, write, progress, reader.info.expected_frames)
        info = writer.finish()
        kept = tag_notes(reader.info.colour)  # which the header has
        notes = [note for note in reader.notes if note not in kept]
    if info.source_sha256 is None:
        notes.append("it can be read only once, so it has no checksum in the latents")
    return Encoded(info, os.path.getsize(target), time.monotonic() - start, tuple(notes))


def _latent_info(
    reader: VideoReader,
    model: TemporalVAE,
    record: ModelRecord,
    how: Encoding,
    length: int | None,
    generator: torch.Generator | None,
    made: origins.Origin,
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
        colour=tuple((name, str(getattr(video.colour, name))) for name in COLOUR_TAGS),
        bit_depth=video.bit_depth,
        clip_frames=None if length in (None, sys.maxsize) else length,
        seed=None if generator is None else generator.initial_seed(),
        source=None if name == PIPE else os.fsencode(name).decode(errors="replace"),
        source_sha256=made.source,
        options=made.options_text,
        **record_fields(record),
    )
