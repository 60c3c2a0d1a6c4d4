"""Many files, one after the other: which are left to make, and what is said of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from temporal_vae.cli.inputs import NAMED, Job
from temporal_vae.cli.options import FolderOptions
from temporal_vae.cli.report import MessageOptions, Meter, Notes, Result, Whole, say_error
from temporal_vae.files.atomic import clear_partials
from temporal_vae.video import VideoError

if TYPE_CHECKING:
    from temporal_vae.convert.origin import Origin

Make = Callable[[Path, Path, int, Meter], Result]
"""Makes the file of a source; also takes the number of the job, and what to tell progress to."""
OriginOf = Callable[[Path, int], "Origin"]
"""What would decide the contents of the file of a job, but for its source."""
FAILURES = (VideoError, ValueError, OSError)


def run(
    doing: str, jobs: Sequence[Job], make: Make, origin_of: OriginOf, folder: FolderOptions,
    overwrite: bool, messages: MessageOptions,
) -> None:  # fmt: skip
    """Make the files of all jobs, but for those that `folder` says to skip.

    One of several that fails is told and passed over, and in the end raised. What killed runs have
    left beside the files is removed first.
    """
    clear_partials(out for _, out in jobs)
    skipped: set[int] = set()
    if folder.skip_existing:
        skipped = _made_before(jobs, origin_of, overwrite, messages)
        messages.tell_skipped([out for index, (_, out) in enumerate(jobs) if index in skipped])
    whole = Whole(doing, len(jobs) - len(skipped))
    notes, failed = Notes(len(jobs)), 0
    try:
        for index, (source, out) in enumerate(jobs):
            if index in skipped:
                continue
            try:
                with Meter(f"{doing} {source.name}", messages.quiet, whole) as meter:
                    done = make(source, out, index, meter)
            except FAILURES as error:
                if folder.skip_existing and _is_made(source, out, origin_of(out, index)):
                    continue  # another run was faster
                if len(jobs) == 1:
                    raise
                failed += 1
                say_error(str(error))
            else:
                messages.tell(out, done)
                notes.add(source, done[0].notes)
    finally:
        notes.tell(messages.quiet)
    if failed:
        raise ValueError(f"{failed} of {len(jobs)} failed")


def _is_made(source: Path, out: Path, wanted: Origin) -> bool:
    from temporal_vae.convert import origin

    with suppress(origin.OriginError):
        if out.exists():
            origin.check_made(out, source, wanted)
            return True
    return False


def _made_before(
    jobs: Sequence[Job], origin_of: OriginOf, overwrite: bool, messages: MessageOptions
) -> set[int]:
    """Numbers of the jobs whose file is there, and the same.

    Raises `ValueError` for files that are there and others, unless they may be replaced.
    """
    from temporal_vae.convert import origin

    same, others = set(), []
    with Meter("comparing", messages.quiet, unit="files") as meter:
        for index, (source, out) in enumerate(jobs):
            meter(index, len(jobs))
            try:
                if out.exists():
                    origin.check_made(out, source, origin_of(out, index))
                    same.add(index)
            except origin.OriginError as error:
                others.append(str(error))
    if others and not overwrite:
        for other in others[1:NAMED]:
            say_error(other)
        more = len(others) - NAMED
        raise ValueError(
            f"{others[0]}: give --overwrite too to make such files again"
            + (f" (and {more} more; nothing was done)" if more > 0 else "")
        )
    return same
