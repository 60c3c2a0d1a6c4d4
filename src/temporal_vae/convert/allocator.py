"""How the C library hands out memory to a process of our own: the command, or one that Ray starts.

Left alone, glibc takes blocks of up to 32 MiB from its heap once a few have been freed. What is
freed there stays with the process until all that lies above it is freed too; where the next block
fits into none of the gaps, the heap grows beside them. How much is lost depends on the kernels of
the processor, and wanders.
"""

from __future__ import annotations

import ctypes
import os
import platform

KEPT_BYTES = 4 * 2**20 + 2**16
"""With a budget, blocks of up to so many are kept when they are freed: a tensor of 4 MiB, and what
is put around it."""
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Environment variable by which torch asks for huge pages for blocks of 2 MiB and more. Torch reads
it at its first tensor."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # of malloc.h


def settle(budget: object) -> None:
    """Settle how memory is handed out, before the first tensor is made. Only glibc is told.

    Without a budget (None) all that is freed is kept, which takes the least time: also by threads,
    whose own heaps would be given back whenever they are empty. With a budget, blocks
    of more than `KEPT_BYTES` are mapped each on their own, and given back when they are freed: the
    process then has what its tensors take. docs/decisions.md has the runs of both.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the heap keeps what is freed
    if budget is None:
        libc.mallopt(M_MMAP_MAX, 0)  # no block gets a mapping of its own
        libc.mallopt(M_ARENA_MAX, 1)
    else:
        os.environ.setdefault(HUGE_PAGES, "1")
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
