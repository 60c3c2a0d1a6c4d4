"""The setters of a model: how it walks where a call gives no plan; also by diffusers' names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from temporal_vae.network.autoencoder import Chain
from temporal_vae.walks.budget import Budget, parse_budget
from temporal_vae.walks.runner import Settings


class Switches(nn.Module):
    """Slicing, tiling, a memory budget, gradient checkpointing: none of them changes a result, nor
    a gradient, by more than rounding."""

    _settings: Settings

    def set_slicing_enabled(self, enabled: bool) -> None:
        """Walk the samples of a batch one by one from now on; the result stays the same."""
        self._settings = replace(self._settings, slicing=bool(enabled))

    def set_tiling_enabled(self, enabled: bool) -> None:
        """Walk with the least memory from now on; the result stays the same.

        It goes before a memory budget, which holds again once it is off.
        """
        self._settings = replace(self._settings, tiling=bool(enabled))

    def set_memory_budget(self, budget: Budget) -> None:
        """Plan every encode and decode for this budget from now on, see `plan`; None ends it.

        The steps of a stream are planned as well, each piece as it comes. Where gradients are
        wanted, of an input or of weights, the budget holds to the end of `backward`, which takes
        more: use `torch.no_grad` where they are not. `forward`, `train_step` and
        `compute_gradients` walk whole. Raises `ValueError` for what is no budget.
        """
        parse_budget(budget)
        self._settings = replace(self._settings, budget=budget)

    @property
    def slicing_enabled(self) -> bool:
        """Whether the samples of a batch are walked one by one."""
        return self._settings.slicing

    @property
    def tiling_enabled(self) -> bool:
        """Whether every walk is the one of least memory."""
        return self._settings.tiling

    @property
    def memory_budget(self) -> Budget:
        """The budget that `set_memory_budget` stored."""
        return self._settings.budget

    # By diffusers' names ---------------------------------------------------------------------

    def enable_slicing(self) -> None:
        """`set_slicing_enabled(True)`, by diffusers' name."""
        self.set_slicing_enabled(True)

    def disable_slicing(self) -> None:
        """`set_slicing_enabled(False)`, by diffusers' name."""
        self.set_slicing_enabled(False)

    def enable_tiling(self, *_: Any, **__: Any) -> None:
        """`set_tiling_enabled(True)`, by diffusers' name.

        Arguments are ignored: there are no tiles whose sizes they could give.
        """
        self.set_tiling_enabled(True)

    def disable_tiling(self) -> None:
        """`set_tiling_enabled(False)`, by diffusers' name."""
        self.set_tiling_enabled(False)

    def enable_gradient_checkpointing(self) -> None:
        """Compute each layer again for its gradients from now on, and keep only its input.

        Training takes much less memory, and about a third more time; gradients stay the same. For a
        bound of memory, and less of it, decode with a plan made with gradients=True.
        """
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep what gradients need again."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether `enable_gradient_checkpointing` holds."""
        return any(isinstance(m, Chain) and m.gradient_checkpointing for m in self.modules())

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, Chain):
                module.gradient_checkpointing = enabled
