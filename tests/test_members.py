"""The members of the reference page: vectors, copies, gradients, features, compilation."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import awake, difference, drawn, pixels, thinned
from hypothesis import strategies as st
from torch import Tensor, nn

from temporal_vae import TemporalVAE, TemporalVAEConfig, losses
from temporal_vae.walks import tracing

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def everything(model: TemporalVAE) -> dict[str, Any]:
    """All that a call must leave as it was, by value."""
    return {
        "tensors": {name: x.clone() for name, x in model.state_dict().items()},
        "identities": [id(p) for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "trained": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "generator": model._generator.get_state().clone(),
        "global": torch.get_rng_state().clone(),
        "setters": (model.slicing_enabled, model.tiling_enabled, model.memory_budget),
        "active": model.get_active_feature_indices(),
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.fixture(autouse=True)
def _global_random_state() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "no member draws from it"


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


# Parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_goes_out_and_comes_back(dtype: torch.dtype) -> None:
    model, other = awake(dtype), awake(dtype, seed=1)
    vector = model.get_parameters()
    assert (vector.dtype, tuple(vector.shape)) == (dtype, (model.parameter_count,))
    start = 0
    for _, p in model.named_parameters():  # the order is that of named_parameters
        assert torch.equal(vector[start : start + p.numel()], p.detach().flatten())
        start += p.numel()
    before = [id(p) for p in other.parameters()]
    other.set_parameters(vector)
    assert [id(p) for p in other.parameters()] == before
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    x = pixels(3, 8, 8).to(dtype)
    assert torch.equal(other.predict(x), model.predict(x))
    vector.zero_()
    assert torch.equal(other.get_parameters(), model.get_parameters()), "the vector is a copy"
    assert float(model.get_parameters().abs().sum()) > 0


def test_a_vector_of_another_dtype_is_cast() -> None:
    model = awake(torch.float32)
    model.set_parameters(model.get_parameters().double() * 2)
    assert model.dtype == torch.float32
    assert model.supports_parameter_initialization


def spoilt(n: int) -> dict[str, Any]:
    nan, infinite = torch.zeros(n), torch.zeros(n)
    nan[n // 2], infinite[-1] = math.nan, -math.inf
    return {
        "short": torch.zeros(n - 1), "long": torch.zeros(n + 1), "empty": torch.zeros(0),
        "matrix": torch.zeros(1, n), "scalar": torch.zeros(()), "list": [0.0] * n,
        "none": None, "numpy": np.zeros(n), "integers": torch.zeros(n, dtype=torch.int64),
        "nan": nan, "infinite": infinite,
    }  # fmt: skip


@pytest.mark.parametrize("what", spoilt(2))
def test_a_wrong_vector_changes_nothing(what: str) -> None:
    model = awake(torch.float32)
    before, vector = everything(model), spoilt(model.parameter_count)[what]
    for step in (
        lambda: model.set_parameters(vector),
        lambda: model.with_parameters(vector),
        lambda: model.apply_gradients(vector, 0.1),
    ):
        with pytest.raises(ValueError, match=r"vector|gradients"):
            step()
    if what not in ("nan", "infinite"):
        with pytest.raises(ValueError, match="vector"):
            model.sanitize_parameters(vector)
    assert_same(everything(model), before)


def test_what_overflows_the_weights_own_dtype_is_not_finite() -> None:
    model = awake(torch.float16)
    vector = model.get_parameters().float()
    vector[3] = 1e6
    with pytest.raises(ValueError, match=r"1 of \d+ numbers that are not finite in torch.float16"):
        model.set_parameters(vector)
    assert torch.equal(model.sanitize_parameters(vector), model.get_parameters())


def test_each_half_keeps_a_dtype_of_its_own() -> None:
    model = awake(torch.float32)
    model.encoder.half()
    before = everything(model)
    for vector in (model.get_parameters(), model.sanitize_parameters(model.get_parameters())):
        model.set_parameters(vector)
        assert_same(everything(model), before)
    model = awake(torch.float32)
    model.decoder.half()
    loud = model.get_parameters() * 6
    model.set_parameters(loud)
    assert (
        model.stream_scales["decoder"]
        == awake(torch.float16).with_parameters(loud).stream_scales["decoder"]
        < 1
    )
    loud[-1] = 1e6
    with pytest.raises(ValueError, match=r"1 of \d+ numbers that are not finite"):
        model.set_parameters(loud)


def test_sanitised_is_the_current_value_where_it_must_be() -> None:
    model = awake(torch.float32)
    current = model.get_parameters()
    vector = torch.arange(len(current), dtype=torch.float32)
    vector[::7] = math.nan
    vector[1::7] = math.inf
    clean = model.sanitize_parameters(vector)
    kept = vector.isfinite()
    assert torch.equal(clean[kept], vector[kept]) and torch.equal(clean[~kept], current[~kept])
    model.set_parameters(clean)


def test_with_parameters_leaves_the_model() -> None:
    model = awake(torch.float32)
    before = everything(model)
    other = model.with_parameters(torch.zeros(model.parameter_count))
    assert float(other.get_parameters().abs().sum()) == 0
    assert_same(everything(model), before)


def test_float16_parameters_set_anew_keep_results_finite() -> None:
    """The scales that keep a stream within float16 follow the weights."""
    model = awake(torch.float16)
    loud = model.with_parameters(model.get_parameters() * 6)
    fresh = awake(torch.float64)
    fresh.set_parameters(loud.get_parameters().double())
    x = pixels(3, 8, 8)
    assert difference(loud.predict(x.half()).double(), fresh.predict(x)) < 0.05
    assert loud.stream_scales == fresh.half().stream_scales


# Copies --------------------------------------------------------------------------------------


def set_up(model: TemporalVAE) -> TemporalVAE:
    model.set_slicing_enabled(True)
    model.set_memory_budget("3GiB")
    model.set_active_feature_indices([0, 2, 3])
    model.eval()
    model.decoder.train()
    model.encoder.requires_grad_(False)
    next(model.decoder.parameters()).grad = torch.ones_like(next(model.decoder.parameters()))
    model.sample(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))  # the generator moves on
    return model


@pytest.mark.parametrize(
    ("dtype", "way"),
    thinned(2, DTYPES, [TemporalVAE.clone, TemporalVAE.deep_copy, copy.deepcopy]),
)
def test_a_copy_is_the_same_and_shares_nothing(
    way: Callable[[TemporalVAE], TemporalVAE], dtype: torch.dtype
) -> None:
    model = set_up(awake(dtype, causal_mode=True, num_temporal_layers=2))
    before, other = everything(model), way(model)
    copied = everything(other)
    assert all(grad is None for grad in copied["grads"]), "gradients are not carried"
    assert other.config == model.config
    for name in before.keys() - {"identities", "grads"}:
        assert_same(copied[name], before[name])
    mine = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    yours = {p.untyped_storage().data_ptr() for p in (*other.parameters(), *other.buffers())}
    assert not mine & yours
    x = pixels(3, 8, 8).to(dtype)
    assert torch.equal(model.encode(x), other.encode(x)), "the same draw of noise"
    assert torch.equal(model.encode(x), other.encode(x)), "and each goes on alone"
    other.set_parameters(torch.zeros(other.parameter_count))
    other.set_tiling_enabled(True)
    other.set_active_feature_indices([1])
    assert_same(dict(model.state_dict()), before["tensors"])
    assert (model.tiling_enabled, model.get_active_feature_indices()) == (False, [0, 2, 3])


def test_a_copy_takes_the_memory_of_one_more_model() -> None:
    model = awake(torch.float32)
    size = sum(p.nbytes for p in model.parameters())
    with tracing.LiveBytes() as alive:
        for p in model.parameters():
            alive.leave_out(p)
        model.clone()
    assert size <= alive.most <= 1.05 * size, "the rest is the state of the generator"


def test_a_copy_of_a_model_that_never_ran_is_the_same() -> None:
    model = TemporalVAE(base_channels=8, channel_multipliers=(1, 2))
    x = pixels(2, 8, 8).float()
    assert torch.equal(model.clone().predict(x), model.predict(x))


def test_a_copy_made_in_inference_mode_can_be_trained() -> None:
    model, x = awake(torch.float32), pixels(2, 8, 8).float()
    with torch.inference_mode():
        copies = [model.clone(), model.deep_copy(), model.with_parameters(model.get_parameters())]
        expected = model.compute_gradients(x, x.flip(-1))
    for other in copies:
        assert torch.equal(other.compute_gradients(x, x.flip(-1)), expected)


class Weighted(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs().mean() * self.weight


def test_a_loss_with_parameters_is_no_part_of_the_model() -> None:
    loss = Weighted()
    model = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), loss_function=loss, seed=0)
    plain = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), seed=0)
    assert model.default_loss_function is loss
    assert model.parameter_count == plain.parameter_count
    assert model.state_dict().keys() == plain.state_dict().keys()
    copied = model.clone().default_loss_function
    assert isinstance(copied, Weighted) and copied.weight is not loss.weight
    x = pixels(2, 8, 8).float()
    gradients = model.compute_gradients(x, x)
    assert len(gradients) == model.parameter_count and loss.weight.grad is None


# Gradients -----------------------------------------------------------------------------------


def cubic(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().pow(3).mean()


@pytest.mark.parametrize(
    ("options", "loss"),
    thinned(
        2,
        [
            {},
            {"causal_mode": True},
            {
                "temporal_norm": "clip",
                "clip_frames": 3,
                "norm_groups": 4,
                "temporal_encoder": False,
            },
            {"num_temporal_layers": 0},
        ],
        [None, cubic],
    ),
)
def test_gradients_are_those_of_central_differences(
    options: dict[str, Any], loss: Callable[[Tensor, Tensor], Tensor] | None
) -> None:
    """Along random directions and single parameters, in float64 on an awake model."""
    model = awake(**options)
    x, target = pixels(3, 8, 8), pixels(3, 8, 8).roll(1, 2)
    found = model.compute_gradients(x, target, loss)
    at, generator = model.get_parameters(), torch.Generator().manual_seed(0)

    def value(vector: Tensor) -> float:
        other = model.with_parameters(vector)
        return float((loss or losses.mean_squared_error)(other.predict(x), target))

    directions = [torch.randn(len(at), generator=generator, dtype=at.dtype) for _ in range(2)]
    for i in torch.topk(found.abs(), 2).indices.tolist():
        directions.append(torch.zeros_like(at).index_fill(0, torch.tensor(i), 1.0))
    for d in directions:
        step = 1e-5 / float(d.abs().max())
        # the two steps together leave an error of the fourth order
        near, far = ((value(at + h * d) - value(at - h * d)) / (2 * h) for h in (step, 2 * step))
        assert math.isclose((4 * near - far) / 3, float(found @ d), rel_tol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference"])
def test_gradients_leave_everything_as_it_was(mode: str, fails: bool) -> None:
    model = set_up(awake(torch.float32))
    model.set_tiling_enabled(True)

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        torch.rand(3)  # a loss may draw
        if fails:
            raise ArithmeticError("the loss has no value here")
        return losses.mean_squared_error(prediction, target)

    surround = {
        "plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode
    }[mode]  # fmt: skip
    with surround():
        x = pixels(3, 8, 8).float()
        before = everything(model)
        if fails:
            with pytest.raises(ArithmeticError):
                model.compute_gradients(x, x, loss)
        else:
            found = model.compute_gradients(x, x, loss)
            trained = torch.cat(
                [torch.full((p.numel(),), p.requires_grad) for p in model.parameters()]
            )
            assert not found[~trained].any() and float(found[trained].abs().max()) > 0
            assert not found.requires_grad
        assert_same(everything(model), before)


def test_a_loss_without_the_prediction_has_zero_gradient() -> None:
    model = awake(torch.float32)
    x = pixels(2, 8, 8).float()
    found = model.compute_gradients(x, x, lambda prediction, target: target.square().mean())
    assert len(found) == model.parameter_count and not found.any()


def test_a_parameter_without_a_part_has_zero_gradient() -> None:
    model = awake(torch.float32)
    model.spare = nn.Parameter(torch.ones(3))  # of a subclass, say
    x = pixels(2, 8, 8).float()
    found = model.compute_gradients(x, x.flip(-1))
    names = [name for name, _ in model.named_parameters()]
    assert names[0] == "spare" and not found[:3].any() and bool(found[3:].any())


@pytest.mark.parametrize("loss", [lambda p, t: p - t, lambda p, t: 1.0, lambda p, t: None])
def test_what_is_no_scalar_is_refused(loss: Any) -> None:
    x = pixels(2, 8, 8).float()
    with pytest.raises(ValueError, match="a loss must give a scalar tensor"):
        awake(torch.float32).compute_gradients(x, x, loss)


def test_a_target_of_another_shape_is_refused_not_broadcast() -> None:
    model = awake(torch.float32)
    with pytest.raises(ValueError, match="must have one shape"):
        model.compute_gradients(pixels(2, 8, 8).float(), torch.zeros(1, 3, 1, 8, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_gradients_is_a_step_down(dtype: torch.dtype) -> None:
    model = awake(dtype)
    before, gradients = model.get_parameters(), torch.ones(model.parameter_count)
    model.apply_gradients(gradients, 0.25)
    assert torch.equal(model.get_parameters(), before - 0.25)


@pytest.mark.parametrize("rate", [0, -1e-3, math.nan, math.inf, "1e-4", None, True])
def test_a_rate_that_is_none_is_refused(rate: Any) -> None:
    model = awake(torch.float32)
    before = everything(model)
    for step in (
        lambda: model.apply_gradients(torch.zeros(model.parameter_count), rate),
        lambda: model.train_step(pixels(2, 8, 8).float(), learning_rate=rate),
    ):
        with pytest.raises(ValueError, match="learning_rate must be a finite number above 0"):
            step()
    assert_same(everything(model), before)


# One step ------------------------------------------------------------------------------------


def test_twenty_steps_lower_the_loss() -> None:
    model = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), seed=0)
    x = pixels(3, 16, 16).float()
    start = losses.mean_squared_error(model.predict(x), x)
    found = [model.train_step(x) for _ in range(20)]
    assert losses.mean_squared_error(model.predict(x), x) < start
    assert found[0].keys() == {"reconstruction", "kl", "loss"}
    assert all(math.isclose(f["loss"], f["reconstruction"] + f["kl"], rel_tol=1e-6) for f in found)
    quick = [model.train_step(x, learning_rate=0.02)["loss"] for _ in range(20)]
    assert sum(quick[-5:]) < 0.8 * sum(quick[:5])


def test_a_step_is_the_documented_one() -> None:
    model, x, target = awake(), pixels(2, 8, 8), pixels(2, 8, 8).flip(-1)
    twin = model.clone()
    found = model.train_step(x, target, learning_rate=0.1)
    reconstruction, (mean, log_variance) = twin(x)
    kl = losses.KL_WEIGHT * twin.kl_divergence(mean, log_variance) / mean[0].numel()
    loss = losses.mean_squared_error(reconstruction, target) + kl
    assert math.isclose(found["loss"], float(loss.detach()), rel_tol=1e-12)
    assert math.isclose(found["kl"], float(kl.detach()), rel_tol=1e-12) and found["kl"] > 0
    loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert q.grad is not None and p.grad is None
        assert torch.allclose(p, q - 0.1 * q.grad, rtol=0, atol=1e-12)


def test_a_step_uses_the_loss_of_the_model_and_spares_what_is_frozen() -> None:
    model = TemporalVAE(
        base_channels=8, channel_multipliers=(1, 2), loss_function=cubic, seed=0
    ).eval()
    model.encoder.requires_grad_(False)
    x = pixels(2, 8, 8).float()
    encoder = {name: p.clone() for name, p in model.encoder.state_dict().items()}
    decoder = model.decoder.conv_in.weight.clone()
    state = torch.get_rng_state()
    found = model.train_step(x, learning_rate=0.1)
    reconstruction, _ = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), seed=0)(x)
    assert math.isclose(
        found["reconstruction"], float(cubic(reconstruction, x).detach()), rel_tol=1e-5
    )
    assert_same(dict(model.encoder.state_dict()), encoder)
    assert not torch.equal(model.decoder.conv_in.weight, decoder)
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, t: (p.mean() * 0).log(),
        lambda p, t: p.mean() + math.inf,  # its gradient is finite
        lambda p, t: (p * 0).abs().sqrt().sum(),  # its gradient alone is not
    ],
    ids=["nowhere", "infinite", "edge"],
)
def test_a_step_into_nothing_changes_no_parameter(loss: Any) -> None:
    model = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), loss_function=loss, seed=0)
    before = model.get_parameters()
    with pytest.raises(ValueError, match=r"must be finite|not finite"):
        model.train_step(pixels(2, 8, 8).float())
    assert torch.equal(model.get_parameters(), before)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_divergence_may_be_larger_than_the_weights_dtype_holds(dtype: torch.dtype) -> None:
    """As the sum over a long clip is in float16; here over a short one of large means."""
    model, x = awake(dtype), pixels(2, 16, 16)
    quant = model.encoder.quant_conv
    assert quant is not None
    with torch.no_grad():
        quant.bias[:4] += 40
    posterior = model.encode_with_distribution(x.to(dtype))
    expected = float(losses.kl_divergence(*(moment.double() for moment in posterior)).detach())
    assert expected > 65_504
    assert math.isclose(float(model.kl_divergence(*posterior).detach()), expected, rel_tol=1e-4)
    found = model.train_step(x.to(dtype))["kl"]
    assert math.isclose(found, losses.KL_WEIGHT * expected / posterior.mean.numel(), rel_tol=0.02)


def test_predict_has_no_side_effect() -> None:
    model = set_up(awake(torch.float32))
    x = pixels(3, 8, 8).float()
    before, given = everything(model), x.clone()
    first = model.predict(x)
    assert torch.equal(model.predict(x), first) and not first.requires_grad
    assert torch.equal(x, given)
    assert_same(everything(model), before)


# Metadata ------------------------------------------------------------------------------------


def test_metadata_of_svd_are_the_known_counts() -> None:
    with torch.device("meta"):
        meta = TemporalVAE.from_config(TemporalVAEConfig.svd()).get_metadata()
    assert meta.parameter_count == sum(meta.parameters.values()) == 97_742_847
    assert meta.parameters == {
        "encoder_spatial": 34_163_592 + 72, "encoder_temporal": 0,
        "decoder_spatial": 49_490_179, "decoder_temporal": 14_088_974 + 30,
    }  # fmt: skip
    assert (meta.encode_reach, meta.encode_delay) == (0, 0)
    assert (meta.decode_reach, meta.decode_delay) == (None, None)
    assert meta.device == "meta"
    with pytest.raises(FrozenInstanceError):
        meta.device = "cpu"  # type: ignore[misc]


@pytest.mark.parametrize("causal", [False, True])
def test_metadata_are_json_and_the_delay_is_what_a_stream_shows(causal: bool) -> None:
    model = awake(torch.float32, causal_mode=causal, temporal_attention_reach=2)
    model.set_active_feature_indices([1, 3])
    meta = model.get_metadata()
    record = json.loads(json.dumps(meta.to_dict()))
    assert TemporalVAEConfig.from_dict(record["config"]) == model.config
    assert (record["dtype"], record["device"]) == ("float32", "cpu")
    assert (record["active_features"], record["version"]) == ([1, 3], version("temporal-video-vae"))
    assert (meta.encode_reach, meta.decode_reach) == (model.encode_reach, model.decode_reach)
    lateness = [meta.encode_delay, meta.decode_delay]
    steps: list[tuple[Callable[..., Any], Tensor]] = [
        (model.encode_step, torch.zeros(1, 3, 1, 4, 4)),
        (model.decode_step, torch.zeros(1, 4, 1, 2, 2)),
    ]
    for late, (step, piece) in zip(lateness, steps, strict=True):
        given, state = step(piece)
        found = 0
        while given is None:
            given, state = step(piece, state)
            found += 1
        assert late == found and (late > 0) != causal


# Features ------------------------------------------------------------------------------------


@drawn(
    4,
    30,
    active=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    causal=st.booleans(),
)
def test_masked_channels_say_nothing(active: list[int], causal: bool) -> None:
    model, x = awake(causal_mode=causal, temporal_attention_reach=1), pixels(3, 8, 8)
    plain, latent = model.encode(x, False), pixels(3, 4, 4, channels=4)
    model.set_active_feature_indices(active)
    assert model.get_active_feature_indices() == sorted(active)
    assert [model.is_feature_used(i) for i in range(4)] == [i in active for i in range(4)]
    masked = [i for i in range(4) if i not in active]
    for z in (model.encode(x, False), model.encode(x)):
        assert not z[:, masked].any()
    assert torch.equal(model.encode(x, False)[:, active], plain[:, active])
    mean, log_variance = model.encode_with_distribution(x)
    assert not mean[:, masked].any() and not log_variance[:, masked].any()
    other = latent.clone()
    other[:, masked] = 7.0
    assert torch.equal(model.decode(latent), model.decode(other))
    assert torch.equal(next(model.iter_decode(other)), model.decode(latent))
    streamed = model.decode_stream()
    assert (
        difference(torch.cat(list(streamed.pull(other.split(2, 2))), 2), model.decode(latent))
        < 1e-10
    )
    frames = list(model.encode_stream(sample_mode=False).pull(x.split(2, 2)))
    assert difference(torch.cat(frames, 2), model.encode(x, False)) < 1e-10
    moments = torch.cat(list(model.moments_stream().pull(x.split(2, 2))), 2)
    assert difference(moments, torch.cat([mean, log_variance], 1)) < 1e-10
    moved = other.clone()
    moved[:, active] += 1.0
    assert difference(model.decode(moved), model.decode(latent)) > 1e-3
    model.set_active_feature_indices(range(4))
    assert torch.equal(model.encode(x, False), plain)


def test_a_masked_model_is_one_function_everywhere() -> None:
    """Bounded, forward, gradients and the graph see the same mask."""
    model, x = awake(), pixels(3, 8, 8)
    model.set_active_feature_indices([1, 2])
    expected = model.predict(x)
    with torch.no_grad():
        reconstruction, _ = model(x, sample_posterior=False)
        assert torch.equal(reconstruction, expected)
        model.set_tiling_enabled(True)
        assert difference(model.predict(x), expected) < 1e-10
    loss = model.compute_gradients(x, expected)
    assert float(loss.abs().max()) < 1e-10, "the prediction of a gradient is predict's"


@pytest.mark.parametrize("indices", [[], [4], [-1], [0, 0], [0.5], ["0"], None, [True], 3])
def test_what_are_no_channels_is_refused(indices: Any) -> None:
    model = awake(torch.float32)
    model.set_active_feature_indices([0, 3])
    with pytest.raises(ValueError, match="latent channel"):
        model.set_active_feature_indices(indices)
    assert model.get_active_feature_indices() == [0, 3]


def test_a_channel_that_is_none_is_no_index() -> None:
    for index in (4, -1):
        with pytest.raises(IndexError, match="latent channels are 0 to 3"):
            awake(torch.float32).is_feature_used(index)


def test_what_is_no_number_is_not_taken_for_equal_shares() -> None:
    found = awake(torch.float32).get_feature_importance(pixels(2, 8, 8).float() * math.nan)
    assert all(math.isnan(f.share) for f in found.values())


def test_importance_is_measured() -> None:
    """On a model with a channel that the encoder leaves empty, and one the decoder never reads."""
    model, clips = awake(), [pixels(3, 8, 8), pixels(2, 8, 8, batch=2)]
    with torch.no_grad():
        quant, first = model.encoder.quant_conv, model.decoder.post_quant_conv
        assert quant is not None and first is not None
        for row in (1, 5):  # mean and log-variance of channel 1
            quant.weight[row] = 0
            quant.bias[row] = 0
        first.weight[:, 2] = 0
    found = model.get_feature_importance(clips)
    assert list(found) == [f"channel_{i}" for i in range(4)]
    assert math.isclose(sum(f.share for f in found.values()), 1)
    assert found["channel_1"].kl == 0 and found["channel_1"].share == 0
    assert found["channel_2"].decibels == 0 and (found["channel_2"].kl or 0) > 0
    assert (found["channel_0"].kl or 0) > 0 and found["channel_0"].decibels
    assert model.get_feature_importance(clips) == found, "nothing is drawn"
    assert model.get_active_feature_indices(clips) == [0, 2, 3]
    assert model.get_active_feature_indices(clips, threshold=1e9) == []

    expected = torch.zeros(4, dtype=torch.float64)
    for clip in clips:
        mean, log_variance = model.encode_with_distribution(clip)
        terms = (mean**2 + log_variance.exp() - 1 - log_variance) / 2
        expected += terms.mean((0, 2, 3, 4)).detach() / 2
    assert torch.allclose(torch.tensor([f.kl for f in found.values()]).double(), expected)

    lost = 0.0
    for clip in clips:
        z = model.encode(clip, False)
        for sign, latent in ((1, z), (-1, z.index_fill(1, torch.tensor(3), 0.0))):
            picture = model.decode(latent).detach().clamp(-1, 1)
            lost -= sign * 10 * math.log10(losses.mean_squared_error(picture, clip)) / len(clips)
    assert math.isclose(found["channel_3"].decibels or 0, lost, rel_tol=1e-9)

    means = [model.encode(clip, False).detach().transpose(0, 1).flatten(1) for clip in clips]
    at = float(torch.cat(means, 1)[3].var(correction=0))
    for threshold, active in ((at * 0.999, True), (at * 1.001, False)):
        assert (3 in model.get_active_feature_indices(clips, threshold)) == active

    unmeasured = model.get_feature_importance()
    assert unmeasured["channel_2"] == (0.0, None, None)
    assert math.isclose(sum(f.share for f in unmeasured.values()), 1)
    with pytest.raises(ValueError, match="no clip"):
        model.get_feature_importance([])


# Compilation ---------------------------------------------------------------------------------


BACKEND = "eager"
"""Traces and breaks as the default one does, then runs what it saw without compiling it."""
SLIM = {"blocks_per_level": 1}
"""A line with every kind of layer in it that is soon traced."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@torch.no_grad()
def test_a_compiled_model_is_one_graph_each_way() -> None:
    """A graph that breaks is an error: see below."""
    model = awake(torch.float32, **SLIM, temporal_norm="clip", clip_frames=3)
    x = pixels(3, 8, 8).float()
    expected = model.predict(x)
    model.compile(backend=BACKEND)
    assert difference(model.predict(x), expected) < 1e-5
    assert {"encode", "decode"} == {name for name, _ in model._settings.compiled}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"causal_mode": True}, {"temporal_norm": "clip", "clip_frames": 3}], ids=str
)
def test_moments_and_decode_are_one_graph(options: dict[str, Any]) -> None:
    model, x = awake(torch.float32, **SLIM, **options), pixels(3, 8, 8).float()
    with torch.no_grad():
        expected, z = model.predict(x), model.encode(x, False)
        moments = torch.compile(model.encode_with_distribution, fullgraph=True, backend=BACKEND)
        decode = torch.compile(model.decode, fullgraph=True, backend=BACKEND)
        assert difference(moments(x).mean, z) < 1e-5
        assert difference(decode(z), expected) < 1e-5
        model.compile(backend=BACKEND)
        assert difference(model.predict(x), expected) < 1e-5
        assert {"encode", "decode"} == {name for name, _ in model._settings.compiled}


