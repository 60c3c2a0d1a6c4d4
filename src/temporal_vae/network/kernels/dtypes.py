"""Which numbers a device computes with at full speed."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch

from temporal_vae.network.kernels.native import library


@lru_cache(maxsize=64)
def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has no instructions for a type: torch's kernels take ten times as long.

    Only for 16-bit types on the CPU, where torch falls back to plain loops. For bfloat16 ours in C
    do most of the work instead.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return not _has(dtype)


def _has(dtype: torch.dtype) -> bool:
    """What torch itself asks before it takes a fast kernel."""
    kernels = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return bool(kernels._is_mkldnn_bf16_supported())
    return bool(kernels._is_mkldnn_fp16_supported())


def fastest(device: torch.device) -> torch.dtype:
    """The type that a device computes fastest with, of those that hold a picture's digits."""
    if device.type == "cpu":
        own = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if own and not is_slow(torch.bfloat16, device) else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.float16 if device.type == "mps" else torch.bfloat16


def slowness(dtype: torch.dtype, device: torch.device) -> str | None:
    """What to say of a slow type before the work begins; None for the others."""
    if not is_slow(dtype, device):
        return None
    name, fast = str(dtype).removeprefix("torch."), str(fastest(device)).removeprefix("torch.")
    ours = dtype == torch.bfloat16 and library() is not None
    longer = "half as long again as" if ours else "about ten times as long as"
    return (
        f"this processor has no instructions for {name}, which takes {longer} {fast} on it: take "
        f"{fast}" + (", unless memory is short" if ours else "")
    )


@lru_cache(maxsize=64)
def warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Warn of a slow type, once in a process."""
    if (said := slowness(dtype, device)) is not None:
        warnings.warn(said, stacklevel=2)
