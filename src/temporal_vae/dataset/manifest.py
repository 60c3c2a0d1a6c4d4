"""What is known of each clip of a data set: kept safely while it is made, then as one table.

While latents are made, `State` keeps a row for each clip in a database of SQLite beside them, which
a process that is killed at any moment leaves whole. From it `manifest.parquet` is written.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temporal_vae.dataset.entries import MANIFEST, Entry
from temporal_vae.files.atomic import atomic_path
from temporal_vae.latents import SUFFIX

if TYPE_CHECKING:
    import pyarrow

ROOM = ".tvae"
"""The folder in a data set that is not for its readers."""
BATCH = 10_000
"""Rows of the table that are in memory at a time."""
COLUMNS = {
    "name": "string", "source": "string", "source_sha256": "string", "caption": "string",
    "start": "float64", "first": "int64", "frames": "int64", "fps": "float64",
    "height": "int32", "width": "int32", "bucket": "string",
    "channels": "int32", "latent_frames": "int64", "rows": "int32", "columns": "int32",
    "kind": "string", "dtype": "string", "scaled": "bool",
    "model": "string", "encoder_sha256": "string", "options": "string",
    "status": "string", "error": "string", "notes": "string",
    "bytes": "int64", "shard": "string", "offset": "int64", "seconds": "float64",
}  # fmt: skip
"""Of `manifest.parquet`, by their types in Arrow; docs/datasets.md says what they are."""

_TABLES = """
create table if not exists run (settings text);
create table if not exists sources (
    name text primary key, stamp text, number integer, done integer default 0);
create table if not exists clips (
    name text primary key, source text, number integer, first integer, status text, bytes integer,
    shard text, offset integer, row text);
