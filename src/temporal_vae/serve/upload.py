"""What becomes of an upload: its latents, its reconstruction beside it, and numbers of both."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

from temporal_vae.convert import decode, encode
from temporal_vae.evaluation import compare
from temporal_vae.evaluation.codecs import VideoCodec
from temporal_vae.latents import SUFFIX, ModelRecord
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Options, VideoReader

LISTS = re.compile(rb"(\xef\xbb\xbf)?\s*(#EXTM3U|ffconcat|<|v=)")
"""How files of text begin that name others: libav would open those, wherever they lie."""
PROBED_BYTES = 1 << 20
"""Of a file, that libav looks at to find its format."""
ENDING_SECONDS = 60
"""How long a run that is to be ended is waited for, at the most."""
Progress = Callable[[float, int | None, str], None]
"""Called with the frames done, how many there are if that is known, and what is being done."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an upload may be at most. A photo is a clip of one frame."""

    bytes: int
    frames: int
    size: tuple[int, int]
    """Height and width; a frame may have other sides, but no more pixels."""

    def __str__(self) -> str:
        height, width = self.size
        mib = f"{self.bytes / 2**20:.3g} MiB"
        return f"at most {mib}, {self.frames} frames, {width}x{height} pixels a frame"

    def check(self, upload: Path) -> Options:
        """What to read the upload with.

        Raises `VideoError` for what is no video, and `ValueError` for more than is taken.
        """
        size, name = upload.stat().st_size, upload.name
        if size > self.bytes:
            raise ValueError(f"{name} has {size / 2**20:.1f} MiB: this page takes {self}")
        with upload.open("rb") as file:
            if LISTS.match(file.read(PROBED_BYTES)):
                raise ValueError(f"{name} is no video, but text: upload a video or a photo itself")
        with VideoReader(upload, alpha="drop") as reader:
            height, width = reader.size
            if height * width > self.size[0] * self.size[1]:
                raise ValueError(f"{name} is {width}x{height}: this page takes {self}")
            self.check_frames(name, reader.info.expected_frames or 1)
            return {"alpha": "drop"} if reader.info.alpha else {}

    def check_frames(self, name: str, frames: float) -> None:
        """Raise `ValueError` for too many."""
        if frames > self.frames:
            raise ValueError(
                f"{name} has {math.ceil(frames)} frames or more: this page takes {self}"
            )


@dataclass(frozen=True, slots=True)
class Model:
    """A model to choose on the page."""

    name: str
    vae: TemporalVAE
    record: ModelRecord


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """What was made of an upload."""

    comparison: Path
    """A video, .mp4, or of a photo a picture, .png."""
    latents: Path
    numbers: dict[str, str]
    """What there is to say of both, by name."""


def reconstruct(
    upload: Path, folder: Path, model: Model, memory: str, limits: Limits, progress: Progress
) -> Reconstructed:
    """Encode an upload as `tvae encode` does, decode that, and compare; the files are in `folder`.

    Raises `VideoError` for what is no video, and `ValueError` for one above the limits, and for
    memory that cannot do.
    """
    options = limits.check(upload)
    latents, decoded = folder / f"{upload.stem}{SUFFIX}", folder / "reconstruction.mkv"
    walks: dict[str, str] = {}

    def told(doing: str) -> Progress:
        def tell(done: float, total: int | None, how: str) -> None:
            limits.check_frames(upload.name, done)  # whatever the file says of itself
            walks[doing] = how
            progress(done, total, doing)

        return tell

    how = encode.Encoding(memory=memory)
    encoded = encode.encode(upload, latents, model.vae, model.record, how, options=options,
                            progress=told("encoding"))  # fmt: skip
    done = decode.decode(latents, decoded, model.vae, model.record, memory=memory,
                         progress=told("decoding"))  # fmt: skip
    comparison = folder / ("comparison.png" if done.frames == 1 else "comparison.mp4")
    with _open(upload) as original, _open(decoded) as ours:
        layout = compare.Layout(("original", model.name))
        compare.compare(
            original, ours, comparison, layout,
            progress=lambda done, total: progress(done, total, "comparing"),
        )  # fmt: skip
    measured = compare.measure(lambda: _open(upload), VideoCodec(lambda: _open(decoded), "it"))
    return Reconstructed(comparison, latents, _numbers(encoded, done.seconds, measured, walks))


def _open(path: Path) -> VideoReader:
    return VideoReader(path, channels=3, alpha="drop")


def _numbers(
    encoded: encode.Encoded, decoding: float, measured: dict[str, float | None],
    walks: dict[str, str],
) -> dict[str, str]:  # fmt: skip
    info = encoded.info
    psnr, ssim, flicker = (measured[name] for name in compare.MEASURED)
    pixels = info.frames * info.height * info.width * 3
    what = "a photo" if info.frames == 1 else f"{info.frames} frames"
    cells = f"{info.channels}x{info.latent_frames}x{info.rows}x{info.columns}"
    rows = {
        "Upload": f"{what} of {info.width}x{info.height}",
        "PSNR": "-" if psnr is None else f"{psnr:.2f} dB",
        "SSIM": "-" if ssim is None else f"{ssim:.4f}",
        "Flicker": "-" if flicker is None else f"{flicker:.2f} of 255",
        "Latents": f"{cells}, {encoded.bytes:,} bytes; the pixels are {pixels:,}",
        "Memory": "; ".join(f"{doing}: {how}" for doing, how in walks.items()),
        "Time": f"encoding {encoded.seconds:.1f} s, decoding {decoding:.1f} s",
    }
    return rows | ({"Note": "; ".join(encoded.notes)} if encoded.notes else {})


@dataclass(frozen=True, slots=True)
class Runs:
    """Uploads that are reconstructed one at a time, until they are ended."""

    models: Mapping[str, Model]
    limits: Limits
    _busy: Lock = field(default_factory=Lock, init=False)
    _ended: Event = field(default_factory=Event, init=False)

    def run(
        self, upload: Path, folder: Path, model: str, memory: str, progress: Progress
    ) -> Reconstructed:
        """See `reconstruct`."""

        def tell(done: float, total: int | None, doing: str) -> None:
            if self._ended.is_set():
                raise ValueError("the page is being closed")
            progress(done, total, doing)

        with self._busy:
            return reconstruct(upload, folder, self.models[model], memory, self.limits, tell)

    def end(self) -> None:
        """Stop the run that goes on: a process that ends while a thread computes would crash."""
        self._ended.set()
        self._busy.acquire(timeout=ENDING_SECONDS)
