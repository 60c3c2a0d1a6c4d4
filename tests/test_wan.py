"""Wan's and Qwen-Image's VAEs: diffusers' numbers, any split, both ways, and what is refused."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import difference, thinned
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders import autoencoder_kl_qwenimage, autoencoder_kl_wan
from safetensors.torch import save_file
from test_checkpoints import reads_what_we_write
from torch import Tensor, nn

from temporal_vae import CheckpointError, TemporalVAE, WanVAEConfig
from temporal_vae.checkpoints import wan_names
from temporal_vae.inputs import Layout
from temporal_vae.network import spacetime
from temporal_vae.network.kernels import work
from temporal_vae.network.spacetime import SpacetimeDownsample, SpacetimeUpsample
from temporal_vae.walks import piecewise
from temporal_vae.walks import plan as planning
from temporal_vae.walks.peak import PlanRequest
from temporal_vae.walks.plan import Plan
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.tracing import LiveBytes

STATISTICS: dict[str, Any] = {
    "latents_mean": [0.5, -0.25, 0.0, 1.0], "latents_std": [2.0, 0.5, 1.0, 1.5],
}  # fmt: skip
SMALL: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1} | STATISTICS
MODELS: dict[str, Callable[[], Any]] = {
    "Wan 2.1": lambda: AutoencoderKLWan(**SMALL),
    "Wan 2.2": lambda: AutoencoderKLWan(
        **SMALL, decoder_base_dim=16, is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16,
    ),
    "Qwen-Image": lambda: AutoencoderKLQwenImage(**SMALL),
}  # fmt: skip
CONFIGS = {"Wan 2.1": WanVAEConfig.wan21, "Wan 2.2": WanVAEConfig.wan22,
           "Qwen-Image": WanVAEConfig.qwen_image}  # fmt: skip
family = pytest.mark.parametrize("name", MODELS)
kind = pytest.mark.parametrize("name", ["Wan 2.1", "Wan 2.2"])
"""Qwen-Image computes what Wan 2.1 does."""


@pytest.fixture(autouse=True)
def _exact_upsampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' upsampling goes through float32, whatever the weights are."""
    monkeypatch.setattr(autoencoder_kl_wan.WanUpsample, "forward", nn.Upsample.forward)
    monkeypatch.setattr(autoencoder_kl_qwenimage.QwenImageUpsample, "forward", nn.Upsample.forward)


