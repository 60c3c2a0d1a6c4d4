"""Layers that see time and space: their formulas, what they declare, and that they stream."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import difference, redraw
from torch import Tensor

from temporal_vae.geometry import rows_read
from temporal_vae.network import spacetime
from temporal_vae.network.kernels import conv
from temporal_vae.network.layer import Layer, State
from temporal_vae.network.spacetime import (
    CausalConv,
    CausalResidualBlock,
    DownFork,
    FrameAttention,
    MeanShortcut,
    OverSpacetime,
    Patches,
    RepeatShortcut,
    RMSNorm,
    SpacetimeDownsample,
    SpacetimeUpsample,
    Unpatched,
    UpFork,
)

CHANNELS = 6
LAYERS: dict[str, Callable[[], Layer]] = {
    "conv": lambda: OverSpacetime(CausalConv.of(CHANNELS, 8)),
    "pointwise": lambda: OverSpacetime(CausalConv.of(CHANNELS, 8, frames=1, side=1)),
    "block": lambda: CausalResidualBlock(CHANNELS, CHANNELS),
    "wider block": lambda: CausalResidualBlock(CHANNELS, 8),
    "down": lambda: SpacetimeDownsample(CHANNELS, time=False),
    "down in time": lambda: SpacetimeDownsample(CHANNELS, time=True),
    "up": lambda: SpacetimeUpsample(CHANNELS, 3, time=False),
    "up in time": lambda: SpacetimeUpsample(CHANNELS, 3, time=True),
    "attention": lambda: FrameAttention(CHANNELS),
    "patches": lambda: Patches(2),
    "down fork": lambda: DownFork(CHANNELS, 12, 2, time=True, last=False),
    "down fork in space": lambda: DownFork(CHANNELS, 6, 1, time=False, last=False),
    "last fork": lambda: DownFork(CHANNELS, 3, 1, time=False, last=True),
    "up fork": lambda: UpFork(CHANNELS, 3, 2, time=True),
    "up fork in space": lambda: UpFork(CHANNELS, 6, 1, time=False),
}
layers = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> Layer:
    layer = LAYERS[name]().double()
    redraw(layer)
    return layer


def clip(frames: int = 7, rows: int = 6, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames + rows)
    x = torch.randn(batch, CHANNELS, frames, rows, 4, generator=generator, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last_3d)


def streamed(layer: Layer, x: Tensor, sizes: list[int]) -> Tensor:
    """The pieces of a stream of one layer, put together."""
    if not layer.tails():
        return layer.compute(x)
    state: State = ()
    found: list[Tensor] = []
    for piece in x.split(sizes, 2):
        y, state = layer.stream(piece, state, last=False)
        found += [] if y is None else [y]
    y, _ = layer.stream(None, state, last=True)
    assert y is None, "a causal layer owes nothing"
    return torch.cat(found, 2)


# What is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "side"), [(3, 3), (3, 1), (1, 1), (1, 3)])
@pytest.mark.parametrize("n", [1, 2, 5])
@torch.no_grad()
def test_a_causal_convolution_is_torchs_behind_zeros(frames: int, side: int, n: int) -> None:
    layer = CausalConv.of(CHANNELS, 5, frames, side).double()
    redraw(layer)
    x, pad = clip(n, batch=2), side // 2
    padded = F.pad(x, (pad, pad, pad, pad, frames - 1, 0))
    expected = F.conv3d(padded, layer.weight, layer.bias)
    assert difference(layer(x, zeros=frames - 1), expected) < 1e-12
    assert difference(layer(F.pad(x, (0, 0, 0, 0, frames - 1, 0))), expected) < 1e-12


def test_what_reads_zeros_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a single image that is two thirds of all convolutions."""
    calls: list[Tensor] = []
    honest = conv.conv2d

    def counted(x: Tensor, *rest: object, **options: object) -> Tensor:
        calls.append(x)
        return honest(x, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(spacetime, "conv2d", counted)
    block = made("block")
    block(clip(1))
    assert len(calls) == 2, "one for each convolution of three frames"
    block(clip(3))
    assert sum(len(x) for x in calls[2:]) == 2 * (3 + 2 + 1)


@torch.no_grad()
def test_few_frames_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, built = clip(9, batch=2), [made("block"), made("up in time"), made("down in time")]
    whole = [layer(x) for layer in built]
    monkeypatch.setattr(spacetime, "NUMBERS_AT_A_TIME", 1)
    for layer, y in zip(built, whole, strict=True):
        assert difference(layer(x), y) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_norm_is_of_each_position(dtype: torch.dtype) -> None:
    norm = RMSNorm(CHANNELS).double()
    redraw(norm)
    x = clip()
    x[:, :, 0, 0, 0] = 0  # which stays 0
    expected = F.normalize(x, dim=1) * CHANNELS**0.5 * norm.gamma
    found = norm.to(dtype)(x.to(dtype))
    assert found.dtype == dtype and not found[:, :, 0, 0, 0].any()
    assert difference(found.double(), expected) < 4 * torch.finfo(dtype).eps
    large = RMSNorm(CHANNELS).to(dtype)(torch.full_like(found, 300))
    assert torch.allclose(large, torch.ones_like(large)), "squares do not overflow"


@torch.no_grad()
def test_time_is_halved_and_doubled_by_the_rules_of_the_first_frame() -> None:
    down, up = LAYERS["down in time"]().double(), LAYERS["up in time"]().double()
    redraw(down)
    redraw(up)
    x = clip(7)
    assert isinstance(down, SpacetimeDownsample) and isinstance(up, SpacetimeUpsample)
    half = down.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (1, 7)).transpose(1, 2)
    y, time = down(x), down.time_conv
    assert y.shape[2] == 4 and difference(y[:, :, :1], half[:, :, :1]) < 1e-12
    assert time is not None
    for k in range(1, 4):
        one = F.conv3d(half[:, :, 2 * k - 2 : 2 * k + 1], time.weight, time.bias)
        assert difference(y[:, :, k : k + 1], one) < 1e-12
    y, time = up(x), up.time_conv
    read, doubled = F.pad(x[:, :, 1:], (0, 0, 0, 0, 3, 0)), [x[:, :, :1]]
    assert time is not None
    for k in range(1, 7):
        pair = F.conv3d(read[:, :, k : k + 3], time.weight, time.bias).split(CHANNELS, 1)
        doubled += pair
    frames = torch.cat(doubled, 2).transpose(1, 2).flatten(0, 1)
    expected = up.resample(frames).unflatten(0, (1, 13)).transpose(1, 2)
    assert y.shape[2] == 13 and difference(y, expected) < 1e-12


