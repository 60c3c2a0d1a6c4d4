"""The options that verbs share, in groups: what the help says of them, and their values.

torch is imported only by the functions that need it, so that mistakes are told without it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from temporal_vae.checkpoints import locations
from temporal_vae.cli.groups import OptionGroup, option
from temporal_vae.video import Alpha, Format, Options, Raw, Selection

if TYPE_CHECKING:
    import torch

    from temporal_vae.convert.encode import Encoding
    from temporal_vae.latents import ModelRecord
    from temporal_vae.model import TemporalVAE

DTYPES = ("float32", "bfloat16", "float16", "float64")
AUTO = "auto"


def device_name(text: str) -> str:
    """The text, if it has the form of a device's name."""
    if text.split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {text!r}")
    return text


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises `ValueError` for a device that is not there.
    """
    import torch

    if device_name(name) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here: take auto") from error
    return device


def dtype_name(text: str) -> str:
    """The text, if it is one of `DTYPES`."""
    if text not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    return text


def model_dtype_name(text: str) -> str:
    """The text, if it is "auto" or one of `DTYPES`."""
    if text != AUTO and text not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {text!r}")
    return text


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of one of the names in `DTYPES`. Raises `ValueError` for another name."""
    import torch

    return cast("torch.dtype", getattr(torch, dtype_name(name)))


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


def clip_length(text: str) -> int | Literal["all"]:
    """Frames of a clip, or "all"."""
    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"--clip-frames must be a number of frames or 'all', got {text!r}")
    return int(text)


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """How a model is run."""

    panel = "Model and memory"
    device: str = option(
        "auto", "NAME", "Where to compute: cpu, cuda, cuda:1 (the second GPU), mps (Apple), or "
        "auto, the default: a GPU if there is one.", device_name)  # fmt: skip
    dtype: str = option(
        "float32", "TYPE", "Numbers to compute with: float32, bfloat16, float16 or float64, or "
        "auto for those that the device is fastest with. Those of 16 bits take half the memory and "
        "are less exact. Default: float32.",
        model_dtype_name)  # fmt: skip
    memory: str | None = option(
        None, "SIZE", "Memory the model may use on top of its weights, for example 2GiB; 'auto' "
        "for most of what is free, 'least' for as little as possible. Never changes the picture. "
        "Default: no limit.")  # fmt: skip

    def numbers(self) -> tuple[torch.dtype, torch.device]:
        """What to compute with, and where."""
        from temporal_vae.network.kernels.dtypes import fastest

        device = choose_device(self.device)
        return fastest(device) if self.dtype == AUTO else choose_dtype(self.dtype), device

    def load(self, name: str) -> TemporalVAE:
        """The model of this name. Raises as `TemporalVAE.from_pretrained`."""
        from temporal_vae.model import TemporalVAE

        dtype, device = self.numbers()
        return TemporalVAE.from_pretrained(name, dtype=dtype, device=device)


@dataclass(frozen=True)
class ModelOptions(RunOptions):
    """Which model, and how it is run."""

    model: str | None = option(
        None, "NAME", "A built-in name, the folder or .safetensors file of a saved model, or "
        "owner/name on the Hugging Face Hub. Default: tiny; for decode, the built-in model that "
        "the latents name.")  # fmt: skip

    def load_with_record(self, default: str = "tiny") -> tuple[TemporalVAE, ModelRecord]:
        """The model, `default` if none is named, and what files of latents record of it.

        The record has the hashes of the weights before `dtype` rounds them.
        """
        from temporal_vae.model import TemporalVAE

        dtype, device = self.numbers()
        name, wide = self.model or default, dtype if dtype.itemsize > 4 else None
        model = TemporalVAE.from_pretrained(name, dtype=wide)
        is_path = name not in locations.builtin_names() and os.path.exists(name)
        record = model.latent_record(Path(name).resolve().name if is_path else name)
        return model.to(device=device, dtype=dtype), record


