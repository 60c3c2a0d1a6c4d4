"""What is typed for the options of a reader, as values."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import cast

from temporal_vae.video import Options, Raw, Selection


def reader_options(
    *,
    start: str | None,
    frames: int | None,
    stride: int | None,
    fps: str | None,
    size: str | None,
    crop: str | None,
    alpha: str | None,
    raw: str | None = None,
) -> Options:
    """Those that were given, checked against each other; see `Selection`.

    Raises `ValueError` for what cannot be read, or cannot be.
    """
    found = {
        "start": None if start is None else seconds(start),
        "frames": frames,
        "stride": stride,
        "fps": None if fps is None else rate(fps),
        "size": None if size is None else sides(size),
        "crop": None if crop is None else cut(crop),
        "alpha": alpha,
        "raw": None if raw is None else bare(raw),
    }
    options = cast(Options, {name: value for name, value in found.items() if value is not None})
    Selection(**options)
    return options


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