@torch.no_grad()
def test_shortcuts_are_means_and_repeats() -> None:
    x = clip(5)
    mean = MeanShortcut(CHANNELS, 12, 2, 2)(x)
    padded = F.pad(x, (0, 0, 0, 0, 1, 0))
    for k in range(3):
        squares = padded[:, :, 2 * k : 2 * k + 2].unfold(3, 2, 2).unfold(4, 2, 2)
        each = squares.permute(0, 1, 2, 5, 6, 3, 4).reshape(1, 12, 4, 3, 2)
        assert difference(mean[:, :, k], each.mean(2)) < 1e-12
    repeated = RepeatShortcut(CHANNELS, CHANNELS, 2, 2)(x)
    expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert torch.equal(repeated, expected[:, :, 1:]), "as many channels: all neighbours the same"


@torch.no_grad()
def test_patches_come_back() -> None:
    x = clip()
    assert torch.equal(Unpatched(2)(Patches(2)(x)), x)


# What is declared ----------------------------------------------------------------------------


@layers
@torch.no_grad()
def test_shapes_are_as_declared(name: str) -> None:
    layer = made(name)
    for frames in (1, 2, 5):
        x = clip(frames, batch=2)
        y = layer(x)
        assert tuple(y.shape) == layer.output_shape(tuple(x.shape))
        assert y.is_contiguous(memory_format=torch.channels_last_3d)


@layers
@torch.no_grad()
def test_any_split_is_the_whole(name: str) -> None:
    layer = made(name)
    for batch in (1, 2):
        x = clip(9, batch=batch)
        whole = layer(x)
        for sizes in ([1] * 9, [2, 7], [3, 1, 4, 1], [8, 1]):
            y = streamed(layer, x, sizes)
            assert y.shape == whole.shape and difference(y, whole) < 1e-12, sizes


@layers
@torch.no_grad()
def test_rows_and_frames_reach_as_far_as_declared(name: str) -> None:
    """A band of rows with the halo is enough; a frame depends on those that `first_read` says."""
    layer, x = made(name), clip(9, rows=32)
    whole = layer(x)
    if layer.halo is not None:
        first, last = (int(row * layer.scale) for row in (14, 18))
        top, bottom = rows_read((first, last), layer.halo, layer.scale, 32)
        band = layer(x[:, :, :, top:bottom].contiguous(memory_format=torch.channels_last_3d))
        skipped = first - int(top * layer.scale)
        given = band[:, :, :, skipped : skipped + last - first]
        assert difference(given, whole[:, :, :, first:last]) < 1e-12
        assert bottom - top < 32
    frame = whole.shape[2] - 1
    read = layer.first_read(frame)
    for changed in range(9):
        other = x.clone()
        other[:, :, changed] += 1
        moved = bool((layer(other)[:, :, frame] != whole[:, :, frame]).any())
        assert not moved or changed >= read, "it sees further back than it says"
        assert moved or changed < read or changed > frame / layer.rate or "fork" in name


