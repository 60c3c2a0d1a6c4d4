"""Attention by torch's fused kernels where they serve."""

from __future__ import annotations

import contextlib

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from temporal_vae.network.kernels import work
from temporal_vae.network.kernels.plain import transformed


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v, for (B, heads, queries or keys, C).

    `torch.func` finds no derivative for the fused kernels: it gets plain operations.
    """
    plain = sdpa_kernel(SDPBackend.MATH) if transformed() else contextlib.nullcontext()
    with plain:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    work.count(y, 2 * k.shape[2])
    return y
