"""Latents to a file, frame by frame in flat memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import version
from typing import Any, BinaryIO, NoReturn, Self

import torch
from torch import Tensor

from temporal_vae.files.atomic import atomic_path
from temporal_vae.files.safetensors import SUFFIX
from temporal_vae.geometry import spans, video_frames
from temporal_vae.latents.distribution import LatentDistribution
from temporal_vae.latents.header import pack, room_for, tensors
from temporal_vae.latents.info import MOST_STAMP, Kind, LatentFileError, LatentInfo, ModelRecord
from temporal_vae.video.frames import exact_rate

WRITE_FRAMES = 64


class LatentWriter:
    """Append frames of latents to a new file; use it inside `files.atomic_path`.

    Room for the header is reserved at the front. The file is unreadable until `finish` writes the
    header. The length and the timestamps in `info` are replaced by those of what is written.

    Raises `LatentFileError` for a file that cannot be written, or not from its end to its start.
    """

    def __init__(self, path: str | os.PathLike[str], info: LatentInfo):
        self.path, self._info = os.fspath(path), replace(info, frames=1, start=0, step=1)
        self._stamps = array("q")  # 8 bytes a frame
        self._latents = 0
        self._room = room_for(self._info)
        try:
            self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise LatentFileError(f"cannot write {self.path}: {error.strerror}") from error
        if not self._file.seekable():
            self._file.close()
            raise LatentFileError(
                f"{self.path} is a pipe, and the header of latents is written last: name a file"
            )
        self._write(bytes(self._room))

    @property
    def unscaled(self) -> LatentInfo:
        """The header of the same latents before they are scaled."""
        return replace(self._info, scaled=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self.path} is being written: a file of latents is written by one process"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # after an error, what is still buffered may have no room on the disk either
        with _clear_errors() if kind is None else suppress(OSError):
            self._file.close()

    def write(self, stored: Tensor, timestamps: Sequence[int]) -> None:
        """Append (1, C, n, h, w), scaled or not as `info` says, and growing timestamps of frames.

        There may be a timestamp for each frame that n latents hold, or fewer for the last ones.
        Raises `LatentFileError` for what does not continue the file, or does not fit its dtype.
        """
        _, *frame = self._info.shape
        count = stored.shape[2] if stored.ndim == 5 else 0
        expected = (1, frame[0], count, *frame[1:])
        if tuple(stored.shape) != expected:
            raise LatentFileError(f"latents must be {expected}, got {tuple(stored.shape)}")
        self._append_stamps(timestamps)
        self._latents += count
        rounded = stored.detach()[0].transpose(0, 1).to("cpu", self._info.dtype).contiguous()
        if not rounded.isfinite().all():
            raise LatentFileError(
                f"the latents hold NaN or infinity as {self._info.dtype}: a model or a file in "
                "float16 may overflow, so take bfloat16"
            )
        self._write(rounded.view(torch.uint8).numpy().data.cast("B"))

    def finish(self, **late: Any) -> LatentInfo:
        """Write timestamps and header, with fields of it that became known; gives the header.

        Raises `LatentFileError` where no frame was written, or not one timestamp for each.
        """
        if not self._stamps:
            raise LatentFileError("there are no frames to write")
        start, step = self._stamps[0], _step(self._stamps)
        late |= {"frames": len(self._stamps), "start": start if step else 0, "step": step}
        info = replace(self._info, **late)
        if info.latent_frames != self._latents:
            raise LatentFileError(
                f"there are {self._latents} latents along time, but {len(self._stamps)} timestamps "
                f"are those of {info.latent_frames}: one timestamp is for one frame"
            )
        if step is None:
            slots = tensors(info)
            self._write(bytes(slots["timestamps"].begin - slots[info.kind].end))
            self._write(memoryview(self._stamps).cast("B"))
        with _clear_errors():
            self._file.seek(0)  # writes what is still buffered
        self._write(pack(info, self._room))
        return info

    def _append_stamps(self, timestamps: Sequence[int]) -> None:
        for stamp in timestamps:
            last = self._stamps[-1] if self._stamps else -1
            if not last < stamp <= MOST_STAMP:
                raise LatentFileError(
                    f"timestamps must grow from 0 or above to 2**62, got {stamp} after {last} at "
                    f"frame {len(self._stamps)}"
                )
            self._stamps.append(stamp)

    def _write(self, data: bytes | memoryview) -> None:
        with _clear_errors():
            self._file.write(data)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn a full disk and the like into a `LatentFileError`, one line that says what failed."""
    try:
        yield
    except OSError as error:
        raise LatentFileError(f"cannot write latents: {error.strerror}") from error


def _step(stamps: Sequence[int]) -> int | None:
    """What lies between any two neighbours; None if it varies. 1 for a lone frame."""
    step = stamps[1] - stamps[0] if len(stamps) > 1 else 1
    constant = all(stamp == stamps[0] + step * index for index, stamp in enumerate(stamps))
    return step if constant else None


