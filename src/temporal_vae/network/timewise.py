"""Layers that see one pixel over time.

Letters: B batch, C channels, T frames, n frames of a piece, H height, W width, P pixels of a frame
(H*W).
"""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from temporal_vae.config import TemporalVAEConfig
from temporal_vae.network.folds import fold_pixels, joined, unfold_pixels, zero_frames
from temporal_vae.network.kernels.attention import attention
from temporal_vae.network.kernels.plain import values_only
from temporal_vae.network.layer import Layer, Past, Ports, State, Tail
from temporal_vae.network.primitives import (
    GroupNorm,
    Linear,
    Norm,
    PositionNorm,
    TimeConv,
    activate,
    bare,
    join,
    own_norm,
    time_norm,
    unseen,
)

# Scaled dot-product attention on CUDA refuses a batch above 65,535.
ATTENTION_BATCH = 32_768
# Queries per block of temporal attention: the band of keys stays short for any clip.
QUERY_FRAMES = 64


class Timewise(Layer):
    """A layer that sees one pixel over time, so that a walk may give it some pixels, with all
    frames of them; subclasses define `compute`, and `tails` and `step` to be walked in pieces."""

    cut = "pixels"
    width: int


def _tail(x: Tensor, frames: int, like: Tensor) -> Tensor:
    """The last frames of (B, C, T, ...), in memory of their own: a view would keep all of x."""
    kept = x[:, :, x.shape[2] - frames :]
    if torch.compiler.is_exporting():
        return kept
    kept = kept.clone(memory_format=torch.preserve_format)
    return kept.to(like.dtype)  # autocast may have widened it


