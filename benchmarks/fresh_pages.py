"""Memory that a walk uses again: time, and pages that are fresh, with it and without, in turn.

    python benchmarks/fresh_pages.py [--rows tiny-image tiny-clip ...] [--repeats 9]

A fresh page is one that the system hands to the process for the first time, filled with zeros
("minor fault"). Without: every result is allocated anew. How much of that is fresh then depends on
what lies in the heap, and differs from process to process.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import resource
import statistics
import time
from contextlib import nullcontext
from unittest import mock

import torch
from torch import Tensor

from temporal_vae import TemporalVAE
from temporal_vae.network.kernels.blocks import used_again
from temporal_vae.walks import runner

ROWS = {
    "tiny-image": ("tiny", "decode", (1, 4, 1, 64, 64)),
    "tiny-clip": ("tiny", "decode", (1, 4, 12, 24, 24)),
    "tiny-encode": ("tiny", "encode", (1, 3, 16, 192, 192)),
    "tiny-causal": ("tiny-causal", "decode", (1, 4, 12, 24, 24)),
    "tiny-wan": ("tiny-wan", "decode", (1, 16, 5, 20, 20)),
    "page": (None, "decode", (1, 4, 4, 16, 16)),
}
"""Model, operation, shape of what it gets."""


def measured(vae: TemporalVAE, operation: str, x: Tensor, again: bool) -> tuple[float, int]:
    """Seconds and fresh pages of one walk."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    with mock.patch.object(runner, "used_again", used_again if again else nullcontext):
        getattr(vae, operation)(x)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, medians of "
        f"{options.repeats}"
    )
    for row in options.rows:
        name, operation, shape = ROWS[row]
        vae = TemporalVAE(seed=0) if name is None else TemporalVAE.from_pretrained(name)
        x = torch.rand(shape) * 2 - 1
        found: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
        for repeat in range(options.repeats + 1):
            for again, runs in found.items():
                run = measured(vae, operation, x, again)
                runs.extend([run] if repeat else [])
        (old, many), (new, few) = (
            map(statistics.median, zip(*found[again], strict=True)) for again in (False, True)
        )
        print(
            f"{row:12} {old:6.2f} s with {many:7.0f} fresh pages, used again {new:6.2f} s with "
            f"{few:7.0f}: {new / old:.2f}"
        )


if __name__ == "__main__":
    main()
