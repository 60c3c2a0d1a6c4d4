"""The graphs of a model: which there are, what goes in and comes out, and how they are traced.

Each is a function of tensors alone. Batch, frames, height and width may vary. A step of a stream
takes its state as inputs and gives the next one as outputs, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from temporal_vae.latents import LatentDistribution, latent_channels
from temporal_vae.network.layer import Layer, PastInGraph, Tail
from temporal_vae.network.lines import AnyDecoder, AnyEncoder

UNKNOWN_LENGTH = 2**62
"""Frames of a clip that has not ended: more than any."""
TRACED = {"batch": 2, "frames": 3, "latents": 3, "rows": 5, "columns": 7}
"""The sizes that a graph is traced with: a graph takes what there is 1 of for fixed, and what is
equal for the same."""


# Sizes and tensors -----------------------------------------------------------------------------


class Size(NamedTuple):
    """A number of a tensor's shape that varies: `times` another one, and `plus`."""

    name: str
    times: int = 1
    plus: int = 0

    def __str__(self) -> str:
        text = self.name if self.times == 1 else f"{self.times}*{self.name}"
        return f"{text}{self.plus:+}" if self.plus else text

    @property
    def traced(self) -> int:
        """The size that a graph is traced with."""
        return self.times * TRACED[self.name] + self.plus

    @property
    def dim(self) -> Any:
        """The same for `torch.export`."""
        if self.name in ("frames", "latents") and self.times == 1 and not self.plus:
            return Dim.DYNAMIC  # where torch would rather see no 1, a name would be an error
        dim = Dim(self.name, min=1)
        dim = dim if self.times == 1 else self.times * dim
        return dim + self.plus if self.plus else dim


Axis = int | Size


@dataclass(frozen=True)
class Port:
    """A tensor that goes into a graph, or comes out of it."""

    name: str
    shape: tuple[Axis, ...]
    dtype: torch.dtype = torch.float32

    def example(self) -> Tensor:
        """Zeros to trace a graph with."""
        sizes = [axis.traced if isinstance(axis, Size) else axis for axis in self.shape]
        return torch.zeros(sizes, dtype=self.dtype)

    def dims(self) -> dict[int, Any]:
        """The axes that vary, for `torch.export`."""
        return {at: axis.dim for at, axis in enumerate(self.shape) if isinstance(axis, Size)}

    def next(self) -> Port:
        """What comes out for a state that goes in."""
        return Port(f"next_{self.name}", self.shape, self.dtype)


BATCH = Size("batch")


def _clip(name: str, channels: int, time: Axis, cell: int = 1) -> Port:
    """Frames (B, C, T, H, W), a latent cell being so many pixels high and wide."""
    return Port(name, (BATCH, channels, time, Size("rows", cell), Size("columns", cell)))


# Graphs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """A function of tensors, to be traced."""

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    """The clip or the piece, then the state if there is one."""
    outputs: tuple[Port, ...]
    """What is made of it, then the next state."""
    delay: int = 0
    """Of a step: frames of its result at the beginning of a stream that are of no clip."""
    note: str = ""
    """What its user has to know."""

    def traced(self) -> ExportedProgram:
        """The graph of `torch.export`."""
        return traced(self.module, self.inputs)


def traced(module: nn.Module, inputs: Sequence[Port]) -> ExportedProgram:
    """The graph of a module that takes these tensors."""
    examples = tuple(port.example() for port in inputs)
    dims = (tuple(port.dims() for port in inputs),)
    with torch.inference_mode(False), torch.no_grad():
        return torch.export.export(module, examples, dynamic_shapes=dims, strict=False)


