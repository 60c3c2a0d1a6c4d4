"""The engine of one machine: processes decode ahead, threads encode and write.

A lane is a process that decodes, and a thread that takes in what it decodes, up to so many bytes. A
clip goes to an encoder once it is decoded, or once its lane is full. While one encoder writes, the
other one computes.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, repeat
from queue import Empty, SimpleQueue
from typing import Any

from temporal_vae.dataset.clips import Clip, Cutting, Passed
from temporal_vae.dataset.entries import Entry
from temporal_vae.dataset.messages import receive, send
from temporal_vae.video import Frame, VideoError

PIECES_AHEAD = 32
"""Pieces of frames that wait in a lane: 128 MiB, see `decoder.PIECE_BYTES`."""
VIDEOS_AHEAD = 8
"""Videos on their way, for each lane."""
ATTEMPTS = 2
"""A video is decoded once more where the process that decoded it was ended."""
COMMAND = (sys.executable, "-m", "temporal_vae.dataset.decoder")

Job = tuple[Entry, Collection[str]]
"""A video, and the names of its clips that are done."""
Row = dict[str, Any]
"""Of the manifest."""
Encode = Callable[[Clip], Row]
"""Makes latents of a clip, or says that its video is broken."""
Left = Callable[[Entry | Passed, str], Row]
"""Says why there is nothing of a video, or of a part of it."""
Event = tuple[Entry, Row | None]
"""A row, or None once nothing more comes of a video."""
Events = Generator[Event, None, None]
"""Closed, it ends whatever is under way."""


@dataclass(eq=False, slots=True)
class _Attempt:
    """A video on its way through a lane."""

    entry: Entry
    sent: int = 0
    """Rows that will come of it, so far."""
    came: int = 0
    whole: bool = False
    """Whether all of it is decoded."""
    over: bool = False
    """Nothing more is heard of it: all of it came, or the process that decoded it has ended, which
    says nothing about the video."""


@dataclass(eq=False)
class _Arriving:
    """A clip whose frames arrive while it is read."""

    attempt: _Attempt
    clip: Clip
    room: threading.Semaphore
    pieces: SimpleQueue[list[Frame] | Exception | None] = field(default_factory=SimpleQueue)
    announced: bool = False
    abandoned: bool = False

    def frames(self) -> Iterator[Frame]:
        """Its frames in order. Raises `VideoError` where decoding fails."""
        while (piece := self.pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            self.room.release()
            yield from piece

    def put(self, piece: list[Frame] | Exception | None) -> None:
        """Add frames, what went wrong, or None for the end."""
        self.pieces.put(piece)
        if self.abandoned:
            self.abandon()

    def abandon(self) -> None:
        """Nobody reads on: what is there is dropped, and what comes."""
        self.abandoned = True
        with suppress(Empty):
            while True:
                if isinstance(self.pieces.get_nowait(), list):
                    self.room.release()


class Pipeline:
    """Lanes and encoders, which take jobs and give events from `start` to `close`.

    `put` and `next` may be called from two threads. `encode` and `left` make rows.
    """

    def __init__(self, cutting: Cutting, workers: int, encoders: int, encode: Encode, left: Left):
        self.cutting, self._encode, self._left = cutting, encode, left
        self.todo: SimpleQueue[Job | None] = SimpleQueue()
        self.ready: SimpleQueue[_Arriving | None] = SimpleQueue()
        self.events: SimpleQueue[tuple[_Attempt, Row | None] | BaseException] = SimpleQueue()
        self.closed = False
        self._lanes = [_Lane(self) for _ in range(workers)]
        work = [self._work] * encoders + [lane.serve for lane in self._lanes]
        self._threads = [threading.Thread(target=one, daemon=True) for one in work]
        self._encoders = encoders

    def run(self, jobs: Iterable[Job]) -> Events:
        """Events of all jobs, in the order in which they come. Raises what `encode` raises."""
        under_way = 0
        self.start()
        try:
            for job in chain(jobs, repeat(None)):
                if job is not None:
                    self.todo.put(job)
                    under_way += 1
                while under_way >= (VIDEOS_AHEAD * len(self._lanes) if job else 1):
                    for event in self.next():
                        under_way -= event[1] is None
                        yield event
                if job is None:
                    return
        finally:
            self.close()

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def next(self) -> Iterator[Event]:
        """Wait, and give what comes, which may be nothing. Raises what `encode` raises."""
        event = self.events.get()
        if isinstance(event, BaseException):
            raise event
        attempt, row = event
        if attempt.over:
            return
        if row is not None:
            attempt.came += 1
            yield attempt.entry, row
        if attempt.whole and attempt.came == attempt.sent:
            attempt.over = True
            yield attempt.entry, None

    def close(self) -> None:
        """End all that is under way; encoders remove what they were writing."""
        self.closed = True
        for lane in self._lanes:
            lane.end()
            self.todo.put(None)
        for _ in range(self._encoders):
            self.ready.put(None)
        for thread in self._threads:
            thread.join(10)

    def left(self, attempt: _Attempt, what: Entry | Passed, why: str) -> None:
        """Say that there is nothing of a video, or of a part of it."""
        self.events.put((attempt, self._left(what, why)))

    def _work(self) -> None:
        while (arriving := self.ready.get()) is not None and not self.closed:
            arriving.clip.frames = arriving.frames()
            try:
                self.events.put((arriving.attempt, self._encode(arriving.clip)))
            except BaseException as error:  # whatever it is, it is raised again by `next`
                self.events.put(error)
            finally:
                arriving.abandon()


class _Lane:
    """A process that decodes, and what it has decoded."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._process: subprocess.Popen[bytes] | None = None
        self._room = threading.Semaphore(PIECES_AHEAD)

    def serve(self) -> None:
        """Decode jobs until there are no more."""
        while (job := self._pipeline.todo.get()) is not None and not self._pipeline.closed:
            if not any(self._follow(job) for _ in range(ATTEMPTS)):
                attempt = _Attempt(job[0], sent=1, whole=True)
                reason = f"the process that decodes it was ended {ATTEMPTS} times"
                self._pipeline.left(attempt, job[0], reason)
        self._dispose()

    def end(self) -> None:
        """End the process, and let nobody wait for room; its thread does the rest."""
        if self._process is not None:
            self._process.kill()
        self._room.release(PIECES_AHEAD)

    def _dispose(self) -> None:
        """Let go of a process that has ended, or is of no use any more."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(OSError), process:  # closes its pipes, and waits
                pass

    def _follow(self, job: Job) -> bool:
        """Take in what is decoded of a video; False if the process ends before it is whole."""
        attempt, arriving = _Attempt(job[0]), None
        try:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            send(job, process.stdin)
            process.stdin.flush()
            while True:
                kind, value = receive(process.stdout)
                if kind == "done":
                    attempt.whole = True
                    self._pipeline.events.put((attempt, None))
                    return True
                arriving = self._took(kind, value, attempt, arriving)
        except (EOFError, OSError, ValueError):
            attempt.over = True
            self._dispose()
            if arriving is not None:
                arriving.put(VideoError("the process that decodes it has ended"))
                self._announce(arriving)
            return self._pipeline.closed

    def _took(
        self, kind: str, value: Any, attempt: _Attempt, arriving: _Arriving | None
    ) -> _Arriving | None:
        """The clip that is being decoded after a message."""
        if kind == "clip":
            attempt.sent += 1
            return _Arriving(attempt, value, self._room)
        if arriving is None:  # "passed", or "failed" between clips
            attempt.sent += 1
            about, why = (value, value.reason) if kind == "passed" else (attempt.entry, value)
            self._pipeline.left(attempt, about, why)
            return None
        if kind == "frames":
            if not self._room.acquire(blocking=False):
                self._announce(arriving)
                self._room.acquire()
            arriving.put(value)
            return arriving
        if kind == "end":
            arriving.clip.notes[:] = value
        arriving.put(VideoError(value) if kind == "failed" else None)
        self._announce(arriving)
        return None

    def _announce(self, arriving: _Arriving) -> None:
        if not arriving.announced:
            arriving.announced = True
            self._pipeline.ready.put(arriving)

    def _started(self) -> subprocess.Popen[bytes]:
        """The process, which gets what it needs to know first."""
        if self._process is None or self._process.poll() is not None:
            # a session of its own: Ctrl-C is for the process that encodes, whose end ends this one
            self._process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            assert self._process.stdin is not None
            send(self._pipeline.cutting, self._process.stdin)
        return self._process
