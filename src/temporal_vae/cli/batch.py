"""Many files, one after the other: which are left to make, and what is said of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

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


Numbered = tuple[int, Path, Path]
"""The number of a job among all that were asked for, its source and its file."""


def left_to_do(
    jobs: Sequence[Job], origin_of: OriginOf, folder: FolderOptions, overwrite: bool,
    messages: MessageOptions,
) -> list[Numbered]:  # fmt: skip
    """The jobs that `folder` does not say to skip.

    What killed runs have left beside the files is removed. Raises `ValueError` for files that are
    there and would be made otherwise now, unless they may be replaced.
    """
    clear_partials(out for _, out in jobs)
    numbered = [(index, source, out) for index, (source, out) in enumerate(jobs)]
    if not folder.skip_existing:
        return numbered
    same, others = set(), []
    with Meter("comparing", messages.quiet, unit="files") as meter:
        for index, source, out in numbered:
            meter(index, len(jobs))
            reason = _difference(source, out, origin_of(out, index)) if out.exists() else None
            if reason is not None:
                others.append(reason)
            elif out.exists():
                same.add(index)
    if others and not overwrite:
        _refuse(others)
    messages.tell_skipped([out for index, _, out in numbered if index in same])
    return [job for job in numbered if job[0] not in same]


def run(
    doing: str, todo: Sequence[Numbered], make: Make, origin_of: OriginOf, folder: FolderOptions,
    messages: MessageOptions,
) -> None:  # fmt: skip
    """Make the files. One of several that fails is told and passed over, and in the end raised."""
    whole, notes, failed = Whole(doing, len(todo)), Notes(len(todo)), 0
    try:
        for index, source, out in todo:
            try:
                with Meter(f"{doing} {source.name}", messages.quiet, whole) as meter:
                    done = make(source, out, index, meter)
            except FAILURES as error:
                is_made = folder.skip_existing and out.exists()
                if is_made and _difference(source, out, origin_of(out, index)) is None:
                    continue  # another run was faster
                if len(todo) == 1:
                    raise
                failed += 1
                say_error(str(error))
            else:
                messages.tell(out, done)
                notes.add(source, done[0].notes)
    finally:
        notes.tell(messages.quiet)
    if failed:
        raise ValueError(f"{failed} of {len(todo)} failed")


def _difference(source: Path, out: Path, wanted: Origin) -> str | None:
    """Why a file is not what would be made now; None where it is."""
    from temporal_vae.convert import origin

    try:
        origin.check_made(out, source, wanted)
    except origin.OriginError as error:
        return str(error)
    return None


def _refuse(others: Sequence[str]) -> NoReturn:
    for other in others[1:NAMED]:
        say_error(other)
    more = len(others) - NAMED
    raise ValueError(
        f"{others[0]}: give --overwrite too to make such files again"
        + (f" (and {more} more; nothing was done)" if more > 0 else "")
    )
