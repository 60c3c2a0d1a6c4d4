"""Whether values alone are wanted of an operation, so that a kernel may write where it likes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def values_only(*tensors: Tensor) -> bool:
    """Whether nobody differentiates, transforms (`torch.func`) or compiles what is computed."""
    return not (
        (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        or torch.compiler.is_compiling()
        or transformed()
    )


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
