"""What a command says: progress, results and errors."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from temporal_vae.cli.groups import OptionGroup, option
from temporal_vae.cli.info import Rows, shown, to_json
from temporal_vae.video import PIPE

if TYPE_CHECKING:
    from temporal_vae.convert.ends import Summary

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)

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
        """What was done: notes on stderr; on stdout a line, or what is known of the file.

        On stderr all of it where the video is on stdout.
        """
        done, rows = result
        for note in () if self.quiet else done.notes:
            err.print(f"tvae: note: {note}", markup=False, soft_wrap=True)
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
            line = f"{target}: {done.frames} frames in {done.seconds:.1f} s, {rate:.2f} frames/s"
            console.print(f"{line}, {clips}", markup=False, soft_wrap=True)
            for name, value in shown(rows).items() if self.verbose else ():
                console.print(f"  {name}: {value}", markup=False, soft_wrap=True)


def show_rows(rows: Rows, as_json: bool) -> None:
    """Print rows on stdout: as a table, or as one line of JSON."""
    if as_json:
        out.print(to_json(rows), markup=False, soft_wrap=True)
        return
    table = Table(show_header=False, box=None)
    for name, value in shown(rows).items():
        table.add_row(name, value)
    out.print(table, markup=False, soft_wrap=True)


class Meter:
    """Progress on stderr: a bar with frames/s and time left; in a log, a line every ten seconds."""

    def __init__(self, title: str, quiet: bool = False):
        self._quiet = quiet
        self._title, self._start, self._said = title, time.monotonic(), time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            TextColumn("{task.completed:.0f} frames, {task.fields[rate]}"), TimeRemainingColumn(),
            console=err, transient=True, disable=quiet or not err.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=None, rate="")

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """Show that `done` frames of `total` are done."""
        now = time.monotonic()
        rate = done / max(now - self._start, 1e-9)
        self._bar.update(self._task, completed=done, total=total, rate=f"{rate:.2f} frames/s")
        if not err.is_terminal and not self._quiet and now - self._said > 10:
            self._said = now
            of = "" if total is None else f" of {total}"
            # before the first frame nobody knows
            left = f", {max(0, total - done) / rate:.0f} s left" if total and done else ""
            err.print(f"{self._title}: {done} frames{of}{left}, {rate:.2f} frames/s")


def say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning of a library as a note, in one line."""
    err.print(f"tvae: note: {' '.join(str(message).split())}", markup=False, soft_wrap=True)


def say_error(message: str) -> None:
    """Print an error on stderr, in one line."""
    err.print(f"tvae: {' '.join(message.split())}", markup=False, soft_wrap=True)