def write_latents(
    path: str | os.PathLike[str],
    latents: Tensor | LatentDistribution,
    model: ModelRecord,
    *,
    size: tuple[int, int] | None = None,
    fps: Fraction | float = 25,
    time_base: Fraction | None = None,
    timestamps: Sequence[int] | None = None,
    scaled: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    **fields: Any,
) -> LatentInfo:
    """Write the latents of one clip, (1, L, T, h, w) or an image's (1, L, h, w), to a new file.

    A posterior, as `encode_with_distribution` gives it, is stored as moments, a tensor as a sample.
    The file appears whole or not at all.

    Args:
        path: ends in .safetensors.
        latents: what to store; see `scaled`.
        model: what made them, `vae.latent_record(name)`.
        size: height and width of the video in pixels, where the frames were padded at the bottom
            and the right to whole cells; None means no padding.
        fps: frames per second.
        time_base: seconds in a unit of `timestamps`; None means 1 / fps.
        timestamps: of the frames of the video, growing; None means 0, 1, 2, ... for all that the
            latents hold. Fewer where the last latent was filled up by repeating the last frame.
        scaled: whether `latents` are scaled, as `scale_latent` gives them. It is recorded, and
            nothing is computed.
        dtype: float32, bfloat16, float16 or float64; None means that of `latents`.
        overwrite: replace a file of this name.
        fields: further fields of `LatentInfo`: clip_frames, seed, colour, source, ...

    Raises `LatentFileError` for what cannot be stored, `OSError` where nothing can be written.
    """
    kind, stored = _one_clip(latents)
    check_target(path, overwrite)
    _, channels, count, rows, columns = stored.shape
    rate, factor = _rate(fps), model.downsample_factor
    height, width = size or (rows * factor, columns * factor)
    info = LatentInfo(
        kind=kind,
        dtype=dtype or stored.dtype,
        frames=1,
        channels=channels // (2 if kind == "moments" else 1),
        rows=rows,
        columns=columns,
        height=height,
        width=width,
        padding_bottom=rows * factor - height,
        padding_right=columns * factor - width,
        scaled=scaled,
        fps=rate,
        time_base=time_base or 1 / rate,
        **record_fields(model),
        **fields,
    )
    each = info.frames_per_latent
    frames = video_frames(count, each) if count else 0
    stamps = range(frames) if timestamps is None else timestamps
    with atomic_path(path) as partial, LatentWriter(partial, info) as writer:
        for start, end in spans(count, WRITE_FRAMES):
            last = end * each if end < count else None
            writer.write(stored[:, :, start:end], stamps[start * each : last])
        return writer.finish()


def _one_clip(latents: Tensor | LatentDistribution) -> tuple[Kind, Tensor]:
    """What is stored of latents, as (1, C, T, h, w). Raises `LatentFileError` for several clips."""
    kind: Kind = "sample" if isinstance(latents, Tensor) else "moments"
    stored = latents if isinstance(latents, Tensor) else torch.cat(tuple(latents), 1)
    stored = stored.unsqueeze(2) if stored.ndim == 4 else stored
    if stored.ndim != 5 or len(stored) != 1:
        raise LatentFileError(
            f"one file holds one clip, (1, L, T, h, w), got {tuple(stored.shape)}: write each "
            "sample of a batch to a file of its own"
        )
    return kind, stored


def _rate(fps: Fraction | float) -> Fraction:
    try:
        return exact_rate(fps)
    except ValueError as error:
        raise LatentFileError(str(error)) from error


def record_fields(model: ModelRecord) -> dict[str, Any]:
    """The fields of a `LatentInfo` that tell of the model and the library."""
    each = model.latent_mean is not None or model.latent_std is not None
    return {
        "model": model.name,
        "frames_per_latent": model.frames_per_latent,
        "scale_factor": None if each else float(model.scale_factor),
        "shift_factor": None if each else float(model.shift_factor),
        "latent_mean": _numbers(model.latent_mean),
        "latent_std": _numbers(model.latent_std),
        "encoder_sha256": model.encoder_sha256,
        "decoder_sha256": model.decoder_sha256,
        "library": f"temporal-video-vae {version('temporal-video-vae')}",
    }


def _numbers(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))


def check_target(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise `LatentFileError` unless latents may be written under this name."""
    name = os.fspath(path)
    if name == "-" or (os.path.exists(path) and not os.path.isfile(path)):
        raise LatentFileError(
            f"latents cannot be written to {name!r}: their header is written last, so name a file"
        )
    if not name.endswith(SUFFIX):
        raise LatentFileError(f"the name of a file of latents must end in {SUFFIX}, got {name!r}")
    if os.path.exists(path) and not overwrite:
        raise LatentFileError(f"{name} exists: overwrite=True (--overwrite) replaces it")
