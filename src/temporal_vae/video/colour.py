"""What the numbers of a frame mean: matrices, ranges, and what is refused.

Codes are those of ISO/IEC 23091-2, which ffmpeg, H.264 and its kin, mp4 and Matroska share.
"""

from __future__ import annotations

import shlex

from av.video.frame import VideoFrame

from temporal_vae.video.frames import Colour, VideoError

UNTAGGED, BT709, FCC, BT470BG, SMPTE170M, SMPTE240M, BT2020 = 2, 1, 4, 5, 6, 7, 9
LIMITED, FULL = 1, 2

MATRICES = {
    BT709: "BT.709", FCC: "FCC", BT470BG: "BT.601", SMPTE170M: "BT.601",
    SMPTE240M: "SMPTE 240M", BT2020: "BT.2020",
}  # fmt: skip
WEIGHTS = {
    BT709: (0.2126, 0.0722), FCC: (0.30, 0.11), BT470BG: (0.299, 0.114), SMPTE170M: (0.299, 0.114),
    SMPTE240M: (0.212, 0.087), BT2020: (0.2627, 0.0593),
}  # fmt: skip
"""What red and blue weigh in the luma of a matrix; green weighs the rest."""
UNREAD_MATRICES = {
    8: "YCgCo", 10: "BT.2020 of constant luminance", 11: "SMPTE 2085", 12: "chromaticity-derived",
    13: "chromaticity-derived of constant luminance", 14: "ICtCp", 15: "IPT-C2",
    16: "YCgCo-Re", 17: "YCgCo-Ro",
}  # fmt: skip
HDR = {16: "PQ", 18: "HLG"}

TONE_MAP = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
"""ffmpeg's filters from high dynamic range to BT.709."""


def is_rgb(frame: VideoFrame) -> bool:
    """Whether its numbers are red, green and blue already, or an index of such."""
    return frame.format.is_rgb or frame.format.has_palette


def is_grey(frame: VideoFrame) -> bool:
    """Whether it has one component and no colour (black and white included)."""
    name = frame.format.name
    return name.startswith(("gray", "mono")) or name in ("ya8", "ya16le", "ya16be")


def colour_of(frame: VideoFrame) -> Colour:
    """The frame's tags; where matrix or range are missing, what players take.

    They take BT.601 for a picture of at most 576 lines and less than 1280 columns, and BT.709 for
    a larger one; limited range for YUV, full range for grey, as ffmpeg does.
    """
    tags = frame.color_primaries, frame.color_trc
    if is_rgb(frame):
        return Colour(*tags, matrix=0, range=FULL)
    matrix, range_ = frame.colorspace, frame.color_range
    grey, full = is_grey(frame), frame.format.name.startswith("yuvj")
    unknown = not grey and matrix not in MATRICES and matrix not in UNREAD_MATRICES
    if unknown:
        matrix = assumed_matrix(frame.height, frame.width)
    ranged = range_ in (LIMITED, FULL) or full
    if full or not ranged:
        range_ = FULL if grey or full else LIMITED
    return Colour(*tags, matrix, range_, unknown, not ranged)


def assumed_matrix(height: int, width: int) -> int:
    """The matrix that players take for YUV without tags."""
    return BT709 if width >= 1280 or height > 576 else SMPTE170M


def tag_notes(colour: Colour) -> list[str]:
    """A line for each tag that a file without tags would be missing.

    BT.709 and unspecified are what such a file is taken to have; BT.601's curve is that of BT.709.
    """
    notes = []
    if colour.primaries not in (1, 2):
        notes.append(f"the colour primaries' tag ({colour.primaries}) is not carried over")
    if colour.transfer not in (1, 2, 6):
        notes.append(f"the transfer's tag ({colour.transfer}) is not carried over")
    return notes


def colour_notes(colour: Colour, grey: bool) -> list[str]:
    """What had to be assumed, a line each."""
    if grey:
        assumed = "its range of greys is not tagged: read as full range"
        return [assumed] if colour.range_assumed else []
    if not colour.matrix_assumed:
        return []
    range_ = "full" if colour.range == FULL else "limited"
    return [
        f"its colours are not tagged: read as {MATRICES[colour.matrix]}, {range_} range, "
        "as players do"
    ]


def refuse_colour(colour: Colour, path: str) -> None:
    """Raise `VideoError` for colours that would come out wrong, with the way to convert them."""
    source = shlex.quote(path)
    if colour.transfer in HDR:
        raise VideoError(
            f"{path}: high dynamic range ({HDR[colour.transfer]}) would be squashed: convert it "
            f"to BT.709 first with ffmpeg -i {source} -vf {TONE_MAP} OUT.mp4"
        )
    if colour.matrix in UNREAD_MATRICES:
        raise VideoError(
            f"{path}: its colour matrix, {UNREAD_MATRICES[colour.matrix]}, is not read: convert it "
            f"first with ffmpeg -i {source} -vf zscale=m=bt709 OUT.mkv"
        )
