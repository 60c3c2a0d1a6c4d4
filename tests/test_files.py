"""Files written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from temporal_vae.files.atomic import atomic_path


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
