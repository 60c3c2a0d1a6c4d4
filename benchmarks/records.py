"""Time to save and load a record of SVD's full-size VAE, beside the least that must be done.

    python benchmarks/records.py

Files lie in memory (/dev/shm), so that no disk is measured. Each round does everything once, in
turn, a new file each time; the table has medians. The least is, to save, safetensors' own
`save_file` of the same tensors; to load, one `readinto` of the same bytes and a `copy_` of each
tensor: into new memory, as a load does, or, "kept", into memory that was touched before the clock
starts, as no load can. Ours also takes and compares checksums.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from temporal_vae import TemporalVAE, TemporalVAEConfig

ROUNDS = 15
BARS = {
    "save_state": ["save_file"],
    "save_model": ["save_file"],
    "load_state": ["readinto, copy_", "the same, kept"],
    "load_model": ["readinto, copy_", "the same, kept"],
}


def seconds(step: Callable[[], object]) -> float:
    """Wall time of one call, its result let go of within."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def bare_load(model: TemporalVAE, file: Path, payload: Tensor) -> None:
    """Read the bytes of the weights at once and copy them over, in the order of the file."""
    with file.open("rb", buffering=0) as raw:
        raw.seek(file.stat().st_size - len(payload))
        view = memoryview(payload.numpy())
        while view:
            view = view[raw.readinto(view) or 0 :]
    at = 0
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            size = parameter.numel() * parameter.element_size()
            values = payload[at : at + size].view(parameter.dtype).view(parameter.shape)
            parameter.copy_(values)
            at += size


def main() -> None:
    """Print medians and ratios."""
    model = TemporalVAE.from_config(TemporalVAEConfig.svd(), seed=0)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        ours, theirs, written = (Path(folder) / name for name in ("ours", "theirs", "new"))
        model.save_model(ours)
        save_file(model.state_dict(), theirs)

        def save_state() -> None:
            with written.open("wb") as file:
                model.save_state(file)

        def load_state() -> None:
            with ours.open("rb") as file:
                model.load_state(file)

        kept = torch.zeros(size, dtype=torch.uint8)
        steps: dict[str, Callable[[], object]] = {
            "save_file": lambda: save_file(model.state_dict(), written),
            "save_state": save_state,
            "save_model": lambda: model.save_model(written),
            "readinto, copy_": lambda: bare_load(model, ours, torch.empty(size, dtype=torch.uint8)),
            "the same, kept": lambda: bare_load(model, ours, kept),
            "load_state": load_state,
            "load_model": lambda: model.load_model(ours),
            "from_file": lambda: TemporalVAE.from_file(ours),
            "load_file": lambda: load_file(theirs),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                written.unlink(missing_ok=True)
                times[name].append(seconds(step))
    median = {name: statistics.median(found) for name, found in times.items()}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, python "
        f"{sys.version.split()[0]}, {model.parameter_count:,} parameters, {size / 2**20:.0f} MiB "
        f"in {memory or 'the folder for temporary files'}, {ROUNDS} rounds, median"
    )
    for name, value in median.items():
        bars = [f"{value / median[bar]:5.2f} x {bar}" for bar in BARS.get(name, ())]
        print(f"{name:18}{value * 1000:8.1f} ms   {', '.join(bars)}".rstrip())


if __name__ == "__main__":
    main()
