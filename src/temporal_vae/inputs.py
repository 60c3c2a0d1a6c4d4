"""Checks at the door, and the layouts that the public face takes.

Letters: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import BinaryIO, Literal, NamedTuple

import torch
from torch import Tensor

from temporal_vae.geometry import indivisible, latent_frames, video_frames

Layout = Literal["BCTHW", "BTCHW"]
Bytes = bytes | bytearray | memoryview


class Door(NamedTuple):
    """What a model takes; each check gives the clip (B, C, T, H, W), or raises `ValueError`."""

    input_channels: int
    latent_channels: int
    factor: int
    """Pixels per latent cell along height and width."""
    frames: int
    """Frames per latent along time, but for the first."""
    dtype: torch.dtype
    device: torch.device

    def pixels(self, video: Tensor, name: str, layout: Layout = "BCTHW") -> Tensor:
        """A video or image of whole latent cells, and as many frames as make whole latents."""
        clip = self._piece(video, name, layout)
        latent_frames(clip.shape[2], self.frames)
        return clip

    def _piece(self, video: Tensor, name: str, layout: Layout = "BCTHW") -> Tensor:
        clip = self._clip(video, self.input_channels, name, layout)
        if problem := indivisible(clip.shape[3], clip.shape[4], self.factor):
            raise ValueError(problem)
        return clip

    def latents(self, latent: Tensor, name: str, layout: Layout = "BCTHW") -> Tensor:
        """A latent of a video or image."""
        return self._clip(latent, self.latent_channels, name, layout)

    def target(self, out: Tensor, latent: Tensor, layout: Layout) -> Tensor:
        """Where the pixels of a latent are to be written, as a clip: `out` seen (B, C, T, H, W)."""
        shape = [*latent.shape[:-2], *(side * self.factor for side in latent.shape[-2:])]
        swapped = latent.ndim == 5 and layout == "BTCHW"
        shape[2 if swapped else 1] = self.input_channels
        if latent.ndim == 5:
            axis = 1 if swapped else 2
            shape[axis] = video_frames(shape[axis], self.frames)
        if tuple(out.shape) != tuple(shape):
            order = layout if latent.ndim == 5 else "BCHW"
            raise ValueError(f"out must hold {tuple(shape)} as {order}, got {tuple(out.shape)}")
        return out.unsqueeze(2) if latent.ndim == 4 else relayout(out, layout)

    def next_frames(self, frames: Tensor) -> Tensor:
        """A piece of a stream of pixels."""
        return self._piece(check_piece(frames, "frames"), "frames")

    def next_latents(self, latents: Tensor) -> Tensor:
        """A piece of a stream of latents."""
        return self.latents(check_piece(latents, "latents"), "latents")

    def _clip(self, x: Tensor, channels: int, name: str, layout: Layout) -> Tensor:
        check_layout(layout)
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        shape = tuple(x.shape)
        if x.ndim not in (4, 5):
            hint = f": add the batch with {name}.unsqueeze(0)" if x.ndim == 3 else ""
            raise ValueError(
                f"{name} must be video (B, C, T, H, W) or image (B, C, H, W), got {shape}{hint}"
            )
        if 0 in shape:
            raise ValueError(f"{name} must not be empty, got {shape}")
        _check_channels(shape, channels, name, layout)
        self._check_dtype(x, name)
        if x.device != self.device:
            if self.device.type == "meta":
                raise ValueError(
                    "the weights are on no device (meta), where nothing is computed: load values, "
                    "or take off what moves them layer by layer"
                )
            raise ValueError(
                f"{name} is on {x.device}, the model on {self.device}: move one with .to(...)"
            )
        return x.unsqueeze(2) if x.ndim == 4 else relayout(x, layout)

    def _check_dtype(self, x: Tensor, name: str) -> None:
        if not x.is_floating_point():
            raise ValueError(
                f"{name} must be floating point, got {x.dtype}: 8-bit pixels become "
                f"{name}.to({self.dtype}) / 127.5 - 1"
            )
        fits = x.dtype == self.dtype and self.dtype.itemsize > 1
        if fits or torch.is_autocast_enabled(x.device.type):
            return
        if self.dtype.itemsize == 1:
            raise ValueError(
                f"the weights are {self.dtype}, in which values are stored, but no layer computes: "
                "convert the model with .to(torch.bfloat16), or another type that is wider"
            )
        raise ValueError(
            f"{name} is {x.dtype}, the model {self.dtype}: convert with {name}.to({self.dtype})"
        )


def _check_channels(shape: tuple[int, ...], channels: int, name: str, layout: Layout) -> None:
    axis = 2 if len(shape) == 5 and layout == "BTCHW" else 1
    if shape[axis] == channels:
        return
    message = f"{name} must have {channels} channels on axis {axis}, got {shape}"
    if len(shape) == 5 and shape[3 - axis] == channels:
        other = "BTCHW" if layout == "BCTHW" else "BCTHW"
        message += f": these axes look like {other}, so pass layout={other!r}"
    elif len(shape) == 4 and shape[0] == channels:
        message += f": a video needs its batch, {name}.unsqueeze(0)"
    elif shape[-1] == channels:
        order = "0, 4, 1, 2, 3" if len(shape) == 5 else "0, 3, 1, 2"
        message += f": channels stand last, so pass {name}.permute({order})"
    raise ValueError(message)


def check_piece(x: Tensor, name: str) -> Tensor:
    """A piece of a stream, which has frames. Raises `ValueError` for another rank."""
    if isinstance(x, Tensor) and x.ndim != 5:
        raise ValueError(
            f"{name} of a stream must be (B, C, T, H, W), got {tuple(x.shape)}: one frame is "
            f"{name}.unsqueeze(2)"
        )
    return x


def one_clip(latent: Tensor) -> Tensor:
    """A latent of one video. Raises `ValueError` for another rank, or more samples."""
    if isinstance(check_piece(latent, "latent"), Tensor) and len(latent) > 1:
        raise ValueError(f"iter_decode takes one clip, got a batch of {len(latent)}")
    return latent


def check_moments(mean: Tensor, log_variance: Tensor) -> None:
    """Raise `ValueError` unless both have one shape, which is a latent's."""
    if mean.shape != log_variance.shape:
        raise ValueError(
            f"mean and log_variance must have one shape, got {tuple(mean.shape)} and "
            f"{tuple(log_variance.shape)}"
        )
    if mean.ndim not in (4, 5):
        raise ValueError(f"moments must be (B, L, T, h, w) or (B, L, h, w), got {mean.ndim} axes")


