"""Time to save and load a record of SVD's full-size VAE, beside the least that must be done.

    python benchmarks/records.py

Files lie in memory (/dev/shm), so that no disk is measured. Every number is the first call in a
fresh process, which has a model with other weights than the file's; the rounds take turns and the
table has medians. The least is, to save, safetensors' own `save_file` of the same tensors; to load,
one `readinto` of the same bytes and a `copy_` of each tensor. Ours also takes and compares
checksums.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from temporal_vae import TemporalVAE, TemporalVAEConfig

ROUNDS = 9
BARS = {
    "save_state": "save_file",
    "save_model": "save_file",
    "load_state": "bare",
    "load_model": "bare",
}
STEPS = ["save_file", "save_state", "save_model", "bare", "load_state", "load_model"]
STEPS += ["from_file", "load_file"]


def bare(model: TemporalVAE, file: Path) -> None:
    """Read the bytes of the weights at once and copy them over, in the order of the file."""
    payload = torch.empty(4 * model.parameter_count, dtype=torch.uint8)
    with file.open("rb", buffering=0) as raw:
        raw.seek(file.stat().st_size - len(payload))
        view = payload.numpy().data
        while view:
            view = view[raw.readinto(view) :]
    at = 0
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            values = payload[at : at + 4 * parameter.numel()]
            parameter.copy_(values.view(torch.float32).view(parameter.shape))
            at += len(values)


def measure(name: str, folder: Path) -> float:
    """Seconds of one step, the first of its kind in this process."""
    model = TemporalVAE.from_config(TemporalVAEConfig.svd(), seed=1)
    stored, new = folder / "stored", folder / "new"

    def save_state() -> None:
        with new.open("wb") as file:
            model.save_state(file)

    def load_state() -> None:
        with stored.open("rb") as file:
            model.load_state(file)

    steps: dict[str, Callable[[], object]] = {
        "save_file": lambda: save_file(model.state_dict(), new),
        "save_state": save_state,
        "save_model": lambda: model.save_model(new),
        "bare": lambda: bare(model, stored),
        "load_state": load_state,
        "load_model": lambda: model.load_model(stored),
        "from_file": lambda: TemporalVAE.from_file(stored),
        "load_file": lambda: load_file(stored),
    }
    gc.collect()
    start = time.perf_counter()
    steps[name]()
    taken = time.perf_counter() - start
    if name in ("bare", "load_state", "load_model"):
        expected = load_file(stored)
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    return taken


def child(name: str, folder: str) -> float:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, name, folder]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (Path(folder) / "new").unlink(missing_ok=True)
    return float(output)


def main() -> None:
    """Print medians over the rounds, and ratios."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        TemporalVAE.from_config(TemporalVAEConfig.svd(), seed=0).save_model(f"{folder}/stored")
        size = Path(folder, "stored").stat().st_size
        for _ in range(ROUNDS):
            for name, found in times.items():
                found.append(child(name, folder))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, python "
        f"{sys.version.split()[0]}, a record of {size:,} bytes in "
        f"{memory or 'the folder for temporary files'}, {ROUNDS} rounds, median"
    )
    median = {name: statistics.median(found) for name, found in times.items()}
    for name, value in median.items():
        bar = BARS.get(name)
        against = f"   {value / median[bar]:5.2f} x {bar}" if bar else ""
        print(f"{name:12}{value * 1000:8.1f} ms{against}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], Path(sys.argv[2])))
    else:
        main()
