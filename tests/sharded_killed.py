"""Decodes one clip after another with another process, until that is killed: `test_sharded.py`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import awake

from temporal_vae import sharded


def main() -> None:
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    vae = awake(torch.float32).requires_grad_(False)
    for _ in range(10_000):
        sharded.decode(vae, torch.zeros(1, 4, 2, 4, 4))
        (folder / f"{rank}.ready").touch()


if __name__ == "__main__":
    main()
