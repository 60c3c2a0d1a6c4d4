"""What there is to say of a model, a video, a file of latents, and this installation.

Each as rows of a name and a value, in the order in which a person would ask.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

from temporal_vae.checkpoints import locations
from temporal_vae.cli import options
from temporal_vae.video import PIPE, VideoError, VideoReader
from temporal_vae.video.frames import NOT_COPIED

Rows = dict[str, object]


class Sides(tuple[int, ...]):
    """Lengths, shown as 640x360; in JSON a list."""


class Count(int):
    """A large number, shown as 1,234,567."""


def describe(thing: str) -> Rows:
    """A built-in name, a model's folder or file, a file of latents, or a video.

    Raises `ValueError` for what is none of them, or damaged; `VideoError` for a damaged video.
    """
    path = Path(thing)
    if thing in locations.builtin_names() or (path / locations.CONFIG_FILE).is_file():
        return describe_model(thing)
    if not path.exists():
        raise ValueError(f"{thing}: neither a model nor a file")
    from temporal_vae.latents import holds_latents

    if holds_latents(path):
        return describe_latents(thing)
    if path.suffix == ".safetensors":
        return describe_model(thing)
    return describe_video(thing)


def describe_installation() -> Rows:
    """Versions, device and built-in models."""
    import torch

    return {
        "temporal-video-vae": version("temporal-video-vae"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": options.choose_device("auto"),
        "built-in models": ", ".join(locations.builtin_names()),
    }


def describe_model(name: str) -> Rows:
    """Its configuration, size, reach, and the hashes that files of latents are compared by."""
    from temporal_vae.model import TemporalVAE

    vae = TemporalVAE.from_pretrained(name)
    record = vae.latent_record()
    return {
        "what": "model",
        **{f.name: getattr(vae.config, f.name) for f in fields(vae.config)},
        "parameters": Count(vae.parameter_count),
        "of the encoder": Count(sum(p.numel() for p in vae.encoder.parameters())),
        "of the decoder": Count(sum(p.numel() for p in vae.decoder.parameters())),
        "pixels per latent cell": vae.downsample_factor,
        "frames per latent": vae.frames_per_latent,
        "frames a latent depends on": _reach(vae.encode_reach, vae.is_causal),
        "latent frames a frame depends on": _reach(vae.decode_reach, vae.is_causal),
        "encode reach": vae.encode_reach,
        "decode reach": vae.decode_reach,
        "encoder sha256": record.encoder_sha256,
        "decoder sha256": record.decoder_sha256,
    }


def describe_video(path: str) -> Rows:
    """What its file claims, and what of it would not be carried over."""
    with VideoReader(path, alpha="drop") as reader:
        video = reader.info
        rows: Rows = {"what": "video", "size": Sides((video.width, video.height))}
        rows["frames"] = "not stated" if video.frames is None else video.frames
        rows["frames per second"] = video.fps
        if video.expected_frames is not None:
            rows["seconds"] = round(video.expected_frames / float(video.fps), 3)
        told = {"path", "width", "height", "frames", "fps", "notes", "end", "colour"}
        for field in fields(video):  # all that a reader finds out, as it learns to
            value = getattr(video, field.name)
            if field.name not in told and value is not None:
                rows[field.name.replace("_", " ")] = value
        for name, value in asdict(video.colour).items():
            rows[f"colour {name.replace('_', ' ')}"] = value
        if os.path.isfile(path):
            rows["bytes"] = Count(os.path.getsize(path))
        beside = [note for note in video.notes if note.endswith(NOT_COPIED)]  # `reconstruct` does
        if beside:
            rows["beside it"] = ", ".join(note.removesuffix(NOT_COPIED) for note in beside)
        notes = [note for note in video.notes if note not in beside]
        return rows | {f"note {i}": note for i, note in enumerate(notes, 1)}


def describe_latents(path: str) -> Rows:
    """The whole header, and what follows from it."""
    from temporal_vae.latents import LatentFile

    with LatentFile(path) as file:
        info, size = file.info, os.path.getsize(path)
        stamps = file.timestamps(0, 1) + file.timestamps(info.frames - 1, 1)
    rows: Rows = {
        "what": "latents",
        "size": Sides((info.width, info.height)),
        "frames": info.frames,
        "latent frames": info.latent_frames,
        "padding frames": info.padding_frames,
        "shape": Sides(info.shape),
        "dtype": str(info.dtype).removeprefix("torch."),
        "kind": info.kind,
        "scaled": info.scaled,
        "frames per second": info.fps,
        "first frame at second": float(stamps[0] * info.time_base),
        "last frame at second": float(stamps[1] * info.time_base),
        "timestamps": "listed" if info.step is None else f"every {info.step}",
        "pixels per latent cell": info.downsample_factor,
        "bytes": Count(size),
        "bytes over the payload": round(size / (info.latent_frames * info.frame_bytes), 5),
    }
    told = {"frames", "dtype", "kind", "scaled", "height", "width", "fps", "step", "colour"}
    for field in fields(info):
        value = getattr(info, field.name)
        if field.name not in told and value is not None:
            rows[field.name.replace("_", " ")] = value
    return rows | {f"colour {name}": value for name, value in info.colour}


def describe_written(target: Path) -> Rows:
    """What a video that was written says of itself: nothing in a pipe, or as bare RGB."""
    with suppress(VideoError):
        return {} if str(target) == PIPE else describe_video(str(target))
    return {}


def shown(rows: Mapping[str, object]) -> dict[str, str]:
    """Values for a person to read."""
    return {name: _text(value) for name, value in rows.items()}


def to_json(rows: Mapping[str, object]) -> str:
    """One line of JSON: names as keys_like_this, fractions and the like as text."""
    keys = {name.replace(" ", "_").replace("-", "_"): value for name, value in rows.items()}
    return json.dumps(keys, default=str)


def _text(value: object) -> str:
    if isinstance(value, Sides):
        return "x".join(map(str, value))
    if isinstance(value, Fraction) and value.denominator != 1:
        return f"{float(value):.6g} ({value})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, Count):
        return f"{value:,}"
    if isinstance(value, tuple) and all(isinstance(number, float) for number in value):
        return "  ".join(f"{number:.6g}" for number in value)
    return str(value)


def _reach(frames: int | None, causal: bool) -> str:
    if frames is None:
        return "the whole clip"
    return f"{frames} back" if causal else f"{frames} on each side"
