"""Video files to 8-bit frames with timestamps, and back.

The only place that converts between 8-bit frames, uint8 (T, H, W, 3) RGB in [0, 255], and pixels,
(1, 3, T, H, W) in [-1, 1].
"""

from __future__ import annotations

import os
import re
import shlex
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

from temporal_vae.geometry import Padding

Bytes = npt.NDArray[np.uint8]

PIPE = "-"
"""Stands for standard input or output in place of a file."""
WRITERS = {".mp4": "H.264, crf 14", ".mkv": "FFV1, lossless RGB"}
H264_CRF = 14


class VideoError(Exception):
    """A video that cannot be read or written; the message is one line for the user."""


def to_pixels(frames: Bytes) -> Tensor:
    """uint8 (T, H, W, C) -> float32 (1, C, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1


def to_bytes(video: Tensor) -> Bytes:
    """(1, C, T, H, W) in [-1, 1] -> uint8 (T, H, W, C), rounded to nearest and clipped.

    Raises `ValueError` for NaN, which would turn black in silence.
    """
    if video.isnan().any():
        raise ValueError("the frames hold NaN: in float16 a model may overflow, so take bfloat16")
    frames = ((video.detach()[0].float() + 1) * 127.5).round().clamp(0, 255)
    array: Bytes = frames.to("cpu", torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()
    return array


def pad_frames(frames: Bytes, factor: int) -> Bytes:
    """Repeat the last row and column of uint8 (T, H, W, C) up to multiples of `factor`."""
    padding = Padding.to_cells(frames.shape[1], frames.shape[2], factor)
    edges = ((0, 0), (0, padding.rows), (0, padding.columns), (0, 0))
    return np.pad(frames, edges, mode="edge")


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

    @property
    def expected_frames(self) -> int | None:
        """Frames the file claims to have, else its length times its rate, else None."""
        if self.frames is None and self.end is not None:
            return max(1, round(self.end * float(self.fps)))
        return self.frames


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


class VideoWriter:
    """Encode frames to a video container at `path`; use it inside `files.atomic_path`.

    "-" is standard output, and .mkv. `.mkv` is lossless FFV1 in RGB; `.mp4` is H.264 at crf 14,
    with full chroma (yuv444p) where a side is odd. H.264 is written in BT.709, limited range, and
    tagged so.
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
        self._lossless = check_suffix(self.path) == ".mkv"
        time_base = time_base or 1 / fps
        # mp4 keeps the start of a clip in the clock of the movie: milliseconds unless told
        options = {} if self._lossless else {"movie_timescale": str(time_base.denominator)}
        try:
            if self.path == PIPE:
                self._container = av.open("pipe:1", "w", format="matroska", options=options)
            else:
                self._container = av.open(os.path.abspath(self.path), "w", options=options)
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(f"cannot write {self.path}: {error}") from error
        stream = self._container.add_stream("ffv1" if self._lossless else "libx264", rate=fps)
        stream.height, stream.width = height, width
        stream.time_base = stream.codec_context.time_base = time_base
        self.keeps_aspect = not self._lossless
        self._last_millisecond = -(10**18)
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
        base = self._stream.codec_context.time_base
        milliseconds = round(pts * base * 1000)
        if self._lossless and milliseconds <= self._last_millisecond:
            raise VideoError(
                f"frames less than a millisecond apart cannot be kept in .mkv, as at "
                f"{float(pts * base):.6f} s: take .mp4"
            )
        self._last_millisecond = milliseconds
        frame.pts, frame.time_base = pts, base
        self._mux(frame)

    def _mux(self, frame: VideoFrame | None) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(f"cannot write the video: {error.strerror or error}") from error


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


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The format's suffix, for "-" that of .mkv.

    Raises `VideoError` unless a video can be written under this name.
    """
    if os.fspath(path) == PIPE:
        return ".mkv"
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        known = " or ".join(f"{name} ({what})" for name, what in WRITERS.items())
        raise VideoError(f"cannot write {os.fspath(path)}: the name must end in {known}")
    return suffix


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
