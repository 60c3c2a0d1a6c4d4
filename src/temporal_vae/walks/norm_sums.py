"""Norms wider than a piece: their sums are gathered from all pieces first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from temporal_vae.network.kernels import work
from temporal_vae.network.kernels.norm import Moments, normalise
from temporal_vae.network.primitives import Norm, own_norm


class _Reached(Exception):
    """Ends the computation of a piece at the norm whose sums are wanted, with that norm's input."""

    def __init__(self, x: Tensor):
        self.input = x


def input_of(
    wanted: nn.Module, known: dict[nn.Module, Moments], compute: Callable[[Norm], object]
) -> Tensor:
    """What a norm gets when a piece is computed, the norms before it being known."""
    before = with_known(known)

    def stop_there(module: nn.Module, x: Tensor) -> Tensor:
        if module is wanted:
            raise _Reached(x)
        return before(module, x)

    try:
        with work.told_to(None):  # it is all computed again with what is found here
            compute(stop_there)
    except _Reached as reached:
        return reached.input
    raise RuntimeError(f"{type(wanted).__name__} is declared by its layer and never reached")


def moments_of(norm: nn.Module, inputs: Iterable[Tensor]) -> Moments:
    """Moments of a norm's input over all pieces of it."""
    # by map, which holds on to no input while the next one is computed
    return Moments.join(list(map(partial(Moments.of, groups=cast(int, norm.num_groups)), inputs)))


def with_known(known: dict[nn.Module, Moments]) -> Norm:
    """Norms by known moments; those that no piece cuts, on their own."""

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        if module not in known:
            return own_norm(module, x)
        declared = cast(Any, module)
        return normalise(x, known[module], declared.weight, declared.bias, declared.eps)

    return norm
