"""Video files to 8-bit frames with timestamps."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from fractions import Fraction
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from temporal_vae.video.frames import PIPE, Bytes, Frame, VideoError, VideoInfo


class VideoReader:
    """Decode a video file frame by frame: `with VideoReader(path) as video: for frame in video`.

    "-" is standard input: what another program pipes in.

    Reads 8-bit video without alpha or rotation; anything else is refused by a `VideoError` that
    gives a way out. After the iteration `notes` says what is not as in the file, or was lost.

    With `width` frames are scaled (bilinear, averaging where it shrinks), the height to the nearest
    multiple of `multiple` that keeps the shape of the picture.
    """

    def __init__(self, path: str | os.PathLike[str], width: int | None = None, multiple: int = 1):
        self.path = os.fspath(path)
        self._width, self._multiple = width, multiple
        self.notes: list[str] = []
        self._packets_lost = self._timestamps_made = 0
        self._container = _open(self.path)
        try:
            self._stream = _video_stream(self._container, self.path)
            _refuse_unsupported(self._stream, self.path)
            self.info = _describe(self._container, self._stream, self.path)
            self.notes += self.info.notes
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        size: tuple[int, int] | None = None
        count, last, damaged, shift = 0, None, 0, 0
        step = max(1, round(1 / (self.info.fps * self.info.time_base)))
        for decoded in self._decode():
            size = size or (decoded.width, decoded.height)
            if (decoded.width, decoded.height) != size:
                raise VideoError(
                    f"{self.path}: the frame size changes from {size[0]}x{size[1]} to "
                    f"{decoded.width}x{decoded.height} at frame {count}: split the file there"
                )
            if decoded.rotation:
                raise VideoError(_rotated(self.path, decoded.rotation))
            pts = decoded.pts
            if pts is not None and count == 0 and pts < 0:
                shift = -pts
                self.notes.append(
                    f"timestamps start at {float(pts * self.info.time_base):.3f} s: moved to 0"
                )
            if pts is None or (last is not None and pts + shift <= last):
                pts = 0 if last is None else last + step
                self._timestamps_made += 1
            else:
                pts += shift
            if count == 0 and decoded.interlaced_frame:
                self.notes.append("interlaced fields are treated as one frame")
            damaged += decoded.is_corrupt
            yield Frame(self._image(decoded), pts)
            count, last = count + 1, pts
        if not count:
            raise VideoError(
                f"{self.path}: no frame could be decoded: the file is empty or damaged"
            )
        end = (last + step) * self.info.time_base if last is not None else 0
        self.notes += self._losses(count, damaged, float(end))

    def _decode(self) -> Iterator[VideoFrame]:
        """Every frame that can be had: a packet that does not decode is counted and passed over."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError:
                self._packets_lost += 1
                return
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                self._packets_lost += 1
                continue
            yield from frames

    def _image(self, frame: VideoFrame) -> Bytes:
        height, width = self._scaled(frame.height, frame.width)
        rgb = frame.reformat(
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=_matrix(frame),
            interpolation=Interpolation.BILINEAR,
        )
        return rgb.to_ndarray().astype(np.uint8, copy=False)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames that come out."""
        return self._scaled(self.info.height, self.info.width)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if self._width is None:
            return height, width
        rows = height * self._width / width / self._multiple
        return max(1, round(rows)) * self._multiple, self._width

    def _losses(self, count: int, damaged: int, end: float) -> Iterator[str]:
        claimed, claimed_end = self.info.frames, self.info.end
        if claimed is not None and count < claimed:
            yield (
                f"{count} of {claimed} frames could be read: the file is damaged, or its edit list "
                "hides the others"
            )
        if claimed is None and claimed_end is None and count > 1:
            yield "the file does not state its length: frames missing at its end would not show"
        if claimed is None and claimed_end and claimed_end - end > 2 / self.info.fps:
            yield f"frames end at {end:.3f} s of {claimed_end:.3f} s: the file is damaged"
        if self._packets_lost:
            yield f"{self._packets_lost} packets were damaged"
        if damaged:
            yield f"{damaged} frames were decoded from damaged data"
        if self._timestamps_made:
            yield f"{self._timestamps_made} timestamps were missing or out of order, and made up"


def read_clip(
    path: str | os.PathLike[str],
    frames: int | None = None,
    width: int | None = None,
    multiple: int = 1,
) -> Bytes:
    """The first `frames` frames of a video (all if None), uint8 (T, H, W, 3); see `VideoReader`."""
    images = []
    with VideoReader(path, width, multiple) as video:
        for frame in video:
            images.append(frame.image)
            if len(images) == frames:
                break
    return np.stack(images)


def _open(path: str) -> av.container.InputContainer:
    if path == PIPE:
        return _open_as(path, "pipe:0")
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file")
    if os.path.isdir(path):
        raise VideoError(f"{path} is a folder, not a video")
    return _open_as(path, os.path.abspath(path))  # a name such as 12:30.mp4 looks like a protocol


def _open_as(path: str, url: str) -> av.container.InputContainer:
    try:
        return av.open(url)
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


def _refuse_unsupported(stream: VideoStream, path: str) -> None:
    pixel = stream.format
    if max(component.bits for component in pixel.components) > 8:
        raise VideoError(
            f"{path}: {pixel.name} has more than 8 bits, which would be lost: convert it first "
            f"with ffmpeg -i {shlex.quote(path)} -pix_fmt yuv420p OUT.mp4"
        )
    has_alpha = (
        any(c.is_alpha for c in pixel.components) or stream.metadata.get("alpha_mode") == "1"
    )
    if has_alpha:
        raise VideoError(
            f"{path}: its alpha channel would be lost (a GIF has one too): remove it first "
            f"with ffmpeg -i {shlex.quote(path)} -pix_fmt yuv420p OUT.mp4"
        )
    transfer = stream.codec_context.color_trc
    if transfer in (16, 18):  # SMPTE ST 2084 (PQ), ARIB STD-B67 (HLG)
        raise VideoError(
            f"{path}: high dynamic range ({'PQ' if transfer == 16 else 'HLG'}) would be squashed: "
            "convert it to BT.709 first"
        )


def _rotated(path: str, degrees: int) -> str:
    return (
        f"{path}: rotated by {degrees} degrees in its metadata: turn the frames first "
        f"with ffmpeg -i {shlex.quote(path)} OUT.mp4"
    )


def _describe(container: av.container.InputContainer, stream: VideoStream, path: str) -> VideoInfo:
    context = stream.codec_context
    fps = stream.average_rate or stream.guessed_rate or Fraction(25)
    return VideoInfo(
        path=path,
        width=stream.width,
        height=stream.height,
        fps=Fraction(fps),
        frames=stream.frames or None,
        end=_claimed_end(container, stream),
        time_base=Fraction(stream.time_base or 1 / Fraction(fps)),
        sample_aspect_ratio=stream.sample_aspect_ratio or None,
        codec=context.name,
        pixel_format=stream.format.name,
        notes=tuple(_notes(container, stream)),
    )


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
            yield f"{other.type} stream {other.index} is not copied"
    context = stream.codec_context
    # BT.709 and unspecified are what is written; BT.601's curve is that of BT.709
    if context.color_primaries not in (1, 2):
        yield f"the colour primaries' tag ({context.color_primaries}) is not carried over"
    if context.color_trc not in (1, 2, 6):
        yield f"the transfer's tag ({context.color_trc}) is not carried over"


def _matrix(frame: VideoFrame) -> str | None:
    """The colour matrix to read a frame with: its tag, or what players take for its size."""
    if frame.colorspace == 2 and not frame.format.is_rgb:
        return "ITU709" if frame.height >= 720 else "ITU601"
    return None
