"""What the allocator keeps of freed memory stays within a plan: real processes, real pages."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import awake
from test_video import smooth, write

from temporal_vae.convert import memory
from temporal_vae.network.framewise import Framewise
from temporal_vae.walks import bounded, heap, stages, streamed
from temporal_vae.walks.stages import Bounds

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or heap.anonymous_bytes() is None, reason="not glibc on Linux"
)

MiB = 2**20

GAPS = """
import sys, torch
from temporal_vae.walks import heap
if sys.argv[1] == "kept":
    heap.keep_freed()
torch.ones(8 * 2**18)  # once freed, blocks of this size are no longer mapped on their own
for case in sys.argv[2:]:
    most, largest = map(int, case.split(","))
    watch = heap.Heap(most or None, torch.device("cpu"))
    blocks = [torch.ones(2**18) for _ in range(200)]
    blocks = blocks[1::2]
    before = heap.anonymous_bytes()
    watch.before(largest)
    print(before - heap.anonymous_bytes())
    del blocks
    heap._glibc().malloc_trim(0)
"""
CASES = {
    "near the limit": (200 * MiB + heap.NEAR // 2, 0),
    "near a small limit": (100 * MiB, 0),
    "before what cannot lie in them": (350 * MiB + heap.NEAR, 60 * MiB),
    "not before what can": (350 * MiB + heap.NEAR, heap.MAPPED_BYTES),
    "not far from the limit": (2**30, 0),
    "not without a limit": (0, 60 * MiB),
}


def given_back(process: str) -> dict[str, int]:
    """Bytes that a process with 100 MiB of gaps gives back, by case."""
    cases = [f"{most},{largest}" for most, largest in CASES.values()]
    said = subprocess.run(
        [sys.executable, "-c", GAPS, process, *cases], capture_output=True, text=True, check=True
    )
    return dict(zip(CASES, map(int, said.stdout.split()), strict=True))


def test_gaps_are_given_back_where_they_would_break_the_plan() -> None:
    for case, size in given_back("ours").items():
        assert size < 10 * MiB if case.startswith("not") else size > 80 * MiB, case


def test_a_process_that_keeps_what_is_freed_gives_nothing_back() -> None:
    assert max(given_back("kept").values()) < 10 * MiB


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often gaps were asked for, in vain."""
    asked: list[int] = []

    class Watched:
        def malloc_trim(self, pad: int) -> int:
            asked.append(pad)
            return 0

    monkeypatch.setattr(heap, "_glibc", Watched)
    return asked


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the process has, not truly: what other tests leave goes at any time."""
    sizes = [100 * MiB]
    monkeypatch.setattr(heap, "anonymous_bytes", lambda: sum(sizes))
    return sizes


@pytest.mark.parametrize("largest", [0, 2 * heap.MAPPED_BYTES])
def test_what_others_take_is_not_fought_for(
    trims: list[int], taken: list[int], largest: int
) -> None:
    """Memory that is in use above the limit is asked for once, not before each layer."""
    watch = heap.Heap(1, torch.device("cpu"))
    for times in (1, 2):
        taken.append(200 * MiB)
        for _ in range(5):
            watch.before(largest)
        assert len(trims) == times


def test_a_small_walk_begins_far_from_its_limit(trims: list[int], taken: list[int]) -> None:
    watch = heap.Heap(8 * MiB, torch.device("cpu"))
    watch.before()
    assert not trims
    taken.append(7 * MiB)
    watch.before()
    assert trims


@torch.no_grad()
def test_every_layer_of_a_bounded_walk_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(heap.Heap, "before", lambda self, largest=0: looks.append(largest))
    model = awake(causal_mode=True)
    latent = torch.randn(1, 4, 3, 4, 6).double()
    layers = list(model.decoder.layers())
    framewise = [layer for layer in layers if isinstance(layer, Framewise)]
    frame = max(map(math.prod, stages.shapes_in(framewise, (1, 4, 1, 4, 6)))) * 8

    def looked(walk: Callable[[Bounds], object], bounds: Bounds) -> list[int]:
        looks.clear()
        walk(bounds)
        return list(looks)

    def walk(bounds: Bounds) -> object:
        return bounded.walk(model.decoder, latent, bounds)

    def step(bounds: Bounds) -> object:
        return streamed.step(model.decoder, latent, None, bounds)

    together = looked(walk, Bounds(frames=3))
    assert len(together) == len(layers) and max(together) == 3 * frame
    singly = looked(walk, Bounds())
    timewise = len(layers) - len(framewise)
    assert len(singly) == 3 * len(framewise) + timewise and max(singly) == frame
    bands = looked(walk, Bounds(rows=1000))
    attentions = sum(layer.halo is None for layer in framewise)
    assert attentions and bands.count(0) == timewise + 3 * attentions and max(bands) == frame
    assert 0 < max(looked(walk, Bounds(rows=2))) < frame
    assert looked(step, Bounds(frames=3)) == together


PEAK = """
import ctypes, threading, time, torch
from temporal_vae import TemporalVAE
from temporal_vae.walks import heap
model = TemporalVAE(base_channels=64).eval()
x = torch.randn({shape})
plan = model.plan(x.shape, "{operation}", budget={budget})
assert plan.walk == "bounded"
ctypes.CDLL(None).malloc_trim(0)
base, most, done = heap.anonymous_bytes(), 0, False
def watch():
    global most
    while not done:
        most = max(most, heap.anonymous_bytes() - base)
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
with torch.no_grad():
    model.{operation}(x, plan=plan)
