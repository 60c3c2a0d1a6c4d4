"""How much memory a walk takes, and which walk fits a budget.

Nothing is run to find out: each layer is traced once on shapes alone, for the size of piece that a
walk would give it, and what is alive at the worst moment is counted. The rest is arithmetic.
"""

from __future__ import annotations

import math
import os
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from temporal_vae.layers import Framewise, GroupNorm, Timewise, own_norm
from temporal_vae.network import Line
from temporal_vae.walks import bounded
from temporal_vae.walks.bounded import Bounds

MARGIN = 0.08
"""Share of the count that is added for what it does not see: sums, slices, kernels' own memory."""

Operation = Literal["encode", "decode"]
Budget = int | str | None
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one input will be walked, and what that takes. Make one with `TemporalVAE.plan`."""

    operation: Operation
    shape: Shape
    """Of the input: (B, C, T, H, W)."""
    dtype: torch.dtype
    bounds: Bounds | None
    """Pieces of the bounded walk; None for the whole walk."""
    peak_bytes: int
    """Largest memory in use at a time over the weights and the input, the result included."""
    parts: tuple[tuple[str, int], ...] = field(repr=False, default=())
    """What the peak is made of: (name, bytes)."""

    @property
    def walk(self) -> Literal["whole", "bounded"]:
        """The kind of walk."""
        return "whole" if self.bounds is None else "bounded"

    def explain(self) -> str:
        """The plan in words, a line each."""
        b, c, t, h, w = self.shape
        lines = [f"{self.operation} {b}x{c}x{t}x{h}x{w}, {self.dtype}: {self.walk} walk"]
        if self.bounds is not None:
            pieces = f"{self.bounds.frames} frames" if self.bounds.rows is None else (
                f"bands of {self.bounds.rows} rows of a frame"
            )  # fmt: skip
            lines.append(f"  framewise layers: {pieces} at a time")
            lines.append(f"  timewise layers: {self.bounds.pixels} pixels at a time")
            if self.bounds.arena is not None:
                lines.append(f"  the clip's activation lies in {os.fspath(self.bounds.arena)}")
        lines += [f"  {size / 2**20:10.1f} MiB  {name}" for name, size in self.parts]
        lines.append(f"  {self.peak_bytes / 2**20:10.1f} MiB  peak over weights and input")
        return "\n".join(lines)


def make_plan(
    build: Callable[[], Line],
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    budget: Budget,
) -> Plan:
    """The fastest plan within a budget: bytes, words such as "6GiB", "least", or None for any.

    `build` makes the network; it is called where tensors have a shape and no memory.

    Raises `ValueError` for a budget that cannot be met, naming the smallest that can.
    """
    with torch.no_grad(), FakeTensorMode():
        line = build()
        for module in line.modules():  # `.to` cannot swap parameters that are only shapes
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype)))
        return _fastest(line, operation, shape, dtype, budget)


def _fastest(
    line: Line, operation: Operation, shape: Shape, dtype: torch.dtype, budget: Budget
) -> Plan:
    limit = parse_budget(budget)
    smallest: Plan | None = None
    for bounds in _candidates(line, shape, limit is None):
        parts = whole_parts(line, shape, dtype) if bounds is None else (
            bounded_parts(line, shape, dtype, bounds)
        )  # fmt: skip
        parts.append(("margin", math.ceil(MARGIN * sum(size for _, size in parts))))
        plan = Plan(
            operation=operation, shape=shape, dtype=dtype, bounds=bounds, parts=tuple(parts),
            peak_bytes=sum(size for _, size in parts),
        )  # fmt: skip
        if limit is None or (limit != "least" and plan.peak_bytes <= limit):
            return plan
        if smallest is None or plan.peak_bytes < smallest.peak_bytes:
            smallest = plan
    assert smallest is not None
    if limit == "least":
        return smallest
    raise ValueError(
        f"the budget {budget!r} is below the least that {operation} of {shape} in {dtype} can do "
        f"with: {smallest.peak_bytes} bytes ({smallest.peak_bytes / 2**30:.3f} GiB)"
    )


def parse_budget(budget: Budget) -> int | Literal["least"] | None:
    """Bytes of a budget: a number, "500MiB", "6GiB", "6GB", "least" or None.

    Raises `ValueError` for anything else.
    """
    if budget is None:
        return None
    if budget == "least":
        return "least"
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]i?)?B?\s*", budget)
        if match:
            unit = match[2] or ""
            power = " kMGT".index(unit[:1] or " ")
            return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)
    elif isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    raise ValueError(
        f"a budget is a number of bytes, words such as '6GiB', 'least' or None, got {budget!r}"
    )


def _candidates(line: Line, shape: Shape, only_whole: bool) -> Iterator[Bounds | None]:
    """Ways to walk, fastest first: a chunk of pixels is about as large as the group of frames."""
    yield None
    if only_whole:
        return
    frames, (height, width) = shape[2], _largest_frame(line, shape)

    def pixels(in_group: int) -> int:
        return max(16, min(8192, in_group // frames))

    group = frames
    while group >= 1:
        yield Bounds(frames=group, pixels=pixels(group * height * width))
        group = group // 2
    for rows in (256, 128, 64, 32, 16, 8):
        if rows < height:
            yield Bounds(rows=rows, pixels=pixels(rows * width))


def _largest_frame(line: Line, shape: Shape) -> tuple[int, int]:
    """Height and width where the line is at its finest."""
    sizes = [shape[3:]]
    for layer in line.layers():
        if isinstance(layer, Framewise):
            shape = bounded.shape_after([layer], shape)
            sizes.append(shape[3:])
    height, width = max(sizes)
    return height, width


# Bytes ---------------------------------------------------------------------------------------


def whole_parts(line: Line, shape: Shape, dtype: torch.dtype) -> list[tuple[str, int]]:
    """What the whole walk has alive at its worst moment."""
    worst = ("", 0, 0)
    batch = shape[0]
    for index, layer in enumerate(line.layers()):
        held = _bytes(shape, dtype)
        extra, after = workspace(layer, shape, dtype)
        if held + extra > worst[1] + worst[2]:
            worst = (f"inside layer {index}, {type(layer).__name__}", held, extra)
        shape = (batch, *after[1:])
    return [("the clip's activation", worst[1]), (worst[0], worst[2])]


def bounded_parts(
    line: Line, shape: Shape, dtype: torch.dtype, bounds: Bounds
) -> list[tuple[str, int]]:
    """What the bounded walk has alive at its worst moment."""
    batch, *sample = shape
    now: Shape = (1, *sample)
    layers, largest, worst = list(line.layers()), 0, ("", 0)
    for run in bounded.runs(layers):
        if isinstance(run, Timewise):
            _, c, t, h, w = now
            piece: Shape = (1, c, t, 1, min(bounds.pixels, h * w))
            size = _bytes(piece, dtype) + workspace(run, piece, dtype)[0]
            name, size = f"a chunk of {piece[4]} pixels in {type(run).__name__}", size
        else:
            name, size = _run_bytes(run, now, dtype, bounds)
            if run[0] is layers[0]:
                name, size = f"{name}, and the input channels-last", size + _bytes(now, dtype)
            now = bounded.shape_after(run, now)
        largest = max(largest, _bytes(now, dtype))
        if size > worst[1]:
            worst = (name, size)
    parts = [
        ("the result", _bytes((batch, *now[1:]), dtype)),
        worst,
    ]
    if bounds.arena is None:
        parts.insert(0, ("the clip's activation", largest))
    return parts


def _run_bytes(
    run: list[Framewise], shape: Shape, dtype: torch.dtype, bounds: Bounds
) -> tuple[str, int]:
    """The worst moment of a run of framewise layers: (where, bytes), beside the arena."""
    _, c, t, h, w = shape
    frames = min(bounds.frames, t) if bounds.rows is None else 1
    piece: Shape = (1, c, frames, h, w)
    worst = ("moving a frame", _bytes((1, c, 1, h, w), dtype))
    for index, layer in enumerate(run):
        held = _bytes(piece, dtype) if index else 0  # the first reads from the arena
        after = bounded.shape_after([layer], piece)
        if bounds.rows is None or layer.halo is None:
            size = held + workspace(layer, piece, dtype)[0]
            name = f"{frames} frames in {type(layer).__name__}"
        else:
            rows = min(piece[3], math.ceil(bounds.rows / layer.scale) + sum(layer.halo))
            band: Shape = (1, piece[1], 1, rows, piece[4])
            size = held + _bytes(after, dtype) + workspace(layer, band, dtype)[0]
            name = f"a band of {bounds.rows} rows in {type(layer).__name__}"
        if size > worst[1]:
            worst = (name, size)
        piece = after
    return worst


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def workspace(layer: Framewise | Timewise, shape: Shape, dtype: torch.dtype) -> tuple[int, Shape]:
    """Bytes a layer has alive at its worst moment beside its input, and the shape it gives.

    To be called where tensors have no memory: the layer is run, and their storages are counted.
    """
    b, c, t, h, w = shape
    with _Alive() as alive:
        x = torch.empty((b, t, h, w, c), dtype=dtype).movedim(-1, 1)
        alive.start_from_here()
        if isinstance(layer, Framewise):
            y = layer.frames(x.movedim(1, -1).flatten(0, 1).movedim(-1, 1), _norm_of_shapes)
            return alive.most, (b, y.shape[1], t, *y.shape[2:])
        layer.pixels(x.movedim(1, -1).flatten(2, 3).movedim(-1, 1), _norm_of_shapes)
        return alive.most, shape


def _norm_of_shapes(module: nn.Module, x: Tensor) -> Tensor:
    """A norm's result without its sums, which take no memory to speak of."""
    if isinstance(module, (GroupNorm, Framewise)):
        return torch.empty_like(x)
    return own_norm(module, x)


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, weakref.ref[Any]] = {}
        self._now = self.most = self._base = 0

    def start_from_here(self) -> None:
        """Count from what is alive now."""
        self._base, self.most = self._now, 0

    def leave_out(self, x: Tensor) -> None:
        """Do not count a tensor that was there before, though operations will give views of it."""
        storage = x.untyped_storage()
        self._known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._take_in(leaf.untyped_storage())
        self.most = max(self.most, self._now - self._base)
        return out

    def _take_in(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._now += size
            self._known[key] = weakref.ref(storage, partial(self._let_go, key, size))

    def _let_go(self, key: int, size: int, _: object) -> None:
        del self._known[key]
        self._now -= size
