"""Peak memory of each of several processes that decode one clip together, beside one alone.

    python benchmarks/sharded.py [--rows page wan] [--processes 1 2 4] [--budget least]

On Linux, over gloo. The peak is that of `memory.py`: anonymous resident memory over what a process
had with the weights and its part made; the largest of all processes counts. "share" is it times the
number of processes over the peak of one, "foreseen" what the plan promised over what was measured,
"sent" what a process sent, in MiB.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from memory import anonymous_memory

from temporal_vae import TemporalVAE, WanVAEConfig
from temporal_vae.walks.processes import Group
from temporal_vae.walks.sharded import walk, walk_rows

ROWS: dict[str, tuple[int, ...]] = {"page": (1, 4, 16, 32, 56), "wan": (1, 16, 6, 32, 52)}


def model(row: str) -> TemporalVAE:
    """The page's default layout at half of its width, or Wan 2.1's at a third of it."""
    if row == "wan":
        return TemporalVAE.from_config(WanVAEConfig(base_channels=32)).requires_grad_(False)
    return TemporalVAE(base_channels=64).requires_grad_(False)


def work(row: str, budget: str, folder: str, rank: int, size: int) -> None:
    """The child: make everything, say so, wait for the word, walk, say what was foreseen."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=rank, world_size=size)
    vae, shape, group = model(row), ROWS[row], Group()
    plan = vae.plan(shape, budget=budget, ranks=size)
    axis = 3 if row == "wan" else 2
    own = torch.randn(shape).split(vae._runner.parts(shape[axis], "decode", size), axis)[rank]
    assert plan.bounds is not None
    group.of_all(torch.zeros(1))  # the connections are there
    group.exchange([torch.zeros(1)] * size, [1] * size)
    group.sent = 0
    print("ready", flush=True)
    input()
    with torch.no_grad():
        if size == 1:
            vae.decode(own, plan=plan)
        else:  # the walks themselves, to count what they send
            (walk_rows if row == "wan" else walk)(vae.decoder, own, plan.bounds, group)
    print(f"{plan.peak_bytes} {group.sent}", flush=True)


def measure(row: str, budget: str, size: int) -> tuple[int, float, float]:
    """The largest peak of all processes, what was foreseen over it, and the bytes that one sent."""
    with tempfile.TemporaryDirectory() as folder:
        children = [
            subprocess.Popen(
                [sys.executable, __file__, "--child", row, budget, folder, str(rank), str(size)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        base = [anonymous_memory(child.pid)[0] for child in children]
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        most = 0
        while any(child.poll() is None for child in children):
            now = [anonymous_memory(child.pid)[0] for child in children]
            most = max(most, *(a - b for a, b in zip(now, base, strict=True)))
            time.sleep(0.01)
        foreseen, sent = map(int, children[0].communicate()[0].split())
    return most, foreseen / most, sent


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--budget", default="least")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        row, budget, folder, rank, size = options.child
        return work(row, budget, folder, int(rank), int(size))
    print(f"{datetime.date.today()}  torch {torch.__version__}, float32, budget {options.budget}")
    print(f"{'':8}{'processes':>10}{'peak MiB':>10}{'share':>8}{'foreseen':>10}{'sent':>8}")
    for row in options.rows:
        one = 0
        for size in options.processes:
            peak, foreseen, sent = measure(row, options.budget, size)
            one = peak if size == 1 else one
            share = f"{peak * size / one:8.2f}" if one else f"{'':8}"
            numbers = f"{peak / 2**20:10.0f}{share}{foreseen:10.2f}{sent / 2**20:8.1f}"
            print(f"{row:8}{size:10}{numbers}", flush=True)


if __name__ == "__main__":
    main()
