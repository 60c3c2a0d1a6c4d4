"""How much memory and time a walk takes, and which walk fits a budget.

Nothing is run to find out the memory: each layer is traced once on shapes alone, for the size of
piece that a walk would give it, and what is alive at the worst moment is counted. The same trace
counts operations and bytes written; how long those take here, one small probe tells.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from temporal_vae.geometry import rows_read, spans
from temporal_vae.layers import (
    Framewise,
    GroupNorm,
    Norm,
    Past,
    TemporalBlock,
    Timewise,
    own_norm,
)
from temporal_vae.network import Layer, Line
from temporal_vae.walks import bounded
from temporal_vae.walks.bounded import Bounds
from temporal_vae.walks.heap import MAPPED_BYTES

MARGIN = 0.06
"""Share of the count that is added for what it does not see: sums, slices, copies in kernels."""
KERNELS_BYTES = 32 * 2**20
"""What kernels and their threads keep for themselves, however small the walk."""
NEARLY_LEAST = 1.05
"""The least memory may be exceeded by so much for the sake of speed."""
CHUNK_BYTES = 8 * 2**20
"""A chunk of pixels, all frames and channels, is about as large: it stays in the cache."""
GROUP_BYTES = 40 * 2**20
"""Of a group before and after a layer. On a CPU, larger ones gain a few percent, and cut up the
memory of a long stream."""

Operation = Literal["encode", "decode"]
Budget = int | str | None
Offload = str | os.PathLike[str] | None
Shape = tuple[int, ...]
Part = tuple[str, int]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one input will be walked, and what that takes. Make one with `TemporalVAE.plan`."""

    operation: Operation
    shape: Shape
    """Of the input, (B, C, T, H, W); for a stream, of its largest piece."""
    dtype: torch.dtype
    stream: bool = False
    """Whether it is for the steps of a stream."""
    keep_state: bool = True
    """Whether the state before a step of the stream outlives the step."""
    bounds: Bounds | None
    """Pieces of the bounded walk; None for the whole walk."""
    peak_bytes: int
    """Largest memory in use at a time over the weights and the input, the result included, and for
    a stream the state before a step and what there is of the one after."""
    state_bytes: int = 0
    """Size of one state of the stream."""
    parts: tuple[Part, ...] = field(repr=False, default=())
    """What the peak is made of: (name, bytes)."""
    work: Work = field(repr=False, default=Work())
    """Operations counted."""
    device: torch.device
    """Where the model is."""
    network: object = field(repr=False, default=None)
    """The layout of the model."""

    @property
    def seconds(self) -> float:
        """About how long it takes; a probe of a fraction of a second tells, once a process."""
        speed = probe(self.device, self.dtype)
        return sum(n / each for n, each in zip(self.work, speed, strict=True))

    @property
    def walk(self) -> Literal["whole", "bounded"]:
        """The kind of walk."""
        return "whole" if self.bounds is None else "bounded"

    @property
    def banded(self) -> bool:
        """Whether frames are cut into bands of rows, whose edges are computed twice."""
        return self.bounds is not None and self.bounds.rows is not None

    @property
    def offload(self) -> Offload:
        """Where the clip's activation lies, if not beside the weights: "host" or a folder."""
        return None if self.bounds is None else self.bounds.offload

    def explain(self) -> str:
        """The plan in words, a line each."""
        b, c, t, h, w = self.shape
        what = f"{self.operation} {b}x{c}x{t}x{h}x{w}, {self.dtype}"
        step = ", a step of a stream" if self.stream else ""
        lines = [f"{what}: {self.walk} walk{step}"]
        if self.bounds is not None:
            pieces = f"{self.bounds.frames} frames" if self.bounds.rows is None else (
                f"bands of {self.bounds.rows} rows of a frame"
            )  # fmt: skip
            more = ", the widest activation never stored" if self.bounds.fused else ""
            if self.bounds.largest and self.bounds.frames < bounded.ENOUGH_FRAMES:
                more = f", up to {bounded.ENOUGH_FRAMES} where they are smaller"
            lines.append(f"  framewise layers: {pieces} at a time{more}")
            fewer = "" if self.bounds.channels is None else ", fewer where layers hold more"
            lines.append(f"  timewise layers: {self.bounds.pixels} pixels at a time{fewer}")
        if self.offload is not None:
            where = "the memory of the CPU" if self.offload == "host" else os.fspath(self.offload)
            lines.append(f"  the clip's activation lies in {where}")
        lines += [f"  {size / 2**20:10.1f} MiB  {name}" for name, size in self.parts]
        lines.append(f"  {self.peak_bytes / 2**20:10.1f} MiB  peak over weights and input")
        lines.append(f"  {self.seconds:10.1f} s    expected here")
        return "\n".join(lines)


