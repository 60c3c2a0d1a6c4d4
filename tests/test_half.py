"""float16: a residual stream that would overflow is carried scaled, and nothing else changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import awake, difference, redraw, thinned
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from safetensors.torch import load_file
from test_bounded import LAYOUTS, SVD_LIKE
from torch import Tensor, nn

from temporal_vae import TemporalVAE
from temporal_vae.checkpoints import diffusers_names
from temporal_vae.network import float16
from temporal_vae.network.kernels.norm import Moments, group_norm_in_float32, normalise
from temporal_vae.network.primitives import Scales
from temporal_vae.walks.bounded import walk
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.streamed import finish, step

WRITERS = re.compile(r"\b(conv_in|conv2|to_out\.0)\.")
INSIDE = re.compile(r"\bconv1\.")
PASSED_ON = re.compile(r"\b(conv_shortcut|(up|down)samplers\.0\.conv)\.bias")
LOUD = 2.0**14


@torch.no_grad()
def make_loud(model: nn.Module, gain: float = LOUD) -> None:
    """Multiply the residual stream and what is inside the branches: but for eps, nothing changes.

    Names are those of diffusers, and ours.
    """
    for name, parameter in model.named_parameters():
        if WRITERS.search(name) or INSIDE.search(name) or PASSED_ON.search(name):
            parameter.mul_(gain)


def theirs(family: str) -> Any:
    """A small awake model of diffusers, float64."""
    widths = (32, 64)
    if family == "svd":
        model: Any = AutoencoderKLTemporalDecoder(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 2,
            layers_per_block=2,
        )
    else:
        model = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=2,
        )
    redraw(model.double())
    return model.eval()


def ours(model: Any) -> TemporalVAE:
    """Our model with the weights of theirs."""
    config, state = diffusers_names.from_diffusers(model.state_dict(), model.config)
    result = TemporalVAE.from_config(config).double()
    result.load_state_dict(state)
    return result


@torch.no_grad()
def their_numbers(model: Any, video: Tensor, latent: Tensor) -> list[Tensor]:
    """Mean of a video (1, C, T, H, W), and the decoded latent, as (1, C, T, H, W)."""
    frames = video.shape[2]
    extra = {"num_frames": frames} if isinstance(model, AutoencoderKLTemporalDecoder) else {}
    mean = model.encode(video[0].transpose(0, 1)).latent_dist.mean
    decoded = model.decode(latent[0].transpose(0, 1), **extra).sample
    return [x.transpose(0, 1).unsqueeze(0) for x in (mean, decoded)]


@torch.no_grad()
def our_numbers(model: TemporalVAE, video: Tensor, latent: Tensor) -> list[Tensor]:
    return [model.encode(video, sample_mode=False), model.decode(latent)]


def inputs(frames: int = 3, cells: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    video = torch.rand(1, 3, frames, 2 * cells, 2 * cells, generator=generator) * 2 - 1
    return video.double(), torch.randn(1, 4, frames, cells, cells, generator=generator).double()


def rms(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).square().mean().sqrt())


# What it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["svd", "image"])
@pytest.mark.parametrize("gain", [2.0**12, 2.0**14])
def test_where_diffusers_overflows_the_error_is_that_of_a_quiet_model(
    family: str, gain: float
) -> None:
    quiet, loud = theirs(family), theirs(family)
    make_loud(loud, gain)
    given = inputs()
    halves = [x.half() for x in given]
    exact_quiet, exact_loud = their_numbers(quiet, *given), their_numbers(loud, *given)
    mine = ours(loud).half()
    results = our_numbers(mine, *halves)
    undisturbed = their_numbers(quiet.half(), *halves)
    overflown = their_numbers(loud.half(), *halves)
    assert all(scale < 1 for scale in mine.stream_scales.values())
    for i in range(2):
        assert not overflown[i].isfinite().all(), "diffusers' float16 does not overflow"
        assert results[i].isfinite().all()
        assert rms(results[i], exact_loud[i]) <= 2 * rms(undisturbed[i], exact_quiet[i])


@pytest.mark.parametrize("family", ["svd", "image"])
@torch.no_grad()
def test_black_frames_and_far_latents_stay_finite(family: str) -> None:
    loud = theirs(family)
    make_loud(loud)
    model = ours(loud).half()
    video, latent = inputs()
    for pixels in (torch.zeros_like(video), -torch.ones_like(video), video.sign()):
        assert model.encode(pixels.half(), sample_mode=False).isfinite().all()
    for cells in (torch.zeros_like(latent), torch.full_like(latent, 30.0), latent * 30):
        assert model.decode(cells.half()).isfinite().all()


@torch.no_grad()
def test_a_stream_that_swells_on_the_way() -> None:
    """As in trained models: the last blocks are the loudest."""
    quiet, model = awake(**SVD_LIKE), awake(**SVD_LIKE)
    make_loud(model.decoder.up_blocks[-1])
    latent = inputs()[1]
    exact, exact_quiet = model.decode(latent), quiet.decode(latent)
    y = model.half().decode(latent.half())
    undisturbed = quiet.half().decode(latent.half())
    error = rms(y, exact) / rms(exact, torch.zeros(1))
    assert error <= 2 * rms(undisturbed, exact_quiet) / rms(exact_quiet, torch.zeros(1))


# Algebra: exact in float64, whatever the scale -----------------------------------------------


def carried(model: TemporalVAE, stream: float = 2.0**-7, branch: float = 2.0**-3) -> TemporalVAE:
    """The same model with scales that it does not need."""
    model = copy.deepcopy(model)
    for line in (model.encoder, model.decoder):
        for layer in line.layers():
            layer.set_residual_scale(stream, branch)
    return model


def in_pieces(line: Any, x: Tensor, bounds: Bounds | None = None) -> Tensor:
    state: Any = ()
    given = []
    for piece in x.split([1, 2, x.shape[2] - 3], 2):
        y, state = step(line, piece, state, bounds)
        given += [] if y is None else [y]
    return torch.cat([*given, *finish(line, state, bounds)], 2)


def every_walk(line: Any) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    yield "whole", line
    for bounds in (
        Bounds(frames=2, pixels=5),
        Bounds(rows=3, pixels=7),
        Bounds(rows=3, pixels=7, fused=True),
    ):
        yield str(bounds), partial(walk, line, bounds=bounds)
        if line.reach is not None:
            yield f"pieces {bounds}", partial(in_pieces, line, bounds=bounds)
    if line.reach is not None:
        yield "pieces", partial(in_pieces, line)


def lines(model: TemporalVAE) -> list[tuple[Any, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    f = model.downsample_factor
    video = torch.randn(1, 3, 5, 3 * f, 4 * f, generator=generator)
    latent = torch.randn(1, 4, 5, 3, 4, generator=generator)
    return [(model.encoder, video.to(model.dtype)), (model.decoder, latent.to(model.dtype))]


@pytest.mark.parametrize("options", thinned(2, LAYOUTS))
@torch.no_grad()
def test_scales_change_nothing_in_any_walk(options: dict[str, Any]) -> None:
    model = awake(**options)
    for (plain, x), (line, _) in zip(lines(model), lines(carried(model)), strict=True):
        expected, given = plain(x), x.clone()
        for name, walked in every_walk(line):
            assert difference(walked(x), expected) < 1e-10, name
            assert torch.equal(x, given), f"{name} overwrote the caller's tensor"


@pytest.mark.parametrize("options", [{"causal_mode": True}, SVD_LIKE], ids=str)
def test_scales_change_no_gradient(options: dict[str, Any]) -> None:
    model = awake(**options)
    other = carried(model)
    for (plain, x), (line, _) in zip(lines(model), lines(other), strict=True):
        plain(x).square().mean().backward()
        line(x).square().mean().backward()
    for mine, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert mine.grad is not None and expected.grad is not None
        scale = expected.grad.abs().max().clamp(min=1e-12)
        assert float((mine.grad - expected.grad).abs().max() / scale) < 1e-6


def test_a_scale_of_one_is_no_operation() -> None:
    x = torch.ones(2)
    conv = nn.Identity()
    assert Scales().enter(x, conv) is x and Scales().shift(x) is x
    assert Scales(0.25, 0.25).enter(x, conv) is x, (
        "what only passes a scale on does not touch its input"
    )


@pytest.mark.parametrize("options", [{"causal_mode": True}, SVD_LIKE], ids=str)
@torch.no_grad()
def test_every_scale_counts(options: dict[str, Any]) -> None:
    """The mutations: any one writer, bias or eps forgotten is seen."""
    model = awake(**options)
    mutants = 0
    for (plain, x), (line, _) in zip(lines(model), lines(carried(model)), strict=True):
        expected = plain(x)
        eps = {name: getattr(m, "eps", None) for name, m in plain.named_modules()}
        for name, module in line.named_modules():
            scales = getattr(module, "scales", Scales())
            changes: list[tuple[str, Any]] = []
            if scales != Scales():
                changes += [("scales", _BiasForgotten(*scales)), ("scales", Scales())]
            if scales.before != scales.after:
                changes.append(("scales", _InputForgotten(*scales)))
            if getattr(module, "eps", None) != eps[name]:
                changes.append(("eps", eps[name]))
            for attribute, value in changes:
                before = getattr(module, attribute)
                setattr(module, attribute, value)
                assert difference(line(x), expected) > 1e-10, f"{name}.{attribute} = {value}"
                setattr(module, attribute, before)
                mutants += 1
        assert difference(line(x), expected) < 1e-10
    assert mutants > 100


class _BiasForgotten(Scales):
    def shift(self, bias: Tensor | None) -> Tensor | None:
        return bias


class _InputForgotten(Scales):
    def enter(self, x: Tensor, module: nn.Module | None) -> Tensor:
        return x


# float16 in every walk -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"causal_mode": True, "num_temporal_layers": 2}, SVD_LIKE], ids=str
)
@torch.no_grad()
def test_no_walk_is_further_from_the_truth(options: dict[str, Any]) -> None:
    exact_model = awake(**options)
    make_loud(exact_model)
    model = copy.deepcopy(exact_model).half()
    for (plain, x), (line, _) in zip(lines(exact_model), lines(model), strict=True):
        assert line.stream_scale < 1
        exact, allowed = plain(x.half().double()), None
        for name, walked in every_walk(line):
            error = rms(walked(x.half()), exact)
            allowed = allowed or 1.2 * error  # the first one is the whole walk
            assert error <= allowed, name


# When and how scales are found ---------------------------------------------------------------


def scales_of(model: nn.Module) -> list[Any]:
    return [
        (name, getattr(module, "scales", None), getattr(module, "eps", None))
        for name, module in model.named_modules()
    ]


def loud_model(**options: Any) -> TemporalVAE:
    model = awake(torch.float32, **options)
    make_loud(model)
    return model


def test_conversion_finds_scales_and_takes_them_back() -> None:
    model = loud_model()
    plain = scales_of(model)
    assert model.stream_scales == {"encoder": 1.0, "decoder": 1.0}
    state = torch.get_rng_state()
    scaled = scales_of(model.half())
    assert scaled != plain and scales_of(copy.deepcopy(model)) == scaled
    assert all(scale < 1 for scale in model.stream_scales.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert scales_of(model.to(torch.float16).cpu()) == scaled, "a move changes nothing"
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert scales_of(model.half().to(dtype)) == plain
    assert scales_of(nn.ModuleList([loud_model()]).half()[0]) == scaled


def test_loading_finds_scales(tmp_path: Path) -> None:
    loud, model = loud_model(), awake(torch.float32).half()
    assert model.stream_scales == {"encoder": 1.0, "decoder": 1.0}, "a quiet model stays as it is"
    model.load_state_dict(loud.state_dict())
    assert scales_of(model) == scales_of(copy.deepcopy(loud).half())
    loud.save_pretrained(tmp_path)
    loaded = TemporalVAE.from_pretrained(tmp_path, dtype=torch.float16)
    assert scales_of(loaded) == scales_of(model)


def test_weights_written_by_hand() -> None:
    model = loud_model().half()
    scaled = scales_of(model)
    for line in (model.encoder, model.decoder):
        line.fit_scales()
    assert scales_of(model) == scaled, "a probe sees the scales of the one before"
    make_loud(model, 1 / LOUD)
    assert scales_of(model) == scaled
    for line in (model.encoder, model.decoder):
        line.fit_scales()
    assert model.stream_scales == {"encoder": 1.0, "decoder": 1.0}


def test_a_model_without_memory_is_not_probed() -> None:
    with torch.device("meta"):
        model = TemporalVAE(base_channels=8, channel_multipliers=(1, 2)).half()
    assert model.stream_scales == {"encoder": 1.0, "decoder": 1.0}


def test_weights_beyond_float16_are_said_to_be() -> None:
    model = awake(torch.float32)
    make_loud(model, 2.0**20)
    with pytest.warns(UserWarning, match="not finite in float16"):
        model.half()


def test_files_keep_the_checkpoints_weights(tmp_path: Path) -> None:
    model = loud_model(**SVD_LIKE)
    before = {name: tensor.half() for name, tensor in model.state_dict().items()}
    after = model.half().state_dict()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() == saved.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) and torch.equal(saved[name], tensor)


def test_the_power_of_two() -> None:
    assert [float16.power_of_two(x) for x in (0.0, 1024.0, 1024.1, 2048.0, 65504.0)] == [
        1.0, 1.0, 0.5, 0.5, 2.0**-6,
    ]  # fmt: skip
    assert float16.power_of_two(float("inf")) == float16.power_of_two(float("nan")) == 1.0


# Norms of float16 ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-3, 1.0, 3000.0])
@torch.no_grad()
def test_norms_hold_where_float16_has_no_variance(size: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(2, 8, 20, 30, generator=generator) * size).half()
    x = x.contiguous(memory_format=torch.channels_last)
    x[:, 4:] = 2.0**-12  # a group of equal values
    weight, bias = torch.linspace(0.5, 2, 8).half(), torch.linspace(-1, 1, 8).half()
    eps = 1e-6 * 2.0**-24
    exact = nn.functional.group_norm(x.double(), 2, weight.double(), bias.double(), eps)
    for y in (
        normalise(x, Moments.of(x, 2), weight, bias, eps),
        group_norm_in_float32(x, 2, weight, bias, eps),
        nn.functional.group_norm(x, 2, weight, bias, eps),
    ):
        assert y.dtype == torch.float16 and y.is_contiguous(memory_format=torch.channels_last)
        assert difference(y.double(), exact) < 1e-3