def awaken(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value that matters; pixels stay where diffusers clamps none."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "gamma" in name:
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(noise * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
            if "decoder.conv_out" in name:
                p.mul_(0.1)


def theirs(name: str) -> Any:
    model = MODELS[name]()
    awaken(model.double())
    return model.eval()


def config_of(name: str) -> WanVAEConfig:
    return wan_names.read_config(theirs(name).config)


def ours(name: str) -> TemporalVAE:
    """The same model, without files in between."""
    model = theirs(name)
    mine = TemporalVAE.from_config(wan_names.read_config(model.config)).double()
    mine.load_state_dict({wan_names.our_name(key): t for key, t in model.state_dict().items()})
    return mine


def video_of(model: TemporalVAE, frames: int, batch: int = 1) -> Tensor:
    f, generator = model.downsample_factor, torch.Generator().manual_seed(frames)
    shape = (batch, 3, frames, 2 * f, 3 * f)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def latent_of(model: TemporalVAE, latents: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(latents)
    shape = (batch, model.latent_channels, latents, 2, 3)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def both_numbers(model: Any, mine: TemporalVAE, frames: int) -> list[tuple[Tensor, Tensor]]:
    """(ours, theirs) of mean, log-variance and pixels."""
    x, z = video_of(mine, frames, 2), latent_of(mine, mine.latent_frames(frames), 2)
    x, z = x.to(mine.dtype), z.to(mine.dtype)
    posterior = model.encode(x).latent_dist
    mean, log_variance = mine.encode_with_distribution(x)
    return [
        (mean, posterior.mean), (log_variance, posterior.logvar),
        (mine.decode(z), model.decode(z).sample),
    ]  # fmt: skip


# Law 6: diffusers' numbers -------------------------------------------------------------------


@family
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_float64_numbers_are_diffusers(name: str, frames: int, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    mine = TemporalVAE.from_pretrained(tmp_path, dtype=torch.float64)
    assert mine.parameter_count == sum(p.numel() for p in model.parameters())
    for found, expected in both_numbers(model, mine, frames):
        assert found.shape == expected.shape and difference(found, expected) < 1e-10


@kind
def test_an_image_is_a_clip_of_one_frame(name: str) -> None:
    model, mine = theirs(name), ours(name)
    x = video_of(mine, 1, 2)
    with torch.no_grad():
        expected = model.encode(x).latent_dist.mean
        found = mine.encode(x[:, :, 0], sample_mode=False)
        assert difference(found, expected[:, :, 0]) < 1e-10
        decoded = mine.decode(found)
    assert decoded.shape == x[:, :, 0].shape
    assert difference(decoded, model.decode(expected).sample[:, :, 0]) < 1e-10


@family
def test_float32_is_no_further_from_float64(name: str) -> None:
    model, mine = theirs(name), ours(name)
    exact = [y for _, y in both_numbers(model, mine, 9)]
    found = both_numbers(model.float(), mine.float(), 9)

    def rms(x: Tensor, y: Tensor) -> float:
        return float((x.double() - y).square().mean().sqrt())

    for (own, other), truth in zip(found, exact, strict=True):
        assert rms(own, truth) <= 1.5 * rms(other, truth)


@kind
def test_law_6_sees_what_the_rules_are_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mine = theirs(name), ours(name)
    mutations: list[tuple[type, str, Any]] = [
        (
            SpacetimeUpsample,
            "more_frames",
            lambda self, x: x if self.time_conv is None else self._doubled(x, 2)[:, :, 1:],
        ),
        (
            SpacetimeDownsample,
            "_halved",
            lambda self, x, before, taken: x if self.time_conv is None else x[:, :, ::2],
        ),
        (spacetime.RMSNorm, "_wide", lambda self, x: x),
    ]
    for where, what, instead in mutations:
        with monkeypatch.context() as patched:
            patched.setattr(where, what, instead)
            worst = max(difference(a, b) for a, b in both_numbers(model, mine, 5))
        assert worst > 1e-3, what


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_have_diffusers_parameters(name: str) -> None:
    config = CONFIGS[name]()
    kind = AutoencoderKLQwenImage if name == "Qwen-Image" else AutoencoderKLWan
    with torch.device("meta"):
        mine = TemporalVAE.from_config(config)
        options = wan_names.to_diffusers(config, {})[0]
        model = kind.from_config(options)
    expected = {wan_names.our_name(key): t.shape for key, t in model.state_dict().items()}
    assert {key: t.shape for key, t in mine.state_dict().items()} == expected
    assert wan_names.read_config(model.config) == config
    factors = {"Wan 2.2": 16}
    assert (mine.downsample_factor, mine.frames_per_latent) == (factors.get(name, 8), 4)


# Files ---------------------------------------------------------------------------------------


@family
def test_diffusers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    reads_what_we_write(theirs(name), tmp_path)


@family
def test_our_own_files_and_records_keep_the_model(name: str, tmp_path: Path) -> None:
    mine = ours(name)
    mine.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["kind"] == "wan"
    copies = [
        TemporalVAE.from_pretrained(tmp_path, dtype=torch.float64),
        TemporalVAE.from_bytes(mine.serialize()),
    ]
    for again in copies:
        assert again.config == mine.config
        state = again.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in mine.state_dict().items())
    with pytest.raises(CheckpointError, match="another kind of model"):
        TemporalVAE(base_channels=8).deserialize(mine.serialize())
    with pytest.raises(CheckpointError, match="another kind of model"):
        mine.deserialize(TemporalVAE(base_channels=8).serialize())
    with pytest.raises(CheckpointError, match=r"is 'qwen-image' there|level_shortcuts is"):
        other = "Wan 2.2" if name == "Qwen-Image" else "Qwen-Image"
        mine.deserialize(ours(other).serialize())


def original(model: Any) -> dict[str, Tensor]:
    """Weights of diffusers under the keys of Wan's own code, by its source (`vae2_1`, `vae2_2`)."""
    nested, blocks = model.config.get("is_residual", False), model.config.num_res_blocks

    def level(found: re.Match[str]) -> str:
        half, number, what, index = found[1], int(found[2]), found[3], int(found[4] or 0)
        own = blocks if half == "encoder.down" else blocks + 1
        index = index if what == "resnets" else own
        return f"{half}samples.{number}.{half[8:]}samples.{index}." if nested else (
            f"{half}samples.{number * (own + 1) + index}."
        )  # fmt: skip

    rules: list[tuple[str, Any]] = [
        (r"^quant_conv", "conv1"), (r"^post_quant_conv", "conv2"),
        (r"^(\w+)\.conv_in", r"\1.conv1"), (r"^(\w+)\.norm_out", r"\1.head.0"),
        (r"^(\w+)\.conv_out", r"\1.head.2"), (r"mid_block\.attentions\.0", "middle.1"),
        (r"mid_block\.resnets\.0", "middle.0"), (r"mid_block\.resnets\.1", "middle.2"),
        (r"^(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets|downsampler|upsamplers?)\.?(\d+)?\.",
         level),
        (r"^encoder\.down_blocks\.(\d+)", r"encoder.downsamples.\1"),
        (r"\.norm1\.", ".residual.0."), (r"\.norm2\.", ".residual.3."),
        (r"(samples\..*|middle\.[02])\.conv1\.", r"\1.residual.2."),
        (r"\.conv2\.", ".residual.6."), (r"\.conv_shortcut\.", ".shortcut."),
    ]  # fmt: skip
    found = {}
    for key, tensor in model.state_dict().items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        found[key] = tensor.contiguous()
    return found


@kind
def test_the_finest_level_may_be_wider_than_the_first_convolution(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SMALL, "base_dim": 4, "dim_mult": [2, 2, 4, 4]}
    monkeypatch.setattr(sys.modules[__name__], "SMALL", options)
    model = theirs(name)
    _, mine = reads_what_we_write(model, tmp_path)
    for found, expected in both_numbers(model, mine, 5):
        assert difference(found, expected) < 1e-10
    save_file(original(model), tmp_path / "original.safetensors")
    with pytest.warns(UserWarning, match="0 and 1 are taken"):
        alone = TemporalVAE.from_pretrained(tmp_path / "original.safetensors")
    assert alone.config == replace(config_of(name), latent_mean=None, latent_std=None)


@pytest.mark.parametrize("name", ["Wan 2.1", "Wan 2.2"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_original_single_files(name: str, prefix: str, tmp_path: Path) -> None:
    model, file = theirs(name), tmp_path / "wan.safetensors"
    state = {prefix + key: t for key, t in original(model).items()}
    save_file(state | {"model.diffusion_model.x": torch.zeros(1)}, file)
    with pytest.warns(UserWarning, match="0 and 1 are taken"):
        mine = TemporalVAE.from_pretrained(file, dtype=torch.float64)
    assert mine.config == replace(config_of(name), latent_mean=None, latent_std=None)
    for found, expected in both_numbers(model, mine, 5):
        assert difference(found, expected) < 1e-10


def test_original_keys_are_those_that_diffusers_knows() -> None:
    """Its own reader, which is written for Wan 2.1's number of blocks alone."""
    options = SMALL | {"num_res_blocks": 2}
    model = AutoencoderKLWan(**options)
    assert convert_wan_vae_to_diffusers(original(model)).keys() == model.state_dict().keys()
    shapes = {key: tuple(t.shape) for key, t in original(model).items()}
    with pytest.warns(UserWarning, match="0 and 1 are taken"):
        config, names = wan_names.read_original(shapes, "")
    assert config.blocks_per_level == 2
    assert set(names.values()) == {wan_names.our_name(key) for key in model.state_dict()}


def test_the_statistics_of_original_files_are_known_by_their_channels() -> None:
    shapes = {"decoder.middle.0.residual.0.gamma": (8, 1, 1, 1)}
    assert wan_names.original_prefix(shapes) == ""
    assert wan_names.original_prefix({f"vae.{key}": s for key, s in shapes.items()}) == "vae."
    assert wan_names.original_prefix({"decoder.mid.block_1.norm1.weight": (8,)}) is None
    model = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    config, _ = wan_names.read_original(
        {key: tuple(t.shape) for key, t in original(model).items()}, ""
    )
    assert config.latent_mean == WanVAEConfig.wan21().latent_mean
    with pytest.raises(ValueError, match=r"not whole: decoder\.conv1\.weight"):
        wan_names.read_original({"encoder.conv1.weight": (8, 3, 3, 3, 3),
            "encoder.downsamples.0.residual.2.weight": (8, 8, 3, 3, 3)}, "")  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_scales": [1.0]}, r"attn_scales must be \[\] in a AutoencoderKLWan"),
        ({"dropout": 0.1}, "dropout must be 0.0"),
        ({"in_channels": 3, "out_channels": 4}, "in_channels and out_channels must be equal"),
        ({"in_channels": 3, "patch_size": 2, "out_channels": 3}, "squares of patch_size pixels"),
        ({"magic": 3}, "an option unknown here: magic=3"),
        ({"temperal_downsample": [True]}, "a flag for each of 4 levels but the last, got 1"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "above 0 in every channel"),
        ({"latents_mean": [1.0]}, "a number for each of 4 latent channels"),
        ({"_class_name": "AutoencoderKLMagvit"}, "cannot read a AutoencoderKLMagvit"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wan_names.read_config(SMALL | {"_class_name": "AutoencoderKLWan"} | options)


def test_qwen_image_cannot_be_wan_22() -> None:
    config = replace(WanVAEConfig.wan22(), family="qwen-image")
    with pytest.raises(ValueError, match=r"AutoencoderKLQwenImage cannot express .*patch_size=2"):
        wan_names.to_diffusers(config, {})


# Streams -------------------------------------------------------------------------------------


def splits(frames: int, seed: int) -> list[int]:
    draw, sizes = random.Random(seed), list[int]()
    while sum(sizes) < frames:
        sizes.append(draw.randint(1, min(7, frames - sum(sizes))))
    return sizes


@kind
@torch.no_grad()
def test_any_split_gives_the_whole(name: str) -> None:
    model = ours(name)
    x, z = video_of(model, 17), latent_of(model, 5)
    whole = model.encode(x, generator=torch.Generator().manual_seed(3))
    decoded = model.decode(z)
    for seed, sizes in enumerate([[1] * 17, [16, 1], splits(17, 0), splits(17, 1)]):
        stream = model.encode_stream(generator=torch.Generator().manual_seed(3))
        y = torch.cat(list(stream.pull(x.split(sizes, 2))), 2)
        assert y.shape == whole.shape and difference(y, whole) < 1e-10, sizes
        stream = model.decode_stream()
        y = torch.cat(list(stream.pull(z.split(splits(5, seed), 2))), 2)
        assert y.shape == decoded.shape and difference(y, decoded) < 1e-10


@kind
@torch.no_grad()
def test_a_step_gives_all_that_is_certain(name: str) -> None:
    model, state, given = ours(name), None, []
    for piece in video_of(model, 13).split([1, 3, 1, 8], 2):
        y, state = model.encode_step(piece, state, sample_mode=False)
        given.append(0 if y is None else y.shape[2])
    assert given == [1, 0, 1, 2] and model.encode_finish(state) is None
    frames, state = model.decode_step(latent_of(model, 1), None)
    more, state = model.decode_step(latent_of(model, 2), state)
    assert frames is not None and more is not None
    assert (frames.shape[2], more.shape[2]) == (1, 8) and model.decode_finish(state) is None


@kind
@torch.no_grad()
def test_a_state_is_a_value_of_a_fixed_size(name: str) -> None:
    model, x = ours(name), video_of(ours(name), 17)
    _, state = model.encode_step(x[:, :, :6])
    kept = [[t.clone() for t in layer] for layer in state]
    first, long = model.encode_step(x[:, :, 6:], state, sample_mode=False)
    model.encode_step(x[:, :, :9], state)
    again, _ = model.encode_step(x[:, :, 6:], tuple(map(tuple, kept)), sample_mode=False)
    assert first is not None and again is not None and torch.equal(first, again)

    def size(state: Any) -> int:
        return sum(t.untyped_storage().nbytes() for layer in state for t in layer)

    assert size(long) == size(state)
    with pytest.raises(ValueError, match="not one of this model"):
        model.encode_step(x[..., : x.shape[4] // 3], state)


@kind
@torch.no_grad()
def test_the_future_never_changes_the_past(name: str) -> None:
    model, x, z = ours(name), video_of(ours(name), 13), latent_of(ours(name), 4)
    other, moved = x.clone(), z.clone()
    other[:, :, 9:] = 0
    moved[:, :, 2:] = 0
    a, b = model.encode(x, False), model.encode(other, False)
    assert torch.equal(a[:, :, :3], b[:, :, :3]) and not torch.equal(a[:, :, 3], b[:, :, 3])
    a, b = model.decode(z), model.decode(moved)
    assert torch.equal(a[:, :, :5], b[:, :, :5]) and not torch.equal(a[:, :, 5], b[:, :, 5])


@kind
@torch.no_grad()
def test_a_frame_reaches_as_far_as_stated(name: str) -> None:
    """Through the layers of a shallow model: a change is followed frame by frame."""
    config = replace(
        config_of(name), channel_multipliers=(1, 2, 2), temporal_downsample=(True, False)
    )
    model = TemporalVAE.from_config(config).double()
    awaken(model)
    for walk, reach, x, per_latent in (
        (lambda x: model.encode(x, False), model.encode_reach, video_of(model, 81), 0.5),
        (model.decode, model.decode_reach, latent_of(model, 45), 2.0),
    ):
        assert reach is not None
        changed, at = x.clone(), 4
        changed[:, :, at] += 1
        moved = (walk(x) - walk(changed)).abs().amax(dim=(0, 1, 3, 4)) > 0
        last = int(moved.nonzero().max())
        assert math.ceil(last / per_latent) - at == reach


@kind
@torch.no_grad()
def test_a_lost_tail_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spacetime, "_last", lambda tail, x: torch.zeros_like(tail))
    with pytest.raises(AssertionError):
        test_any_split_gives_the_whole(name)


# Budgets -------------------------------------------------------------------------------------


BOUNDS = {
    "latents": Bounds(pieces=1),
    "pairs": Bounds(pieces=2),
    "all": Bounds(pieces=9),
    "bands": Bounds(pieces=1, rows=32),
    "odd bands": Bounds(pieces=2, rows=17),
    "rows kept": Bounds(pieces=1, rows=16, keep_rows=True),
    "odd rows kept": Bounds(pieces=2, rows=5, keep_rows=True),
    "few rows": Bounds(pieces=1, rows=3, keep_rows=True),
    "one band": Bounds(pieces=3, rows=1000),
}


@pytest.mark.parametrize(("name", "cut"), thinned(3, MODELS, BOUNDS))
@torch.no_grad()
def test_pieces_and_bands_give_the_whole(name: str, cut: str) -> None:
    """Bands of an encoder are whole latent cells; those of a decoder have any number of rows."""
    model, bounds = ours(name), BOUNDS[cut]
    f, generator = model.downsample_factor, torch.Generator().manual_seed(1)
    for frames in (1, 9):
        x = torch.rand(2, 3, frames, 4 * f, 2 * f, generator=generator, dtype=torch.float64)
        z = torch.randn(2, 4, model.latent_frames(frames), 4, 2, generator=generator).double()
        for line, clip in ((model.encoder, x), (model.decoder, z)):
            assert difference(piecewise.walk(line, clip, bounds), line(clip)) < 1e-10
        found = torch.cat(list(piecewise.frames(model.decoder, z[:1], bounds)), 2)
        assert difference(found, model.decode(z[:1])) < 1e-10


def alive(model: TemporalVAE, operation: Any, x: Tensor, plan: Plan) -> int:
    """The most bytes at a time of all storages that are made while a walk really runs."""
    with LiveBytes() as counted:
        for there in (x, *model.parameters()):
            counted.leave_out(there)
        model._runner._walk(operation, x, plan)
    most: int = counted.most
    return most


@pytest.fixture
def _few_ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """To walk, so that less is counted."""
    monkeypatch.setattr(planning, "BAND_ROWS", (32, 16))
    monkeypatch.setattr(planning, "LATENTS", (2, 1))
    planning.planner.cache_clear()
    yield
    planning.planner.cache_clear()


@pytest.mark.usefixtures("_few_ways")
@pytest.mark.parametrize(
    ("name", "operation", "frames"),
    [
        ("Wan 2.1", "decode", 9),
        pytest.param("Wan 2.1", "encode", 13, marks=pytest.mark.slow),
        pytest.param("Wan 2.2", "decode", 9, marks=pytest.mark.slow),
        pytest.param("Wan 2.2", "encode", 13, marks=pytest.mark.slow),
        ("Qwen-Image", "decode", 1), ("Qwen-Image", "encode", 1),
    ],
)  # fmt: skip
@torch.no_grad()
def test_plans_hold_and_change_nothing(name: str, operation: Any, frames: int) -> None:
    model = ours(name)
    f, generator = model.downsample_factor, torch.Generator().manual_seed(1)
    if operation == "encode":
        x = torch.rand(1, 3, frames, 64, 4 * f, generator=generator, dtype=torch.float64)
    else:
        shape = (1, 4, model.latent_frames(frames), 64 // f, 4)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
    whole = model.plan(x.shape, operation)
    exact = model._runner._walk(operation, x, whole)
    assert whole.walk == "whole" and alive(model, operation, x, whole) <= whole.peak_bytes
    least = model.plan(x.shape, operation, budget="least")
    between = model.plan(x.shape, operation, budget=whole.peak_bytes - 1)
    assert least.peak_bytes < 0.95 * whole.peak_bytes
    for plan in {least.peak_bytes: least, between.peak_bytes: between}.values():
        assert plan.bounds is not None and plan.bounds.pieces is not None
        assert 0.75 * plan.peak_bytes < alive(model, operation, x, plan) <= plan.peak_bytes, plan
        assert difference(model._runner._walk(operation, x, plan), exact) < 1e-10
        assert "latents in time" in plan.explain()
    with pytest.raises(ValueError, match="below the least"):
        model.plan(x.shape, operation, budget=1000)


@torch.no_grad()
def test_the_operations_of_bands_are_those_that_are_done() -> None:
    """By which ways to walk are put in order; rows that are kept are not computed again."""
    model = ours("Wan 2.1")
    z, layers = torch.zeros(1, 4, 3, 12, 4, dtype=torch.float64), list(model.decoder.layers())
    shares = {}
    for rows, keep in ((16, False), (16, True), (None, False)):
        done, bounds = list[int](), Bounds(pieces=1, rows=rows, keep_rows=keep)
        with work.told_to(done.append):
            piecewise.walk(model.decoder, z, bounds)
        shares[rows, keep] = (sum(done), piecewise.operations(layers, tuple(z.shape), bounds))
    whole = shares[None, False]
    for done_here, foreseen in shares.values():
        assert foreseen / whole[1] == pytest.approx(done_here / whole[0], rel=0.15)
    assert shares[16, True][0] < 0.7 * shares[16, False][0]


UNEVEN = [
    ("encode", {"channel_multipliers": (4, 2), "level_shortcuts": True}, (2, 3, 1, 10, 6), 3),
    ("decode", {"channel_multipliers": (4, 1), "decoder_base_channels": 32}, (1, 4, 3, 7, 1), 3),
    ("encode", {"channel_multipliers": (2, 1), "patch_size": 2}, (1, 3, 3, 36, 20), 8),
]  # fmt: skip
"""Layouts whose first band has most rows, and a later one those that take most."""


@pytest.mark.parametrize(("operation", "options", "shape", "rows"), UNEVEN)
@torch.no_grad()
def test_the_band_that_takes_most_is_counted(
    operation: Any, options: dict[str, Any], shape: tuple[int, ...], rows: int
) -> None:
    config = WanVAEConfig(
        latent_channels=4, base_channels=8, blocks_per_level=1, temporal_downsample=(False,),
        **options,
    )  # fmt: skip
    model = TemporalVAE.from_config(config).double().requires_grad_(False)
    bounds = Bounds(pieces=1, rows=rows, keep_rows=True)
    request = PlanRequest(
        config.layout, operation, shape, torch.float64, False, (None,), torch.device("cpu")
    )
    with planning._on_shapes_alone():
        plan = planning.Planner(request)._plan(bounds)
        floor = planning.Planner(request)._floor(bounds)
    assert floor <= plan.peak_bytes
    x = torch.zeros(shape, dtype=torch.float64)
    assert 0.5 * plan.peak_bytes < alive(model, operation, x, plan) <= plan.peak_bytes


@torch.no_grad()
def test_memory_is_flat_in_time() -> None:
    model, peaks = ours("Wan 2.1"), []
    for latents in (3, 12):
        z = torch.randn(1, 4, latents, 2, 3, dtype=torch.float64)
        with LiveBytes() as counted:
            for there in (z, *model.parameters()):
                counted.leave_out(there)
            for piece in piecewise.frames(model.decoder, z, Bounds(pieces=1)):
                del piece
        peaks.append(counted.most)
    assert peaks[1] <= 1.001 * peaks[0]


@pytest.mark.usefixtures("_few_ways")
@pytest.mark.parametrize("name", ["Wan 2.1", pytest.param("Wan 2.2", marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_setters_are_exact(name: str) -> None:
    model, x = ours(name), video_of(ours(name), 5, 2)
    expected = model.predict(x)
    model.set_tiling_enabled(True)
    assert difference(model.predict(x), expected) < 1e-10
    stream = model.encode_stream(sample_mode=False)
    y = torch.cat(list(stream.pull(x.split(4, 2))), 2)
    model.set_tiling_enabled(False)
    latent = model.encode(x, False)
    assert difference(y, latent) < 1e-10
    model.set_memory_budget("1GiB")
    assert difference(model.predict(x), expected) < 1e-10
    model.set_memory_budget(None)
    plan = model.plan(latent[:1].shape, budget="least")
    found = torch.cat(list(model.iter_decode(latent[:1], plan=plan)), 2)
    assert difference(found, model.decode(latent[:1])) < 1e-10
    cut = replace(plan, bounds=Bounds(pieces=1))
    with torch.enable_grad():
        walks: list[Callable[[], Tensor]] = [
            lambda: model.decode(latent[:1], plan=cut), lambda: model.encode(x),
        ]  # fmt: skip
        for walked in walks:
            with pytest.raises(ValueError, match=r"and tiling too, and take enable_grad") as raised:
                walked()
            assert "gradients=True" not in str(raised.value), "there is no such plan of this kind"
            model.set_tiling_enabled(True)
    with pytest.raises(ValueError, match="leave offload out"):
        model.plan(latent.shape, offload="host")


@pytest.mark.usefixtures("_few_ways")
@pytest.mark.parametrize("keep", [True, pytest.param(False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_steps_of_a_stream_are_planned(keep: bool) -> None:
    model = ours("Wan 2.1")
    z = torch.randn(1, 4, 5, 6, 4, dtype=torch.float64)
    shape, exact = (1, 4, 2, 6, 4), model.decode(z)
    whole = model.plan(shape, stream=True, keep_state=keep)
    least = model.plan(shape, stream=True, keep_state=keep, budget="least")
    assert least.walk == "bounded" and least.peak_bytes < whole.peak_bytes
    for plan in (whole, least):
        stream = model.decode_stream(plan)
        with LiveBytes() as counted:
            for there in (z, *model.parameters()):
                counted.leave_out(there)
            for index, piece in enumerate(z.split(2, 2)):
                y = stream.push(piece)
                assert y is not None
                start = 1 + 4 * (2 * index - 1) if index else 0
                assert difference(y, exact[:, :, start : start + y.shape[2]]) < 1e-10
                del y
        assert stream.finish() is None
        assert counted.most - exact.nbytes <= 1.05 * plan.peak_bytes


@torch.no_grad()
def test_a_band_with_a_short_halo_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (spacetime.CausalResidualBlock, SpacetimeUpsample):
        with monkeypatch.context() as patched:
            above, below = where.halo
            patched.setattr(where, "halo", (above, below - 1))
            with pytest.raises((AssertionError, RuntimeError)):
                test_pieces_and_bands_give_the_whole("Wan 2.1", "odd bands")


# The face ------------------------------------------------------------------------------------


def test_frames_and_latents() -> None:
    model = ours("Wan 2.1")
    assert [model.latent_frames(n) for n in (1, 5, 81)] == [1, 2, 21]
    assert [model.video_frames(n) for n in (1, 2, 21)] == [1, 5, 81]
    image = TemporalVAE(base_channels=8, channel_multipliers=(1,))
    assert image.frames_per_latent == 1 and image.latent_frames(7) == image.video_frames(7) == 7
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="at least one"):
            model.latent_frames(wrong)
        with pytest.raises(ValueError, match="at least one"):
            model.video_frames(wrong)
    for number in (model.latent_frames, model.video_frames):
        with pytest.raises(ValueError, match=r"must be a whole number, got 5\.0"):
            number(5.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", [2, 3, 4, 16])
def test_frames_that_do_not_fit_are_refused_with_both_neighbours(frames: int) -> None:
    model = ours("Wan 2.1")
    fewer = (frames - 1) // 4 * 4 + 1
    words = f"{frames} frames are no whole number .*take {fewer} frames or {fewer + 4}"
    x = video_of(model, frames)
    stream = model.encode_stream()
    stream.push(x)
    calls: list[Callable[[], object]] = [
        lambda: model.encode(x), lambda: model.predict(x), lambda: model(x), stream.finish,
        lambda: model.encode(x.transpose(1, 2), layout="BTCHW"),
        lambda: model.train_step(x), lambda: model.compute_gradients(x, x),
        lambda: model.plan(x.shape, "encode"), lambda: model.latent_frames(frames),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()
    more = stream.push(video_of(model, fewer + 4 - frames))
    assert more is not None and stream.finish() is None, "the stream goes on to a fitting length"


@torch.no_grad()
def test_latents_are_scaled_by_channel() -> None:
    model, z = ours("Wan 2.1"), latent_of(ours("Wan 2.1"), 2)
    mean, std = (
        torch.tensor(STATISTICS[key], dtype=torch.float64).view(1, 4, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    scaled = model.scale_latent(z)
    assert difference(scaled, (z - mean) / std) < 1e-12
    assert difference(model.unscale_latent(scaled), z) < 1e-12
    with pytest.raises(ValueError, match="layout must be"):
        model.scale_latent(z, layout="TBCHW")  # type: ignore[arg-type]
    other = model.scale_latent(z.transpose(1, 2), layout="BTCHW").transpose(1, 2)
    assert torch.equal(other, scaled) and torch.equal(
        model.scale_latent(z[:, :, 0]), scaled[:, :, 0]
    )
    x = video_of(model, 5)
    layouts: tuple[Layout, ...] = ("BCTHW", "BTCHW")
    for layout in layouts:
        video = x if layout == "BCTHW" else x.transpose(1, 2)
        found = model.encode_video_for_diffusion(video, False, layout=layout)
        back = model.decode_video_from_diffusion(found, layout=layout)
        assert difference(back, model.predict(video, layout=layout)) < 1e-10
    for wrong in (z[:, :3], z[0], z.transpose(1, 2)):
        with pytest.raises(ValueError, match="has 4 channels on axis 1"):
            model.scale_latent(wrong)
    with pytest.raises(ValueError, match="use scale_latent and unscale_latent"):
        _ = model.latent_scale_factor
    with pytest.raises(ValueError, match="latent must have 4 channels"):
        model.decode(torch.randn(1, 16, 2, 2, 2).double())


@kind
def test_every_member_works_or_says_why_not(name: str, tmp_path: Path) -> None:
    model, x = ours(name), video_of(ours(name), 5)
    assert (model.is_causal, model.temporal_kernel_size, model.input_channels) == (True, 3, 3)
    assert model.supports_slicing and model.supports_tiling and model.supports_jit_compilation
    metadata = model.get_metadata()
    assert metadata.config == model.config and json.dumps(metadata.to_dict())
    assert sum(metadata.parameters.values()) == model.parameter_count
    assert (metadata.encode_delay, metadata.decode_delay) == (0, 0)
    expected = model.predict(x)
    for other in (model.clone(), model.with_parameters(model.get_parameters())):
        assert torch.equal(other.predict(x), expected)
    model.set_slicing_enabled(True)
    pair = torch.cat([x, x.flip(-1)])
    assert difference(model.predict(pair)[:1], expected) < 1e-12
    model.set_active_feature_indices([0, 2])
    assert not model.encode(x, False)[:, [1, 3]].any()
    assert model.get_active_feature_indices() == [0, 2]
    model.set_active_feature_indices(range(4))
    shares = model.get_feature_importance()
    assert len(shares) == 4 and abs(sum(one.share for one in shares.values()) - 1) < 1e-9
    with torch.no_grad():
        out = torch.empty_like(expected)
        model.decode(model.encode(x, False), out=out)
        assert torch.equal(out, expected)
        (pieces,) = model.iter_decode(model.encode(x, False))
        assert torch.equal(pieces, expected)
    model.save_model(tmp_path / "record")
    assert torch.equal(TemporalVAE.from_file(tmp_path / "record").predict(x), expected)
    with pytest.raises(ValueError, match="takes the first frame of a clip apart"):
        model.export_computation_graph(x)
    record = model.latent_record("it")
    assert (record.frames_per_latent, record.downsample_factor) == (4, model.downsample_factor)
    assert record.latent_std == tuple(STATISTICS["latents_std"]) and record.encoder_sha256


@kind
def test_it_learns(name: str) -> None:
    model, x = ours(name), video_of(ours(name), 5)
    before = float((model.predict(x) - x).square().mean())
    gradients = model.compute_gradients(x, x)
    after = model.clone()
    after.apply_gradients(gradients, 1e-3 * before / float(gradients @ gradients))
    fallen = before - float((after.predict(x) - x).square().mean())
    assert 0.9e-3 * before < fallen < 1.1e-3 * before, "as much as the slope says"
    assert model.train_step(x)["loss"] > 0
    gradients = model.compute_gradients(x, x)
    model.enable_gradient_checkpointing()
    assert difference(model.compute_gradients(x, x), gradients) < 1e-10
    missing = {key for key, p in model.named_parameters() if p.grad is not None}
    assert not missing, "gradients are given, not kept"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Wan 2.1", "Wan 2.2"])
@torch.no_grad()
def test_compiled_is_the_same(name: str) -> None:
    model, x = ours(name), video_of(ours(name), 5)
    expected, latents = model.predict(x), model.encode(x, False)
    model.compile(backend="eager")
    assert difference(model.predict(x), expected) < 1e-12
    stream = model.encode_stream(sample_mode=False)
    y = torch.cat(list(stream.pull(x.split(2, 2))), 2)
    assert difference(y, latents) < 1e-12, "steps are not compiled, and the same"


@kind
@torch.no_grad()
def test_float16_and_bfloat16(name: str) -> None:
    """A stream that would overflow float16 is carried smaller, as of other models."""
    model, x = ours(name), video_of(ours(name), 5)
    for line in (model.encoder, model.decoder):
        line.conv_in.weight.mul_(2**15)  # norms behind it are indifferent to its scale
    exact = model.predict(x)
    for dtype, bound in ((torch.bfloat16, 0.2), (torch.float16, 0.05)):
        narrow = model.clone().to(dtype)
        y = narrow.predict(x.to(dtype))
        assert y.isfinite().all() and difference(y.double(), exact) < bound, dtype
        assert (narrow.stream_scales["decoder"] < 1) == (dtype == torch.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    ours("Wan 2.1").float().save_pretrained(tmp_path / "wan")
    yield tmp_path / "wan"


def test_what_is_refused_before_anything_happens(folder: Path) -> None:
    with pytest.raises(ValueError, match="scales each latent channel by a mean and a deviation"):
        TemporalVAE.from_pretrained(folder, latent_scale_factor=0.5)
    with pytest.raises(ValueError, match="a video VAE already"):
        TemporalVAE.from_image_vae(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_channels": 2}, "input_channels must be 1"),
        ({"latent_channels": 0}, "latent_channels must be at least 1"),
        ({"channel_multipliers": ()}, "non-empty sequence"),
        ({"temporal_downsample": (True, 1, True)}, "a sequence of flags"),
        ({"level_shortcuts": 1}, "level_shortcuts must be True or False"),
        ({"family": "hunyuan"}, "family must be"),
        ({"base_channels": 5, "channel_multipliers": (1, 3, 4, 4)}, "must be even"),
        ({"level_shortcuts": True, "channel_multipliers": (1, 2, 4, 8)}, "must share out"),
        ({"latent_mean": ("a",) * 16}, "finite numbers"),
        ({"latent_std": (math.inf,) * 16}, "finite numbers"),
        ({"decoder_base_channels": 0}, "decoder_base_channels must be at least 1"),
    ],
)
def test_configurations_that_could_not_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WanVAEConfig(**options)


def test_a_configuration_comes_back_from_plain_values() -> None:
    for make in CONFIGS.values():
        config = make()
        values = json.loads(json.dumps(config.to_dict()))
        assert WanVAEConfig.from_dict(values) == config
        with pytest.raises(ValueError, match=r"unknown configuration fields \['depth'\]"):
            WanVAEConfig.from_dict(values | {"depth": 3})


@kind
@torch.no_grad()
def test_lora_gives_what_stock_gives(name: str) -> None:
    """On the 2-D convolutions, which are all that adapters of stock know."""
    config = peft.LoraConfig(
        r=2, target_modules=["resample.1", "to_qkv", "proj"], init_lora_weights=False
    )
    model, mine = theirs(name), ours(name)
    x = video_of(mine, 5, 2)
    plain = mine.encode(x, sample_mode=False)
    for either in (model, mine):
        peft.inject_adapter_in_model(config, either)
        generator = torch.Generator().manual_seed(0)
        for key, p in either.double().named_parameters():
            if "lora" in key:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    for found, expected in both_numbers(model, mine, 5):
        assert difference(found, expected) < 1e-10
    assert difference(mine.encode(x, sample_mode=False), plain) > 1e-2
