"""Time and memory to load SVD's full-size VAE, beside diffusers.

    python benchmarks/loading.py

The checkpoint has random weights and is written by diffusers. Each measurement is a fresh process
after its imports and a garbage collection; the two libraries take turns. "load" is from_pretrained
for the first time, "again" the median of five more, "touched" has read every weight once: both
libraries leave weights mapped to the file, so the load alone shows little memory.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RUNS = 7
MIB = 2**20


def resident(what: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" at most since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Start `VmHWM` afresh."""
    Path("/proc/self/clear_refs").write_text("5")


def loader(library: str) -> Any:
    """The class that loads."""
    if library == "ours":
        from temporal_vae import TemporalVAE

        return TemporalVAE
    from diffusers import AutoencoderKLTemporalDecoder

    return AutoencoderKLTemporalDecoder


def measure(library: str, folder: str) -> dict[str, float]:
    """One fresh process' numbers: seconds, and MiB above what the imports took."""
    cls = loader(library)
    gc.collect()
    before = resident("VmRSS")
    reset_peak()
    start = time.perf_counter()
    model = cls.from_pretrained(folder)
    load, peak = time.perf_counter() - start, resident("VmHWM") - before
    for parameter in model.parameters():
        parameter.detach().sum()
    touched, touched_peak = time.perf_counter() - start, resident("VmHWM") - before
    again = []
    for _ in range(5):
        gc.collect()
        start = time.perf_counter()
        cls.from_pretrained(folder)
        again.append(time.perf_counter() - start)
    return {
        "load s": load,
        "load MiB": peak,
        "touched s": touched,
        "touched MiB": touched_peak,
        "again s": statistics.median(again),
    }


def write_checkpoint(folder: str) -> None:
    """SVD's VAE with random weights, float32."""
    torch.manual_seed(0)
    loader("diffusers")(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=2,
    ).save_pretrained(folder)


def child(library: str, folder: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, library, folder]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers: dict[str, float] = json.loads(output.splitlines()[-1])
    return numbers


def main() -> None:
    """Print medians over the runs, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "diffusers": []}
        for _ in range(RUNS):
            for library, found in runs.items():
                found.append(child(library, folder))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {RUNS} runs, median")
    print(f"{'':12}{'ours':>10}{'diffusers':>12}{'ratio':>8}")
    for name in runs["ours"][0]:
        ours, theirs = (statistics.median(run[name] for run in found) for found in runs.values())
        print(f"{name:12}{ours:10.3f}{theirs:12.3f}{ours / theirs:8.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
