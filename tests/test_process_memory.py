"""What a process takes stays within its plan: real processes, real pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import awake
from test_video import smooth, write

from temporal_vae.convert import memory

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""Tells torch to leave wider instructions alone."""

PEAK = """
import ctypes, mmap, threading, time, torch
from temporal_vae import TemporalVAE
model = TemporalVAE(base_channels=64).eval()
x = torch.randn({shape})
def anonymous_bytes():
    _, resident, shared, *_ = open("/proc/self/statm").read().split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE
plan = model.plan(x.shape, "{operation}", budget={budget})
assert plan.walk == "bounded"
ctypes.CDLL(None).malloc_trim(0)
base, most, done = anonymous_bytes(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous_bytes() - base)
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
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc on Linux")
@pytest.mark.parametrize(
    ("operation", "shape", "budget"),
    [
        ("encode", (1, 3, 9, 320, 576), "700 * 2**20"),
        ("encode", (1, 3, 9, 320, 576), "'least'"),
        ("decode", (1, 4, 9, 40, 72), "800 * 2**20"),
        ("decode", (1, 4, 9, 40, 72), "model.plan(x.shape).peak_bytes // 2"),
        ("decode", (1, 4, 9, 40, 72), "'least'"),
    ],
)
def test_a_process_stays_within_its_plan(
    operation: str, shape: tuple[int, ...], budget: str
) -> None:
    code = PEAK.format(operation=operation, shape=shape, budget=budget)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    planned, measured = map(int, said.stdout.split())
    assert measured <= planned <= 1.25 * measured  # gaps in the heap, or none


OVER = """
import atexit, re, sys
from temporal_vae.cli.main import main
from temporal_vae.convert import memory
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
honest, before = memory.reserve, []
def reserve(size, device):
    before.append(status("VmRSS"))
    honest(size, device)
memory.reserve = reserve
atexit.register(lambda: print(before[0], status("VmHWM")))
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc on Linux")
@pytest.mark.parametrize("kernels", [{}, AVX2], ids=["own", "avx2"])
def test_the_command_stays_within_its_budget(kernels: dict[str, str], tmp_path: Path) -> None:
    """Over what the process has before the walk, and flat in the length, on every processor."""
    peaks = []
    for frames in (50, 200):
        source = write(tmp_path / f"{frames}.mkv", smooth(frames, 96, 128))
        words = ["reconstruct", source, tmp_path / "out.mkv", "--memory", "300MiB", "--overwrite",
                 "--quiet"]  # fmt: skip
        said = subprocess.run(
            [sys.executable, "-c", OVER, *map(str, words)],
            capture_output=True, text=True, check=True, env=os.environ | kernels,
        )  # fmt: skip
        before, most = map(int, said.stdout.split())
        assert most - before <= 300 * 2**20
        peaks.append(most)
    assert peaks[1] <= 1.03 * peaks[0]


def test_further_clips_are_within_what_the_first_one_took() -> None:
    """Others may have taken what was free then, of the budget too."""
    model = awake(torch.float32, base_channels=8)
    planner = memory.PiecePlanner(model, ("encode", "decode"), (32, 32), 2**30, 4)
    first = planner.pieces(4)
    assert first.reserved <= first.total < 2**28 and planner.limit == first.total
    assert planner.pieces(3).total <= first.total
