"""A video file, as libav reads it: what it says, and its frames with repaired timestamps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from typing import Protocol

import av
from av.codec.context import CodecContext
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
    is_rewound,
    not_copied,
)
from temporal_vae.video.read.exif import has_exif, refuse_mirrored
from temporal_vae.video.read.to_rgb import WayUp, depth_of, has_alpha, orientation

MAX_PIXELS = 1 << 27
"""Pixels of the largest frame that is read, 16384x8192: a damaged header may claim any size."""
SEEK_BACK = (0, 1, 4, 16, 64)
"""Seconds before its aim that a seek tries for, until it lands at or before the aim."""
NO_TIMESTAMPS = 0x80
"""libav's flag of formats, such as bare H.264, whose timestamps are guesses."""
STILLS = {"gif", "png", "apng", "tiff", "bmp", "webp", "mjpeg", "jpeg2000", "targa"}
"""Codecs that have alpha whether they need it or not: it is missed only where it is not opaque."""
ALPHA_DECODERS = {"vp9": "libvpx-vp9", "vp8": "libvpx"}
"""Decoders that read the alpha beside a stream, which libav's own pass over in silence."""

Stamped = tuple[VideoFrame, int]


class Source(Protocol):
    """Where frames come from."""

    info: VideoInfo
    opaque_until_seen: bool
    """Whether an alpha channel matters only where it is not opaque."""

    def frames(self, start: int) -> Iterator[Stamped]:
        """Frames in order with strictly rising timestamps.

        All those from `start` ticks on, and maybe some before.
        """

    def notes(self, complete: bool) -> Iterator[str]:
        """What was lost, a line each, after the frames; `complete` if none was left unasked."""

    def close(self) -> None:
        """Let go of what is open."""


