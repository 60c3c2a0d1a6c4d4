"""Memory budgets: words to bytes, what is free, and what can be afforded.

Other modules call `budget.available_bytes` through this module, so that one replacement serves all.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Literal

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
AUTO_SHARE = 0.8
"""Of the free memory that "auto" takes."""

Budget = int | str | None
"""A bound of memory as callers give it: bytes, words such as "6GiB", "least", or None for any."""
Limit = int | Literal["least"] | None
"""The same in bytes."""


class BudgetError(ValueError):
    """A budget that cannot be met; `least` bytes can."""

    def __init__(self, message: str, least: int):
        super().__init__(message)
        self.least = least


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
    return machine if container is None else min(machine, container)


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


def parse_budget(budget: Budget) -> Limit:
    """Bytes of a budget: a number, "500MiB", "6GiB", "6GB", "least" or None.

    Raises `ValueError` for anything else.
    """
    if budget is None:
        return None
    if budget == "least":
        return "least"
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?\s*", budget)
        if match:
            unit = match[2] or ""
            power = " KMGT".index(unit[:1].upper() or " ")
            size = int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)
            if size > 0:
                return size
    elif isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    raise ValueError(
        f"a budget is a number of bytes, words such as '6GiB', 'least' or None, got {budget!r}"
    )


def in_words(size: int) -> str:
    """A number of bytes, with the same in GiB."""
    return f"{size} bytes ({size / 2**30:.3f} GiB)"


def memory_budget(memory: Budget, device: torch.device) -> Limit:
    """Bytes of a budget for a device, or with "auto" most of the memory that is free there.

    Raises `ValueError` for what is no budget, for more than is free, and for "auto" where it is not
    known how much is free.
    """
    free = available_bytes(device)
    if memory == "auto":
        if free is None:
            raise ValueError(
                f"'auto' needs to know how much memory is free, and {device} does not tell: give a "
                "size, such as 2GiB"
            )
        return int(AUTO_SHARE * free)
    limit = parse_budget(memory)
    if isinstance(limit, int) and free is not None and limit > free:
        raise ValueError(
            f"the budget {memory!r} is above the memory that is free, {in_words(free)}: give less, "
            "or free some"
        )
    return limit


def check_budget(budget: Budget, device: torch.device) -> None:
    """Raise `ValueError` for what is no budget, and on the CPU for more than is free.

    A GPU says when its memory is used up; a walk there begins again with less.
    """
    limit = parse_budget(budget)
    if isinstance(limit, int) and device.type == "cpu":
        memory_budget(budget, device)


def affordable(memory: int | str, device: torch.device) -> Budget:
    """A budget of so much, or of what is free where that is less or `memory` is "auto".

    A pipeline has worked for minutes when its VAE's turn comes: a budget means "at most" here.
    """
    limit = sys.maxsize if memory == "auto" else parse_budget(memory)
    free = available_bytes(device)
    if not isinstance(limit, int) or (free is not None and limit <= free):
        return memory
    if free is None:
        return None if memory == "auto" else memory
    usable = free * 7 // 8  # for the caches of kernels, and others on the machine
    unit = 1 << max(0, usable.bit_length() - 4)  # rounded, so that the next call finds its plan
    return max(1, usable // unit * unit)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, by Python's or torch's ways to say so."""
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return out_of_memory or "allocate memory" in str(error)
