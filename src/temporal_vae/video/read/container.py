"""A video file, as libav reads it: what it says, and its frames with repaired timestamps."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from typing import Protocol

import av
from av.codec.context import CodecContext
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from temporal_vae.video.colour import colour_notes, colour_of, is_grey, refuse_colour, tag_notes
from temporal_vae.video.frames import (
    PIPE,
    Colour,
    Raw,
    VideoError,
    VideoInfo,
    is_regular_file,
    not_copied,
)
from temporal_vae.video.read.exif import exif_of, turn_to_page
from temporal_vae.video.read.orientation import UPRIGHT, OrientationCache, orientation, turned_size
from temporal_vae.video.read.timeline import timeline_of
from temporal_vae.video.read.to_rgb import depth_of, has_alpha

MAX_PIXELS = 1 << 27
"""Pixels of the largest frame that is read, 16384x8192: a damaged header may claim any size."""
SEEK_BACK = (0, 1, 4, 16, 64)
"""How many seconds before the wanted time to seek to, tried in turn.

A file's index may be wrong: then a seek lands after the time it was given.
"""
NO_TIMESTAMPS = 0x80
"""libav's flag of formats, such as bare H.264, whose timestamps are guesses."""
OFTEN_OPAQUE = {"gif", "png", "apng", "tiff", "bmp", "webp", "mjpeg", "jpeg2000", "targa"}
"""Codecs of images, whose files often have an alpha channel that is opaque everywhere."""
IMAGES = ("image2", "jpeg_pipe", "png_pipe", "tiff_pipe", "webp_pipe")
"""Formats whose packet is the file of an image, which may have Exif."""
ALPHA_DECODERS = {"vp9": "libvpx-vp9", "vp8": "libvpx"}
"""Decoders that read the alpha stored beside a stream; libav's default ones ignore it."""

Stamped = tuple[VideoFrame, int]
"""A decoded frame and its timestamp in ticks of the source's time base."""


class Source(Protocol):
    """Where `VideoReader` gets its frames from."""

    info: VideoInfo
    opaque_until_seen: bool
    """If true, an alpha channel is an error only from the first frame on that is not opaque."""
    takes_rate: bool = False
    """If true, it states no rate, and takes the `fps` that is asked for as its own."""

    @property
    def shift(self) -> Fraction:
        """Seconds that are added to the file's timestamps, so that none is below 0."""
        return Fraction(0)

    def frames(self, start: int) -> Iterator[Stamped]:
        """Frames in order, with strictly rising timestamps.

        All frames from `start` ticks on come, and maybe some before.
        """

    def notes(self, complete: bool) -> Iterator[str]:
        """After the frames: what was lost, one line each.

        `complete` says that frames were taken until there were no more.
        """
        return iter(())

    def close(self) -> None:
        """Close what is open."""
        return


_OPEN: weakref.WeakSet[ContainerReader] = weakref.WeakSet()
_NEVER_FREED: list[ContainerReader] = []
"""In a forked process. libav frees a decoder by ending its threads, which a fork does not have: it
would wait for ever."""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=gc.collect,  # for which closed ones may wait
        after_in_child=lambda: _NEVER_FREED.extend(_OPEN),
    )


