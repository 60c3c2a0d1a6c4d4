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

    Raises `IsADirectoryError`, `FileNotFoundError` or `PermissionError` before the block starts
    when `target` could not be written.
    """
    final = Path(os.path.realpath(target))
    if final.is_dir():
        raise IsADirectoryError(f"{target} is a folder, not a file to write")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"the folder {final.parent} does not exist")
    partial = final.with_name(f".{final.stem}.{uuid.uuid4().hex[:8]}.part{final.suffix}")
    try:
        partial.touch(exist_ok=False)
    except OSError as error:
        raise PermissionError(f"cannot write in {final.parent}: {error.strerror}") from error
    try:
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # some writers make a file of their own, for their user alone
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
