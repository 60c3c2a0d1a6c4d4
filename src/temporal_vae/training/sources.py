"""Which clips there are to train on: folders, lists and tar files, and what is wrong with them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from temporal_vae.training.recipe import Data, Recipe
from temporal_vae.video import VIDEO_SUFFIXES, VideoError, VideoReader
from temporal_vae.video.sources import TAR, Source, files_below, members

HELD_OUT_OF = 20
"""Without clips for validation, one source in so many is left out of training for it."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A source that can be trained on: its upright size, its length, and its rate."""

    source: Source
    height: int
    width: int
    frames: int
    fps: float

    @property
    def seconds(self) -> float:
        """The length of the clip."""
        return self.frames / self.fps

    def scaled(self, width: int | None) -> tuple[int, int]:
        """(height, width) when it is scaled to so many pixels across, as `VideoReader` does."""
        if width is None:
            return self.height, self.width
        return max(1, round(self.height * width / self.width)), width


@dataclass(slots=True)
class Skipped:
    """What was passed over, by reason."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, source: Source, reason: str) -> None:
        """Remember a source; of several reasons the first."""
        self.reasons.setdefault(str(source), reason)

    def __len__(self) -> int:
        return len(self.reasons)


def find_sources(
    paths: Sequence[str | os.PathLike[str]],
    exclude: Sequence[str] = (),
    skipped: Skipped | None = None,
    purpose: str = "train",
) -> list[Source]:
    """The videos of folders (with those inside them), list files and tar files, in order of name.

    A list is a .txt file with a path a line, relative to the list. A .tar is read as webdataset
    writes it: every member with a video's suffix is a clip. `exclude` are patterns of file names.
    What is wrong inside of a folder or a list is added to `skipped`.

    Raises `ValueError` for a path that is not there, and where nothing is found.
    """
    passed = Skipped() if skipped is None else skipped
    found = [source for path in paths for source in _sources(Path(path), passed)]
    kept = [s for s in found if not any(fnmatch(s.name, pattern) for pattern in exclude)]
    if not kept:
        where = ", ".join(map(str, paths)) or "no folder was given"
        left_out = f" ({len(found)} left out by data.exclude)" if found else ""
        raise ValueError(
            f"no videos to {purpose} on in {where}{left_out}: give folders of videos "
            f"({', '.join(sorted(VIDEO_SUFFIXES)[:4])}, ...), .txt lists of them, or .tar files"
        )
    return list(dict.fromkeys(kept))


def _sources(path: Path, skipped: Skipped) -> Iterator[Source]:
    if path.is_dir():
        for file in files_below(path):
            yield from _inside(file, skipped)
    elif not path.exists():
        raise ValueError(f"{path} is not there: give folders, lists or tar files of videos")
    elif path.suffix == TAR:
        yield from members(path)
    elif path.suffix == ".txt":
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.startswith("#"):
                yield from _inside(path.parent / line.strip(), skipped)
    else:
        yield Source(os.path.realpath(path))


def _inside(path: Path, skipped: Skipped) -> Iterator[Source]:
    """What a folder or a list names: where that is wrong, the rest is still there."""
    try:
        if path.suffix == ".txt":
            raise ValueError("a list is not read from within another one")
        yield from _sources(path, skipped)
    except (ValueError, OSError) as error:
        skipped.add(Source(str(path)), str(error))


def probe(source: Source) -> Clip:
    """Size, length and rate of a source, whose first two frames are decoded to see that they can.

    Raises `VideoError` for what cannot be read, and for a single frame.
    """
    with source.file() as path, VideoReader(path, alpha="drop") as video:
        first = list(islice(video, 2))
        height, width = video.size
        info = video.info
    if len(first) < 2:
        raise VideoError("one frame is no clip")
    return Clip(source, height, width, info.expected_frames or len(first), float(info.fps))


def probe_all(
    sources: Sequence[Source], skipped: Skipped, progress: Callable[[int, int], None]
) -> list[Clip]:
    """The clips that can be read; the others are added to `skipped`."""

    def one(source: Source) -> Clip | str:
        try:
            return probe(source)
        except (VideoError, OSError) as error:
            return str(error).removeprefix(f"{source}: ")

    clips = []
    with ThreadPoolExecutor(4) as pool:
        for number, (source, found) in enumerate(zip(sources, pool.map(one, sources), strict=True)):
            progress(number + 1, len(sources))
            if isinstance(found, Clip):
                clips.append(found)
            else:
                skipped.add(source, found)
    return clips


def hold_out(sources: Sequence[Source]) -> tuple[list[Source], list[Source]]:
    """Sources to train on, and those kept for validation: every twentieth by the hash of its name.

    The same file is held out wherever it lies and whatever lies beside it. Where that would leave
    nothing to train on, nothing is held out.
    """
    held = [source for source in sources if _is_held_out(source.name)]
    kept = [source for source in sources if not _is_held_out(source.name)]
    return (kept, held) if kept else (list(sources), [])


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_OF == 0


def fitting_widths(clip: Clip, data: Data, crop: int) -> list[int | None]:
    """Of the recipe's widths those at which a square of `crop` pixels lies inside the picture."""
    widths: Iterable[int | None] = data.widths or (None,)
    return [width for width in widths if min(clip.scaled(width)) >= crop]


