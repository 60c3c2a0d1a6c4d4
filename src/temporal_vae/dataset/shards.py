"""Clips as the shards of webdataset: tar files whose bytes depend on the clips alone."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from temporal_vae.dataset.manifest import ROOM, State
from temporal_vae.files.atomic import atomic_path
from temporal_vae.latents import SUFFIX


def pack_shards(state: State, folder: Path, each: int, before: int | None, last: bool) -> None:
    """Move clips into shards of `each`, in the order of their videos, of those `before` a number.

    So it does not matter in which order they were done. With `last` the rest makes a smaller one.
    """
    while True:
        clips = state.unpacked(before, each)
        if not clips or (len(clips) < each and not last):
            return
        name = state.next_shard()
        offsets: dict[str, int] = {}
        files = [folder / ROOM / "clips" / f"{clip}{SUFFIX}" for clip, _ in clips]
        with atomic_path(folder / name) as path, tarfile.open(path, "w") as tar:
            for (clip, row), file in zip(clips, files, strict=True):
                told = {column: value for column, value in row.items() if column != "seconds"}
                key = key_of(clip)
                with file.open("rb") as latents:
                    offsets[clip] = _add(tar, f"{key}{SUFFIX}", latents)
                _add(tar, f"{key}.json", io.BytesIO(json.dumps(told, sort_keys=True).encode()))
        state.pack(name, offsets)
        for file in files:  # also where a run was killed between these two lines: see `State`
            file.unlink(missing_ok=True)


def key_of(name: str) -> str:
    """What webdataset has in common of the files of a clip: what stands before the first dot."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.replace('.', '%2E')}"


def _add(tar: tarfile.TarFile, name: str, file: BinaryIO) -> int:
    """Add a file; gives where its bytes begin. Nothing of it tells when and by whom it was made."""
    member = tarfile.TarInfo(name)
    member.size = file.seek(0, os.SEEK_END)
    file.seek(0)
    tar.addfile(member, file)
    return tar.offset - -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
