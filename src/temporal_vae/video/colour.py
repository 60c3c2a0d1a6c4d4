"""Colour tags of frames: what they are, what stands in for missing ones, and what is refused.

Codes are those of ISO/IEC 23091-2, which ffmpeg, H.264, H.265, mp4 and Matroska share.
"""

from __future__ import annotations

import shlex

from av.video.frame import VideoFrame

from temporal_vae.video.frames import Colour, VideoError

BT709, FCC, BT470BG, SMPTE170M, SMPTE240M, BT2020 = 1, 4, 5, 6, 7, 9
LIMITED, FULL = 1, 2

MATRICES = {
    BT709: "BT.709", FCC: "FCC", BT470BG: "BT.601", SMPTE170M: "BT.601",
    SMPTE240M: "SMPTE 240M", BT2020: "BT.2020",
}  # fmt: skip
WEIGHTS = {
    BT709: (0.2126, 0.0722), FCC: (0.30, 0.11), BT470BG: (0.299, 0.114), SMPTE170M: (0.299, 0.114),
    SMPTE240M: (0.212, 0.087), BT2020: (0.2627, 0.0593),
}  # fmt: skip
"""The weights of red and blue in the luma of a matrix; green has the rest up to 1."""
UNREAD_MATRICES = {
    8: "YCgCo", 10: "BT.2020 of constant luminance", 11: "SMPTE 2085", 12: "chromaticity-derived",
    13: "chromaticity-derived of constant luminance", 14: "ICtCp", 15: "IPT-C2",
    16: "YCgCo-Re", 17: "YCgCo-Ro",
}  # fmt: skip
HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions of high dynamic range."""

TONE_MAP = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
"""ffmpeg's filters from high dynamic range to BT.709."""


def is_rgb(frame: VideoFrame) -> bool:
    """Whether a frame stores red, green and blue, or indices into a palette of them."""
    return frame.format.is_rgb or frame.format.has_palette


def is_grey(frame: VideoFrame) -> bool:
    """Whether a frame has luma alone, with or without alpha (black and white included)."""
    name = frame.format.name
    return name.startswith(("gray", "mono")) or name in ("ya8", "ya16le", "ya16be")


def colour_of(frame: VideoFrame) -> Colour:
    """A frame's tags; where matrix or range are missing, what players assume.

    For the matrix see `assumed_matrix`. The range is limited for YUV and full for grey.
    """
    tags = frame.color_primaries, frame.color_trc
    if is_rgb(frame):
        return Colour(*tags, matrix=0, range=FULL)
    matrix, range_, grey = frame.colorspace, frame.color_range, is_grey(frame)
    untagged = not grey and matrix not in MATRICES and matrix not in UNREAD_MATRICES
    if untagged:
        matrix = assumed_matrix(frame.height, frame.width)
    if frame.format.name.startswith("yuvj"):  # the format itself says that the range is full
        return Colour(*tags, matrix, FULL, untagged)
    if range_ in (LIMITED, FULL):
        return Colour(*tags, matrix, range_, untagged)
    return Colour(*tags, matrix, FULL if grey else LIMITED, untagged, range_assumed=True)


def assumed_matrix(height: int, width: int) -> int:
    """The matrix that players assume for untagged YUV.

    BT.601 up to a height of 576 and a width below 1280, BT.709 above.
    """
    return BT709 if width >= 1280 or height > 576 else SMPTE170M


def tag_notes(colour: Colour) -> list[str]:
    """A line for each tag that matters and that a file without tags loses.

    Such a file is taken for BT.709, so its tags (1) and unspecified ones (2) do not matter, nor
    does the transfer function of BT.601 (6), which is the same as BT.709's.
    """
    notes = []
    if colour.primaries not in (1, 2):
        notes.append(f"the colour primaries' tag ({colour.primaries}) is not carried over")
    if colour.transfer not in (1, 2, 6):
        notes.append(f"the transfer's tag ({colour.transfer}) is not carried over")
    return notes


def colour_notes(colour: Colour, grey: bool) -> list[str]:
    """A line for what was assumed about the colours."""
    if grey and colour.range_assumed:
        return ["its range of greys is not tagged: read as full range"]
    if grey or not colour.matrix_assumed:
        return []
    range_ = "full" if colour.range == FULL else "limited"
    return [
        f"its colours are not tagged: read as {MATRICES[colour.matrix]}, {range_} range, "
        "as players do"
    ]


def refuse_colour(colour: Colour, path: str) -> None:
    """Raise `VideoError` for colours that would come out wrong, with a command to convert them."""
    source = shlex.quote(path)
    if colour.transfer in HDR:
        raise VideoError(
            f"{path}: high dynamic range ({HDR[colour.transfer]}) is not read: convert it "
            f"to BT.709 first with ffmpeg -i {source} -vf {TONE_MAP} OUT.mp4"
        )
    if colour.matrix in UNREAD_MATRICES:
        raise VideoError(
            f"{path}: its colour matrix, {UNREAD_MATRICES[colour.matrix]}, is not read: convert it "
            f"first with ffmpeg -i {source} -vf zscale=m=bt709 OUT.mkv"
        )
