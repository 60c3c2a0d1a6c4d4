"""Peak memory of a walk beside diffusers', the same weights in both; a fresh process for every row.

    python benchmarks/memory.py [--rows svd14 svd4 image] [--sides diffusers whole least file 1GiB]

On Linux. The peak is anonymous resident memory, sampled from /proc, over what the process had with
the weights and the input made; file-backed bytes (libraries, an arena in a file) stand apart.
"foreseen" is what the plan promised, over what was measured; no row was used to make the model.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDTHS = (128, 256, 512, 512)


class Row(NamedTuple):
    """One thing to do."""

    layout: str
    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


ROWS = {
    "svd14": Row("svd", "decode", (1, 4, 14, 72, 128)),
    "svd4": Row("svd", "decode", (1, 4, 4, 72, 128)),
    "small": Row("svd", "decode", (1, 4, 14, 32, 56)),
    "image": Row("sd", "decode", (1, 4, 1, 256, 256)),
    "narrow": Row("narrow", "decode", (1, 4, 9, 40, 72), torch.float32),
    "pair": Row("narrow", "decode", (2, 4, 7, 32, 48), torch.float32),
    "encode": Row("narrow", "encode", (1, 3, 9, 320, 576), torch.float32),
    # Wan 2.1's layout, at its width and at a third of it, which takes a ninth of the time
    "wan": Row("wan96", "decode", (1, 16, 6, 60, 104), torch.float32),
    "wan-third": Row("wan32", "decode", (1, 16, 6, 60, 104), torch.float32),
    "wan-21": Row("wan32", "decode", (1, 16, 6, 30, 52), torch.float32),
    "wan-81": Row("wan32", "decode", (1, 16, 21, 30, 52), torch.float32),
    "wan-encode": Row("wan32", "encode", (1, 3, 21, 240, 416), torch.float32),
}
SIDES = ("diffusers", "whole", "half", "least", "file")


def anonymous_memory(process: int) -> tuple[int, int]:
    """Bytes of RssAnon, and of file-backed pages, now."""
    found = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return found["RssAnon"], found["RssFile"] + found["RssShmem"]


def theirs(row: Row) -> Callable[[], Any]:
    """diffusers' decode of a random latent."""
    layout, operation, shape, dtype = row
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderKLWan

    if layout.startswith("wan"):
        wan: Any = AutoencoderKLWan(base_dim=int(layout[3:])).to(dtype).eval()
        x = torch.randn(shape, dtype=dtype)
        if operation == "decode":
            return lambda: wan.decode(x).sample
        return lambda: wan.encode(x).latent_dist.mean
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    if layout == "sd":
        blocks["up_block_types"] = ("UpDecoderBlock2D",) * 4
    kind = AutoencoderKL if layout == "sd" else AutoencoderKLTemporalDecoder
    vae: Any = kind(block_out_channels=WIDTHS, layers_per_block=2, **blocks)
    vae = vae.to(torch.bfloat16).eval()
    cells = torch.randn(shape[2], shape[1], *shape[3:], dtype=torch.bfloat16)
    if layout == "sd":
        return lambda: vae.decode(cells).sample
    return lambda: vae.decode(cells, num_frames=shape[2]).sample


def ours(row: Row, side: str, folder: str) -> Callable[[], Any]:
    """Ours on random input, walked as `side` says: "half" is half of what the whole walk takes."""
    layout, operation, shape, dtype = row
    from temporal_vae import TemporalVAE, TemporalVAEConfig, WanVAEConfig

    if layout.startswith("wan"):
        vae = TemporalVAE.from_config(WanVAEConfig(base_channels=int(layout[3:])))
    elif layout == "svd":
        vae = TemporalVAE.from_config(TemporalVAEConfig.svd())
    elif layout == "sd":
        vae = TemporalVAE(num_temporal_layers=0, norm_groups=32)
    else:
        vae = TemporalVAE(base_channels=64)
    vae = vae.to(dtype).eval()
    x = torch.randn(shape, dtype=dtype)
    plan = vae.plan(shape, operation)  # type: ignore[arg-type]
    if side != "whole":
        words: dict[str, int | str] = {"half": plan.peak_bytes // 2, "file": "least"}
        budget = words.get(side, side)
        options: dict[str, Any] = {"offload": folder} if side == "file" else {}
        plan = vae.plan(shape, operation, budget=budget, **options)  # type: ignore[arg-type]
    print(plan.explain(), flush=True)
    print(f"predicted {plan.peak_bytes}", flush=True)
    if operation == "decode":
        return lambda: vae.decode(x, plan=plan)
    return lambda: vae.encode(x, sample_mode=False, plan=plan)


def work(row: Row, side: str, folder: str) -> None:
    """The child: make everything, say so, wait for the word, walk, say so."""
    step = theirs(row) if side == "diffusers" else ours(row, side, folder)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    print("ready", flush=True)
    input()
    with torch.no_grad():
        start = time.perf_counter()
        result = step()
        print(f"seconds {time.perf_counter() - start}", flush=True)
    assert isinstance(result, Tensor)
    print("done", flush=True)


def measure(row: str, side: str, verbose: bool) -> dict[str, float]:
    """Peak bytes over the start, file-backed bytes, seconds, and what the plan foresaw."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        child = subprocess.Popen(
            [sys.executable, __file__, "--child", row, side, folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        found: dict[str, float] = {"predicted": 0.0}

        def read_until(word: str) -> None:
            assert child.stdout is not None
            for line in child.stdout:
                name, _, value = line.strip().partition(" ")
                if name in ("predicted", "seconds"):
                    found[name] = float(value)
                elif verbose and name not in ("ready", "done"):
                    print("   ", line.rstrip())
                if name == word:
                    return

        read_until("ready")
        base, files = anonymous_memory(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        most = most_files = 0
        while child.poll() is None:
            now, mapped = anonymous_memory(child.pid)
            most, most_files = max(most, now - base), max(most_files, mapped - files)
            time.sleep(0.01)
        read_until("done")
        if child.returncode:
            raise SystemExit(f"{row} {side} failed: {child.returncode}")
        return found | {"peak": most, "files": most_files}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument(
        "--sides", nargs="+", default=list(SIDES), help="of these, or budgets such as 600MiB"
    )
    parser.add_argument("--verbose", action="store_true", help="print the plans")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        row, side, folder = options.child
        return work(ROWS[row], side, folder)
    print(f"{datetime.date.today()}  torch {torch.__version__}, peak over weights and input")
    heads = ("peak GiB", "of diff.", "file GiB", "foreseen", "s")
    print(f"{'':24}" + "".join(f"{head:>10}" for head in heads))
    for row in options.rows:
        print(f"{row}: {ROWS[row]}")
        base = 0.0
        for side in options.sides:
            if side == "diffusers" and ROWS[row].layout == "narrow":
                continue  # has no counterpart there
            m = measure(row, side, options.verbose)
            base = m["peak"] if side == "diffusers" else base
            share = f"{m['peak'] / base:10.3f}" if base else f"{'':10}"
            foreseen = f"{m['predicted'] / m['peak']:10.2f}" if m["predicted"] else f"{'':10}"
            print(
                f"{row + ' ' + side:24}{m['peak'] / 2**30:10.2f}{share}{m['files'] / 2**30:10.2f}"
                f"{foreseen}{m['seconds']:10.1f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
