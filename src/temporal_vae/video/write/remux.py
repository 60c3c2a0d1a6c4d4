"""Sound and subtitles of a file, copied packet by packet beside the frames that are written."""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from typing import Self

import av
from av.packet import Packet
from av.stream import Stream

from temporal_vae.video.frames import is_regular_file, not_copied

COPIED = ("audio", "subtitle")
MARGIN = 30
"""Seconds before `start` and after `end` that are read too.

Packets of one time may lie apart in a file, and a subtitle that begins earlier may still be shown.
"""
PRIMING = 0.1
"""Seconds of sound before the first that is heard, which its decoder may need."""
DEMUX_ERRORS = (av.error.FFmpegError, IndexError)
"""What PyAV raises where it cannot read on: the second at a stream that was not there at first."""
SAMPLED_PACKETS = 1000
"""How many packets are searched for one of each stream."""


class CopiedStreams:
    """The audio and subtitle streams of a file between `start` and `end`, in the file's seconds.

    `shift`, in seconds, is added to every timestamp. Sound packets are taken that begin within the
    bounds, and subtitles that are shown within them, shortened to fit; with `to_last_frame` nothing
    that begins after the frames. What cannot be copied is no error but a line in `notes`. `settled`
    has the notes of `VideoReader` about these streams, which are replaced by this.
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
        self._refused: Counter[int] = Counter()
        self._packets: Iterator[tuple[Fraction, Packet[Stream]]] = iter(())
        self._next: tuple[Fraction, Packet[Stream]] | None = None
        self._source = _open(self.path) if is_regular_file(self.path) else None
        streams = () if self._source is None else self._source.streams
        self._streams = [s for s in streams if s.type in COPIED and s.codec_context is not None]
        if not is_regular_file(self.path) and not os.path.isdir(self.path):
            self.notes.append("sound and subtitles of a pipe, which is read once, are left out")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._source is not None:
            self._source.close()

    @property
    def time_bases(self) -> list[Fraction]:
        """The time bases of the streams that may be copied."""
        return [stream.time_base for stream in self._streams if stream.time_base]

    def join(self, container: av.container.OutputContainer) -> None:
        """Add to a container, before its first packet, those of the streams that it can hold."""
        name, samples = container.format.name, _samples(self.path, self._streams)
        for stream in self._streams:
            self.settled.add(not_copied(stream.type, stream.index))
            if _holds(name, stream, samples.get(stream.index)):
                target = container.add_stream_from_template(stream, opaque=True)
                target.metadata.update(stream.metadata)
                target.disposition = stream.disposition
                self._targets[stream.index] = target
            else:
                self.notes.append(
                    f"{stream.type} stream {stream.index} is left out: {name} does not hold "
                    + stream.codec_context.codec.canonical_name
                    + ("" if name == "matroska" else ", .mkv may")
                )
        if self._targets:
            self._packets = self._selected()
            self._next = next(self._packets, None)

    def until(self, seconds: Fraction | None = None) -> Iterator[Packet[Stream]]:
        """The packets before a time of the written file that have not come yet; None for all."""
        while self._next is not None and (seconds is None or self._next[0] < seconds):
            yield self._next[1]
            self._next = next(self._packets, None)

    def refused(self, packet: Packet[Stream]) -> None:
        """Count a packet that the container did not take."""
        self._refused[next(i for i, s in self._targets.items() if s is packet.stream)] += 1

    def all_notes(self) -> list[str]:
        """`notes`, and a line for each stream with packets that were refused."""
        return self.notes + [
            f"{count} packets of stream {index} are damaged, and left out"
            for index, count in self._refused.items()
        ]

    def _selected(self) -> Iterator[tuple[Fraction, Packet[Stream]]]:
        """Packets of the copied streams within the bounds, with their decoding times."""
        assert self._source is not None
        if self._start is not None and self._start > MARGIN:
            with suppress(av.error.FFmpegError):  # then packets come from the first one on
                self._source.seek(int((self._start - MARGIN) * av.time_base))
        streams = [stream for stream in self._streams if stream.index in self._targets]
        ended: set[int] = set()
        with suppress(*DEMUX_ERRORS):  # the reader of the frames notes that the file is damaged
            for packet in self._source.demux(streams):
                if packet.pts is None or not packet.size or _hidden(packet):
                    continue
                late = -1 if self._end is None else packet.pts * packet.time_base - self._end
                if late >= 0:
                    ended.add(packet.stream.index)
                    if len(ended) == len(streams) or late > MARGIN:
                        return
                elif self._cut(packet):
                    yield self._moved(packet)

    def _cut(self, packet: Packet[Stream]) -> bool:
        """Shorten a subtitle to the bounds; False if nothing of the packet is within them."""
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

    def _moved(self, packet: Packet[Stream]) -> tuple[Fraction, Packet[Stream]]:
        """The decoding time in the written file, and the packet as a part of it."""
        ticks, pts = round(self._shift / packet.time_base), packet.pts or 0
        dts = (pts if packet.dts is None else packet.dts) + ticks
        packet.pts, packet.dts = pts + ticks, dts
        time = dts * packet.time_base
        packet.stream = self._targets[packet.stream.index]
        return time, packet


def _hidden(packet: Packet[Stream]) -> bool:
    """Whether an edit list hides a packet that is not needed to decode what follows it."""
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


def _samples(path: str, streams: list[Stream]) -> dict[int, Packet[Stream]]:
    """The first packet of each stream, by index, if it comes early in the file."""
    found: dict[int, Packet[Stream]] = {}
    source = _open(path) if streams else None
    if source is None:
        return found
    with source, suppress(*DEMUX_ERRORS):
        same = [source.streams[stream.index] for stream in streams]
        for count, packet in enumerate(source.demux(same)):
            if packet.size and packet.pts is not None:
                found.setdefault(packet.stream.index, packet)
            if len(found) == len(streams) or count > SAMPLED_PACKETS:
                break
    return found


def _holds(format_name: str, stream: Stream, sample: Packet[Stream] | None) -> bool:
    """Whether a container takes a stream: tried out, since some fail only on being closed."""
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
