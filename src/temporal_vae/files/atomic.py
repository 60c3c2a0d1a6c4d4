"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Whole files ----------------------------------------------------------------------------------


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
    partial = final.with_name(f".{_stem(final)}.{uuid.uuid4().hex[:8]}.part{suffix}")
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
    # without a suffix, as folders are known by
    partial = final.with_name(f".{_stem(final).replace('.', '-')}-{uuid.uuid4().hex[:8]}-part")
    try:
        partial.mkdir()
    except OSError as error:
        raise PermissionError(f"cannot write in {final.parent}: {error.strerror}") from error
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("r+b") as written:
                os.fsync(written.fileno())
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stem(file: Path) -> str:
    return os.fsencode(file.stem)[:80].decode(errors="ignore")  # names have 255 bytes at most


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
