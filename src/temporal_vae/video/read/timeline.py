"""What a container says of time: when frames are shown, how many there are, when they end."""

from __future__ import annotations

import re
from fractions import Fraction

import av
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from temporal_vae.video.frames import is_regular_file

LIST_FRAMES = ("avi", "mov,mp4,m4a,3gp,3g2,mj2")
"""Formats whose index, read on opening, has an entry for each frame."""
COUNTED_FROM_ZERO = ("asf", "flv", "matroska,webm", "nut")
"""Formats that state the time of the end; others state the length, from the first frame on."""
SHORTEST_DELAY, REPLACEMENT_DELAY = 2, 10
"""In hundredths of a second: players, and ffmpeg, show a GIF's shorter delays for 0.1 s instead."""


class Timeline:
    """The times of one opened stream; called with each decoded frame in turn, it tells its tick."""

    can_seek = True
    """Whether the tick of a frame is known without the frames before it."""
    counts_lost_frames = True
    """Whether `frames` is what the file should hold, also where its end is missing."""

    def __init__(self, container: av.container.InputContainer, stream: VideoStream, path: str):
        self.rate = self._rate(stream, path)  # frames per second
        self.time_base = Fraction(stream.time_base or 1 / self.rate)
        self.step = max(1, round(1 / (self.rate * self.time_base)))
        self.frames = _listed_frames(container, stream)
        self.end = _claimed_end(container, stream)

    def __call__(self, frame: VideoFrame) -> int | None:
        """When a frame is shown, in ticks of the time base; None if nothing says so."""
        return frame.dts if frame.pts is None else frame.pts

    def _rate(self, stream: VideoStream, path: str) -> Fraction:
        return Fraction(stream.average_rate or stream.guessed_rate or 25)


class DecodingOrder(Timeline):
    """AVI, whose packets are numbered as they are decoded: presentation times are not stored.

    Those that libav gives are guesses, wrong for B-frames of H.264. A frame is shown when its
    decoder gives it, as players do; those that are left in it at the end follow evenly. Numbers
    may be passed over, so that the rate in the header may be a multiple of that of frames.
    """

    counts_lost_frames = False
    _last = 0

    def __call__(self, frame: VideoFrame) -> int | None:
        """See `Timeline`."""
        self._last = self._last + self.step if frame.dts is None else frame.dts
        return self._last

    def _rate(self, stream: VideoStream, path: str) -> Fraction:
        return Fraction(stream.guessed_rate or stream.average_rate or 25)


class Delays(Timeline):
    """GIF, whose frames say how long they are shown."""

    can_seek = False
    _next = 0

    def __init__(self, container: av.container.InputContainer, stream: VideoStream, path: str):
        super().__init__(container, stream, path)
        if self.frames is not None:  # libav's length is that of the delays as they are stored
            self.end = float(self.frames / self.rate)

    def __call__(self, frame: VideoFrame) -> int | None:
        """See `Timeline`."""
        at = self._next
        self._next += _shown(frame.duration)
        return at

    def _rate(self, stream: VideoStream, path: str) -> Fraction:
        if not is_regular_file(path) or not stream.time_base:
            return super()._rate(stream, path)
        with av.open(path, metadata_errors="replace") as container:
            delays = [_shown(packet.duration or 0) for packet in container.demux() if packet.size]
        return len(delays) / (sum(delays) * stream.time_base)


def timeline_of(container: av.container.InputContainer, stream: VideoStream, path: str) -> Timeline:
    """The timeline for a container's format."""
    kinds: dict[str, type[Timeline]] = {"avi": DecodingOrder, "gif": Delays}
    return kinds.get(container.format.name, Timeline)(container, stream, path)


def _shown(delay: int) -> int:
    return delay if delay >= SHORTEST_DELAY else REPLACEMENT_DELAY


def _listed_frames(container: av.container.InputContainer, stream: VideoStream) -> int | None:
    """The frames that a file says to show, without those that its edit list hides."""
    if not stream.frames or container.format.name not in LIST_FRAMES:
        return stream.frames or None
    index = stream.index_entries
    shown = min(stream.frames, len(index)) - sum(entry.is_discard for entry in index)
    return shown if shown > 0 else stream.frames


def _claimed_end(container: av.container.InputContainer, stream: VideoStream) -> float | None:
    """Seconds at which the video ends: by its stream, or by the container if it is the only one."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    start = 0.0
    if container.format.name not in COUNTED_FROM_ZERO and stream.start_time and stream.time_base:
        start = float(stream.start_time * stream.time_base)
    if stream.duration is not None and stream.time_base is not None:
        return start + float(stream.duration * stream.time_base)
    if tag:  # Matroska: 00:00:05.280000000
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    if container.duration is not None and len(container.streams) == 1:
        return start + float(container.duration) / av.time_base
    return None
