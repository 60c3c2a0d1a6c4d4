"""What a file was made of, by which model, and how: kept in the file, and compared later.

A file of latents keeps it in its header, a video in the comment of its container.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Self

import torch

from temporal_vae import video
from temporal_vae.files.streams import sha256_of
from temporal_vae.latents import SUFFIX, LatentFile, LatentFileError, ModelRecord, record_fields
from temporal_vae.video.read.images import image_files

TITLE = "temporal-vae "
"""How the comment of a video begins; JSON follows."""


class OriginError(ValueError):
    """A file that was made otherwise than it would be now, or does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What decides the contents of a file, to rounding."""

    source: str | None = None
    """SHA-256 of the source's bytes, see `checksum`; None where they cannot be read twice."""
    model: Mapping[str, str]
    """What there is to compare of the model, by name."""
    options: Mapping[str, str]
    """What was chosen and is not the default, as the command takes it."""

    def of(self, source: str | os.PathLike[str]) -> Self:
        """The same for a source, whose bytes are read once."""
        return replace(self, source=checksum(source))

    @property
    def options_text(self) -> str:
        """The options as one line of JSON."""
        return json.dumps(dict(self.options), sort_keys=True)

    @property
    def comment(self) -> str:
        """All of it as the comment of a video."""
        parts = {"source_sha256": self.source, **self.model, "options": dict(self.options)}
        return TITLE + json.dumps(parts, sort_keys=True)


def options_as_typed(**options: Any) -> dict[str, str]:
    """Options as text, those left out that are None or False, or say what is the default."""
    return {
        name.replace("_", "-"): _typed(name, value)
        for name, value in options.items()
        if not (value is None or value is False or (name, value) in (("start", 0), ("stride", 1)))
    }


def _typed(name: str, value: Any) -> str:
    match name, value:
        case "size", (height, width):
            return f"{width}x{height}"
        case "crop", (top, left, height, width):
            return f"{width}x{height}+{left}+{top}"
        case "raw", (height, width, rate):
            return f"{width}x{height}@{rate}"
        case _, torch.dtype():
            return str(value).removeprefix("torch.")
        case _, float() if name in ("start", "fps"):
            return str(Fraction(value))
    return "yes" if value is True else str(value)


def format_as_typed(path: str | os.PathLike[str], format: video.Format | None) -> dict[str, str]:
    """How a video is written under a name, as options."""
    chosen = video.choose(path, format)
    depth = None if format is None else format.depth
    return options_as_typed(codec=chosen.name, depth=depth, quality=chosen.quality)


def length_as_typed(clip_frames: int | None) -> int | str | None:
    """The length of clips as an option; None for one clip that streams."""
    return "all" if clip_frames == sys.maxsize else clip_frames


def encoder_of(record: ModelRecord) -> dict[str, str]:
    """What decides the latents that a model makes."""
    names = "encoder_sha256", "scale_factor", "shift_factor", "latent_mean", "latent_std"
    fields = record_fields(record)
    return {name: str(fields[name]) for name in names}


def checksum(source: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a file, read in pieces; None of a pipe, which is read once.

    Of a folder of images that of a line for each image in the order of names, as `sha256sum` prints
    them.
    """
    if os.path.isdir(source):
        lines = (f"{checksum(file)}  {file.name}\n" for file in sorted(image_files(source)))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    return sha256_of(source) if os.path.isfile(source) else None


# Comparing -------------------------------------------------------------------------------------


def check_made(
    target: str | os.PathLike[str], source: str | os.PathLike[str], wanted: Origin
) -> None:
    """Raise `OriginError` unless `target` is what would be made of `source` now.

    `wanted` lacks the checksum of the source, which is read last, where all else is the same.
    """
    name = os.fspath(target)
    try:
        made = _origin_of(name)
        _compare(made, wanted, os.fspath(source))
    except (OriginError, LatentFileError, video.VideoError) as error:
        words = str(error).removeprefix(f"{name}: ")
        raise OriginError(f"{name} exists, and is not what would be made now: {words}") from error


def _compare(made: Origin, wanted: Origin, source: str) -> None:
    for name, value in wanted.model.items():
        if made.model.get(name) != value:
            raise OriginError(
                f"it was made by another model, with {name} {made.model.get(name, 'unknown'):.12}, "
                f"not {value:.12}"
            )
    for name in sorted({*made.options, *wanted.options}):
        before, now = (_option(name, origin.options) for origin in (made, wanted))
        if before != now and not (name == "seed" and "seed" not in wanted.options):
            raise OriginError(f"it was made {before}, not {now}")
    found = checksum(source)
    if made.source is None or found is None:
        raise OriginError("there is no checksum of what it was made of")
    if made.source != found:
        raise OriginError(f"it was made of other bytes than {source} has now")


def _option(name: str, options: Mapping[str, str]) -> str:
    if name not in options:
        return f"without --{name}"
    return f"with --{name}" + ("" if options[name] == "yes" else f" {options[name]}")


def _origin_of(name: str) -> Origin:
    """What a file says of its own origin. Raises `OriginError` for one that says nothing."""
    if name.endswith(SUFFIX):
        with LatentFile(name) as file:
            info = file.info
        if info.options is None:
            raise OriginError("it does not say with which options it was made")
        model = {key: str(getattr(info, key)) for key in encoder_of(ModelRecord())}
        return Origin(source=info.source_sha256, model=model, options=_parsed(info.options))
    comment = video.comment_of(name)
    if comment is None or not comment.startswith(TITLE):
        raise OriginError("it does not say what it was made of")
    parts = _parsed(comment.removeprefix(TITLE))
    source, options = parts.pop("source_sha256", None), parts.pop("options", None)
    return Origin(source=source, model=parts, options=options if type(options) is dict else {})


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise OriginError("what it says of its making is damaged") from error
    if type(found) is not dict:
        raise OriginError("what it says of its making is damaged")
    return found
