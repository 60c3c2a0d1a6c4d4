"""Pictures that show what a reconstruction does to a clip. Frames are uint8 (T, H, W, 3) RGB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from temporal_vae.video import Uint8Frames

if TYPE_CHECKING:
    from PIL import Image

MARGIN = 12
CAPTION = 30


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


def comparison(
    original: Uint8Frames, reconstruction: Uint8Frames, title: str, gain: float = 8.0
) -> Image.Image:
    """Middle frame and time slice of a clip: original, reconstruction, amplified difference."""
    middle, width = len(original) // 2, original.shape[2]
    frames = [clip[middle] for clip in (original, reconstruction)]
    slices = [time_slice(clip, width=width) for clip in (original, reconstruction)]
    for row in (frames, slices):
        row.append(amplified_difference(row[0], row[1], gain))
    column, others = width // 2, ["reconstruction", f"difference x {gain:g}"]
    captions = [
        [f"original, frame {middle}", *others],
        [f"time slice: column {column} over {len(original)} frames", *others],
    ]
    return _sheet([frames, slices], captions, title)


def beside(clips: Mapping[str, Uint8Frames], title: str) -> Image.Image:
    """Middle frame and time slice of several clips of one size, by their captions."""
    some = next(iter(clips.values()))
    rows = [
        [clip[len(clip) // 2] for clip in clips.values()],
        [time_slice(clip, width=some.shape[2]) for clip in clips.values()],
    ]
    captions = [list(clips), ["time slice" for _ in clips]]
    return _sheet(rows, captions, title)


def _sheet(rows: list[list[Uint8Frames]], captions: list[list[str]], title: str) -> Image.Image:
    """Panels of one size in rows, a caption above each, a title above all."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = rows[0][0].shape[:2]
    down, right = height + CAPTION + MARGIN, width + MARGIN
    size = (MARGIN + len(rows[0]) * right, 2 * CAPTION + len(rows) * down)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(15), ImageFont.load_default(19)
    draw.text((MARGIN, MARGIN), title, fill="black", font=large)
    for r, (panels, words) in enumerate(zip(rows, captions, strict=True)):
        y = CAPTION + MARGIN + r * down
        for c, (panel, caption) in enumerate(zip(panels, words, strict=True)):
            x = MARGIN + c * right
            draw.text((x, y + 8), caption, fill="#333333", font=small)
            sheet.paste(Image.fromarray(panel), (x, y + CAPTION))
    return sheet
