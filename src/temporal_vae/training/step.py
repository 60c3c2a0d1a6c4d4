"""What one step computes: the pass through the model, the noise, and the terms of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from temporal_vae import losses
from temporal_vae.latents import LatentDistribution
from temporal_vae.latents.scaling import deviation
from temporal_vae.model import TemporalVAE
from temporal_vae.training import recipe

Cells = tuple[int, int]
"""Channels of a latent cell, and its pixels along height and width."""


def cells_of(model: TemporalVAE) -> Cells:
    """What the latents of a model are made of."""
    return model.latent_channels, model.downsample_factor


class Pass(nn.Module):
    """Encoder, noise and decoder in one module, which data-parallel training wraps."""

    def __init__(self, model: TemporalVAE, spec: recipe.Loss, memory: str | None = None):
        """`memory`: what decoding, and the way back through it, may take, as "6GiB"."""
        super().__init__()
        self.model, self._spec, self._memory = model, spec, memory

    def forward(self, video: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, C, T, H, W) and a seed a sample -> reconstruction, mean and log-variance."""
        encoder = self.model.encoder
        frozen = not any(p.requires_grad for p in encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            mean, log_variance = LatentDistribution.from_moments(encoder(video))
        latent = mean
        if self._spec.sample:
            latent = latent + torch.exp(0.5 * log_variance) * draw(mean, seeds)
        if self._spec.noise:
            shares = noise_shares(seeds, self._spec).to(mean)
            noise = shares.view(-1, 1, 1, 1, 1) * draw(mean, seeds, 1)
            latent = latent + deviation(self.model.config, mean) * noise
        return self._decoded(latent), mean, log_variance

    def _decoded(self, latent: Tensor) -> Tensor:
        if self._memory is None:
            pixels: Tensor = self.model.decoder(latent)
            return pixels
        shape, latent = tuple(latent.shape), latent.float()  # as the weights are; counted so, too
        plan = self.model.plan(shape, "decode", budget=self._memory, gradients=True)
        return self.model.decode(latent, plan=plan)


def draw(like: Tensor, seeds: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal numbers of a tensor's shape, independent in every element.

    Those of a sample depend on its seed alone: on no other sample, device or process.
    """
    drawn = [
        torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(2 * seed + stream))
        for seed in seeds
    ]
    return torch.stack(drawn).to(like)


def noise_shares(seeds: Sequence[int], spec: recipe.Loss) -> Tensor:
    """The share of noise of each clip, (B,): 0 for the part that is clean, else uniform."""
    drawn = torch.stack([
        torch.rand(2, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ])  # fmt: skip
    return torch.where(drawn[:, 0] < spec.clean, 0.0, drawn[:, 1] * spec.noise)


PIXEL_TERMS = {
    "l1": losses.absolute_error,
    "mse": losses.mean_squared_error,
    "log_mse": losses.log_squared_error,
    "colour": losses.log_colour_error,
    "temporal": losses.log_temporal_error,
}
"""Terms of [loss] that compare pixels with pixels."""


class Terms:
    """The terms of the loss that a recipe weighs, but for the critic's."""

    def __init__(self, spec: recipe.Loss, device: torch.device, cells: Cells):
        """`cells` are those of the model that is trained."""
        from temporal_vae.training.critics import FeatureDistance, Lpips

        self._spec = spec
        self._networks: dict[str, nn.Module] = {}
        if spec.feature:
            self._networks["feature"] = FeatureDistance.from_file(Path(str(spec.feature_weights)))
        if spec.lpips:
            trunk, heads = Path(str(spec.lpips_trunk)), Path(str(spec.lpips_heads))
            self._networks["lpips"] = Lpips.from_files(trunk, heads)
        for network in self._networks.values():
            network.to(device)
        self._teacher = None
        if spec.teacher:
            self._teacher = TemporalVAE.from_pretrained(
                spec.teacher, dtype=torch.float32, device=device
            ).requires_grad_(False)
            theirs = cells_of(self._teacher)
            if spec.distill and theirs != cells:
                raise ValueError(
                    f"loss.distill compares latents, but the teacher's have {theirs[0]} channels "
                    f"and {theirs[1]} pixels a cell, and the model's {cells[0]} and {cells[1]}"
                )

    def __call__(
        self, video: Tensor, reconstruction: Tensor, mean: Tensor, log_variance: Tensor
    ) -> dict[str, Tensor]:
        """Every term with a weight above 0, not weighted yet, and "error", the squared error."""
        target, latent = self._target(video)
        found = {
            name: term(reconstruction, target)
            for name, term in PIXEL_TERMS.items()
            if getattr(self._spec, name)
        }
        for name, network in self._networks.items():
            found[name] = network(reconstruction, target)
        if self._spec.kl:
            found["kl"] = losses.kl_divergence(mean, log_variance) / mean[0].numel()
        if latent is not None:
            found["distill"] = (mean - latent).square().mean()
        found["error"] = losses.mean_squared_error(reconstruction.detach(), video)
        return found

    def _target(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """The video, or what a teacher makes of it; and the teacher's latent, if it counts."""
        if self._teacher is None:
            return video, None
        with torch.no_grad():
            latent = self._teacher.encode(video, sample_mode=False)
            target = self._teacher.decode(latent)
        return target, latent if self._spec.distill else None

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of all terms by their weights."""
        parts = [
            getattr(self._spec, name) * term for name, term in terms.items() if name != "error"
        ]
        return torch.stack(parts).sum()
