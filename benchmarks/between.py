"""Weights between two models: what fine-tuning gained, with less of what it lost elsewhere.

    python benchmarks/between.py BEFORE AFTER OUT [--share 0.8] [--dtype bfloat16]

Every parameter that both models have is BEFORE + share * (AFTER - BEFORE); AFTER's configuration.

Source: Wortsman et al. 2022, arXiv 2109.01903.
"""

from __future__ import annotations

import argparse

import torch

from temporal_vae import TemporalVAE


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("out")
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    before = dict(TemporalVAE.from_pretrained(options.before).float().named_parameters())
    after = TemporalVAE.from_pretrained(options.after).float()
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            parameter.copy_(torch.lerp(before[name], parameter, options.share))
    after.to(getattr(torch, options.dtype)).save_pretrained(options.out)


if __name__ == "__main__":
    main()
