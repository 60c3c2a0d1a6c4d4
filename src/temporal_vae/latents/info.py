"""What a file of latents says of itself, and the rules for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from temporal_vae.geometry import latents_for

MOST_FRAMES = 2**48
MOST_CELLS = 2**20
"""Cells of a side, and channels."""
MOST_STAMP = 2**62
_MOST_PIXELS = 2**31
_MOST_PER_LATENT = 2**10
_COLOUR = "colour_"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""By their names in safetensors."""


class LatentFileError(ValueError):
    """A file of latents that cannot be read or written; the message is one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """What a file of latents records of the model that made them; `TemporalVAE.latent_record`.

    For latents of another library's model make one by hand; without hashes nothing is compared.
    """

    name: str | None = None
    downsample_factor: int = 8
    frames_per_latent: int = 1
    scale_factor: float = 0.18215
    shift_factor: float = 0.0
    latent_mean: tuple[float, ...] | None = None
    """Of each channel, where each is scaled on its own; instead of the two factors."""
    latent_std: tuple[float, ...] | None = None
    encoder_sha256: str | None = None
    decoder_sha256: str | None = None


# Forms of fields -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Form:
    """What a field may hold, and how it is written in a header, where all values are text."""

    words: str
    """Ends a sentence: "NAME must be ..."."""
    holds: Callable[[Any], bool]
    """Whether a value is of this form, whatever its type."""
    parse: Callable[[str], Any] = str
    """Text to a value. Raises `ValueError`, `KeyError` or `ZeroDivisionError`."""
    text: Callable[[Any], str] = str
    """A value to text."""

    def check(self, name: str, value: object) -> None:
        """Raise `LatentFileError` for a value that is not of this form."""
        if not self.holds(value):
            raise LatentFileError(f"{name} must be {self.words}, got {value!r:.80}")

    def read(self, name: str, text: str) -> Any:
        """A value from its text. Raises `LatentFileError` for what is none."""
        try:
            return self.parse(text)
        except (ValueError, KeyError, ZeroDivisionError) as error:
            raise LatentFileError(f"{name} must be {self.words}, got {text!r:.80}") from error


def _matching(pattern: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_match(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return parse(text)

    return parse_match


def _whole(least: int, most: int) -> Form:
    return Form(
        f"a whole number in [{least}, {most}]",
        lambda value: type(value) is int and least <= value <= most,
        _matching("-?[0-9]{1,19}", int),
    )


def _number(words: str, least: float) -> Form:
    return Form(words, lambda value: type(value) is float and least < value < math.inf, float)


def _is_rational(value: object) -> bool:
    return type(value) is Fraction and 0 < value.numerator < 2**31 and value.denominator < 2**31


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES_BY_NAME = {_dtype_name(dtype): dtype for dtype in DTYPES.values()}
_KIND = Form("'moments' or 'sample'", lambda value: value in ("moments", "sample"))
_DTYPE = Form(
    f"one of {', '.join(_DTYPES_BY_NAME)}",
    lambda value: value in DTYPES.values(),
    _DTYPES_BY_NAME.__getitem__,
    _dtype_name,
)
_TRUTH = Form(
    "True or False",
    lambda value: type(value) is bool,
    {"true": True, "false": False}.__getitem__,
    lambda value: str(value).lower(),
)
_RATIONAL = Form(
    "a Fraction of numbers in [1, 2**31), written n/d",
    _is_rational,
    _matching("[0-9]{1,10}/[0-9]{1,10}", Fraction),
    lambda value: f"{value.numerator}/{value.denominator}",
)
_TEXT = Form("text that UTF-8 can hold", _is_text)
_HASH = Form(
    "64 hexadecimal digits",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
)
_OF_CHANNELS = Form(
    "a finite number for each channel, separated by commas",
    lambda value: (
        type(value) is tuple and all(type(n) is float and math.isfinite(n) for n in value)
    ),
    lambda text: tuple(map(float, text.split(","))),
    lambda value: ",".join(map(str, value)),
)
_SIDE, _CELLS, _FRAMES = _whole(1, _MOST_PIXELS), _whole(1, MOST_CELLS), _whole(1, MOST_FRAMES)


# The header ----------------------------------------------------------------------------------

Kind = Literal["moments", "sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentInfo:
    """The header of a file of latents; docs/formats.md has the same fields.

    Raises `LatentFileError` for a field that is out of its range, or does not fit the others.
    """

    kind: Annotated[Kind, _KIND]
    """"moments": mean and log-variance of each cell; "sample": a latent drawn from them."""
    dtype: Annotated[torch.dtype, _DTYPE]
    frames: Annotated[int, _FRAMES]
    """Of the video, without those that fill up its last latent."""
    channels: Annotated[int, _CELLS]
    """Of a latent cell: moments are stored as twice as many."""
    rows: Annotated[int, _CELLS]
    """Latent cells from top to bottom."""
    columns: Annotated[int, _CELLS]
    height: Annotated[int, _SIDE]
    """Pixels of the video, without padding."""
    width: Annotated[int, _SIDE]
    padding_bottom: Annotated[int, _whole(0, _MOST_PIXELS)] = 0
    """Pixel rows that were repeated to fill whole cells; a decoder crops them."""
    padding_right: Annotated[int, _whole(0, _MOST_PIXELS)] = 0
    frames_per_latent: Annotated[int, _whole(1, _MOST_PER_LATENT)] = 1
    """Frames that one latent holds along time, but for the first of a clip, which holds one."""
    scaled: Annotated[bool, _TRUTH] = False
    """Whether (latent - shift_factor) * scale_factor is stored, instead of the latent, or where
    each channel has its own scale (latent - latent_mean) / latent_std."""
    scale_factor: Annotated[float | None, _number("a finite number above 0", 0)] = 0.18215
    """None, as `shift_factor`, where each channel has its own scale."""
    shift_factor: Annotated[float | None, _number("a finite number", -math.inf)] = 0.0
    latent_mean: Annotated[tuple[float, ...] | None, _OF_CHANNELS] = None
    """Of each channel; None, as `latent_std`, where all are scaled by one factor."""
    latent_std: Annotated[tuple[float, ...] | None, _OF_CHANNELS] = None
    fps: Annotated[Fraction, _RATIONAL] = Fraction(25)
    time_base: Annotated[Fraction, _RATIONAL] = Fraction(1, 25)
    """Seconds in a unit of the timestamps."""
    start: Annotated[int, _whole(0, MOST_STAMP)] = 0
    """Timestamp of the first frame; 0 where the file lists all timestamps."""
    step: Annotated[int | None, _whole(1, MOST_STAMP)] = 1
    """From one timestamp to the next; None where it varies, and the file lists them."""
    sample_aspect_ratio: Annotated[Fraction | None, _RATIONAL] = None
    """Width of a pixel to its height; None where it is unknown."""
    clip_frames: Annotated[int | None, _FRAMES] = None
    """The video was walked in clips of so many frames, the last one shorter; None: as one clip."""
    seed: Annotated[int | None, _whole(0, 2**63 - 1)] = None
    """Of a sample."""
    bit_depth: Annotated[int | None, _whole(1, 32)] = None
    """Bits of a component in the source's file."""
    model: Annotated[str | None, _TEXT] = None
    encoder_sha256: Annotated[str | None, _HASH] = None
    """Of the encoder that made the latents, as `weights_sha256` gives it."""
    decoder_sha256: Annotated[str | None, _HASH] = None
    colour: tuple[tuple[str, str], ...] = ()
    """The source's colour tags, by name: primaries, transfer, matrix, range."""
    source: Annotated[str | None, _TEXT] = None
    """Name of the source's file."""
    source_sha256: Annotated[str | None, _HASH] = None
    options: Annotated[str | None, _TEXT] = None
    """How it was made, as JSON: options of the command by name, those left out that are not set."""
    library: Annotated[str | None, _TEXT] = None

    def __post_init__(self) -> None:
        for name, form in _FORMS.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                form.check(name, getattr(self, name))
        for name, tag in self.colour:
            if not re.fullmatch("[a-z_]{1,32}", name):
                raise LatentFileError(f"a colour tag must be named a-z and _, got {name!r:.80}")
            _TEXT.check(f"colour tag {name}", tag)
        if self.start + (self.step or 0) * self.frames > MOST_STAMP:
            raise LatentFileError(
                f"timestamps must be within 2**62, got {self.start} + {self.step} a frame"
            )
        self._check_padding()
        self._check_scale()

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

    def _check_scale(self) -> None:
        """All channels are scaled by two numbers, or each by two of its own."""
        one = {self.scale_factor is None, self.shift_factor is None}
        each = {self.latent_mean is None, self.latent_std is None}
        if len(one) + len(each) > 2 or one == each:
            raise LatentFileError(
                "a scale is scale_factor and shift_factor, or for each channel latent_mean and "
                "latent_std: one of both pairs, and not the other"
            )
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise LatentFileError(
                    f"{name} must have a number for each of {self.channels} channels, it has "
                    f"{len(values)}"
                )
        if min(self.latent_std or (1.0,)) <= 0:
            raise LatentFileError(f"latent_std must be above 0, got {min(self.latent_std or ())}")

    @property
    def latent_frames(self) -> int:
        """Latents along time: of a clip one for its first frame, and one for each
        `frames_per_latent` behind it, the last one filled up by repeating the last frame."""
        clip, each = min(self.clip_frames or self.frames, self.frames), self.frames_per_latent
        clips, rest = divmod(self.frames, clip)
        return clips * latents_for(clip, each) + (latents_for(rest, each) if rest else 0)

    @property
    def padding_frames(self) -> int:
        """Frames that repeat the last one of the video, or of a clip; a decoder drops them."""
        clips = -(-self.frames // (self.clip_frames or self.frames))
        each = self.frames_per_latent
        return self.latent_frames * each - clips * (each - 1) - self.frames

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the tensor in the file: (T, 2*L, h, w) of moments, (T, L, h, w) of a sample, T being
        `latent_frames`."""
        stored = self.channels * (2 if self.kind == "moments" else 1)
        return self.latent_frames, stored, self.rows, self.columns

    @property
    def frame_bytes(self) -> int:
        """Bytes of one latent along time in the file."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent cell along height and width."""
        return (self.height + self.padding_bottom) // self.rows

    def rescale(self, stored: Tensor, scaled: bool) -> Tensor:
        """What this file stores, (1, C, n, h, w), scaled or not as asked: never twice.

        In float32 at least. The log-variance of moments moves by twice the logarithm of the factor.
        """
        x = stored.to(torch.promote_types(stored.dtype, torch.float32))
        if scaled == self.scaled:
            return x
        mean, *rest = x.chunk(2, 1) if self.kind == "moments" else (x,)
        shift, factor, more = self._scale(x)
        mean = (mean - shift) * factor if scaled else mean / factor + shift
        more = more if scaled else -more
        return torch.cat([mean, *(log_variance + more for log_variance in rest)], 1)

    def _scale(self, like: Tensor) -> tuple[Any, Any, Any]:
        """Shift, factor, and what that adds to a log-variance: numbers, or (L, 1, 1, 1)."""
        if self.scale_factor is not None:
            return self.shift_factor, self.scale_factor, 2 * math.log(self.scale_factor)
        std = self.latent_std or ()
        columns = self.latent_mean, [1 / s for s in std], [-2 * math.log(s) for s in std]
        shift, factor, more = (like.new_tensor(values).view(-1, 1, 1, 1) for values in columns)
        return shift, factor, more


_HINTS = {
    name: get_args(hint)
    for name, hint in get_type_hints(LatentInfo, include_extras=True).items()
    if name != "colour"
}
_FORMS: dict[str, Form] = {name: form for name, (_, form) in _HINTS.items()}
_OPTIONAL = {name for name, (hint, _) in _HINTS.items() if type(None) in get_args(hint)}
_IN_SHAPE = {"channels", "rows", "columns"}
"""Fields that the shape of the stored tensor gives, not the metadata."""


def to_metadata(info: LatentInfo) -> dict[str, str]:
    """The fields as text, those that are None left out."""
    values = {n: getattr(info, n) for n in _FORMS if n not in _IN_SHAPE}
    found = {n: _FORMS[n].text(value) for n, value in values.items() if value is not None}
    return found | {_COLOUR + name: value for name, value in info.colour}


def from_metadata(metadata: Mapping[str, str], shape: tuple[int, ...]) -> LatentInfo:
    """The fields from their text and the stored tensor's shape; unknown fields are passed over.

    Raises `LatentFileError` for a field that is missing or wrong.
    """
    values: dict[str, Any] = {"step": None, "scale_factor": None, "shift_factor": None}
    for name, form in _FORMS.items():
        if name in metadata and name not in _IN_SHAPE:
            values[name] = form.read(name, metadata[name])
        elif name not in _OPTIONAL | _IN_SHAPE:
            raise LatentFileError(f"the header has no {name}")
    latents, channels, rows, columns = shape
    if values["kind"] == "moments":
        channels, odd = divmod(channels, 2)
        if odd:
            raise LatentFileError(f"moments must have an even number of channels, got {shape[1]}")
    colour = tuple(
        (key.removeprefix(_COLOUR), text)
        for key, text in sorted(metadata.items())
        if key.startswith(_COLOUR)
    )
    info = LatentInfo(**values, channels=channels, rows=rows, columns=columns, colour=colour)
    if info.latent_frames != latents:
        raise LatentFileError(
            f"frames is {info.frames}, which are {info.latent_frames} latents along time, but "
            f"{latents} are stored"
        )
    return info
