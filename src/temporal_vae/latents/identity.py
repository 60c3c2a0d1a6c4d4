"""Which weights made a latent, whatever file they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def weights_sha256(parameters: Iterable[tuple[str, Tensor]], structure: str) -> str:
    """SHA-256 of weights and of what shapes do not tell of their network, in hexadecimal.

    Over the line `structure`, then for each parameter in the order of names the line
    "name 64x3x3x3" and its numbers as float32, little-endian, in C order. So it does not depend on
    the layout or the dtype of a file; weights rounded to a narrower dtype are other weights.
    """
    digest = hashlib.sha256(f"{structure}\n".encode())
    for name, parameter in sorted(parameters):
        digest.update(f"{name} {'x'.join(map(str, parameter.shape))}\n".encode())
        numbers = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(numbers.numpy().data.cast("B"))
    return digest.hexdigest()