def fitting_strides(clip: Clip, data: Data, frames: int) -> list[int]:
    """Of the recipe's strides those with which the clip is long enough for `frames` frames."""
    length = int(clip.seconds * data.fps + 0.5) if data.fps else clip.frames
    return [stride for stride in data.strides if (frames - 1) * stride < length]


def unfit_clips(clips: Sequence[Clip], data: Data) -> dict[Source, str]:
    """The clips that fit none of the kinds of batches that are drawn, and why."""
    kinds, unfit = [kind for kind in data.batch if kind.chance], {}
    for clip in clips:
        large = [b for b in kinds if fitting_widths(clip, data, b.crop)]
        if not large:
            least = min(b.crop for b in kinds)
            size = f"{clip.width}x{clip.height}"
            unfit[clip.source] = f"{size} pixels are too small for a crop of {least}"
        elif not any(fitting_strides(clip, data, b.frames) for b in large):
            least = min(b.frames for b in large)
            unfit[clip.source] = f"{clip.frames} frames are too few for a batch of {least}"
    return unfit


@dataclass(slots=True)
class Inputs:
    """What a run is trained and measured on: paths of folders, lists and tar files of videos.

    Without `validation`, every twentieth file of `data` by the hash of its name is left out of
    training for it.
    """

    data: Sequence[str | Path]
    validation: Sequence[str | Path] = ()
    skipped: Skipped = field(default_factory=Skipped)
    clips: list[Clip] = field(default_factory=list)
    held: list[Source] = field(default_factory=list)

    def fingerprint(self) -> str:
        """A hash of the clips to train on: names, sizes and lengths, in their order."""
        facts = [(c.source.name, c.height, c.width, c.frames) for c in self.clips]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def look(self, recipe: Recipe, progress: Callable[[int, int], None] = lambda *_: None) -> None:
        """Find the files, and see which of them can be trained on.

        Raises `ValueError` where there are none.
        """
        found = find_sources(self.data, recipe.data.exclude, self.skipped)
        if self.validation:
            self.held = find_sources(self.validation, (), self.skipped, "measure")
            found = [source for source in found if source not in self.held]
        else:
            found, self.held = hold_out(found)
        readable = probe_all(found, self.skipped, progress)
        self.held = [clip.source for clip in probe_all(self.held, self.skipped, progress)]
        unfit = [unfit_clips(readable, stage.data) for stage in recipe.stages()]
        self.clips = []
        for clip in readable:
            if all(clip.source in reasons for reasons in unfit):
                self.skipped.add(clip.source, unfit[0][clip.source])
            else:
                self.clips.append(clip)
        if any(len(reasons) == len(readable) for reasons in unfit):
            for source, reason in (item for reasons in unfit for item in reasons.items()):
                self.skipped.add(source, reason)
            some = "; ".join(f"{n}: {r}" for n, r in list(self.skipped.reasons.items())[:3])
            raise ValueError(f"none of {len(found)} videos can be trained on in some stage: {some}")
