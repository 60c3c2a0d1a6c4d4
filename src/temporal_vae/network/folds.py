"""Clips as torch's 2-D kernels see them, without a copy.

Letters: B batch, C channels, T frames, H height, W width, P pixels of a frame (H*W).

In the memory order of a clip, B T H W C, its frames fold into the batch, (B*T, C, H, W), and its
pixels into one axis, (B, C, T, P): views that are channels-last too. (They are taken with the
channels last: otherwise torch gives an axis of size one a stride that hides the memory order from
its kernels.)

In a graph that is exported frames have their own channels first, as in B T C H W: who runs it finds
its own memory order, and the fewer moves of axes there are, the better.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_exporting


def channels_last(x: Tensor) -> Tensor:
    """x (B, C, ...) in the memory order B ... C; itself if it is.

    Not by a `memory_format`, which `torch.vmap` does not take.
    """
    return x if is_exporting() else x.movedim(1, -1).contiguous().movedim(-1, 1)


def joined(*parts: Tensor, axis: int = 2) -> Tensor:
    """Frames (B, C, n, H, W), or rows, that follow one another, in one memory order whatever their
    sizes."""
    if is_exporting():
        return torch.cat([part for part in parts if part.shape[axis]], axis)
    both: Tensor = torch.cat([part.movedim(1, -1) for part in parts], axis - 1)
    return both.movedim(-1, 1)


def zero_frames(x: Tensor, frames: int) -> Tensor:
    """So many frames of zeros such as those of (B, C, T, H, W)."""
    b, c, _, h, w = x.shape
    return x.new_zeros(b, frames, h, w, c).movedim(-1, 1)


def fold_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W), a view."""
    if is_exporting():
        return x.transpose(1, 2).flatten(0, 1)
    return x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)


def unfold_frames(y: Tensor, batch: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W), channels-last; a view if it was."""
    clip: Tensor
    if is_exporting():
        clip = y.unflatten(0, (batch, -1)).transpose(1, 2)
    else:
        clip = y.movedim(1, -1).contiguous().unflatten(0, (batch, -1)).movedim(-1, 1)
    return clip


def fold_pixels(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T, P), a view."""
    if is_exporting():
        return x.flatten(3)
    return x.movedim(1, -1).flatten(2, 3).movedim(-1, 1)


def unfold_pixels(y: Tensor, size: torch.Size) -> Tensor:
    """(B, C, T, P) -> (B, C, T, H, W), channels-last; a view if it was."""
    clip: Tensor
    if is_exporting():
        clip = y.unflatten(3, size)
    else:
        clip = y.movedim(1, -1).contiguous().unflatten(2, size).movedim(-1, 1)
    return clip
