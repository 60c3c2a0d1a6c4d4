"""The encoder and the decoder of a configuration, whatever kind of model it is of."""

from __future__ import annotations

from typing import Literal

from temporal_vae.config import VAEConfig, WanVAEConfig
from temporal_vae.network.autoencoder import Decoder, Encoder
from temporal_vae.network.wan import WanDecoder, WanEncoder

AnyEncoder = Encoder | WanEncoder
AnyDecoder = Decoder | WanDecoder


def encoder_of(config: VAEConfig) -> AnyEncoder:
    """A new encoder."""
    return WanEncoder(config) if isinstance(config, WanVAEConfig) else Encoder(config)


def decoder_of(config: VAEConfig) -> AnyDecoder:
    """A new decoder."""
    return WanDecoder(config) if isinstance(config, WanVAEConfig) else Decoder(config)


def line_of(config: VAEConfig, operation: Literal["encode", "decode"]) -> AnyEncoder | AnyDecoder:
    """The line of an operation."""
    return encoder_of(config) if operation == "encode" else decoder_of(config)
