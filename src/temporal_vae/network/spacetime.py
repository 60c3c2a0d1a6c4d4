"""Layers that see time and space at once, and the past only: of the VAEs of Wan and Qwen-Image.

Letters: B batch, C channels, T frames, n frames of a piece, H height, W width, P pixels of a frame
(H*W).

A frame depends on itself and the two before it; before the first frame of a clip stand zeros. Where
time is halved or doubled the first frame of a clip is taken apart:

    halved    y[0] = x[0];  y[k] = conv(x[2k-2], x[2k-1], x[2k])
    doubled   y[0] = x[0];  y[2k-1], y[2k] = conv(x[k-2], x[k-1], x[k]), where x[0] reads as zeros

So 1 + 2k frames are 1 + k, and back. Sources: Wan team 2025, arXiv 2503.20314; the parameters have
the names of diffusers' `AutoencoderKLWan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_exporting

from temporal_vae.geometry import rows_read, spans
from temporal_vae.network.folds import channels_last, fold_frames, joined, unfold_frames
from temporal_vae.network.framewise import (
    Framewise,
    NormSiLU,
    queries,
)
from temporal_vae.network.kernels import blocks, fused, three_taps, work
from temporal_vae.network.kernels.attention import attention
from temporal_vae.network.kernels.conv import conv2d
from temporal_vae.network.kernels.doubled import repeated
from temporal_vae.network.kernels.plain import values_only
from temporal_vae.network.layer import Layer, Past, Ports, Shape, State, Tail, frames_back
from temporal_vae.network.primitives import (
    ChannelNorm,
    Conv2d,
    Leaf,
    Norm,
    Scaled,
    activate,
    bare,
    join,
    larger,
    own_norm,
    unseen,
    watched,
)

SHORTEST = 1e-12
"""A position's channels are divided by their length, or by this where they are shorter."""
NUMBERS_AT_A_TIME = 2**22
"""Of a result, computed together: what is added up of several convolutions stays in the cache."""
PAST = 2
"""Frames before its own that a convolution sees."""


# Parts ---------------------------------------------------------------------------------------


