"""The walk that `decode` and `encode` take without a plan, beside the whole one, in turn.

    python benchmarks/default_walk.py [--repeats 3] [--only decode/12x192x192]

`tiny` and the widths of the reference page with random weights, float32, medians. Each row says how
many frames go together, the share of the whole walk's time, and the largest difference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from speed import medians
from torch import Tensor

from temporal_vae import TemporalVAE
from temporal_vae.network.lines import Operation
from temporal_vae.walks.peak import PlanRequest
from temporal_vae.walks.plan import fastest

ROWS: tuple[tuple[str, Operation, tuple[int, int, int, int]], ...] = (
    ("tiny", "decode", (1, 12, 192, 192)),
    ("tiny", "decode", (4, 8, 192, 192)),
    ("tiny", "decode", (1, 16, 256, 256)),
    ("tiny", "decode", (1, 120, 128, 128)),
    ("tiny", "decode", (1, 64, 64, 64)),
    ("tiny", "encode", (1, 12, 192, 192)),
    ("page", "decode", (1, 8, 128, 128)),
    ("page", "decode", (1, 32, 64, 64)),
    ("page", "encode", (1, 12, 96, 96)),
)


def sides(vae: TemporalVAE, operation: Operation, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The operation without a plan, and by the whole walk."""
    if operation == "decode":
        return {"default": lambda: vae.decode(x), "whole": lambda: vae.decoder(x)}
    return {
        "default": lambda: vae.encode(x, sample_mode=False),
        "whole": lambda: vae.encoder(x).chunk(2, 1)[0],
    }


def group(vae: TemporalVAE, operation: Operation, x: Tensor) -> str:
    """How many frames go together without a plan."""
    line = vae.decoder if operation == "decode" else vae.encoder
    request = PlanRequest(None, operation, tuple(x.shape), x.dtype, False, (None,), x.device)
    bounds = fastest(line, request)
    return "whole" if bounds is None else f"{bounds.frames} frames"


@torch.no_grad()
def main() -> None:
    """Print a row for each clip."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    torch.manual_seed(0)
    models = {"tiny": TemporalVAE.from_pretrained("tiny"), "page": TemporalVAE(seed=0)}
    for name, operation, (batch, frames, height, width) in ROWS:
        row = f"{name} {operation}/{'x'.join(map(str, (batch, frames, height, width)))}"
        if options.only not in row:
            continue
        vae = models[name].eval()
        if operation == "decode":
            x = torch.randn(batch, vae.latent_channels, frames, height // 8, width // 8)
        else:
            x = torch.randn(batch, 3, frames, height, width)
        calls = sides(vae, operation, x)
        found = medians(calls, options.repeats)
        apart = (calls["default"]() - calls["whole"]()).abs().max().item()
        share = found["default"] / found["whole"]
        together = group(vae, operation, x)
        print(
            f"{row:32} {together:9} {found['whole']:7.2f} s  {share:.2f}  {apart:.1e}", flush=True
        )


if __name__ == "__main__":
    main()
