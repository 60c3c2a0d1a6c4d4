"""Pictures that show what a reconstruction does to a clip. Frames are uint8 (T, H, W, 3) RGB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from temporal_vae.video import Uint8Frames

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

MARGIN = 12


def amplified_difference(
    original: Uint8Frames, reconstruction: Uint8Frames, gain: float
) -> Uint8Frames:
    """|reconstruction - original| * gain, clipped to 255; the shape of its inputs."""
    error = np.abs(reconstruction.astype(np.float32) - original.astype(np.float32))
    return (error * gain).clip(0, 255).astype(np.uint8)


def time_slice(
    frames: Uint8Frames, column: int | None = None, width: int | None = None
) -> Uint8Frames:
    """One pixel column over time, (H, width, 3): time runs to the right, flicker shows as stripes.

    The middle column unless `column` says otherwise; each instant is as many pixels wide as fits.
    """
    x = frames.shape[2] // 2 if column is None else column
    picture = frames[:, :, x].transpose(1, 0, 2)  # (H, T, 3)
    if width is not None:
        picture = picture[:, np.arange(width) * len(frames) // width]
    return np.ascontiguousarray(picture)


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture (H, W, 3), and what it shows."""

    picture: Uint8Frames
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """Rows of panels of one height each, under a heading and a few sentences."""

    heading: str
    text: str
    rows: Sequence[Sequence[Panel]]


def beside(clips: Mapping[str, Uint8Frames], title: str) -> Image.Image:
    """Middle frame and time slice of several clips of one size, by their captions."""
    width = next(iter(clips.values())).shape[2]
    frames = [Panel(clip[len(clip) // 2], name) for name, clip in clips.items()]
    slices = [Panel(time_slice(clip, width=width), "time slice") for clip in clips.values()]
    return poster(title, [Section("", "", [frames, slices])])


def poster(title: str, sections: Sequence[Section], foot: str = "") -> Image.Image:
    """Sections below each other under a title; a line of small print at the foot."""
    from PIL import Image, ImageDraw, ImageFont

    inner = max(
        sum(panel.picture.shape[1] + MARGIN for panel in row) for s in sections for row in s.rows
    )
    small, large = ImageFont.load_default(15), ImageFont.load_default(21)
    # drawn once to see how high it is, then on a sheet of that height
    height = 1
    for _ in range(2):
        sheet = Image.new("RGB", (inner + MARGIN, height), "white")
        pen = _Pen(ImageDraw.Draw(sheet), MARGIN)
        pen.write(title, large, inner)
        for section in sections:
            pen.write(section.heading, large, inner)
            pen.write(section.text, small, inner)
            for row in section.rows:
                _row(sheet, pen, row, small)
        pen.write(foot, small, inner)
        height = pen.y
    return sheet


@dataclass(slots=True)
class _Pen:
    """Writes lines below each other."""

    draw: ImageDraw.ImageDraw
    y: int

    def write(self, text: str, font: Any, width: int) -> None:
        """Words on as many lines as they need; nothing for no words."""
        line = ""
        for word in text.split(" ") if text else []:
            longer = f"{line} {word}".strip()
            if line and self.draw.textlength(longer, font) > width - MARGIN:
                self._line(line, font)
                longer = word
            line = longer
        if line:
            self._line(line, font)

    def _line(self, line: str, font: Any) -> None:
        self.draw.text((MARGIN, self.y), line, fill="#111111", font=font)
        self.y += round(1.5 * font.size)


def _row(sheet: Image.Image, pen: _Pen, row: Sequence[Panel], font: Any) -> None:
    """Panels beside each other, a caption of one or more lines above each."""
    from PIL import Image

    x, lines = MARGIN, max(panel.caption.count("\n") + 1 for panel in row)
    top = pen.y + round(1.3 * font.size * lines) + MARGIN // 2
    for panel in row:
        pen.draw.multiline_text((x, pen.y), panel.caption, fill="#333333", font=font, spacing=3)
        sheet.paste(Image.fromarray(panel.picture), (x, top))
        x += panel.picture.shape[1] + MARGIN
    pen.y = top + max(len(panel.picture) for panel in row) + MARGIN
