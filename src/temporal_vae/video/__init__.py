"""Video files to frames with timestamps, and back; frames to pixels, and back."""

from temporal_vae.video.colour import tag_notes
from temporal_vae.video.frames import (
    PIPE,
    VIDEO_SUFFIXES,
    Colour,
    Frame,
    Image,
    Raw,
    Uint8Frames,
    Uint16Frames,
    VideoError,
    VideoInfo,
    pad_frames,
    to_bytes,
    to_pixels,
)
from temporal_vae.video.read.container import comment_of
from temporal_vae.video.read.reader import VideoReader, load_video, read_clip
from temporal_vae.video.read.selection import Alpha, Options, Selection
from temporal_vae.video.write.formats import Format, choose, depth_for, depth_notes
from temporal_vae.video.write.remux import CopiedStreams
from temporal_vae.video.write.save import save_video, writable
from temporal_vae.video.write.writer import VideoWriter, check_suffix

__all__ = [
    "PIPE",
    "VIDEO_SUFFIXES",
    "Alpha",
    "Colour",
    "CopiedStreams",
    "Format",
    "Frame",
    "Image",
    "Options",
    "Raw",
    "Selection",
    "Uint8Frames",
    "Uint16Frames",
    "VideoError",
    "VideoInfo",
    "VideoReader",
    "VideoWriter",
    "check_suffix",
    "choose",
    "comment_of",
    "depth_for",
    "depth_notes",
    "load_video",
    "pad_frames",
    "read_clip",
    "save_video",
    "tag_notes",
    "to_bytes",
    "to_pixels",
    "writable",
]