class RMSNorm(ChannelNorm):
    """The channels of one pixel of one frame by their root mean square; x (B, C, ...)."""

    def __init__(self, channels: int, axes: int = 3):
        """`axes`: of size one behind the channels, as the weights are stored."""
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))
        self.shortest = SHORTEST

    def set_scales(self, before: float) -> None:
        """Give for an input multiplied by `before` what it gave for the input itself."""
        self.shortest = SHORTEST * before

    def _serves(self, x: Tensor) -> bool:
        return fused.serves(x, self.gamma)

    def _fused(self, x: Tensor, y: Tensor, silu: bool) -> Tensor:
        gain = self.gamma.flatten().float() * math.sqrt(x.shape[1])
        fused.by_length(x, y, gain, self.shortest, silu)
        return y

    def _plain(self, x: Tensor) -> Tensor:
        if x.dtype.itemsize > 2:
            return self._wide(x)
        if not values_only(x, self.gamma):
            return self._wide(x.float()).to(x.dtype)
        y = torch.empty_like(x)
        axis = 2 if x.ndim == 5 else 0
        for given, part in zip(y.split(1, axis), x.split(1, axis), strict=True):
            given.copy_(self._wide(part.float()))  # a frame at a time is ever that large
        return y

    def _wide(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(self.shortest)
        gain = self.gamma.reshape(-1, *[1] * (x.ndim - 2)).to(x.dtype)
        y: Tensor = x * (math.sqrt(x.shape[1]) / length)
        return y.mul_(gain) if values_only(x, gain) else y * gain


class _Frames(NamedTuple):
    """Frames (B, C, n, H, W), and those before them."""

    x: Tensor
    tail: Tensor | None

    def between(self, first: int, stop: int, step: int) -> Tensor:
        """Some of them, counted from the first of the tail: a view where they lie together."""
        known = 0 if self.tail is None else self.tail.shape[2]
        if self.tail is None or first >= known:
            return self.x[:, :, first - known : stop - known : step]
        if stop <= known:
            return self.tail[:, :, first:stop:step]
        both = _joined(self.tail[:, :, first:], self.x[:, :, : stop - known])
        return both[:, :, ::step]


class CausalConv(Scaled, nn.Conv3d):
    """A convolution over frames and pixels that sees the past, and keeps height and width.

    As one 2-D convolution for each frame of the kernel, added up: that is faster than torch's 3-D
    one and nearer to float64, and what would read zeros before the clip is left out.
    """

    bias: Tensor

    @classmethod
    def of(cls, channels: int, out: int, frames: int = 3, side: int = 3, step: int = 1) -> Self:
        """One of a kernel (frames, side, side), for every `step`-th frame."""
        pad = side // 2
        return cls(channels, out, (frames, side, side), stride=(step, 1, 1), padding=(0, pad, pad))

    @property
    def past(self) -> int:
        """Frames before an output's own that it reads."""
        return int(self.kernel_size[0]) - 1

    def forward(self, x: Tensor, zeros: int = 0, tail: Tensor | None = None) -> Tensor:
        """(B, C, n, H, W) behind so many frames of zeros, or a tail, with no copy of both together.

        With neither, what comes before the first result is in x.
        """
        x, bias = self.scales.enter(x, self), self.scales.shift(self.bias)
        if is_exporting():
            return F.conv3d(x, self.weight, bias, self.stride, self.padding)
        before = None if tail is None else self.scales.enter(tail, None).to(x.dtype)
        step, (b, _, n, h, w) = int(self.stride[0]), x.shape
        known = zeros if before is None else before.shape[2]
        frames = (n + known - self.past - 1) // step + 1
        together = frames
        if values_only(x, self.weight):
            together = max(1, NUMBERS_AT_A_TIME // (b * len(self.weight) * h * w))
        u = _Frames(x, before)
        if step == 1 and self.past == PAST and three_taps.serves(x, self.weight, bias):
            return self._over_time(u, bias, zeros)
        if frames <= together:
            return self._added(u, bias, 0, frames, zeros)
        y = blocks.new_empty(x, (b, frames, h, w, len(self.weight))).movedim(-1, 1)
        for start, stop in spans(frames, together):
            y[:, :, start:stop] = self._added(u, bias, start, stop, zeros)
        return y

    def _over_time(self, u: _Frames, bias: Tensor | None, zeros: int) -> Tensor:
        """All results, by a kernel that takes frames wherever they lie."""
        parts = [u.x] if u.tail is None else [u.tail, u.x]
        y = three_taps.over_time(parts, zeros, 0, self.weight, bias)
        taps = sum(1 + min(PAST, PAST - zeros + result) for result in range(y.shape[2]))
        work.count(y[:, :, 0], taps * self.weight[0, :, 0].numel())
        return y

    def _added(self, u: _Frames, bias: Tensor | None, start: int, stop: int, zeros: int) -> Tensor:
        """Results `start` to `stop`, by the frames of the kernel from the last one on."""
        step, y = int(self.stride[0]), None
        for k in reversed(range(self.past + 1)):
            before = max(0, zeros - k - start)  # results that have only zeros here; then step is 1
            if before >= stop - start:
                continue
            first, last = step * (start + before) + k - zeros, step * (stop - 1) + k - zeros
            read = fold_frames(u.between(first, last + 1, step))
            part = conv2d(read, self.weight[:, :, k], bias, padding=int(self.padding[1]))
            work.count(part, self.weight[0, :, k].numel())
            clip, bias = unfold_frames(part, u.x.shape[0]), None
            if y is None:
                y = clip
            elif values_only(y, clip):
                y[:, :, before:].add_(clip)
            else:
                y = y + F.pad(clip, (0, 0, 0, 0, before, 0))
        assert y is not None
        return y


def _over(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of a clip from its first frame on."""
    own = cast(CausalConv, bare(conv))
    if _knows_tails(conv):
        y: Tensor = conv(x, zeros=own.past)
        return y
    b, c, _, h, w = x.shape
    y = conv(_joined(x.new_zeros(b, own.past, h, w, c).movedim(-1, 1), x))
    return y


def _knows_tails(conv: nn.Module) -> bool:
    """Whether a convolution takes what stands before a piece apart from it.

    An adapter around it takes frames as they are, and so does a graph, which does not go by the
    number of frames.
    """
    return bare(conv) is conv and not is_exporting()


def _on(conv: nn.Module, x: Tensor, tail: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """A convolution of the next piece behind a tail -> its result, and the next tail."""
    kept = _last(tail, x)  # before the convolution: in float16 x is scaled there
    if past.begins:
        return _over(conv, x), kept
    y: Tensor = conv(x, tail=tail) if _knows_tails(conv) else conv(_joined(tail, x))
    return y, kept


def _joined(tail: Tensor, x: Tensor) -> Tensor:
    """Frames behind a tail (B, C, n, H, W)."""
    return joined(tail.to(x.dtype), x)


def _last(tail: Tensor, x: Tensor) -> Tensor:
    """The last frames of a tail and what comes behind, as many as the tail has, as its own."""
    kept = tail.shape[2]
    if is_exporting():
        return _joined(tail, x).narrow(2, x.shape[2], kept)
    if x.shape[2] < kept:
        return _joined(tail[:, :, x.shape[2] :], x).to(tail.dtype)
    # a view would keep all of x
    return channels_last(x[:, :, x.shape[2] - kept :].clone()).to(tail.dtype)


# Layers --------------------------------------------------------------------------------------


class Spacetime(Layer):
    """A layer of the past that sees other pixels too: it streams, and may be cut along rows."""

    width: int


class OverSpacetime(Spacetime):
    """A convolution over time and space as a layer of its own."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        own = cast(CausalConv, bare(conv))
        self.conv, self.width, self.past = conv, own.in_channels, own.past
        self.halo = (int(own.padding[1]), int(own.padding[1]))
        self.cut = "rows" if self.past else "frames"

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        return _over(self.conv, channels_last(x))

    def tails(self) -> tuple[Tail, ...]:
        return (Tail(self.width, self.past),) if self.past else ()

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        if not x.shape[2]:
            return x, tails
        y, tail = _on(self.conv, channels_last(x), tails[0], past)
        return y, (tail,)

    def channels(self, channels: int) -> int:
        return cast(CausalConv, bare(self.conv)).out_channels


class IntoSpacetime(OverSpacetime):
    """The convolution that the residual stream begins with."""

    ports: ClassVar[Ports] = {"conv": ("one", "stream")}

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        return super().compute(self._own(x))

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        return super().step(self._own(x), past, tails, last)

    def _own(self, x: Tensor) -> Tensor:
        """The caller's frames, copied where scales are multiplied into them."""
        conv = bare(self.conv)
        return x.clone() if isinstance(conv, Scaled) and conv.scales.after != 1.0 else x


class Unchanged(Framewise):
    """What is left of a layer whose residual branch is left out."""

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        return x


class RMSNormSiLU(NormSiLU):
    """The norm of each position, then SiLU: the end of the residual stream."""

    def norms(self) -> tuple[nn.Module, ...]:
        return ()  # it sums over the channels of one pixel


class CausalResidualBlock(Spacetime):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 shortcut where the width changes."""

    past = 2 * PAST
    halo = (2, 2)
    ports: ClassVar[Ports] = {
        "norm1": ("stream",),
        "conv1": ("one", "branch"),
        "norm2": ("branch",),
        "conv2": ("one", "stream"),
        "conv_shortcut": ("stream", "stream"),
    }

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.width, self._out = channels, out
        self.norm1 = RMSNorm(channels)
        self.conv1 = CausalConv.of(channels, out)
        self.norm2 = RMSNorm(out)
        self.conv2 = CausalConv.of(out, out)
        self.conv_shortcut = (
            CausalConv.of(channels, out, frames=1, side=1) if channels != out else None
        )

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        h = _over(self.conv1, activate(norm, self.norm1, x))
        # a line of its own frees what it replaces
        h = activate(norm, self.norm2, h, spent=unseen(self.conv1))
        return self._joined(_over(self.conv2, h), x)

    def tails(self) -> tuple[Tail, ...]:
        return (Tail(self.width, PAST), Tail(self._out, PAST))

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        if not x.shape[2]:
            return x, tails
        h, kept1 = _on(self.conv1, activate(own_norm, self.norm1, x), tails[0], past)
        h = activate(own_norm, self.norm2, h, spent=unseen(self.conv1))
        y, kept2 = _on(self.conv2, h, tails[1], past)
        del h
        return self._joined(y, x), (kept1, kept2)

    def _joined(self, y: Tensor, x: Tensor) -> Tensor:
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return join(y, x, self.conv2)

    def channels(self, channels: int) -> int:
        return self._out


class FrameAttention(Framewise):
    """Single-head attention among the pixels of each frame, joined to its input."""

    halo = None
    ports: ClassVar[Ports] = {"norm": ("stream",), "proj": ("one", "stream")}

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = Conv2d(channels, 3 * channels, 1)
        self.proj = Conv2d(channels, channels, 1)

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        tokens = self.to_qkv(norm(self.norm, x)).movedim(1, -1).flatten(1, 2).unsqueeze(1)
        q, k, v = tokens.chunk(3, -1)  # (N, 1, P, C)
        mixed = [attention(part, k, v) for part in queries(q, x.shape[0], 2)]
        together = torch.cat(mixed, 2) if len(mixed) > 1 else mixed[0]
        y = together.squeeze(1).unflatten(1, x.shape[2:]).movedim(-1, 1)
        return join(self.proj(y), x, self.proj)

    def operations(self, shape: Shape) -> int:
        b, c, t, h, w = shape
        return super().operations(shape) + 2 * b * t * c * (h * w) ** 2


def _by_frames(of: Callable[[Tensor], Tensor], x: Tensor, scale: Fraction, out: int) -> Tensor:
    """A function of frames (N, C, H, W) over a clip (B, C, T, H, W), a few frames at a time."""
    b, _, t, h, w = x.shape
    if not values_only(x, *cast(nn.Module, of).parameters()):
        return unfold_frames(of(fold_frames(x)), b)
    h, w = int(h * scale), int(w * scale)
    together = max(1, NUMBERS_AT_A_TIME // (b * out * h * w))
    if t <= together:
        return unfold_frames(of(fold_frames(x)), b)
    y = blocks.new_empty(x, (b, t, h, w, out)).movedim(-1, 1)
    for start, stop in spans(t, together):
        y[:, :, start:stop] = unfold_frames(of(fold_frames(x[:, :, start:stop])), b)
    return y


class _Repeated(Leaf):
    """Each pixel four times."""

    def forward(self, x: Tensor) -> Tensor:
        return repeated(x)


class _Larger(nn.Sequential):
    """Each pixel four times, then 3x3."""

    def forward(self, x: Tensor) -> Tensor:
        enlarge, conv = self
        if watched(enlarge):
            y: Tensor = conv(enlarge(x))
            return y
        return larger(x, conv)


class SpacetimeDownsample(Spacetime):
    """Halve height and width, and then the frames too, the first one apart, if `time`."""

    halo = (0, 1)
    scale = Fraction(1, 2)
    ports: ClassVar[Ports] = {
        "resample.1": ("stream", "stream"), "time_conv": ("stream", "stream"),
    }  # fmt: skip

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.width = channels
        padded = nn.ZeroPad2d((0, 1, 0, 1))  # below and on the right only
        self.resample = nn.Sequential(padded, Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv.of(channels, channels, side=1, step=2) if time else None
        self.cut = "rows" if time else "frames"
        if time:
            self.past, self.rate = PAST, Fraction(1, 2)

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        y = _by_frames(self.resample, x, self.scale, self.width)
        return self._halved(y, y[:, :, 1:1], 0)

    def tails(self) -> tuple[Tail, ...]:
        return (Tail(self.width, PAST, self.scale),) if self.time_conv is not None else ()

    def phase(self, taken: int) -> Hashable:
        return taken > 0, taken % 2

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        if not x.shape[2]:
            return x, tails
        y = _by_frames(self.resample, x, self.scale, self.width)
        if self.time_conv is None:
            return y, ()
        # of the two frames before, those from the last even one on are read
        before = tails[0][:, :, past.least % 2 :] if past.least else y[:, :, :0]
        return self._halved(y, before, past.least), (_last(tails[0], y),)

    def _halved(self, x: Tensor, before: Tensor, taken: int) -> Tensor:
        """Every other frame of those behind what was `taken` `before`."""
        if self.time_conv is None:
            return x
        u = _joined(before, x) if before.shape[2] else x
        y = self.time_conv(u) if u.shape[2] > PAST else None
        first = [] if taken else [x[:, :, :1]]
        found = [*first, *([] if y is None else [y])]
        if not found:
            return x[:, :, :0]
        return _joined(*found) if len(found) > 1 else found[0].clone() if y is None else found[0]


class SpacetimeUpsample(Spacetime):
    """Double the frames, the first one apart, if `time`; then height and width."""

    halo = (1, 1)
    scale = Fraction(2)
    ports: ClassVar[Ports] = {
        "time_conv": ("stream", "stream"), "resample.1": ("stream", "stream"),
    }  # fmt: skip

    def __init__(self, channels: int, out: int, time: bool):
        super().__init__()
        self.width, self._out = channels, out
        self.resample = _Larger(_Repeated(), Conv2d(channels, out, 3, padding=1))
        self.time_conv = CausalConv.of(channels, 2 * channels, side=1) if time else None
        self.cut = "rows" if time else "frames"
        if time:
            self.past, self.rate = PAST, Fraction(2)

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        return _by_frames(self.resample, self.more_frames(x), self.scale, self._out)

    def channels(self, channels: int) -> int:
        return self._out

    def output_shape(self, shape: Shape, begins: bool = True) -> Shape:
        b, c, t, h, w = super().output_shape(shape, begins)
        return (b, c, t - int(begins and self.rate > 1), h, w)

    def tails(self) -> tuple[Tail, ...]:
        return (Tail(self.width, PAST),) if self.time_conv is not None else ()

    def phase(self, taken: int) -> Hashable:
        return taken > 0

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        if not x.shape[2]:
            return x, tails
        kept: State = ()
        if self.time_conv is not None:
            begins = past.least == 0
            kept = (_last(tails[0], x[:, :, int(begins) :]),)  # the first frame reads as zeros
            x = self.more_frames(x) if begins else self._doubled(_joined(tails[0], x), 0)
        return _by_frames(self.resample, x, self.scale, self._out), kept

    def more_frames(self, x: Tensor) -> Tensor:
        """A clip with its frames doubled, the first one apart; as it is without `time`."""
        if self.time_conv is None:
            return x
        rest = x[:, :, 1:]
        return _joined(x[:, :, :1], self._doubled(rest, PAST)) if rest.shape[2] else x

    def _doubled(self, u: Tensor, zeros: int) -> Tensor:
        """Two frames for each, which lie beside each other as channels."""
        if zeros:
            y = _over(cast(CausalConv, self.time_conv), u)
        else:
            y = cast(CausalConv, self.time_conv)(u)
        pairs: Tensor = y.movedim(1, -1).unflatten(-1, (2, self.width))  # (B, n, H, W, 2, C)
        return pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).movedim(-1, 1)


class Patches(Framewise):
    """Squares of pixels as the channels of one: (C, H, W) -> (C * p * p, H / p, W / p)."""

    def __init__(self, side: int):
        super().__init__()
        self.side, self.scale = side, Fraction(1, side)

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        n, c, h, w = x.shape
        p = self.side
        squares = x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 5, 3)
        return squares.reshape(n, h // p, w // p, c * p * p).movedim(-1, 1)

    def channels(self, channels: int) -> int:
        return channels * self.side**2


class Unpatched(Framewise):
    """Channels as squares of pixels: the inverse of `Patches`."""

    def __init__(self, side: int):
        super().__init__()
        self.side, self.scale = side, Fraction(side)

    def frames(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        n, c, h, w = x.shape
        p = self.side
        pixels = x.reshape(n, c // p**2, p, p, h, w).permute(0, 4, 3, 5, 2, 1)
        return pixels.reshape(n, h * p, w * p, c // p**2).movedim(-1, 1)

    def channels(self, channels: int) -> int:
        return channels // self.side**2


# A shortcut over a level ---------------------------------------------------------------------


class MeanShortcut(Spacetime):
    """Means over frames, squares of pixels and channels: around a level that makes less of them.

    The frames before the first read as zeros.
    """

    def __init__(self, channels: int, out: int, frames: int, side: int):
        super().__init__()
        self.width, self._out, self._frames, self._side = channels, out, frames, side
        self.scale, self.rate = Fraction(1, side), Fraction(1, frames)

    def tails(self) -> tuple[Tail, ...]:
        return (Tail(self.width, self._frames - 1),) if self._frames > 1 else ()

    def phase(self, taken: int) -> Hashable:
        return taken % self._frames

    def first_read(self, frame: int) -> int:
        return self._frames * (frame - 1) + 1

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        waiting = self._frames - 1
        return self._of_whole(F.pad(x, (0, 0, 0, 0, waiting, 0)) if waiting else x)

    def channels(self, channels: int) -> int:
        return self._out

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        if not tails:
            return self._means(x), ()
        waiting = (past.least + self._frames - 1) % self._frames
        u = _joined(tails[0][:, :, tails[0].shape[2] - waiting :], x)
        return self._of_whole(u), (_last(tails[0], x),)

    def _of_whole(self, u: Tensor) -> Tensor:
        """Means of as many frames as make whole ones."""
        return self._means(u[:, :, : u.shape[2] // self._frames * self._frames])

    def _means(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        f, s = self._frames, self._side
        parts = x.reshape(b, c, t // f, f, h // s, s, w // s, s).permute(0, 2, 4, 6, 1, 3, 5, 7)
        group = c * f * s * s // self._out
        groups = parts.reshape(b, t // f, h // s, w // s, self._out, group)
        return groups.mean(-1).movedim(-1, 1)


class RepeatShortcut(Spacetime):
    """Channels repeated, then laid out as frames and squares of pixels: around a level that makes
    more of them. The first frame of a clip gives one only."""

    def __init__(self, channels: int, out: int, frames: int, side: int):
        super().__init__()
        self.width, self._out, self._frames, self._side = channels, out, frames, side
        self.scale, self.rate = Fraction(side), Fraction(frames)

    def phase(self, taken: int) -> Hashable:
        return taken > 0

    def channels(self, channels: int) -> int:
        return self._out

    def output_shape(self, shape: Shape, begins: bool = True) -> Shape:
        b, c, t, h, w = super().output_shape(shape, begins)
        return (b, c, t - (self._frames - 1) * begins, h, w)

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        return self._repeated(x)[:, :, self._frames - 1 :]

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        return (self._repeated(x) if past.least else self.compute(x)), ()

    def _repeated(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        f, s = self._frames, self._side
        wide: Tensor = x.movedim(1, -1).repeat_interleave(self._out * f * s * s // c, -1)
        parts = wide.reshape(b, t, h, w, self._out, f, s, s).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return parts.reshape(b, t * f, h * s, w * s, self._out).movedim(-1, 1)


class Fork(Spacetime):
    """A line of layers, and a shortcut around all of them that is added to its result."""

    avg_shortcut: Spacetime

    def main(self) -> tuple[Layer, ...]:
        """The layers, in order."""
        raise NotImplementedError

    def inside(self) -> tuple[Layer, ...]:
        return (*self.main(), self.avg_shortcut)

    def _declare(self) -> None:
        """Take what is declared from the layers inside."""
        main = self.main()
        self.width = self.avg_shortcut.width
        self.scale, self.rate = self.avg_shortcut.scale, self.avg_shortcut.rate
        self.past = max(frames_back(main), frames_back([self.avg_shortcut]))
        self.halo = _common_halo(main, self.scale)

    def channels(self, channels: int) -> int:
        return self.avg_shortcut.channels(channels)

    def output_shape(self, shape: Shape, begins: bool = True) -> Shape:
        return self.avg_shortcut.output_shape(shape, begins)

    def operations(self, shape: Shape) -> int:
        total = 0
        for layer in self.main():
            total, shape = total + layer.operations(shape), layer.output_shape(shape)
        return total

    def tails(self) -> tuple[Tail, ...]:
        return tuple(tail for layer in self.inside() for tail in layer.tails())

    def phase(self, taken: int) -> Hashable:
        return tuple(layer.phase(taken) for layer in self.inside())

    def first_read(self, frame: int) -> int:
        first = frame
        for layer in reversed(self.main()):
            first = layer.first_read(first)
        return min(first, self.avg_shortcut.first_read(frame))

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        y = x
        for layer in self.main():
            y = layer(y) if norm is own_norm else layer.compute(y, norm)
        return self._added(y, self.avg_shortcut.compute(x))

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        if not x.shape[2]:
            return x, tails
        y, rest, kept = x, list(tails), list[Tensor]()
        for layer in self.main():
            if own := layer.tails():
                # none of them stands behind a change of rate, so the count is the fork's own
                y, new = layer.step(y, past, tuple(rest[: len(own)]), last)
                rest, kept = rest[len(own) :], [*kept, *new]
            else:
                y = layer.compute(y)
        z, new = self.avg_shortcut.step(x, past, tuple(rest), last)
        return self._added(y, z), (*kept, *new)

    def _added(self, y: Tensor, z: Tensor) -> Tensor:
        return y + z if watched(self.main()[-1]) or not values_only(y, z) else y.add_(z)

    def set_residual_scale(self, stream: float, branch: float = 1.0) -> None:
        for layer in self.main():
            layer.set_residual_scale(stream, branch)

    def refuse_wrapped(self) -> None:
        for layer in self.main():
            layer.refuse_wrapped()


def _common_halo(layers: Sequence[Layer], scale: Fraction) -> tuple[int, int]:
    """Rows above and below that layers in a row read, whole steps of those that make fewer."""
    rows = inner = (2**10, 2**11)
    for layer in reversed(layers):
        assert layer.halo is not None
        rows = rows_read(rows, layer.halo, layer.scale, 2**20)
    above, below = int(inner[0] / scale) - rows[0], rows[1] - math.ceil(inner[1] / scale)
    step = scale.denominator
    return -(-above // step) * step, -(-below // step) * step


class DownFork(Fork):
    """Residual blocks and the halving behind them, and a shortcut around the level (Wan 2.2)."""

    def __init__(self, channels: int, out: int, blocks: int, time: bool, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            CausalResidualBlock(out if index else channels, out) for index in range(blocks)
        )
        self.downsampler = None if last else SpacetimeDownsample(out, time)
        self.avg_shortcut = MeanShortcut(channels, out, 1 + time, 1 if last else 2)
        self._declare()

    def main(self) -> tuple[Layer, ...]:
        down = () if self.downsampler is None else (self.downsampler,)
        return (*cast(Sequence[Layer], self.resnets), *down)


class UpFork(Fork):
    """Residual blocks and the doubling behind them, and a shortcut around the level (Wan 2.2)."""

    def __init__(self, channels: int, out: int, blocks: int, time: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            CausalResidualBlock(out if index else channels, out) for index in range(blocks)
        )
        self.upsampler = SpacetimeUpsample(out, out, time)
        self.avg_shortcut = RepeatShortcut(channels, out, 1 + time, 2)
        self._declare()

    def main(self) -> tuple[Layer, ...]:
        return (*cast(Sequence[Layer], self.resnets), self.upsampler)