@dataclass(frozen=True)
class FrameOptions(OptionGroup):
    """Which frames of a video, and which part of them."""

    panel = "Which frames"
    start: Fraction | None = option(
        None, "TIME", "Begin at this time: seconds (2.5), or minutes and seconds (1:02.5).", seconds
    )
    frames: int | None = option(None, "NUMBER", "Take at most this many frames.")
    stride: int | None = option(None, "NUMBER", "Take every second frame (2), every third (3), ...")
    fps: Fraction | None = option(
        None, "RATE", "Repeat or leave out frames to have this many in a second, such as 24 or "
        "30000/1001. For a folder of images: the rate it is meant to have. Default: the rate of "
        "the video, 25 for images.", rate)  # fmt: skip
    crop: str | tuple[int, int, int, int] | None = option(
        None, "WxH+X+Y", "Cut out W by H pixels, X from the left and Y from the top, such as "
        "640x360+0+60; or 'centre': the largest part in the middle with the shape of --size.",
        cut)  # fmt: skip
    size: tuple[int, int] | None = option(
        None, "WxH", "Scale to this width and height, such as 640x360, after any --crop.", sides
    )
    alpha: Alpha | None = option(
        None, "keep|drop", "Keep the alpha channel (for models of 4 channels), or drop it. Without "
        "this option, a video whose alpha would be lost is refused.")  # fmt: skip
    raw: Raw | None = option(
        None, "WxH@RATE", "IN is bare 8-bit RGB without a header (ffmpeg's rawvideo in rgb24) of "
        "this size and rate, such as 640x360@25.", bare)  # fmt: skip
    clip_frames: int | Literal["all"] | None = option(
        None, "NUMBER|all", "Cut the video into clips of this many frames, which know nothing of "
        "each other; 'all' takes it as one clip. Default: one clip, or clips of the length that "
        "the model was made for if it has one (SVD).", clip_length)  # fmt: skip

    def selected(self) -> Options:
        """What a reader is asked for. Raises `ValueError` where options exclude each other."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "clip_frames"}
        options = cast(Options, {name: value for name, value in given.items() if value is not None})
        Selection(**options)
        return options


@dataclass(frozen=True)
class FileOptions(OptionGroup):
    """How files are written."""

    panel = "Output"
    overwrite: bool = option(False, "", "Replace files that exist.")


@dataclass(frozen=True)
class FolderOptions(OptionGroup):
    """How several files are gone through."""

    panel = "Folders"
    skip_existing: bool = option(
        False, "", "Keep files that exist and would be made the same: of the same bytes, by the "
        "same model, with the same options. Any other is an error that says what differs, or with "
        "--overwrite made again.")  # fmt: skip
    recursive: bool = option(
        False, "", "Look into the folders in a folder too; OUT gets the same folders. Hidden ones "
        "are passed over.")  # fmt: skip


@dataclass(frozen=True)
class VideoFolderOptions(FolderOptions):
    """The same for videos."""

    jobs: int = option(
        1, "NUMBER", "Videos that are read at a time: the one that is encoded, and the next ones. "
        "Each takes the memory of its decoder and of up to ten frames, beyond --memory. Never "
        "changes what is written. Default: 1.")  # fmt: skip

    def __post_init__(self) -> None:
        if not 1 <= self.jobs <= 64:
            raise ValueError(f"--jobs takes a number of videos from 1 to 64, got {self.jobs}")


@dataclass(frozen=True)
class VideoFileOptions(FileOptions):
    """How videos are written."""

    codec: str | None = option(
        None, "NAME", "h264, h265, vp9, ffv1 (lossless), png, jpeg, webp, gif, y4m or rgb, if OUT "
        "can hold it. Default: by the suffix of OUT.")  # fmt: skip
    depth: int | None = option(
        None, "BITS", "Bits of each colour component: 8, 10, 12, 14 or 16, if the codec has them. "
        "Default: enough for those of the source.")  # fmt: skip
    quality: float | None = option(
        None,
        "NUMBER",
        "Quality of a lossy codec: 0 is the best, 51 (VP9: 63, JPEG: 30, WebP: 100) the worst.",
    )
    suffix: str = option(
        ".mp4", ".SUFFIX", "Suffix of the files in OUT when it is a folder; '' for PNG images. "
        "Default: .mp4.")  # fmt: skip

    def format(self) -> Format:
        """How a video is written, as its writer takes it."""
        return Format(codec=self.codec, depth=self.depth, quality=self.quality)


@dataclass(frozen=True)
class LatentOptions(OptionGroup):
    """Which of the latents that are likely for a video."""

    panel = "Latents"
    sample: bool = option(
        False, "", "Draw random latents from the distribution that the encoder gives. Without this "
        "option encode stores the distribution, mean and variance, and decode takes the mean."
    )  # fmt: skip
    seed: int | None = option(
        None, "NUMBER", "Random seed of --sample, to draw the same latents again. Each of several "
        "files takes the next number.")  # fmt: skip

    def seed_of(self, index: int) -> int | None:
        """The seed of the file at this index: no two files share their noise."""
        return None if self.seed is None else self.seed + index


@dataclass(frozen=True)
class EncodeOptions(LatentOptions):
    """Which latents are stored, and how."""

    latent_dtype: str | None = option(
        None, "TYPE", "Numbers to store: float32, bfloat16 or float16. Default: those of --dtype.",
        dtype_name)  # fmt: skip
    scaled: bool = option(
        False, "", "Store latents scaled to unit variance, as diffusion models take them. The file "
        "records it, and decode undoes it.")  # fmt: skip

    def encoding(self, clip_frames: int | Literal["all"] | None, memory: str | None) -> Encoding:
        """How videos are encoded. Raises `ValueError` for a seed without --sample."""
        from temporal_vae.convert.encode import Encoding

        dtype = None if self.latent_dtype is None else choose_dtype(self.latent_dtype)
        return Encoding(sample=self.sample, seed=self.seed, dtype=dtype, scaled=self.scaled,
                        clip_frames=clip_frames, memory=memory)  # fmt: skip


@dataclass(frozen=True)
class DecodeOptions(LatentOptions):
    """Which latents are decoded, and what is kept of the picture."""

    any_model: bool = option(
        False, "", "Decode latents of another encoder too, if both have one latent space."
    )
    alpha: Alpha | None = option(
        None, "keep|drop", "Keep or drop the alpha channel that a model of 4 channels gives."
    )
