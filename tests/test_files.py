"""Files written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from temporal_vae.files import atomic
from temporal_vae.files.atomic import atomic_folder, atomic_path, clear_partials


def test_the_new_file_takes_the_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    target.write_text("old")
    with atomic_path(target) as partial:
        assert partial.parent == tmp_path and partial.suffix == ".mp4" and partial.name[0] == "."
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as partial:
        partial.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="folder"), atomic_path(tmp_path):
        pass
    with (
        pytest.raises(FileNotFoundError, match="is not a folder"),
        atomic_path(tmp_path / "b" / "c"),
    ):
        pass


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    link = tmp_path / "link.mp4"
    link.symlink_to(tmp_path / "real.txt")
    with atomic_path(link) as partial:
        assert partial.suffix == ".mp4"
        partial.write_text("new")
    assert link.is_symlink() and (tmp_path / "real.txt").read_text() == "new"


# What a killed process leaves ----------------------------------------------------------------

KINDS = pytest.mark.parametrize(
    ("make", "name"), [(atomic_path, "a.b.mkv"), (atomic_folder, "frames")], ids=["file", "folder"]
)


def left_by_a_killed_process(target: Path, make: Callable[..., Any]) -> Path:
    """The name that a process was writing under when it was killed."""
    code = (
        f"import os, signal\nfrom temporal_vae.files.atomic import {make.__name__} as make\n"
        f"with make({str(target)!r}) as part:\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code])
    (left,) = set(target.parent.iterdir()) - {target}
    return left


@KINDS
def test_what_a_killed_process_left_is_removed(
    tmp_path: Path, make: Callable[..., Any], name: str
) -> None:
    target = tmp_path / name
    left = left_by_a_killed_process(target, make)
    other = tmp_path / left.name.replace(atomic._stem(target), "other", 1)
    foreign = tmp_path / f".{target.stem}.part{target.suffix}"
    other.touch()
    foreign.touch()
    with make(target) as living:
        clear_partials([target])
        assert living.exists(), "a living process lost its file"
        assert set(tmp_path.iterdir()) == {living, other, foreign}
    clear_partials([tmp_path / "nothing" / "b.mkv", target])
    assert set(tmp_path.iterdir()) == {target, other, foreign}


def test_a_file_that_is_taken_for_dead_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its lock another process may come by, and removes it."""
    honest, seen = atomic._lock, []

    def late(part: Path) -> int | None:
        seen.append(part)
        if len(seen) < 3:
            clear_partials([tmp_path / "a.mkv"])
        return honest(part)

    monkeypatch.setattr(atomic, "_lock", late)
    with atomic_path(tmp_path / "a.mkv") as part:
        assert part.exists() and len(seen) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_two_writers_of_one_file_keep_the_first(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with (
        pytest.raises(FileExistsError, match="made by another process meanwhile, and is kept"),
        atomic_path(target, replace=False) as second,
    ):
        with atomic_path(target, replace=False) as first:
            first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]
    with atomic_path(target) as third:
        third.write_text("third")
    assert target.read_text() == "third"


@pytest.mark.parametrize("there", [False, True])
def test_a_drive_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    target = tmp_path / "a.txt"
    failing = pytest.raises(FileExistsError) if there else nullcontext()
    with failing, atomic_path(target, replace=False) as part:
        part.write_text("new")
        if there:
            target.write_text("old")
    assert target.read_text() == ("old" if there else "new")
    assert list(tmp_path.iterdir()) == [target]


def test_many_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    """Each clears what is dead before it writes, as the command does."""
    target, made = tmp_path / "a.txt", []

    def write(number: int) -> None:
        clear_partials([target])
        with suppress(FileExistsError), atomic_path(target, replace=False) as part:
            part.write_text(f"{number}" * 9)
            made.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made and target.read_text() in [f"{n}" * 9 for n in made]
    assert list(tmp_path.iterdir()) == [target]
