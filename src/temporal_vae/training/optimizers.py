"""How weights follow their gradients: parts of a model, optimizers, the schedule, averages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from temporal_vae.model import TemporalVAE
from temporal_vae.network.kernels.dtypes import fastest
from temporal_vae.training import recipe
from temporal_vae.training.recipe import PARTS

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial whose repetition brings singular values near 1."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an orthogonal step, that of AdamW's, so that one learning rate fits both."""


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter belongs to, by its name."""
    half = name.partition(".")[0]
    kind = "temporal" if ".temporal" in name or ".time_conv" in name else "spatial"
    return f"{half}.{kind}"


def trained_parts(model: recipe.Model) -> set[str]:
    """The parts that a recipe trains; with `temporal` off, of the spatial ones."""
    chosen = {part for part in PARTS for name in model.train if f"{part}.".startswith(f"{name}.")}
    return chosen if model.temporal else {part for part in chosen if "spatial" in part}


def freeze(model: TemporalVAE, spec: recipe.Model) -> dict[str, nn.Parameter]:
    """Let the parameters that are trained, returned by name, have gradients, and no others."""
    parts = trained_parts(spec)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(f"nothing to train: the model has no parameters in {', '.join(parts)}")
    return found


class Muon(Optimizer):
    """Momentum made orthogonal, for weights of two and more dimensions, as matrices (out, rest).

    In bfloat16 where the device is fastest with it, as is usual, and else in float32: without
    instructions for bfloat16 its matrix products would take three quarters of a training step.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; step sizes by Liu et al. 2025,
    arXiv 2502.16982.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        kept = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        kept.lerp_(gradient, 1 - group["momentum"])
        step = orthogonal(gradient.lerp(kept, group["momentum"]).flatten(1))
        rate = group["lr"] * RMS * math.sqrt(max(step.shape))
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step.view_as(p), alpha=rate)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values about 1, by Newton and Schulz's iteration."""
    dtype = torch.bfloat16 if fastest(matrix.device) == torch.bfloat16 else torch.float32
    a, b, c = COEFFICIENTS
    x: Tensor = matrix.to(dtype)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    return x.to(matrix.dtype)


def optimizers(parameters: Mapping[str, nn.Parameter], spec: recipe.Optimizer) -> list[Optimizer]:
    """AdamW, or Muon for the matrices inside the network and AdamW for the rest.

    Each group has its `factor` of the learning rate and the `names` of its parameters.
    """
    inner = {name for name in parameters if spec.name == "muon" and _is_inner(name, parameters)}
    rest = set(parameters) - inner
    made: list[Optimizer] = []
    if rest:
        made.append(
            torch.optim.AdamW(_groups(parameters, rest, spec), spec.learning_rate,
                              (spec.betas[0], spec.betas[1]), weight_decay=spec.weight_decay)
        )  # fmt: skip
    if inner:
        groups = _groups(parameters, inner, spec)
        made.append(Muon(groups, spec.learning_rate, weight_decay=spec.weight_decay))
    return made


def _is_inner(name: str, parameters: Mapping[str, nn.Parameter]) -> bool:
    ends = ("conv_in", "conv_out", "quant_conv", "distance_bias")
    return parameters[name].ndim >= 2 and not any(end in name for end in ends)


def _groups(
    parameters: Mapping[str, nn.Parameter], names: Iterable[str], spec: recipe.Optimizer
) -> list[dict[str, Any]]:
    by_part: dict[str, list[str]] = {}
    for name in parameters:  # in the order of the model
        if name in names:
            by_part.setdefault(part_of(name), []).append(name)
    return [
        {"params": [parameters[n] for n in group], "names": group, "factor": factor(part, spec)}
        for part, group in by_part.items()
    ]


def factor(part: str, spec: recipe.Optimizer) -> float:
    """The multiple of the learning rate that a part has: its own, or its half's, or 1."""
    half = part.partition(".")[0]
    return next((float(spec.rates[name]) for name in (part, half) if name in spec.rates), 1.0)


def learning_rate(spec: recipe.Optimizer, progress: float, step: int) -> float:
    """Warm-up over the first steps, and a half cosine over `progress`, 0 to 1, of the stage."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    decay = spec.final_rate + (1 - spec.final_rate) * cosine
    return spec.learning_rate * min(1.0, (step + 1) / max(1, spec.warmup_steps)) * decay


def set_rate(made: Iterable[Optimizer], rate: float) -> None:
    """Give every group its multiple of a learning rate."""
    for optimizer in made:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]


class Average:
    """An exponential average of parameters (EMA), by torch's own function, in tensors of its own.

    It begins with a shorter memory, about a third of the steps so far, so that first values do not
    count for long.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self._decay, self.updates = decay, 0
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take in the parameters as they are now."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (4 + self.updates))
        now = [parameters[name].detach() for name in self.values]
        get_ema_multi_avg_fn(decay)(list(self.values.values()), now, self.updates)