class Question(NamedTuple):
    """What a plan depends on, beside the budget."""

    network: object
    """What tells the layout of the model from others."""
    operation: Operation
    shape: Shape
    dtype: torch.dtype
    stream: bool
    offload: tuple[Offload, ...]
    """Where the activation may lie, in the order of preference."""
    device: torch.device
    keep_state: bool = True


class BudgetError(ValueError):
    """A budget that cannot be met; `least` bytes can."""

    def __init__(self, message: str, least: int):
        super().__init__(message)
        self.least = least


class Planner:
    """Plans to one question, for any budget: each way to walk is counted once."""

    def __init__(self, build: Callable[[], Line], asked: Question):
        """`build` makes the network; it is called where tensors have a shape and no memory."""
        self._asked, self._tracer = asked, Tracer(asked.dtype, asked.device)
        self._shapes_alone, self._lock = FakeTensorMode(), threading.Lock()
        self._counted: dict[Bounds | None, Plan] = {}
        with self._counting():
            self._line = build()
            for module in self._line.modules():  # `.to` cannot swap parameters of no memory
                for name, parameter in list(module.named_parameters(recurse=False)):
                    shape = torch.empty_like(parameter, dtype=asked.dtype)
                    setattr(module, name, nn.Parameter(shape))

    def plan(self, budget: Budget) -> Plan:
        """The fastest plan within a budget: bytes, words such as "6GiB", "least", None for any.

        Raises `BudgetError` for a budget that cannot be met, naming the smallest that can.
        """
        with self._lock, self._counting():
            return self._fastest(budget)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """The same everywhere: inference mode and autocast hide operations, or add some."""
        with (
            torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False),
            self._shapes_alone,
        ):  # fmt: skip
            yield

    def _fastest(self, budget: Budget) -> Plan:
        asked, limit, plans = self._asked, parse_budget(budget), list[Plan]()
        for bounds in _candidates(self._line, asked):
            plan = self._counted.get(bounds) or self._count(bounds)
            if limit is None or (limit != "least" and plan.peak_bytes <= limit):
                return plan
            plans.append(plan)
        least = min(plan.peak_bytes for plan in plans)
        if limit == "least":
            return next(plan for plan in plans if plan.peak_bytes <= NEARLY_LEAST * least)
        states = (2 if asked.keep_state else 1) * plans[0].state_bytes
        state = f", of which {states} for the stream's state" if asked.stream else ""
        raise BudgetError(
            f"the budget {budget!r} is below the least that {asked.operation} of {asked.shape} "
            f"in {asked.dtype} can do with: {least} bytes ({least / 2**30:.3f} GiB){state}",
            least,
        )

    def _count(self, bounds: Bounds | None) -> Plan:
        asked = self._asked
        count = _Count(self._line, asked, bounds, self._tracer)
        parts, work = count.parts(), count.work
        if (rest := count.after_the_walk() - sum(size for _, size in parts)) > 0:
            parts.append(("what is made of the result", rest))
        margin = math.ceil(MARGIN * sum(size for _, size in parts))
        parts += [("margin", margin), ("the kernels' own", KERNELS_BYTES)]
        peak = sum(size for _, size in parts)
        walked = bounds
        if bounds is not None:
            most = peak - count.state  # which is there before the step
            walked = replace(bounds, workspace=count.workspace, most=most)
        plan = Plan(
            operation=asked.operation, shape=asked.shape, dtype=asked.dtype, stream=asked.stream,
            keep_state=asked.keep_state, bounds=walked, parts=tuple(parts),
            peak_bytes=peak, state_bytes=count.state, work=work,
            device=asked.device, network=asked.network,
        )  # fmt: skip
        self._counted[bounds] = plan
        return plan


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
            size = int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)
            if size > 0:
                return size
    elif isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    raise ValueError(
        f"a budget is a number of bytes, words such as '6GiB', 'least' or None, got {budget!r}"
    )


