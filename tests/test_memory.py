"""Memory never changes the picture: streams walked bounded, results in place, retries."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import awake, difference, drawn, pixels, thinned
from hypothesis import example
from hypothesis import strategies as st
from test_streams import LAYOUTS, MODELS, clip, cut, join
from torch import Tensor

from temporal_vae import TemporalVAE
from temporal_vae.network.framewise import OnFrames, ResidualBlock
from temporal_vae.network.primitives import TimeConv
from temporal_vae.network.timewise import TemporalBlock
from temporal_vae.walks import bounded, budget, streamed, workspace
from temporal_vae.walks.runner import Runner
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.tracing import LiveBytes

BOUNDS = [
    Bounds(frames=1, pixels=3),
    Bounds(frames=2, pixels=100),
    Bounds(frames=1, largest=2000, pixels=30, channels=8),
    Bounds(rows=1, pixels=2),
    Bounds(rows=3, pixels=7, fused=True),
    Bounds(frames=1, pixels=5, offload="host"),
]


def decode_in_pieces(
    model: TemporalVAE, pieces: Iterator[Tensor], bounds: Bounds, end: int = 1
) -> Tensor:
    """A stream by the walks themselves, whose steps are bounded."""
    state: streamed.State = ()
    given: list[Tensor | None] = []
    for piece in pieces:
        frames, state = streamed.step(model.decoder, piece, state, bounds)
        given.append(frames)
    owed = list(streamed.finish(model.decoder, state, bounds, end))
    assert all(1 <= piece.shape[2] <= end for piece in owed)
    return join([*given, *owed])


@torch.no_grad()
def assert_bounded_pieces_equal_whole(
    model: TemporalVAE, sizes: list[int], bounds: Bounds, batch: int = 1, end: int = 1
) -> None:
    latent = clip(sum(sizes), 4, 2, batch).to(model.dtype)
    given = latent.clone()
    pieces = decode_in_pieces(model, cut(latent, sizes), bounds, end)
    whole = model.decode(latent)
    assert pieces.shape == whole.shape, "frames were lost or made up"
    assert difference(pieces, whole) < 1e-10
    assert torch.equal(latent, given), "the caller's tensor was overwritten"
    video = clip(sum(sizes), batch=batch).to(model.dtype)
    state: streamed.State = ()
    moments: list[Tensor | None] = []
    for piece in cut(video, sizes):
        some, state = streamed.step(model.encoder, piece, state, bounds)
        moments.append(some)
    moments += streamed.finish(model.encoder, state, bounds, end)
    assert difference(join(moments), model.encoder(video)) < 1e-10


@pytest.mark.parametrize(("layout", "bounds"), thinned(2, MODELS, BOUNDS))
def test_bounded_pieces_equal_whole(layout: str, bounds: Bounds) -> None:
    assert_bounded_pieces_equal_whole(MODELS[layout], [1, 30, 2, 9], bounds, end=9)


@drawn(
    8,
    60,
    layout=st.sampled_from(list(MODELS)),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    frames=st.integers(1, 5),
    chunk=st.integers(1, 20),
    rows=st.none() | st.integers(1, 5),
    fused=st.booleans(),
    larger=st.none() | st.integers(1, 10_000),
    batch=st.integers(1, 2),
    end=st.integers(1, 40),
)
def test_any_pieces_and_bounds(
    layout: str,
    sizes: list[int],
    frames: int,
    chunk: int,
    rows: int | None,
    fused: bool,
    larger: int | None,
    batch: int,
    end: int,
) -> None:
    bounds = Bounds(
        frames=frames, largest=larger, pixels=chunk, channels=larger, rows=rows, fused=fused
    )
    assert_bounded_pieces_equal_whole(MODELS[layout], sizes, bounds, batch, end)


@pytest.mark.parametrize("layout", [str({}), str({"causal_mode": True})])
@torch.no_grad()
def test_a_bounded_step_is_a_step(layout: str) -> None:
    """It gives as much, remembers the same, changes no state, and shares no storage with it."""
    model, bounds = MODELS[layout], Bounds(frames=1, pixels=3)
    latent = clip(72, 4, 2, batch=2)
    _, state = model.decode_step(latent[:, :, :62])
    kept = [[t.clone() for t in layer] for layer in state]
    frames, after = model.decode_step(latent[:, :, 62:], state)
    bounded_frames, bounded_after = streamed.step(
        model.decoder, latent[:, :, 62:].clone(), state, bounds
    )
    assert frames is not None and bounded_frames is not None
    assert difference(bounded_frames, frames) < 1e-10
    storages = set()
    for old, mine, theirs, before in zip(state, bounded_after, after, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, before, strict=True))
        assert torch.equal(mine[0], theirs[0])
        assert all(
            difference(a, b) < 1e-10 for a, b in zip(mine[1:], theirs[1:], strict=True) if b.numel()
        )
        storages |= {t.untyped_storage().data_ptr() for t in old if t.numel()}
    fresh = [t for layer in bounded_after for t in layer if t.numel()]
    new = {t.untyped_storage().data_ptr() for t in fresh}
    assert not storages & new
    assert bounded_frames.untyped_storage().data_ptr() not in storages | new


@torch.no_grad()
def test_streams_of_unequal_age_walk_bounded() -> None:
    for options, settled in ({"causal_mode": True}, 3), ({}, 60):
        model = MODELS[str(options)]
        latents = [clip(settled + 8, 4, 2) * (i + 1) for i in range(2)]
        states, rest = [], []
        for latent, length in zip(latents, (settled, settled + 2), strict=True):
            states.append(model.decode_step(latent[:, :, :length])[1])
            rest.append(latent[:, :, length : length + 5])
        joined = tuple(
            tuple(torch.cat(pair) for pair in zip(*layers, strict=True))
            for layers in zip(*states, strict=True)
        )
        together, _ = streamed.step(model.decoder, torch.cat(rest), joined, Bounds(pixels=3))
        for i in range(2):
            alone, _ = model.decode_step(rest[i], states[i])
            assert together is not None and alone is not None
            assert difference(together[i : i + 1], alone) < 1e-10


@torch.no_grad()
def assert_future_is_unseen_bounded(
    model: TemporalVAE, bounds: Bounds, sizes: list[int], frame: int
) -> None:
    """Law 3, bit for bit, in a bounded walk and in bounded steps."""
    length = sum(sizes)
    frame = frame % (length - 1) + 1
    other = (latent := clip(length, 4, 2)).clone()
    other[:, :, frame:] += 1
    walks: list[Callable[[Tensor], Tensor]] = [
        lambda x: bounded.walk(model.decoder, x, bounds),
        lambda x: decode_in_pieces(model, cut(x, sizes), bounds),
    ]
    for walk in walks:
        a, b = walk(latent), walk(other)
        assert torch.equal(a[:, :, :frame], b[:, :, :frame]), "the future changed the past"
        assert not torch.equal(a[:, :, frame], b[:, :, frame])


CAUSAL_MODELS = [
    MODELS[str({"causal_mode": True})],
    awake(causal_mode=True, num_temporal_layers=2, temporal_kernel_size=5),
    awake(causal_mode=True, temporal_attention_reach=0, channel_multipliers=(1,)),
]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_the_future_never_changes_the_past_bounded(bounds: Bounds) -> None:
    assert_future_is_unseen_bounded(CAUSAL_MODELS[0], bounds, [4, 5], 5)


@drawn(
    6,
    40,
    model=st.sampled_from(CAUSAL_MODELS),
    bounds=st.sampled_from(BOUNDS),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    frame=st.integers(0, 20),
)
def test_no_future_changes_any_past_bounded(
    model: TemporalVAE, bounds: Bounds, sizes: list[int], frame: int
) -> None:
    assert_future_is_unseen_bounded(model, bounds, sizes, frame)


@pytest.mark.parametrize("bounds", [BOUNDS[0], BOUNDS[3]], ids=str)
def test_law_3_sees_a_future_that_leaks_into_a_bounded_walk(bounds: Bounds) -> None:
    model = awake(causal_mode=True)
    assert_future_is_unseen_bounded(model, bounds, [4, 5], 5)
    conv = next(m for m in model.decoder.modules() if isinstance(m, TimeConv) and m.past == 2)
    conv.past, conv.future = 1, 1
    with pytest.raises(AssertionError, match="the future changed the past"):
        assert_future_is_unseen_bounded(model, bounds, [4, 5], 5)


@lru_cache(maxsize=16)
def model_in(layout: str, dtype: torch.dtype) -> TemporalVAE:
    return copy.deepcopy(MODELS[layout]).to(dtype)


@drawn(
    2,
    30,
    layout=st.sampled_from(list(MODELS)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    operation=st.sampled_from(["encode", "decode"]),
    share=st.floats(0, 1),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    batch=st.integers(1, 2),
)
@example(str({}), torch.float32, "decode", 0.0, [1, 2], 2)
@torch.no_grad()
def test_any_budget_and_dtype(
    layout: str, dtype: torch.dtype, operation: Any, share: float, sizes: list[int], batch: int
) -> None:
    """Laws 1 and 2 as a caller meets them: what a budget gives is what no budget gives."""
    model, exact = model_in(layout, dtype), model_in(layout, torch.float64)
    encoding = operation == "encode"  # of frames high enough for bands
    x = clip(sum(sizes), *((3, 24) if encoding else (4, 12)), batch).to(dtype)

    def planned(shape: Any, stream: bool) -> Any:
        least, most = (model.plan(shape, operation, None, b, stream=stream).peak_bytes
                       for b in ("least", None))  # fmt: skip
        budget = int(least + share * (most - least))
        plan = model.plan(shape, operation, budget=budget, stream=stream)
        assert plan.peak_bytes <= budget
        return plan

    def walked(vae: TemporalVAE, x: Tensor, plan: Any = None) -> Tensor:
        if encoding:
            return torch.cat(vae.encode_with_distribution(x, plan=plan), 1)
        return vae.decode(x, plan=plan)

    whole, truth = walked(model, x), walked(exact, x.double())
    found = [walked(model, x, planned(tuple(x.shape), False))]
    if getattr(model, f"{operation}_reach") is not None:
        steps = planned((*x.shape[:2], max(sizes), *x.shape[3:]), True)
        stream = model.moments_stream(steps) if encoding else model.decode_stream(steps)
        found.append(torch.cat(list(stream.pull(cut(x, sizes))), 2))

    def error(y: Tensor) -> float:
        return float((y.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())

    for y in found:
        assert y.shape == whole.shape
        if dtype == torch.float64:
            assert difference(y, whole) < 1e-10
        assert error(y) <= 1.3 * error(whole) + 1e-6


# Plans of streams ----------------------------------------------------------------------------


SYMMETRIC: dict[str, Any] = {}
CAUSAL: dict[str, Any] = {"causal_mode": True}


@pytest.mark.parametrize(
    ("options", "share", "length"),
    [
        (CAUSAL, "least", 5),
        *(
            pytest.param(options, share, length, marks=pytest.mark.slow)
            for options, length in ((SYMMETRIC, 1), (SYMMETRIC, 5), (CAUSAL, 1), (CAUSAL, 5))
            for share in (1.0, 0.9, "least")
            if (share, options, length) != ("least", CAUSAL, 5)
        ),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_plan_of_a_stream_foresees_its_peak(
    options: dict[str, Any], share: Any, length: int
) -> None:
    model = awake(base_channels=16, **options)
    begun = 12 if model.is_causal else 70
    latent = torch.randn(1, 4, 75, 16, 24, generator=torch.Generator().manual_seed(0)).double()
    shape = (1, 4, length, 16, 24)
    whole = model.plan(shape, stream=True)
    plan = model.plan(shape, budget="least", stream=True)
    if share != "least":
        budget = max(plan.peak_bytes, int(share * whole.peak_bytes))
        plan = model.plan(shape, budget=budget, stream=True)
    assert "state of the stream" in plan.explain()
    _, state = model.decode_step(latent[:, :, :begun])
    size = sum(t.nbytes for layer in state for t in layer[1:])
    assert plan.state_bytes == size
    piece = latent[:, :, begun : begun + length].contiguous()
    peaks = []
    for step in (
        lambda: model.decode_step(piece, state, plan),
        lambda: list(model._frame_steps(plan).flush(state)),
    ):
        with LiveBytes() as alive:
            known = (piece, *model.parameters(), *(t for layer in state for t in layer))
            for tensor in known:
                alive.leave_out(tensor)
            step()
        peaks.append(alive.most + size)
    frames = 0 if model.is_causal else model.decode_reach or 0
    peaks[1] -= frames * 3 * 48 * 64 * 8  # what was listed here
    assert max(peaks) <= plan.peak_bytes
    assert max(peaks) == pytest.approx(plan.peak_bytes, rel=0.25)


@torch.no_grad()
def test_the_end_of_a_kept_stream_is_within_its_plan() -> None:
    model = awake(base_channels=16, channel_multipliers=(1,))
    frame = torch.randn(1, 3, 1, 24, 32, generator=torch.Generator().manual_seed(0)).double()
    plan = model.plan(frame.shape, "encode", budget="least", stream=True)
    with LiveBytes() as alive:
        for tensor in (frame, *model.parameters()):
            alive.leave_out(tensor)
        stream = model.encode_stream(sample_mode=False, plan=plan)
        for _ in range((model.encode_reach or 0) + 4):
            stream.push(frame)
        kept = stream.state  # the caller's own
        for _ in stream.flush():
            pass
    assert kept
    assert alive.most <= plan.peak_bytes


@pytest.mark.parametrize(
    ("options", "bounded"), thinned(2, [{}, {"causal_mode": True}], [False, True])
)
@torch.no_grad()
def test_a_stream_that_hands_its_state_on_takes_one_state_less(
    options: dict[str, Any], bounded: bool
) -> None:
    model = awake(base_channels=16, blocks_per_level=2, **options)
    latent = torch.randn(1, 4, 30, 12, 16, generator=torch.Generator().manual_seed(0)).double()
    peaks, results = {}, {}
    for keeps in (True, False):
        plan = model.plan((1, 4, 5, 12, 16), stream=True, keep_state=keeps)
        if bounded:
            plan = model.plan(plan.shape, budget=plan.peak_bytes - 1, stream=True, keep_state=keeps)
            assert plan.bounds is not None
        with LiveBytes() as alive:
            for tensor in (latent, *model.parameters()):
                alive.leave_out(tensor)
            for _ in model.decode_stream(plan).pull(latent.split(5, 2)):
                pass
        peaks[keeps] = alive.most
        results[keeps] = join(list(model.decode_stream(plan).pull(latent[:, :, :12].split(5, 2))))
        assert peaks[keeps] <= plan.peak_bytes
    assert difference(results[True], results[False]) < 1e-10
    # at the worst moment a part of the next state was alive
    assert peaks[True] - peaks[False] > 0.3 * plan.state_bytes


@pytest.mark.parametrize("options", [{}, {"causal_mode": True}], ids=str)
@torch.no_grad()
def test_a_batch_hands_its_states_on(options: dict[str, Any]) -> None:
    model = awake(**options)
    latent = clip(20, 4, 2, batch=2)
    whole = model.plan((2, 4, 5, 2, 2), stream=True, keep_state=False)
    plan = replace(whole, bounds=Bounds(frames=2, pixels=3))
    found = join(list(model.decode_stream(plan).pull(latent.split(5, 2))))
    assert difference(found, model.decode(latent)) < 1e-10


@pytest.mark.parametrize("options", [{}, {"causal_mode": True}], ids=str)
@torch.no_grad()
def test_a_state_that_is_handed_on_stays_where_it_is(options: dict[str, Any]) -> None:
    """Made piece by piece, or moved, it cuts up the free memory: peaks would grow with length."""
    model = awake(**options)
    whole = model.plan((1, 4, 5, 3, 2), stream=True, keep_state=False)
    stream = model.decode_stream(replace(whole, bounds=Bounds(frames=2, pixels=3)))
    block = {t.untyped_storage().data_ptr() for layer in stream.state for t in layer[1:]}
    assert len(block) == 1
    assert sum(t.nbytes for layer in stream.state for t in layer[1:]) == whole.state_bytes
    begun = [[t.data_ptr() for t in layer[1:]] for layer in stream.state]
    for piece in torch.randn(1, 4, 20, 3, 2).double().split(5, 2):
        stream.push(piece)
        assert [[t.data_ptr() for t in layer[1:]] for layer in stream.state] == begun
    assert model.decode_stream(replace(whole, bounds=Bounds())).finish() is None
    for frames in (1, 2, 7):  # many layers get no frame before the end
        latent = torch.randn(1, 4, frames, 3, 2).double()
        given = join(
            list(model.decode_stream(replace(whole, bounds=Bounds())).pull(latent.split(2, 2)))
        )
        assert difference(given, model.decode(latent)) < 1e-10


@torch.no_grad()
def test_a_planned_step_leaves_the_state_it_was_given() -> None:
    model, pieces = awake(causal_mode=True), torch.randn(2, 4, 9, 3, 2).double().split(3, 2)
    plan = replace(model.plan((2, 4, 3, 3, 2), stream=True), bounds=Bounds(frames=2, pixels=3))
    _, state = model.decode_step(pieces[0], plan=plan)
    before = [[t.clone() for t in layer] for layer in state]
    once, _ = model.decode_step(pieces[1], state, plan)
    again, _ = model.decode_step(pieces[1], state, plan)
    for layer, kept in zip(state, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, kept, strict=True))
    assert once is not None and again is not None and torch.equal(once, again)


@pytest.mark.parametrize("budget", [None, "least"])
@torch.no_grad()
def test_a_stream_that_hands_its_state_on_goes_on_after_a_bad_piece(budget: Any) -> None:
    model, latent = MODELS[str({})], clip(70, 4, 2)
    plan = model.plan((1, 4, 35, 2, 2), budget=budget, stream=True, keep_state=False)
    with pytest.raises(ValueError, match="give it to encode_stream or decode_stream"):
        model.decode_step(latent[:, :, :35], plan=plan)
    stream = model.decode_stream(plan)
    given = [stream.push(latent[:, :, :35])]
    for bad, message in (
        (clip(4, 4, 3), "the plan is for"),
        (latent[:, :, :4].expand(2, -1, -1, -1, -1), "the plan is for"),
        (latent, "the plan is for"),
        (latent[:, :3, :4], "must have 4 channels"),
        (latent[:, :, :4].float(), "the model"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.push(bad)
    if budget:
        with torch.enable_grad(), pytest.raises(ValueError, match="under autograd"):
            stream.push(latent[:, :, 35:])
    given += [stream.push(latent[:, :, 35:]), stream.finish()]
    assert difference(join(given), model.decode(latent)) < 1e-10


@torch.no_grad()
def test_a_stream_that_hands_its_state_on_ends_where_a_step_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, latent = MODELS[str({})], clip(4, 4, 2)
    stream = model.decode_stream(model.plan(latent.shape, stream=True, keep_state=False))

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("as if")

    monkeypatch.setattr(TemporalBlock, "step", failing)
    with pytest.raises(RuntimeError, match="as if"):
        stream.push(latent)
    with pytest.raises(ValueError, match="a step of it failed"):
        stream.push(latent)


@torch.no_grad()
def test_planned_steps_and_streams() -> None:
    model = awake()
    video = pixels(70)
    plan = model.plan((1, 3, 8, 16, 24), "encode", budget="least", stream=True)
    whole = model.encode(video, generator=torch.Generator().manual_seed(3))
    noise = torch.Generator().manual_seed(3)
    stream = model.encode_stream(generator=noise, plan=plan)
    assert difference(torch.cat(list(stream.pull(video.split(8, 2))), 2), whole) < 1e-10
    noise.manual_seed(3)
    stream = model.encode_stream(generator=noise)
    given = [stream.push(piece) for piece in video.split(7, 2)]
    kept = stream.state
    assert difference(join([*given, stream.finish()]), whole) < 1e-10
    with pytest.raises(ValueError, match="has ended"):
        stream.push(video)
    with pytest.raises(ValueError, match="has ended"):
        stream.finish()
    again = model.encode_stream(sample_mode=False)
    again.state = kept
    with pytest.raises(ValueError, match="multiples of 2"):
        again.push(pixels(1, 15, 16))
    assert again.state is kept
    assert again.push(video[:, :, :3]) is not None
    frames = model.decode_stream(model.plan((1, 4, 9, 8, 12), budget="least", stream=True))
    assert (
        difference(torch.cat(list(frames.pull(whole.split(9, 2))), 2), model.decode(whole)) < 1e-10
    )


def test_a_plan_for_a_stream_is_for_its_steps() -> None:
    model, latent = MODELS[str({})], clip(4, 4, 2)
    steps = model.plan(latent.shape, budget="least", stream=True)
    whole = model.plan(latent.shape, budget="least")
    with torch.no_grad():
        assert model.decode_step(latent[:, :, :2], plan=steps)[0] is None  # a shorter piece may be
        for plan, x in ((whole, latent), (steps, clip(5, 4, 2)), (steps, clip(4, 4, 3))):
            with pytest.raises(ValueError, match="the plan is for"):
                model.decode_step(x, plan=plan)
        with pytest.raises(ValueError, match="the plan is for"):
            model.decode(latent, plan=steps)
    with pytest.raises(ValueError, match="no_grad"):
        model.decode_step(latent, plan=replace(steps, bounds=Bounds()))
    with torch.no_grad():
        _, state = model.decode_step(latent)
        for plan in (whole, model.plan((1, 4, 1, 3, 2), budget="least", stream=True)):
            with pytest.raises(ValueError, match="the plan is for"):
                model.decode_finish(state, plan)
        assert model.decode_step(latent, None)[0] is None and model.decode_finish(None) is None
    clipped = awake(temporal_norm="clip", clip_frames=4, temporal_encoder=False)
    with pytest.raises(ValueError, match="cannot decode a stream"):
        clipped.plan(latent.shape, stream=True)
    assert clipped.plan((1, 3, 4, 8, 8), "encode", stream=True).state_bytes == 0


@torch.no_grad()
def test_a_stored_budget_holds_for_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latent = awake(), clip(40, 4, 8)
    exact, honest, seen = model.decode(latent), bounded.step, []

    def watched(*args: Any) -> Tensor | None:
        seen.append(args[3])
        return honest(*args)

    monkeypatch.setattr(bounded, "step", watched)
    model.set_tiling_enabled(True)
    frames = model.decode_stream()
    assert difference(torch.cat(list(frames.pull(latent.split(8, 2))), 2), exact) < 1e-10
    step, end = (model.plan((1, 4, n, 8, 8), budget="least", stream=True).bounds for n in (8, 1))
    assert len(seen) > 5 and set(seen[:5]) == {step} and set(seen[5:]) == {end}


# Results -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_result_goes_where_it_is_wanted() -> None:
    model, latent = MODELS[str({})], clip(5, 4, 2, batch=2)
    exact, plan = model.decode(latent), model.plan(latent.shape, budget="least")
    for how in (None, plan):
        out = torch.full(exact.shape, 7.0, dtype=torch.float32)
        assert model.decode(latent, plan=how, out=out) is out
        assert difference(out, exact.float()) < 1e-6
        other = torch.empty(2, 5, 3, 4, 4, dtype=torch.float64)
        model.decode(latent.transpose(1, 2), layout="BTCHW", plan=how, out=other)
        assert difference(other.transpose(1, 2), exact) < 1e-10
        image = torch.empty(2, 3, 4, 4, dtype=torch.float64)
        model.decode(latent[:, :, 0], out=image)
        assert difference(image, model.decode(latent[:, :, 0])) < 1e-10
    with pytest.raises(ValueError, match="out must hold"):
        model.decode(latent, out=torch.empty(2, 3, 5, 4, 5))
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        model.decode(latent, out=torch.empty(exact.shape))


@pytest.mark.parametrize(
    "layout", [str({}), str({"temporal_attention_reach": 0, "time_conv_out": True})]
)
def test_frames_as_they_are_made(layout: str) -> None:
    model, latent = MODELS[layout], clip(5, 4, 2)
    with torch.no_grad():
        exact = model.decode(latent)
        plan = replace(model.plan(latent.shape), bounds=Bounds(frames=1, pixels=3))
        pieces = list(model.iter_decode(latent, plan=plan))
        assert len(pieces) == 5 and difference(torch.cat(pieces, 2), exact) < 1e-10
        assert difference(torch.cat(list(model.iter_decode(latent)), 2), exact) < 1e-10
        with pytest.raises(ValueError, match="one clip"):
            model.iter_decode(clip(5, 4, 2, batch=2))
        frames = model.iter_decode(latent, plan=plan)
    with torch.inference_mode():
        others = model.iter_decode(latent, plan=plan)
    assert difference(torch.cat(list(others), 2), exact) < 1e-10
    assert difference(torch.cat(list(frames), 2), exact) < 1e-10  # pulled where gradients are on
    with pytest.raises(ValueError, match="no_grad"):
        model.iter_decode(latent, plan=plan)


# What is there -------------------------------------------------------------------------------


def test_a_budget_above_what_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[str({})]
    monkeypatch.setattr(budget, "available_bytes", lambda device: 10 * 2**20)
    assert model.plan((1, 4, 2, 2, 2), budget="9MiB").peak_bytes < 9 * 2**20
    with pytest.raises(ValueError, match=r"11MiB.* is above the memory that is free, 10485760"):
        model.plan((1, 4, 2, 2, 2), budget="11MiB")


def test_what_is_free(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert 2**26 < (budget.available_bytes(cpu) or 0) < 2**50
    assert budget.available_bytes(torch.device("meta")) is None
    assert budget._left_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 200\n")
    assert budget._left_in_container(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert budget._left_in_container(tmp_path) is None


@torch.no_grad()
def test_out_of_memory_means_plan_smaller_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose memory others use: here it fails in the middle of a walk, twice."""
    model = awake(base_channels=16, blocks_per_level=2)
    z = torch.randn(1, 4, 3, 24, 32, generator=torch.Generator().manual_seed(0)).double()
    plan, exact = model.plan(z.shape, budget=10**9), model.decode(z)
    honest, left = TemporalBlock.compute, [7, 9]

    def failing(self: TemporalBlock, *args: Any) -> Tensor:
        if left and not args[0].is_meta:  # not while a plan is made, on shapes
            left[0] -= 1
            if not left[0]:
                left.pop(0)
                raise torch.OutOfMemoryError("as if")
        return honest(self, *args)

    monkeypatch.setattr(TemporalBlock, "compute", failing)
    walked: list[Any] = []
    once = Runner._walk_once

    def watched(self: Runner, operation: Any, clip: Tensor, plan: Any, out: Any) -> Tensor:
        walked.append(plan)
        return once(self, operation, clip, plan, out)

    monkeypatch.setattr(Runner, "_walk_once", watched)
    assert difference(model.decode(z, plan=plan), exact) < 1e-10
    peaks = [p.peak_bytes for p in walked]
    assert len(peaks) == 3 and peaks[0] > peaks[1] > peaks[2]
    left.extend([1] * 99)
    with pytest.raises(torch.OutOfMemoryError):
        model.decode(z, plan=plan)
    left[:] = [1]
    with pytest.raises(torch.OutOfMemoryError):  # without a plan nobody asked for less
        model.decode(z)


