"""Latents from a file, by ranges of frames."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from temporal_vae.files import streams
from temporal_vae.files.safetensors import read_text
from temporal_vae.geometry import spans
from temporal_vae.latents.distribution import LatentDistribution
from temporal_vae.latents.header import MOST_HEADER_BYTES, is_latents, tensors, unpack
from temporal_vae.latents.info import MOST_STAMP, LatentFileError, LatentInfo

PIECE_BYTES = 2**24
"""`pieces` reads about so much at a time, at least a frame."""


class LatentFile:
    """A file of latents, read as asked: `with LatentFile(path) as file: file.read(0, 16)`.

    Opening checks every field and the file's length. The file is read, not mapped: one that shrinks
    meanwhile is an error instead of the end of the process. Threads and forked processes may share
    an open one. A copy, or one in another process, opens the file again by its path, and raises
    where that is another file by then.

    `begin` and `size` are those of a part of a larger file, such as a member of a tar file, in
    bytes; by default it is the whole one.

    Raises `LatentFileError` for a file that is missing, damaged, or of something else.
    """

    def __init__(self, path: str | os.PathLike[str], begin: int = 0, size: int | None = None):
        self.path = os.fspath(path)
        self._part = begin, size
        self._file = _open(self.path)
        try:
            self._file.seek(begin)
            length = int.from_bytes(self._file.read(8).ljust(8, b"\xff"), "little")
            if not 2 <= length <= min(self._size() - 8, MOST_HEADER_BYTES):
                raise LatentFileError("no file of latents: it does not begin like one")
            self._file.seek(begin)
            text = read_text(self._file, MOST_HEADER_BYTES)
            self._data_start = begin + 8 + len(text)
            self.info = unpack(text, begin + self._size() - self._data_start)
        except BaseException as error:
            self._file.close()
            if isinstance(error, ValueError):  # it quotes the file: any text of any length
                words = " ".join(str(error).split())
                raise LatentFileError(f"{self.path}: {words:.400}") from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), os.path.abspath(self.path), self._part, self.info)

    def _size(self) -> int:
        """Bytes that are there of what is stated, now."""
        begin, size = self._part
        there = os.fstat(self._file.fileno()).st_size - begin
        return there if size is None else min(there, size)

    def read(self, start: int = 0, frames: int | None = None) -> Tensor:
        """What is stored of a range of latents along time, (1, C, n, h, w), as the file has it.

        They are in the file's dtype and scaling, C being 2*L for moments (mean, then log-variance),
        L for a sample. All from `start` on if `frames` is None. Where a latent holds several frames
        the range counts latents, as everywhere but for `timestamps`.
        Raises `LatentFileError` for a range outside the file, or numbers that are not finite.
        """
        total, *frame = self.info.shape
        count = self._range(start, frames, total)
        stored = torch.empty(count, *frame, dtype=self.info.dtype)
        self._fill(stored, start * self.info.frame_bytes)
        if not stored.isfinite().all():
            raise LatentFileError(
                f"{self.path}: frames {start} to {start + count - 1} hold NaN or infinity: the "
                "file is damaged, or what made it overflowed"
            )
        return stored.transpose(0, 1).unsqueeze(0).contiguous()

    def moments(self, start: int = 0, frames: int | None = None) -> LatentDistribution:
        """The posterior of a range of frames, not scaled, in float32 at least.

        Raises `LatentFileError` also where the file holds a sample.
        """
        if self.info.kind != "moments":
            raise LatentFileError(f"{self.path} holds a sample, of which the moments are not known")
        return self._posterior(start, frames, False)

    def latents(
        self,
        start: int = 0,
        frames: int | None = None,
        *,
        sample_mode: bool = False,
        generator: torch.Generator | None = None,
        scaled: bool = False,
    ) -> Tensor:
        """Latents (1, L, n, h, w) of a range of frames; see `read_latents`."""
        if self.info.kind == "sample":
            if generator is not None:
                raise LatentFileError(f"{self.path} holds a sample already: nothing is drawn")
            return self.info.rescale(self.read(start, frames), scaled)
        posterior = self._posterior(start, frames, scaled)
        return posterior.sample(generator) if sample_mode else posterior.mean

    def timestamps(self, start: int = 0, frames: int | None = None) -> list[int]:
        """Timestamps of a range of frames of the video, in `info.time_base`, each above the last.

        Raises `LatentFileError` for a range outside the file, or timestamps that do not grow.
        """
        count = self._range(start, frames, self.info.frames)
        first, step = self.info.start, self.info.step
        if step is not None:
            return [first + step * index for index in range(start, start + count)]
        before = 1 if start else 0  # to compare the first of the range with
        stamps = torch.empty(count + before, dtype=torch.int64)
        self._fill(stamps, tensors(self.info)["timestamps"].begin + 8 * (start - before))
        if (stamps[1:] <= stamps[:-1]).any() or stamps[0] < 0 or stamps[-1] > MOST_STAMP:
            raise LatentFileError(f"{self.path}: its timestamps do not grow: it is damaged")
        found: list[int] = stamps[before:].tolist()
        return found

    def pieces(self, frames: int | None = None) -> Iterator[tuple[int, int]]:
        """First and number of latents of ranges that cover the file, of `frames` or a few MiB."""
        step = frames or max(1, PIECE_BYTES // self.info.frame_bytes)
        for start, end in spans(self.info.latent_frames, step):
            yield start, end - start

    def _posterior(self, start: int, frames: int | None, scaled: bool) -> LatentDistribution:
        halves = self.info.rescale(self.read(start, frames), scaled).chunk(2, 1)
        return LatentDistribution(*(half.contiguous() for half in halves))

    def _range(self, start: int, frames: int | None, total: int) -> int:
        count = total - start if frames is None else frames
        if type(start) is not int or type(count) is not int or start < 0 or count < 1:
            raise LatentFileError(f"no frames {start} + {frames} of {self.path}, which has {total}")
        if start + count > total:
            raise LatentFileError(
                f"{self.path} has {total} frames: none from {start} to {start + count - 1}"
            )
        return count

    def _fill(self, tensor: Tensor, position: int) -> None:
        """Read a contiguous tensor from a position among the stored numbers, in bytes."""
        bytes_of = tensor.view(torch.uint8).numpy().data.cast("B")
        if streams.read_at(self._file, bytes_of, self._data_start + position) != len(bytes_of):
            raise LatentFileError(f"{self.path} became shorter while it was read")


def read_latents(
    path: str | os.PathLike[str],
    start: int = 0,
    frames: int | None = None,
    *,
    sample_mode: bool = False,
    generator: torch.Generator | None = None,
    scaled: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, LatentInfo]:
    """Latents (1, L, n, h, w) of frames `start` to `start + frames - 1` (to the end if None).

    Where one latent holds several frames of the video, `start` and `frames` count latents.
    Of moments the mean, or with `sample_mode` a draw by `generator`, for the frames that are read;
    a file that holds a sample gives that one. Not scaled, unless `scaled` asks for what a diffusion
    model works on; the file knows which of both it holds, so nothing is ever scaled twice.
    float32 (float64 from a file of it), unless `dtype` says otherwise. `info` describes the file.

    Raises `LatentFileError` for a file that is damaged or of something else, or a range outside it.
    """
    with LatentFile(path) as file:
        latents = file.latents(
            start, frames, sample_mode=sample_mode, generator=generator, scaled=scaled
        )
        return latents if dtype is None else latents.to(dtype), file.info


def holds_latents(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a file of latents, sound or not."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return is_latents(file.read(4096))


def _reopen(
    kind: type[LatentFile], path: str, part: tuple[int, int | None], info: LatentInfo
) -> LatentFile:
    file = kind(path, *part)
    if file.info != info:
        file.__exit__()
        raise LatentFileError(f"{path} is not the file any more that was open: open it anew")
    return file


def _open(path: str) -> BinaryIO:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise LatentFileError(f"{path} is a folder, a device or a pipe, not a file of latents")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise LatentFileError(f"{path}: no such file") from error
    except OSError as error:
        raise LatentFileError(f"cannot read {path}: {error.strerror}") from error
