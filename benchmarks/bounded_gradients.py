"""What the way back through SVD's decoder takes: plain, checkpointed, and in bounded memory.

    python benchmarks/bounded_gradients.py [--counted 192 256] [--measured 64]

Clips of 8 frames, float32. "counted" runs on shapes alone and counts the storages that are alive
over weights and latents, gradients of the weights included; "plan" is what the plan promises.
"measured" is a fresh process for every row, on Linux: anonymous resident memory, sampled, over what
it had with weights and latents made; there losses and gradients are compared with the plain ones.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from temporal_vae import TemporalVAE, TemporalVAEConfig
from temporal_vae.walks import gradients
from temporal_vae.walks.plan import Plan
from temporal_vae.walks.tracing import LiveBytes

FRAMES = 8
SIDES = ("plain", "checkpointed", "two fifths", "least")


def shape_of(side: int) -> tuple[int, ...]:
    """Latents of 8 frames of so many pixels squared."""
    return (1, 4, FRAMES, side // 8, side // 8)


def plan_for(model: TemporalVAE, shape: tuple[int, ...], side: str, plain: int) -> Plan | None:
    """The plan of a row, for the memory that the plain way takes."""
    if side in ("plain", "checkpointed"):
        return None
    plan = partial(
        model._runner.plan, shape, "decode", torch.float32, gradients=True,
        device=torch.device("cpu"),
    )  # fmt: skip
    least = plan("least")  # of small clips that is more than two fifths: the weights' gradients
    return least if side == "least" else plan(max(int(0.4 * plain), least.peak_bytes))


def prepared(model: TemporalVAE, side: str, plan: Plan | None) -> Callable[[Tensor], Tensor]:
    """The decoder as a row walks it."""
    model._set_gradient_checkpointing(side == "checkpointed")
    if plan is None or plan.bounds is None:
        return model.decoder
    return partial(gradients.walk, model.decoder, bounds=plan.bounds)


def counted(side: int) -> None:
    """Print the rows of one size, run on shapes."""
    with torch.device("meta"):
        model = TemporalVAE.from_config(TemporalVAEConfig.svd())
    plain = 0
    for name in SIDES:
        plan = plan_for(model, shape_of(side), name, plain)
        walk, alive = prepared(model, name, plan), LiveBytes()
        model.zero_grad()
        for weight in model.parameters():
            alive.leave_out(weight)
        with alive:
            x = torch.empty(shape_of(side), device="meta", requires_grad=True)
            alive.start_from_here()
            y = walk(x)
            y.backward(torch.empty_like(y))
        plain = plain or alive.most
        promised = "" if plan is None else f"   plan {plan.peak_bytes / 2**30:6.2f} GiB"
        print(f"counted  {FRAMES}x{side}x{side}  {name:13}{row(alive.most, plain)}{promised}",
              flush=True)  # fmt: skip


def row(size: int, plain: int) -> str:
    """A size, and its share of the plain one."""
    return f"{size / 2**30:7.2f} GiB  {size / plain:6.3f}"


def anonymous_bytes() -> int:
    """What the process has that no file backs."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE


def one(name: str, side: int, plain: int, file: str) -> None:
    """One row in this process: prints bytes and promise, keeps the loss and all gradients."""
    model = TemporalVAE.from_config(TemporalVAEConfig.svd(), seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.decoder.parameters():  # nothing is zero
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    x = torch.randn(shape_of(side), generator=draw).requires_grad_()
    plan = plan_for(model, shape_of(side), name, plain)
    walk = prepared(model, name, plan)
    ctypes.CDLL(None).malloc_trim(0)
    base, most, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, anonymous_bytes() - base)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loss = walk(x).square().mean()
    loss.backward()
    done.set()
    watcher.join()
    found = [loss.detach(), x.grad, *(p.grad for p in model.decoder.parameters())]
    kept = {str(index): value for index, value in enumerate(found) if value is not None}
    save_file({name: value.contiguous() for name, value in kept.items()}, file)
    print(most, 0 if plan is None else plan.peak_bytes)


def difference(file: str, plain: str) -> float:
    """The largest relative difference of a loss or gradient, in the largest gradient's scale."""
    ours, theirs = load_file(file), load_file(plain)
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name], theirs[name]) for name in theirs]
    largest = max(float(value.abs().max()) for name, value in theirs.items() if name != "0")
    scales = [float(b.abs().max()) for _, b in pairs]
    return max(
        float((a - b).abs().max()) / max(scale, 1e-3 * largest)
        for (a, b), scale in zip(pairs, scales, strict=True)
    )


def measured(side: int) -> None:
    """Print the rows of one size, each by a process of its own."""
    plain = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in SIDES:
            file = os.path.join(folder, name)
            words = [sys.executable, __file__, "--one", name, str(side), str(plain), file]
            said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            most, promise = map(int, said.split()[-2:])
            plain = plain or most
            promised = f"   plan {promise / 2**30:6.2f} GiB" if promise else ""
            apart = difference(file, os.path.join(folder, SIDES[0]))
            print(f"measured {FRAMES}x{side}x{side}  {name:13}{row(most, plain)}{promised}"
                  f"   loss and gradients within {apart:.0e}", flush=True)  # fmt: skip


def main() -> None:
    """Print all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counted", type=int, nargs="*", default=[192, 256])
    parser.add_argument("--measured", type=int, nargs="*", default=[64])
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, side, plain, file = options.one
        return one(name, int(side), int(plain), file)
    print(f"{datetime.date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads")
    for side in options.counted:
        counted(side)
    for side in options.measured:
        measured(side)


if __name__ == "__main__":
    main()
