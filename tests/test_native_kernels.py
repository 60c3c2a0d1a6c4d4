"""Kernels in C: beside float64, in graphs, with gradients, and where they cannot be built."""

from __future__ import annotations

import copy
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from temporal_vae import TemporalVAE, TemporalVAEConfig, WanVAEConfig
from temporal_vae.network.kernels import dtypes, fused, native, norm, three_taps, winograd, work
from temporal_vae.network.primitives import Conv2d, PositionNorm
from temporal_vae.network.spacetime import CausalConv, RMSNorm

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")

Function = Callable[..., Tensor]
SIZES = [(1, 32, 16, 40, 41), (3, 48, 80, 17, 24), (2, 160, 32, 1, 300), (2, 32, 32, 300, 1)]
"""Frames, channels, output channels, height, width."""


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(three_taps, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(three_taps, "LEAST_PIXELS", 0)


def frames(*shape: int) -> Tensor:
    """Random (N, C, ...), channels together."""
    n, c, *rest = shape
    return torch.randn(n, *rest, c).movedim(-1, 1)


def kernel(out: int, channels: int, *taps: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(out, channels, *taps)
    return weight / weight[0].numel() ** 0.5, torch.randn(out)


def rms(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def in_float64(function: Function, *tensors: Tensor) -> Tensor:
    return function(*(x.double() for x in tensors))


conv2d: Function = functools.partial(F.conv2d, padding=1)
"""A 3x3 convolution by torch."""


def repeated(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


# Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_convolution_is_as_exact_as_torchs(size: tuple[int, ...]) -> None:
    n, c, out, h, w = size
    x, (weight, bias) = frames(n, c, h, w), kernel(out, c, 3, 3)
    exact = in_float64(conv2d, x, weight, bias)
    y = winograd.conv2d(x, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last) or 1 in (h, w)
    theirs = max(
        rms(F.conv2d(each, weight, bias, padding=1), exact) for each in (x, x.contiguous())
    )
    assert rms(y, exact) <= 1.5 * theirs < 2e-6
    without = in_float64(conv2d, x, weight)
    assert rms(winograd.conv2d(x, weight, None), without) < 1e-6


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_convolution_of_doubled_pixels(size: tuple[int, ...]) -> None:
    n, c, out, h, w = size
    x, (weight, bias) = frames(n, c, h, w), kernel(out, c, 3, 3)
    exact = in_float64(lambda x, *of: conv2d(repeated(x), *of), x, weight, bias)
    assert rms(winograd.conv2d(x, weight, bias, doubled=True), exact) < 4e-7


AROUND = [
    (zeros, behind, split)
    for zeros, behind in ((0, 0), (1, 1), (2, 0), (0, 2))
    for split in ((1,), (2,), (3,), (6,), (2, 1), (2, 4), (1, 1, 1))
    if zeros + behind + sum(split) > 2
]
"""Frames of zeros before and behind, and the frames of each part between them."""


def padded(x: Tensor, zeros: int, behind: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, zeros, behind))


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize(("zeros", "behind", "split"), AROUND, ids=str)
def test_a_convolution_over_time(
    side: int, zeros: int, behind: int, split: tuple[int, ...]
) -> None:
    x, (weight, bias) = frames(2, 32, sum(split), 9, 12), kernel(48, 32, 3, side, side)
    pad = (0, side // 2, side // 2)
    exact = in_float64(
        lambda x, w, b: F.conv3d(padded(x, zeros, behind), w, b, padding=pad), x, weight, bias
    )
    parts = [part.clone(memory_format=torch.preserve_format) for part in x.split(split, 2)]
    y = winograd.over_time(parts, zeros, behind, weight, bias)
    assert y.shape == exact.shape and rms(y, exact) < 4e-7
    assert y.movedim(1, -1).is_contiguous()


def test_frames_lie_wherever_they_do() -> None:
    """Cropped rows and columns, the other memory order, weights in any order."""
    whole, (weight, bias) = frames(2, 32, 20, 30), kernel(16, 32, 3, 3)
    for x in (whole[:, :, 3:17, 2:25], whole.contiguous(), whole[:, :, ::2], whole[1:]):
        exact = in_float64(conv2d, x, weight, bias)
        assert rms(winograd.conv2d(x, weight, bias), exact) < 4e-7
        last = weight.contiguous(memory_format=torch.channels_last)
        assert torch.equal(winograd.conv2d(x, last, bias), winograd.conv2d(x, weight, bias))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, (weight, bias) = frames(2, 64, 33, 20), kernel(64, 64, 3, 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(winograd.conv2d(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_threads_of_the_caller_do_not_disturb_one_another() -> None:
    x, (weight, bias) = frames(4, 64, 33, 20), kernel(64, 64, 3, 3)
    expected, wrong = winograd.conv2d(x, weight, bias), []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(winograd.conv2d(x, weight, bias), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("doubled", [False, True])
def test_bfloat16_is_float32_rounded(doubled: bool) -> None:
    x, (weight, bias) = frames(2, 64, 11, 13).bfloat16(), kernel(32, 64, 3, 3)
    weight, bias = weight.bfloat16(), bias.bfloat16()
    wide = winograd.conv2d(x.float(), weight.float(), bias.float(), doubled)
    y = winograd.conv2d(x, weight, bias, doubled)
    assert y.dtype == torch.bfloat16 and torch.equal(y, wide.bfloat16())


def test_what_is_not_finite_stays_near() -> None:
    """Not a number, and infinities, reach the frames that read them, and no other."""
    x, (weight, bias) = frames(3, 32, 12, 12), kernel(16, 32, 3, 3)
    clean = winograd.conv2d(x, weight, bias)
    x[1, 5, 6, 6], x[1, 5, 1, 1] = torch.nan, torch.inf
    y = winograd.conv2d(x, weight, bias)
    assert torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])
    assert y[1, :, 5:8, 5:8].isnan().all() and not y[1, :, 1, 1].isfinite().any()
    assert torch.equal(y[1, :, 9:, 9:], clean[1, :, 9:, 9:])
    assert winograd.conv2d(x.bfloat16(), weight.bfloat16(), None)[1, :, 6, 6].isnan().all()


class Special(Tensor):
    """Some other kind of tensor."""


def test_what_does_not_fit_together_is_never_read() -> None:
    """The kernels take addresses: torch tells the error, or they do."""
    x, (weight, bias) = frames(1, 64, 16, 16), kernel(64, 64, 3, 3)
    assert three_taps.serves(x, weight, bias)
    narrow, elsewhere = kernel(64, 16, 3, 3), (weight.to("meta"), bias.to("meta"))
    for one in (narrow, elsewhere, (weight, bias[:16]), (weight, elsewhere[1])):
        assert not three_taps.serves(x, *one)
        with pytest.raises(ValueError, match="do not go with frames"):
            winograd.conv2d(x, *one)
    assert not three_taps.serves(x, weight.as_subclass(Special), bias)
    assert not three_taps.serves(x.as_subclass(Special), weight, bias)
    negated = torch._neg_view(x)
    assert not three_taps.serves(negated, weight, bias) and not fused.serves(negated)
    assert not fused.serves(x, bias[:16]) and not fused.serves(x, elsewhere[1])
    clips = frames(1, 64, 2, 16, 16), frames(1, 64, 2, 8, 16)
    with pytest.raises(ValueError, match="clips of one size"):
        winograd.over_time(clips, 0, 0, weight[:, :, None].repeat(1, 1, 3, 1, 1), bias)
    assert not winograd.conv2d(x[:0], weight, bias).numel()


def test_the_fewest_products_are_chosen() -> None:
    """Single frames and zeros tap by tap, longer clips in pairs of frames."""
    (frame,), weight = frames(1, 16, 4, 4), torch.empty(16, 16, 3, 3, 3)
    for zeros, count, by_taps in ((2, 1, 1), (0, 3, 1), (2, 5, 1), (2, 6, 0), (0, 4, 0), (0, 6, 0)):
        assert winograd._in_pairs([None] * zeros + [frame] * count, weight) != bool(by_taps)


# Gradients and graphs ------------------------------------------------------------------------


def assert_same_gradients(ours: Function, theirs: Function, *given: Tensor) -> None:
    mine = [x.clone().requires_grad_() for x in given]
    exact = [x.double().requires_grad_() for x in given]
    y, z = ours(*mine), theirs(*exact)
    assert rms(y.detach(), z.detach()) < 5e-7
    seen = torch.randn_like(y)
    found, wanted = torch.autograd.grad(y, mine, seen), torch.autograd.grad(z, exact, seen.double())
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and rms(a, b) < 1e-6


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("size", [(2, 32, 20, 21), (3, 16, 1, 9), (1, 80, 33, 2)], ids=str)
def test_gradients_of_a_convolution(size: tuple[int, int, int, int], doubled: bool) -> None:
    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return three_taps.conv2d(x, weight, bias, doubled)

    def theirs(x: Tensor, *rest: Tensor) -> Tensor:
        return conv2d(F.interpolate(x, scale_factor=2.0) if doubled else x, *rest)

    assert_same_gradients(ours, theirs, frames(*size), *kernel(48, size[1], 3, 3))


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize(("zeros", "behind"), [(0, 0), (1, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_gradients_over_time(side: int, zeros: int, behind: int, count: int) -> None:
    pad = (0, side // 2, side // 2)

    def theirs(tail: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv3d(padded(torch.cat([tail, x], 2), zeros, behind), weight, bias, padding=pad)

    def ours(tail: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return three_taps.over_time([tail, x], zeros, behind, weight, bias)

    given = frames(2, 32, 2, 9, 10), frames(2, 32, count, 9, 10)
    assert_same_gradients(ours, theirs, *given, *kernel(48, 32, 3, side, side))


def test_gradients_of_weights_do_not_depend_on_threads_or_on_how_they_lie() -> None:
    x, given, (weight, _) = frames(2, 48, 33, 20), frames(2, 64, 33, 20), kernel(64, 48, 3, 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(winograd.conv2d_weight(given, x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[1], winograd.conv2d_weight(given.contiguous(), x.contiguous(), last))
    same = torch.ones(()).expand_as(given)  # as `sum` gives it
    exact = winograd.conv2d_weight(torch.ones_like(given), x, weight)
    assert torch.equal(winograd.conv2d_weight(same, x, weight), exact)


def test_gradients_of_weights_in_bfloat16_are_summed_in_float32() -> None:
    x, given = frames(8, 32, 64, 64).bfloat16(), frames(8, 32, 64, 64).bfloat16()
    weight = torch.empty(32, 32, 3, 3)
    wide = winograd.conv2d_weight(given.float(), x.float(), weight)
    assert rms(winograd.conv2d_weight(given, x, weight), wide.double()) < 1e-6


def test_gradients_whatever_dtype_is_usual() -> None:
    x, given, (weight, _) = frames(1, 32, 8, 9), frames(1, 32, 8, 9), kernel(32, 32, 3, 3)
    expected = winograd.conv2d_weight(given, x, weight)
    winograd._kept.space = None
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(winograd.conv2d_weight(given, x, weight), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_after_a_look_without_them() -> None:
    x, (weight, bias) = frames(1, 32, 12, 12), kernel(32, 32, 3, 3)
    winograd._kept.space = None
    with torch.inference_mode():
        winograd.conv2d(x, weight, bias)
    y = three_taps.conv2d(x, weight.requires_grad_(), bias)
    (found,) = torch.autograd.grad(y.sum(), weight)
    assert found.is_contiguous() and found.untyped_storage().nbytes() == weight.numel() * 4


def test_gradients_in_modes_and_of_odd_tensors() -> None:
    """Within autocast they are not rounded; what is negated when it is read is; on meta there are
    none to compute; and what does not fit is refused."""
    x, (weight, _) = frames(1, 32, 12, 12).requires_grad_(), kernel(32, 32, 3, 3)
    y = three_taps.conv2d(x, weight.requires_grad_(), None)
    given = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, weight), given, retain_graph=True)
    negated = torch.autograd.grad(y, (x, weight), torch._neg_view(-given), retain_graph=True)
    assert all(map(torch.equal, negated, wanted))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (within,) = torch.autograd.grad(y, weight, given)
    assert torch.equal(within, wanted[1])
    far = x.detach().to("meta"), weight.detach().to("meta").requires_grad_()
    (found,) = torch.autograd.grad(three_taps.conv2d(*far, None).sum(), far[1])
    assert found.is_meta and found.shape == weight.shape
    for other in (given[:, :, 1:], given.bfloat16(), torch.cat([given, given])):
        with pytest.raises(ValueError, match="are not of what comes of frames"):
            winograd.conv2d_weight(other, x.detach(), weight.detach())


def test_gradients_of_nothing() -> None:
    (weight, _), x = kernel(32, 16, 3, 3), frames(1, 16, 8, 8)[:0]
    assert not winograd.conv2d_weight(frames(1, 32, 8, 8)[:0], x, weight).any()


@pytest.mark.parametrize("first", [0, 1], ids=["of frames", "of weights"])
def test_second_derivatives(first: int) -> None:
    """As a penalty on gradients takes them: of frames by the weight, and of it by the frames."""
    x, (weight, bias) = frames(1, 32, 12, 12), kernel(32, 32, 3, 3)

    def penalty(function: Function, *given: Tensor) -> Tensor:
        leaves = [each.requires_grad_() for each in given]
        y = function(*leaves).square().sum()
        (gradient,) = torch.autograd.grad(y, leaves[first], create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaves[1 - first])
        return second

    exact = in_float64(lambda *given: penalty(conv2d, *given), x, weight, bias)
    assert rms(penalty(three_taps.conv2d, x.clone(), weight.clone(), bias.clone()), exact) < 1e-5


def test_a_graph_has_the_kernels_in_it() -> None:
    torch._dynamo.reset()
    x, (weight, bias) = frames(1, 32, 16, 16), kernel(32, 32, 3, 3)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(three_taps.conv2d, backend=backend, fullgraph=True)
        assert torch.equal(compiled(x, weight, bias), three_taps.conv2d(x, weight, bias))
    assert any("temporal_vae.conv2d" in name for name in seen)


def test_gradients_of_a_batch_of_them() -> None:
    x, (weight, bias) = frames(1, 32, 12, 12).requires_grad_(), kernel(32, 32, 3, 3)
    clip, deep = frames(1, 32, 3, 9, 9).requires_grad_(), torch.randn(32, 32, 3, 3, 3)
    for y, of in (
        (three_taps.conv2d(x, weight.requires_grad_(), bias), x),
        (three_taps.over_time([clip], 2, 0, deep, None), clip),
    ):
        seen = torch.randn(2, *y.shape)
        (both,) = torch.autograd.grad(y, of, seen, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(y, of, one, retain_graph=True)[0] for one in seen]
        assert rms(both, torch.stack(each).double()) < 1e-5


@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_for_others_has_torchs_convolutions(strict: bool) -> None:
    conv, x = Conv2d(32, 32, 3, padding=1).requires_grad_(False), frames(1, 32, 16, 16)
    program = torch.export.export(conv, (x,), strict=strict)
    named = {str(node.target) for node in program.graph.nodes}
    assert any("conv" in name for name in named)
    assert not any("temporal_vae" in name for name in named)


def small() -> TemporalVAE:
    """An awake model with layers wide enough for the kernels."""
    model = TemporalVAE(base_channels=32, channel_multipliers=(1, 2), blocks_per_level=1, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[winograd.Kind]]:
    """The kinds of kernel that have run, forwards and for gradients of weights."""
    kinds: list[winograd.Kind] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def told(kind: winograd.Kind, *rest: Any) -> Any:
            kinds.append(kind)
            return function(kind, *rest)

        return told

    for name in ("run", "weight_gradient"):
        monkeypatch.setattr(winograd, name, watched(getattr(winograd, name)))
    yield kinds


def test_a_model_takes_them_and_trains_as_before(
    called: list[winograd.Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, video = small(), torch.rand(1, 3, 3, 32, 32) * 2 - 1
    exact = copy.deepcopy(model).double()

    def gradients(vae: TemporalVAE) -> Tensor:
        vae.zero_grad()
        vae.decode(vae.encode(video.to(vae.dtype), sample_mode=False)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None])

    found = gradients(model)
    # forwards, and gradients of the input (but the first) and of weights
    assert {(0, 1, 1), (1, 0, 0), (0, 2, 2)} == set(called)
    assert called.count((0, 2, 2)) == 2 and called.count((1, 0, 0)) % 3 == 0
    called.clear()
    wanted = gradients(exact)
    assert not called, "float64 is computed by torch"
    ours = rms(found, wanted)
    monkeypatch.setattr(three_taps, "serves", lambda *_: False)
    assert ours < 1e-4 and ours < 2 * rms(gradients(model), wanted)
    with torch.no_grad():
        monkeypatch.undo()
        model.decode(torch.randn(1, model.latent_channels, 2, 16, 16))


def causal(wan: bool) -> TemporalVAE:
    """An awake model that streams, all of whose wide layers the kernels take."""
    config: Any = WanVAEConfig(base_channels=16, blocks_per_level=1)
    if not wan:
        options: Any = {"channel_multipliers": (1, 2), "blocks_per_level": 1}
        config = TemporalVAEConfig(base_channels=32, causal_mode=True, **options)
    model = TemporalVAE.from_config(config, seed=0).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("wan", [False, True])
def test_less_memory_and_streams_change_no_picture(wan: bool, called: list[winograd.Kind]) -> None:
    """Rows, frames and tails meet tiles of two by two wherever they are cut."""
    model = causal(wan)
    latent = torch.randn(1, model.latent_channels, 5, 9, 11)
    exact = copy.deepcopy(model).double().decode(latent.double())
    whole = model.decode(latent)
    assert called and rms(whole, exact) < 1e-5
    least = model.plan(latent.shape, "decode", budget="least")
    assert least.walk == "bounded"
    streamed = torch.cat(list(model.decode_stream().pull(latent.split((1, 2, 1, 1), 2))), 2)
    for found in (model.decode(latent, plan=least), streamed):
        assert rms(found, exact) <= 2 * rms(whole, exact)


@pytest.mark.parametrize(("zeros", "before"), [(2, 0), (0, 2), (0, 0), (1, 0)])
def test_progress_is_told_as_by_torchs_kernels(
    zeros: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = CausalConv.of(32, 32).requires_grad_(False)
    tail, x = frames(1, 32, 2, 12, 12), frames(1, 32, 4, 12, 12)

    def told() -> int:
        numbers: list[int] = []
        with work.told_to(numbers.append):
            conv(x, zeros, tail if before else None)
        return sum(numbers)

    ours = told()
    monkeypatch.setattr(three_taps, "serves", lambda *_: False)
    assert ours == told() > 0


def test_weights_are_never_stale() -> None:
    """However they change: a step, a loaded state, a hand in `data`, an average put in place."""
    model, latent = small(), torch.randn(1, 4, 2, 16, 16)
    other = copy.deepcopy(model)

    def check() -> None:
        with torch.no_grad():
            y = model.decode(latent)
            wide = copy.deepcopy(model).double()
            assert rms(y, wide.decode(latent.double())) < 1e-4
            assert not torch.equal(y, before)

    with torch.no_grad():
        before = model.decode(latent)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.decode(latent).square().mean().backward()
    optimizer.step()
    check()
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    check()
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    model.load_state_dict(other.state_dict())
    check()
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    check()


def test_who_writes_operations_down_sees_them() -> None:
    """A trace of `make_fx` and a count of operations are of torch's."""
    model, latent = small().requires_grad_(False), torch.randn(1, 4, 2, 16, 16)
    decode = model.decoder.forward
    expected = decode(latent)
    with FlopCounterMode(display=False) as counter:
        assert rms(decode(latent), expected.double()) < 1e-5
    assert counter.get_total_flops() > 8e8
    graph = make_fx(lambda z: decode(z))(latent)
    other = torch.randn_like(latent)
    assert rms(graph(other), decode(other).double()) < 1e-5


def test_who_counts_a_way_back_sees_gradients_of_weights() -> None:
    x, (weight, _) = frames(1, 32, 16, 16), kernel(32, 32, 3, 3)
    y = three_taps.conv2d(x, weight.requires_grad_(), None)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * y.numel() * 32 * 9


def test_tensors_without_memory_go_by() -> None:
    model = small().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model.decoder(mode.from_tensor(torch.randn(1, 4, 2, 16, 16)))
    assert tuple(y.shape) == (1, 3, 2, 32, 32)


# Norms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_group_norm_with_silu(offset: float, silu: bool) -> None:
    x, weight, bias = frames(2, 48, 19, 23) + offset, torch.randn(48), torch.randn(48)
    exact = norm.group_norm_reference(x.double(), 12, weight.double(), bias.double(), 1e-6)
    exact = F.silu(exact) if silu else exact
    assert fused.serves(x)
    y = norm.group_norm(x, 12, weight, bias, 1e-6, silu)
    torchs = norm.group_norm_reference(x.contiguous(), 12, weight, bias, 1e-6)
    assert rms(y, exact) <= 3 * rms(F.silu(torchs) if silu else torchs, exact) + 1e-8


@pytest.mark.parametrize("ours", [True, False])
def test_norms_do_not_depend_on_the_number_of_threads(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do moments without a compiler."""
    if not ours:
        monkeypatch.setattr(fused, "library", lambda: None)
    x = frames(2, 48, 37, 41) * 2 + 3
    exact = norm.Moments.of(x.double(), 12)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(norm.Moments.of(x, 12))
    finally:
        torch.set_num_threads(before)
    for each in found:
        assert torch.equal(each.mean, found[0].mean)
        assert torch.equal(each.variance, found[0].variance)
    assert rms(found[0].mean, exact.mean) < 1e-7 and rms(found[0].variance, exact.variance) < 1e-7


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 256])
@pytest.mark.parametrize("columns", [16, 48, 80, 2048])
def test_moments_of_columns(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns) * torch.rand(columns) + 10 * torch.randn(columns)
    assert fused.has_moments(x)
    mean, variance = fused.moments(x)
    exact_variance, exact = torch.var_mean(x.double(), 0, correction=0)
    assert rms(mean, exact) < 3e-7 and (variance - exact_variance).abs().max() < 1e-5
    assert not fused.has_moments(x[:, ::2]) and not fused.has_moments(x[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-14])
def test_a_norm_of_each_position(scale: float, dtype: torch.dtype) -> None:
    layer = RMSNorm(48)
    torch.nn.init.normal_(layer.gamma)
    layer.to(dtype).requires_grad_(False)
    x = (frames(2, 48, 3, 5, 7) * scale).to(dtype)
    exact = copy.deepcopy(layer).double()._plain(x.double())
    least = 1e-6 if dtype == torch.float32 else 4e-3
    assert fused.serves(x, layer.gamma)
    assert rms(layer(x), exact) < least and rms(layer.activated(x), F.silu(exact)) < least
    assert rms(layer._plain(x), exact) < least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_layer_norm_of_each_position(offset: float, scale: float, dtype: torch.dtype) -> None:
    layer = PositionNorm(48)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    layer.to(dtype).requires_grad_(False)
    x = ((frames(2, 48, 3, 5, 7) + offset) * scale).to(dtype)
    weight, bias = layer.weight.double(), layer.bias.double()
    exact = F.layer_norm(x.double().movedim(1, -1), (48,), weight, bias, layer.eps).movedim(-1, 1)
    torchs = F.layer_norm(x.movedim(1, -1), (48,), layer.weight, layer.bias, layer.eps)
    least = 2 * rms(torchs.movedim(-1, 1), exact) + 1e-7
    assert fused.serves(x, layer.weight, layer.bias)
    before = x.clone()
    assert rms(layer(x), exact) < least and rms(layer.activated(x), F.silu(exact)) < 2 * least
    assert torch.equal(x, before)
    assert torch.equal(layer.activated(x, spent=True), layer.activated(before))


def test_silu_far_out() -> None:
    x = torch.linspace(-120, 120, 16 * 4000).view(1, 4000, 1, 16).movedim(-1, 1)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0] = torch.nan, torch.inf, 3e38
    x[0, 3, 0, 0], x[0, 4, 0, 0] = -3e38, -1e4
    y, one, zero = torch.empty_like(x), torch.ones(16), torch.zeros(16)
    fused.shifted(x, y, zero, one, zero, silu=True)
    exact = F.silu(x.double())
    assert y[0, 0, 0, 0].isnan() and y[0, 1, 0, 0] == torch.inf and y[0, 2, 0, 0] == x[0, 2, 0, 0]
    rest = (x > -80) & x.isfinite()
    assert ((y.double() - exact).abs() / exact.abs())[rest].max() < 4e-7
    assert y[x < -80].abs().max() < 1e-30


# Where they are built ------------------------------------------------------------------------


def loaded(monkeypatch: pytest.MonkeyPatch, folder: Path, **environment: str) -> Any:
    """The library as a new process finds it, and what it warns of."""
    for name, value in {"XDG_CACHE_HOME": str(folder), **environment}.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = native.library.__wrapped__()
    return found, [str(each.message) for each in said]


def works(library: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    x, (weight, bias) = frames(2, 64, 24, 25), kernel(64, 64, 3, 3)
    monkeypatch.setattr(winograd, "library", lambda: library)
    return rms(winograd.conv2d(x, weight, bias), in_float64(conv2d, x, weight, bias)) < 1e-6


def test_they_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, said = loaded(monkeypatch, tmp_path)
    assert not said and works(built, monkeypatch)
    (file,) = (tmp_path / "temporal-vae").iterdir()
    again, said = loaded(monkeypatch, tmp_path, CC="/no/compiler")
    assert not said and works(again, monkeypatch)
    torn = tmp_path / "other" / "temporal-vae" / file.name
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    found, said = loaded(monkeypatch, tmp_path / "other")
    assert found is None and "/no/compiler failed" in said[0], "what is torn is built again"


def test_without_a_folder_to_keep_them_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    built, said = loaded(monkeypatch, tmp_path / "file")
    assert not said and works(built, monkeypatch)


def test_without_a_compiler_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = loaded(monkeypatch, tmp_path, CC="/no/compiler")
    assert found is None and said[0].startswith("convolutions take torch's own kernels")
    assert "/no/compiler failed" in said[0] and "TEMPORAL_VAE_KERNELS=torch" in said[0]
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    found, said = loaded(monkeypatch, tmp_path)
    assert found is None and "no C compiler" in said[0]
    assert loaded(monkeypatch, tmp_path, TEMPORAL_VAE_KERNELS="torch") == (None, [])
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    broken.chmod(0o755)
    found, said = loaded(monkeypatch, tmp_path / "cache", CC=f"{broken} -with options")
    assert found is None and "it is broken" in said[0]


def test_a_home_that_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    found, said = loaded(monkeypatch, tmp_path, XDG_CACHE_HOME="")
    assert found is None and "home directory" in said[0]


def test_without_kernels_a_model_decodes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latent = small(), torch.randn(1, 4, 2, 16, 16)
    with torch.no_grad():
        ours = model.decode(latent)
        for module in (winograd, three_taps, fused):
            monkeypatch.setattr(module, "library", lambda: None)
        theirs = model.decode(latent)
    assert not torch.equal(ours, theirs) and rms(ours, theirs.double()) < 1e-5


def test_the_shortest_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that every processor of this kind has."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    built, said = loaded(monkeypatch, tmp_path)
    assert not said and works(built, monkeypatch)


def test_the_longest_vectors_compile(tmp_path: Path) -> None:
    """Those of AVX-512, though this processor may not run them."""
    if os.uname().machine != "x86_64":
        pytest.skip("another processor")
    flags = (*native._FLAGS, *native._INSTRUCTIONS["AVX512"], "-Wall", "-Wextra", "-Werror")
    assert native._built(flags, tmp_path).is_file()


def test_a_processor_with_bfloat16_takes_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight, bias) = frames(1, 32, 16, 16).bfloat16(), kernel(32, 32, 3, 3)
    for slow in (True, False):
        monkeypatch.setattr(dtypes, "_has", lambda dtype, slow=slow: not slow)
        dtypes.is_slow.cache_clear()
        assert three_taps.serves(x, weight.bfloat16(), bias.bfloat16()) == slow
    dtypes.is_slow.cache_clear()