@layers
def test_gradients_are_those_of_the_formula(name: str) -> None:
    """Along random directions, of the input and of the weights."""
    layer, x = made(name), clip(3, rows=4).requires_grad_()
    weights = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x).square().sum(), weights)
    generator = torch.Generator().manual_seed(0)
    for weight, gradient in zip(weights, found, strict=True):
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                weight += step * direction
                ends.append(float(layer(x).square().sum()))
            weight += 1e-6 * direction
        slope = (ends[0] - ends[1]) / 2e-6
        assert abs(slope - float((gradient * direction).sum())) < 1e-5 * max(1, abs(slope))


@pytest.mark.parametrize("name", ["down in time", "up in time", "down fork", "up fork"])
@torch.no_grad()
def test_streams_of_a_batch_stand_at_the_same_frame_of_a_latent(name: str) -> None:
    layer = made(name)
    states = [layer.stream(clip(n), (), last=False)[1] for n in (1, 4, 6)]

    def joined(*pair: State) -> State:
        return tuple(torch.cat(both) for both in zip(*pair, strict=True))

    with pytest.raises(ValueError, match="same frame of a latent"):
        layer.stream(clip(2, batch=2), joined(layer.begin(clip()), states[1]), last=False)
    if layer.rate < 1:
        with pytest.raises(ValueError, match="same frame of a latent"):
            layer.stream(clip(2, batch=2), joined(states[0], states[1]), last=False)
    both, _ = layer.stream(clip(2, batch=2), joined(*states[1:]), last=False)
    for number, state in enumerate(states[1:]):
        alone, _ = layer.stream(clip(2, batch=2)[number : number + 1], state, last=False)
        assert both is not None and alone is not None
        assert difference(both[number : number + 1], alone) < 1e-12


@torch.no_grad()
def test_a_convolution_serves_streams_of_any_age() -> None:
    layer = made("block")
    states = [layer.begin(clip()), layer.stream(clip(3), (), last=False)[1]]
    joined = tuple(torch.cat(pair) for pair in zip(*states, strict=True))
    both, _ = layer.stream(clip(2, batch=2), joined, last=False)
    for number, state in enumerate(states):
        alone, _ = layer.stream(clip(2, batch=2)[number : number + 1], state, last=False)
        assert both is not None and alone is not None
        assert difference(both[number : number + 1], alone) < 1e-12


# Mutations -----------------------------------------------------------------------------------


def test_a_halo_one_row_short_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalResidualBlock, "halo", (2, 1))
    with pytest.raises(AssertionError):
        test_rows_and_frames_reach_as_far_as_declared("block")
    monkeypatch.undo()
    monkeypatch.setattr(SpacetimeUpsample, "scale", Fraction(1))
    with pytest.raises((AssertionError, RuntimeError)):
        test_shapes_are_as_declared("up")


def test_a_lost_tail_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spacetime, "_last", lambda tail, x: torch.zeros_like(tail))
    for name in ("conv", "block", "down in time", "up in time", "down fork"):
        with pytest.raises(AssertionError):
            test_any_split_is_the_whole(name)


def test_a_first_frame_that_enters_the_doubling_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(self: SpacetimeUpsample, x: Tensor) -> Tensor:
        return x if self.time_conv is None else self._doubled(x, spacetime.PAST)[:, :, 1:]

    monkeypatch.setattr(SpacetimeUpsample, "more_frames", greedy)
    with pytest.raises(AssertionError):
        test_time_is_halved_and_doubled_by_the_rules_of_the_first_frame()


def test_a_first_frame_that_is_convolved_in_the_halving_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = SpacetimeDownsample._halved

    def greedy(self: SpacetimeDownsample, x: Tensor, before: Tensor, taken: int) -> Tensor:
        return honest(self, x, F.pad(x[:, :, :0], (0, 0, 0, 0, 2, 0)), 2)

    monkeypatch.setattr(SpacetimeDownsample, "_halved", greedy)
    with pytest.raises(AssertionError):
        test_time_is_halved_and_doubled_by_the_rules_of_the_first_frame()
