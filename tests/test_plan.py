"""Plans: what they promise is what a walk takes, and a budget never changes the result."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from threading import Barrier, Thread
from typing import Any, cast

import pytest
import torch
from conftest import awake, difference, pixels, thinned
from test_bounded import SVD_LIKE
from test_citizens import Halved
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame

from temporal_vae import TemporalVAE, TemporalVAEConfig, WanVAEConfig
from temporal_vae.network.kernels.winograd import SPACE_BYTES
from temporal_vae.walks import bounded, piecewise
from temporal_vae.walks import plan as planning
from temporal_vae.walks.budget import BudgetError, parse_budget
from temporal_vae.walks.peak import PlanRequest
from temporal_vae.walks.plan import Plan
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.tracing import LiveBytes, Tracer

LAYOUTS: list[dict[str, Any]] = [{}, {"causal_mode": True}, SVD_LIKE]
MODELS = {str(options): awake(base_channels=16, **options) for options in LAYOUTS}


def latent(model: TemporalVAE, frames: int = 6, height: int = 24, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, frames, height, width, generator=generator).to(model.dtype)


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (None, None),
        ("least", "least"),
        (5, 5),
        ("7", 7),
        ("1kB", 1000),
        ("1.5MiB", 1536 * 1024),
        ("2 GB", 2 * 10**9),
        ("6GiB", 6 * 2**30),
    ],
)
def test_budgets(words: str | int | None, number: object) -> None:
    assert parse_budget(words) == number


@pytest.mark.parametrize("words", ["", "much", "-1GiB", "6 giraffes", 0, "0GiB", -5, True, 1.5])
def test_what_is_no_budget(words: Any) -> None:
    with pytest.raises(ValueError, match="a budget is"):
        parse_budget(words)
    with pytest.raises(ValueError, match="a budget is"):
        MODELS[str({})].set_memory_budget(words)


@pytest.mark.parametrize(
    ("layout", "operation", "share"),
    thinned(2, MODELS, ["encode", "decode"], [1.0, 0.7, 0.5, "least"]),
)
@torch.no_grad()
def test_the_predicted_peak_is_the_real_one(layout: str, operation: Any, share: Any) -> None:
    """Against every storage that is alive while the walk really runs."""
    model = MODELS[layout]
    x = latent(model) if operation == "decode" else pixels(6, 48, 64)
    whole = model.plan(x.shape, operation).peak_bytes
    budget = share if share == "least" else int(share * whole)
    plan = model.plan(x.shape, operation, budget=budget)
    if share != "least":
        assert plan.peak_bytes <= budget
    assert plan.walk == ("whole" if share == 1.0 else "bounded")
    with LiveBytes() as alive:
        for there in (x, *model.parameters()):
            alive.leave_out(there)
        model._runner._walk(operation, x, plan)
    assert alive.most == pytest.approx(plan.peak_bytes, rel=0.15)
    counted = sum(size for name, size in plan.parts if name != "margin")
    assert alive.most < 1.04 * counted  # sums, which are much of small frames


@torch.no_grad()
def test_the_peak_is_the_same_where_something_was_compiled() -> None:
    """Then Python calls functions in another way, which holds their arguments for longer."""
    model, x = MODELS[str({})], pixels(6, 48, 64)
    plan = model.plan(x.shape, "encode")
    before = set_eval_frame(False)
    try:
        with LiveBytes() as alive:
            for there in (x, *model.parameters()):
                alive.leave_out(there)
            model._runner._walk("encode", x, plan)
    finally:
        set_eval_frame(before)
    assert alive.most < 1.04 * sum(size for name, size in plan.parts if name != "margin")


@pytest.mark.parametrize("layout", MODELS)
@torch.no_grad()
def test_a_budget_never_changes_the_result(layout: str) -> None:
    model, z = MODELS[layout], latent(MODELS[layout])
    video = pixels(6, 24, 32, batch=2)
    exact, mean = model.decode(z), model.encode(video, False)
    for budget in ("least", int(0.5 * model.plan(z.shape).peak_bytes)):
        plan = model.plan(z.shape, budget=budget)
        assert difference(model.decode(z, plan=plan), exact) < 1e-10
        plan = model.plan(video.shape, "encode", budget="least")
        assert difference(model.encode(video, False, plan=plan), mean) < 1e-10


@torch.no_grad()
@torch.no_grad()
@pytest.mark.parametrize("options", [*LAYOUTS, {"causal_mode": True, "num_temporal_layers": 0}])
def test_without_a_plan_frames_are_walked_in_groups_where_that_is_faster(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "GROUP_BYTES", 0)  # of one frame
    model = awake(**options)
    walked = spied(bounded, "walk", monkeypatch)
    z, video = latent(model, 5, 6, 4), pixels(5, 12, 8)
    faster = "clip_frames" not in options  # SVD's decoder, whose norms see all frames
    assert difference(model.decode(z), model.decoder(z)) < 1e-10
    moments = model.encoder(video)
    assert difference(model.encode(video, sample_mode=False), moments.chunk(2, 1)[0]) < 1e-10
    assert len(walked) == (2 if faster else 1)
    assert model.plan(z.shape).walk == "whole", "which needs no bounds"
    model.set_memory_budget("1GiB")
    model.decode(z, out=torch.empty_like(video))
    model.decode(z, plan=model.plan(z.shape))
    assert len(walked) == (4 if faster else 1)
    walked.clear()
    model.decode(z[:, :, :1])
    assert not walked, "one frame is one group"
    cuda = torch.device("cuda")
    request = PlanRequest(None, "decode", tuple(z.shape), z.dtype, False, (None,), cuda)
    assert planning.fastest(model.decoder, request) is None


def test_whoever_looks_in_sees_the_whole_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, hooks on any part, parts of another kind, `torch.func`, modes that record,
    autocast, compiled networks: without a plan, with one for any budget, with a large budget."""
    monkeypatch.setattr(planning, "GROUP_BYTES", 0)
    model = awake(torch.float32)
    walked = spied(bounded, "walk", monkeypatch)
    z, frames = latent(model, 5, 6, 4), list[int]()
    for plan, budget in ((None, None), (model.plan(z.shape), None), (None, "1GiB")):
        model.set_memory_budget(budget)
        decode = partial(model.decode, z, plan=plan)
        if budget is None:
            assert decode().requires_grad
        with torch.no_grad():
            expected = decode()
            assert walked.pop() and not walked
            for context in (LiveBytes(), torch.autocast("cpu", torch.bfloat16)):
                with context:
                    decode()
            with model.decoder.conv_out.register_forward_hook(
                lambda *call: frames.append(len(call[2]))
            ):
                decode()
            line, block = model.decoder, model.decoder.mid_block
            model.decoder = cast(Any, nn.DataParallel(line))
            assert difference(decode(), expected) < 1e-5
            model.decoder = line
            line.mid_block = cast(Any, Halved(block))
            decode()
            line.mid_block = block
            kind, conv = type(line), cast(Any, line.up_blocks[0]).resnets[0]
            line.__class__ = type("Other", (kind,), {"forward": lambda self, x: x})
            assert torch.equal(decode(), z)
            line.__class__ = kind
            conv.conv2 = nn.Sequential(conv.conv2, nn.Identity())
            assert difference(decode(), expected) < 1e-5
            conv.conv2 = conv.conv2[0]
            decode()
            assert walked.pop() and not walked
    model.set_memory_budget(None)
    with torch.no_grad():
        torch.func.vmap(lambda latent: model.decode(latent[None]))(torch.cat([z, z]))
        model.compile(backend="eager")
        model.decode(z)
    assert frames == [5, 5, 5] and not walked
    for plan in (None, model.plan(z.shape)):
        model.requires_grad_(False)
        weight = model.decoder.conv_out.weight.detach().clone().requires_grad_()
        del model.decoder.conv_out.weight
        model.decoder.conv_out.weight = weight
        assert model.decode(z, plan=plan).requires_grad, "of a weight that is no parameter"


