"""The model a recipe begins with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import nn

from temporal_vae.config import TemporalVAEConfig, VAEConfig, WanVAEConfig
from temporal_vae.model import TemporalVAE
from temporal_vae.network.spacetime import (
    CausalResidualBlock,
    FrameAttention,
    OverSpacetime,
    Unchanged,
)
from temporal_vae.training import recipe
from temporal_vae.training.optimizers import trained_parts
from temporal_vae.training.recipe import Recipe

PRESETS: dict[str, Callable[[], VAEConfig]] = {
    "default": TemporalVAEConfig,
    "tiny": TemporalVAEConfig.tiny,
    "svd": TemporalVAEConfig.svd,
    "tiny-wan": WanVAEConfig.tiny,
}


def build_model(spec: recipe.Model, seed: int) -> tuple[TemporalVAE, list[str]]:
    """The model of a recipe in float32, and the names of weights that begin anew.

    With `init` those are its weights. Where `config` asks for another layout in time (other or no
    temporal layers, causal), spatial weights are taken over, and temporal ones where they mean the
    same; the others begin anew, so that the model begins as its image VAE.

    Raises `ValueError` for a model of another architecture, naming what differs, and as
    `from_pretrained` does.
    """
    if spec.init is None:
        config = _changed(PRESETS[spec.preset](), spec.config)
        return TemporalVAE.from_config(config, seed=seed), []
    loaded = TemporalVAE.from_pretrained(spec.init, dtype=torch.float32)
    config = _changed(loaded.config, spec.config)
    if config == loaded.config:
        return loaded, []
    model = TemporalVAE.from_config(config, seed=seed)
    return model, _take_over(model, loaded, spec.init)


PIXEL_TERMS = ("l1", "mse", "log_mse", "colour", "temporal", "feature", "lpips")
LATENT_TERMS = ("kl", "distill")


def refuse_misfit(model: TemporalVAE, stages: Sequence[Recipe]) -> None:
    """Raise `ValueError` where a recipe's stages cannot train this model."""
    if model.input_channels != 3:
        raise ValueError(f"training reads RGB, but the model has {model.input_channels} channels")
    for stage in stages:
        if not stage.model.temporal and isinstance(model.config, WanVAEConfig):
            raise ValueError(
                "model.temporal = false leaves temporal layers out, and this model's see time and "
                "space at once: to train it on pictures, give batches of frames = 1"
            )
        if not stage.model.branches:
            _refuse_branches(model, stage.model)
        for kind in stage.data.batch:
            model.latent_frames(kind.frames)
            if kind.crop % model.downsample_factor:
                raise ValueError(
                    f"a crop of {kind.crop} pixels is no multiple of {model.downsample_factor}, "
                    "the pixels of a latent cell"
                )
        encoder = any("encoder" in part for part in trained_parts(stage.model))
        terms = (*PIXEL_TERMS, *LATENT_TERMS) if encoder else PIXEL_TERMS
        if not any(getattr(stage.loss, term) for term in terms):
            raise ValueError(
                f"nothing in [loss] reaches what is trained ({', '.join(stage.model.train)}): give "
                f"a term a weight, of {', '.join(terms)}"
            )


def _refuse_branches(model: TemporalVAE, spec: recipe.Model) -> None:
    if not isinstance(model.config, WanVAEConfig):
        raise ValueError(
            "model.branches = false leaves residual branches out, which is known for models of "
            "Wan's kind alone: leave it away, or take model.preset = 'tiny-wan'"
        )
    if spec.init is not None:
        raise ValueError(
            "model.branches = false is for new weights, whose residual branches begin at zero; "
            f"model.init = {spec.init!r} has trained ones: leave one of both away"
        )


def _changed(config: VAEConfig, changes: recipe.Table) -> VAEConfig:
    known = [field.name for field in fields(config)]
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(
            f"model.config: unknown {', '.join(unknown)}: there are {', '.join(known)}"
        )
    return replace(config, **changes)


@torch.no_grad()
def _take_over(model: TemporalVAE, loaded: TemporalVAE, name: str) -> list[str]:
    """Copy what means the same in both; the names of what does not."""
    theirs, anew = dict(loaded.named_parameters()), []
    same_time = model.is_causal == loaded.is_causal
    for key, parameter in model.named_parameters():
        temporal, other = ".temporal" in key or ".time_conv" in key, theirs.get(key)
        if other is not None and other.shape == parameter.shape and (same_time or not temporal):
            parameter.copy_(other)
        elif temporal:
            anew.append(key)
        else:
            raise ValueError(
                f"{name} is of another architecture: {key} has the shape "
                f"{tuple(parameter.shape)} here and "
                f"{tuple(other.shape) if other is not None else 'no counterpart'} there; "
                "model.config may change only what concerns time"
            )
    return anew


def image_twin(model: TemporalVAE) -> TemporalVAE:
    """An image VAE that shares the spatial parameters of `model`."""
    assert isinstance(model.config, TemporalVAEConfig)
    twin = TemporalVAE.from_config(replace(model.config, num_temporal_layers=0))
    parameters = dict(model.named_parameters())
    for name, _ in list(twin.named_parameters()):
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = twin.get_submodule(path)
        setattr(owner, leaf, parameters[name])
    return twin


def without_branches(model: TemporalVAE) -> TemporalVAE:
    """A model that shares the parameters of `model`, and computes no residual branch."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for parent in list(twin.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, CausalResidualBlock) and block.conv_shortcut is not None:
                setattr(parent, name, OverSpacetime(block.conv_shortcut))
            elif isinstance(block, CausalResidualBlock | FrameAttention):
                setattr(parent, name, Unchanged())
    return twin
