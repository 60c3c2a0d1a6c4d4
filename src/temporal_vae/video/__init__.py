"""Video files to frames with timestamps, and back; frames to pixels, and back."""

from temporal_vae.video.frames import (
    PIPE,
    Bytes,
    Colour,
    Frame,
    Image,
    VideoError,
    VideoInfo,
    Words,
    pad_frames,
    to_bytes,
    to_pixels,
)
from temporal_vae.video.reading import VideoReader, load_video, read_clip
from temporal_vae.video.selecting import Alpha, Options, Selection
from temporal_vae.video.writing import H264_CRF, WRITERS, VideoWriter, check_suffix

__all__ = [
    "H264_CRF",
    "PIPE",
    "WRITERS",
    "Alpha",
    "Bytes",
    "Colour",
    "Frame",
    "Image",
    "Options",
    "Selection",
    "VideoError",
    "VideoInfo",
    "VideoReader",
    "VideoWriter",
    "Words",
    "check_suffix",
    "load_video",
    "pad_frames",
    "read_clip",
    "to_bytes",
    "to_pixels",
]