def like_given(clip: Tensor, given: Tensor) -> Tensor:
    """Bring a clip (B, C, T, H, W) to the rank of what was given."""
    return restore(clip, given, "BCTHW")


def check_has_values(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that can be replaced. Raises `ValueError` for those on the meta device."""
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError(
            "the model has no values to replace, it is on the meta device: use from_file or "
            "from_bytes, or to_empty(device=...) before"
        )
    return weights


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
    generator = torch.Generator()  # on the CPU: the same noise for every device
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(f"seed must be a whole number in [0, 2**63), got {seed!r}")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def given(scale: float | None, shift: float | None) -> dict[str, float]:
    """The latent's scale and shift as fields of a configuration, as far as they were given."""
    values = {"latent_scale_factor": scale, "latent_shift_factor": shift}
    return {name: value for name, value in values.items() if value is not None}


def check_layout(layout: str) -> None:
    """Raise `ValueError` for another layout than those that the public face takes."""
    if layout not in ("BCTHW", "BTCHW"):
        raise ValueError(f"layout must be 'BCTHW' or 'BTCHW', got {layout!r}")


def channel_axis(x: Tensor, layout: Layout) -> int:
    """Where the channels of a video or an image stand. Raises `ValueError` for no layout."""
    check_layout(layout)
    return 2 if layout == "BTCHW" and x.ndim == 5 else 1


def relayout(x: Tensor, layout: Layout) -> Tensor:
    """Swap frames and channels of a video if `layout` says so; its own inverse."""
    return x.transpose(1, 2) if layout == "BTCHW" and x.ndim == 5 else x


def restore(clip: Tensor, given: Tensor, layout: Layout) -> Tensor:
    """Bring a clip (B, C, T, H, W) to the rank and layout of what was given, contiguous."""
    return (clip.squeeze(2) if given.ndim == 4 else relayout(clip, layout)).contiguous()
