"""What the commands do, as functions: files in, files out."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import Literal

from temporal_vae.convert.chunks import clip_length, start_walk
from temporal_vae.convert.ends import (
    Progress,
    Summary,
    copied_streams,
    in_channels,
    open_reader,
    refuse_existing,
    timed,
    written_channels,
)
from temporal_vae.convert.memory import memory_budget
from temporal_vae.model import TemporalVAE
from temporal_vae.video import (
    Format,
    Options,
    VideoError,
    VideoWriter,
    check_suffix,
    depth_for,
    depth_notes,
    tag_notes,
    writable,
)
from temporal_vae.walks.budget import Budget


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