done = True
thread.join()
print(plan.peak_bytes, most)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "shape", "budget"),
    [
        ("encode", (1, 3, 9, 320, 576), "700 * 2**20"),
        ("encode", (1, 3, 9, 320, 576), "'least'"),
        ("decode", (1, 4, 9, 40, 72), "800 * 2**20"),
        ("decode", (1, 4, 9, 40, 72), "'least'"),
    ],
)
def test_a_process_stays_within_its_plan(
    operation: str, shape: tuple[int, ...], budget: str
) -> None:
    code = PEAK.format(operation=operation, shape=shape, budget=budget)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    planned, measured = map(int, said.stdout.split())
    assert measured <= planned <= 1.15 * measured


FILES = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from temporal_vae.walks import available, heap
heap.keep_freed()  # as the command does
from temporal_vae import TemporalVAE, app, model, walking
folder = Path(sys.argv[1])
options = dict(
    temporal_norm="clip", clip_frames=4, temporal_encoder=False, temporal_attention_reach=0
)
vae = TemporalVAE(base_channels=32, channel_multipliers=(1, 2), **options)
vae.plan((1, 4, 4, 8, 8), budget="least")
machine = heap.anonymous_bytes() + 220 * 2**20
def free(device):
    return max(0, machine - heap.anonymous_bytes()) + heap.kept_bytes()
model.available_bytes = walking.available_bytes = free
for number, memory in enumerate(("200MiB", "auto")):
    print(app.reconstruct(folder / "in.mkv", folder / f"{number}.mkv", vae, memory=memory).frames)
kept = heap.kept_bytes()
x = torch.ones(30 * 2**18)
assert heap.kept_bytes() < kept - 25 * 2**20, "reused"
try:
    walking.reserve(300 * 2**20, torch.device("cpu"))
except ValueError as error:
    print(error)
del x
torch.empty(2**30, dtype=torch.uint8)  # let go without a byte of it written
assert heap.kept_bytes() < kept + 200 * 2**20, "not there"
print("sound")
"""


def test_what_a_process_keeps_is_free_to_it(tmp_path: Path) -> None:
    """The last, shorter clip and the next file were refused what the process held itself."""
    write(tmp_path / "in.mkv", smooth(6, 160, 160))
    said = subprocess.run(
        [sys.executable, "-c", FILES, str(tmp_path)], capture_output=True, text=True
    )
    assert said.stdout.split("\n")[:2] == ["6"] * 2, said.stderr
    assert "the walk needs 314572800 bytes" in said.stdout and "are free" in said.stdout
    assert said.stdout.endswith("sound\n"), said.stderr
    assert heap.kept_bytes() == 0, "of a process that gives back what is freed"


def test_further_clips_are_within_what_the_first_one_took() -> None:
    """Others may have taken what was free then, of the budget too."""
    model = awake(torch.float32, base_channels=8)
    *_, needed = memory.clip_plans(model, (1, 3, 4, 32, 32), 2**33)
    assert needed.reserved <= needed.total < 2**28 and needed.settle(2**33) == needed.total
    assert needed.settle("least") == "least" and needed.settle(5) == 5
    *_, again = memory.clip_plans(model, (1, 3, 3, 32, 32), needed.total)
    assert again.total <= needed.total
