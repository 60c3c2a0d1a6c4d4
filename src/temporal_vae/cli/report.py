"""What a command says: progress, results and errors."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from temporal_vae.cli.groups import OptionGroup, option
from temporal_vae.cli.info import Rows, shown, to_json
from temporal_vae.cli.inputs import some_of
from temporal_vae.video import PIPE

if TYPE_CHECKING:
    from temporal_vae.convert.ends import Summary

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)

START_SHARE, START_SECONDS = 0.01, 30.0
"""Behind such a share of the work, or so many seconds, plans are made, kernels are compiled and
memory is laid out."""
TIMED_SECONDS, LONG_SECONDS = 5.0, 60.0
"""So many seconds after that it is known what all will take; it is told if it is more than so many.
"""

Result = tuple["Summary", Rows]
"""What was done, and what there is to say of the file that was written."""


@dataclass(frozen=True)
class MessageOptions(OptionGroup):
    """How much a command says."""

    panel = "Messages"
    quiet: bool = option(False, "", "Print nothing but errors.")
    verbose: bool = option(False, "", "Print also what the written file holds.")
    json: bool = option(False, "", "Print one line of JSON for each file.")

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise ValueError("--quiet and --verbose exclude each other")
        if self.quiet:
            warnings.simplefilter("ignore")

    def tell(self, target: Path, result: Result) -> None:
        """What was done, on stdout; on stderr where the video is on stdout."""
        done, rows = result
        console = err if str(target) == PIPE else out
        if self.json:
            # last, as a file may not state how many frames it has
            known: Rows = {"frames": done.frames, "seconds": done.seconds,
                           "clip_frames": done.clip_frames, "notes": done.notes}  # fmt: skip
            rows = {"path": str(target), **rows, **known}
            console.print(to_json(rows), markup=False, soft_wrap=True)
        elif not self.quiet:
            cut, rate = done.clip_frames, done.frames / max(done.seconds, 1e-9)
            clips = "as one clip" if cut is None else f"in clips of {cut} frames"
            if done.frames == 1:
                line = f"{target}: 1 frame in {done.seconds:.1f} s"
            else:
                line = (
                    f"{target}: {done.frames} frames in {done.seconds:.1f} s, {rate:.2f} frames/s"
                )
                line += f", {clips}"
            console.print(line, markup=False, soft_wrap=True)
            for name, value in shown(rows).items() if self.verbose else ():
                console.print(f"  {name}: {value}", markup=False, soft_wrap=True)

    def tell_skipped(self, targets: Sequence[Path]) -> None:
        """The files that were there already."""
        for target in targets if self.json else ():
            row: Rows = {"path": str(target), "skipped": True}
            out.print(to_json(row), markup=False, soft_wrap=True)
        if targets and not self.quiet:
            many = f"{len(targets)} files are" if len(targets) > 1 else f"{targets[0]} is"
            say(f"{many} there already, of the same source, model and options: skipped")


def show_rows(rows: Rows, as_json: bool) -> None:
    """Print rows on stdout: as a table, or as one line of JSON."""
    if as_json:
        out.print(to_json(rows), markup=False, soft_wrap=True)
        return
    table = Table(show_header=False, box=None)
    for name, value in shown(rows).items():
        table.add_row(name, value)
    out.print(table, markup=False, soft_wrap=True)


class Notes:
    """What was not carried over, or could not be read: each said once, with the files it is of."""

    def __init__(self, files: int):
        self._files = files
        self._sources: dict[str, list[Path]] = {}

    def add(self, source: Path, notes: Sequence[str]) -> None:
        """Keep the notes on a file, to be told at the end."""
        for note in notes:
            self._sources.setdefault(note, []).append(source)

    def tell(self, quiet: bool) -> None:
        """Say all of them on stderr, unless `quiet`."""
        for note, sources in () if quiet else self._sources.items():
            many = "" if len(sources) == 1 else f" ({len(sources)} of {self._files} files)"
            say(f"note: {some_of(sources)}: {note}{many}")


class Whole:
    """How far a command is that makes several files."""

    def __init__(self, doing: str, files: int):
        self.doing, self.files = doing, files
        self.ended, self._frames = 0, 0
        self._start = self.said = time.monotonic()

    def end_file(self, frames: int) -> None:
        """Count a file that is done, or failed, and its frames."""
        self.ended += 1
        self._frames += frames

    def now(self, frames: float, total: int | None) -> tuple[float, str]:
        """Files that are done, and in words; of the present one so many frames of a total are."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        done = self.ended + min(1, frames / total if total else 0)
        words = (
            f"{self.ended + 1} of {self.files}, {(self._frames + frames) / seconds:.2f} frames/s"
        )
        return done, words + _left(seconds, done, self.files)