class ContainerReader(Source):
    """A video file, or standard input for "-"; `raw` says how to read one of bare numbers.

    With `alpha` an alpha channel that is stored beside the stream is decoded too. `pages`, as
    `tiff_pages` gives them, are those to read of a TIFF. Raises `VideoError` for what cannot be
    read, or would come out wrong.
    """

    def __init__(self, path: str, alpha: bool, raw: Raw | None = None, pages: Sequence[int] = ()):
        self.path, self._alpha, self._raw, self._pages = path, alpha, raw, pages
        self._packets_lost = self._timestamps_made = self._damaged = self._count = 0
        self._count_is_from_first = True
        self._end = 0.0
        self._orientation = OrientationCache(path)
        self._frames: Iterator[VideoFrame] = iter(())
        self._head: VideoFrame | None = None
        self._container = _open(path, raw)
        _OPEN.add(self)
        try:
            head = self._decode_first()
            self.info = self._describe(head)
        except BaseException:
            self.close()
            raise
        self._head = head
        self.opaque_until_seen = self.info.codec in OFTEN_OPAQUE or head.format.has_palette

    def _decode_first(self) -> VideoFrame:
        """The first frame of a newly opened container; `self._frames` has the others."""
        self._stream = _video_stream(self._container, self.path)
        refuse_size(self._stream.width, self._stream.height, self.path)
        self._alpha_beside = self._stream.metadata.get("alpha_mode") == "1"
        self._decoder: VideoCodecContext = self._stream.codec_context
        name = ALPHA_DECODERS.get(self._decoder.name)
        if self._alpha and self._alpha_beside and name is not None:
            self._decoder = _alpha_decoder(name, self._stream, self.path)
        self._decoder.options = {"max_pixels": str(MAX_PIXELS)}
        self._decoder.copy_opaque = True  # by which a frame gets its packet's
        if self._pages:  # which all lie in one packet
            self._decoder.thread_count = 1
        self._timeline = timeline_of(self._container, self._stream, self.path)
        self._frames = self._decode()
        head = next(self._frames, None)
        if head is None:
            raise VideoError(
                f"{self.path}: no frame could be decoded: the file is empty or damaged"
            )
        return head

    @property
    def shift(self) -> Fraction:
        """See `Source`."""
        return self._shift * self.info.time_base

    def close(self) -> None:
        """See `Source`."""
        # they refer to this reader, and would stay until the garbage collector runs
        self._frames, self._head = iter(()), None
        self._container.close()

    def frames(self, start: int) -> Iterator[Stamped]:
        """See `Source`; from the keyframe before `start` on where the file can be sought."""
        frames = self._sought(start) if start > self._origin + self._step else None
        yield from self._stamp(self._from_first() if frames is None else frames)

    def _from_first(self) -> Iterator[VideoFrame]:
        if self._head is None:  # a seek that failed has moved on
            self.close()
            self._packets_lost = 0
            self._container = _open(self.path, self._raw)
            self._head = self._decode_first()
        head, self._head = self._head, None
        return chain([head], self._frames)

    def _decode(self) -> Iterator[VideoFrame]:
        """Every frame that can be had; packets that cannot be decoded are counted."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, IndexError):
                # at the end PyAV flushes each stream, and fails with an IndexError at one that was
                # not there from the first; the video stream has been flushed by then
                return
            except av.error.FFmpegError:
                self._packets_lost += 1
                return
            for image in self._images(packet):
                try:
                    for frame in self._decoder.decode(image):
                        frame.pts = self._timeline(frame)
                        yield frame
                except av.error.EOFError:  # flushed before
                    return
                except av.error.FFmpegError:
                    self._packets_lost += 1

    def _images(self, packet: Packet[VideoStream]) -> Iterator[Packet[VideoStream] | None]:
        """What to decode of a packet: None at the end, a TIFF once for each page.

        An empty packet with a time says that the frame before it is still shown, as in Theora.
        """
        if not packet.size:
            yield from () if packet.pts is not None else (None,)
            return
        if self._container.format.name not in IMAGES:
            yield packet
            return
        for page in self._pages or (0,):
            if page:
                turn_to_page(memoryview(packet), page)
            packet.opaque = exif_of(bytes(packet))
            yield packet

    # Seeking -----------------------------------------------------------------------------------

    def _sought(self, start: int) -> Iterator[VideoFrame] | None:
        """Frames from `start` ticks on, decoded from a keyframe; None if seeking is not safe.

        It is safe if the timestamps show that it landed on a keyframe at or before `start`, and
        all frames from there to `start` are undamaged and in order.
        """
        unstamped = self._container.format.flags & NO_TIMESTAMPS
        if unstamped or not self._timeline.can_seek or not is_regular_file(self.path):
            return None
        for seconds in SEEK_BACK:
            aim = start - self._shift - int(seconds / self.info.time_base)
            if aim <= self._origin - self._shift:
                return None
            self._head = None
            try:
                self._container.seek(aim, stream=self._stream)
            except av.error.FFmpegError:
                return None
            frames = self._decode()
            landed = self._first_at(frames, start - self._shift)
            if landed is not None:
                self._count_is_from_first = False
                return chain([landed], frames)
        return None

    def _first_at(self, frames: Iterator[VideoFrame], aim: int) -> VideoFrame | None:
        """The first frame at or after `aim`, if all from a keyframe to it are as they should be."""
        last: int | None = None
        for frame in frames:
            if last is None and not frame.key_frame:
                if frame.pts is not None and frame.pts >= aim:
                    return None
                continue  # shown before the keyframe, it may refer to frames that were not decoded
            if frame.pts is None or frame.is_corrupt or (last is not None and frame.pts <= last):
                return None
            if frame.pts >= aim:
                return frame if last is not None or frame.pts == aim else None
            last = frame.pts
        return None

    # Timestamps --------------------------------------------------------------------------------

    def _stamp(self, frames: Iterator[VideoFrame]) -> Iterator[Stamped]:
        """Frames with timestamps that rise, from 0 or later; those made up are counted."""
        last = None
        for frame in frames:
            self._refuse_change_of_size(frame)
            pts = None if frame.pts is None else frame.pts + self._shift
            if pts is None or (last is not None and pts <= last):
                pts = self._origin if last is None else last + self._step
                self._timestamps_made += 1
            self._damaged += frame.is_corrupt
            self._count += 1
            last = pts
            self._end = float((pts + self._step) * self.info.time_base)
            yield frame, pts

    def _refuse_change_of_size(self, frame: VideoFrame) -> None:
        height, width = turned_size(frame.height, frame.width, self._orientation(frame))
        if (height, width) != (self.info.height, self.info.width):
            raise VideoError(
                f"{self.path}: the frame size changes from {self.info.width}x{self.info.height} to "
                f"{width}x{height} at frame {self._count}: split the file there"
            )

    # What the file says ------------------------------------------------------------------------

    def _describe(self, head: VideoFrame) -> VideoInfo:
        stream, path = self._stream, self.path
        codec = stream.codec_context
        colour = colour_of(head)
        refuse_colour(colour, path)
        refuse_colour(replace(colour, transfer=codec.color_trc), path)
        _refuse_samples(head, path)
        timeline = self._timeline
        time_base, self._step = timeline.time_base, timeline.step
        first = head.pts or 0
        self._shift, self._origin = max(0, -first), max(0, first)
        others = [s for s in self._container.streams if s is not stream]
        notes = [not_copied(other.type, other.index) for other in others]
        notes += tag_notes(Colour(codec.color_primaries, codec.color_trc))
        info = first_frame_info(
            head, path, codec=codec.name, fps=timeline.rate, time_base=time_base,
            frames=timeline.frames, notes=notes,
        )  # fmt: skip
        if self._shift:
            moved = f"timestamps start at {float(first * time_base):.3f} s: moved to 0"
            info = replace(info, notes=(*info.notes, moved))
        ratio = stream.sample_aspect_ratio or None
        if ratio is not None and self._orientation(head)[0, 0] == 0:  # turned by a quarter
            ratio = 1 / ratio
        end = None if timeline.end is None else timeline.end + float(self._shift * time_base)
        return replace(
            info, end=end, sample_aspect_ratio=ratio,
            alpha=info.alpha or self._alpha_beside, start=float(self._origin * time_base),
        )  # fmt: skip

    def notes(self, complete: bool) -> Iterator[str]:
        """See `Source`."""
        if complete:
            yield from self._missing_frames()
        if self._packets_lost:
            yield f"{self._packets_lost} packets were damaged"
        if self._damaged:
            yield f"{self._damaged} frames were decoded from damaged data"
        if self._timestamps_made:
            yield f"{self._timestamps_made} timestamps were missing or out of order, and made up"

    def _missing_frames(self) -> Iterator[str]:
        """A line if the file claims more than came, or claims nothing to compare with."""
        claimed, end, counted = self.info.frames, self.info.end, self._count_is_from_first
        if claimed is not None and counted and self._timeline.counts_lost_frames:
            if self._count < claimed:
                yield f"{self._count} of {claimed} frames could be read: the file is damaged"
        elif end is not None:
            if end - self._end > 2 / self.info.fps:
                yield f"frames end at {self._end:.3f} s of {end:.3f} s: the file is damaged"
        elif counted and self._count > 1:
            yield "the file does not state its length: frames missing at its end would not show"


def first_frame_info(
    head: VideoFrame,
    path: str,
    *,
    codec: str,
    fps: Fraction,
    time_base: Fraction,
    frames: int | None,
    notes: Sequence[str] = (),
) -> VideoInfo:
    """What a source says, and what its first frame says; `notes` come before those of the frame.

    Raises `VideoError` for a frame that is turned by other than quarter turns.
    """
    matrix, colour = orientation(head, path), colour_of(head)
    height, width = turned_size(head.height, head.width, matrix)
    notes = [*notes, *colour_notes(colour, is_grey(head))]
    if head.interlaced_frame:
        notes.append("interlaced fields are treated as one frame")
    return VideoInfo(
        path=path, width=width, height=height, fps=fps, time_base=time_base, codec=codec,
        pixel_format=head.format.name, frames=frames, notes=tuple(notes), bit_depth=depth_of(head),
        rotation=0 if (matrix == UPRIGHT).all() else head.rotation, colour=colour,
        alpha=has_alpha(head), interlaced=head.interlaced_frame,
    )  # fmt: skip


def refuse_size(width: int, height: int, path: str) -> None:
    """Raise `VideoError` for frames of more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise VideoError(
            f"{path}: frames of {width}x{height} are larger than the {MAX_PIXELS} pixels that are "
            "read: the file is damaged, or is to be scaled down first"
        )


