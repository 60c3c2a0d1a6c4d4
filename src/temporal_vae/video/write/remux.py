"""Sound and subtitles of a file, copied packet by packet beside the frames that are written."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from types import TracebackType
from typing import Self

import av
from av.packet import Packet
from av.stream import Stream

from temporal_vae.video.frames import is_rewound, not_copied

COPIED = ("audio", "subtitle")
RUN_UP = 30
"""Seconds before and after a cut that are read: packets of one time may lie apart in a file, and a
subtitle may still stand that began before."""
PRIMING = 0.1
"""Seconds of sound before the first that is heard, which its decoder may need."""
ENDS = (av.error.FFmpegError, IndexError)
"""What ends the packets of a file; the second, in PyAV, where a stream began on the way."""
TRIED_PACKETS = 1000
"""Packets that are looked through for one of each stream, before the frames."""


class CopiedStreams:
    """The audio and subtitle streams of a file between `start` and `end`, in its own seconds.

    `shift` is added to every timestamp, in seconds. Sound is taken that begins within the bounds,
    and subtitles that stand within them, cut to them; with `to_last_frame` nothing that begins
    after the frames. What cannot be copied is told in `notes`, and is no error; `settled` is what
    a reader of the frames said of these streams, which is not so any more.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        start: Fraction | float | None = None,
        end: Fraction | float | None = None,
        shift: Fraction | float = 0,
        to_last_frame: bool = False,
    ):
        self.path, self.to_last_frame = os.fspath(path), to_last_frame
        self.notes: list[str] = []
        self.settled: set[str] = set()
        self._shift = Fraction(shift)
        self._start = None if start is None else Fraction(start)
        self._end = None if end is None else Fraction(end)
        self._targets: dict[int, Stream] = {}
        self._lost: dict[int, int] = {}
        self._packets: Iterator[tuple[Fraction, Packet[Stream]]] = iter(())
        self._next: tuple[Fraction, Packet[Stream]] | None = None
        self._source = _open(self.path) if is_rewound(self.path) else None
        if not is_rewound(self.path) and not os.path.isdir(self.path):
            self.notes.append("sound and subtitles of a pipe, which is read once, are left out")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._source is not None:
            self._source.close()

    @property
    def time_bases(self) -> list[Fraction]:
        """What the timestamps of streams that may be copied are counted in."""
        return [s.time_base for s in self._candidates() if s.time_base]

    def join(self, container: av.container.OutputContainer) -> None:
        """Add to a container, before its first packet, a stream for each that it can hold."""
        if self._source is None:
            return
        samples = _samples(self.path, [s.index for s in self._candidates()])
        for stream in self._candidates():
            self.settled.add(not_copied(stream.type, stream.index))
            if _holds(container.format.name, stream, samples.get(stream.index)):
                target = container.add_stream_from_template(stream, opaque=True)
                target.metadata.update(stream.metadata)
                target.disposition = stream.disposition
                self._targets[stream.index] = target
            else:
                name = container.format.name
                self.notes.append(
                    f"{stream.type} stream {stream.index} is left out: {name} does not hold "
                    + stream.codec_context.codec.canonical_name
                    + ("" if name == "matroska" else ", .mkv may")
                )
        if self._targets:
            self._packets = self._selected()
            self._next = next(self._packets, None)

    def until(self, seconds: Fraction | None = None) -> Iterator[Packet[Stream]]:
        """The packets before a time of the target that have not been given yet; all the rest."""
        while self._next is not None and (seconds is None or self._next[0] < seconds):
            yield self._next[1]
            self._next = next(self._packets, None)

    def refused(self, packet: Packet[Stream]) -> None:
        """Count a packet that the container did not take."""
        index = next(i for i, target in self._targets.items() if target is packet.stream)
        self._lost[index] = self._lost.get(index, 0) + 1

    def close_notes(self) -> Iterator[str]:
        """What was lost on the way, a line each."""
        for index, count in self._lost.items():
            yield f"{count} packets of stream {index} are damaged, and left out"

    def _candidates(self) -> list[Stream]:
        streams = () if self._source is None else self._source.streams
        return [s for s in streams if s.type in COPIED and s.codec_context is not None]

    def _selected(self) -> Iterator[tuple[Fraction, Packet[Stream]]]:
        """Packets of the copied streams within the bounds, with the time they are decoded at."""
        assert self._source is not None
        if self._start is not None and self._start > RUN_UP:
            with suppress(av.error.FFmpegError):  # then it is read from its first packet on
                self._source.seek(int((self._start - RUN_UP) * av.time_base))
        streams = [s for s in self._candidates() if s.index in self._targets]
        past: set[int] = set()
        with suppress(*ENDS):  # damaged from here on, which the reader tells
            for packet in self._source.demux(streams):
                if packet.pts is None or not packet.size or _hidden(packet):
                    continue
                late = -1 if self._end is None else packet.pts * packet.time_base - self._end
                if late >= 0:
                    past.add(packet.stream.index)
                    if len(past) == len(streams) or late > RUN_UP:
                        return
                elif self._cut(packet):
                    ticks = round(self._shift / packet.time_base)
                    dts = (packet.pts if packet.dts is None else packet.dts) + ticks
                    packet.pts, packet.dts = packet.pts + ticks, dts
                    time = dts * packet.time_base
                    packet.stream = self._targets[packet.stream.index]
                    yield time, packet

    def _cut(self, packet: Packet[Stream]) -> bool:
        """Cut a subtitle to the bounds; whether anything of a packet is within them."""
        base, begin, length = packet.time_base, packet.pts or 0, packet.duration or 0
        start = begin if self._start is None else math.ceil(self._start / base)
        subtitle = packet.stream.type == "subtitle"
        if begin < start:
            if not subtitle or begin + length <= start:
                return False
            length -= start - begin
            begin = packet.pts = packet.dts = start
        if subtitle and self._end is not None:
            length = min(length, round(self._end / base) - begin)
        packet.duration = length
        return True


def _hidden(packet: Packet[Stream]) -> bool:
    """Whether an edit list hides a packet, and what is heard after it does not need it."""
    if not packet.is_discard or packet.stream.start_time is None or packet.pts is None:
        return False
    before = (packet.stream.start_time - packet.pts) * packet.time_base
    return not 0 <= before <= PRIMING


def _open(path: str) -> av.container.InputContainer | None:
    """None for what libav does not read as a container, such as an animated WebP."""
    try:
        return av.open(os.path.abspath(path), metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError):
        return None


def _samples(path: str, indices: list[int]) -> dict[int, Packet[Stream]]:
    """The first packet of each stream, as far as one comes early."""
    found: dict[int, Packet[Stream]] = {}
    source = _open(path) if indices else None
    if source is None:
        return found
    with source, suppress(*ENDS):
        streams = [source.streams[index] for index in indices]
        for count, packet in enumerate(source.demux(streams)):
            if packet.size and packet.pts is not None:
                found.setdefault(packet.stream.index, packet)
            if len(found) == len(indices) or count > TRIED_PACKETS:
                break
    return found


def _holds(format_name: str, stream: Stream, sample: Packet[Stream] | None) -> bool:
    """Whether a container takes a stream: tried, since some fail only when they are closed."""
    try:
        with av.open(io.BytesIO(), "w", format=format_name) as container:
            target = container.add_stream_from_template(stream, opaque=True)
            container.start_encoding()
            if sample is not None:
                sample.stream = target
                container.mux_one(sample)
    except (av.error.FFmpegError, ValueError):
        return False
    return True
