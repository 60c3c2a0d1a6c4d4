"""Which files a command reads, and which it writes."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from temporal_vae.video import PIPE
from temporal_vae.video.read.images import SUFFIXES as IMAGE_SUFFIXES
from temporal_vae.video.read.images import is_animated_webp

VIDEO_SUFFIXES = frozenset([
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogv", ".ts", ".webm", ".wmv", ".y4m",
])  # fmt: skip

Job = tuple[Path, Path]
"""A file to read and one to write."""


def find_inputs(words: Sequence[Path], suffixes: frozenset[str]) -> list[Path]:
    """The files that words name: files, folders for all in them with these suffixes, and patterns.

    Where videos are looked for, a folder of images stands for one clip, and so does each such
    folder in a folder; "-" for standard input. A name of nothing is given as it is: see
    `refuse_missing`.
    Raises `ValueError` for a folder without such files, and a pattern that no file matches.
    """
    return [path for word in words for path in _named(word, suffixes)]


def refuse_missing(paths: Sequence[Path]) -> None:
    """Raise `ValueError` for a path that does not exist, with the words of those who would open it.

    They need torch, and this does not: a mistyped name is told at once.
    """
    for path in paths:
        if str(path) != PIPE and not path.exists():
            raise ValueError(f"{path}: no such file")


def refuse_terminal(source: Path, target: Path) -> None:
    """Raise `ValueError` for standard input or output that is no pipe or file, but a terminal."""
    if str(source) == PIPE and sys.stdin.isatty():
        raise ValueError("- reads a video that is piped in, and this is a terminal: ffmpeg ... |")
    if str(target) == PIPE and sys.stdout.isatty():
        raise ValueError("- writes a video for another program, and this is a terminal: | ffplay -")


def plan_jobs(
    words: Sequence[Path], target: Path, suffixes: frozenset[str], suffix: str, overwrite: bool
) -> list[Job]:
    """What to write for each input: `target`, or in that folder a file named like its input.

    The target is a folder where it is one, or where there are several inputs or a folder of them;
    it is made. Raises `ValueError` before where two inputs would be written to one file, or a file
    exists unless `overwrite`; for a single input that does not exist, and a suffix without its dot.
    """
    if suffix and suffix[0] != ".":
        raise ValueError(f"a suffix begins with a dot, as .{suffix} does: got {suffix!r}")
    inputs = find_inputs(words, suffixes)
    if len(inputs) == 1:  # of several, one that is missing does not keep the others
        refuse_missing(inputs)
    many = len(inputs) > 1 or any(word.is_dir() and word not in inputs for word in words)
    if not (many or target.is_dir()):
        return [(inputs[0], target)]
    if any(str(path) == PIPE for path in (*inputs, target)):
        raise ValueError("- is one video: for a folder name files")
    if not target.is_dir() and (target.exists() or (suffix and target.suffix == suffix)):
        raise ValueError(f"{target} is a file's name, and {len(inputs)} inputs need a folder")
    jobs = [(path, target / (_title(path) + suffix)) for path in inputs]
    taken: dict[Path, Path] = {}
    for path, out in jobs:
        if out in taken:
            raise ValueError(f"{taken[out]} and {path} would both be written to {out}")
        if out.exists() and not overwrite:
            raise ValueError(f"{out} exists: give --overwrite to replace it")
        taken[out] = path
    target.mkdir(parents=True, exist_ok=True)
    return jobs


def _named(word: Path, suffixes: frozenset[str]) -> list[Path]:
    """What one of the words names."""
    if word.is_dir() and str(word) != PIPE:
        inside = _inside(word, suffixes)
        if not inside:
            raise ValueError(f"{word}{os.sep} holds none of {', '.join(sorted(suffixes))}")
        return inside
    if word.exists() or not glob.has_magic(str(word)):
        return [word]
    matches = [Path(match) for match in sorted(glob.glob(str(word), recursive=True))]
    if not matches:
        raise ValueError(f"no file matches {word}")
    return [
        path
        for match in matches
        for path in (_inside(match, suffixes) if match.is_dir() else [match])
    ]


def _inside(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """What a folder holds, or the folder itself where it is a clip; nothing if neither."""
    entries = sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")
    videos = suffixes is VIDEO_SUFFIXES
    chosen = [
        entry for entry in entries
        if (entry.is_file() and _suits(entry, suffixes)) or (videos and _is_clip(entry))
    ]  # fmt: skip
    return chosen or ([folder] if videos and _is_clip(folder) else [])


def _suits(file: Path, suffixes: frozenset[str]) -> bool:
    return file.suffix.lower() in suffixes or (
        suffixes is VIDEO_SUFFIXES and is_animated_webp(str(file))
    )


def _is_clip(folder: Path) -> bool:
    """Whether it is a folder with images, and without videos."""
    if not folder.is_dir():
        return False
    files = [entry for entry in folder.iterdir() if entry.is_file() and entry.name[0] != "."]
    images = any(file.suffix.lower() in IMAGE_SUFFIXES for file in files)
    return images and not any(_suits(file, VIDEO_SUFFIXES) for file in files)


def _title(path: Path) -> str:
    """What is named after an input: a file's name without its suffix, a folder's whole name."""
    return path.resolve().name if path.is_dir() else path.stem
