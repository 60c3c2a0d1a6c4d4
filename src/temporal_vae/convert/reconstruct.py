"""What the commands do, as functions: files in, files out."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Literal

from temporal_vae.convert import chunks, ends
from temporal_vae.convert import origin as origins
from temporal_vae.convert.memory import PiecePlanner, frames_at_once
from temporal_vae.latents import ModelRecord
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Format, Options, VideoError, choose, tag_notes
from temporal_vae.walks.budget import Budget, memory_budget


def origin(
    target: str | os.PathLike[str],
    model: TemporalVAE,
    record: ModelRecord,
    clip_frames: int | Literal["all"] | None = None,
    options: Options | None = None,
    format: Format | None = None,
) -> origins.Origin:
    """What decides the video that `reconstruct` makes, but for the source."""
    length = origins.length_as_typed(chunks.clip_length(model, clip_frames))
    chosen = origins.options_as_typed(dtype=model.dtype, clip_frames=length, **(options or {}))
    its = {half: str(getattr(record, half)) for half in ("encoder_sha256", "decoder_sha256")}
    return origins.Origin(model=its, options=chosen | origins.format_as_typed(target, format))


def reconstruct(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    model: TemporalVAE,
    clip_frames: int | Literal["all"] | None = None,
    progress: ends.Progress | None = None,
    memory: Budget = None,
    options: Options | None = None,
    format: Format | None = None,
    *,
    overwrite: bool = True,
    record: ModelRecord | None = None,
    opening: ends.Opening | None = None,
) -> ends.Summary:
    """Encode a video to the posterior mean, decode it, and write the result.

    Frame count, size and timestamps are kept: frames are padded to whole latent cells by repeating
    their edge, and where a latent holds several frames the last one is repeated to fill it; both
    are cropped back. `options` choose frames and a part of them, see `Selection`;
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
    With the `record` of the model a comment in the file says what it was made of, and how.
    `opening` gives the video where it is opened elsewhere, see `ReadAhead`.

    Raises `VideoError` for a source that cannot be read or a target that cannot be written,
    `ValueError` for memory that cannot do.
    """
    exist = os.path.exists(source) and os.path.exists(target)
    if exist and os.path.samefile(source, target):
        raise VideoError(f"{os.fspath(source)} would be overwritten by its reconstruction")
    options = options or {}
    output = ends.VideoTarget.checked(target, format, model, options.get("alpha"), overwrite)
    length, limit = chunks.clip_length(model, clip_frames), memory_budget(memory, model.device)
    start = time.monotonic()
    opened = opening() if opening else ends.open_video(source, model, options)
    comment = None
    if record is not None:
        made = origin(target, model, record, clip_frames, options, format)
        comment = replace(made, source=opened.sha256).comment
    with (
        opened.reader as reader,
        ends.copied_streams(source, reader, options) as copied,
    ):
        (height, width), ratio = reader.size, reader.sample_aspect_ratio
        info = replace(reader.info, height=height, width=width, sample_aspect_ratio=ratio)
        at_once = frames_at_once(reader.info.path, reader.size, limit)
        frames, known = chunks.counted(ends.timed(reader), at_once)
        planner = PiecePlanner(
            model, ("encode", "decode"), reader.size, limit, length, known, info.bit_depth
        )
        latents = chunks.encode_walk(frames, planner)
        walk = chunks.decode_walk(latents, planner, output.depth(info.bit_depth))
        done, lost = output.write(walk, info, progress, copied, comment)
    settled = set() if copied is None else set(copied.settled)
    if choose(target, output.format).in_container:
        settled |= set(tag_notes(info.colour))
    notes = [note for note in reader.notes if note not in settled] + lost
    return ends.Summary.since(start, done, length, notes)
