"""The adversarial part of a training: a critic that learns along, if a recipe has one."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from temporal_vae.model import TemporalVAE
from temporal_vae.training.critics import PatchCritic, adaptive_weight, critic_loss, generator_loss
from temporal_vae.training.data import Share
from temporal_vae.training.parallel import data_parallel, mean_gradient
from temporal_vae.training.recipe import Recipe
from temporal_vae.training.run import pack, restore, unpack, weights

Tensors = dict[str, Tensor]


class Adversary:
    """Nothing at all where the recipe weighs no adversarial term."""

    def __init__(self, stage: Recipe, model: TemporalVAE, share: Share):
        self._weight, self._adaptive = stage.loss.adversarial, stage.critic.adaptive
        self._share = share
        self._last = cast(nn.Parameter, model.decoder.conv_out.weight)
        self.critic: PatchCritic | None = None
        if self._weight:
            spec = stage.critic
            self.critic = PatchCritic(model.input_channels, spec.width, spec.depth, seed=stage.seed)
            self.critic.to(self._last.device)
            self._parallel = data_parallel(self.critic, share, "ddp")
            names, own = zip(*self.critic.named_parameters(), strict=True)
            self._optimizer = torch.optim.AdamW(
                [{"params": own, "names": names}], spec.learning_rate, (0.5, 0.9), weight_decay=0.0
            )

    def of_generator(
        self, video: Tensor, reconstruction: Tensor, loss: Tensor, part: float, terms: Tensors
    ) -> Tensor:
        """The weighted adversarial term; adds what it consists of to `terms`.

        `part` of the critic's own gradients of this batch is added to its parameters.
        """
        if self.critic is None:
            return loss.new_zeros(())
        own = critic_loss(self._parallel(video), self._parallel(reconstruction.detach()))
        (own * part).backward()
        self.critic.requires_grad_(False)  # what follows is the decoder's
        fooled = generator_loss(self.critic(reconstruction))
        self.critic.requires_grad_(True)
        terms["critic"], terms["adversarial"] = own.detach(), fooled.detach()
        if not self._adaptive:
            return self._weight * fooled
        average = partial(mean_gradient, share=self._share)
        return self._weight * adaptive_weight(loss, fooled, self._last, average=average) * fooled

    def update(self) -> None:
        """One step of the critic."""
        if self.critic is not None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def saved(self) -> dict[str, Tensors]:
        """The critic and its optimizer, as files of a checkpoint."""
        if self.critic is None:
            return {}
        values = weights(dict(self.critic.named_parameters()))
        return {"critic": values, "critic_optimizer": pack(self._optimizer)}

    def load(self, files: dict[str, Tensors]) -> None:
        """Go on with what `saved` made."""
        if self.critic is not None and "critic" in files:
            restore(dict(self.critic.named_parameters()), files["critic"])
            unpack(self._optimizer, files["critic_optimizer"])
