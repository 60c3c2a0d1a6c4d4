"""The memory that decoding takes, by size, length, model and dtype: the table of docs/memory.md.

    python benchmarks/budgets.py > docs/memory.md

Nothing is run: the numbers are those of plans, on the CPU, over the weights and the latents, the
decoded pixels included.
"""

from __future__ import annotations

import torch

from temporal_vae import TemporalVAEConfig
from temporal_vae.walks.peak import PlanRequest
from temporal_vae.walks.plan import planner

SIZES = {"256x256": (32, 32), "832x480": (60, 104), "1280x720": (90, 160),
         "1920x1080": (135, 240), "3840x2160": (270, 480)}  # fmt: skip
"""Pixels by name, and latents as (height, width)."""
KINDS = {"image": 1, "14 frames": 14, "25 frames": 25, "stream": 1}
MODELS = {
    "SVD": TemporalVAEConfig.svd(),
    "SDXL": TemporalVAEConfig(num_temporal_layers=0),
    "tiny": TemporalVAEConfig.tiny(),
}
DTYPES = (torch.float32, torch.bfloat16)

HEAD = """# How much memory

What decoding takes on a CPU, over the weights and the latents, the decoded pixels included. The
first number is the least that any budget can name: with less a plan is refused, and says so. The
second is comfortable: that of the fastest walk in pieces, from which on more memory buys little. No
number changes the picture.

SVD and tiny are video models; SDXL is the image VAE of Stable Diffusion's layout, frame by frame.
A stream has any length, and is walked a frame at a time here; SVD has norms over the clip, so it
takes clips. `tvae` counts frames on their way and codecs on top, and says what it needs where a
budget is too small. Clips that are walked apart (`--clip-frames`), `--dtype bfloat16` (where the
processor has it) and smaller frames take less.

Without gradients, that is: `plan(..., gradients=True)` counts the way back as well, which keeps the
inputs of layers and takes a gradient for each weight that is trained
(`python benchmarks/bounded_gradients.py` compares it with the plain way).

Made by `python benchmarks/budgets.py`, without running anything: these are the plans' own numbers.
"""


def cell(model: str, dtype: torch.dtype, size: str, kind: str) -> tuple[int, int] | None:
    """Bytes for the least and for the fastest walk in pieces; None for what cannot be."""
    config, stream = MODELS[model], kind == "stream"
    if stream and config.temporal_norm == "clip":
        return None
    shape = (1, config.latent_channels, KINDS[kind], *SIZES[size])
    request = PlanRequest(
        config, "decode", shape, dtype, stream, (None,), torch.device("cpu"), not stream
    )
    plans = planner(request)
    least = plans.plan("least").peak_bytes
    fastest = plans.plan(None)
    if fastest.bounds is None and fastest.peak_bytes > least:
        fastest = plans.plan(fastest.peak_bytes - 1)
    return least, max(least, fastest.peak_bytes)


def in_words(size: int) -> str:
    """GiB, with as many digits as matter."""
    return f"{size / 2**30:.2f}" if size < 10 * 2**30 else f"{size / 2**30:.0f}"


def main() -> None:
    """Print the page."""
    print(HEAD)
    for model in MODELS:
        for dtype in DTYPES:
            print(f"## {model}, {str(dtype).removeprefix('torch.')}, GiB: least / comfortable\n")
            print("| | " + " | ".join(KINDS) + " |\n|---|" + "---|" * len(KINDS))
            for size in SIZES:
                found = [cell(model, dtype, size, kind) for kind in KINDS]
                cells = [" / ".join(map(in_words, each)) if each else "clips" for each in found]
                print(f"| {size} | " + " | ".join(cells) + " |", flush=True)
            print()


if __name__ == "__main__":
    main()