def test_a_causal_step_is_one_graph_for_every_step() -> None:
    model = awake(torch.float32, causal_mode=True, channel_multipliers=(1,), **SLIM)
    z = torch.randn(1, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    graphs = torch._dynamo.testing.CompileCounterWithBackend(BACKEND)
    with torch.no_grad():
        expected = torch.cat(list(model.decode_stream().pull(z.split(1, 2))), 2)
        model.compile(backend=graphs)
        found, state = [], None
        for frame in z.split(1, 2):
            y, state = model.decode_step(frame, state)
            assert y is not None
            found.append(y)
    assert difference(torch.cat(found, 2), expected) < 1e-5
    assert graphs.frame_count <= 2, "one for the first step, one for all others"


def test_a_graph_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = awake(torch.float32, **SLIM)
    forward = model.encoder.conv_in.forward

    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return forward(x)

    monkeypatch.setattr(model.encoder.conv_in, "forward", breaks)
    model.compile(backend=BACKEND)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model.predict(pixels(2, 8, 8).float())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own look at it
@pytest.mark.slow
def test_a_compiled_model_trains_and_is_copied() -> None:
    model, x = awake(torch.float32, **SLIM), pixels(3, 8, 8).float()
    expected = model.compute_gradients(x, x.flip(-1))
    model.compile(backend=BACKEND)
    assert difference(model.compute_gradients(x, x.flip(-1)), expected) < 1e-4
    other = model.clone()
    other.set_parameters(torch.zeros(other.parameter_count))
    assert not other.predict(x).any() and model.predict(x).any(), "each compiles its own weights"
    assert {"encode", "decode"} == {name for name, _ in other._settings.compiled}


@pytest.mark.slow
def test_switching_after_compiling_takes_effect() -> None:
    model, x = awake(torch.float32, **SLIM), pixels(3, 8, 8, batch=2).float()
    with torch.no_grad():
        expected = model.predict(x)
        model.compile(backend=BACKEND)
        model.predict(x)
        seen: list[int] = []
        compiled = model._settings.compiled["decode", model.decoder]

        def watched(z: Tensor) -> Any:
            seen.append(len(z))
            return compiled(z)

        model._settings.compiled["decode", model.decoder] = watched
        model.predict(x)
        model.set_slicing_enabled(True)
        model.set_slicing_enabled(True)
        assert difference(model.predict(x), expected) < 1e-5
        assert seen == [2, 1, 1], "sample by sample from then on"
        model.set_tiling_enabled(True)
        assert difference(model.predict(x), expected) < 1e-5
        assert seen == [2, 1, 1], "tiling walks bounded"
        model.set_tiling_enabled(False)
        model.set_slicing_enabled(False)
        model.predict(x)
        assert seen == [2, 1, 1, 2]


def test_tiling_goes_before_a_budget() -> None:
    model, z = awake(torch.float32), pixels(5, 16, 16, channels=4).float()
    model.set_memory_budget("1GiB")
    model.set_tiling_enabled(True)
    for tiling, walk in ((True, "bounded"), (False, "whole")):  # where the budget is plenty
        model.set_tiling_enabled(tiling)
        plan = model._runner.plan_for("decode", z, None)
        assert plan is not None and plan.gradients and plan.walk == walk
        assert model.decode(z).requires_grad


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
@pytest.mark.parametrize("causal", [False, True])
def test_the_default_compiler_gives_the_same_numbers(causal: bool) -> None:
    model, x = awake(torch.float32, causal_mode=causal), pixels(3, 8, 8).float()
    with torch.no_grad():
        expected = model.predict(x)
        steps = [*model.decode_stream().pull(model.encode(x, False).split(1, 2))]
        model.compile()
        assert difference(model.predict(x), expected) < 1e-4
        compiled = [*model.decode_stream().pull(model.encode(x, False).split(1, 2))]
        assert difference(torch.cat(compiled, 2), torch.cat(steps, 2)) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"causal_mode": True, "channel_multipliers": (1,)},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in ({}, {"causal_mode": True, "channel_multipliers": (1, 2, 2)})
        ),
    ],
    ids=str,
)
def test_one_graph_serves_every_shape(options: dict[str, Any]) -> None:
    model = awake(torch.float32, **SLIM, **options)
    f = model.downsample_factor
    program = model.export_computation_graph(pixels(3, 2 * f, 4 * f, batch=2).float())
    graph = program.module()
    for batch, frames, rows, columns in ((1, 1, 2, 2), (3, 5, 3, 2), (1, 70, 2, 5)):
        x = pixels(frames, f * rows, f * columns, batch=batch).float()
        assert difference(graph(x), model.predict(x)) < 1e-4


