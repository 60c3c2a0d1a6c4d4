"""Layers that see one pixel over time.

Letters: B batch, C channels, T frames, n frames of a piece, H height, W width, P pixels of a frame
(H*W).

In the memory order of a clip, B T H W C, its pixels fold into one axis, (B, C, T, P), as a view
that is channels-last: a convolution over time is one over (T, P) with a kernel of one pixel.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temporal_vae.config import TemporalVAEConfig
from temporal_vae.network.layer import Layer, Past, Ports, State, Tail
from temporal_vae.network.primitives import (
    GroupNorm,
    Linear,
    Norm,
    PositionNorm,
    Scaled,
    own_norm,
    silu,
    time_norm,
)

# Scaled dot-product attention on CUDA refuses a batch above 65,535.
ATTENTION_BATCH = 32_768
# Queries per block of temporal attention: the band of keys stays short for any clip.
QUERY_FRAMES = 64


class Timewise(Layer):
    """A layer that sees one pixel over time; subclasses define `pixels` and how far they see.

    What can be walked in pieces also defines `tails` and `step_pixels`.
    """

    cut = "pixels"
    width: int

    def pixels(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        """(B, C, T, P) -> (B, C, T, P), each of the P pixels on its own."""
        raise NotImplementedError

    def step_pixels(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        """`step` of (B, C, n, P), tails likewise."""
        raise NotImplementedError

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        return unfold_pixels(self.pixels(fold_pixels(x), norm), x.shape[3:])

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        """The next piece (B, C, n, H, W) -> what is certain by now, and the new tails."""
        size, folded = x.shape[3:], tuple(map(fold_pixels, tails))
        y, kept = self.step_pixels(fold_pixels(x), past, folded, last)
        return unfold_pixels(y, size), tuple(unfold_pixels(tail, size) for tail in kept)


def fold_pixels(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T, P), a view."""
    return x.movedim(1, -1).flatten(2, 3).movedim(-1, 1)


def unfold_pixels(y: Tensor, size: torch.Size) -> Tensor:
    """(B, C, T, P) -> (B, C, T, H, W), channels-last; a view if it was."""
    y = y.contiguous(memory_format=torch.channels_last).movedim(1, -1)
    clip: Tensor = y.unflatten(2, size).movedim(-1, 1)
    return clip


def _tail(x: Tensor, frames: int) -> Tensor:
    """The last frames of (B, C, T, P), in memory of their own: a view would keep all of x."""
    return x[:, :, x.shape[2] - frames :].clone(memory_format=torch.preserve_format)


