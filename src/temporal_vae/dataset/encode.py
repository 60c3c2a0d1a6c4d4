"""A data set of videos to a data set of latents, which goes on where it was stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from temporal_vae.convert import origin as origins
from temporal_vae.convert.encode import Encoding, encode, origin
from temporal_vae.convert.ends import OpenVideo, reader_options
from temporal_vae.dataset import local
from temporal_vae.dataset.buckets import Bucket
from temporal_vae.dataset.clips import Clip, Cut, Cutting, Passed
from temporal_vae.dataset.entries import Entry, entries_of
from temporal_vae.dataset.local import Event, Events, Job, Row
from temporal_vae.dataset.manifest import ROOM, State, need, write_manifest
from temporal_vae.dataset.ray import Cluster
from temporal_vae.dataset.shards import pack_shards
from temporal_vae.files.atomic import clear_partials_below, held
from temporal_vae.latents import SUFFIX, LatentFileError, LatentInfo, ModelRecord
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Options, VideoError, VideoReader
from temporal_vae.walks.budget import BudgetError

Layout = Literal["files", "webdataset"]
Engine = Literal["local", "ray"]
Progress = Callable[[int], None]
"""Called with the number of clips that were done or failed in this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetOptions:
    """How a data set of latents is made."""

    frames: Options = field(default_factory=lambda: Options())
    """Which frames of each video, and which part of them."""
    buckets: tuple[Bucket, ...] = ()
    cut: Cut = None
    layout: Layout = "files"
    shard_clips: int = 1000
    """Clips in a shard of webdataset."""
    engine: Engine = "local"
    workers: int = 2
    """Processes that decode; with Ray for each process that encodes."""
    encoders: int = 1
    """Processes that encode, with Ray."""
    address: str | None = None
    """Of Ray's cluster; None for one on this machine."""
    retry_failed: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "encoders", "shard_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name, value, known in (("layout", self.layout, ("files", "webdataset")),
                                   ("engine", self.engine, ("local", "ray"))):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Encoder:
    """Makes files of latents below a folder, and rows of the manifest."""

    model: TemporalVAE
    record: ModelRecord
    how: Encoding
    folder: Path

    def clip(self, clip: Clip) -> Row:
        """Encode a clip. Raises `OSError` where its latents cannot be written."""
        target = self.folder / f"{clip.name}{SUFFIX}"
        target.parent.mkdir(parents=True, exist_ok=True)
        # the encoder needs no more of a reader than a clip has
        opened = OpenVideo(cast(VideoReader, clip), clip.sha256)
        begun = time.monotonic()
        try:
            done = encode(
                clip.info.path, target, self.model, self.record, self._seeded(clip.name),
                options=clip.options, overwrite=True, opening=lambda: opened,
            )  # fmt: skip
        except (VideoError, LatentFileError, BudgetError) as error:
            if isinstance(error.__cause__, OSError) and isinstance(error, LatentFileError):
                raise OSError(str(error)) from error  # nothing is wrong with the video
            return self._row(clip.entry, clip.name, clip.first, "failed", str(error))
        row = self._row(clip.entry, clip.name, clip.first, "ok")
        start = Fraction(clip.options.get("start", 0))
        return row | described(done.info) | {
            "start": float(start), "bucket": clip.bucket, "bytes": done.bytes,
            "notes": "; ".join(done.notes) or None, "seconds": time.monotonic() - begun,
        }  # fmt: skip

    def left(self, what: Entry | Passed, reason: str) -> Row:
        """Say that a video is broken, or that a part of it is left out."""
        if isinstance(what, Passed):
            return self._row(what.entry, what.name, what.first, "skipped", what.reason)
        return self._row(what, what.name, 0, "failed", reason)

    def _row(
        self, entry: Entry, name: str, first: int, status: str, error: str | None = None
    ) -> Row:
        return {"name": name, "source": plain(str(entry.source)), "caption": entry.caption,
                "first": first, "status": status, "error": error and plain(error)}  # fmt: skip

    def _seeded(self, name: str) -> Encoding:
        """With a seed of this clip's own, the same in every run."""
        if not self.how.sample:
            return self.how
        digest = hashlib.sha256(f"{self.how.seed or 0} {name}".encode()).digest()
        return replace(self.how, seed=int.from_bytes(digest[:8], "big") >> 1)


def plain(text: str) -> str:
    """Text that UTF-8 can hold, of a name that it cannot."""
    return os.fsencode(text).decode(errors="replace")


def described(info: LatentInfo) -> Row:
    """What the manifest has of the header of a file of latents."""
    names = ("source_sha256", "frames", "height", "width", "channels", "latent_frames", "rows",
             "columns", "kind", "scaled", "model", "encoder_sha256", "options")  # fmt: skip
    dtype = str(info.dtype).removeprefix("torch.")
    return {name: getattr(info, name) for name in names} | {"fps": float(info.fps), "dtype": dtype}