def test_a_graph_of_images_and_of_masks() -> None:
    model = awake(torch.float32, channel_multipliers=(1,), **SLIM)
    model.set_active_feature_indices([0, 1])
    x = pixels(1, 8, 12, batch=2).float()[:, :, 0]
    graph = model.export_computation_graph(x).module()
    other = torch.cat([x, x], -1)[:1]
    assert difference(graph(other), model.predict(other)) < 1e-4


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 1, 2, 2),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 3, 8, 8), (2, 3, 1, 8, 8))),
    ],
    ids=str,
)
def test_any_example_makes_a_graph_of_any_size(shape: tuple[int, ...]) -> None:
    """One sample, one frame, one latent cell: what the graph is traced with is another matter."""
    model = awake(torch.float32, **SLIM)
    graph = model.export_computation_graph(torch.zeros(shape)).module()
    for batch, frames, rows, columns in ((1, 1, 4, 6), (3, 5, 8, 4)):
        x = pixels(frames, rows, columns, batch=batch).float()
        x = x if len(shape) == 5 else x[:, :, 0]
        assert difference(graph(x), model.predict(x)) < 1e-4


@pytest.mark.parametrize("shape", [(2, 3, 2, 7, 8), (3, 2, 8), (2, 4, 2, 8, 8)], ids=str)
def test_an_example_that_is_no_video_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"example must|multiples of 2, got 7x8"):
        awake(torch.float32).export_computation_graph(torch.zeros(shape))
