"""What judges a reconstruction beside the error of its pixels: a critic, and distances of features.

A critic is trained along with the VAE to tell its frames from real ones, and the VAE to fool it. A
distance of features compares what a classifier of images makes of two frames; its weights are
files of the caller's, none are in this package. Videos are (B, C, T, H, W), pixels in [-1, 1].
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

LEAST_SIZE = 16
"""Pixels of the height and the width of what a critic judges, at least."""

# The critic -----------------------------------------------------------------------------------


class PatchCritic(nn.Module):
    """A network that scores how real each patch of a video looks: high for real, low for made.

    (B, channels, T, H, W) in [-1, 1] gives (B, 1, t, h, w), unbounded: h and w are H and W halved
    `depth` times, t is T halved `depth - 1` times, rounded up. Convolutions see three frames each,
    so it judges motion too. Norms are over one sample: the scores of a video do not depend on what
    else is in the batch, nor on how a batch is split over processes.

    `width` are the channels of the first layer, which double up to eight times. Initial values are
    drawn from `seed`, a number or a generator on the CPU, and from nothing else.

    Raises `ValueError` for a `channels`, `width` or `depth` below 1, and when called with another
    shape, or with frames smaller than 16 pixels or 2^depth.
    Source: Isola et al. 2017, arXiv 1611.07004 (patches), with 3-D convolutions.
    """

    def __init__(
        self, channels: int = 3, width: int = 32, depth: int = 3, seed: int | torch.Generator = 0
    ):
        super().__init__()
        for name, value in (("channels", channels), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.channels, self.least_size = channels, max(LEAST_SIZE, 2**depth)
        widths = [width * min(2**level, 8) for level in range(depth)]
        with torch.random.fork_rng(devices=[]):  # layers draw from torch's own generator first
            layers = [_halving(channels, width, 1), nn.LeakyReLU(0.2)]
            for before, after in pairwise(widths):
                layers += [_halving(before, after, 2), _norm(after), nn.LeakyReLU(0.2)]
            layers += [nn.Conv3d(widths[-1], widths[-1], 3, padding=1, bias=False)]
            layers += [_norm(widths[-1]), nn.LeakyReLU(0.2)]
            layers += [nn.Conv3d(widths[-1], 1, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        _draw(self, seed)

    def forward(self, video: Tensor) -> Tensor:
        """The scores of patches."""
        if video.ndim != 5 or video.shape[1] != self.channels or 0 in video.shape:
            raise ValueError(
                f"a critic takes (B, {self.channels}, T, H, W), got {tuple(video.shape)}"
            )
        if min(video.shape[3:]) < self.least_size:
            raise ValueError(
                f"this critic takes frames of {self.least_size}x{self.least_size} pixels or more, "
                f"got {video.shape[3]}x{video.shape[4]}"
            )
        scores: Tensor = self.layers(video)
        return scores


def _halving(before: int, after: int, in_time: int) -> nn.Module:
    """Half the height and width. A kernel of 4 covers each pixel alike; one of 3 leaves a grid."""
    return nn.Conv3d(before, after, (3, 4, 4), (in_time, 2, 2), padding=1)


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(channels, 8), channels)


def _draw(module: nn.Module, seed: int | torch.Generator) -> None:
    """Weights and biases of convolutions, uniform within 1 / sqrt(fan in)."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv3d):
                bound = layer.weight[0].numel() ** -0.5
                for parameter in layer.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)


def critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """What a critic minimises: the hinge loss, 1 where all scores are 0, and 0 at its least.

    Scores beyond 1 for real and -1 for made patches count no further. `fake_scores` are those of a
    detached reconstruction. Source: Lim and Ye 2017, arXiv 1705.02894, halved as in VQGAN.
    """
    real, fake = _wide(real_scores), _wide(fake_scores)
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake_scores: Tensor) -> Tensor:
    """What the VAE minimises: minus the mean score of its reconstruction, unbounded below."""
    return -_wide(fake_scores).mean()


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: under autocast scores and features are of 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last: nn.Parameter,
    most: float = 1e4,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The factor by which `adversarial` pulls at a parameter as hard as `reconstruction` does.

    Both are losses, scalars that `last` has a part in: the weight of the decoder's last layer. The
    result is the ratio of the norms of their gradients there, a scalar in [0, most] without a
    gradient. The losses can still be stepped down from afterwards.

    With several processes `average` takes the mean of a tensor over them: without it each has a
    weight of its own, and the step is not that of one process with the whole batch.

    Raises `ValueError` if a loss does not depend on `last`.
    Source: Esser et al. 2021, arXiv 2012.09841, equation 7; as there, 1e-4 is added to the divisor.
    """
    ours, theirs = (
        _gradient_norm(loss, last, average or (lambda gradient: gradient))
        for loss in (reconstruction, adversarial)
    )
    return (ours / (theirs + 1e-4)).clamp(0, most)


def _gradient_norm(
    loss: Tensor, parameter: nn.Parameter, average: Callable[[Tensor], Tensor]
) -> Tensor:
    if not loss.requires_grad:
        raise ValueError("the loss has no gradient: it was computed from detached tensors")
    (found,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
    if found is None:
        raise ValueError("the loss does not depend on the last parameter, so no ratio is found")
    norm: Tensor = average(found.detach().float()).norm()
    return norm


# Distances of features ------------------------------------------------------------------------


class _FrameDistance(nn.Module):
    """Squared distances of unit feature vectors, weighted by channel, of two clips' frames.

    Where a trunk's channels are BGR, `reverse` turns ours around. Nothing in it is trained.
    """

    def __init__(
        self,
        trunk: _Trunk,
        shift: Sequence[float],
        scale: Sequence[float],
        heads: Sequence[Tensor],
        reverse: bool = False,
    ):
        super().__init__()
        self.trunk, self.reverse = trunk, reverse
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1))
        for i, head in enumerate(heads):
            self.register_buffer(f"head{i}", head.view(-1, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """A scalar, 0 for equal clips: the mean over frames and places, the sum over layers.

        Both are (B, 3, T, H, W) in [-1, 1]; one channel is taken for grey. Frames are judged one by
        one. Raises `ValueError` for shapes that differ, other channels, and frames too small.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction and target must have one shape, got {tuple(prediction.shape)} and "
                f"{tuple(target.shape)}"
            )
        ours, theirs = (self.trunk(self._frames(video)) for video in (prediction, target))
        buffers = dict(self.named_buffers(recurse=False))
        distances = [
            (buffers[f"head{i}"] * (_unit(a) - _unit(b)).square()).sum(1).mean()
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        ]
        return torch.stack(distances).sum()

    def _frames(self, video: Tensor) -> Tensor:
        """Every frame as the trunk wants it, (B T, 3, H, W)."""
        if video.ndim != 5 or video.shape[1] not in (1, 3) or 0 in video.shape:
            raise ValueError(
                "a distance of features takes videos (B, C, T, H, W) with 3 channels, or 1 for "
                f"grey, got {tuple(video.shape)}"
            )
        if min(video.shape[3:]) < self.trunk.least_size:
            raise ValueError(
                f"this distance takes frames of {self.trunk.least_size} pixels or more each way, "
                f"got {video.shape[3]}x{video.shape[4]}"
            )
        frames = video.to(self.shift.dtype).transpose(1, 2).flatten(0, 1).expand(-1, 3, -1, -1)
        scaled = (frames - self.shift) / self.scale
        return scaled.flip(1) if self.reverse else scaled


class FeatureDistance(_FrameDistance):
    """How far apart two clips are to SqueezeNet v1.1, a classifier of images: a perceptual loss.

    The squared distance of unit feature vectors in seven layers, the mean over places, frames and
    layers, in [0, 2]. Zero for equal clips. Blur counts more than a change of brightness of equal
    squared error. It is not LPIPS, whose layers are weighted by what people said.

    Frames must be 17 pixels or more each way. Differentiable in `prediction`.
    Source: Johnson et al. 2016, arXiv 1603.08155; Iandola et al. 2016, arXiv 1602.07360 (network).
    """

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> FeatureDistance:
        """The distance by the trained weights in a file, computed in float32.

        The file is safetensors with the layers `conv1` and `fire2` to `fire9` of the original
        SqueezeNet v1.1, whose input is BGR in 0..255 less (104, 117, 123); others are not read.
        Raises `ValueError` for an absent file, for one that is no safetensors (pickles such as
        .pth are not opened), and for missing layers or wrong shapes.
        """
        tensors = _read(path, "the trained weights of SqueezeNet v1.1")
        named = {ours: tensors[theirs] for ours, theirs in _CAFFE.items() if theirs in tensors}
        lacking = [theirs for ours, theirs in _CAFFE.items() if ours not in named]
        if lacking:
            raise ValueError(f"{os.fspath(path)} is no SqueezeNet v1.1: it lacks {lacking[0]!r}")
        trunk = _loaded(_squeezenet(), named, path)
        shift = [mean / 127.5 - 1 for mean in (123, 117, 104)]  # of R, G, B
        heads = [torch.full((n,), 1 / len(trunk.widths)) for n in trunk.widths]
        return cls(trunk, shift, [1 / 127.5] * 3, heads, reverse=True)


