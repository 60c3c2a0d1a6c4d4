"""What every layer of a line declares and can do, so that walks never need to know which it is.

Letters: B batch, C channels, T frames, n frames of a piece, H height, W width.

Every layer takes and returns x (B, C, T, H, W) whose memory order is B T H W C
(`torch.channels_last_3d`). It can be computed in two ways:

    compute(x)                     a whole clip, or a part of one that the layer may be cut into
    step(x, past, tails, last)     the next piece of a clip, with what the layer remembers of it

and it declares how far it sees in time (`past`, `future`) and in space (`halo`), how it changes
sizes (`rate`, `scale`), along what a walk may cut its input (`cut`), the norms that sum over more
than such a part (`norms`), and what it remembers between pieces (`tails`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from temporal_vae.network.primitives import Norm, bare, own_norm

Shape = tuple[int, ...]
State = tuple[Tensor, ...]
"""Memory of a layer between the pieces of a clip: the count of frames it has taken, (B,), and its
tails, each (B, C, frames, H, W). `()` before the first piece."""
Cut = Literal["frames", "pixels", "rows"]
LONG_AGO = 2**31
"""Frames that a stream has taken where only that is known: more than any reach."""


Ports = dict[str, tuple[str, ...]]
"""Of a layer's norms and linear parts by name: by what their input and result are multiplied."""


class Tail(NamedTuple):
    """One thing that a layer remembers between pieces: the last frames of something inside it."""

    channels: int
    frames: int
    scale: Fraction = Fraction(1)
    """Its rows, and columns, for one of the layer's input."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Its height and width for an input of these."""
        times, parts = self.scale.as_integer_ratio()  # in a graph they may be symbols
        return height * times // parts, width * times // parts


class Past:
    """How many frames a layer has taken before a piece."""

    def __init__(self, counts: Tensor, least: int | None = None):
        """`counts`: of each sample, (B,). `least`: the smallest of them, where it is known."""
        self.counts, self._least = counts, least

    @property
    def least(self) -> int:
        """The smallest count as a number. Who asks waits for a GPU to have it."""
        if self._least is None:
            self._least = int(self.counts.min())
        return self._least

    @property
    def begins(self) -> bool:
        """Whether no sample has had a frame yet."""
        return self._least in (None, 0) and not bool(self.counts.any())

    def later(self, frames: int) -> Past:
        """As seen by a layer whose input is delayed by so many frames."""
        least = None if self._least is None else max(0, self._least - frames)
        return Past((self.counts - frames).clamp(min=0), least)

    def outside(self, ago: int, frames: int) -> Tensor:
        """Which of so many frames, from `ago` before the piece on, are not of the clip: (B, n)."""
        return self._index(ago, frames) < 0

    def within(self, x: Tensor, ago: int = 0) -> Tensor:
        """Frames (B, C, n, H, W) from `ago` before the piece on, zero where not of the clip."""
        return x  # a layer has only frames of the clip

    def _index(self, ago: int, frames: int) -> Tensor:
        place = torch.arange(frames, device=self.counts.device) - ago
        return place + self.counts[:, None]


class PastInGraph(Past):
    """The same for one graph that serves every step of a stream.

    It gives a frame for each that it takes. Where a layer looks ahead, there are frames before the
    first of the clip among them, and behind its last: they are zero wherever a layer reads them.
    """

    def __init__(self, counts: Tensor, begins: bool, length: Tensor | None = None):
        """`counts`: where in the clip the piece begins, negative before it, (B,).

        `begins`: whether the graph is for the first piece of streams. `length`: frames of the
        clips, (B,); None where no layer looks ahead.
        """
        # where frames make latents they are whole ones: the first frame, and pairs behind it
        super().__init__(counts, 0 if begins else LONG_AGO + 1)
        self._length = length

    @property
    def begins(self) -> bool:
        """Whether the graph is for the first piece of streams."""
        return self._least == 0

    def later(self, frames: int) -> PastInGraph:
        """As seen by a layer whose input is delayed by so many frames."""
        return PastInGraph(self.counts - frames, self.begins, self._length)

    def outside(self, ago: int, frames: int) -> Tensor:
        """See `Past`."""
        index = self._index(ago, frames)
        if self._length is None:
            return index < 0
        return (index < 0) | (index >= self._length[:, None])

    def within(self, x: Tensor, ago: int = 0) -> Tensor:
        """See `Past`."""
        if self._length is None:
            return x
        outside = self.outside(ago, x.shape[2])
        return x.masked_fill(outside[:, None, :, None, None], 0.0)


