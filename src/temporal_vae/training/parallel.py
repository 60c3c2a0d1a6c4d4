"""Several processes that train one model: started by `torchrun`, one for each device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from temporal_vae.model import TemporalVAE
from temporal_vae.network.layer import Layer
from temporal_vae.training.data import Share

Strategy = Literal["ddp", "fsdp"]
M = TypeVar("M", bound=nn.Module)


@contextmanager
def processes(device: torch.device) -> Iterator[Share]:
    """Join the processes that `torchrun` has started; alone without it.

    With CUDA each takes the device of its own number. They talk by NCCL there, and gloo elsewhere.
    """
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield Share()
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Share(dist.get_rank(), dist.get_world_size())
    finally:
        if ours:
            dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The device of this process: with CUDA, the one of its number on this machine."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def spread(model: TemporalVAE) -> None:
    """Split every layer's parameters over the processes (FSDP2), before optimizers are made."""
    from torch.distributed.fsdp import fully_shard

    for line in (model.encoder, model.decoder):
        for module in line.modules():  # not `layers()`, which wraps the line's own convolutions
            if isinstance(module, Layer):
                fully_shard(module)
        fully_shard(line)


def data_parallel(module: M, share: Share, strategy: Strategy) -> M | nn.Module:
    """The module with gradients averaged over processes (DDP), where there are several."""
    trained = any(p.requires_grad for p in module.parameters())
    if share.of == 1 or strategy == "fsdp" or not trained:
        return module
    return nn.parallel.DistributedDataParallel(module)


def mean_over_processes(
    values: dict[str, Tensor], share: Share, device: torch.device
) -> dict[str, float]:
    """Scalars as numbers, averaged over processes; on their device, as NCCL wants it."""
    stacked = torch.stack([value.detach().to(device).float() for value in values.values()])
    if share.of > 1:
        dist.all_reduce(stacked)
        stacked /= share.of
    return dict(zip(values, stacked.tolist(), strict=True))


def mean_gradient(gradient: Tensor, share: Share) -> Tensor:
    """The mean of a gradient over processes."""
    if share.of == 1:
        return gradient
    mean = gradient.clone()
    dist.all_reduce(mean)
    return mean / share.of


def agreed(value: float, share: Share, device: torch.device) -> float:
    """The number of process 0, on all of them: they must save, and stop, at the same step."""
    if share.of == 1:
        return value
    told = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    return float(told)
