"""Gradients in bounded memory are those of the whole walk, and take what their plan says."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import awake, difference, drawn, pixels, thinned
from hypothesis import strategies as st
from test_bounded import SVD_LIKE
from test_layers import ToyLine
from torch import Tensor

from temporal_vae import TemporalVAE, TemporalVAEConfig
from temporal_vae.network.kernels import norm as norm_kernel
from temporal_vae.network.kernels.norm import Moments
from temporal_vae.walks import gradient_peak, gradients, stages
from temporal_vae.walks.plan import Plan, planner
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.tracing import LiveBytes

LAYOUTS: dict[str, dict[str, Any]] = {
    "symmetric": {},
    "causal": {"causal_mode": True, "temporal_attention_reach": 2},
    "svd": SVD_LIKE,
    "image": {"num_temporal_layers": 0},
}
MODELS = {name: awake(**options) for name, options in LAYOUTS.items()}


def clip(
    operation: str, frames: int = 5, height: int = 4, width: int = 6, batch: int = 1
) -> Tensor:
    if operation == "encode":
        return pixels(frames, 2 * height, 2 * width, batch=batch)
    return pixels(frames, height, width, channels=4, batch=batch)


def found(model: TemporalVAE, x: Tensor, walk: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A loss that sees every number of the result, and all gradients of it."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = walk(x)
    loss = (y.double() * torch.arange(y.numel()).view(y.shape).cos()).sum() / y.numel()
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters()} | {"the input": x.grad}
    return {"loss": loss.detach()} | {n: g for n, g in named.items() if g is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], most: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        if gradient.abs().max() > 1e-9 * largest:  # softmax cancels the biases of keys
            assert difference(found[name], gradient) < most, name


def coded(model: TemporalVAE, operation: str, plan: Plan | None = None) -> Any:
    if operation == "decode":
        return partial(model.decode, plan=plan)
    return lambda x: torch.cat(model.encode_with_distribution(x, plan=plan), 1)


def assert_pieces_give_the_same(layout: str, operation: str, x: Tensor, bounds: Bounds) -> None:
    model = MODELS[layout]
    line: Any = getattr(model, f"{operation}r")
    expected = found(model, x, line)
    assert_same(found(model, x, lambda x: gradients.walk(line, x, bounds)), expected)


@drawn(
    few=6,
    many=100,
    layout=st.sampled_from(list(LAYOUTS)),
    operation=st.sampled_from(["encode", "decode"]),
    frames=st.integers(1, 6),
    batch=st.integers(1, 2),
    bounds=st.builds(
        Bounds,
        frames=st.integers(1, 6),
        pixels=st.integers(3, 60),
        segments=st.sampled_from([0, 1, 2, 5, 100]),
    ),
)
def test_gradients_in_any_pieces_are_those_of_the_whole_walk(
    layout: str, operation: str, frames: int, batch: int, bounds: Bounds
) -> None:
    assert_pieces_give_the_same(layout, operation, clip(operation, frames, batch=batch), bounds)


def peak(model: TemporalVAE, x: Tensor, walk: Callable[[Tensor], Tensor]) -> int:
    """Every storage over weights and input that is alive while the walk and its way back run.

    Twice: the gradients of the weights are there the second time, as the plan counts them.
    """
    model.zero_grad()
    x = x.detach().requires_grad_()
    with LiveBytes() as alive:
        for there in (x, *model.parameters()):
            alive.leave_out(there)
        for _ in range(2):
            y = walk(x)
            y.backward(torch.empty_like(y))
            del y
    return int(alive.most)


def assert_stays_within(layout: str, operation: Any, share: float | str, batch: int) -> None:
    model, x = MODELS[layout], clip(operation, 2, 16, 16, batch)
    whole = model.plan(x.shape, operation, gradients=True)
    least = model.plan(x.shape, operation, budget="least", gradients=True)
    budget = share if isinstance(share, str) else max(
        int(share * whole.peak_bytes), least.peak_bytes
    )  # fmt: skip
    plan = model.plan(x.shape, operation, budget=budget, gradients=True)
    assert isinstance(budget, str) or plan.peak_bytes <= budget
    assert plan.gradients and plan.walk == ("whole" if share == 1.0 else "bounded")
    seen = peak(model, x, coded(model, operation, plan))
    assert 0.7 * plan.peak_bytes < seen <= plan.peak_bytes


@pytest.mark.parametrize(
    ("layout", "operation", "share", "batch"),
    thinned(7, LAYOUTS, ["encode", "decode"], [1.0, 0.4, "least"], [1, 2]),
)
def test_the_predicted_peak_is_the_real_one(
    layout: str, operation: Any, share: float | str, batch: int
) -> None:
    assert_stays_within(layout, operation, share, batch)


def test_a_small_svd_decoder_takes_less_than_two_fifths() -> None:
    """The twin of the slow test below, of tensors that are there."""
    model, x = MODELS["svd"], clip("decode", 3, 16, 16)
    plain = peak(model, x, model.decode)
    plan = model.plan(x.shape, budget=int(0.4 * plain), gradients=True)
    assert peak(model, x, coded(model, "decode", plan)) <= 0.4 * plain
    expected = found(model, x, model.decode)
    assert_same(found(model, x, coded(model, "decode", plan)), expected)
    model.enable_gradient_checkpointing()
    try:
        assert peak(model, x, model.decode) <= 0.5 * plain
        assert_same(found(model, x, model.decode), expected)
    finally:
        model.disable_gradient_checkpointing()


@pytest.mark.slow
@pytest.mark.parametrize("cells", [24, 32])
def test_the_svd_decoder_takes_less_than_two_fifths(cells: int) -> None:
    """8x192x192 and 8x256x256 pixels, counted on shapes alone."""
    with torch.device("meta"):
        model = TemporalVAE.from_config(TemporalVAEConfig.svd())
        x = torch.empty(1, 4, 8, cells, cells)
    runner, cpu = model._runner, torch.device("cpu")
    plain = peak(model, x, model.decoder)
    plans = partial(runner.plan, x.shape, "decode", torch.float32, gradients=True, device=cpu)
    assert plans(None).peak_bytes == pytest.approx(plain, rel=0.1)
    for budget, share in ((int(0.4 * plain), 0.4), ("least", 0.13)):
        plan = plans(budget)
        assert plan.bounds is not None and plan.peak_bytes <= share * plain
        walk = partial(gradients.walk, model.decoder, bounds=plan.bounds)
        assert peak(model, x, walk) <= plan.peak_bytes
    model.enable_gradient_checkpointing()
    assert peak(model, x, model.decoder) <= 0.5 * plain


def test_float32_differs_by_rounding() -> None:
    model, x = awake(torch.float32, **SVD_LIKE), clip("decode").float()
    plan = model.plan(x.shape, budget="least", gradients=True)
    exact = found(MODELS["svd"], x.double(), MODELS["svd"].decode)
    plain = found(model, x, model.decode)
    pieces = found(model, x, coded(model, "decode", plan))
    for name, gradient in exact.items():
        scale = float(gradient.abs().max())
        assert float((pieces[name] - plain[name]).abs().max()) < 1e-5 * max(scale, 1e-2), name


def test_a_plan_that_does_not_fit_names_the_least() -> None:
    model, shape = MODELS["svd"], clip("decode").shape
    with pytest.raises(
        ValueError, match=r"below the least.*with gradients; torch.no_grad"
    ) as error:
        model.plan(shape, budget=1000, gradients=True)
    least = int(re.findall(r"can do with: (\d+) bytes", str(error.value))[0])
    assert model.plan(shape, budget=least, gradients=True).peak_bytes == least
    with pytest.raises(ValueError, match="below the least"):
        model.plan(shape, budget=least - 1, gradients=True)
    assert "with gradients" in model.plan(shape, gradients=True).explain()


def test_what_is_frozen_gets_no_gradient_and_takes_less() -> None:
    model: Any = awake()
    x = clip("decode")
    trained = model.plan(x.shape, budget="least", gradients=True)
    model.encoder.requires_grad_(False)
    model.decoder.mid_block.requires_grad_(False)
    model.decoder.up_blocks[0].temporals.requires_grad_(False)
    plan = model.plan(x.shape, budget="least", gradients=True)
    assert plan.peak_bytes < trained.peak_bytes
    expected = found(model, x, model.decode)
    assert_same(found(model, x, coded(model, "decode", plan)), expected)
    assert not [name for name in expected if "encoder" in name or "mid_block" in name]
    model.decoder.conv_in.requires_grad_(False)
    for wanting in (True, False):  # an input that wants none, before a frozen layer and before all
        y = model.decode(x.clone().requires_grad_(wanting), plan=plan)
        named = {n: p for n, p in model.decoder.named_parameters() if p.requires_grad}
        found_there = torch.autograd.grad(y.square().mean(), [*named.values()])
        again = torch.autograd.grad(model.decode(x).square().mean(), [*named.values()])
        assert_same(
            dict(zip(named, found_there, strict=True)), dict(zip(named, again, strict=True))
        )
    model.requires_grad_(False)
    assert not model.decode(x, plan=plan).requires_grad


def test_budgets_hold_under_autograd() -> None:
    model, x = awake(), clip("decode")
    expected, result = found(model, x, model.decode), model.decode(x).detach()
    model.set_memory_budget("least")
    assert_same(found(model, x, model.decode), expected)
    model.set_memory_budget(1000)
    with pytest.raises(ValueError, match="below the least"):
        model.decode(x)
    model.set_tiling_enabled(True)
    assert_same(found(model, x, model.decode), expected)
    gradient = torch.func.grad(lambda x: (model.decode(x) * result).sum())(x)
    plain = torch.autograd.grad((awake().decode(y := x.requires_grad_()) * result).sum(), y)
    assert difference(gradient, plain[0]) < 1e-10, "which is walked whole"


def test_plans_with_and_without_gradients() -> None:
    model, x = MODELS["symmetric"], clip("decode")
    plain = model.plan(x.shape, budget="least")
    with pytest.raises(ValueError, match=r"plan\(..., gradients=True\)"):
        model.decode(x, plan=plain)
    plan = model.plan(x.shape, budget="least", gradients=True)
    with torch.no_grad():
        assert difference(model.decode(x, plan=plan), model.decode(x)) < 1e-10
    for options in ({"stream": True}, {"offload": "host"}):
        with pytest.raises(ValueError, match="neither stream nor offload"):
            model.plan(x.shape, gradients=True, **options)
    with pytest.raises(ValueError, match="the plan is for"):
        model.decode(clip("decode", 4), plan=plan)
    with pytest.raises(ValueError, match="segments must be a number of segments, got -1"):
        Bounds(segments=-1)


def test_hooks_are_called_or_refused() -> None:
    model: Any = awake()
    x = clip("decode")
    plan = model.plan(x.shape, budget="least", gradients=True)
    conv = model.decoder.up_blocks[0].resnets[0].conv1
    conv.register_forward_hook(lambda _, __, y: y * 1.5)  # as an adapter that changes a result
    expected = found(model, x, model.decode)
    assert_same(found(model, x, coded(model, "decode", plan)), expected)
    block = model.decoder.mid_block.resnets[0]
    block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="walked whole: take it off"):
        model.decode(x, plan=plan)


# Mutations -----------------------------------------------------------------------------------


def assert_red(bounds: Bounds) -> None:
    with pytest.raises(AssertionError):
        assert_pieces_give_the_same("svd", "decode", clip("decode"), bounds)


def test_the_law_sees_sums_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Moments, "join", lambda parts: parts[-1])
    assert_red(Bounds(pixels=5))


def test_the_law_sees_sums_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = norm_kernel._differentiable
    monkeypatch.setattr(
        norm_kernel, "_differentiable", lambda x, groups: honest(x.detach(), groups)
    )
    assert_red(Bounds(pixels=5))


def test_the_law_sees_frames_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gradients._joined
    monkeypatch.setattr(gradients, "_joined", lambda parts, dim: honest(parts[::-1], dim))
    assert_red(Bounds(frames=2))


@pytest.mark.parametrize(
    ("room", "name", "mutant"),
    [
        (gradients, "again", lambda function, x: function(x)),  # nothing is computed again
        (gradient_peak.GradientPeak, "_kept", lambda *_: 0),  # other samples are forgotten
        (stages, "frames_of", lambda unit, shape, bounds: shape[2]),  # frames are not cut
    ],
    ids=["again", "kept", "cut"],
)
def test_the_counts_see(room: Any, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MODELS["causal"], clip("decode", 2, 16, 16, batch=2)
    planned = partial(model.plan, x.shape, budget="least", gradients=True)
    plan = planned()
    monkeypatch.setattr(room, name, mutant)
    if name == "_kept":  # what counts, not what walks
        planner.cache_clear()
        plan = planned()
        planner.cache_clear()
    assert peak(model, x, coded(model, "decode", plan)) > plan.peak_bytes


def test_a_layer_that_is_taken_whole_is_taken_whole() -> None:
    """Layers that may be cut along neither frames nor pixels."""
    line, x = ToyLine(causal=True), pixels(9, 8, 12)
    expected, got = (
        torch.autograd.grad(walk(x).square().mean(), [*line.parameters()], allow_unused=True)
        for walk in (line, partial(gradients.walk, line, bounds=Bounds(pixels=7)))
    )
    for a, b in zip(got, expected, strict=True):
        assert (a is None) is (b is None)
        assert a is None or b is None or difference(a, b) < 1e-10
