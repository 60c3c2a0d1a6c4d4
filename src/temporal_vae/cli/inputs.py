"""Which files a command reads, and which it writes."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from temporal_vae.video import PIPE, VIDEO_SUFFIXES
from temporal_vae.video.read.images import SUFFIXES as IMAGE_SUFFIXES
from temporal_vae.video.read.images import is_animated_webp

Job = tuple[Path, Path]
"""A file to read and one to write."""


NAMED = 5
"""How many of many are named in a message."""


def find_inputs(words: Sequence[Path], suffixes: frozenset[str]) -> list[Path]:
    """The files that words name: files, folders for all in them with these suffixes, and patterns.

    Where videos are looked for, a folder of images stands for one clip, and so does each such
    folder in a folder; "-" for standard input. A name of nothing is given as it is: see
    `refuse_missing`.
    Raises `ValueError` for a folder without such files, and a pattern that no file matches.
    """
    return [path for word in words for path, _ in _named(word, suffixes, None)]


def passed_over(words: Sequence[Path], suffixes: frozenset[str], target: Path) -> list[Path]:
    """Folders in those that words name, in which nothing is looked for without `recursive`.

    The target is none of them.
    """
    below = os.path.realpath(target)
    return [
        entry
        for word in words
        if word.is_dir()
        for entry in _visible(word)
        if entry.is_dir() and not (suffixes is VIDEO_SUFFIXES and _is_clip(entry))
        if os.path.realpath(entry) != below
    ]


def some_of(paths: Sequence[object]) -> str:
    """Names of many things, and how many more there are."""
    more = len(paths) - NAMED
    return ", ".join(map(str, paths[:NAMED])) + (f" and {more} more" if more > 0 else "")


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
    words: Sequence[Path], target: Path, suffixes: frozenset[str], suffix: str, replace: bool,
    recursive: bool = False,
) -> list[Job]:  # fmt: skip
    """What to write for each input: `target`, or in that folder a file named like its input.

    The target is a folder where it is one, or where there are several inputs or a folder of them;
    it is made. With `recursive` folders in folders are looked through, and the target gets the same
    folders. Raises `ValueError` before where two inputs would be written to one file, or a file
    exists unless `replace`; for a single input that does not exist, and a suffix without its dot.
    """
    if suffix and suffix[0] != ".":
        raise ValueError(f"a suffix begins with a dot, as .{suffix} does: got {suffix!r}")
    below = target if recursive else None
    places = [found for word in words for found in _named(word, suffixes, below)]
    inputs = [path for path, _ in places]
    if len(inputs) == 1:  # of several, one that is missing does not keep the others
        refuse_missing(inputs)
    many = len(inputs) > 1 or any(word.is_dir() and word not in inputs for word in words)
    if not (many or target.is_dir()):
        return [(inputs[0], target)]
    if any(str(path) == PIPE for path in (*inputs, target)):
        raise ValueError("- is one video: for a folder name files")
    if not target.is_dir() and (target.exists() or (suffix and target.suffix == suffix)):
        raise ValueError(f"{target} is a file's name, and {len(inputs)} inputs need a folder")
    jobs = [(path, target / folder / (_title(path) + suffix)) for path, folder in places]
    _refuse_clashes(jobs)
    if not replace:
        refuse_existing(jobs)
    for folder in {out.parent for _, out in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    return jobs


def refuse_existing(jobs: Sequence[Job]) -> None:
    """Raise `ValueError` where a file to write exists."""
    there = [out for _, out in jobs if out.exists()]
    if there:
        exist = "exists" if len(there) == 1 else "exist"
        raise ValueError(
            f"{some_of(there)} {exist}: give --skip-existing to keep what would be made the same, "
            "or --overwrite to replace it"
        )


def _refuse_clashes(jobs: Sequence[Job]) -> None:
    """Raise `ValueError` for two files of one name, and a file that is to hold another."""
    taken: dict[Path, Path] = {}
    for path, out in jobs:
        if out in taken:
            raise ValueError(
                f"{taken[out]} and {path} would both be written to {out}: rename one, or write it "
                "to another folder"
            )
        taken[out] = path
    for path, out in jobs:
        for parent in out.parents:
            if parent in taken:
                raise ValueError(
                    f"{taken[parent]} would be written to {parent}, where {path} needs a folder: "
                    "give --suffix"
                )


Place = tuple[Path, Path]
"""A file to read, and the folder of what is made of it, from the target on."""


def _named(word: Path, suffixes: frozenset[str], below: Path | None) -> list[Place]:
    """What one of the words names; in all folders of a folder where there is a target `below`."""
    if word.is_dir() and str(word) != PIPE:
        inside = _tree(word, suffixes, below)
        if not inside:
            others = [] if below else passed_over([word], suffixes, word)
            hint = f"; --recursive looks into {some_of(others)}" if others else ""
            raise ValueError(f"{word}{os.sep} holds none of {', '.join(sorted(suffixes))}{hint}")
        return inside
    if word.exists() or not glob.has_magic(str(word)):
        return [(word, Path())]
    matches = [Path(match) for match in sorted(glob.glob(str(word), recursive=True))]
    if not matches:
        raise ValueError(f"no file matches {word}")
    return [
        place
        for match in matches
        for place in (_tree(match, suffixes, below) if match.is_dir() else [(match, Path())])
    ]


def _tree(folder: Path, suffixes: frozenset[str], below: Path | None) -> list[Place]:
    """What a folder holds, and with a target `below` the folders in it; see `_inside`.

    Links are followed, each folder is entered once, and the target is not: what is written there is
    no input.
    """
    seen = set() if below is None else {os.path.realpath(below)}
    found: list[Place] = []
    waiting = [Path()]
    while waiting:
        place = waiting.pop()
        here = folder / place
        if os.path.realpath(here) in seen:
            continue
        seen.add(os.path.realpath(here))
        found += [(path, place) for path in _inside(here, suffixes, itself=place == Path())]
        if below is not None:
            waiting += [place / e.name for e in reversed(_visible(here)) if e.is_dir()]
    whole_clip = len(found) > 1 and found[0][0] == folder  # its images are not what was meant
    return found[1:] if whole_clip else found


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")


def _inside(folder: Path, suffixes: frozenset[str], itself: bool) -> list[Path]:
    """What a folder holds, or (with `itself`) the folder where it is a clip; nothing if neither."""
    entries = _visible(folder)
    videos = suffixes is VIDEO_SUFFIXES
    chosen = [
        entry for entry in entries
        if (entry.is_file() and _suits(entry, suffixes)) or (videos and _is_clip(entry))
    ]  # fmt: skip
    return chosen or ([folder] if itself and videos and _is_clip(folder) else [])


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
