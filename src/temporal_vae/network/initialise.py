"""The values of a new model's parameters."""

from __future__ import annotations

import math

import torch
from torch import nn

from temporal_vae.network.primitives import GroupNorm, PositionNorm, TimeConv
from temporal_vae.network.spacetime import RMSNorm
from temporal_vae.network.timewise import TemporalAttention, TemporalBlock


def initialise(
    model: nn.Module, generator: torch.Generator, as_identity: TimeConv | None = None
) -> None:
    """Give a model made on the meta device memory on the CPU, and each parameter its first value.

    Under `torch.device("meta")` nothing happens, as with torch's own layers: shapes alone are
    wanted, to be filled from a file.
    """
    if torch.get_default_device().type == "meta":
        return
    model.to_empty(device="cpu")
    draw_parameters(model, generator)
    if as_identity is not None:
        start_as_identity(as_identity)


def draw_parameters(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter below `module` its first value, drawing from `generator` alone.

    Weights are uniform within 1 / sqrt(fan in), norms start as the identity, and the last layer of
    every temporal branch at zero, so that a new video VAE is an image VAE, frame by frame.
    """
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.Linear)):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                layer.weight.uniform_(-bound, bound, generator=generator)
                if layer.bias is not None:
                    layer.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(layer, (GroupNorm, PositionNorm)):
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, RMSNorm):
                nn.init.ones_(layer.gamma)
        for layer in module.modules():
            if isinstance(layer, TemporalBlock):
                nn.init.zeros_(layer.mix_factor)
                _zero(layer.conv2)
            elif isinstance(layer, TemporalAttention):
                nn.init.zeros_(layer.distance_bias)
                _zero(layer.to_out[0])


def start_as_identity(conv: TimeConv) -> None:
    """Make a temporal convolution pass its input on unchanged."""
    with torch.no_grad():
        _zero(conv)
        for channel in range(conv.weight.shape[0]):
            conv.weight[channel, channel, conv.past] = 1.0


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
