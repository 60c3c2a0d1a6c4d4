"""Files and folders that appear whole or not at all.

They are written under a name of our own, which is locked meanwhile. A lock ends with its process,
however that ends: such a name without a lock is what a killed one has left.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing is taken for dead
    fcntl = None  # type: ignore[assignment]

# Whole files ----------------------------------------------------------------------------------


@contextmanager
def atomic_path(target: str | os.PathLike[str], replace: bool = True) -> Iterator[Path]:
    """A new file beside `target` to write to; it takes the name of `target` at the end.

    When the block raises, Ctrl-C included, the new file is removed and `target` is as before. The
    temporary name keeps the suffix, since writers choose a format by it.

    Raises `IsADirectoryError`, `FileExistsError`, `FileNotFoundError` or `PermissionError` before
    the block starts when `target` could not be written. Without `replace` a `target` that somebody
    else has made meanwhile is kept, and a `FileExistsError` after the block.
    """
    final = Path(os.path.realpath(target))  # a link stays a link, to the new file
    if final.is_dir():
        raise IsADirectoryError(f"{target} is a folder, not a file to write")
    if final.exists() and not final.is_file():
        raise FileExistsError(f"{target} is a device or a pipe, which a new file would replace")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final.parent} is not a folder")
    ending = f".part{Path(target).suffix}"  # of the name that was given: it may choose the format
    with _new_partial(final, f".{_MARK}", ending, lambda path: path.touch(exist_ok=False)) as part:
        mode = part.stat().st_mode
        try:
            yield part
            part.chmod(mode)  # some writers make a file of their own, for their user alone
            with part.open("r+b") as written:
                os.fsync(written.fileno())
            os.replace(part, final) if replace else _link(part, final)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside `target` to fill with files; it takes the name of `target` at the end.

    When the block raises, the new folder is removed, and there is none by the name of `target`.

    Raises `FileExistsError`, `FileNotFoundError` or `PermissionError` before the block starts when
    `target` could not be made: only an empty folder is replaced.
    """
    final = Path(os.path.realpath(target))
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise FileExistsError(f"{target} exists: a new folder needs a name that is free")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final.parent} is not a folder")
    with _new_partial(final, f"-{_MARK}", "-part", Path.mkdir) as part:  # no suffix, as folders
        try:
            yield part
            for file in part.iterdir():
                with file.open("r+b") as written:
                    os.fsync(written.fileno())
            os.replace(part, final)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _link(part: Path, final: Path) -> None:
    """Give a file its name, unless there is one by it: no two writers can both pass here."""
    try:
        os.link(part, final)
    except OSError as error:
        if os.path.lexists(final):
            raise FileExistsError(
                f"{final} was made by another process meanwhile, and is kept"
            ) from error
        os.replace(part, final)  # a drive without links


# Names of what is not finished -----------------------------------------------------------------

_MARK = "tvae-"
_PARTIAL = re.compile(rf"\.(.*)[.-]{_MARK}[0-9a-f]{{8}}[.-]part(\.[^.]*)?", re.DOTALL)
"""Name of a file or folder that is being written; the first group is how its target begins."""


def clear_partials(targets: Iterable[str | os.PathLike[str]]) -> None:
    """Remove what killed processes have left beside the files or folders that they were writing.

    What a living process writes is locked, and stays; so does everything where there are no locks,
    as on Windows and on some network drives.
    """
    wanted: dict[Path, set[str]] = {}
    for target in targets:
        final = Path(os.path.realpath(target))
        wanted.setdefault(final.parent, set()).add(_stem(final))
    for folder, stems in wanted.items():
        with suppress(OSError):  # a folder that is not there yet, or may not be listed
            for entry in sorted(folder.iterdir()):
                match = _PARTIAL.fullmatch(entry.name)
                if match and match[1] in stems:
                    _remove_if_dead(entry)


def clear_partials_below(folder: str | os.PathLike[str]) -> None:
    """The same for whatever was being written in a folder, or in those inside it."""
    for place, _, names in os.walk(folder):
        for name in names:
            if _PARTIAL.fullmatch(name):
                _remove_if_dead(Path(place, name))


@contextmanager
def _new_partial(
    final: Path, mark: str, ending: str, make: Callable[[Path], None]
) -> Iterator[Path]:
    """A new file or folder beside `final`, locked until the block ends."""
    lock = None
    while lock is None:
        part = final.with_name(f".{_stem(final)}{mark}{uuid.uuid4().hex[:8]}{ending}")
        try:
            make(part)
        except OSError as error:
            raise PermissionError(f"cannot write in {final.parent}: {error.strerror}") from error
        lock = _lock(part)
    try:
        yield part
    finally:
        os.close(lock)


def _lock(part: Path) -> int | None:
    """A handle that locks what was just made; None if it was taken for dead before it was locked.

    On a drive without locks the handle locks nothing.
    """
    try:
        handle = _opened(part)
    except FileNotFoundError:
        return None
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)  # waits for one that removes it
    if part.exists():
        return handle
    os.close(handle)
    return None


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold a file, which is made if need be, for as long as the block lasts.

    The system lets go of it when the process ends, however it ends. On a drive without locks
    nothing is held. Raises `BlockingIOError` where another process holds it.
    """
    with file.open("a") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # no locks here
                pass
        yield


def _remove_if_dead(part: Path) -> None:
    with suppress(OSError):  # it lives, or is gone by now
        handle = _opened(part)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        finally:
            os.close(handle)


def _opened(part: Path) -> int:
    """A handle to lock by; files are opened to write, since some network drives ask for that."""
    if fcntl is None:  # and a file that is open could not be renamed
        return os.open(os.devnull, os.O_RDONLY)
    return os.open(part, os.O_RDONLY if part.is_dir() else os.O_RDWR)


def _stem(file: Path) -> str:
    """How the names of what becomes `file` begin: without dots, as folders have no suffix."""
    stem = file.stem.replace(".", "-")
    return os.fsencode(stem)[:80].decode(errors="ignore")  # names have 255 bytes at most


# Files by any name ----------------------------------------------------------------------------


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write in, which becomes `path` at the end; folders are made as needed.

    Raises `TypeError` for what is no path, `ValueError` for a blank one, and as `atomic_path`.
    """
    target = _path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as partial, partial.open("wb") as file:
        yield file


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """A file to read in binary, and its bytes.

    Raises as `new_file`, `FileNotFoundError`, and `ValueError` for a pipe or a device.
    """
    source = _path(path)
    if source.exists() and not (source.is_file() or source.is_dir()):  # opening one might wait
        raise ValueError(f"{source} is a device or a pipe: open it and read from the stream")
    with source.open("rb", buffering=0) as file:
        yield file, os.fstat(file.fileno()).st_size


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or os.PathLike, got {path!r}")
    text = os.fsdecode(path)
    if not text.strip():
        raise ValueError(f"path must name a file, got {text!r}")
    return Path(text)
