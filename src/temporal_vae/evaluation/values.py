"""What measured values are called, and what they say, for whoever has not seen them before."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Value:
    """A value in words."""

    title: str
    digits: int
    best: str
    """Which is best: "highest", "lowest", or "nearest to 0" of values with a sign."""
    says: str


SHOWN = {
    "psnr": Value("PSNR", 2, "highest",
        "How close pixels are to the original's, in decibels, the mean over frames. Below 30 "
        "differences are easy to see, above 40 hard."),
    "ssim": Value("SSIM", 4, "highest",
        "How alike edges and textures are; 1 is the original itself."),
    "flicker": Value("flicker", 2, "lowest",
        "How much changes from one frame to the next that does not change in the original, in "
        "levels of brightness out of 255."),
    "warp_error": Value("warp", 2, "lowest",
        "The same along moving things: how much the error changes on its way with them, in levels "
        "out of 255."),
    "cvvdp": Value("JOD", 3, "highest",
        "What people would say of the difference, by the model of vision ColorVideoVDP: 10 is no "
        "visible difference, one less is seen by three of four people."),
    "vmaf": Value("VMAF", 2, "highest",
        "Quality from 0 to 100 as people have judged videos, by Netflix' VMAF."),
    "lpips": Value("LPIPS", 4, "lowest",
        "How different pictures look to a network that was trained on photographs; 0 is equal."),
    "luma_drift": Value("luma drift", 2, "nearest to 0",
        "By how many levels the whole picture gets brighter from the first third of a clip to the "
        "last, beside the original."),
    "chroma_drift": Value("chroma drift", 2, "lowest",
        "By how many levels the colours of the whole picture move over a clip."),
}  # fmt: skip
"""The values that tables have as columns, in this order; the JSON has all."""
BY_FRAME = {
    "psnr": ("PSNR, dB", "higher is better"),
    "flicker": ("Flicker, levels", "lower is better"),
    "ssim": ("SSIM", "higher is better"),
    "warp_error": ("Warp error, levels", "lower is better"),
    "luma_error": ("Brightness less the original's, levels", "0 is best"),
    "lpips": ("LPIPS", "lower is better"),
}
"""The values of frames that are drawn as curves."""
