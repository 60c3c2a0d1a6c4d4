"""Metrics of others: cvvdp and VMAF, each by its own package, and those that need weights.

The packages are extras and are imported when a measure is made.
"""

from __future__ import annotations

import math
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_vae.evaluation.measures import (
    Found,
    NotMeasuredError,
    Pair,
    PerFrame,
    mean,
    missing,
)

DISPLAY = "standard_4k"
"""The display that cvvdp looks at clips on unless another is named: see its documentation."""
LPIPS_MISSING = "LPIPS needs weights that no package carries: give --lpips-trunk and --lpips-heads"
FVD_MISSING = "FVD needs the weights of I3D, which no package carries, and hundreds of clips"


class Cvvdp:
    """ColorVideoVDP: JOD, 10 where nobody sees a difference, on a display at a frame rate.

    Frames wait in a file without a name until all are there, since cvvdp asks for their number.
    """

    names: tuple[str, ...] = ("cvvdp",)

    def __init__(self, fps: float, display: str = DISPLAY):
        try:
            with _torchvision():
                import pycvvdp
        except ImportError as error:
            raise NotMeasuredError(missing(f"cvvdp ({error.name})", "cvvdp")) from error
        try:
            self._metric = pycvvdp.cvvdp(
                display_name=display, quiet=True, device=torch.device("cpu")
            )
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"cvvdp knows no display {display!r}: take {DISPLAY}") from error
        self._fps, self._bad, self._count = fps, False, 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the measure
        weakref.finalize(self, self._file.close)  # of which a failed clip never asks what it found
        self._shape: tuple[int, ...] = ()

    def add(self, pair: Pair) -> None:
        """Keep a pair for the end."""
        self._bad |= bool(pair.ours.isnan().any())
        self._count += 1
        both = torch.stack([pair.ours.nan_to_num(0), pair.original]).to(torch.uint8)
        self._shape = tuple(both.shape)
        self._file.write(both.numpy().tobytes())

    def found(self) -> Found:
        """The JOD of the clip."""
        with self._file as file:
            if self._bad:
                return Found({"cvvdp": math.nan})
            file.flush()
            pairs = np.memmap(file, np.uint8, "c", shape=(self._count, *self._shape))
        ours, original = torch.from_numpy(pairs).unbind(1)
        fps = self._fps if self._count > 1 else 0
        with torch.no_grad():
            jod, _ = self._metric.predict(ours, original, dim_order="FCHW", frames_per_second=fps)
        return Found({"cvvdp": float(jod)})


class Vmaf:
    """VMAF 0.6.1 by vmaf-torch, from 0 to 100, of the luma of BT.709; blind to flicker."""

    names: tuple[str, ...] = ("vmaf",)

    def __init__(self) -> None:
        try:
            from vmaf_torch import VMAF
        except ImportError as error:
            raise NotMeasuredError(missing(f"vmaf-torch ({error.name})", "vmaf")) from error
        self._vmaf = VMAF(clip_score=True)
        self._last: Tensor | None = None
        self._features: list[tuple[Tensor, Tensor]] = []
        self._moved: list[Tensor] = []

    @torch.no_grad()
    def add(self, pair: Pair) -> None:
        """Take the features of one frame, and how it moved from the one before."""
        if min(pair.ours.shape[1:]) < 32:
            raise NotMeasuredError("it needs frames of 32 pixels or more each way")
        weights = torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)
        ours, original = ((x * weights).sum(0)[None, None] for x in (pair.ours, pair.original))
        self._features.append(
            (self._vmaf.compute_adm_score(original, ours),
             self._vmaf.compute_vif_features(original, ours))
        )  # fmt: skip
        last = original if self._last is None else self._last
        self._moved.append(self._vmaf.compute_motion(torch.cat([last, original]))[1:])
        self._last = original

    @torch.no_grad()
    def found(self) -> Found:
        """The mean over frames; a frame moves by the lesser difference to its neighbours."""
        moved = torch.cat(self._moved)
        lesser = torch.cat([torch.minimum(moved[:-1], moved[1:]), moved[-1:]])
        adm, vif = (torch.cat(each) for each in zip(*self._features, strict=True))
        values = self._vmaf.predict(adm, lesser, vif).flatten().tolist()
        return Found({"vmaf": mean(values)}, {"vmaf": values})


def lpips(distance: Callable[[Tensor, Tensor], Any] | None) -> PerFrame:
    """LPIPS by a function of videos (1, 3, 1, H, W) in [-1, 1] that has its weights."""
    if distance is None:
        raise NotMeasuredError(LPIPS_MISSING)

    @torch.no_grad()
    def of(ours: Tensor, original: Tensor) -> Any:
        return distance(*(x[:, :, None] / 127.5 - 1 for x in (ours, original)))

    return PerFrame("lpips", of)


def fvd() -> PerFrame:
    """Always missing, and says why."""
    raise NotMeasuredError(FVD_MISSING)


@contextmanager
def _torchvision() -> Iterator[None]:
    """torchvision for the import of cvvdp, or where it cannot be imported what cvvdp uses of it.

    That is one Gaussian blur. Builds of torchvision fit one build of torch, so that it is often
    there and fails, or would replace torch; nothing else sees the stand-in.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        stands_in = {name: ModuleType(name) for name in
                     ("torchvision", "torchvision.transforms", "torchvision.ops")}  # fmt: skip
        vars(stands_in["torchvision.transforms"])["GaussianBlur"] = _GaussianBlur
        vars(stands_in["torchvision.ops"])["MLP"] = None
        sys.modules.update(stands_in)
        try:
            yield
        finally:
            for name in stands_in:
                del sys.modules[name]
    else:
        yield


class _GaussianBlur(torch.nn.Module):
    """torchvision's of a fixed sigma: (..., C, H, W), reflected at the edges."""

    def __init__(self, kernel_size: int, sigma: float):
        super().__init__()
        places = torch.linspace(-(kernel_size - 1) / 2, (kernel_size - 1) / 2, kernel_size)
        weights = torch.exp(-0.5 * (places / sigma) ** 2)
        self._weights = weights / weights.sum()

    def forward(self, image: Tensor) -> Tensor:
        weights = self._weights.to(image)
        half, channels = len(weights) // 2, image.shape[-3]
        flat = image.reshape(-1, *image.shape[-3:])
        padded = F.pad(flat, (half, half, half, half), mode="reflect")
        kernel = torch.outer(weights, weights).expand(channels, 1, -1, -1)
        return F.conv2d(padded, kernel, groups=channels).reshape(image.shape)
