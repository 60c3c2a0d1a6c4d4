"""float16 without overflow: the residual stream is scaled by a power of two.

float16 ends at 65,504, and the sum of many blocks may go beyond: so in the VAEs of SDXL and Stable
Video Diffusion. But the sum is read by norms, which are indifferent to its scale but for eps, and
by shortcut, up- and downsampling convolutions, which pass a scale on: by nothing else. So it can be
carried smaller. What is added to it is multiplied where it enters, and eps by the square; weights
stay what they are. The same is done inside a branch, whose first convolution only a norm reads.
Queries, keys and values of attention are left alone: more than norms read them.

How much smaller is found by a probe: a small clip goes through the layers in float32, one layer's
weights at a time, and the largest absolute value on the way decides.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from temporal_vae.network.layer import Layer
from temporal_vae.network.primitives import own_norm

LARGEST = 1024.0
"""What the largest value of a probe is brought down to, if it is above: a 64th of the way to the
end, since no probe sees what all videos do. A trained stream has most values within a thousandth of
its largest, so what is scaled keeps all its digits: those of float16 last down to 6e-5."""
PROBE_CELLS = 8
"""Height and width of a probe at the latents' end."""


def power_of_two(largest: float) -> float:
    """What brings a largest absolute value to `LARGEST` or less: 1, or a negative power of two."""
    if not LARGEST < largest < math.inf:  # nothing to mend, or nothing that could be mended
        return 1.0
    return 2.0 ** -math.ceil(math.log2(largest / LARGEST))


def probe_frames(channels: int, size: int) -> Tensor:
    """Three frames (3, C, size, size): noise of unit variance, and two flat ones, 1 and -1.

    Flat, since video has black frames, and norms make much of what is left there: the borders.
    """
    noise = torch.randn(
        channels, size, size, generator=torch.Generator().manual_seed(0), device="cpu",
        dtype=torch.float32,
    )  # fmt: skip
    return torch.stack([noise, torch.ones_like(noise), -torch.ones_like(noise)])


@torch.no_grad()
def fit_scales(layers: Iterable[Layer], x: Tensor) -> float:
    """Probe a line with frames x (T, C, H, W), and scale its residual stream to fit float16.

    Returns what the stream is multiplied by. The same weights get the same scales.
    """
    stream: list[float] = []
    branches: dict[Layer, float] = {}
    layers = list(layers)
    _probe(layers, x.transpose(0, 1).unsqueeze(0), stream, branches)
    if not all(map(math.isfinite, (*stream, *branches.values()))):
        warnings.warn(
            "some weights are not finite in float16, so no result will be: use bfloat16 or float32",
            stacklevel=2,
        )
    scale = power_of_two(max(stream))
    if min(scale, *map(power_of_two, branches.values())) != 1.0:
        for layer in layers:  # all, before any is changed
            layer.refuse_wrapped()
    for layer in layers:
        for part in layer.inside()[:-1] or (layer,):
            part.set_residual_scale(scale, power_of_two(branches.get(part, 0.0)))
    return scale


def _probe(
    layers: Iterable[Layer], x: Tensor, stream: list[float], branches: dict[Layer, float]
) -> Tensor:
    """A clip (1, C, T, H, W) through layers, measuring the stream behind each, and each branch."""
    for layer in layers:
        if layer.ends_stream:
            break
        if inside := layer.inside():
            around = _measured(inside[-1], x)[0]
            x = _probe(inside[:-1], x, stream, branches) + around
        else:
            x, branches[layer] = _measured(layer, x)
        stream.append(_largest(x))
    return x


def reset_scales(layers: Iterable[Layer]) -> float:
    """Undo `fit_scales`. Returns 1, what the stream is then multiplied by."""
    for layer in layers:
        layer.set_residual_scale(1.0)
    return 1.0


def _measured(layer: Layer, x: Tensor) -> tuple[Tensor, float]:
    """A clip (1, C, T, H, W) after a layer in float32, and the largest value inside its branch."""
    layer.set_residual_scale(1.0)
    inputs: list[float] = []

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        inputs.append(_largest(x))
        return own_norm(module, x)

    layer.float()  # itself, not a copy, which hooks and pruning may forbid; and exactly back
    try:
        with torch.autocast(x.device.type, enabled=False):
            y = layer.compute(x, norm)
    finally:
        layer.half()
    return y, max(inputs[1:], default=0.0)  # the first norm reads the stream


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