def _left(seconds: float, done: float, total: float | None) -> str:
    """The time that is left, in words; before the first frame nobody knows."""
    if not done or total is None:
        return ""
    left = timedelta(seconds=round(seconds * max(0, total - done) / done))
    return f", {left} left"


class Meter:
    """Progress on stderr: a bar with frames/s and time left; in a log, a line every ten seconds.

    Where it is one of several files there is a bar for all of them above its own.
    """

    def __init__(
        self, title: str, quiet: bool = False, whole: Whole | None = None, unit: str = "frames"
    ):
        self._quiet, self._unit = quiet, unit
        self._whole = whole if whole is not None and whole.files > 1 else None
        self._title, self._start, self._done = title, time.monotonic(), 0
        self.said, self._told = self._start, False
        self._first: tuple[float, float] | None = None
        self.begun = 0.0
        """How much was done before: a training that goes on."""
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            TextColumn("{task.fields[words]}"),
            console=err, transient=True, disable=quiet or not err.is_terminal,
        )  # fmt: skip
        if self._whole is not None:
            self._all = self._bar.add_task(self._whole.doing, total=self._whole.files, words="")
        self._task = self._bar.add_task(title, total=None, words="")

    def __enter__(self) -> Meter:
        self._bar.start()
        self(0, None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._whole is not None:
            self._whole.end_file(self._done)

    def __call__(self, done: float, total: int | None, how: str = "", more: str = "") -> None:
        """Show that `done` frames of `total` are done, and `more`; once how, if it takes long."""
        self._done, seconds = int(done), max(time.monotonic() - self._start, 1e-9)
        of = "" if total is None else f" of {total}"
        some = f"{done:.2f}" if total == 1 else f"{int(done)}"
        new, left = done - self.begun, None if total is None else total - self.begun
        words = f"{some} {self._unit}{of}, {new / seconds:.2f} {self._unit}/s"
        words += _left(seconds, new, left) + more
        if how and total and not self._told and done:
            self._tell_if_long(seconds, done, total, how)
        self._bar.update(self._task, completed=done, total=total, words=words)
        title = self._title
        if self._whole is not None:
            all_done, all_words = self._whole.now(done, total)
            self._bar.update(self._all, completed=all_done, words=all_words)
            title = f"{self._whole.doing} {all_words}; {title}"
        self._say_rarely(f"{title}: {words}")

    def _tell_if_long(self, seconds: float, done: float, total: int, how: str) -> None:
        """Say once how long it takes in all, if that is long, by what was done since the start."""
        if self._first is None and done < START_SHARE * total and seconds < START_SECONDS:
            return
        self._first = began, first = self._first or (seconds, done)
        if seconds - began <= TIMED_SECONDS or done <= first:
            return
        self._told = True
        whole = began + (seconds - began) * (total - first) / (done - first)
        if whole > LONG_SECONDS and not self._quiet:
            words = timedelta(seconds=round(whole))
            err.print(f"{self._title}: about {words} in all: {how}", markup=False, soft_wrap=True)

    def _say_rarely(self, line: str) -> None:
        """Print a line where there are no bars, unless one was printed in the last ten seconds."""
        now, clock = time.monotonic(), self._whole or self
        if not err.is_terminal and not self._quiet and now - clock.said > 10:
            clock.said = now
            err.print(line, markup=False, soft_wrap=True)


def say(message: str) -> None:
    """Print a line on stderr."""
    err.print(f"tvae: {message}", markup=False, soft_wrap=True)


def say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning of a library as a note, in one line."""
    err.print(f"tvae: note: {' '.join(str(message).split())}", markup=False, soft_wrap=True)


def say_error(message: str) -> None:
    """Print an error on stderr, in one line."""
    err.print(f"tvae: {' '.join(message.split())}", markup=False, soft_wrap=True)
