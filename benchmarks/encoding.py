"""`tvae encode` on a long video: time spent waiting for frames, size against the numbers, memory.

    python benchmarks/encoding.py [--frames 300] [--size 256x144] [--minutes 0]

The waiting is the time inside the reader's iterator, over the time from its first frame to the
finished file, with `tiny` in one process, bfloat16 latents. With --minutes, peak anonymous memory
of the command (Linux) for ten seconds of video against so many minutes, 64x64, by a small model.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from flat_memory import make_video, peak

from temporal_vae import TemporalVAE
from temporal_vae.cli.options import ModelOptions
from temporal_vae.convert import encode as encoding
from temporal_vae.latents import LatentWriter
from temporal_vae.video import Frame, VideoReader


class Clock:
    """Seconds inside the reader's iterator and the latents' writer."""

    def __init__(self) -> None:
        self.waiting = self.writing = 0.0

    def timed_reading(self, reader: VideoReader) -> Iterator[Frame]:
        """`VideoReader.__iter__`, timed from the outside."""
        frames = READ(reader)
        while True:
            start = time.perf_counter()
            frame = next(frames, None)
            self.waiting += time.perf_counter() - start
            if frame is None:
                return
            yield frame

    def timed_writing(self, writer: LatentWriter, latents: torch.Tensor, stamps: list[int]) -> None:
        """`LatentWriter.write`, timed."""
        start = time.perf_counter()
        WRITE(writer, latents, stamps)
        self.writing += time.perf_counter() - start


READ, WRITE = VideoReader.__iter__, LatentWriter.write


def measure(source: Path, target: Path) -> None:
    """Print the shares of time and the size."""
    model, record = ModelOptions().load_with_record()
    clock, how = Clock(), encoding.Encoding(dtype=torch.bfloat16)
    with (
        mock.patch.object(VideoReader, "__iter__", lambda reader: clock.timed_reading(reader)),
        mock.patch.object(LatentWriter, "write", lambda *a: clock.timed_writing(*a)),
    ):
        done = encoding.encode(source, target, model, record, how, overwrite=True)
    payload = done.info.frames * done.info.frame_bytes
    print(
        f"{done.info.frames} frames in {done.seconds:.1f} s, {done.info.frames / done.seconds:.2f} "
        f"frames/s on {model.device}: waiting for frames {clock.waiting / done.seconds:.2%}, "
        f"writing {clock.writing / done.seconds:.2%}"
    )
    print(f"{done.bytes} bytes for {payload} of numbers: {done.bytes / payload:.4f}", flush=True)


def measure_memory(folder: Path, minutes: float) -> None:
    """Print peaks of both verbs for ten seconds and for `minutes`."""
    model = folder / "model"
    TemporalVAE(base_channels=8, channel_multipliers=(1, 2), seed=0).save_pretrained(model)
    peaks: dict[str, list[int]] = {"encode": [], "decode": []}
    for frames in (250, round(minutes * 60 * 25)):
        source = folder / f"{frames}.mkv"
        make_video(source, frames, 64, 64)
        latents, video = source.with_suffix(".safetensors"), source.with_suffix(".mp4")
        for verb, words in (("encode", (source, latents)), ("decode", (latents, video))):
            peaks[verb].append(peak(*words, str(model), verb=verb))
            print(f"{verb} {frames:6} frames: peak {peaks[verb][-1] / 2**20:.1f} MiB", flush=True)
    for verb, (short, long) in peaks.items():
        print(f"{verb}: ratio {long / short:.3f}")


def main() -> None:
    """Print it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--size", default="256x144")
    parser.add_argument("--minutes", type=float, default=0)
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    print(
        f"{datetime.date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{options.size}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for suffix in (".mp4", ".mkv"):
            source = folder / f"in{suffix}"
            make_video(source, options.frames, height, width)
            print(f"{suffix}: ", end="")
            measure(source, folder / "out.safetensors")
        if options.minutes:
            measure_memory(folder, options.minutes)


if __name__ == "__main__":
    main()