def encode_dataset(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: TemporalVAE,
    record: ModelRecord,
    how: Encoding | None = None,
    options: DatasetOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Encode a folder, a tar file or a manifest of videos to latents in `out`; see `entries_of`.

    Gives the number of clips by status: "ok", "failed" (a broken video) and "skipped" (no bucket
    takes it). What a run that was stopped in whatever way has done is kept, and the next one does
    the rest; all together give the same files as one run. `out/manifest.parquet` has a row a clip.

    Raises `ValueError` for options that cannot be, and for an `out` that was begun with other ones,
    `OSError` where nothing can be written.
    """
    how, options = how or Encoding(), options or DatasetOptions()
    need("pyarrow", "dataset", "a data set of latents")
    if options.cut == "scenes":
        need("scenedetect", "scenes", "cutting by scenes")
    if options.engine == "ray":
        need("ray", "ray", "the engine ray")
    cutting = Cutting(options=options.frames, reading=reader_options(model, options.frames),
                      cut=options.cut, buckets=options.buckets)  # fmt: skip
    place, folder = Path(source), Path(out)
    entries = iter(entries_of(place))
    (folder / ROOM).mkdir(parents=True, exist_ok=True)
    clips = folder / ROOM / "clips" if options.layout == "webdataset" else folder
    encoder = Encoder(model, record, how, clips)
    settings = _settings(place, encoder, cutting, options)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder / ROOM / "lock"))
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {folder}: wait for it") from error
        state = stack.enter_context(closing(State(folder, settings)))
        clear_partials_below(folder)
        if options.retry_failed:
            state.forget_failed()
        run = _Run(state, folder, options)
        try:
            with closing(_events(run.jobs(entries), cutting, encoder, options)) as events:
                run.follow(events, progress)
        except BaseException:  # also a signal: the table says what there is
            with suppress(OSError):
                write_manifest(state, folder)
            raise
        write_manifest(state, folder)
        return state.counts()


@dataclass(slots=True)
class _Run:
    """One run of many, and the videos that are on their way in it."""

    state: State
    folder: Path
    options: DatasetOptions
    open: set[int] = field(default_factory=set)
    next: int = 0

    def jobs(self, entries: Iterable[Entry]) -> Iterator[Job]:
        """Videos of which something is left to do."""
        for entry in entries:
            self.next = entry.number
            there = self.state.begin(entry)
            if there is not None:
                self.open.add(entry.number)
                yield entry, there

    def follow(self, events: Iterator[Event], progress: Progress | None) -> None:
        """Keep what is done."""
        clips = unpacked = 0
        for entry, row in events:
            if row is None:
                self.state.finish(entry)
                self.open.discard(entry.number)
            else:
                self.state.add(entry, row)
                clips, unpacked = clips + 1, unpacked + 1
            if unpacked >= self.options.shard_clips:
                unpacked = 0
                self._pack(min(self.open, default=self.next), last=False)
            if progress is not None:
                progress(clips)
        self._pack(None, last=True)
        shutil.rmtree(self.folder / ROOM / "clips", ignore_errors=True)

    def _pack(self, before: int | None, last: bool) -> None:
        if self.options.layout == "webdataset":
            pack_shards(self.state, self.folder, self.options.shard_clips, before, last)


def pipeline(cutting: Cutting, encoder: Encoder, workers: int) -> local.Pipeline:
    """The engine of this machine. Where memory is bounded, one clip is encoded at a time."""
    encoders = 2 if encoder.how.memory is None else 1
    return local.Pipeline(cutting, workers, encoders, encoder.clip, encoder.left)


def _events(
    jobs: Iterator[Job], cutting: Cutting, encoder: Encoder, options: DatasetOptions
) -> Events:
    """What comes of jobs."""
    make = partial(pipeline, cutting, encoder, options.workers)
    if options.engine == "local":
        return make().run(jobs)
    cluster = Cluster(
        address=options.address, processes=options.encoders, ahead=2 * options.workers,
        gpu=encoder.model.device.type == "cuda", memory=encoder.how.memory,
    )  # fmt: skip
    return cluster.run(jobs, make)


def _settings(
    place: Path, encoder: Encoder, cutting: Cutting, options: DatasetOptions
) -> dict[str, Any]:
    """What decides the files of a data set: runs that go on must have the same."""
    made = origin(encoder.model, encoder.record, encoder.how)
    frames = origins.options_as_typed(**cutting.options)
    return {
        "source": os.fspath(place.resolve()), **made.model, **made.options, **frames,
        "buckets": ",".join(map(str, cutting.buckets)), "cut": cutting.cut,
        "layout": options.layout,
        "shard-clips": options.shard_clips if options.layout == "webdataset" else None,
    }  # fmt: skip
