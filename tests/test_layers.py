"""Walks ask a layer what it declares: layers that the library does not know are walked as exactly.

The three toy layers follow the causal 3-D VAEs of Wan: a convolution in time and space, and layers
that halve and double the frame count, the first frame apart.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import difference, redraw
from torch import Tensor, nn

import temporal_vae
from temporal_vae import TemporalVAEConfig
from temporal_vae.network.autoencoder import Line
from temporal_vae.network.framewise import Downsample, IntoStream, ResidualBlock, Upsample
from temporal_vae.network.layer import Layer, Past, Shape, State, Tail
from temporal_vae.network.primitives import FirstConv, Norm, own_norm
from temporal_vae.network.timewise import TemporalAttention, TemporalBlock
from temporal_vae.walks import bounded, streamed
from temporal_vae.walks.stages import Bounds, shape_after

CHANNELS = 8


class Toy(Layer):
    """A convolution of three frames, of which it remembers two."""

    past = 2
    kernel = (3, 1, 1)

    def __init__(self, out: int = CHANNELS):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, CHANNELS, *self.kernel))
        self.bias = nn.Parameter(torch.empty(out))

    def tails(self) -> tuple[Tail, ...]:
        return (Tail(CHANNELS, 2),)


class CausalConv(Toy):
    """A 3x3x3 convolution that sees the past only."""

    halo = (1, 1)
    kernel = (3, 3, 3)

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        u = torch.cat([tails[0], x], 2)
        y = F.conv3d(u, self.weight, self.bias, padding=(0, 1, 1)) if x.shape[2] else x
        return y, (u[:, :, -2:].clone(),)


class HalveTime(Toy):
    """y0 = x0; yk = conv(x[2k-2], x[2k-1], x[2k])."""

    rate = Fraction(1, 2)
    cut = "pixels"

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        u = torch.cat([tails[0], x], 2)
        read = u[:, :, past.least % 2 :]
        y = x[:, :, :0]
        if read.shape[2] >= 3:
            y = F.conv3d(read, self.weight, self.bias, stride=(2, 1, 1))
        if not past.least and x.shape[2]:
            y = torch.cat([x[:, :, :1], y[:, :, 1:]], 2)
        return y, (u[:, :, -2:].clone(),)


class DoubleTime(Toy):
    """y0 = x0; xk gives the two halves of conv(x[k-2..k]), where frame 0 reads as zeros."""

    rate = Fraction(2)
    cut = "pixels"

    def __init__(self) -> None:
        super().__init__(2 * CHANNELS)

    def output_shape(self, shape: Shape, begins: bool = True) -> Shape:
        b, c, t, h, w = shape
        return (b, c, 2 * t - begins, h, w)

    def step(self, x: Tensor, past: Past, tails: State, last: bool) -> tuple[Tensor, State]:
        if not x.shape[2]:
            return x, tails
        begins = past.least == 0
        first = x[:, :, :1]
        read = torch.cat([torch.zeros_like(first), x[:, :, 1:]], 2) if begins else x
        u = torch.cat([tails[0], read], 2)
        both = F.conv3d(u, self.weight, self.bias).unflatten(1, (2, CHANNELS))
        y = both.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat([first, y[:, :, 2:]], 2) if begins else y, (u[:, :, -2:].clone(),)


class Gain(Layer):
    """A layer of nothing but `compute`, with every default."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(1))

    def compute(self, x: Tensor, norm: Norm = own_norm) -> Tensor:
        return x * self.gain


class ToyLine(Line):
    """Today's layers and the toy ones in a row."""

    def __init__(self, causal: bool):
        config = TemporalVAEConfig(
            base_channels=CHANNELS, causal_mode=causal, temporal_attention_reach=2
        )
        super().__init__(config)
        self.row = nn.ModuleList([
            IntoStream(FirstConv(3, CHANNELS, 3, padding=1)), CausalConv(),
            TemporalBlock(CHANNELS, config), HalveTime(),
            Downsample(CHANNELS), Gain(), TemporalAttention(CHANNELS, config), HalveTime(),
            CausalConv(),
            ResidualBlock(CHANNELS, CHANNELS, config), DoubleTime(), Upsample(CHANNELS),
            TemporalBlock(CHANNELS, config), DoubleTime(), CausalConv(),
        ])  # fmt: skip
        self.double()
        redraw(self)

    def parts(self) -> Iterator[nn.Module]:
        return iter(self.row)


