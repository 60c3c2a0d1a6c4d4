"""One clip that several processes encode or decode together, each in its share of the memory.

Each process holds a part of the clip: some of the frames, in the order of the processes, or with
models whose layers see time and space together (Wan, Qwen-Image) some of the rows. It gets the same
part of the result, which is that of one process, to rounding. Started by

    torchrun --nproc-per-node 4 decode.py

this decodes a clip that no process could hold alone:

    torch.distributed.init_process_group()
    vae = TemporalVAE.from_pretrained("tiny").requires_grad_(False)
    latent = sharded.part(vae, whole_latent)         # every process has the few latents
    pixels = sharded.decode(vae, latent, memory="6GiB")
    video = sharded.gather(vae, pixels)              # on the CPU of process 0; None elsewhere

All processes call the same functions in the same order. If one of them ends, or has an error in the
middle of a walk, the others raise `RuntimeError` at once; those that live on can walk again. (On
GPUs they are told when the backend notices, at the latest after the timeout of the group.)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from temporal_vae.latents import LatentDistribution
from temporal_vae.model import TemporalVAE
from temporal_vae.network.lines import Operation
from temporal_vae.walks import sharded
from temporal_vae.walks.budget import Budget
from temporal_vae.walks.processes import Group

__all__ = ["decode", "encode", "gather", "part", "split_axis"]


def split_axis(vae: TemporalVAE) -> int:
    """The axis of (B, C, T, H, W) along which processes share a clip: 2, frames, or 3, rows."""
    return 3 if vae._runner.by_rows("decode") else 2


def part(
    vae: TemporalVAE, clip: Tensor, operation: Operation = "decode", group: Any = None
) -> Tensor:
    """This process's part of a clip (B, C, T, H, W) that every process has; a view.

    Args:
        clip: latents to decode, or pixels to encode.
        operation: which of both.
        group: of `torch.distributed`; None for all processes.

    Raises `ValueError` where a process would have nothing.
    """
    mine, axis = Group(group), split_axis(vae)
    sizes = vae._runner.parts(clip.shape[axis], operation, mine.size)
    own: Tensor = clip.split(sizes, axis)[mine.rank]
    return own


def encode(
    vae: TemporalVAE, clip: Tensor, *, memory: Budget = None, group: Any = None
) -> LatentDistribution:
    """The posterior of this process's part (B, C, T, H, W) of a clip of pixels.

    To sample it as one process would, `gather` its mean and its log-variance first.

    Args:
        clip: this process's frames, or its rows, a multiple of the model's `downsample_factor`.
        memory: what this process may take over the weights and its part; see `TemporalVAE.plan`.
        group: of `torch.distributed`; None for all processes.

    Raises:
        ValueError: in every process, for parts that do not belong together, a model that is to be
            trained, and a budget that cannot be met.
        RuntimeError: when another process has ended, or had an error in its walk.
    """
    return vae._runner.posterior(_walk(vae, clip, "encode", memory, group).contiguous())


def decode(vae: TemporalVAE, latent: Tensor, *, memory: Budget = None, group: Any = None) -> Tensor:
    """The pixels of this process's part (B, L, T, h, w) of a clip of unscaled latents.

    Arguments and errors are those of `encode`.
    """
    latent = vae._runner.mask(latent)
    return _walk(vae, latent, "decode", memory, group).contiguous()


def gather(vae: TemporalVAE, own: Tensor, group: Any = None, to: int = 0) -> Tensor | None:
    """The whole of what every process has a part of, on the CPU of process `to`; else None.

    Raises `ValueError`, in every process, for parts that do not belong together.
    """
    mine, axis, problem = Group(group), split_axis(vae), None
    if own.ndim != 5:
        problem = ValueError(f"a part of a clip is (B, C, T, H, W), got {tuple(own.shape)}")
    _stop_together(mine, own, problem)
    sizes = sharded.agreed(mine, own, axis)
    rest = own.numel() // own.shape[axis]
    here = [rest * size if mine.rank == to else 0 for size in sizes]
    parts = [own if rank == to else own.new_empty(0) for rank in range(mine.size)]
    got = mine.exchange([each.contiguous() for each in parts], here)
    if mine.rank != to:
        return None
    before, behind = own.shape[:axis], own.shape[axis + 1 :]
    whole = [x.view(*before, n, *behind).cpu() for x, n in zip(got, sizes, strict=True)]
    return torch.cat(whole, axis)


def _walk(vae: TemporalVAE, x: Tensor, operation: Operation, memory: Budget, handle: Any) -> Tensor:
    """A part of a clip through the encoder or the decoder, with the parts of the others."""
    runner, group = vae._runner, Group(handle)
    by_rows, plan, problem = runner.by_rows(operation), None, None
    try:
        _check(vae, x, operation, by_rows)
    except ValueError as error:
        problem = error
    _stop_together(group, x, problem)
    axis = 3 if by_rows else 2
    most = group.size * max(sharded.agreed(group, x, axis))  # as if all had what the largest has
    shape = (*x.shape[:axis], most, *x.shape[axis + 1 :])
    try:
        plan = runner.plan(shape, operation, x.dtype, memory, ranks=group.size)
    except ValueError as error:
        problem = error
    _stop_together(group, x, problem)
    assert plan is not None
    if plan.bounds is None:  # one process, and no bound
        return cast(Tensor, runner.line(operation)(x))
    walk = sharded.walk_rows if by_rows else sharded.walk
    with group.apart(x) as together:
        return walk(runner.line(operation), x, plan.bounds, together)


def _stop_together(group: Group, x: Tensor, problem: ValueError | None) -> None:
    """Raise this process's problem, or say that another one has one: else the others would wait."""
    stops = group.of_all(torch.tensor(problem is not None, dtype=torch.uint8, device=x.device))
    if any(flag.item() for flag in stops):
        raise problem or ValueError(
            f"process {group.rank} of {group.size} stops, since another one cannot walk its part: "
            "what that one printed says why"
        )


def _check(vae: TemporalVAE, x: Tensor, operation: Operation, by_rows: bool) -> None:
    if x.ndim != 5:
        raise ValueError(f"a part of a clip is (B, C, T, H, W), got {tuple(x.shape)}")
    if (x.dtype, x.device) != (vae.dtype, vae.device):
        raise ValueError(
            f"the part is {x.dtype} on {x.device}, the model {vae.dtype} on {vae.device}: they "
            "must be the same"
        )
    factor = vae.downsample_factor
    if operation == "encode" and by_rows and x.shape[3] % factor:
        raise ValueError(
            f"the rows of each process must be a multiple of {factor}, got {x.shape[3]}: take "
            'part(vae, clip, "encode")'
        )