@torch.no_grad()
def test_a_result_may_be_written_over_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "GROUP_BYTES", 0)
    for layers in (0, 1):
        model = awake(num_temporal_layers=layers)
        z = latent(model, 5, 6, 4).repeat(2, 1, 1, 1, 1)
        expected = model.decode(z)
        for plan in (None, model.plan(z.shape, budget="least")):
            memory = torch.zeros_like(expected)
            given = memory.view(-1)[: z.numel()].view(z.shape).copy_(z)
            model.decode(given, plan=plan, out=memory)
            assert difference(memory, expected) < 1e-10


@torch.no_grad()
def test_groups_take_no_more_than_the_whole_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "GROUP_BYTES", 2**18)
    for layers in (0, 1, 2):
        model = awake(num_temporal_layers=layers, causal_mode=layers > 1)
        for frames, operation in product((4, 9, 20), ("decode", "encode")):
            line = model.decoder if operation == "decode" else model.encoder
            x = latent(model, frames) if operation == "decode" else pixels(frames, 48, 64)
            cpu = torch.device("cpu")
            request = PlanRequest(
                None, cast(Any, operation), tuple(x.shape), x.dtype, False, (None,), cpu
            )
            bounds, most = planning.fastest(line, request), []
            assert bounds is not None
            for walk in (line, partial(bounded.walk, line, bounds=bounds)):
                with LiveBytes() as alive:
                    alive.leave_out(x)
                    walk(x)
                most.append(alive.most)
            assert most[1] <= most[0]


