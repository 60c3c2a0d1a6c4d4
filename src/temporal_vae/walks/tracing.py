"""Layers run on shapes alone, to count the bytes that are alive at the worst moment."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from temporal_vae.network.autoencoder import Line
from temporal_vae.network.kernels.norm import Moments
from temporal_vae.network.kernels.plain import counted_for_cpu
from temporal_vae.network.layer import LONG_AGO, Layer, Past, Shape
from temporal_vae.network.primitives import own_norm
from temporal_vae.walks import gradients
from temporal_vae.walks.norm_sums import with_known

Traced = TypeVar("Traced", bound=Tensor | Moments)


@lru_cache(maxsize=16)
def tracer(dtype: torch.dtype, device: torch.device) -> Tracer:
    """The one tracer for layers of a dtype that will run on a device."""
    return Tracer(dtype, device)


class Tracer:
    """Runs layers on torch's meta device, where tensors have a shape and no memory.

    It remembers what it saw: layers with parameters of the same shapes take the same bytes.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        """`device`: where the layers will run; nothing is put there."""
        self.dtype = dtype
        self._on_cpu = device.type == "cpu"
        self._norm = _norm_on_cpu if self._on_cpu else _norm_elsewhere
        self._seen: dict[Any, list[int]] = {}
        self._seen_again: dict[Any, tuple[int, int]] = {}

    def whole(self, layer: Layer, shape: Shape, stream: bool) -> int:
        """Bytes for a layer on all it gets at once, its norms on their own."""
        return self.passes([layer], shape, [shape], stream)[-1]

    def passes(
        self, stage: Sequence[Layer], piece: Shape, crops: Sequence[Shape], stream: bool
    ) -> list[int]:
        """Bytes alive beside a piece at the worst moment of every pass over it.

        One pass for the sums of each norm, and the last for the result. `crops` are the shapes that
        are cut out of each layer's result.
        """
        key = (tuple(map(_kind, stage)), piece, tuple(crops), stream)
        if key not in self._seen:
            norms = [norm for layer in stage for norm in layer.norms()]
            self._seen[key] = [
                self._trace(stage, piece, crops, stream, norms[: index + 1], index < len(norms))
                for index in range(len(norms) + 1)
            ]
        return self._seen[key]

    def there_and_back(self, line: Line, shape: Shape) -> int:
        """Bytes beside the input at the worst moment of a whole walk and its gradients."""
        there, back, results = self._there_and_back(
            partial(_fused, line), self._empty(shape), line.parameters()
        )
        return max(there, back + results)

    def again(self, unit: Sequence[Layer], piece: Shape, norms: bool) -> tuple[int, int]:
        """Bytes alive beside a piece whose inside is computed again for gradients: on the way
        there, and on the way back beside the result and its gradient.

        `norms`: whether the piece is less than what they sum over.
        """
        key = (tuple(map(_kind, unit)), piece, norms)
        if key not in self._seen_again:
            weights = [weight for layer in unit for weight in layer.parameters()]
            found = [
                self._there_and_back(
                    partial(gradients.again, partial(_fused, one)), self._empty(piece), weights
                )
                for one in self._passes_again(unit, piece[0], norms)
            ]
            self._seen_again[key] = (max(each[0] for each in found), max(each[1] for each in found))
        return self._seen_again[key]

    def _passes_again(
        self, unit: Sequence[Layer], samples: int, norms: bool
    ) -> Iterator[Callable[[Tensor], Tensor | Moments]]:
        """What is computed of a piece: what each norm sums up, and the result."""
        known: dict[nn.Module, Moments] = {}
        for norm in unit[0].norms() if norms and unit[0].cut == "pixels" else ():
            yield partial(gradients.moments, unit[0], norm, known)
            shape = (samples, cast(int, norm.num_groups))
            sums = (torch.empty(shape, dtype=torch.float64, device="meta") for _ in range(2))
            known = {**known, norm: Moments(1, *(each.requires_grad_() for each in sums))}
        yield partial(gradients.compute, unit, norm=with_known(known))

    @torch.enable_grad()
    def _there_and_back(
        self, function: Callable[[Tensor], Tensor | Moments], x: Tensor, weights: Iterable[Tensor]
    ) -> tuple[int, int, int]:
        """The most bytes alive on the way there beside x, and back beside result and gradient; and
        the bytes of those two."""
        alive, x = LiveBytes(), x.requires_grad_()
        with alive, counted_for_cpu(self._on_cpu):
            alive.leave_out(x)
            found = function(x)
            results = (found,) if isinstance(found, Tensor) else (found.mean, found.variance)
            given = [torch.empty_like(y) for y in results]
            size, there, alive.most = 2 * sum(y.nbytes for y in results), alive.most, 0
            wanted = [x, *(weight for weight in weights if weight.requires_grad)]
            torch.autograd.grad(results, wanted, given, allow_unused=True)
            return there, alive.most - size, size

    def _trace(
        self,
        stage: Sequence[Layer],
        piece: Shape,
        crops: Sequence[Shape],
        stream: bool,
        norms: Sequence[nn.Module],
        stops: bool,
    ) -> int:
        """One pass; if it `stops`, at the last of the `norms` that it meets."""

        def norm(module: nn.Module, x: Tensor) -> Tensor:
            if stops and module is norms[-1]:
                raise StopIteration
            return self._norm(x) if module in norms else own_norm(module, x)

        alive = LiveBytes()
        with alive, counted_for_cpu(self._on_cpu), _Attention():
            for layer in stage:
                if layer.cut == "rows":  # which takes its weights frame by frame of the kernel
                    for parameter in layer.parameters():
                        alive.leave_out(parameter)
            x = self._empty(piece)
            shapes = [
                (piece[0], tail.channels, tail.frames, *tail.size(*piece[3:]))
                for tail in stage[0].tails()
                if stream
            ]
            tails = tuple(map(self._empty, shapes))
            alive.start_from_here()
            try:
                if tails:
                    counts = torch.empty(piece[0], dtype=torch.int64, device="meta")
                    stage[0].step(x, Past(counts, LONG_AGO), tails, last=False)
                else:
                    for layer, crop in zip(stage, crops, strict=True):
                        x = layer.compute(x, norm)[:, :, :, : crop[3]]
            except StopIteration:
                pass
            return alive.most

    def _empty(self, shape: Shape) -> Tensor:
        b, c, t, h, w = shape
        return torch.empty((b, t, h, w, c), dtype=self.dtype, device="meta").movedim(-1, 1)