create index if not exists clips_by_source on clips (source);
create index if not exists clips_in_order on clips (number, first);
"""


@contextmanager
def _clear_errors() -> Iterator[None]:
    """A full disk and the like as an `OSError`."""
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(f"cannot keep the state of the data set: {error}") from error


class State:
    """What was done of a data set in `folder`; each change is whole, or not made.

    Raises `OSError` where it cannot be kept, and `ValueError` where other `settings` made it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self._folder = folder
        with _clear_errors():
            file = folder / ROOM / "clips.sqlite"
            self._base = sqlite3.connect(file, isolation_level=None)
            self._base.execute("pragma journal_mode = wal")
            self._base.execute("pragma synchronous = normal")  # no wait for the disk at each row
            self._base.executescript(_TABLES)
            self._check(json.loads(json.dumps(settings)))

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """All changes inside are made, or none, whatever ends the process."""
        with _clear_errors(), self._base:
            self._base.execute("begin immediate")
            yield

    def close(self) -> None:
        """Let go of the database."""
        with suppress(sqlite3.Error):
            self._base.close()

    def _check(self, settings: Mapping[str, Any]) -> None:
        found = self._base.execute("select settings from run").fetchone()
        if found is None:
            self._base.execute("insert into run values (?)", (json.dumps(settings),))
            return
        before = json.loads(found[0])
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                self.close()
                raise ValueError(
                    f"{self._folder} was begun with {name} {before.get(name)}, now it is "
                    f"{settings.get(name)}: go on as it was begun, or take another folder"
                )

    def begin(self, entry: Entry) -> set[str] | None:
        """The names of its clips that are there; None where nothing is left to do.

        A video whose file is another one by now begins anew; another caption goes into its rows.
        """
        stamp = entry.stamp()
        with self._whole():
            found = self._base.execute(
                "select stamp, done, number from sources where name = ?", (entry.name,)
            ).fetchone()
            if found is not None and (found[0] == stamp or self._captioned(entry, found[0])):
                return self._there(entry, *found[1:])
            self._forget(entry.name)
            self._base.execute(
                "insert into sources (name, stamp, number) values (?, ?, ?)",
                (entry.name, stamp, entry.number),
            )
        return set()

    def _captioned(self, entry: Entry, before: str) -> bool:
        """Whether only the caption is another one, and its rows could be given that.

        They cannot if a clip is in a shard, where the caption lies beside the latents.
        """
        if not before.startswith(f"{entry.file_stamp()} "):
            return False
        packed = "select 1 from clips where source = ? and shard is not null"
        if self._base.execute(packed, (entry.name,)).fetchone():
            return False
        self._base.execute(
            "update clips set row = json_set(row, '$.caption', ?) where source = ?",
            (entry.caption, entry.name),
        )
        self._base.execute(
            "update sources set stamp = ? where name = ?", (entry.stamp(), entry.name)
        )
        return True

    def _there(self, entry: Entry, done: int, number: int) -> set[str] | None:
        """Clips whose files are as they were written; what lacks its file is to be done again."""
        there, lost = set(), []
        for name, status, size, shard, offset in self._base.execute(
            "select name, status, bytes, shard, offset from clips where source = ?", (entry.name,)
        ):
            is_there = status != "ok" or self._is_there(name, size, shard, offset)
            there.add(name) if is_there else lost.append((name,))
        if number != entry.number:
            for table, column in (("sources", "name"), ("clips", "source")):
                self._base.execute(
                    f"update {table} set number = ? where {column} = ?", (entry.number, entry.name)
                )
        if lost:
            self._base.executemany("delete from clips where name = ?", lost)
            self._base.execute("update sources set done = 0 where name = ?", (entry.name,))
        return None if done and not lost else there

    def _is_there(self, name: str, size: int, shard: str | None, offset: int | None) -> bool:
        if shard is not None:
            with suppress(OSError):
                return os.stat(self._folder / shard).st_size >= (offset or 0) + size
            return False
        for folder in (self._folder, self._folder / ROOM / "clips"):
            with suppress(OSError):
                return os.stat(folder / f"{name}{SUFFIX}").st_size == size
        return False

    def _forget(self, source: str) -> None:
        """Remove what was made of a video."""
        for name, shard in self._base.execute(
            "select name, shard from clips where source = ?", (source,)
        ):
            if shard is None:
                (self._folder / f"{name}{SUFFIX}").unlink(missing_ok=True)
        self._base.execute("delete from clips where source = ?", (source,))
        self._base.execute("delete from sources where name = ?", (source,))

    def forget_failed(self) -> None:
        """Begin anew what failed; clips of the same videos that are there stay."""
        with self._whole():
            self._base.execute(
                "update sources set done = 0 where name in "
                "(select source from clips where status = 'failed')"
            )
            self._base.execute("delete from clips where status = 'failed'")

    def add(self, entry: Entry, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        with _clear_errors():
            self._base.execute(
                "insert or replace into clips values (?, ?, ?, ?, ?, ?, null, null, ?)",
                (row["name"], entry.name, entry.number, row["first"], row["status"],
                 row.get("bytes"), json.dumps(row, sort_keys=True)),
            )  # fmt: skip

    def finish(self, entry: Entry) -> None:
        """Nothing is left to do of a video."""
        with _clear_errors():
            self._base.execute("update sources set done = 1 where name = ?", (entry.name,))

    def counts(self) -> dict[str, int]:
        """Clips by their status."""
        with _clear_errors():
            return dict(self._base.execute("select status, count(*) from clips group by status"))

    def unpacked(self, before: int | None, most: int) -> list[tuple[str, dict[str, Any]]]:
        """The first clips, in order, that are in no shard; of videos `before` a number, or all."""
        with _clear_errors():
            found = self._base.execute(
                "select name, row from clips where shard is null and status = 'ok' and number < ? "
                "order by number, first limit ?", (2**62 if before is None else before, most)
            ).fetchall()  # fmt: skip
        return [(name, json.loads(row)) for name, row in found]

    def next_shard(self) -> str:
        """A name behind those of all shards that clips lie in."""
        with _clear_errors():
            (last,) = self._base.execute("select max(shard) from clips").fetchone()
        number = 0 if last is None else int(re.findall(r"\d+", last)[-1]) + 1
        return f"shard-{number:06d}.tar"

    def pack(self, shard: str, offsets: Mapping[str, int]) -> None:
        """Say that clips lie in a shard, by their names from which byte on; all of them or none."""
        with self._whole():
            self._base.executemany(
                "update clips set shard = ?, offset = ? where name = ?",
                [(shard, offset, name) for name, offset in offsets.items()],
            )

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, in the order of the videos and of their clips."""
        with _clear_errors():
            for row, shard, offset in self._base.execute(
                "select row, shard, offset from clips order by number, first, name"
            ):
                yield json.loads(row) | {"shard": shard, "offset": offset}


def need(package: str, extra: str, what: str) -> None:
    """Raise `ValueError` where a package is missing that an extra of this library brings."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{what} needs the package {package}: pip install 'temporal-video-vae[{extra}]'"
        )


def write_manifest(state: State, folder: Path) -> None:
    """Write the table, some rows at a time; it appears whole or not at all."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(n, pyarrow.type_for_alias(kind)) for n, kind in COLUMNS.items()])
    with atomic_path(folder / MANIFEST) as path, parquet.ParquetWriter(path, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in state.rows():
            batch.append(row)
            if len(batch) == BATCH:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pyarrow.Table.from_pylist(batch, schema))


def read_manifest(folder: Path, columns: list[str]) -> pyarrow.Table:
    """Some columns of the clips that are there. Raises `ValueError` where there is no table."""
    need("pyarrow", "dataset", "a data set of latents")
    from pyarrow import compute, parquet

    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: tvae encode-dataset SRC {folder} writes it")
    table = parquet.read_table(file, columns=[*columns, "status"])
    return table.filter(compute.equal(table["status"], "ok"))