def _refuse_samples(frame: VideoFrame, path: str) -> None:
    name = frame.format.name
    if "f16" in name or "f32" in name or name.startswith(("xyz", "bayer")):
        raise VideoError(
            f"{path}: {name} is no picture in RGB, YUV or grey of 1 to 16 bits: convert it first "
            "with ffmpeg -pix_fmt rgb48le"
        )


def _open(path: str, raw: Raw | None) -> av.container.InputContainer:
    if path != PIPE and not os.path.exists(path):
        raise VideoError(f"{path}: no such file")
    # as an absolute path, since libav takes a name such as 12:30.mp4 for a protocol
    url = "pipe:0" if path == PIPE else os.path.abspath(path)
    options, format = {}, None
    if raw is not None:
        height, width, rate = raw
        options = {"video_size": f"{width}x{height}", "framerate": str(rate)}
        options["pixel_format"], format = "rgb24", "rawvideo"
    try:
        # metadata that is not UTF-8 would otherwise be an error, which leaves the file open
        return av.open(url, format=format, options=options, metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{path}: not a video that can be read ({reason})") from error


def comment_of(path: str) -> str | None:
    """The comment in a video that has all it says it has; None if there is none.

    Raises `VideoError` for what is no video, or was cut short.
    """
    with _open(path, None) as container:
        stated = (container.duration or 0) / av.time_base
        with suppress(av.error.FFmpegError):  # then all packets come
            container.seek(max(0, int((stated - 1) * av.time_base)))
        rate = _video_stream(container, path).average_rate or Fraction(1)
        end = 0.0
        with suppress(av.error.FFmpegError):
            for packet in container.demux():
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if end < stated - 1.5 / rate:
            raise VideoError(f"{path}: it was cut short, at {end:.3f} of {stated:.3f} s")
        tags = {name.lower(): text for name, text in container.metadata.items()}
        return tags.get("comment")


def _video_stream(container: av.container.InputContainer, path: str) -> VideoStream:
    # a cover picture is a video stream to the container, but not a video
    streams = [
        s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise VideoError(f"{path}: no video stream, only {kinds}")
    best = container.streams.best("video")  # as players choose: the default, one of many frames
    stream = best if isinstance(best, VideoStream) and best in streams else streams[0]
    if stream.codec_context is None or not stream.width or not stream.pix_fmt:
        raise VideoError(f"{path}: the video stream cannot be decoded (unknown codec or damaged)")
    stream.thread_type = "AUTO"
    return stream


def _alpha_decoder(name: str, stream: VideoStream, path: str) -> VideoCodecContext:
    try:
        decoder = CodecContext.create(name, "r")
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: its alpha needs the decoder {name}, which PyAV lacks") from error
    assert isinstance(decoder, VideoCodecContext)
    decoder.extradata = stream.codec_context.extradata
    decoder.width, decoder.height = stream.width, stream.height
    return decoder