class _Coded(nn.Module):
    """Encoding or decoding with what stands around the layers: moments, and masked channels."""

    def __init__(self, line: AnyEncoder | AnyDecoder, active: tuple[int, ...] | None):
        super().__init__()
        self.line, self.active = line, active

    def _enter(self, x: Tensor) -> Tensor:
        return x

    def _leave(self, y: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _masked(self, latent: Tensor) -> Tensor:
        return latent if self.active is None else latent_channels.mask(latent, self.active)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A whole clip."""
        (clip,) = inputs
        return self._leave(self.line(self._enter(clip)))


class Encode(_Coded):
    """Pixels -> mean and log-variance of their latents."""

    def _leave(self, y: Tensor) -> tuple[Tensor, ...]:
        found = LatentDistribution.from_moments(y)
        return tuple(self._masked(moment).contiguous() for moment in found)


class Decode(_Coded):
    """Latents -> pixels."""

    def _enter(self, x: Tensor) -> Tensor:
        return self._masked(x)

    def _leave(self, y: Tensor) -> tuple[Tensor, ...]:
        return (y.contiguous(),)


class Step(nn.Module):
    """The next piece of a stream, and its state -> what is made of it, and the next state."""

    def __init__(self, coded: _Coded, kind: StepKind):
        super().__init__()
        self.coded, self.kind = coded, kind

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        piece, *state = inputs
        counted = state[: len(self.kind.counted)]
        past, following = self._past(piece, counted)
        x, kept = self._walk(self.coded._enter(piece), past, state[len(counted) :])
        return (*self.coded._leave(x), *following, *(tail.contiguous() for tail in kept))

    def _past(self, piece: Tensor, counted: list[Tensor]) -> tuple[PastInGraph, list[Tensor]]:
        """Where in its clip the piece is, and what is remembered of that."""
        if not counted:
            return PastInGraph(piece.new_zeros(1, dtype=torch.int64), self.kind.begins), []
        taken, *length = counted
        known = [torch.where(frames > 0, frames, UNKNOWN_LENGTH) for frames in length]
        following = [taken + piece.shape[2], *(frames.clone() for frames in length)]
        return PastInGraph(taken, self.kind.begins, *known), following

    def _walk(
        self, x: Tensor, past: PastInGraph, state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        kept: list[Tensor] = []
        for layer in self.coded.line.layers():
            if not layer.tails():
                x = layer(x)
                continue
            before: Sequence[Tensor]
            if self.kind.begins:
                _, *before = layer.begin(x)
            else:  # a tail of no frames is not worth a tensor of the state
                before = [state.pop(0) if tail.frames else x[:, :, :0] for tail in layer.tails()]
            x, new = layer.step(x, past, tuple(before), last=False)
            kept += [tail for tail in new if tail.shape[2]]
            past = past.later(layer.future) if layer.future else past
        return x, kept


class StepKind(NamedTuple):
    """Which steps of a stream a graph is for, and what it counts."""

    begins: bool = False
    """Whether it is for the first piece alone, and makes the state."""
    counted: tuple[str, ...] = ()
    """Numbers for each sample in the state, before the tails."""


# Which there are -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graphs:
    """The graphs of a model, and why others that one might look for are left out."""

    graphs: tuple[Graph, ...]
    left_out: dict[str, str]

    @classmethod
    def of(cls, encoder: AnyEncoder, decoder: AnyDecoder, active: tuple[int, ...] | None) -> Graphs:
        """Those of a model, of whose latent channels some may be masked."""
        graphs, left_out = list[Graph](), dict[str, str]()
        for half in (_Half.encoding(encoder, active), _Half.decoding(decoder, active)):
            graphs.append(half.whole())
            reason = _no_steps(half)
            if reason is None:
                graphs += half.steps()
            else:
                left_out[f"{half.verb}_step"] = reason
        return cls(tuple(graphs), left_out)


def _no_steps(half: _Half) -> str | None:
    """Why there is no graph of a step, if there is none."""
    if not half.line.streams:
        return f"this model normalises over the whole clip, so it cannot {half.verb} a stream"
    if not any(layer.tails() for layer in half.line.layers()):
        return (
            f"no layer sees other frames than its own: the graph {half.verb} takes the pieces of a "
            "stream as they come, and nothing is remembered between them"
        )
    return None


@dataclass(frozen=True)
class _Half:
    """One direction of a model: what its graphs have in common."""

    verb: str
    coded: _Coded

    @classmethod
    def encoding(cls, line: AnyEncoder, active: tuple[int, ...] | None) -> _Half:
        return cls("encode", Encode(line, active))

    @classmethod
    def decoding(cls, line: AnyDecoder, active: tuple[int, ...] | None) -> _Half:
        return cls("decode", Decode(line, active))

    @property
    def line(self) -> AnyEncoder | AnyDecoder:
        return self.coded.line

    @property
    def _apart(self) -> bool:
        """Whether the first frame of a clip is taken apart."""
        return self.line.config.frames_per_latent > 1

    def whole(self) -> Graph:
        """The graph of a whole clip."""
        taken, given = self._clips(Size("latents" if self._apart else "frames"), whole=True)
        note = f"Of 2 latents or more; for an image take {self.verb}_first, and leave its state."
        return Graph(self.verb, self.coded, taken, given, note=note if self._apart else "")

    def steps(self) -> list[Graph]:
        """The graphs of the steps of a stream."""
        if not self._apart:
            note = "Every piece of a stream; all state is zeros before the first."
            return [self._step("step", Size("frames"), note)]
        return [
            self._step(
                "first", 1, "The first frame of a stream, which is one latent; or an image."
            ),
            self._step("step", Size("latents"), "Every later piece of a stream, of whole latents."),
        ]

    def _step(self, kind: str, time: Axis, note: str) -> Graph:
        """A graph for pieces of so many latents."""
        taken, given = self._clips(time)
        (_, ahead), tails = self.line.reach or (0, 0), self._tails()
        counted: tuple[str, ...] = ()
        if not self._apart:
            counted = ("taken", "length") if ahead else ("taken",)
        if ahead:
            note += (
                f" It sees {ahead} frames ahead: so many of its first results are of no clip, and "
                f"to end it put the number of frames into length, and give it {ahead} more, of "
                "zeros."
            )
        state = (*(Port(name, (BATCH,), torch.int64) for name in counted), *tails)
        step = Step(self.coded, StepKind(kind == "first", counted))
        return Graph(
            f"{self.verb}_{kind}", step,
            taken if kind == "first" else (*taken, *state),
            (*given, *(port.next() for port in state)), ahead, note,
        )  # fmt: skip

    def _clips(
        self, latents: Axis, whole: bool = False
    ) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
        """What goes in and what comes out, for so many latents along time."""
        config = self.line.config
        channels, per_latent = config.latent_channels, config.frames_per_latent
        frames = latents
        if isinstance(latents, Size):
            frames = Size(latents.name, per_latent, (1 - per_latent) * whole)
        video = _clip("video", config.input_channels, frames, config.downsample_factor)
        if self.verb == "decode":
            return (_clip("latent", channels, latents),), (video,)
        return (video,), tuple(_clip(name, channels, latents) for name in ("mean", "log_variance"))

    def _tails(self) -> Iterator[Port]:
        """What the layers remember, in order."""
        cell = self.line.config.downsample_factor if self.verb == "encode" else 1
        found = chain.from_iterable(_tails_of(self.line.layers(), cell))
        for number, (tail, scale) in enumerate(found):
            yield _clip(f"state_{number}", tail.channels, tail.frames, scale)


def _tails_of(layers: Iterator[Layer], cell: int) -> Iterator[list[tuple[Tail, int]]]:
    """The tails of each layer, and their rows for a row of latents."""
    for layer in layers:
        yield [(tail, int(cell * tail.scale)) for tail in layer.tails() if tail.frames]
        cell = int(cell * layer.scale)


# A whole reconstruction ------------------------------------------------------------------------


class Reconstruction(nn.Module):
    """`predict` alone: pixels (B, C, T, H, W) or (B, C, H, W) -> the same shape, by the mean."""

    def __init__(self, encoder: AnyEncoder, decoder: AnyDecoder, active: tuple[int, ...] | None):
        super().__init__()
        self.encoder, self.decoder, self.active = encoder, decoder, active

    def forward(self, video: Tensor) -> Tensor:
        """See the class."""
        clip = video.unsqueeze(2) if video.ndim == 4 else video
        latent = LatentDistribution.from_moments(self.encoder(clip)).mean
        if self.active is not None:
            latent = latent_channels.mask(latent, self.active)
        y: Tensor = self.decoder(latent)
        return (y.squeeze(2) if video.ndim == 4 else y).contiguous()


def reconstruction(
    encoder: AnyEncoder, decoder: AnyDecoder, active: tuple[int, ...] | None, example: Tensor
) -> ExportedProgram:
    """`torch.export` of the reconstruction; batch, frames, height and width may vary.

    A graph takes what there is 1 of for fixed, so it is traced with at least 2 of each.

    Raises `ValueError` for a model that takes the first frame of a clip apart.
    """
    if encoder.config.frames_per_latent > 1:
        raise ValueError(
            "this model takes the first frame of a clip apart, which a graph for any number of "
            "frames does not: compile it with compile() instead"
        )
    f, (samples, channels, *frames, rows, columns) = encoder.config.downsample_factor, example.shape
    least = [max(2, n) for n in (samples, *frames)], [max(2 * f, n) for n in (rows, columns)]
    (samples, *frames), sides = least
    traced = example.new_zeros(samples, channels, *frames, *sides)
    sizes = {axis: Dim.DYNAMIC for axis in range(example.ndim) if axis != 1}
    line = Reconstruction(encoder, decoder, active)
    with torch.inference_mode(False), torch.no_grad():
        return torch.export.export(line, (traced,), dynamic_shapes={"video": sizes}, strict=False)
