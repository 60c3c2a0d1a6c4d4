"""What a file of latents says of itself, and the rules for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from temporal_vae.latents.distribution import LatentDistribution

Kind = Literal["moments", "sample"]

MOST_FRAMES = 2**48
MOST_CELLS = 2**20
"""Cells of a side, and channels."""
_RATIONAL = 2**31
MOST_STAMP = 2**62
_COLOUR = "colour_"


class LatentFileError(ValueError):
    """A file of latents that cannot be read or written; the message is one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """What a file of latents records of the model that made them; `TemporalVAE.latent_record`.

    For latents of another library's model make one by hand; without hashes nothing is compared.
    """

    name: str | None = None
    downsample_factor: int = 8
    scale_factor: float = 0.18215
    shift_factor: float = 0.0
    encoder_sha256: str | None = None
    decoder_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentInfo:
    """The header of a file of latents; docs/formats.md has the same fields.

    Raises `LatentFileError` for a field that is out of its range, or does not fit the others.
    """

    kind: Kind
    """"moments": mean and log-variance of each cell; "sample": a latent drawn from them."""
    dtype: torch.dtype
    frames: int
    channels: int
    """Of a latent cell: moments are stored as twice as many."""
    rows: int
    """Latent cells from top to bottom."""
    columns: int
    height: int
    """Pixels of the video, without padding."""
    width: int
    padding_bottom: int = 0
    """Pixel rows that were repeated to fill whole cells; a decoder crops them."""
    padding_right: int = 0
    scaled: bool = False
    """Whether (latent - shift_factor) * scale_factor is stored, instead of the latent."""
    scale_factor: float = 0.18215
    shift_factor: float = 0.0
    fps: Fraction = Fraction(25)
    time_base: Fraction = Fraction(1, 25)
    """Seconds in a unit of the timestamps."""
    start: int = 0
    """Timestamp of the first frame."""
    step: int | None = 1
    """From one timestamp to the next; None where it varies, and the file lists them."""
    sample_aspect_ratio: Fraction | None = None
    clip_frames: int | None = None
    """The video was walked in clips of so many frames, the last one shorter; None: as one clip."""
    seed: int | None = None
    """Of a sample."""
    model: str | None = None
    encoder_sha256: str | None = None
    """Of the encoder that made the latents, as `weights_sha256` gives it."""
    decoder_sha256: str | None = None
    colour: tuple[tuple[str, str], ...] = ()
    """The source's colour tags, by name: primaries, transfer, matrix, range."""
    bit_depth: int | None = None
    """Bits of a component in the source's file."""
    source: str | None = None
    """Name of the source's file."""
    source_sha256: str | None = None
    library: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("moments", "sample"):
            raise LatentFileError(f"kind must be 'moments' or 'sample', got {self.kind!r}")
        if self.dtype not in DTYPES.values():
            known = ", ".join(map(_text, DTYPES.values()))
            raise LatentFileError(f"dtype must be one of {known}, got {self.dtype}")
        for name, least, most in _WHOLE:
            _check_whole(name, getattr(self, name), least, most)
        if type(self.scaled) is not bool:
            raise LatentFileError(f"scaled must be True or False, got {self.scaled!r:.80}")
        for name in ("scale_factor", "shift_factor"):
            value = getattr(self, name)
            if type(value) is not float or not math.isfinite(value):
                raise LatentFileError(f"{name} must be a finite number, got {value!r}")
        if self.scale_factor <= 0:
            raise LatentFileError(f"scale_factor must be above 0, got {self.scale_factor}")
        self._check_time()
        self._check_padding()
        for name in ("encoder_sha256", "decoder_sha256", "source_sha256"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
                raise LatentFileError(f"{name} must be 64 hexadecimal digits, got {value!r:.80}")
        for name, tag in self.colour:
            if not re.fullmatch("[a-z_]{1,32}", name):
                raise LatentFileError(f"a colour tag must be named a-z and _, got {name!r:.80}")
            _check_text(f"colour tag {name}", tag)
        for name in ("model", "source", "library"):
            _check_text(name, getattr(self, name) or "")

    def _check_time(self) -> None:
        for name in ("fps", "time_base", "sample_aspect_ratio"):
            value = getattr(self, name)
            if value is None and name == "sample_aspect_ratio":
                continue
            if (
                type(value) is not Fraction
                or not 0 < value.numerator < _RATIONAL
                or value.denominator >= _RATIONAL
            ):
                raise LatentFileError(
                    f"{name} must be a Fraction of numbers in [1, 2**31), got {value!r:.80}"
                )
        if self.start + (self.step or 0) * self.frames > MOST_STAMP:
            raise LatentFileError(
                f"timestamps must be within 2**62, got {self.start} + {self.step} a frame"
            )

    def _check_padding(self) -> None:
        """Rows and columns of cells hold the padded frame, with one number of pixels a cell."""
        factor, rest = divmod(self.height + self.padding_bottom, self.rows)
        other = divmod(self.width + self.padding_right, self.columns)
        padding = max(self.padding_bottom, self.padding_right)
        if rest or other != (factor, 0) or padding >= factor:
            raise LatentFileError(
                f"{self.height}x{self.width} pixels with {self.padding_bottom} rows and "
                f"{self.padding_right} columns of padding are no whole number of pixels for "
                f"each of {self.rows}x{self.columns} cells"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the tensor in the file: (T, 2*L, h, w) of moments, (T, L, h, w) of a sample."""
        stored = self.channels * (2 if self.kind == "moments" else 1)
        return self.frames, stored, self.rows, self.columns

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in the file."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent cell along height and width."""
        return (self.height + self.padding_bottom) // self.rows

    def rescale(self, stored: Tensor, scaled: bool) -> Tensor:
        """What this file stores, (1, C, n, h, w), scaled or not as asked: never twice.

        The log-variance of moments moves by twice the logarithm of the factor. In float32 at least.
        """
        if scaled == self.scaled:
            return stored
        x = stored.to(torch.promote_types(stored.dtype, torch.float32))
        mean, *rest = x.chunk(2, 1) if self.kind == "moments" else (x,)
        shift = 2 * math.log(self.scale_factor) * (1 if scaled else -1)
        if scaled:
            mean = (mean - self.shift_factor) * self.scale_factor
        else:
            mean = mean / self.scale_factor + self.shift_factor
        return torch.cat([mean, *(log_variance + shift for log_variance in rest)], 1)


def drawn(moments: Tensor, generator: torch.Generator | None) -> Tensor:
    """A sample of moments (1, 2*L, n, h, w)."""
    mean, log_variance = moments.chunk(2, 1)
    return LatentDistribution(mean, log_variance).sample(generator)


# Text ----------------------------------------------------------------------------------------

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""By their names in safetensors."""

_WHOLE: tuple[tuple[str, int, int], ...] = (
    ("frames", 1, MOST_FRAMES),
    ("channels", 1, MOST_CELLS),
    ("rows", 1, MOST_CELLS),
    ("columns", 1, MOST_CELLS),
    ("height", 1, _RATIONAL),
    ("width", 1, _RATIONAL),
    ("padding_bottom", 0, _RATIONAL),
    ("padding_right", 0, _RATIONAL),
    ("start", 0, MOST_STAMP),
    ("step", 1, MOST_STAMP),
    ("clip_frames", 1, MOST_FRAMES),
    ("seed", 0, 2**63 - 1),
    ("bit_depth", 1, 32),
)
_OPTIONAL = {"step", "clip_frames", "seed", "bit_depth"}


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if value is None and name in _OPTIONAL:
        return
    if type(value) is not int or not least <= value <= most:
        raise LatentFileError(
            f"{name} must be a whole number in [{least}, {most}], got {value!r:.80}"
        )


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or value != value.encode(errors="replace").decode():
        raise LatentFileError(f"{name} must be text that UTF-8 can hold, got {value!r:.80}")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, str) else repr(value)


def _parse_whole(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,19}", text):
        raise ValueError
    return int(text)


def _parse_fraction(text: str) -> Fraction:
    if not re.fullmatch("[0-9]{1,10}/[0-9]{1,10}", text):
        raise ValueError
    return Fraction(text)


def _parse_truth(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _parse_dtype(text: str) -> torch.dtype:
    return {_text(dtype): dtype for dtype in DTYPES.values()}[text]


_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "kind": (str, "a word"),
    "dtype": (_parse_dtype, "float32, bfloat16, float16 or float64"),
    "frames": (_parse_whole, "a whole number"),
    "height": (_parse_whole, "a whole number"),
    "width": (_parse_whole, "a whole number"),
    "padding_bottom": (_parse_whole, "a whole number"),
    "padding_right": (_parse_whole, "a whole number"),
    "scaled": (_parse_truth, "true or false"),
    "scale_factor": (float, "a number"),
    "shift_factor": (float, "a number"),
    "fps": (_parse_fraction, "n/d"),
    "time_base": (_parse_fraction, "n/d"),
    "start": (_parse_whole, "a whole number"),
    "step": (_parse_whole, "a whole number"),
    "sample_aspect_ratio": (_parse_fraction, "n/d"),
    "clip_frames": (_parse_whole, "a whole number"),
    "seed": (_parse_whole, "a whole number"),
    "bit_depth": (_parse_whole, "a whole number"),
    "model": (str, "text"),
    "encoder_sha256": (str, "text"),
    "decoder_sha256": (str, "text"),
    "source": (str, "text"),
    "source_sha256": (str, "text"),
    "library": (str, "text"),
}
_MAY_LACK = {
    "step", "sample_aspect_ratio", "clip_frames", "seed", "bit_depth", "model",
    "encoder_sha256", "decoder_sha256", "source", "source_sha256", "library",
}  # fmt: skip


def to_metadata(info: LatentInfo) -> dict[str, str]:
    """The fields as text, those that are None left out."""
    values = {name: getattr(info, name) for name in _PARSERS}
    found = {name: _text(value) for name, value in values.items() if value is not None}
    return found | {_COLOUR + name: value for name, value in info.colour}


def from_metadata(metadata: Mapping[str, str], shape: tuple[int, ...]) -> LatentInfo:
    """The fields from their text, and the stored tensor's shape; what is unknown is passed over.

    Raises `LatentFileError` for a field that is missing or wrong.
    """
    values: dict[str, Any] = {"step": None}
    for name, (parse, form) in _PARSERS.items():
        if name not in metadata:
            if name not in _MAY_LACK:
                raise LatentFileError(f"the header has no {name}")
            continue
        try:
            values[name] = parse(metadata[name])
        except (ValueError, KeyError, ZeroDivisionError) as error:
            raise LatentFileError(f"{name} must be {form}, got {metadata[name]!r:.80}") from error
    frames, channels, rows, columns = shape
    if values["kind"] == "moments":
        channels, odd = divmod(channels, 2)
        if odd:
            raise LatentFileError(f"moments must have an even number of channels, got {shape[1]}")
    if frames != values["frames"]:
        raise LatentFileError(f"frames is {values['frames']}, but {frames} are stored")
    tags = [(key.removeprefix(_COLOUR), text) for key, text in sorted(metadata.items())
            if key.startswith(_COLOUR)]  # fmt: skip
    return LatentInfo(**values, channels=channels, rows=rows, columns=columns, colour=tuple(tags))
