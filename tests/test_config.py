from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from temporal_vae import TemporalVAE, TemporalVAEConfig


def test_the_svd_preset_has_svds_parameters() -> None:
    with torch.device("meta"):
        assert TemporalVAE.from_config(TemporalVAEConfig.svd()).parameter_count == 97_742_847


def test_defaults_are_the_reference_pages() -> None:
    config = TemporalVAEConfig()
    assert config == TemporalVAE(base_channels=128, seed=0).config
    assert (config.input_channels, config.latent_channels) == (3, 4)
    assert config.widths == (128, 256, 512, 512)
    assert config.downsample_factor == 8
    assert config.latent_scale_factor == 0.18215
    assert not config.causal_mode


@pytest.mark.parametrize(
    ("multipliers", "factor"), [((1,), 1), ((1, 2, 4), 4), ((1, 2, 4, 4), 8), ((2, 1, 3), 4)]
)
def test_downsample_factor(multipliers: tuple[int, ...], factor: int) -> None:
    assert TemporalVAEConfig(channel_multipliers=multipliers).downsample_factor == factor


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (4, 1), (8, 2), (12, 3), (20, 5), (28, 7), (44, 11), (128, 32), (512, 32)],
)
def test_norm_groups_divide_and_keep_brightness(channels: int, groups: int) -> None:
    assert TemporalVAEConfig().groups(channels) == groups


BAD = [
    ({"input_channels": 2}, "1 .grey., 3 .RGB. or 4 .RGBA."),
    ({"input_channels": 0}, "at least 1"),
    ({"latent_channels": 0}, "at least 1"),
    ({"latent_channels": 4.0}, "whole number"),
    ({"base_channels": -8}, "at least 1"),
    ({"base_channels": True}, "whole number"),
    ({"channel_multipliers": ()}, "non-empty"),
    ({"channel_multipliers": 2}, "non-empty"),
    ({"channel_multipliers": (1, 0)}, "at least 1"),
    ({"num_temporal_layers": -1}, "at least 0"),
    ({"temporal_kernel_size": 2}, "odd.*take 3"),
    ({"temporal_kernel_size": 0}, "at least 1"),
    ({"causal_mode": 1}, "True or False"),
    ({"latent_scale_factor": 0.0}, "above 0"),
    ({"latent_scale_factor": -1.0}, "above 0"),
    ({"latent_scale_factor": float("nan")}, "finite"),
    ({"latent_scale_factor": "1"}, "a number"),
    ({"latent_shift_factor": float("inf")}, "finite"),
    ({"norm_groups": 3}, "divide every width"),
    ({"norm_groups": 0}, "at least 1"),
    ({"blocks_per_level": 0}, "at least 1"),
    ({"temporal_attention_reach": -1}, "at least 0"),
    ({"temporal_norm": "frame"}, "'position' or 'clip'"),
    ({"temporal_norm": "clip"}, "give clip_frames"),
    ({"temporal_norm": "clip", "clip_frames": 8, "causal_mode": True}, "future"),
    ({"clip_frames": 0}, "at least 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_bad_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemporalVAEConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        TemporalVAE(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1.5, "a", -1, 2**70])
def test_a_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number"):
        TemporalVAE(base_channels=8, seed=seed)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    config = TemporalVAEConfig(
        base_channels=np.int64(8),  # type: ignore[arg-type]
        latent_scale_factor=np.float32(0.5),  # type: ignore[arg-type]
    )
    assert type(config.base_channels) is int and type(config.latent_scale_factor) is float


def test_a_loss_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(ValueError, match="callable"):
        TemporalVAE(base_channels=8, loss_function="mse")  # type: ignore[arg-type]


def test_a_configuration_survives_json() -> None:
    for config in (TemporalVAEConfig(), TemporalVAEConfig.svd(), TemporalVAEConfig.tiny()):
        assert TemporalVAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="colour"):
        TemporalVAEConfig.from_dict({"colour": 1})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TemporalVAEConfig().base_channels = 3  # type: ignore[misc]


def test_from_config_gives_that_configuration() -> None:
    for config in (
        TemporalVAEConfig(base_channels=8, causal_mode=True, latent_shift_factor=0.5),
        dataclasses.replace(TemporalVAEConfig.svd(), base_channels=32),
    ):
        assert TemporalVAE.from_config(config, seed=0).config == config
