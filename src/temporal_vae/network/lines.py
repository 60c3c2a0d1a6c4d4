"""The encoder and the decoder of a configuration, whatever kind of model it is of."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import nn

from temporal_vae.config import VAEConfig, WanVAEConfig
from temporal_vae.network.autoencoder import Decoder, Encoder
from temporal_vae.network.primitives import watched
from temporal_vae.network.wan import WanDecoder, WanEncoder

AnyEncoder = Encoder | WanEncoder
AnyDecoder = Decoder | WanDecoder
Operation = Literal["encode", "decode"]


def encoder_of(config: VAEConfig) -> AnyEncoder:
    """A new encoder."""
    return WanEncoder(config) if isinstance(config, WanVAEConfig) else Encoder(config)


def decoder_of(config: VAEConfig) -> AnyDecoder:
    """A new decoder."""
    return WanDecoder(config) if isinstance(config, WanVAEConfig) else Decoder(config)


def line_of(config: VAEConfig, operation: Operation) -> AnyEncoder | AnyDecoder:
    """The line of an operation."""
    return encoder_of(config) if operation == "encode" else decoder_of(config)


def as_configured(line: nn.Module, config: VAEConfig, operation: Operation) -> bool:
    """Whether a line consists of the parts that its configuration makes, and nobody watches one."""
    return _parts(line) == _made(config, operation) and not any(map(watched, line.modules()))


def _parts(line: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in line.named_modules()]


@lru_cache(maxsize=16)
def _made(config: VAEConfig, operation: Operation) -> list[tuple[str, type]]:
    with torch.device("meta"):
        return _parts(line_of(config, operation))
