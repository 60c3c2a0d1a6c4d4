"""Kernels in C, built by the compiler of the machine when they are first needed.

They are compiled for the instructions that torch itself has found (AVX-512, AVX2, or what every
processor of its kind has), and use the threads that torch has started. What is built is kept in the
user's cache, one file for each source and set of instructions. Without a compiler torch's own
operations do the work, and a warning says so once. `TEMPORAL_VAE_KERNELS=torch` in the environment
asks for torch's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from functools import lru_cache
from pathlib import Path

import torch

from temporal_vae.files.atomic import new_file

CHANNELS = 16
"""Channels are taken so many at a time, as the longest vectors hold them."""
SWITCH = "TEMPORAL_VAE_KERNELS"
"""Environment variable: "torch" for torch's own operations only."""
SOURCES, HEADERS = ("winograd.c", "norm.c"), ("vectors.h",)
SECONDS = 120
"""A compiler that takes longer is given up."""

_LOCK = threading.Lock()
_HERE = Path(__file__).parent
_FLAGS = ("-O2", "-std=gnu11", "-fopenmp", "-ffp-contract=fast", "-fPIC", "-c")
_INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}


class Unavailable(Exception):
    """Why there are no kernels of our own on this machine."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The kernels, or None where there are none, which is said once."""
    if os.environ.get(SWITCH) == "torch":
        return None
    try:
        with _LOCK:
            return _loaded()
    except (Unavailable, OSError, RuntimeError) as error:  # no home, no place to write, ...
        warnings.warn(
            f"convolutions take torch's own kernels, about half as fast on the CPU, because {error}"
            f" (to do without this warning: {SWITCH}=torch in the environment)",
            stacklevel=2,
        )
        return None


def _loaded() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise Unavailable("ours are built on Linux alone")
    flags = (*_FLAGS, *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()))
    told = hashlib.sha256(" ".join(flags).encode())
    for file in (*SOURCES, *HEADERS):
        told.update(_HERE.joinpath(file).read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "temporal-vae"
    built = folder / f"kernels-{told.hexdigest()[:16]}.so"
    with contextlib.suppress(OSError):  # not there, or torn
        if built.stat().st_uid == os.getuid():
            return ctypes.CDLL(os.fspath(built))
    with tempfile.TemporaryDirectory() as scratch:
        fresh = _built(flags, Path(scratch))
        try:
            kernels = ctypes.CDLL(os.fspath(fresh))
        except OSError as error:  # no OpenMP of GNU's kind in this process
            raise Unavailable(f"what was compiled cannot be loaded: {error}") from None
        with contextlib.suppress(OSError), new_file(built) as cached:  # or it is built every time
            cached.write(fresh.read_bytes())
        return kernels


def _built(flags: tuple[str, ...], scratch: Path) -> Path:
    """The shared library. OpenMP is not linked in: its functions are those torch has loaded."""
    compiler = shlex.split(os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "")
    if not compiler:
        raise Unavailable("there is no C compiler (cc or gcc)")
    _compiler(*compiler, *flags, *(str(_HERE / file) for file in SOURCES), within=scratch)
    parts = sorted(str(part) for part in scratch.glob("*.o"))
    _compiler(*compiler, "-shared", *parts, "-o", "kernels.so", within=scratch)
    return scratch / "kernels.so"


def _compiler(*command: str, within: Path) -> None:
    try:
        subprocess.run(
            command, cwd=within, check=True, capture_output=True, timeout=SECONDS, text=True
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or f"exit status {error.returncode}").splitlines()[0]
        raise Unavailable(f"{command[0]} failed: {said}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from None
