"""A process that decodes videos for another one: `python -m temporal_vae.dataset.decoder`.

It takes a `Cutting`, then entries one after the other, from standard input, and gives messages on
standard output, both as `messages` has them. It imports no torch. It ends when its input ends, that
is when the other process does, in whatever way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from temporal_vae.dataset.clips import Cutting, Passed, clips_of
from temporal_vae.dataset.entries import Entry
from temporal_vae.dataset.messages import receive, send
from temporal_vae.video import Frame, VideoError

PIECE_BYTES = 2**22
"""Frames are handed on by so many bytes at a time, at least one."""

Message = tuple[str, Any]
"""What it is, and what belongs to it: "clip", "frames", "end" (of a clip, with notes), "passed",
"failed" (with a reason) and "done"."""


def messages(entry: Entry, cutting: Cutting, done: Iterable[str]) -> Iterator[Message]:
    """What is made of a video, as messages."""
    try:
        for clip in clips_of(entry, cutting, frozenset(done)):
            if isinstance(clip, Passed):
                yield "passed", clip
                continue
            frames, clip.frames = clip.frames, iter(())
            yield "clip", clip
            yield from (("frames", piece) for piece in _pieces(frames))
            yield "end", clip.notes
    except VideoError as error:
        yield "failed", str(error)
    yield "done", None


def _pieces(frames: Iterable[Frame]) -> Iterator[list[Frame]]:
    piece: list[Frame] = []
    for frame in frames:
        piece.append(frame)
        if len(piece) * frame.image.nbytes >= PIECE_BYTES:
            yield piece
            piece = []
    if piece:
        yield piece


def main() -> None:
    """Serve until the input ends."""
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the messages
    try:
        cutting: Cutting = receive(jobs)
        while True:
            entry, done = receive(jobs)
            for message in messages(entry, cutting, done):
                send(message, answers)
            answers.flush()
    except (EOFError, BrokenPipeError):  # the other process has ended
        os._exit(0)  # without waiting for threads that decode


if __name__ == "__main__":
    main()