@torch.no_grad()
def test_a_full_disk_is_said_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    model, latent = MODELS[str({})], clip(3, 4, 2)
    plan = model.plan(latent.shape, offload=tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        model.decode(latent, plan=plan)
    assert not list(tmp_path.iterdir())


def test_a_plan_says_what_is_never_stored() -> None:
    plan = MODELS[str({})].plan((1, 4, 5, 2, 2))
    fused = replace(plan, bounds=Bounds(rows=16, fused=True))
    assert "never stored" in fused.explain() and "never stored" not in plan.explain()


@torch.no_grad()
def test_an_end_that_fails_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latent = awake(), clip(70, 4, 2)
    stream = model.decode_stream()
    given = [stream.push(latent)]
    honest = TemporalBlock.step

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("as if")

    monkeypatch.setattr(TemporalBlock, "step", failing)
    with pytest.raises(RuntimeError, match="as if"):
        stream.finish()
    monkeypatch.setattr(TemporalBlock, "step", honest)
    assert difference(join([*given, stream.finish()]), model.decode(latent)) < 1e-10
    with pytest.raises(ValueError, match="has ended"):
        stream.flush()


@torch.no_grad()
def test_pieces_begin_again_in_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that were given before memory ran out are not given again."""
    model = awake(base_channels=16)
    latent = torch.randn(1, 4, 6, 8, 12, generator=torch.Generator().manual_seed(0)).double()
    honest, calls, fails, left = OnFrames.frames, 0, set[int](), list[Bounds]()

    def failing(self: OnFrames, x: Tensor, *rest: Any) -> Tensor:
        nonlocal calls
        if not x.is_meta:  # not while a plan is made, on shapes
            calls += 1
            if calls in fails:
                raise torch.OutOfMemoryError("as if")
        return honest(self, x, *rest)

    monkeypatch.setattr(OnFrames, "frames", failing)
    exact = model.decode(latent)
    bounded_plan = model.plan(latent.shape, budget="least")
    stream_plan = model.plan((1, 4, 9, 8, 12), budget=10**9, stream=True)

    ways = [Bounds(frames=2, pixels=9), Bounds(rows=5, pixels=7)]

    def smaller(self: TemporalVAE, plan: Any) -> Any:
        return replace(plan, bounds=left.pop(0)) if left else None

    monkeypatch.setattr(Runner, "_smaller", smaller)

    def drained() -> Iterator[Tensor]:
        stream = model.decode_stream(stream_plan)
        assert stream.push(latent) is None
        return stream.flush()

    def walked(make: Callable[[], Iterator[Tensor]], *failures: int) -> list[Tensor]:
        nonlocal calls
        fails.clear()
        pieces, calls, left[:] = make(), 0, ways
        fails.update(failures)
        found = list(pieces)
        assert not fails or calls > max(fails)
        assert len(left) == 2 - len(failures)
        return found

    makers: list[Callable[[], Iterator[Tensor]]] = [
        lambda: model.iter_decode(latent, plan=bounded_plan), drained
    ]  # fmt: skip
    for pieces in makers:
        found = walked(pieces)
        assert len(found) > 1 and difference(torch.cat(found, 2), exact) < 1e-10
        last = calls
        for failures in ([2, 5], [last, last + 2]):
            found = walked(pieces, *failures)
            assert difference(torch.cat(found, 2), exact) < 1e-10, failures
        with pytest.raises(torch.OutOfMemoryError):
            walked(pieces, *range(1, 999))
    again = model.iter_decode(latent, plan=bounded_plan)
    left[:], calls = ways, 0
    fails.clear()
    fails.add(2)
    with torch.enable_grad():  # pulled where gradients are on
        assert difference(torch.cat(list(again), 2), exact) < 1e-10


@torch.no_grad()
def test_a_step_out_of_memory_is_planned_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latent = awake(base_channels=16, causal_mode=True), clip(6, 4, 24)
    plan = model.plan(latent.shape, budget=10**9, stream=True)
    honest, bounds = streamed.step, []

    def failing(line: Any, x: Tensor, state: Any, bound: Any = None) -> Any:
        bounds.append(bound)
        if len(bounds) == 1:
            raise torch.OutOfMemoryError("as if")
        return honest(line, x, state, bound)

    monkeypatch.setattr(streamed, "step", failing)
    frames, _ = model.decode_step(latent, plan=plan)
    assert frames is not None and difference(frames, model.decode(latent)) < 1e-10
    assert len(bounds) == 2 and bounds[0] != bounds[1]


@pytest.mark.gpu
@torch.no_grad()
def test_a_stream_with_its_activation_on_the_host() -> None:
    model = awake().cuda()
    latent = clip(70, 4, 2).cuda()
    plan = model.plan((1, 4, 8, 2, 2), budget="least", stream=True, offload="host")
    stream = model.decode_stream(plan)
    back = torch.cat(list(stream.pull(latent.split(8, 2))), 2)
    assert difference(back, model.decode(latent)) < 1e-10
    whole = model.plan(latent.shape, offload="host")
    assert difference(model.decode(latent, plan=whole), model.decode(latent)) < 1e-10


# Mutations -----------------------------------------------------------------------------------


def assert_red(layout: dict[str, Any], bounds: Bounds, sizes: list[int]) -> None:
    with pytest.raises(AssertionError):
        assert_bounded_pieces_equal_whole(MODELS[str(layout)], sizes, bounds)


@pytest.mark.parametrize("layout", [{}, {"causal_mode": True}], ids=str)
def test_law_2_sees_a_bounded_step_that_drops_its_tails(
    layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, made = workspace.new_like, list[Tensor]()

    def poisoned(tail: Tensor) -> Tensor:
        made.append(tail)
        return honest(tail).fill_(1e9)

    assert layout in LAYOUTS
    monkeypatch.setattr(workspace, "new_like", poisoned)
    assert_bounded_pieces_equal_whole(MODELS[str(layout)], [9, 8], Bounds(pixels=3))  # all written
    assert made
    advance = TemporalBlock.step

    def forgetful(self: TemporalBlock, *args: Any, **options: Any) -> Any:
        y, tails = advance(self, *args, **options)
        return y, tuple(torch.zeros_like(tail) for tail in tails)

    monkeypatch.setattr(TemporalBlock, "step", forgetful)
    assert_red(layout, Bounds(pixels=3), [9, 8])


def test_law_1_sees_rows_read_after_they_were_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_bounded_pieces_equal_whole(MODELS[str({})], [3], Bounds(rows=1))
    monkeypatch.setattr(bounded, "_aside", lambda rows: rows.new_zeros(rows.shape))
    assert_red({}, Bounds(rows=1), [3])


@pytest.mark.parametrize("options", [{}, {"causal_mode": True}], ids=str)
@torch.no_grad()
def test_all_memory_is_asked_for_before_the_first_layer(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pieces take is had before work begins; what cannot be had ends the walk before it."""
    model = awake(base_channels=16, **options)
    latent = torch.randn(1, 4, 6, 12, 16, generator=torch.Generator().manual_seed(0)).double()
    plan = model.plan(latent.shape, budget="least")
    steps = model.plan(latent.shape, budget="least", stream=True)
    assert plan.bounds is not None
    assert plan.bounds.workspace == next(size for name, size in plan.parts if " in " in name)
    honest, asked, moments = workspace.Workspace.reserve, list[int](), list[str]()

    def reserve(self: workspace.Workspace) -> None:
        with LiveBytes() as alive:
            honest(self)
        asked.append(alive.most)
        moments.append("reserved")

    for kind in (OnFrames, ResidualBlock, TemporalBlock):
        for name in ("frames", "compute", "step"):
            if name in vars(kind):
                monkeypatch.setattr(kind, name, noting(getattr(kind, name), moments))
    monkeypatch.setattr(workspace.Workspace, "reserve", reserve)

    def begins(walk: Callable[[], object], bounds: Bounds | None) -> None:
        moments.clear()
        asked.clear()
        walk()
        assert moments[0] == "reserved" and moments.count("reserved") == 1 and len(moments) > 5
        assert bounds is not None and asked == [bounds.workspace] and asked[0] > 0

    begins(lambda: model.decode(latent, plan=plan), plan.bounds)
    begins(lambda: list(model.iter_decode(latent, plan=plan)), plan.bounds)
    begins(lambda: model.decode_step(latent, None, steps), steps.bounds)
    _, state = model.decode_step(latent, None, steps)
    moments.clear()
    model.decode_step(latent, state, steps)  # a later step has what the first one had
    assert "reserved" not in moments and moments
    image = awake(num_temporal_layers=0)  # without a state to tell the first step by
    plain = image.plan(latent.shape, budget="least", stream=True)
    begins(lambda: image.decode_step(latent, None, plain), plain.bounds)

    monkeypatch.setattr(workspace.Workspace, "reserve", honest)
    moments.clear()
    with pytest.raises(RuntimeError, match="allocate"):
        bounded.walk(model.decoder, latent, Bounds(workspace=2**60))
    assert not moments


def noting(method: Callable[..., Tensor], moments: list[str]) -> Callable[..., Tensor]:
    """A method of a layer that leaves its name."""

    def noted(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        moments.append(method.__name__)
        return method(self, *args, **kwargs)

    return noted
