"""The memory that a bounded walk works in."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from temporal_vae.geometry import spans
from temporal_vae.network.layer import Layer, Shape
from temporal_vae.walks.stages import Bounds, arena_sizes

MOVED_AT_A_TIME = 2**20
"""Numbers moved at a time inside an arena."""


class Workspace:
    """The memory of a walk: an arena for the clip between runs, and one for a frame in bands."""

    def __init__(self, layers: Sequence[Layer], x: Tensor, bounds: Bounds):
        clip, frame = arena_sizes(layers, tuple(x.shape), bounds)
        self.bounds, self.device = bounds, x.device
        self.clip = Arena(clip, x, bounds.offload)
        # what a stage reads is overwritten behind it, wherever that lies
        self.frame = Arena(frame, x, bounds.offload) if frame else self.clip

    def reserve(self) -> None:
        """Take what pieces need at the most, and let it go.

        If memory runs out, it does so here, before the first layer, and not in the middle.
        """
        torch.empty(self.bounds.workspace, dtype=torch.uint8, device=self.device).fill_(0)


class Arena:
    """Flat memory for one activation (1, C, T, H, W), channels-last, at its front or its back."""

    def __init__(self, size: int, like: Tensor, offload: str | os.PathLike[str] | None):
        size = max(1, size)
        if offload is None:
            self._memory = torch.zeros(size, dtype=like.dtype, device=like.device)
        elif offload == "host":
            self._memory = torch.empty(size, dtype=like.dtype, pin_memory=like.is_cuda)
        else:
            self._memory = _in_file(size, like.dtype, offload)

    def front(self, shape: Shape) -> Tensor:
        """The first of the memory as (1, C, T, H, W)."""
        return self._view(0, shape)

    def back(self, clip: Tensor) -> Tensor:
        """Move a clip to the end of the memory, last part first: source and target may overlap."""
        source, target = clip.storage_offset(), self._memory.numel() - clip.numel()
        for start, stop in reversed(spans(clip.numel(), MOVED_AT_A_TIME)):
            part = self._memory[source + start : source + stop].clone()
            self._memory[target + start : target + stop] = part
        return self._view(target, tuple(clip.shape))

    def holds(self, clip: Tensor) -> bool:
        """Whether the clip lies in here."""
        return share_memory(clip, self._memory)

    def hold(self, clip: Tensor) -> Tensor:
        """The clip if it lies in here, else a copy at the front: what may be overwritten."""
        return clip if self.holds(clip) else self.front(tuple(clip.shape)).copy_(clip)

    def _view(self, start: int, shape: Shape) -> Tensor:
        _, c, t, h, w = shape
        part = self._memory[start : start + c * t * h * w]
        return part.view(1, t, h, w, c).movedim(-1, 1)


def _in_file(size: int, dtype: torch.dtype, folder: str | os.PathLike[str]) -> Tensor:
    """Memory in a new file of the folder: its name is gone at once, its place is reserved."""
    descriptor, name = tempfile.mkstemp(prefix="temporal_vae_", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk would otherwise end the process, later
            os.posix_fallocate(descriptor, 0, size * dtype.itemsize)
        return torch.from_file(name, shared=True, size=size, dtype=dtype)
    finally:
        os.close(descriptor)
        with contextlib.suppress(PermissionError):  # where files in use keep their name
            os.unlink(name)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one block of memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def new_clip(like: Tensor, shape: Shape, device: torch.device) -> Tensor:
    """New memory for (B, C, T, H, W), channels-last."""
    b, c, t, h, w = shape
    return torch.empty((b, t, h, w, c), dtype=like.dtype, device=device).movedim(-1, 1)


def new_like(tail: Tensor) -> Tensor:
    """New memory of the shape of a tensor (B, C, T, H, W), channels-last."""
    return new_clip(tail, tuple(tail.shape), tail.device)
