"""Which videos a data set has, one after the other, and by which names their latents go."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from temporal_vae.video.sources import TAR, Source, files_below, members

MANIFEST = "manifest.parquet"
PATHS = ("path", "file", "video", "source")
"""Columns of a manifest, of which the first that is there names the video."""
CAPTIONS = ("caption", "text", "prompt")
OURS = "~"
"""Stands in names before what is added to tell equal ones apart; see `quoted`."""
LONGEST_PART = 40
"""Characters of what tells parts of a video apart in their names."""
LONGEST = 180
"""Bytes of a folder's or file's name; systems take 255, of which suffixes and ranges need some."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A video of a data set."""

    number: int
    """Its place in the data set."""
    name: str
    """Of its latents, from the folder of all latents on, without their suffix."""
    source: Source
    start: Fraction | None = None
    """Seconds at which it begins, where a manifest says so."""
    frames: int | None = None
    """How many of its frames are taken, where a manifest says so."""
    caption: str | None = None
    wrong: str | None = None
    """Why it cannot be encoded, where that is known already."""

    def stamp(self) -> str:
        """What its row in the data set is made of: its file, and its caption."""
        return f"{self.file_stamp()} {self.caption}"

    def file_stamp(self) -> str:
        """Size and time of its file: another one, and it is encoded again."""
        try:
            found = os.stat(self.source.path)
        except (OSError, ValueError):  # ValueError: a name with a zero in it
            return "missing"
        return f"{found.st_size} {found.st_mtime_ns} {self.source.offset}"


def entries_of(place: Path) -> Iterator[Entry]:
    """The videos of a folder, a tar file or a manifest, in a fixed order, without listing them all.

    A manifest is a .csv, .jsonl, .parquet or .txt file: a table with a column path (relative to the
    file, or absolute), and maybe start (seconds), frames and caption; or a path a line.

    Raises `ValueError` for what is none of them, and `OSError` where it cannot be read.
    """
    if place.is_dir():
        found = _of_folder(place)
    elif place.suffix == TAR:
        found = _of_tar(place, "")
    elif place.suffix in _TABLES:
        found = _told_apart(_of_rows(_TABLES[place.suffix](place), place.parent))
    else:
        raise ValueError(
            f"{place} must be a folder of videos, a .tar file of them, or a manifest "
            f"({', '.join(_TABLES)})" + ("" if place.exists() else ": there is no such file")
        )
    for number, values in enumerate(found):
        yield Entry(number, **values)


def _of_folder(folder: Path) -> Iterator[dict[str, Any]]:
    for file in files_below(folder):
        name = os.fspath(file.relative_to(folder))
        if file.suffix.lower() != TAR:
            yield {"name": quoted(name), "source": Source(os.fspath(file))}
            continue
        try:
            yield from _of_tar(file, f"{quoted(name)}/")
        except (ValueError, OSError) as error:  # the others are still there
            yield {"name": quoted(name), "source": Source(os.fspath(file)), "wrong": str(error)}


def _of_tar(file: Path, folder: str) -> Iterator[dict[str, Any]]:
    yield from _told_apart(
        {"name": f"{folder}{quoted(source.member or '')}", "source": source}
        for source in members(file)
    )


def _told_apart(found: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same, where a name that was there before gets the number of times that it came."""
    seen: Counter[str] = Counter()
    for values in found:
        name = values["name"]
        seen[name] += 1
        yield values | {"name": f"{name}{OURS}{seen[name]}"} if seen[name] > 1 else values


# Manifests ---------------------------------------------------------------------------------------


def _of_rows(rows: Iterable[Mapping[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        name = f"{OURS}row-{number}"
        values: dict[str, Any] = {"name": name, "source": Source(name)}
        try:
            path = _first(row, PATHS)
            if path is None:
                raise ValueError(f"it has no column {', '.join(PATHS)} with a path")
            name, caption = quoted(path), _first(row, CAPTIONS)
            values = {"name": name, "source": Source(os.fspath(folder / path))}
            told = {"caption": caption and _plain(caption)}
            yield values | _range(row, name) | told
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            yield values | {"wrong": f"row {number} of the manifest: {_plain(str(error))}"}


def _first(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of these columns that holds something, as text; pandas' NaN is nothing."""
    values = (row.get(name) for name in names)
    held = (value for value in values if value not in (None, "") and value == value)
    return next((str(value) for value in held), None)


def _plain(text: str) -> str:
    """Text that UTF-8 can hold: halves of a pair of surrogates become question marks."""
    return text.encode(errors="replace").decode()


def _range(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Start and frames of a row, and a name that tells it from another part of the same video."""
    start, frames = (_first(row, (column,)) for column in ("start", "frames"))
    if start is None and frames is None:
        return {}
    found = {"start": None if start is None else Fraction(start),
             "frames": None if frames is None else _whole_number(frames)}  # fmt: skip
    if (found["start"] or 0) < 0 or (found["frames"] or 1) < 1:
        raise ValueError(f"start must be 0 or more, frames 1 or more, got {start} and {frames}")
    part = f"{found['start'] or 0}+{found['frames'] or 'all'}".replace("/", "_")
    if len(part) > LONGEST_PART:
        part = hashlib.sha256(part.encode()).hexdigest()[:16]
    return {**found, "name": f"{name}{OURS}{part}"}


def _whole_number(text: str) -> int:
    """A number of frames; pandas writes 49.0 in a column with gaps."""
    number = Fraction(text)
    if number.denominator != 1:
        raise ValueError(f"frames must be a whole number, got {text}")
    return int(number)


def _csv(file: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with file.open(newline="", encoding="utf-8-sig") as lines:
        try:
            yield from csv.DictReader(lines)
        except csv.Error as error:
            raise ValueError(f"{file}: {error}") from error


def _jsonl(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else {}


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet as parquet

    for batch in parquet.ParquetFile(file).iter_batches(batch_size=1000):
        yield from batch.to_pylist()


def _txt(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in map(str.strip, lines):
            if line and not line.startswith("#"):
                yield {"path": line}


_TABLES = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet, ".txt": _txt}


# Names -------------------------------------------------------------------------------------------


def quoted(path: str) -> str:
    """A path as names below a folder: never above it, and different paths never the same.

    Bytes that could lead elsewhere or mean something here are written as %XX: a name's leading dot
    (so no ".." is left, and nothing hidden), the root, control characters, what is no UTF-8, "~"
    (which this library puts before what it adds), the backslash and the colon of Windows, and the
    dots of a folder that ends like a file of this library. Too long a name ends in its hash.
    """
    *folders, last = path.split("/")
    names = [_quoted_folder(folder) for folder in folders]
    return "/".join([*names, _quoted(last)])


def _quoted_folder(name: str) -> str:
    plain = _quoted(name)
    is_like_ours = plain.endswith((".safetensors", ".parquet"))
    return plain.replace(".", "%2E") if is_like_ours else plain


def _quoted(name: str) -> str:
    text = re.sub(r'^\.|[\x00-\x1f\x7f%~\\:*?"<>|\ud800-\udfff]', _percent, name)
    if not text:  # between two slashes, or before the first one
        return "%2F"
    if len(text.encode()) <= LONGEST:
        return text
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return text.encode()[:LONGEST].decode(errors="ignore") + OURS + digest


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(match[0]))