def _whole(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution over time of a clip (B, C, T, H, W), between zeros."""
    time: TimeConv = cast(TimeConv, bare(conv))
    if time is conv:
        y: Tensor = conv(x, zeros=time.past, behind=time.future)
    else:
        y = conv(joined(zero_frames(x, time.past), x, zero_frames(x, time.future)))
    return y


def _step(
    conv: nn.Module, before: Tensor, x: Tensor, past: Past, last: bool
) -> tuple[Tensor, Tensor]:
    """The same for a piece behind what came `before` -> outputs, and what comes before the next.

    A convolution that looks ahead gives nothing for frames before the first of the clip.
    """
    time: TimeConv = cast(TimeConv, bare(conv))
    window, zeros = time.past + time.future, time.future if last else 0
    # where the next tail reaches into this one, or may in a graph of any length; and an adapter
    # around the convolution takes frames as they are
    joint = torch.compiler.is_exporting() or x.shape[2] < window or time is not conv
    u = joined(before.to(x.dtype), x) if joint else x
    kept = _tail(u, window, before)  # before the convolution, which scales u in float16
    if before.shape[2] + x.shape[2] + zeros <= window:
        return x[:, :, :0].clone(), kept  # a shortcut is added in place
    if time is conv:
        y: Tensor = conv(u, behind=zeros, tail=None if joint else before)
    else:
        y = conv(joined(u, zero_frames(u, zeros)))
    early = max(0, time.future - past.least) if time.future else 0  # nobody asks in vain: see Past
    return y[:, :, early:], kept


class OverTime(Timewise):
    """A convolution over time as a layer of its own."""

    past: int
    future: int

    def __init__(self, conv: nn.Module):
        super().__init__()
        time: TimeConv = cast(TimeConv, bare(conv))
        self.conv, self.width = conv, time.in_channels
        self.past, self.future = time.past, time.future

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        return _whole(self.conv, x)

    def tails(self) -> tuple[Tail, ...]:
        return (Tail(self.width, self.past + self.future),)

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        y, tail = _step(self.conv, tails[0], past.within(x), past, last)
        return y, (tail,)


class TemporalBlock(Timewise):
    """x + sigmoid(mix) * conv(silu(norm(conv(silu(norm(x)))))) over time.

    SVD's blend (1 - a) * s + a * (s + f(s)) is the same thing written longer.
    """

    ports: ClassVar[Ports] = {
        "norm1": ("stream",),
        "conv1": ("one", "branch"),
        "norm2": ("branch",),
        "conv2": ("one", "stream"),
    }

    def __init__(self, channels: int, config: TemporalVAEConfig):
        super().__init__()
        self.width = channels
        kernel, causal = config.temporal_kernel_size, config.causal_mode
        self.norm1 = time_norm(config.temporal_norm, channels, config)
        self.conv1 = TimeConv.of(channels, kernel, causal)
        self.norm2 = time_norm(config.temporal_norm, channels, config)
        self.conv2 = TimeConv.of(channels, kernel, causal)
        self.mix_factor = nn.Parameter(torch.zeros(1))
        self._ahead, self._window = self.conv1.future, kernel - 1
        if config.temporal_norm == "clip":
            self.past = self.future = None
        else:
            self.past, self.future = 2 * self.conv1.past, 2 * self.conv1.future

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        h = _whole(self.conv1, activate(norm, self.norm1, x))
        # a line of its own frees what it replaces
        h = activate(norm, self.norm2, h, spent=unseen(self.conv1))
        return self._blend(_whole(self.conv2, h), x)

    def norms(self) -> tuple[nn.Module, ...]:
        both = (self.norm1, self.norm2)
        return tuple(norm for norm in both if isinstance(norm, GroupNorm))

    def tails(self) -> tuple[Tail, ...]:
        return (Tail(self.width, self._window), Tail(self.width, self._window))

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        if self._ahead:
            return self._late_step(x, past, tails, last)
        h, kept1 = _step(self.conv1, tails[0], activate(own_norm, self.norm1, x), past, last)
        h = activate(own_norm, self.norm2, h, spent=unseen(self.conv1))
        y, kept2 = _step(self.conv2, tails[1], h, past, last)
        return self._blend(y, x), (kept1, kept2)

    def _late_step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        """`step` that looks ahead: the shortcut is late by twice that, as long as the first tail.

        So that tail holds frames before the norm. Those before the clip must be zero behind it.
        """
        first, second = tails
        seen = torch.cat([first, x], 2)
        unborn = max(0, self._window - past.least)
        u = past.within(activate(own_norm, self.norm1, seen[:, :, unborn:]), self._window)
        h, _ = _step(self.conv1, zero_frames(x, unborn), u, past, last)
        h = activate(own_norm, self.norm2, h, spent=unseen(self.conv1))
        later = past.later(self._ahead)
        y, kept = _step(self.conv2, second, later.within(h), later, last)
        late = seen[:, :, unborn : unborn + y.shape[2]]
        return self._blend(y, late), (_tail(seen, self._window, first), kept)

    def _blend(self, y: Tensor, x: Tensor) -> Tensor:
        """x + sigmoid(mix) * y, over y where nobody can see."""
        mix = torch.sigmoid(self.mix_factor).to(y.dtype)
        own = values_only(x, y, mix) and x.dtype == y.dtype and unseen(self.conv2)
        return torch.addcmul(x, y, mix, out=y) if own else torch.addcmul(x, y, mix)


class TemporalAttention(Timewise):
    """Multi-head attention among the frames of each pixel, joined to its input.

    A frame sees `reach` frames back, and as many ahead unless causal, by content and by a learned
    bias for each distance: positions are relative, so a clip may have any length.
    """

    past: int
    future: int
    held = 4
    ports: ClassVar[Ports] = {"norm": ("stream",), "to_out.0": ("one", "stream")}

    def __init__(self, channels: int, config: TemporalVAEConfig):
        super().__init__()
        self.width = channels
        reach = config.temporal_attention_reach
        self.heads = max(h for h in range(1, max(1, channels // 64) + 1) if channels % h == 0)
        self.past, self.future = reach, 0 if config.causal_mode else reach
        self.norm = PositionNorm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels, bias=False)  # softmax would cancel a bias
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(Linear(channels, channels))
        self.distance_bias = nn.Parameter(torch.zeros(self.heads, self.past + self.future + 1))

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        u = fold_pixels(self.norm(x))
        q, k, v = (self._project(u, to) for to in (self.to_q, self.to_k, self.to_v))
        y = self._mix(q, k, v, self.past, None)
        return unfold_pixels(join(y, fold_pixels(x)), x.shape[3:])

    def tails(self) -> tuple[Tail, ...]:
        seen = self.past + self.future
        # keys, values, inputs that wait for their future
        return tuple(Tail(self.width, frames) for frames in (seen, seen, self.future))

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        y, kept = self._step(fold_pixels(x), past, tuple(map(fold_pixels, tails)), last)
        size = x.shape[3:]
        return unfold_pixels(y, size), tuple(unfold_pixels(tail, size) for tail in kept)

    def _step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        """`step` of (B, C, n, P), tails likewise."""
        keys, values, waiting = tails
        seen, u = self.past + self.future, self.norm(x)
        k = torch.cat([keys, self._project(u, self.to_k)], 2)
        v = torch.cat([values, self._project(u, self.to_v)], 2)
        queue = torch.cat([waiting, x], 2)
        early = max(0, self.future - past.least) if self.future else 0
        ready = queue[:, :, early : queue.shape[2] - (0 if last else self.future)]
        kept = (
            _tail(k, seen, keys), _tail(v, seen, values), _tail(queue, self.future, waiting),
        )  # fmt: skip
        if not ready.shape[2]:
            return ready, kept
        q = self._project(self.norm(ready), self.to_q)
        hidden = past.outside(seen, k.shape[2])
        return join(self._mix(q, k, v, -early, hidden), ready), kept

    def _project(self, u: Tensor, to: nn.Module) -> Tensor:
        """A linear layer on the channels of (B, C, T, P)."""
        y: Tensor = to(u.movedim(1, -1))
        return y.movedim(-1, 1)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, shift: int, hidden: Tensor | None) -> Tensor:
        """Attention of queries (B, C, Q, P) to keys and values (B, C, K, P), sample by sample.

        Query i sees key j where `j - i + shift` is in [0, past + future], but none of the `hidden`
        ones (B, K), which stand for frames outside of the clip, unless it is itself one of them.
        """
        if torch.compiler.is_exporting():
            return self._mix_at_once(q, k, v, shift, hidden)
        pixels = max(1, ATTENTION_BATCH // self.heads)
        samples = []
        for b in range(len(q)):
            its = None if hidden is None else hidden[b]
            parts = zip(*(x[b].split(pixels, 2) for x in (q, k, v)), strict=True)
            mixed = [self._attend(qs, ks, vs, shift, its) for qs, ks, vs in parts]
            samples.append(self.to_out(torch.cat(mixed, 1)))  # (Q, P, C)
        y: Tensor = torch.stack(samples)
        return y.movedim(-1, 1)

    def _mix_at_once(
        self, q: Tensor, k: Tensor, v: Tensor, shift: int, hidden: Tensor | None
    ) -> Tensor:
        """`_mix` without loops, for a graph that serves any shape."""
        batch, heads = q.shape[0], self.heads
        q, k, v = (
            x.unflatten(1, (heads, -1)).permute(0, 1, 4, 3, 2).flatten(0, 1) for x in (q, k, v)
        )  # (B * heads, P, frames, C / heads)
        hidden = None if hidden is None else hidden[:, None, None]
        bias = self._bias(0, q.shape[2], slice(0, k.shape[2]), shift, hidden)
        bias = bias.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
        y = attention(q, k, v, bias).unflatten(0, (batch, heads))
        mixed: Tensor = self.to_out(y.permute(0, 3, 2, 1, 4).flatten(3))
        return mixed.movedim(-1, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, shift: int, hidden: Tensor | None) -> Tensor:
        """(C, Q, P) and (C, K, P) twice -> (Q, P, C); blocks of queries see their band of keys."""
        q, k, v = (
            x.unflatten(0, (self.heads, -1)).permute(3, 0, 2, 1) for x in (q, k, v)
        )  # (P, heads, frames, C / heads)
        queries, keys, width = q.shape[2], k.shape[2], self.past + self.future
        out = []
        for start in range(0, queries, QUERY_FRAMES):
            stop = min(start + QUERY_FRAMES, queries)
            band = slice(max(0, start - shift), min(keys, stop - shift + width))
            bias = self._bias(start, stop, band, shift, hidden).unsqueeze(0)
            out.append(attention(q[:, :, start:stop], k[:, :, band], v[:, :, band], bias))
        return torch.cat(out, 2).permute(2, 0, 1, 3).flatten(2)

    def _bias(
        self, start: int, stop: int, band: slice, shift: int, hidden: Tensor | None
    ) -> Tensor:
        """(..., heads, queries, keys): the learned bias of each distance, -inf out of reach.

        `hidden` of all keys, (..., K), with the batch before it if there is one.
        """
        device, width = self.distance_bias.device, self.past + self.future
        queries = torch.arange(start, stop, device=device)[:, None]
        keys = torch.arange(band.start, band.stop, device=device)[None, :]
        index = keys - queries + shift
        out_of_reach = (index < 0) | (index > width)
        if hidden is not None:
            itself = index == self.past
            out_of_reach = out_of_reach | (hidden[..., band].to(device) & ~itself)
        bias = self.distance_bias[:, index.clamp(0, width)]
        return bias.masked_fill(out_of_reach, -math.inf)
