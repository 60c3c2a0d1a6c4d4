"""How much memory there is to use, here and now."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from temporal_vae.walks.heap import kept_bytes

CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Memory that this process could still take on a device; None where nobody can tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    if device.type != "cpu":
        return None
    machine = int(psutil.virtual_memory().available)
    container = _left_in_container(CGROUP)
    return (machine if container is None else min(machine, container)) + kept_bytes()


def _left_in_container(folder: Path) -> int | None:
    """What a container's limit leaves (Linux control groups, version 2); None without a limit.

    Its use counts cached files, which are given up when memory is needed.
    """
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError):  # "max" is no number
        return None
    return max(0, limit - used + cached)
