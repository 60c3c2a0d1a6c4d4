"""`compute_gradients` against a plain forward, loss and backward of the same thing.

    python benchmarks/gradients.py [--repeats 15]

Interleaved, medians; base 32, a clip of 4 frames of 64x64 pixels, float32.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time

import torch

from temporal_vae import TemporalVAE, losses


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    model = TemporalVAE(base_channels=32, seed=0)
    x = torch.rand(1, 3, 4, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def plain() -> None:
        model.zero_grad()
        reconstruction = model.decode(model.encode(x, sample_mode=False))
        losses.mean_squared_error(reconstruction, x).backward()

    def ours() -> None:
        model.compute_gradients(x, x)

    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for repeat in range(options.repeats + 1):
        for name, step in (("plain", plain), ("ours", ours)):
            start = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    t = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{datetime.date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"plain {t['plain']:.3f} s, ours {t['ours']:.3f} s: {t['ours'] / t['plain']:.3f}")


if __name__ == "__main__":
    main()