class VideoFile:
    """A video file, or standard input for "-"."""

    def __init__(self, path: str, alpha: bool, raw: Raw | None = None):
        self.path, self._alpha, self._raw = path, alpha, raw
        self._packets_lost = self._timestamps_made = self._damaged = self._count = 0
        self._end: Fraction | None = None
        self._orientation = WayUp()
        self._container = _open(path, raw)
        try:
            self._prepare()
            self._frames = self._decode()
            self._head = next(self._frames, None)
            if self._head is None:
                raise VideoError(f"{path}: no frame could be decoded: the file is empty or damaged")
            self.info = self._describe(self._head)
        except BaseException:
            self.close()
            raise
        self.opaque_until_seen = self.info.codec in STILLS or self._head.format.has_palette

    def _prepare(self) -> None:
        self._stream = _video_stream(self._container, self.path)
        _refuse_size(self._stream.width, self._stream.height, self.path)
        self._beside = self._stream.metadata.get("alpha_mode") == "1"
        self._decoder: VideoCodecContext = self._stream.codec_context
        name = ALPHA_DECODERS.get(self._decoder.name)
        if self._alpha and self._beside and name is not None:
            self._decoder = _alpha_decoder(name, self._stream, self.path)
        self._decoder.options = {"max_pixels": str(MAX_PIXELS)}

    @property
    def shift(self) -> Fraction:
        """Seconds that are added to the file's timestamps, so that none is below 0."""
        return self._shift * self.info.time_base

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def frames(self, start: int) -> Iterator[Stamped]:
        """See `Source`: where the file can be sought, from the keyframe before `start` on."""
        if start > self._origin + self._step:
            sought = self._sought(start)
            if sought is not None:
                yield from self._stamp(sought)
                return
        yield from self._stamp(self._from_first())

    def _from_first(self) -> Iterator[VideoFrame]:
        if self._head is None:  # a seek has moved on
            self._reopen()
        assert self._head is not None
        head, self._head = self._head, None
        self._count = 0
        return chain([head], self._frames)

    def _reopen(self) -> None:
        self.close()
        self._packets_lost = 0
        self._container = _open(self.path, self._raw)
        self._prepare()
        self._frames = self._decode()
        self._head = next(self._frames, None)
        if self._head is None:
            raise VideoError(f"{self.path}: it has changed, and cannot be decoded any more")

    def _decode(self) -> Iterator[VideoFrame]:
        """Every frame that can be had: a packet that does not decode is counted and passed over."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, IndexError):
                # PyAV flushes each stream at the end, and stumbles over one that began on the way;
                # ours comes before it
                return
            except av.error.FFmpegError:
                self._packets_lost += 1
                return
            try:
                yield from self._decoder.decode(packet if packet.size else None)
            except av.error.EOFError:  # flushed before
                return
            except av.error.FFmpegError:
                self._packets_lost += 1

    # Seeking -----------------------------------------------------------------------------------

    def _sought(self, start: int) -> Iterator[VideoFrame] | None:
        """Frames from `start` ticks on, decoded from a keyframe; None when that cannot be had.

        Trusted only where timestamps show that it landed at or before its aim, on a keyframe, and
        that what follows is whole and in order.
        """
        if not is_rewound(self.path) or self._container.format.flags & NO_TIMESTAMPS:
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
            landed = self._run_up(frames, start - self._shift)
            if landed is not None:
                self._count = -1  # frames are not counted from the first
                return chain([landed], frames)
        return None

    def _run_up(self, frames: Iterator[VideoFrame], aim: int) -> VideoFrame | None:
        """The first frame at or after `aim`, if all from a keyframe to it is as it should be."""
        last: int | None = None
        for frame in frames:
            if last is None and not frame.key_frame:
                if frame.pts is not None and frame.pts >= aim:
                    return None
                continue  # leads a keyframe, and may lack what it refers to
            if frame.pts is None or frame.is_corrupt or (last is not None and frame.pts <= last):
                return None
            if frame.pts >= aim:
                return frame if last is not None or frame.pts == aim else None
            last = frame.pts
        return None

    # Timestamps --------------------------------------------------------------------------------

    def _stamp(self, frames: Iterator[VideoFrame]) -> Iterator[Stamped]:
        """Frames with timestamps that rise, from 0 or later; those made up are counted."""
        size, last = (self.info.width, self.info.height), None
        for frame in frames:
            self._same_size(frame, size)
            pts = None if frame.pts is None else frame.pts + self._shift
            if pts is None or (last is not None and pts <= last):
                pts = self._origin if last is None else last + self._step
                self._timestamps_made += 1
            self._damaged += frame.is_corrupt
            if self._count >= 0:
                self._count += 1
            last = pts
            self._end = (pts + self._step) * self.info.time_base
            yield frame, pts

    def _same_size(self, frame: VideoFrame, size: tuple[int, int]) -> None:
        try:
            matrix = self._orientation(frame)
        except ValueError:
            matrix = None
        found = frame.width, frame.height
        if matrix is not None and matrix[0, 0] == 0:
            found = frame.height, frame.width
        if found != size:
            raise VideoError(
                f"{self.path}: the frame size changes from {size[0]}x{size[1]} to "
                f"{found[0]}x{found[1]} at frame {max(0, self._count)}: split the file there"
            )

    # What the file says ------------------------------------------------------------------------

    def _describe(self, head: VideoFrame) -> VideoInfo:
        stream, path = self._stream, self.path
        colour = colour_of(head)
        refuse_colour(colour, path)
        refuse_colour(replace(colour, transfer=stream.codec_context.color_trc), path)
        _refuse_samples(head, path)
        if is_rewound(path) and stream.codec_context.name in STILLS and has_exif(head):
            refuse_mirrored(path)
        fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
        time_base = Fraction(stream.time_base or 1 / fps)
        self._step = max(1, round(1 / (fps * time_base)))
        begins = head.pts or 0
        self._shift, self._origin = max(0, -begins), max(0, begins)
        info = described(
            head,
            VideoInfo(
                path=path, width=head.width, height=head.height, fps=fps,
                frames=stream.frames or None, end=_claimed_end(self._container, stream),
                time_base=time_base, sample_aspect_ratio=stream.sample_aspect_ratio or None,
                codec=stream.codec_context.name, pixel_format=head.format.name,
                alpha=self._beside, start=float(self._origin * time_base),
            ),
        )  # fmt: skip
        notes = [*_notes(self._container, stream), *info.notes]
        if self._shift:
            notes.append(f"timestamps start at {float(begins * time_base):.3f} s: moved to 0")
        return replace(info, notes=tuple(notes))

    def notes(self, complete: bool) -> Iterator[str]:
        """See `Source`."""
        count, end = self._count, float(self._end or 0)
        claimed, claimed_end = self.info.frames, self.info.end
        if complete and claimed is not None and 0 <= count < claimed:
            yield (
                f"{count} of {claimed} frames could be read: the file is damaged, or its edit list "
                "hides the others"
            )
        if complete and claimed is None and claimed_end is None and count > 1:
            yield "the file does not state its length: frames missing at its end would not show"
        counted = claimed is not None and count >= 0
        if complete and not counted and claimed_end and claimed_end - end > 2 / self.info.fps:
            yield f"frames end at {end:.3f} s of {claimed_end:.3f} s: the file is damaged"
        if self._packets_lost:
            yield f"{self._packets_lost} packets were damaged"
        if self._damaged:
            yield f"{self._damaged} frames were decoded from damaged data"
        if self._timestamps_made:
            yield f"{self._timestamps_made} timestamps were missing or out of order, and made up"


def described(head: VideoFrame, info: VideoInfo) -> VideoInfo:
    """What the first frame adds: the way up, depth, colour, alpha, fields, and notes of them."""
    try:
        matrix = orientation(head)
    except ValueError as error:
        raise VideoError(
            f"{info.path}: {error} in its metadata, and only quarter turns are followed: turn the "
            f"frames first with ffmpeg"
        ) from error
    ratio, size = info.sample_aspect_ratio, (info.width, info.height)
    if matrix is not None and matrix[0, 0] == 0:
        ratio, size = None if ratio is None else 1 / ratio, (info.height, info.width)
    colour = colour_of(head)
    notes = [*info.notes, *colour_notes(colour, is_grey(head))]
    if head.interlaced_frame:
        notes.append("interlaced fields are treated as one frame")
    return replace(
        info, width=size[0], height=size[1], sample_aspect_ratio=ratio, notes=tuple(notes),
        bit_depth=depth_of(head), rotation=0 if matrix is None else head.rotation, colour=colour,
        alpha=info.alpha or has_alpha(head), interlaced=head.interlaced_frame,
    )  # fmt: skip


def _refuse_size(width: int, height: int, path: str) -> None:
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


def _open(path: str, raw: Raw | None = None) -> av.container.InputContainer:
    if path == PIPE:
        return _open_as(path, "pipe:0", raw)
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file")
    # a name such as 12:30.mp4 looks like a protocol
    return _open_as(path, os.path.abspath(path), raw)


def _open_as(path: str, url: str, raw: Raw | None = None) -> av.container.InputContainer:
    options = {}
    if raw is not None:
        height, width, rate = raw
        options = {
            "video_size": f"{width}x{height}",
            "framerate": str(rate),
            "pixel_format": "rgb24",
        }
    try:
        # a strict decoding of damaged titles would fail, and leave the file open
        return av.open(
            url, format="rawvideo" if raw else None, options=options, metadata_errors="replace"
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{path}: not a video that can be read ({reason})") from error


def _video_stream(container: av.container.InputContainer, path: str) -> VideoStream:
    # a cover picture is a video stream to the container, but not a video
    streams = [
        s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise VideoError(f"{path}: no video stream, only {kinds}")
    stream = streams[0]
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


def _claimed_end(container: av.container.InputContainer, stream: VideoStream) -> float | None:
    """When the video ends by the container's own word: the stream's, else a lone stream's file.

    Taken as counted from 0: where it counts from a later start, a loss as long may go unseen.
    """
    if stream.duration is not None and stream.time_base is not None:
        return float(
            stream.duration * stream.time_base
        )  # some containers count from 0, some from start
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag:  # Matroska: 00:00:05.280000000
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    if container.duration is not None and len(container.streams) == 1:
        return float(container.duration) / av.time_base
    return None


def _notes(container: av.container.InputContainer, stream: VideoStream) -> Iterator[str]:
    for other in container.streams:
        if other is not stream:
            yield not_copied(other.type, other.index)
    context = stream.codec_context
    yield from tag_notes(Colour(context.color_primaries, context.color_trc))
