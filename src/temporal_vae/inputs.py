"""Checks at the door, and the layouts that the public face takes."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import BinaryIO, Literal

import torch
from torch import Tensor

Layout = Literal["BCTHW", "BTCHW"]
Bytes = bytes | bytearray | memoryview


def like_given(clip: Tensor, given: Tensor) -> Tensor:
    """Bring a clip (B, C, T, H, W) to the rank of what was given."""
    return restore(clip, given, "BCTHW")


def as_clips(data: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """Several clips as they are; one clip as the only one."""
    return (data,) if isinstance(data, Tensor) else data


def bytes_file(data: Bytes) -> tuple[BinaryIO, int]:
    """A file that reads these bytes, and their number."""
    try:
        size = memoryview(data).nbytes
    except TypeError as error:
        raise TypeError(f"data must be bytes, got {type(data).__name__}") from error
    return io.BytesIO(data), size


def floating_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """A floating-point dtype, float32 for None. Raises `ValueError` for any other."""
    if dtype is None:
        return torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    return dtype


def seeded_generator(seed: int | None) -> torch.Generator:
    """A new generator, from a seed or at random. Raises `ValueError` for what is no seed."""
    generator = torch.Generator()
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(f"seed must be a whole number in [0, 2**63), got {seed!r}")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def relayout(x: Tensor, layout: Layout) -> Tensor:
    """Swap frames and channels of a video if `layout` says so; its own inverse."""
    return x.transpose(1, 2) if layout == "BTCHW" and x.ndim == 5 else x


def restore(clip: Tensor, given: Tensor, layout: Layout) -> Tensor:
    """Bring a clip (B, C, T, H, W) to the rank and layout of what was given, contiguous."""
    return (clip.squeeze(2) if given.ndim == 4 else relayout(clip, layout)).contiguous()