class Lpips(_FrameDistance):
    """LPIPS, version 0.1: how different people would find two clips' frames, by trained weights.

    The weighted squared distance of unit feature vectors, the mean over places and frames and the
    sum over layers; 0 for equal clips. Frames must be 17 pixels or more each way with SqueezeNet,
    16 with VGG. Differentiable in `prediction`.
    Source: Zhang et al. 2018, arXiv 1801.03924; numbers as of the package lpips 0.1.4.
    """

    @classmethod
    def from_files(cls, trunk: str | os.PathLike[str], heads: str | os.PathLike[str]) -> Lpips:
        """The distance by two files of weights, both safetensors, computed in float32.

        `trunk` is torchvision's squeezenet1_1 or vgg16, with its names (`features.0.weight` and so
        on), of ImageNet. `heads` are the weights in the package lpips for the same network
        (`lin0.model.1.weight` and so on; its weights/v0.1/squeeze.pth or vgg.pth), converted.
        Raises `ValueError` for an absent file, for one that is no safetensors (pickles such as
        .pth are not opened), and for missing layers or wrong shapes.
        """
        tensors = _read(trunk, "the weights of torchvision's squeezenet1_1 or vgg16")
        if "features.3.squeeze.weight" in tensors:
            loaded = _loaded(_squeezenet(), tensors, trunk)
        elif "features.28.weight" in tensors:
            loaded = _loaded(_vgg16(), tensors, trunk)
        else:
            raise ValueError(
                f"{os.fspath(trunk)} is neither torchvision's squeezenet1_1 nor its vgg16: it "
                "lacks 'features.3.squeeze.weight' and 'features.28.weight'"
            )
        lines = _read(heads, "the heads ('lin' weights) of the package lpips")
        weights = [
            _tensor(lines, f"lin{i}.model.1.weight", torch.Size((1, width, 1, 1)), heads)
            for i, width in enumerate(loaded.widths)
        ]
        return cls(loaded, (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450), weights)


def _unit(features: Tensor) -> Tensor:
    """Vectors (N, C, h, w) along C scaled to length 1, as LPIPS does; zero stays zero."""
    features = _wide(features)
    # the bound changes no value, and keeps the gradient of the root finite where all are zero
    length = features.square().sum(1, keepdim=True).clamp(min=1e-30).sqrt()
    return features / (length + 1e-10)


# Trunks, named as torchvision names them --------------------------------------------------------


class _Trunk(nn.Module):
    """Convolutions in a row, some of whose results are features; `widths` are their channels."""

    def __init__(
        self, layers: Sequence[nn.Module], taps: Mapping[int, int], least_size: int
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.taps, self.least_size = taps, least_size

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.taps.values())

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(x)
        return found


class _Fire(nn.Module):
    def __init__(self, before: int, squeezed: int, after: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(before, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, after // 2, 1)
        self.expand3x3 = nn.Conv2d(squeezed, after // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


def _squeezenet() -> _Trunk:
    """Version 1.1, without its classifier, and without values."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    with torch.device("meta"):
        layers = [nn.Conv2d(3, 64, 3, 2), nn.ReLU()]
        layers += [pool(), _Fire(64, 16, 128), _Fire(128, 16, 128)]
        layers += [pool(), _Fire(128, 32, 256), _Fire(256, 32, 256)]
        layers += [pool(), _Fire(256, 48, 384), _Fire(384, 48, 384)]
        layers += [_Fire(384, 64, 512), _Fire(512, 64, 512)]
    return _Trunk(layers, {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}, 17)


def _vgg16() -> _Trunk:
    """Up to its last convolution, and without values."""
    layers: list[nn.Module] = []
    before = 3
    with torch.device("meta"):
        for count, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
    return _Trunk(layers[:-1], {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}, 16)


def _caffe_names() -> dict[str, str]:
    """Names of SqueezeNet v1.1's tensors before torchvision, by ours."""
    fires = dict(zip((3, 4, 6, 7, 9, 10, 11, 12), range(2, 10), strict=True))
    parts = {"squeeze": "squeeze1x1", "expand1x1": "expand1x1", "expand3x3": "expand3x3"}
    layers = {"features.0": "conv1"} | {
        f"features.{i}.{ours}": f"fire{n}.{theirs}"
        for i, n in fires.items()
        for ours, theirs in parts.items()
    }
    kinds = ("weight", "bias")
    return {f"{ours}.{kind}": f"{layers[ours]}.{kind}" for ours in layers for kind in kinds}


_CAFFE = _caffe_names()


# Files of weights -------------------------------------------------------------------------------


def _read(path: str | os.PathLike[str], what: str) -> dict[str, Tensor]:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file} is not a file: it should hold {what}, as safetensors")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors ({error}); a .pth file is a pickle, which is "
            "not opened, as it could run any code: convert it with safetensors.torch.save_file"
        ) from error


def _tensor(
    tensors: Mapping[str, Tensor], name: str, shape: torch.Size, path: str | os.PathLike[str]
) -> Tensor:
    """One tensor, float32. Raises `ValueError` if there is none by the name, or of the shape."""
    if name not in tensors:
        raise ValueError(f"{os.fspath(path)} lacks {name!r}")
    if tensors[name].shape != shape:
        raise ValueError(
            f"{name!r} in {os.fspath(path)} must be {tuple(shape)}, got "
            f"{tuple(tensors[name].shape)}"
        )
    return tensors[name].float()


def _loaded(trunk: _Trunk, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> _Trunk:
    wanted = trunk.state_dict()
    values = {name: _tensor(tensors, name, meta.shape, path) for name, meta in wanted.items()}
    trunk.load_state_dict(values, assign=True)
    return trunk