def _candidates(line: Line, asked: Question) -> Iterator[Bounds | None]:
    """Ways to walk, fastest first; those of one place for the activation before the next place."""
    if None in asked.offload:
        yield None
    framewise = [layer for layer in line.layers() if isinstance(layer, Framewise)]
    shapes, frames = bounded.shapes_in(framewise, (1, *asked.shape[1:])), asked.shape[2]
    height, width = max(shape[3:] for shape in shapes)
    channels = _finest_channels(line)
    pixels = max(16, CHUNK_BYTES // (frames * asked.dtype.itemsize * channels))
    largest, most = bounded.largest_of(framewise, (1, *asked.shape[1:])), frames
    if asked.device.type == "cpu":
        most = max(1, min(frames, GROUP_BYTES // (largest * asked.dtype.itemsize)))
    for offload in asked.offload:
        group = most
        while group >= 1:
            chunk = max(16, min(pixels, group * height * width // frames))
            yield Bounds(
                frames=group, largest=largest, pixels=chunk, channels=channels, offload=offload
            )
            group = group // 2
        for fused in (False, True):
            for rows in (256, 128, 64, 32, 16, 8):
                if rows < height:
                    chunk = max(16, min(pixels, rows * width // frames))
                    yield Bounds(
                        rows=rows, pixels=chunk, channels=channels, fused=fused, offload=offload
                    )


def _finest_channels(line: Line) -> int:
    """Channels of the temporal blocks where they are fewest, which is at the finest level."""
    widths = [layer.width for layer in line.layers() if isinstance(layer, TemporalBlock)]
    return min(widths, default=128)


# Bytes and work ------------------------------------------------------------------------------


class _Count:
    """What one way of walking one input has alive at its worst moment, and what it computes."""

    def __init__(self, line: Line, asked: Question, bounds: Bounds | None, tracer: Tracer):
        self.layers, self.bounds, self.tracer = list(line.layers()), bounds, tracer
        self.shape, self.size, self.stream = asked.shape, asked.dtype.itemsize, asked.stream
        self.operation = asked.operation
        self.work, self.state, self._held = Work(), 0, 0
        self._replaces = not asked.keep_state
        self._new = self._most_new = 0
        self._worst: tuple[str, int, int] = ("", 0, 0)
        self._largest: Part = ("", 0)

    def parts(self) -> list[Part]:
        """The parts of the peak; `work` and `state` are known afterwards."""
        parts = self._whole() if self.bounds is None else self._bounded(self.bounds)
        name, size, after = self._worst
        if self._held:  # at the end every layer has its next state, and one hands on what it held
            (name, size), after = self._largest, self._most_new + 2 * self._held
        parts.append((name, size))
        if self.stream:
            new = "a layer's next state" if self._replaces else "the next state"
            parts = [("the state of the stream", self.state), (new, after), *parts]
        return [(name, size) for name, size in parts if size]

    @property
    def workspace(self) -> int:
        """Bytes that pieces take at the most."""
        return self._largest[1]

    def after_the_walk(self) -> int:
        """Bytes when the layers are done: copies in the caller's layout, or moments and noise."""
        result = self._bytes(bounded.result_shape(self.layers, self.shape))
        if self.operation == "decode":
            return 2 * result
        noise = 2 * result // self.size * 4 // 2  # float32, drawn and stacked; of half the channels
        return 3 * result + noise

    def _bytes(self, shape: Shape) -> int:
        return math.prod(shape) * self.size

    def _note(self, name: str, size: int) -> None:
        """A moment: what is alive for it, beside the layers' next states so far."""
        if size > self._largest[1]:
            self._largest = (name, size)
        if size + self._new > sum(self._worst[1:]):
            self._worst = (name, size, self._new)

    def _remember(self, layer: Timewise, shape: Shape) -> None:
        if self.stream:
            b, c, _, h, w = shape
            own = self._bytes((b, c, sum(layer.tails()), h, w))
            self.state += own
            if not self._replaces:
                self._new = self.state
            elif self.bounds is None:  # a bounded walk writes over the state
                self._new = own
            self._most_new = max(self._most_new, self._new)
            self._held = max(self._held, self._bytes((b, c, layer.future or 0, h, w)))

    def _whole(self) -> list[Part]:
        shape = self.shape
        for index, layer in enumerate(self.layers):
            self._new = 0 if self._replaces else self._new
            trace = self.tracer.whole(layer, shape, self.stream)
            self.work = self.work.plus(trace.work)
            name = f"layer {index}, {type(layer).__name__}, and its input"
            self._note(name, self._bytes(shape) + trace.peak)
            if isinstance(layer, Timewise):
                self._remember(layer, shape)
            else:
                shape = bounded.shape_after([layer], shape)
        return []

    def _bounded(self, bounds: Bounds) -> list[Part]:
        batch, *sample = self.shape
        now: Shape = (1, *sample)
        for run in bounded.runs(self.layers):
            if isinstance(run, Timewise):
                self._remember(run, (batch, *now[1:]))
                self._chunks(run, now, bounds)
            else:
                self._new = 0 if self._replaces else self._new
                if bounds.rows is None:
                    self._groups(run, now, bounds)
                else:
                    self._bands(run, now, bounds)
                now = bounded.shape_after(run, now)
        self.work = Work(*(batch * n for n in self.work))
        result = self._bytes((batch, *now[1:]))
        clip, frame = bounded.arena_sizes(self.layers, self.shape, bounds)
        arenas = [] if bounds.offload is not None else [
            ("the clip's activation", clip * self.size), ("a frame's activation", frame * self.size)
        ]  # fmt: skip
        return [*arenas, ("the result", result)]

    def _chunks(self, layer: Timewise, shape: Shape, bounds: Bounds) -> None:
        _, c, t, h, w = shape
        piece: Shape = (1, c, t, 1, min(bounds.chunk(layer), h * w))
        for trace in self.tracer.passes([layer], piece, [piece], self.stream):
            self.work = self.work.plus(trace.work, h * w / piece[4])
            held = self._bytes(piece)
            if self.stream:
                held += self._bytes((1, c, sum(layer.tails()), 1, piece[4]))
            self._note(f"{piece[4]} pixels in {type(layer).__name__}", held + trace.peak)

    def _groups(self, run: list[Framewise], shape: Shape, bounds: Bounds) -> None:
        _, c, t, h, w = shape
        frames = min(bounds.group(run, shape), t)
        piece: Shape = (1, c, frames, h, w)
        in_arena = run[0] is not self.layers[0] and bounds.offload is None
        for layer in run:
            trace = self.tracer.whole(layer, piece, False)
            self.work = self.work.plus(trace.work, t / frames)
            held = 0 if in_arena else self._bytes(piece)
            self._note(f"{frames} frames in {type(layer).__name__}", held + trace.peak)
            piece, in_arena = bounded.shape_after([layer], piece), False

    def _bands(self, run: list[Framewise], shape: Shape, bounds: Bounds) -> None:
        _, c, t, h, w = shape
        now: Shape = (1, c, 1, h, w)
        assert bounds.rows is not None
        for stage in bounded.stages(run, now, bounds):
            after, name = bounded.shape_after(stage, now), type(stage[0]).__name__
            if stage[0].halo is None:
                trace = self.tracer.whole(stage[0], now, False)
                self.work = self.work.plus(trace.work, t)
                self._note(f"a frame in {name}", self._bytes(now) + trace.peak)
            else:
                middle = _middle_band(stage, now, bounds.rows)
                for trace in self.tracer.passes(stage, middle[0], middle[1:], False):
                    bands = after[3] / middle[-1][3]
                    self.work = self.work.plus(trace.work, t * bands)
                    rows = f"a band of {bounds.rows} rows in {name}"
                    self._note(rows, 2 * self._bytes(middle[0]) + trace.peak)
            now = after


def _middle_band(stage: list[Framewise], shape: Shape, rows: int) -> list[Shape]:
    """Shapes of a band in the middle of a frame: what each layer reads, and the result."""
    shapes = bounded.shapes_in(stage, shape)
    bands = spans(shapes[-1][3], rows)
    band = bands[len(bands) // 2] if len(bands) > 2 else bands[0]
    found = [(*shapes[-1][:3], band[1] - band[0], shapes[-1][4])]
    for layer, before in zip(reversed(stage), reversed(shapes[:-1]), strict=True):
        assert layer.halo is not None
        band = rows_read(band, layer.halo, layer.scale, before[3])
        found.insert(0, (*before[:3], band[1] - band[0], before[4]))
    return found


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


# Seconds -------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def probe(device: torch.device, dtype: torch.dtype) -> Work:
    """What a device does in a second, of each kind of work: convolves, writes, calls, and what
    memory that comes new from the system costs on top of being written.
    """
    with torch.no_grad():
        x = torch.ones(4, 64, 64, 128, device=device, dtype=dtype).movedim(-1, 1)
        weight = torch.ones(128, 128, 3, 3, device=device, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        large = torch.ones(2 * MAPPED_BYTES // dtype.itemsize, device=device, dtype=dtype)
        operations = 2.0 * x.numel() * weight[0].numel()
        written = x.nbytes / _seconds(device, lambda: F.silu(x))
        fresh = _seconds(device, lambda: F.silu(large)) - large.nbytes / written
        return Work(
            operations / _seconds(device, lambda: F.conv2d(x, weight, padding=1)),
            written,
            1 / _seconds(device, lambda: F.silu(x[:1, :, :1, :1])),
            large.nbytes / fresh if fresh > 0 else math.inf,
        )


def _seconds(device: torch.device, step: Callable[[], object]) -> float:
    """The median of a few runs, after one that is not counted."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times) // 2 - 1]
