"""Video files to frames with timestamps, and back; frames to pixels, and back."""

from temporal_vae.video.frames import (
    PIPE,
    Bytes,
    Frame,
    VideoError,
    VideoInfo,
    pad_frames,
    to_bytes,
    to_pixels,
)
from temporal_vae.video.reading import VideoReader, read_clip
from temporal_vae.video.writing import H264_CRF, WRITERS, VideoWriter, check_suffix

__all__ = [
    "H264_CRF",
    "PIPE",
    "WRITERS",
    "Bytes",
    "Frame",
    "VideoError",
    "VideoInfo",
    "VideoReader",
    "VideoWriter",
    "check_suffix",
    "pad_frames",
    "read_clip",
    "to_bytes",
    "to_pixels",
]
