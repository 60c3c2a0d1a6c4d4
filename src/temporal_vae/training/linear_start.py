"""A new VAE of Wan's kind as a linear autoencoder, fitted to clips in closed form.

Its residual branches begin at zero, and what lies between them is linear but for the norm and the
SiLU at the end of each line. So the encoder can begin with principal components: of 2x2 pixels at
every halving, and, where frames are halved too, of the mean and the difference of two. The
decoder's convolutions are then fitted by least squares, one after the other, to what the encoder
had at the same size. That takes minutes, and is as near as hours of gradient steps get.

The end of a line passes numbers on unchanged: each stands there twice, with both signs, since
silu(u) - silu(-u) = u, beside a large constant that keeps the norm from changing with the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temporal_vae.config import WanVAEConfig
from temporal_vae.model import TemporalVAE
from temporal_vae.network.layer import Layer
from temporal_vae.network.spacetime import (
    CausalResidualBlock,
    FrameAttention,
    OverSpacetime,
    SpacetimeDownsample,
    SpacetimeUpsample,
)
from temporal_vae.network.wan import WanDecoder, WanEncoder

Conv = nn.Conv2d | nn.Conv3d

STREAM = 4.0
"""Deviation of every number between the first and the last layer. All have the same, so that a step
of an optimiser means as much to each; and a branch gives numbers around 1 whatever it sees, which
should not drown what is fitted."""
QUIET = 0.1
"""What weights between the fitted ones are multiplied by: not zero, so that they can learn."""
LOG_VARIANCE = -5.0
"""Of a new posterior."""
CONSTANT = 4.0
"""The constant before a norm, in lengths of what stands beside it."""
RIDGE = 1e-4
"""Of a least-squares fit, as a share of the mean square of its input."""
ROWS = 2**12
"""Positions of each clip that a fit looks at, drawn at random."""


@torch.no_grad()
def start_linear(model: TemporalVAE, clips: Tensor) -> None:
    """Fit a new model to clips (N, 3, T, H, W), T = 1 + 4 k and at least 5, in place.

    Raises `ValueError` for a layout that this is not known for.
    """
    _refuse_unknown(model.config)
    silence_branches(model)
    for line in (model.encoder, model.decoder):
        for conv in _between_branches(line.layers()):
            conv.weight.mul_(QUIET)
            _bias(conv).zero_()
    stages = _fit_encoder(cast(WanEncoder, model.encoder), clips)
    latent = cast(Tensor, model.encoder(clips))[:, : model.latent_channels]
    _fit_decoder(cast(WanDecoder, model.decoder), latent, stages, clips)


def _refuse_unknown(config: object) -> None:
    if isinstance(config, WanVAEConfig) and not config.level_shortcuts and config.patch_size == 1:
        wider = config.widths[-1] - config.widths[-2]
        if wider > config.latent_channels and config.widths[1] // 2 > 2 * config.input_channels:
            return
    raise ValueError(
        "model.start = 'linear' is known for Wan 2.1's layout whose last level is wider than the "
        "one before by more than the latent's channels, such as preset tiny-wan: take another "
        "layout, or leave it away"
    )


def silence_branches(model: TemporalVAE) -> None:
    """Set the last layer of every residual branch to zero, so that the branches add nothing."""
    for block in model.modules():
        if isinstance(block, CausalResidualBlock | FrameAttention):
            last = block.conv2 if isinstance(block, CausalResidualBlock) else block.proj
            for parameter in last.parameters():
                parameter.zero_()


def _between_branches(layers: Iterator[Layer]) -> Iterator[Conv]:
    """The convolutions that are in no residual branch."""
    for layer in layers:
        if isinstance(layer, CausalResidualBlock):
            yield from () if layer.conv_shortcut is None else (layer.conv_shortcut,)
        elif not isinstance(layer, FrameAttention):
            yield from (m for m in layer.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))


# The encoder ---------------------------------------------------------------------------------


def _fit_encoder(line: WanEncoder, clips: Tensor) -> list[Tensor]:
    """Fit it; what it has after each step that the decoder takes back, coarsest first."""
    x, stages, size = clips, list[Tensor](), clips.new_ones(clips.shape[1])
    *_, widest = (layer for layer in line.layers() if _widens(layer))
    for layer in line.layers():
        if isinstance(layer, SpacetimeDownsample):
            size = _halve(layer, x[:, : len(size)], size, stages)
        elif layer is widest:
            _sign_twice(cast(nn.Conv3d, widest.conv_shortcut), x[:, : len(size)], size)
        elif _widens(layer):
            _pass_on(cast(nn.Conv3d, layer.conv_shortcut), len(size))
        elif isinstance(layer, OverSpacetime):
            _fit_end(line, cast(nn.Conv3d, layer.conv), x)
        x = layer.compute(x)
        if isinstance(layer, SpacetimeDownsample):
            stages.insert(0, x[:, : len(size)])
    return stages


def _widens(layer: Layer) -> TypeGuard[CausalResidualBlock]:
    return isinstance(layer, CausalResidualBlock) and layer.conv_shortcut is not None


def _fit_end(line: WanEncoder, conv: nn.Conv3d, x: Tensor) -> None:
    """The first convolution passes pixels on, the last ones give latents of deviation 1."""
    if conv is not line.conv_out:
        _pass_on(conv, conv.in_channels)
        return
    numbers = conv.out_channels // 2
    gain = 1 / _rows(x[:, : 2 * numbers : 2] - x[:, 1 : 2 * numbers : 2]).std(0)
    conv.weight[:numbers].zero_()
    for channel in range(numbers):
        conv.weight[channel, 2 * channel, -1, 1, 1] = gain[channel]
        conv.weight[channel, 2 * channel + 1, -1, 1, 1] = -gain[channel]
    _bias(conv)[numbers:] = LOG_VARIANCE


def _halve(layer: SpacetimeDownsample, x: Tensor, size: Tensor, stages: list[Tensor]) -> Tensor:
    """Fit a halving of known channels, of which each is a component divided by its `size`.

    Returns the sizes of its own, (channels that are known then,).
    """
    conv, time, known = cast(nn.Conv2d, layer.resample[1]), layer.time_conv, x.shape[1]
    squares, sizes = _squares(x), size.repeat_interleave(4)
    room = layer.width - (layer.width // 3 if time is not None else 0)
    found = _Components.of(_scaled(squares, sizes), min(room, len(sizes)))
    weight, bias = found.mapping(sizes)
    keep = len(weight)
    conv.weight[:keep].zero_()
    # the 3x3 kernel reads below and on the right of the 2x2 pixels, not above or on the left
    conv.weight[:keep, :known, :2, :2] = weight.view(keep, known, 2, 2)
    _bias(conv)[:keep] = bias
    if time is None:
        return found.size
    y = torch.einsum("nithw,oi->nothw", squares, weight) + bias.view(-1, 1, 1, 1)
    stages.insert(0, y)
    return torch.cat([found.size, _halve_time(time, y, found.size)])


def _halve_time(conv: nn.Conv3d, x: Tensor, size: Tensor) -> Tensor:
    """The mean of two frames in the first channels, components of their difference behind."""
    known = x.shape[1]
    keep = min(known, conv.out_channels - known)
    found = _Components.of(_scaled(x[:, :, 1::2] - x[:, :, 2::2], size) / 2, keep)
    weight, bias = found.mapping(size)
    conv.weight[: known + keep].zero_()
    for channel in range(known):
        conv.weight[channel, channel, 1:] = 0.5
    conv.weight[known : known + keep, :known, 1, 0, 0] = weight / 2
    conv.weight[known : known + keep, :known, 2, 0, 0] = -weight / 2
    _bias(conv)[known : known + keep] = bias
    return found.size


def _sign_twice(conv: nn.Conv3d, x: Tensor, size: Tensor) -> None:
    """Principal components, the leading ones with both signs, and a constant."""
    known = x.shape[1]
    twice = min(known, conv.out_channels - 1 - known)
    # the first frame of a clip has no differences
    weight, bias = _Components.of(_scaled(x[:, :, 1:], size), known).mapping(size)
    signs = weight.new_tensor([1.0, -1.0]).repeat(twice)
    order = torch.cat([torch.arange(twice).repeat_interleave(2), torch.arange(twice, known)])
    signs = torch.cat([signs, signs.new_ones(known - twice)])
    count = len(order)
    conv.weight.zero_()
    conv.weight[:count, :known, 0, 0, 0] = signs[:, None] * weight[order]
    _bias(conv)[:count] = signs * bias[order]
    _bias(conv)[-1] = CONSTANT * STREAM * math.sqrt(count)


# The decoder ---------------------------------------------------------------------------------


def _fit_decoder(line: WanDecoder, x: Tensor, stages: list[Tensor], clips: Tensor) -> None:
    """Fit it to what the encoder had, layer by layer, each to the results of those before it."""
    known, targets = x.shape[1], iter([*stages, STREAM * clips, clips])
    for layer in line.layers():
        if isinstance(layer, SpacetimeUpsample):
            known = _double(layer, x, known, targets)
            if known == clips.shape[1]:
                _end_with_signs(cast(nn.Conv2d, layer.resample[1]), STREAM * clips)
        elif _widens(layer):
            _pass_on(cast(nn.Conv3d, layer.conv_shortcut), known)
        elif isinstance(layer, OverSpacetime):
            conv = cast(nn.Conv3d, layer.conv)
            if conv is line.post_quant_conv:
                _pass_on(conv, known)
            else:
                known = _fit(conv, x, x.shape[1], next(targets))
        x = layer.compute(x)


def _double(layer: SpacetimeUpsample, x: Tensor, known: int, targets: Iterator[Tensor]) -> int:
    """Fit a doubling; how many of its channels are known then."""
    if (time := layer.time_conv) is not None:
        target = next(targets)
        pairs = torch.cat([target[:, :, 1::2], target[:, :, 2::2]], 1)
        both = nn.Conv3d(known, pairs.shape[1], (3, 1, 1))
        _fit(both, x[:, :, 1:], known, pairs)
        for half, rows in enumerate(both.weight.chunk(2)):
            first, count = half * layer.width, len(rows)
            time.weight[first : first + count].zero_()
            time.weight[first : first + count, :known] = rows
            time.bias[first : first + count] = _bias(both).chunk(2)[half]
        x, known = layer.more_frames(x), target.shape[1]
    larger = x[:, :known].repeat_interleave(2, 3).repeat_interleave(2, 4)
    return _fit(cast(nn.Conv2d, layer.resample[1]), larger, known, next(targets))


def _end_with_signs(conv: nn.Conv2d, clips: Tensor) -> None:
    """The pixels that a convolution gives a second time, with the other sign, and a constant."""
    colours, bias = clips.shape[1], _bias(conv)
    for values in (conv.weight, bias):
        values[colours : 2 * colours] = -values[:colours]
    conv.weight[-1].zero_()
    bias[-1] = CONSTANT * math.sqrt(2) * _rows(clips).norm(dim=1).mean()


def _fit(conv: Conv, x: Tensor, known: int, target: Tensor) -> int:
    """Set the first outputs by least squares, from the known channels of x; how many they are.

    x (N, C, T, H, W) -> target (N, C', T, H, W): as many frames, with zeros before the first. Of
    a target with more channels than there are outputs, the first are taken.
    """
    target = target[:, : conv.out_channels]
    size = conv.kernel_size if len(conv.kernel_size) == 3 else (1, *conv.kernel_size)
    generator = torch.Generator().manual_seed(0)
    products = sums = torch.zeros((), dtype=torch.float64)
    for clip, wanted in zip(x[:, :known], target, strict=True):
        at = [torch.randint(n, (ROWS,), generator=generator) for n in wanted.shape[1:]]
        around = F.pad(clip, (size[2] // 2,) * 2 + (size[1] // 2,) * 2 + (size[0] - 1, 0))
        windows = around.unfold(1, size[0], 1).unfold(2, size[1], 1).unfold(3, size[2], 1)
        rows = windows[:, at[0], at[1], at[2]].transpose(0, 1).flatten(1)
        rows = torch.cat([rows, rows.new_ones(ROWS, 1)], 1)
        products = products + (rows.T @ rows).double()
        sums = sums + (rows.T @ wanted[:, at[0], at[1], at[2]].T).double()
    products.diagonal().add_(RIDGE * products.diagonal().mean())
    found = torch.linalg.solve(products, sums).T.to(x.dtype)
    count = len(found)
    conv.weight[:count].zero_()
    conv.weight[:count, :known] = found[:, :-1].view(count, known, *conv.kernel_size)
    _bias(conv)[:count] = found[:, -1]
    return count


# Parts ---------------------------------------------------------------------------------------


def _bias(conv: Conv) -> Tensor:
    """Its bias, which all of these have."""
    return cast(Tensor, conv.bias)


def _pass_on(conv: nn.Conv3d, channels: int) -> None:
    """Make its first channels those of its input, at the same pixel of the same frame."""
    conv.weight[:channels].zero_()
    middle = conv.kernel_size[1] // 2
    for channel in range(channels):
        conv.weight[channel, channel, -1, middle, middle] = 1.0


def _squares(x: Tensor) -> Tensor:
    """2x2 pixels as the channels of one: (N, C, T, H, W) -> (N, 4 C, T, H/2, W/2)."""
    n, c, t, h, w = x.shape
    parts = x.reshape(n, c, t, h // 2, 2, w // 2, 2).permute(0, 1, 4, 6, 2, 3, 5)
    return parts.reshape(n, 4 * c, t, h // 2, w // 2)


def _rows(x: Tensor) -> Tensor:
    """The channels of every position: (N, C, T, H, W) -> (positions, C)."""
    return x.movedim(1, -1).flatten(0, 3)


def _scaled(x: Tensor, size: Tensor) -> Tensor:
    """Each channel times a number of its own."""
    return x * size.view(-1, 1, 1, 1)


@dataclass(frozen=True, slots=True)
class _Components:
    """Principal components of channels: their mean (C,), a basis (keep, C), and the size of each,
    which makes their deviation `STREAM`, (keep,)."""

    mean: Tensor
    basis: Tensor
    size: Tensor

    @classmethod
    def of(cls, x: Tensor, keep: int) -> _Components:
        """The leading ones of all positions of x (N, C, T, H, W)."""
        rows = _rows(x)
        mean = rows.mean(0)
        centred = rows - mean
        values, vectors = torch.linalg.eigh((centred.T @ centred).double() / len(rows))
        deviation = values.flip(0)[:keep].clamp_min(1e-12).sqrt().to(x.dtype)
        return cls(mean, vectors.flip(1)[:, :keep].T.to(x.dtype), deviation / STREAM)

    def mapping(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias from channels that are divided by `size` to components that are, too."""
        weight = self.basis / self.size[:, None]
        return weight * size, -(weight @ self.mean)
