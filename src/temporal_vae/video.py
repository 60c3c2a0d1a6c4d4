"""Video files to 8-bit frames with timestamps, and back.

The only place that converts between 8-bit frames, uint8 (T, H, W, 3) RGB in [0, 255], and pixels,
(1, 3, T, H, W) in [-1, 1].
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
import numpy.typing as npt
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

WRITERS = {".mp4": "H.264, crf 14", ".mkv": "FFV1, lossless RGB"}
H264_CRF = 14


class VideoError(Exception):
    """A video that cannot be read or written; the message is one line for the user."""


def to_pixels(frames: Bytes) -> Tensor:
    """uint8 (T, H, W, C) -> float32 (1, C, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1


def to_bytes(video: Tensor) -> Bytes:
    """(1, C, T, H, W) in [-1, 1] -> uint8 (T, H, W, C), rounded to nearest and clipped."""
    frames = ((video.detach()[0].float() + 1) * 127.5).round().clamp(0, 255)
    array: Bytes = frames.to("cpu", torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()
    return array


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame: `image` uint8 (H, W, 3) RGB, and its timestamp in units of `time_base`."""

    image: Bytes
    pts: int


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video file says of itself; `frames` and `fps` are claims, which frames may belie."""

    path: str
    width: int
    height: int
    fps: Fraction
    frames: int | None
    end: float | None
    """Seconds at which the last frame ends, as the container claims; None when it does not say."""
    time_base: Fraction
    sample_aspect_ratio: Fraction | None
    codec: str
    pixel_format: str
    notes: tuple[str, ...] = field(default=())
    """What of the file is not carried over, a line each."""


class VideoReader:
    """Decode a video file frame by frame: `with VideoReader(path) as video: for frame in video`.

    Reads 8-bit video without alpha or rotation; anything else is refused by a `VideoError` that
    gives a way out. After the iteration `loss` says what could not be read, None if all was.

    With `width` frames are scaled (Lanczos), the height to the nearest multiple of `multiple` that
    keeps the shape of the picture.
    """

    def __init__(self, path: str | os.PathLike[str], width: int | None = None, multiple: int = 1):
        self.path = os.fspath(path)
        self._width, self._multiple = width, multiple
        self.loss: str | None = None
        self._packets_lost = self._timestamps_made = 0
        self._container = _open(self.path)
        try:
            self._stream = _video_stream(self._container, self.path)
            _refuse_unsupported(self._stream, self.path)
            self.info = _describe(self._container, self._stream, self.path)
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
        count, last, damaged = 0, None, 0
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
            if pts is None or (last is not None and pts <= last):
                pts = 0 if last is None else last + step
                self._timestamps_made += 1
            damaged += decoded.is_corrupt
            yield Frame(self._image(decoded), pts)
            count, last = count + 1, pts
        if not count:
            raise VideoError(
                f"{self.path}: no frame could be decoded: the file is empty or damaged"
            )
        end = (last + step) * self.info.time_base if last is not None else 0
        self.loss = self._what_was_lost(count, damaged, float(end))

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

    def _what_was_lost(self, count: int, damaged: int, end: float) -> str | None:
        lost = []
        claimed, claimed_end = self.info.frames, self.info.end
        if claimed is not None:
            if count < claimed:
                lost.append(f"{count} of {claimed} frames could be read")
        elif claimed_end is not None and claimed_end - end > 2 / self.info.fps:
            lost.append(f"frames end at {end:.3f} s of {claimed_end:.3f} s")
        if self._packets_lost:
            lost.append(f"{self._packets_lost} packets were damaged")
        if damaged:
            lost.append(f"{damaged} frames were decoded from damaged data")
        if self._timestamps_made:
            lost.append(
                f"{self._timestamps_made} timestamps were missing or out of order, and made up"
            )
        return f"{self.path}: " + "; ".join(lost) if lost else None


class VideoWriter:
    """Encode frames to a video container at `path`; use it inside `files.atomic_path`.

    `.mkv` is lossless FFV1 in RGB; `.mp4` is H.264 at crf 14, with full chroma (yuv444p) where a
    side is odd. H.264 is written in BT.709, limited range, and tagged so.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        height: int,
        width: int,
        fps: Fraction,
        time_base: Fraction | None = None,
        sample_aspect_ratio: Fraction | None = None,
    ):
        self.path = os.fspath(path)
        check_suffix(self.path)
        self._lossless = self.path.endswith(".mkv")
        time_base = time_base or 1 / fps
        # mp4 keeps the start of a clip in the clock of the movie: milliseconds unless told
        options = {} if self._lossless else {"movie_timescale": str(time_base.denominator)}
        try:
            self._container = av.open(self.path, "w", options=options)
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(f"cannot write {self.path}: {error}") from error
        stream = self._container.add_stream("ffv1" if self._lossless else "libx264", rate=fps)
        stream.height, stream.width = height, width
        stream.time_base = stream.codec_context.time_base = time_base
        if sample_aspect_ratio:
            stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
        if self._lossless:
            stream.pix_fmt = "bgr0"
        else:
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            stream.options = {"crf": str(H264_CRF), "preset": "medium"}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1  # limited
        self._stream: VideoStream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._mux(None)
        finally:
            self._container.close()

    def write(self, image: Bytes, pts: int) -> None:
        """Append one frame, uint8 (H, W, 3), at `pts` in units of the time base."""
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame = frame.reformat(
            format=self._stream.pix_fmt,
            dst_colorspace=None if self._lossless else "ITU709",
            dst_color_range=None if self._lossless else "MPEG",
        )
        frame.pts, frame.time_base = pts, self._stream.codec_context.time_base
        self._mux(frame)

    def _mux(self, frame: VideoFrame | None) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(f"cannot write {self.path}: {error}") from error


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


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise `VideoError` unless a video can be written under this name."""
    suffix = Path(path).suffix
    if suffix not in WRITERS:
        known = " or ".join(f"{name} ({what})" for name, what in WRITERS.items())
        raise VideoError(f"cannot write {os.fspath(path)}: the name must end in {known}")


def _open(path: str) -> av.container.InputContainer:
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file")
    if os.path.isdir(path):
        raise VideoError(f"{path} is a folder, not a video")
    try:
        return av.open(path)
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
            f"with ffmpeg -i {path} -pix_fmt yuv420p OUT.mp4"
        )
    has_alpha = (
        any(c.is_alpha for c in pixel.components) or stream.metadata.get("alpha_mode") == "1"
    )
    if has_alpha:
        raise VideoError(
            f"{path}: its alpha channel would be lost: remove it first "
            f"with ffmpeg -i {path} -pix_fmt yuv420p OUT.mp4"
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
        f"with ffmpeg -i {path} OUT.mp4"
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
    """When the video ends by the container's own word: the stream's, else a lone stream's file."""
    start = stream.start_time or 0
    if stream.duration is not None and stream.time_base is not None:
        return float((start + stream.duration) * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag:  # Matroska: 00:00:05.280000000
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    if container.duration is not None and len(container.streams) == 1:
        return float((container.start_time or 0) + container.duration) / av.time_base
    return None


def _notes(container: av.container.InputContainer, stream: VideoStream) -> Iterator[str]:
    for other in container.streams:
        if other is not stream:
            yield f"{other.type} stream {other.index} is not copied"
    context = stream.codec_context
    if context.colorspace not in (1, 2):
        yield f"colour matrix {context.colorspace} is converted; the output is tagged BT.709 or RGB"
    if context.color_primaries not in (1, 2):
        yield f"colour primaries {context.color_primaries} are not carried over"


def _matrix(frame: VideoFrame) -> str | None:
    """The colour matrix to read a frame with: its tag, or what players take for its size."""
    if frame.colorspace == 2 and not frame.format.is_rgb:
        return "ITU709" if frame.height >= 720 else "ITU601"
    return None
