"""Numbers and pictures for TensorBoard, read back with its own reader."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from temporal_vae.training.tensorboard import Events


def read_back(folder: Path) -> Any:
    """What TensorBoard would show of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_back(folder).Scalars(name)]


def write(folder: Path, steps: range, factor: float, from_step: int = 0) -> None:
    events = Events(folder, from_step)
    for step in steps:
        events.add(step, {"loss": factor * step, "latent/kl": 0.5})
    events.close()


def test_numbers_are_read_back(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", range(1, 4), 1.5)
    assert scalars(tmp_path / "new" / "folder", "loss") == [(1, 1.5), (2, 3.0), (3, 4.5)]
    assert scalars(tmp_path / "new" / "folder", "latent/kl") == [(1, 0.5), (2, 0.5), (3, 0.5)]


@pytest.mark.parametrize("done", [0, 3])
def test_steps_that_come_again_are_shown_once(tmp_path: Path, done: int) -> None:
    """A run that got to step 5, and goes on from its last checkpoint, or without any."""
    write(tmp_path, range(1, 6), 1.0)
    first = next(tmp_path.iterdir())
    first.rename(first.with_name("events.out.tfevents.0000000001.before"))  # they go by name
    write(tmp_path, range(done + 1, 8), 10.0, done)
    expected = [(i, float(i)) for i in range(1, done + 1)]
    assert scalars(tmp_path, "loss") == expected + [(i, 10.0 * i) for i in range(done + 1, 8)]


def test_a_picture_is_read_back(tmp_path: Path) -> None:
    picture = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    events = Events(tmp_path)
    events.picture(7, "cat", picture[:, ::-1])
    events.close()
    (found,) = read_back(tmp_path).Images("cat")
    assert found.step == 7
    with Image.open(io.BytesIO(found.encoded_image_string)) as image:
        assert np.array_equal(np.asarray(image), picture[:, ::-1])


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), "u1")],
)
def test_other_pictures_are_refused(tmp_path: Path, image: Any) -> None:
    events = Events(tmp_path)
    with pytest.raises(ValueError, match=r"a picture is uint8 \(H, W, 3\), got"):
        events.picture(1, "x", image)
    events.close()


def test_without_tensorboard_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'temporal-video-vae\[train\]'"):
        Events(tmp_path / "none")
    assert not (tmp_path / "none").exists()
