"""What a kernel may do: whether values alone are wanted of an operation, and where it will run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_stands_for_cpu: ContextVar[bool] = ContextVar("stands_for_cpu", default=True)


@contextmanager
def counted_for_cpu(here: bool) -> Iterator[None]:
    """Whether tensors on the meta device stand for tensors on the CPU, or for those elsewhere."""
    token = _stands_for_cpu.set(here)
    try:
        yield
    finally:
        _stands_for_cpu.reset(token)


def on_cpu(x: Tensor) -> bool:
    """Whether x is on the CPU, or stands for what will be."""
    return x.device.type == "cpu" or (x.is_meta and _stands_for_cpu.get())


def trained(*tensors: Tensor | None) -> bool:
    """Whether gradients of what is computed of them are wanted."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def values_only(*tensors: Tensor | None) -> bool:
    """Whether nobody differentiates, transforms (`torch.func`) or compiles what is computed."""
    return not (trained(*tensors) or torch.compiler.is_compiling() or transformed())


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def recorded() -> bool:
    """Whether operations are written down or counted as they run, which ours in C are not: by
    `torch.jit.trace`, or by a mode of torch's such as those of `make_fx` and `FlopCounterMode`."""
    return torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def has_memory(*tensors: Tensor | None) -> bool:
    """Whether tensors are plain numbers in memory, or on the meta device: no subclass that stands
    for something else, no view that is negated when it is read, and all on one device."""
    known = [x for x in tensors if x is not None]
    return all(type(x) in (Tensor, Parameter) and x.device == known[0].device for x in known) and (
        torch.compiler.is_compiling() or not any(x.is_neg() or x.is_sparse for x in known)
    )