class Layer(nn.Module):
    """One layer of a line; see the module. Subclasses define `compute`, or `step`, or both."""

    past: int | None = 0
    """Frames before an output's own that it depends on; None for the whole clip."""
    future: int | None = 0
    """Frames after it; None for the whole clip."""
    halo: tuple[int, int] | None = (0, 0)
    """Input rows above and below that an output row depends on; None for the whole frame."""
    scale: Fraction = Fraction(1)
    """Output rows, and columns, for one of the input."""
    rate: Fraction = Fraction(1)
    """Output frames for one of the input."""
    cut: Cut = "rows"
    """Into what a walk may cut the input: "frames" on their own (and rows of one, with the halo),
    "pixels" with all frames of each, or "rows" of all frames, with the halo. Bounded walks do not
    cut along rows yet: such a layer takes all of a piece at once."""
    width: int | None = None
    """Channels of the input, where the state of a stream is checked against them."""
    held = 1
    """What is held for a pixel while the layer is computed, in multiples of a temporal block's."""
    ends_stream: ClassVar[bool] = False
    """Whether the residual stream ends here: what comes behind reads a norm's result."""
    ports: ClassVar[Ports] = {}
    """What float16 multiplies to keep it finite; see `set_residual_scale`."""

    def inside(self) -> tuple[Layer, ...]:
        """The layers that this one is made of, if it is: a line of them, and a shortcut around it.

        The result is that of the last but one, added to that of the last.
        """
        return ()

    def norms(self) -> tuple[nn.Module, ...]:
        """The norms that sum over more than a part that the input may be cut into, in order.

        Each is a group norm in what it offers: `num_groups`, `weight`, `bias` and `eps`.
        """
        return ()

    def tails(self) -> tuple[Tail, ...]:
        """What is remembered between the pieces of a clip; nothing if the layer sees one frame."""
        return ()

    def phase(self, taken: int) -> Hashable:
        """In which of its ways the layer goes on after so many frames: a batch has one of them.

        Layers with a `rate` take the first frame apart, and go by the number of those before.
        """
        return None

    def first_read(self, frame: int) -> int:
        """The first input frame that a late output frame depends on."""
        return math.ceil(frame / self.rate) - (self.past or 0)

    def channels(self, channels: int) -> int:
        """Output channels for input channels: the same unless a layer says otherwise."""
        return channels

    def output_shape(self, shape: Shape, begins: bool = True) -> Shape:
        """Shape of the result for a clip (B, C, T, H, W), or for the most that a later piece gives.

        `begins` is False for a piece that is not the first: layers with a `rate` take the first
        frame of a clip apart.
        """
        b, c, t, h, w = shape
        frames = math.ceil(t * self.rate)
        return (b, self.channels(c), frames, int(h * self.scale), int(w * self.scale))

    def operations(self, shape: Shape) -> int:
        """About how many multiplications a clip (B, C, T, H, W) takes."""
        b, _, t, h, w = self.output_shape(shape)
        return b * t * h * w * sum(p.numel() for p in self.parameters())

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W'): a whole clip, or a part along `cut`.

        `norm` applies the layer's `norms`: a walk that gives less than they sum over hands in one
        that knows the sums of the whole.
        """
        counts, *tails = self.begin(x)
        return self.step(x, Past(counts, 0), tuple(tails), last=True)[0]

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        """The next piece (B, C, n, H, W) -> every output whose future is known, and the new tails.

        After the `last` piece, which may have no frames, all outputs of the clip have been given.
        Neither `x` nor `tails` is changed.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W')."""
        return self.compute(x)

    def set_residual_scale(self, stream: float, branch: float = 1.0) -> None:
        """Set the factor by which this layer's input and output are scaled (float16 only).

        What is between the two norms of the layer's own branch, if it has one, is multiplied by
        `branch`. Nothing happens in a layer beside the residual stream.
        """
        factors = {"one": 1.0, "stream": stream, "branch": branch}
        for name, ports in self.ports.items():
            part = self._part(name)
            own: Any = None if part is None else bare(part)
            if hasattr(own, "set_scales"):
                own.set_scales(*(factors[port] for port in ports))

    def refuse_wrapped(self) -> None:
        """Raise `ValueError` if a part that float16 scales was replaced, or wrapped."""
        for name in self.ports:
            part = self._part(name)
            if part is not None and not hasattr(part, "set_scales"):
                raise ValueError(
                    f"in float16 these weights need their residual stream scaled, which a "
                    f"{type(part).__name__} in place of {name} does not know: use bfloat16 or "
                    "float32, or merge an adapter and take it off (merge_and_unload)"
                )

    def _part(self, name: str) -> nn.Module | None:
        return dict(self.named_modules()).get(name)

    # Streams ---------------------------------------------------------------------------------

    def begin(self, x: Tensor, zeros: Callable[..., Tensor] | None = None) -> State:
        """The state before the first piece (B, C, n, H, W), of `zeros` of a shape."""
        batch, _, _, *size = x.shape
        zeros = zeros or x.new_zeros
        empty = (
            zeros(batch, tail.frames, *tail.size(*size), tail.channels).movedim(-1, 1)
            for tail in self.tails()
        )
        return (torch.zeros(batch, dtype=torch.int64), *empty)

    def stream(self, x: Tensor | None, state: State, last: bool) -> tuple[Tensor | None, State]:
        """The next piece (B, C, n, H, W) -> what can be given so far, and the new state.

        None stands for no frames. Neither `x` nor `state` is changed.

        Raises `ValueError` when the state belongs to frames of another size, dtype or number.
        """
        if x is None:
            if not (state and last):
                return None, state
            x = self.nothing(state)
        state = state or self.begin(x)
        self.check(x, state)
        counts, *tails = state
        y, kept = self.step(x, Past(counts), tuple(tails), last)
        return (y if y.shape[2] else None), (counts + x.shape[2], *kept)

    def tail_numbers(self, shape: Shape) -> int:
        """How many numbers the tails hold for pieces (B, C, n, H, W)."""
        b, _, _, h, w = shape
        return b * sum(
            tail.channels * tail.frames * math.prod(tail.size(h, w)) for tail in self.tails()
        )

    def nothing(self, state: State) -> Tensor:
        """No frames, as (B, C, 0, H, W), for a stream of this state."""
        if len(state) != 1 + len(self.tails()):
            raise ValueError(f"the state is not one of this model: {len(state)} tensors")
        tail = state[1]
        channels = tail.shape[1] if self.width is None else self.width
        rows, columns = (int(side / self.tails()[0].scale) for side in tail.shape[3:])
        return tail.new_empty(len(tail), channels, 0, rows, columns)

    def check(self, x: Tensor, state: State) -> None:
        """Raise `ValueError` when the state belongs to frames of another size, dtype or number."""
        counts, *tails = state
        if not self._fits(x, tails):
            raise ValueError(
                "the state is not one of this model for a stream of these frames: inside the "
                f"network it has {[(*t.shape, t.dtype) for t in tails]}, and the frames are "
                f"{(*x.shape, x.dtype)}: keep one state per stream"
            )
        if self.rate != 1 and len({self.phase(taken) for taken in counts.tolist()}) > 1:
            raise ValueError(
                "streams of a batch must be at the same frame of a latent, but a layer of this "
                f"model has taken {counts.tolist()} frames of them: it takes the first one apart, "
                "and then several for each that it gives"
            )
        settled = sum(tail.frames for tail in self.tails()) if self.future else 0
        if len(set(counts.tolist() if self.future else [])) > 1 and int(counts.min()) < settled:
            raise ValueError(
                f"streams of a batch must have equal frame counts until all are past {settled} "
                f"frames, got {counts.tolist()}: a model that looks ahead starts them unevenly"
            )

    def _fits(self, x: Tensor, tails: list[Tensor]) -> bool:
        own, expected = next(self.parameters(), x), self.tails()
        mixed = torch.is_autocast_enabled(x.device.type)
        place = (x.dtype, x.device)
        if len(tails) != len(expected) or (self.width or x.shape[1]) != x.shape[1]:
            return False
        return (mixed or place == (own.dtype, own.device)) and all(
            tuple(tail.shape)
            == (x.shape[0], wanted.channels, wanted.frames, *wanted.size(*x.shape[3:]))
            and (tail.dtype, tail.device) == place
            for tail, wanted in zip(tails, expected, strict=True)
        )


def frames_back(layers: Sequence[Layer]) -> int:
    """Input frames before an output's own that it depends on, through layers in a row."""
    rate = math.prod((layer.rate for layer in layers), start=Fraction(1))
    worst, far = 0, 2**20 * rate.numerator
    for frame in range(far, far + rate.numerator):
        first = frame
        for layer in reversed(layers):
            first = layer.first_read(first)
        worst = max(worst, math.ceil(frame / rate) - first)
    return worst
