"""Files written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file beside `target` to write to; it takes the name of `target` at the end.

    When the block raises, Ctrl-C included, the new file is removed and `target` is as before. The
    temporary name keeps the suffix, since writers choose a format by it.

    Raises `IsADirectoryError`, `FileExistsError`, `FileNotFoundError` or `PermissionError` before
    the block starts when `target` could not be written.
    """
    final = Path(os.path.realpath(target))  # a link stays a link, to the new file
    if final.is_dir():
        raise IsADirectoryError(f"{target} is a folder, not a file to write")
    if final.exists() and not final.is_file():
        raise FileExistsError(f"{target} is a device or a pipe, which a new file would replace")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final.parent} is not a folder")
    suffix = Path(target).suffix  # of the name that was given: it may choose the format
    stem = os.fsencode(final.stem)[:80].decode(errors="ignore")  # names have 255 bytes at most
    partial = final.with_name(f".{stem}.{uuid.uuid4().hex[:8]}.part{suffix}")
    try:
        partial.touch(exist_ok=False)
    except OSError as error:
        raise PermissionError(f"cannot write in {final.parent}: {error.strerror}") from error
    try:
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # some writers make a file of their own, for their user alone
        with partial.open("r+b") as written:
            os.fsync(written.fileno())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