def clip(frames: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 3, frames, 8, 12, generator=generator, dtype=torch.float64)


def streamed_in(line: Line, x: Tensor, sizes: list[int], bounds: Bounds | None) -> Tensor:
    state: streamed.Held | None = None
    found: list[Tensor] = []
    for piece in x.split(sizes, 2):
        y, state = streamed.step(line, piece, state, bounds)
        found += [] if y is None else [y]
    found += streamed.finish(line, state, bounds)
    return torch.cat(found, 2)


def splits(frames: int, seed: int) -> list[int]:
    """A random way to cut so many frames."""
    draw, sizes = random.Random(seed), list[int]()
    while sum(sizes) < frames:
        sizes.append(draw.randint(1, min(5, frames - sum(sizes))))
    return sizes


@torch.no_grad()
def test_the_toy_layers_follow_their_rules() -> None:
    x = torch.randn(1, CHANNELS, 9, 4, 5, dtype=torch.float64)
    half, double = HalveTime().double(), DoubleTime().double()
    for layer in (half, double):
        redraw(layer)
    y = half(x)
    assert y.shape[2] == 5 and torch.equal(y[:, :, 0], x[:, :, 0])
    for k in range(1, 5):
        one = F.conv3d(x[:, :, 2 * k - 2 : 2 * k + 1], half.weight, half.bias)
        assert difference(y[:, :, k : k + 1], one) < 1e-12
    y, padded = double(x), F.pad(x[:, :, 1:], (0, 0, 0, 0, 3, 0))
    assert y.shape[2] == 17 and torch.equal(y[:, :, 0], x[:, :, 0])
    for k in range(1, 9):
        two = F.conv3d(padded[:, :, k : k + 3], double.weight, double.bias).split(CHANNELS, 1)
        assert difference(y[:, :, 2 * k - 1 : 2 * k + 1], torch.cat(two, 2)) < 1e-12


BOUNDS = [None, Bounds(frames=1, pixels=7), Bounds(frames=3, pixels=50), Bounds(rows=3, pixels=7)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@torch.no_grad()
def test_unknown_layers_stream_exactly(causal: bool, bounds: Bounds | None) -> None:
    line = ToyLine(causal)
    for seed, (frames, batch) in enumerate([(1, 1), (5, 1), (13, 2), (17, 1)]):
        x = clip(frames, batch)
        whole = line(x)
        assert whole.shape == shape_after(line.layers(), tuple(x.shape))
        for sizes in ([frames], [1] * frames, splits(frames, seed)):
            assert difference(streamed_in(line, x, sizes, bounds), whole) < 1e-10, sizes


@pytest.mark.parametrize("bounds", BOUNDS[1:], ids=str)
@torch.no_grad()
def test_unknown_layers_are_walked_in_bounds(bounds: Bounds) -> None:
    line, x = ToyLine(causal=True), clip(9, 2)
    assert difference(bounded.walk(line, x, bounds), line(x)) < 1e-10


@torch.no_grad()
def test_a_lost_tail_of_an_unknown_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    line, x = ToyLine(causal=True), clip(13)
    honest = CausalConv.step

    def forgetful(self: CausalConv, x: Tensor, past: Past, tails: State, last: bool) -> object:
        y, kept = honest(self, x, past, tails, last)
        return y, tuple(torch.zeros_like(tail) for tail in kept)

    whole = line(x)
    monkeypatch.setattr(CausalConv, "step", forgetful)
    assert difference(streamed_in(line, x, [4, 9], None), whole) > 1e-3


def test_walks_know_no_class_of_layer() -> None:
    """They ask what a layer declares: neither its class nor its name decides."""
    root = Path(temporal_vae.__file__).parent
    classes = {
        node.name
        for file in ("framewise", "timewise", "spacetime", "primitives")
        for node in ast.walk(ast.parse((root / "network" / f"{file}.py").read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {"Framewise", "TemporalBlock", "GroupNorm"} <= classes
    for file in (root / "walks").glob("*.py"):
        tree = ast.parse(file.read_text())
        named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        named |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "__class__" not in named, file.name
        assert not named & classes, file.name
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Match)], file.name
        kinds = {
            ast.unparse(node.args[1])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
        }
        assert not any("Layer" in kind or "nn." in kind for kind in kinds), (file.name, kinds)
        compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
        assert not [c for c in compared if "type(" in ast.unparse(c)], file.name