def spied(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of a function."""
    function, calls = getattr(module, name), list[Any]()

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(module, name, spy)
    return calls


def test_the_setters_of_the_reference_page() -> None:
    model = awake(base_channels=16)
    video, image = pixels(3, batch=2), pixels(1)[:, :, 0]
    exact, exact_image = model.predict(video), model.predict(image)
    assert (model.slicing_enabled, model.tiling_enabled, model.memory_budget) == (
        False,
        False,
        None,
    )
    for _ in range(2):  # idempotent
        model.set_slicing_enabled(True)
        model.set_tiling_enabled(True)
        assert (model.slicing_enabled, model.tiling_enabled) == (True, True)
        assert difference(model.predict(video), exact) < 1e-10
        assert difference(model.predict(image), exact_image) < 1e-10
    model.set_tiling_enabled(False)
    assert (model.slicing_enabled, model.tiling_enabled) == (True, False)
    assert difference(model.predict(video), exact) < 1e-10
    model.set_slicing_enabled(False)
    model.set_memory_budget("1GiB")
    model.set_tiling_enabled(True)
    model.set_tiling_enabled(False)
    assert model.memory_budget == "1GiB" and not model.tiling_enabled
    assert difference(model.predict(video), exact) < 1e-10
    with pytest.raises(ValueError, match="below the least"):
        model.set_memory_budget(1000)
        model.predict(video)


@torch.no_grad()
def test_slicing_takes_less() -> None:
    model, video = awake(base_channels=16), pixels(3, batch=4)
    with LiveBytes() as together:
        model.encode(video, False)
    model.set_slicing_enabled(True)
    with LiveBytes() as singly:
        model.encode(video, False)
    assert singly.most < 0.5 * together.most


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can() -> None:
    model = MODELS[str({})]
    shape = latent(model).shape
    with pytest.raises(ValueError, match="below the least") as error:
        model.plan(shape, budget=10_000)
    found = re.search(r"can do with: (\d+) bytes", str(error.value))
    assert found
    smallest = int(found[1])
    assert model.plan(shape, budget=smallest).peak_bytes == smallest
    with pytest.raises(ValueError, match=f"{smallest} bytes"):
        model.plan(shape, budget=smallest - 1)
    # what is called the least may take a little more, for the sake of speed
    assert smallest <= model.plan(shape, budget="least").peak_bytes <= 1.05 * smallest


@torch.no_grad()
def test_a_plan_is_for_one_input() -> None:
    model = MODELS[str({})]
    plan = model.plan(latent(model).shape, budget="least")
    with pytest.raises(ValueError, match="the plan is for"):
        model.decode(latent(model, frames=5), plan=plan)
    with pytest.raises(ValueError, match="the plan is for"):
        model.encode(pixels(), plan=plan)
    with pytest.raises(ValueError, match="plan must be what plan"):
        model.encode(pixels(), plan="least")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="operation must be"):
        model.plan((1, 4, 2, 2, 2), "recode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape must be"):
        model.plan((4, 2, 2))


def test_a_plan_explains_itself() -> None:
    model = MODELS[str({})]
    plan = model.plan((1, 4, 6, 24, 32), budget="least")
    words = plan.explain()
    assert "bounded walk" in words and "pixels at a time" in words and "peak over weights" in words
    assert sum(size for _, size in plan.parts) == plan.peak_bytes
    assert "whole walk" in model.plan((1, 4, 6, 24, 32)).explain()


def test_a_plan_is_made_for_a_dtype_and_any_size_at_once() -> None:
    """No memory is touched: this one is for a third of a terabyte."""
    model = MODELS[str({})]
    huge = (1, 4, 5000, 190, 250)
    half, full = (model.plan(huge, dtype=d).peak_bytes for d in (torch.bfloat16, torch.float32))
    assert full == pytest.approx(2 * half, rel=0.01) and full > 10**11


@torch.no_grad()
def test_offload_is_not_counted_and_changes_nothing(tmp_path: Path) -> None:
    model = MODELS[str({})]
    z = latent(model)
    inside = model.plan(z.shape, budget="least")
    outside = model.plan(z.shape, budget="least", offload=tmp_path)
    assert outside.peak_bytes < 0.6 * inside.peak_bytes
    assert str(tmp_path) in outside.explain()
    with LiveBytes() as alive:
        alive.leave_out(z)
        y = model.decode(z, plan=outside)
    assert difference(y, model.decode(z)) < 1e-10
    assert not list(tmp_path.iterdir())
    plan = model.plan(z.shape, offload=tmp_path)
    assert plan.walk == "bounded" and difference(model.decode(z, plan=plan), y) < 1e-10
    with pytest.raises(ValueError, match="this one is on the CPU"):
        model.plan(z.shape, offload="host")
    with pytest.raises(ValueError, match="'host' or a folder"):
        model.plan(z.shape, offload=tmp_path / "missing")
    with pytest.raises(ValueError, match="'host' or a folder, got 3"):
        model.plan(z.shape, offload=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 0},
        {"frames": -1},
        {"pixels": -3},
        {"rows": 0},
        {"rows": 1.5},
        {"largest": 0},
    ],
    ids=str,
)
def test_bounds_are_above_zero(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Bounds(**wrong)
    with pytest.raises(ValueError, match="workspace must be a number of bytes, got -1"):
        Bounds(workspace=-1)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 3, 5, 8, 8), {}, "4 channels, got 3"),
        ((1, 4, -5, 8, 8), {}, "above 0"),
        ((1, 4, 0, 8, 8), {"budget": "least"}, "above 0"),
        ((1, 4, 5, 8.0, 8), {}, "above 0"),
        ((1, 3, 5, 7, 9), {"operation": "encode"}, "multiples of 2"),
        ((1, 4, 5, 8, 8), {"dtype": torch.int8}, "floating point"),
        ((1, 4, 5, 8, 8), {"budget": [1]}, "a budget is"),
    ],
    ids=str,
)
def test_what_cannot_be_planned(shape: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODELS[str({})].plan(shape, **options)


@pytest.mark.parametrize(("operation", "stream"), [("encode", True), ("decode", False)])
def test_a_plan_is_the_same_wherever_it_is_made(operation: Any, stream: bool) -> None:
    model = awake(torch.float32, channel_multipliers=(1, 2))
    shape = (1, 3 if operation == "encode" else 4, 2, 8, 8)

    def plans() -> list[Plan]:
        return [model.plan(shape, operation, budget=b, stream=stream) for b in (None, "least")]

    found = []
    for surroundings in (
        torch.no_grad, torch.enable_grad, torch.inference_mode,
        partial(torch.autocast, "cpu", torch.bfloat16),
    ):  # fmt: skip
        planning.planner.cache_clear()
        with surroundings():
            found.append(plans())
    assert all(each == found[0] for each in found)
    with torch.inference_mode():  # and begun in one place, gone on with in another
        planning.planner.cache_clear()
        first = model.plan(shape, operation, stream=stream)
    assert [first, model.plan(shape, operation, budget="least", stream=stream)] == found[0]


@torch.no_grad()
def test_threads_may_use_one_model_and_one_planner() -> None:
    model, x = MODELS[str({})], latent(MODELS[str({})], 3)
    least = model.plan(x.shape, budget="least").peak_bytes
    planning.planner.cache_clear()
    model.plan(x.shape)  # the one planner, with all other ways still to be counted
    inputs = [(x, "least"), (x, None), (x, 2 * least), (x, 1), (latent(model, 4), "least")]
    results: dict[int, Tensor | Exception] = {}
    together = Barrier(len(inputs))

    def work(i: int) -> None:
        z, budget = inputs[i]
        together.wait()
        try:
            with torch.no_grad():
                results[i] = model.decode(z, plan=model.plan(z.shape, budget=budget))
        except Exception as error:
            results[i] = error

    threads = [Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (z, budget) in enumerate(inputs):
        found = results[i]
        if budget == 1:
            assert isinstance(found, ValueError) and "below the least" in str(found)
        else:
            assert isinstance(found, Tensor), found
            assert difference(found, model.decode(z)) < 1e-10


def test_a_child_of_a_process_that_plans_can_plan() -> None:
    """A thread that it does not have may hold what it needs."""
    held = planning.planner(_question(MODELS[str({})]))
    with held._lock:
        child = os.fork()
        if not child:
            signal.alarm(30)
            again = planning.planner(_question(MODELS[str({})]))
            os._exit(int(again is held))
    assert os.waitpid(child, 0)[1] == 0
    assert planning.planner(_question(MODELS[str({})])) is held


def _question(model: TemporalVAE) -> PlanRequest:
    shape = (1, 4, 2, 2, 2)
    return PlanRequest(
        model.config.layout, "decode", shape, torch.float32, False, (None,), torch.device("cpu")
    )


def test_a_plan_is_of_one_layout() -> None:
    """That of a narrower model would be broken without a word."""
    narrow, wide = (awake(base_channels=n) for n in (8, 16))
    z = latent(wide)
    with pytest.raises(ValueError, match="a model of another layout"):
        wide.decode(z, plan=narrow.plan(z.shape))
    plan = wide.plan(z.shape)
    with pytest.raises(ValueError, match="a model on cpu, not on meta"):
        wide.to("meta").decode(z.to("meta"), plan=plan)
    # no plan depends on these
    other = awake(base_channels=8, latent_scale_factor=0.5, clip_frames=5)
    assert difference(other.decode(z, plan=narrow.plan(z.shape)), narrow.decode(z)) < 1e-10


def test_a_plan_for_a_gpu_counts_the_copies_of_its_norms() -> None:
    """Nothing is put there: a plan is made on shapes."""
    x = torch.empty(2, 8, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    for dtype, most in ((torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 3.5)):
        taken = []
        for device in ("cpu", "cuda"):
            tracer, y = Tracer(dtype, torch.device(device)), x.to(dtype)
            with LiveBytes() as alive:
                alive.leave_out(y)
                tracer._norm(y)
            taken.append(alive.most / y.nbytes)
        assert taken == [1, most]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@torch.no_grad()
def test_what_is_made_of_a_result_is_in_the_plan(batch: int) -> None:
    """Moments, noise and copies in another layout, where they are more than the walk itself."""
    model = awake(num_temporal_layers=0)
    video = pixels(90, 8, 8, batch=batch)
    plan = model.plan(video.shape, "encode", budget="least")
    z = model.encode(video, False)
    back = model.plan(z.shape, budget="least")
    swapped = z.transpose(1, 2)
    steps: list[tuple[int, Callable[[], Tensor]]] = [
        (plan.peak_bytes, lambda: model.encode(video, plan=plan)),
        (plan.peak_bytes, lambda: model.encode(video, False, plan=plan)),
        (back.peak_bytes, lambda: model.decode(z, plan=back)),
        (back.peak_bytes, lambda: model.decode(swapped, layout="BTCHW", plan=back)),
    ]
    for peak, step in steps:
        with LiveBytes() as alive:
            for x in (video, z, *model.parameters()):
                alive.leave_out(x)
            step()
        assert 0.5 * peak < alive.most <= peak


@pytest.mark.parametrize(("kind", "operation", "shape"), [
    ("page", "decode", (1, 4, 9, 8, 6)), ("page", "encode", (1, 3, 9, 64, 32)),
    ("Wan", "decode", (1, 4, 3, 8, 6)), ("Wan", "encode", (1, 3, 5, 64, 32)),
])  # fmt: skip
def test_few_ways_are_counted_and_none_is_overlooked(
    kind: str, operation: Any, shape: tuple[int, ...]
) -> None:
    """The plan for a budget is the first of all ways that fits, whatever was counted before."""
    config: TemporalVAEConfig | WanVAEConfig = awake().config
    if kind == "Wan":
        config = WanVAEConfig(latent_channels=4, base_channels=8, blocks_per_level=1)
    request = PlanRequest(
        config.layout, operation, shape, torch.float32, False, (None,), torch.device("cpu")
    )
    whole = planning.Planner(request)
    with planning._on_shapes_alone():
        ways = list(whole._candidates(True))
        floors = [planning.Planner(request)._floor(bounds) for bounds in ways]
        plans = [whole._plan(bounds) for bounds in ways]
    assert all(floor <= plan.peak_bytes for floor, plan in zip(floors, plans, strict=True))
    if kind == "Wan":
        layers = list(whole._line.layers())
        costs = [piecewise.operations(layers, shape, bounds) for bounds in ways if bounds]
        assert costs == sorted(costs) and costs[0] < costs[-1]
    least = min(plan.peak_bytes for plan in plans)
    nearly = next(p for p in plans if p.peak_bytes <= planning.NEARLY_LEAST * least)
    assert planning.Planner(request).plan("least") == nearly
    with pytest.raises(BudgetError, match=f"{least} bytes"):
        planning.Planner(request).plan(least - 1)
    for limit in {plan.peak_bytes for plan in plans}:
        fits = next(plan for plan in plans if plan.peak_bytes <= limit)
        assert planning.Planner(request).plan(limit) == fits


def test_many_threads_have_more_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    few = planning._kernels_bytes(torch.device("cpu"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert planning._kernels_bytes(torch.device("cpu")) >= few + 60 * SPACE_BYTES
    assert planning._kernels_bytes(torch.device("cuda")) == few, "which no GPU's plan counts"
