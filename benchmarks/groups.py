"""Seconds of a stream's step by the frames of a group and the pixels of a chunk.

    python benchmarks/groups.py [--repeats 4]

`tiny`, pieces of 16 frames of 256x144, medians of interleaved runs: what the planner's limits
(`GROUP_BYTES`, `CHUNK_BYTES`) rest on.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections import defaultdict
from itertools import product

import torch

from temporal_vae import TemporalVAE
from temporal_vae.convert import allocator
from temporal_vae.walks import streamed
from temporal_vae.walks.stages import Bounds

PIECE = 16
SHAPES = {"encode": (1, 3, PIECE, 144, 256), "decode": (1, 4, PIECE, 18, 32)}
WALKS = list(product((1, 2, 4, 8, 16), (1024, 4096)))


@torch.no_grad()
def main() -> None:
    """Print a line for each pair of limits and each direction."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    allocator.settle(None)  # as the command does
    model = TemporalVAE.from_pretrained("tiny")
    threads = torch.get_num_threads()
    print(f"{datetime.date.today()}  torch {torch.__version__}, {threads} threads, tiny, 256x144")
    for operation, shape in SHAPES.items():
        line = model.encoder if operation == "encode" else model.decoder
        piece = torch.rand(shape) * 2 - 1
        state, seconds = streamed.begin(line, piece), defaultdict(list)
        for _ in range(3):  # until every layer has frames
            _, state = streamed.step(line, piece, state, Bounds())
        for _ in range(options.repeats):
            for frames, pixels in WALKS:
                bounds = Bounds(frames=frames, pixels=pixels, channels=32)
                start = time.perf_counter()
                _, state = streamed.step(line, piece, list(state), bounds)
                seconds[frames, pixels].append(time.perf_counter() - start)
        for (frames, pixels), times in seconds.items():
            print(
                f"{operation} {frames:3} frames {pixels:5} pixels: {statistics.median(times):.3f} s"
            )


if __name__ == "__main__":
    main()
