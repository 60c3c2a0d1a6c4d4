"""The network as one graph that needs no Python: from pixels to their reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from temporal_vae.latents import LatentDistribution, latent_channels
from temporal_vae.network.lines import AnyDecoder, AnyEncoder


class Reconstruction(nn.Module):
    """`predict` alone: pixels (B, C, T, H, W) or (B, C, H, W) -> the same shape, by the mean."""

    def __init__(self, encoder: AnyEncoder, decoder: AnyDecoder, active: tuple[int, ...] | None):
        super().__init__()
        self.encoder, self.decoder, self.active = encoder, decoder, active

    def forward(self, video: Tensor) -> Tensor:
        """See the class."""
        clip = video.unsqueeze(2) if video.ndim == 4 else video
        latent = LatentDistribution.from_moments(self.encoder(clip)).mean
        if self.active is not None:
            latent = latent_channels.mask(latent, self.active)
        y: Tensor = self.decoder(latent)
        return (y.squeeze(2) if video.ndim == 4 else y).contiguous()


def export(
    encoder: AnyEncoder, decoder: AnyDecoder, active: tuple[int, ...] | None, example: Tensor
) -> ExportedProgram:
    """`torch.export` of the reconstruction; batch, frames, height and width may vary.

    A graph takes what there is 1 of for fixed, so it is traced with at least 2 of each.

    Raises `ValueError` for a model that takes the first frame of a clip apart.
    """
    if encoder.config.frames_per_latent > 1:
        raise ValueError(
            "this model takes the first frame of a clip apart, which a graph for any number of "
            "frames does not: compile it with compile() instead"
        )
    f, (samples, channels, *frames, rows, columns) = encoder.config.downsample_factor, example.shape
    least = [max(2, n) for n in (samples, *frames)], [max(2 * f, n) for n in (rows, columns)]
    (samples, *frames), sides = least
    traced = example.new_zeros(samples, channels, *frames, *sides)
    sizes = {axis: Dim.DYNAMIC for axis in range(example.ndim) if axis != 1}
    line = Reconstruction(encoder, decoder, active)
    with torch.inference_mode(False), torch.no_grad():
        return torch.export.export(line, (traced,), dynamic_shapes={"video": sizes}, strict=False)