class Results:
    """What layers give, in place of what is alive while they run: never more, and found at once."""

    def __init__(self, dtype: torch.dtype):
        self._size = dtype.itemsize

    def whole(self, layer: Layer, shape: Shape, stream: bool) -> int:
        """Bytes of what a layer gives of all it gets at once."""
        return math.prod(layer.output_shape(shape, begins=not stream)) * self._size

    def passes(
        self, stage: Sequence[Layer], piece: Shape, crops: Sequence[Shape], stream: bool
    ) -> list[int]:
        """As `Tracer.passes`, of the last pass: what is cut out of the last layer's result."""
        return [math.prod(crops[-1]) * self._size]


def _kind(layer: Layer) -> tuple[Any, ...]:
    """What layers have in common that take the same memory."""
    shapes = tuple((p.shape, p.requires_grad) for p in layer.parameters())
    declared = (layer.cut, layer.past, layer.future, layer.halo, layer.scale, layer.rate)
    return (type(layer), declared, layer.tails(), len(layer.norms()), shapes)


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


class _Attention(TorchFunctionMode):
    """Attention that holds no scores, as the kernels of every device do; on meta it would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            bias = (kwargs or {}).get("attn_mask")
            if bias is None or not bias.requires_grad:  # which no kernel has a gradient for
                return _Fused.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _fused(function: Callable[[Tensor], Traced], x: Tensor) -> Traced:
    """`function(x)` with such attention, on the way back as well, where no mode of ours is on."""
    with _Attention():
        return function(x)


class _Fused(torch.autograd.Function):
    """Attention of (B, heads, queries or keys, channels), by shapes; queries lie first."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, heads, queries, _ = q.shape
        y = q.new_empty(b, queries, heads, v.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, y, q.new_empty(b, heads, queries, dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and in `most` the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, weakref.ref[Any]] = {}
        self.most: int = 0
        self._now = self._base = 0

    def start_from_here(self) -> None:
        """Count from what is alive now."""
        self._base, self.most = self._now, 0

    def leave_out(self, x: Tensor) -> None:
        """Do not count a tensor that was there before, though operations will give views of it."""
        storage = x.untyped_storage()
        self._known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _as_on_cpu(func, args, kwargs or {})
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


def _as_on_cpu(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation; on the meta device with shapes and memory order as on the CPU."""
    x = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
    if x is not None and func is torch.ops.aten.native_layer_norm.default:
        sums = x.new_empty((*x.shape[:-1], 1))  # torch's own takes a millisecond
        return torch.empty_like(x), sums, torch.empty_like(sums)
    out = func(*args, **kwargs)
    if x is not None and func is torch.ops.aten.convolution.default:
        return out.contiguous(memory_format=torch.channels_last)
    return out
