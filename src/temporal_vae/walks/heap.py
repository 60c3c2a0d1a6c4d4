"""The memory that glibc keeps when it is freed, which no count of tensors sees.

Once a few have been freed, blocks of up to `MAPPED_BYTES` come from its heap. What is freed there
stays with the process until all that lies above it is freed too; where the next block fits into
none of the gaps, the heap grows beside them. Larger blocks are mapped each on their own, and never
lie in a gap. So a walk whose tensors take 570 MiB at the most could take 690. `Heap` has the gaps
given back in time; where there is no glibc, nothing of this does anything.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from functools import lru_cache
from pathlib import Path

import torch

MAPPED_BYTES = 32 * 2**20
"""Larger blocks glibc takes from the system for each use, page by page, and gives back."""
NEAR = 40 * 2**20
"""This near to what it may take a walk has gaps given back: one layer adds less. Of what may be
taken it is a quarter at the most."""
AGAIN = 8 * 2**20
"""After gaps were given back, the process has to grow by so much before it happens again."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

_kept = False


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


class _Counts(ctypes.Structure):
    """What `mallinfo2` gives of the heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def keep_freed() -> None:
    """Let glibc reuse freed memory for the next piece of a stream, instead of returning it.

    For a process of our own. Returned, it comes back page by page and in other places, which costs
    time and lets the peak wander; docs/decisions.md has the runs.
    """
    global _kept
    libc = _glibc()
    if libc is not None and hasattr(libc, "mallinfo2"):  # or nobody could tell what is kept
        libc.mallopt(M_MMAP_MAX, 0)  # no block gets a mapping of its own
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        _kept = True


def keeps_freed() -> bool:
    """Whether this process keeps what is freed, by `keep_freed`."""
    return _kept


def kept_bytes() -> int:
    """What was freed and is kept by `keep_freed`: as good as free to this process.

    What was never written is not there yet, and counts as free to all.
    """
    if not _kept:
        return 0
    libc = _glibc()
    assert libc is not None
    libc.mallinfo2.restype = _Counts
    counts, resident = libc.mallinfo2(), anonymous_bytes()
    free = int(counts.fordblks)
    return free if resident is None else min(free, max(0, resident - int(counts.uordblks)))


def anonymous_bytes() -> int | None:
    """Memory of this process without that of files; None where nobody can tell (not Linux)."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    except (OSError, ValueError):
        return None
    return (int(resident) - int(shared)) * mmap.PAGESIZE


class Heap:
    """Keeps a walk on the CPU within the bytes it may take over what the process has now."""

    def __init__(self, most: int | None, device: torch.device):
        self._limit: int | None = None
        self._again = 0
        if most is not None and device.type == "cpu" and not _kept and _glibc() is not None:
            now = anonymous_bytes()
            self._limit = None if now is None else now + most - min(NEAR, most // 4)

    def before(self, largest: int = 0) -> None:
        """Give back gaps if the process has nearly all that it may take.

        `largest`: bytes of the largest tensor that what follows reads or makes, of which it may
        hold three.
        """
        if self._limit is None:
            return
        mapped = 3 * largest if largest > MAPPED_BYTES else 0
        now = anonymous_bytes() or 0
        if now + mapped <= self._limit or now < self._again:
            return
        libc = _glibc()
        assert libc is not None
        libc.malloc_trim(0)
        # what is left is in use, or not of this walk
        self._again = (anonymous_bytes() or 0) + AGAIN
        self._limit = max(self._limit, self._again)
