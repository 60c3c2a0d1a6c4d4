"""Layers run on shapes alone, to count the bytes that are alive."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from temporal_vae.network.autoencoder import Layer
from temporal_vae.network.framewise import Framewise
from temporal_vae.network.primitives import GroupNorm, Norm, own_norm
from temporal_vae.network.timewise import Past, Timewise
from temporal_vae.walks.heap import MAPPED_BYTES

Shape = tuple[int, ...]


class Work(NamedTuple):
    """What a walk does, as far as it takes time."""

    operations: float = 0.0
    """Floating-point operations of convolutions and matrix products."""
    written: float = 0.0
    """Bytes that operations write."""
    calls: float = 0.0
    """Operations of torch, however small."""
    fresh: float = 0.0
    """Bytes of results so large that their memory comes new from the system each time."""

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """The sum with `times` the other."""
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))


class Trace(NamedTuple):
    """One computation on shapes: bytes alive at the worst moment beside the input, and work."""

    peak: int
    work: Work


class Tracer:
    """Runs layers where tensors have no memory, and remembers what it saw."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        """`device`: where the layers will run; nothing is put there."""
        self.dtype = dtype
        self._norm = _norm_on_cpu if device.type == "cpu" else _norm_elsewhere
        self._seen: dict[Any, list[Trace]] = {}

    def whole(self, layer: Layer, shape: Shape, stream: bool) -> Trace:
        """A layer on all it gets at once, its norms on their own."""
        return self.passes([layer], shape, [shape], stream)[-1]

    def passes(
        self, stage: list[Any], piece: Shape, crops: list[Shape], stream: bool
    ) -> list[Trace]:
        """Every pass over a piece: one for the sums of each norm, and the last for the result.

        `crops` are the shapes that are cut out of each layer's result.
        """
        key = (
            tuple((type(m), tuple(p.shape for p in m.parameters())) for m in stage),
            piece, tuple(crops), stream,
        )  # fmt: skip
        if key not in self._seen:
            wanted = [norm for layer in stage for norm in layer.norms()]
            self._seen[key] = [
                self._trace(stage, piece, crops, stream, norm) for norm in (*wanted, None)
            ]
        return self._seen[key]

    def _trace(
        self,
        stage: list[Layer],
        piece: Shape,
        crops: list[Shape],
        stream: bool,
        wanted: nn.Module | None,
    ) -> Trace:
        def norm(module: nn.Module, x: Tensor) -> Tensor:
            if module is wanted:
                raise StopIteration
            if isinstance(module, (GroupNorm, Framewise)):
                return self._norm(x)
            return own_norm(module, x)

        b, c, t, h, w = piece
        with _Alive() as alive:
            x = torch.empty((b, t, h, w, c), dtype=self.dtype).movedim(-1, 1)
            tails = self._tails(stage[0], piece) if stream else ()
            alive.start_from_here()
            try:
                if isinstance(stage[0], Timewise):
                    _timewise(stage[0], x, tails, None if stream else norm)
                else:
                    frames = x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)
                    _framewise(stage, frames, crops, norm)
            except StopIteration:
                pass
            return Trace(alive.most, alive.work)

    def _tails(self, layer: Layer, shape: Shape) -> tuple[Tensor, ...]:
        if not isinstance(layer, Timewise):
            return ()
        b, c, _, h, w = shape
        return tuple(
            torch.empty((b, n, h * w, c), dtype=self.dtype).movedim(-1, 1) for n in layer.tails()
        )


def _timewise(layer: Timewise, x: Tensor, tails: tuple[Tensor, ...], norm: Norm | None) -> None:
    folded = x.movedim(1, -1).flatten(2, 3).movedim(-1, 1)
    if norm is None:
        long_ago = Past(torch.empty(len(x), dtype=torch.int64), 2**31)
        layer.advance(folded, long_ago, tails, last=False)
    else:
        layer.pixels(folded, norm)


def _framewise(stage: Iterable[Any], x: Tensor, crops: list[Shape], norm: Norm) -> None:
    for layer, crop in zip(stage, crops, strict=True):
        x = layer.frames(x, norm)
        x = x[:, :, : crop[3]]


def _norm_on_cpu(x: Tensor) -> Tensor:
    """A group norm's result without its sums, which take no memory to speak of."""
    return torch.empty_like(x)


def _norm_elsewhere(x: Tensor) -> Tensor:
    """The same with the copies in another memory order that a GPU's kernel takes and gives."""
    if x.dtype != torch.float16:
        taken, given = torch.empty_like(x), torch.empty_like(x)
        del taken
        return torch.empty_like(given)

    def one(part: Tensor) -> Tensor:  # as in `kernels.norm.group_norm_in_float32`
        wide = part.float()
        taken, given = torch.empty_like(wide), torch.empty_like(wide)
        del taken
        return given.to(x.dtype)

    return torch.cat([one(part) for part in x.split(1)])


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, the most there ever were, and the work."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, weakref.ref[Any]] = {}
        self._now = self.most = self._base = 0
        self.work = Work()

    def start_from_here(self) -> None:
        """Count from what is alive now."""
        self._base, self.most, self.work = self._now, 0, Work()

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
        self._add_work(func, args, kwargs or {}, out)
        return out

    def _add_work(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        aliases = [r.alias_info for r in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return  # a view
        sizes = [x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor)]
        fresh = 0 if any(aliases) else sum(n for n in sizes if n > MAPPED_BYTES)
        self.work = self.work.plus(Work(_operations(func, args, kwargs, out), sum(sizes), 1, fresh))

    def _take_in(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._now += size
            self._known[key] = weakref.ref(storage, partial(self._let_go, key, size))

    def _let_go(self, key: int, size: int, _: object) -> None:
        del self._known[key]
        self._now -= size


def _operations(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Floating-point operations of what multiplies matrices; nothing else counts."""
    if "scaled_dot_product" in func._schema.name:
        q, k = args[0], args[1]
        return float(4 * math.prod(q.shape) * k.shape[-2])
    formula = flop_registry.get(func._overloadpacket)
    count: float = formula(*args, **kwargs, out_val=out) if formula else 0.0
    return count