class TimeConv(Scaled, Timewise):
    """A (k, 1, 1) convolution; zeros stand before the clip and, unless causal, after it.

    The weight keeps the five dimensions it has in checkpoints.
    """

    past: int
    future: int

    def __init__(self, channels: int, kernel: int, causal: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel, 1, 1))
        self.bias = nn.Parameter(torch.empty(channels))
        self.width = channels
        self.past = kernel - 1 if causal else kernel // 2
        self.future = kernel - 1 - self.past

    def pixels(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        return self.scaled(x, None)

    def scaled(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """The convolution times `gain`, which costs nothing: it goes into the weights."""
        weight, bias = self._weights(gain)
        x = self.scales.enter(x)
        if self.past == self.future:
            return F.conv2d(x, weight, bias, padding=(self.past, 0))
        return F.conv2d(F.pad(x, (0, 0, self.past, self.future)), weight, bias)

    def tails(self) -> tuple[Tail, ...]:
        return (Tail(self.width, self.past + self.future),)

    def step_pixels(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        y, tail = self.step_scaled(x, past, tails[0], last, None, None)
        return y, (tail,)

    def step_scaled(
        self,
        x: Tensor,
        past: Past,
        tail: Tensor,
        last: bool,
        norm: nn.Module | None,
        gain: Tensor | None,
        raw: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`step_pixels` of the convolution times `gain`, behind norm and SiLU: (outputs, new tail).

        The tail holds what is convolved, ready to read, and starts as the zeros of the padding.
        With `raw`, the tail stores frames before the norm, for the delayed shortcut. Frames before
        the clip must be zero *after* the norm, so they are padded there.
        """
        weight, bias = self._weights(gain)
        age = past.least if self.future else 0  # nobody else asks: it would break a graph
        if raw and norm is not None:
            kept = torch.cat([tail, x], 2)
            unborn = max(0, tail.shape[2] - age)
            u = self.scales.enter(silu(norm(kept[:, :, unborn:])))
            u = F.pad(u, (0, 0, unborn, 0)) if unborn else u
        else:
            u = kept = self._behind(tail, x, norm)
        u = F.pad(u, (0, 0, 0, self.future)) if last and self.future else u
        early = max(0, self.future - age)
        y = (
            F.conv2d(u, weight, bias)[:, :, early:]
            if u.shape[2] >= weight.shape[2]
            else x[:, :, :0].clone()  # a shortcut is added in place
        )
        return y, _tail(kept, tail.shape[2]).to(tail.dtype)  # autocast may have widened it

    def _behind(self, tail: Tensor, x: Tensor, norm: nn.Module | None) -> Tensor:
        """The input of the convolution, behind the tail of what came before."""
        if norm is None:
            return torch.cat([tail, self.scales.enter(x)], 2)
        x = norm(x)
        graph = x.requires_grad or tail.requires_grad or torch.compiler.is_compiling()
        if graph or x.dtype != tail.dtype:
            return torch.cat([tail, self.scales.enter(silu(x))], 2)
        b, c, n, p = x.shape  # SiLU puts it there: a copy less
        u = x.new_empty(b, tail.shape[2] + n, p, c).movedim(-1, 1)
        u[:, :, : tail.shape[2]] = tail
        new = u[:, :, tail.shape[2] :]
        self.scales.enter(torch.ops.aten.silu.out(x, out=new))
        return u

    def _weights(self, gain: Tensor | None) -> tuple[Tensor, Tensor]:
        weight: Tensor = self.weight.squeeze(-1)
        bias = self.scales.shift(self.bias)
        return (weight, bias) if gain is None else (weight * gain, bias * gain)


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
        self.conv1 = TimeConv(channels, kernel, causal)
        self.norm2 = time_norm(config.temporal_norm, channels, config)
        self.conv2 = TimeConv(channels, kernel, causal)
        self.mix_factor = nn.Parameter(torch.zeros(1))
        if config.temporal_norm == "clip":
            self.past = self.future = None
        else:
            self.past, self.future = 2 * self.conv1.past, 2 * self.conv1.future

    def pixels(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        h = self.conv1.pixels(silu(norm(self.norm1, x)))
        h = silu(norm(self.norm2, h))
        h = self.conv2.scaled(h, torch.sigmoid(self.mix_factor))
        return h.add_(x)

    def norms(self) -> tuple[nn.Module, ...]:
        both = (self.norm1, self.norm2)
        return tuple(norm for norm in both if isinstance(norm, GroupNorm))

    def tails(self) -> tuple[Tail, ...]:
        return self.conv1.tails() + self.conv2.tails()

    def step_pixels(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        first, second = tails
        ahead, mix = self.conv1.future, torch.sigmoid(self.mix_factor)
        h, kept1 = self.conv1.step_scaled(x, past, first, last, self.norm1, None, raw=ahead > 0)
        later = past.later(ahead) if ahead else past
        y, kept2 = self.conv2.step_scaled(h, later, second, last, self.norm2, mix)
        if ahead:  # the shortcut is late by twice the reach ahead: as long as the first tail
            waiting = first[:, :, max(0, first.shape[2] - past.least) :][:, :, : y.shape[2]]
            y[:, :, : waiting.shape[2]].add_(waiting)
            y[:, :, waiting.shape[2] :].add_(x[:, :, : y.shape[2] - waiting.shape[2]])
            return y, (kept1, kept2)
        return y.add_(x), (kept1, kept2)


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

    def pixels(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        u = self.norm(x)
        q, k, v = (self._project(u, to) for to in (self.to_q, self.to_k, self.to_v))
        if torch.compiler.is_exporting():
            return self._mix_at_once(q, k, v).add_(x)
        return self._mix(q, k, v, self.past, None).add_(x)

    def tails(self) -> tuple[Tail, ...]:
        seen = self.past + self.future
        # keys, values, inputs that wait for their future
        return tuple(Tail(self.width, frames) for frames in (seen, seen, self.future))

    def step_pixels(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        keys, values, waiting = tails
        seen, u = self.past + self.future, self.norm(x)
        k = torch.cat([keys, self._project(u, self.to_k)], 2)
        v = torch.cat([values, self._project(u, self.to_v)], 2)
        queue = torch.cat([waiting, x], 2)
        early = max(0, self.future - past.least) if self.future else 0
        ready = queue[:, :, early : queue.shape[2] - (0 if last else self.future)]
        kept = (
            _tail(k, seen).to(keys.dtype),  # autocast may have widened them
            _tail(v, seen).to(values.dtype),
            _tail(queue, self.future),
        )
        if not ready.shape[2]:
            return ready, kept
        q = self._project(self.norm(ready), self.to_q)
        # frame 0 of the keys stands `seen - counts` frames before the first of the clip
        return self._mix(q, k, v, -early, seen - past.counts).add_(ready), kept

    def _project(self, u: Tensor, to: nn.Module) -> Tensor:
        """A linear layer on the channels of (B, C, T, P)."""
        y: Tensor = to(u.movedim(1, -1))
        return y.movedim(-1, 1)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, shift: int, unborn: Tensor | None) -> Tensor:
        """Attention of queries (B, C, Q, P) to keys and values (B, C, K, P), sample by sample.

        Query i sees key j where `j - i + shift` is in [0, past + future], but none of a sample's
        first `unborn` keys (B,), which stand for frames before the clip.
        """
        pixels = max(1, ATTENTION_BATCH // self.heads)
        samples = []
        for b in range(len(q)):
            hidden = None if unborn is None else unborn[b]
            parts = zip(*(x[b].split(pixels, 2) for x in (q, k, v)), strict=True)
            mixed = [self._attend(qs, ks, vs, shift, hidden) for qs, ks, vs in parts]
            samples.append(self.to_out(torch.cat(mixed, 1)))  # (Q, P, C)
        y: Tensor = torch.stack(samples)
        return y.movedim(-1, 1)

    def _mix_at_once(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`_mix` of a whole clip (B, C, T, P) without loops, for a graph that serves any shape."""
        frames, size = q.shape[2], (q.shape[0], q.shape[3])
        q, k, v = (
            x.unflatten(1, (self.heads, -1)).permute(0, 4, 1, 3, 2).flatten(0, 1) for x in (q, k, v)
        )  # (B * P, heads, T, C / heads)
        bias = self._bias(0, frames, slice(0, frames), self.past, None)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed: Tensor = self.to_out(y.unflatten(0, size).permute(0, 3, 1, 2, 4).flatten(3))
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
            bias = self._bias(start, stop, band, shift, hidden)
            out.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:stop], k[:, :, band], v[:, :, band], attn_mask=bias
                )
            )
        return torch.cat(out, 2).permute(2, 0, 1, 3).flatten(2)

    def _bias(
        self, start: int, stop: int, band: slice, shift: int, hidden: Tensor | None
    ) -> Tensor:
        """(1, heads, queries, keys): the learned bias of each distance, -inf out of reach."""
        device, width = self.distance_bias.device, self.past + self.future
        queries = torch.arange(start, stop, device=device)[:, None]
        keys = torch.arange(band.start, band.stop, device=device)[None, :]
        index = keys - queries + shift
        out_of_reach = (index < 0) | (index > width)
        if hidden is not None:
            out_of_reach = out_of_reach | (keys < hidden.to(device))
        bias = self.distance_bias[:, index.clamp(0, width)]
        return bias.masked_fill(out_of_reach, -math.inf).unsqueeze(0)
