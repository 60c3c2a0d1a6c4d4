"""Where videos lie: files below a folder, and members of tar files."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from temporal_vae.video.frames import VIDEO_SUFFIXES

TAR = ".tar"


@dataclass(frozen=True, slots=True)
class Source:
    """A video file, or the member of a tar file that holds one."""

    path: str
    member: str | None = None
    offset: int = 0
    size: int = 0

    @property
    def name(self) -> str:
        """The file's own name, by which it is left out or held out."""
        return os.path.basename(self.member or self.path)

    def __str__(self) -> str:
        return self.path if self.member is None else f"{self.path}: {self.member}"

    @contextmanager
    def file(self) -> Iterator[str]:
        """A path to read it by; the member of a tar file is copied out as long as it is read."""
        if self.member is None:
            yield self.path
            return
        with tempfile.NamedTemporaryFile(suffix=Path(self.member).suffix) as copy:
            with open(self.path, "rb") as tar:
                tar.seek(self.offset)
                copy.write(tar.read(self.size))
                copy.flush()
            yield copy.name


def files_below(folder: Path) -> Iterator[Path]:
    """Videos and tar files in a folder and those inside it, in order of name; hidden ones not.

    One folder's names are in memory at a time. Links to folders are not followed.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if entry.is_dir():
            if not entry.is_symlink():
                yield from files_below(path)
        elif path.suffix.lower() in (*VIDEO_SUFFIXES, TAR) and entry.is_file():
            yield path


def members(path: Path) -> Iterator[Source]:
    """The videos in a tar file as webdataset writes it, in its order.

    Raises `ValueError` for what is no uncompressed tar file.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                if entry.isfile() and Path(entry.name).suffix.lower() in VIDEO_SUFFIXES:
                    yield Source(str(path), entry.name, entry.offset_data, entry.size)
                tar.members.clear()  # type: ignore[attr-defined]  # it remembers all of them
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
