"""`make demo`'s script, on a smaller part of its film."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.fixture
def demo() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_draws_what_time_and_exactness_buy(
    demo: ModuleType, real_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(demo, "FRAMES", 8)
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path)])
    demo.main()
    said = capsys.readouterr().out
    share = re.search(r"temporal-vae in (0\.\d+) of the memory: largest difference: (\d+)", said)
    assert share is not None
    assert float(share[1]) <= 0.2
    assert int(share[2]) <= 1
    for other in ("cut into clips", "tiles of"):
        found = re.search(rf"{other}.*largest difference: (\d+)", said)
        assert found is not None
        assert int(found[1]) > 5, "what others do is another picture"
    flicker = {name: float(re.search(rf"{name} .* dB +([\d.]+)", said)[1])  # type: ignore[index]
               for name in ("temporal decoder", "frame by frame")}  # fmt: skip
    assert flicker["temporal decoder"] < 0.9 * flicker["frame by frame"]
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 700
        assert picture.height > 1000
    assert (tmp_path / "reconstruction.mp4").stat().st_size > 0


def test_a_file_that_is_no_video_is_one_line(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no.mp4").write_text("no video")
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path), "--clip",
                                      str(tmp_path / "no.mp4")])  # fmt: skip
    with pytest.raises(SystemExit, match="demo: "):
        demo.main()
