"""What saving memory costs in quality: ours beside the ways of diffusers, on the same weights.

    python benchmarks/exactness.py [--frames 14] [--size 128] [--clips FOLDER [--wan 448]]

First the SVD preset with random weights, whose temporal layers are awake, in float32: the distance
of each way from the whole decode, as PSNR over the range of its pixels (the higher the nearer).
Then, with a folder of clips, the bundled weights: PSNR of the reconstruction against the source,
and the decibels each way loses against the whole walk.
"""

from __future__ import annotations

import argparse
import datetime
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from temporal_vae import TemporalVAE, TemporalVAEConfig
from temporal_vae.video import pad_frames, read_clip, to_pixels

Decode = Callable[[Tensor], Tensor]


def chunked(decode: Decode, frames: int) -> Decode:
    """diffusers' `decode_chunk_size`: the clip is cut, and each part decoded as a clip."""
    return lambda z: torch.cat([decode(part) for part in z.split(frames, 2)], 2)


def tiled(decode: Decode, cells: int, overlap: float = 0.25) -> Decode:
    """diffusers' `enable_tiling`: overlapping tiles, decoded apart and faded into one another."""

    def walk(z: Tensor) -> Tensor:
        step = int(cells * (1 - overlap))
        out = weight = None
        for top in range(0, z.shape[3], step):
            for left in range(0, z.shape[4], step):
                tile = decode(z[:, :, :, top : top + cells, left : left + cells])
                scale = tile.shape[3] // min(cells, z.shape[3] - top)
                if out is None or weight is None:
                    size = (z.shape[3] * scale, z.shape[4] * scale)
                    out = tile.new_zeros(*tile.shape[:3], *size)
                    weight = torch.zeros_like(out)
                fade = _fade(tile.shape[3]).view(-1, 1) * _fade(tile.shape[4])
                area = (
                    ..., slice(top * scale, top * scale + tile.shape[3]),
                    slice(left * scale, left * scale + tile.shape[4]),
                )  # fmt: skip
                out[area] += tile * fade
                weight[area] += fade
        assert out is not None and weight is not None
        return out / weight

    return walk


def _fade(length: int) -> Tensor:
    ramp = torch.arange(length) + 0.5
    return torch.minimum(ramp, length - ramp).clamp(max=length / 4)


def psnr(a: Tensor, b: Tensor, peak: float) -> float:
    """Decibels; infinite for equal tensors."""
    error = float((a.double() - b.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ways(model: TemporalVAE, z: Tensor, cells: int) -> dict[str, Decode]:
    """Every way to decode z in less memory."""
    least = model.plan(z.shape, budget="least")
    budget = max(least.peak_bytes, model.plan(z.shape).peak_bytes // 2)
    half = model.plan(z.shape, budget=budget)
    return {
        "ours, half the memory": lambda z: model.decode(z, plan=half),
        "ours, least memory": lambda z: model.decode(z, plan=least),
        "cut into clips of 8": chunked(model.decode, 8),
        "cut into clips of 4": chunked(model.decode, 4),
        "cut into clips of 2": chunked(model.decode, 2),
        "tiles that fade": tiled(model.decode, cells),
    }


@torch.no_grad()
def random_weights(frames: int, size: int) -> None:
    """The SVD preset, every temporal branch awake."""
    model = TemporalVAE.from_config(TemporalVAEConfig.svd(), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.decoder.named_parameters():
        if parameter.ndim == 5 and float(parameter.abs().max()) == 0:  # zero at birth
            bound = parameter[0].numel() ** -0.5
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
        elif "time_conv_out" in name and parameter.ndim == 5:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    z = torch.randn(1, 4, frames, size // 8, size // 8, generator=generator)
    whole = model.decode(z)
    peak = float(whole.max() - whole.min())
    print(f"SVD preset, random weights, {frames}x{size}x{size}: PSNR against the whole decode")
    for name, decode in ways(model, z, size // 16).items():
        print(f"  {name:24}{psnr(decode(z), whole, peak):8.2f} dB", flush=True)


@torch.no_grad()
def real_clips(folder: Path, frames: int, every: int) -> None:
    """The bundled weights on real frames, of every n-th clip."""
    model = TemporalVAE.from_pretrained("tiny")
    found: dict[str, list[float]] = {}
    files = sorted(path for path in folder.iterdir() if path.suffix in (".mp4", ".mkv"))[::every]
    for path in files:
        clip = to_pixels(pad_frames(read_clip(path, frames, 256), model.downsample_factor))
        z = model.encode(clip, sample_mode=False)
        whole = model.decode(z).clamp(-1, 1)
        found.setdefault("whole", []).append(psnr(whole, clip, 2))
        for name, decode in ways(model, z, 16).items():
            found.setdefault(name, []).append(psnr(decode(z).clamp(-1, 1), clip, 2))
        print(f"  {path.stem}: {found['whole'][-1]:.3f} dB", flush=True)
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    print(f"tiny, {len(files)} clips of {frames} frames, 256 wide: {mean['whole']:.3f} dB")
    for name, value in mean.items():
        if name != "whole":
            print(f"  {name:24}costs {mean['whole'] - value:8.4f} dB")


@torch.no_grad()
def wans_kind(folder: Path, frames: int, every: int, width: int) -> None:
    """The bundled model of Wan's layout in diffusers' own class, with its own tiles of 256/192."""
    from diffusers import AutoencoderKLWan

    model = TemporalVAE.from_pretrained("tiny-wan")
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place, format="diffusers")
        stock = AutoencoderKLWan.from_pretrained(place)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".mp4", ".mkv"))[::every]
    lost: dict[str, list[float]] = {}
    for path in files:
        clip = to_pixels(pad_frames(read_clip(path, frames, width), model.downsample_factor))
        z = model.encode(clip, sample_mode=False)
        whole = psnr(model.decode(z).clamp(-1, 1), clip, 2)
        least = model.plan(z.shape, "decode", budget="least")
        pictures = {"ours, least memory": model.decode(z, plan=least)}
        stock.disable_tiling()
        pictures["diffusers, whole"] = stock.decode(z, return_dict=False)[0]
        stock.enable_tiling()
        pictures["diffusers, decoded in tiles"] = stock.decode(z, return_dict=False)[0]
        tiles = stock.encode(clip).latent_dist.mode()
        both = stock.decode(tiles, return_dict=False)[0]
        pictures["diffusers, both in tiles"] = both
        for name, picture in pictures.items():
            lost.setdefault(name, []).append(whole - psnr(picture.clamp(-1, 1), clip, 2))
        print(f"  {path.stem}: {whole:.3f} dB", flush=True)
    print(f"tiny-wan, {len(files)} clips of {frames} frames, {width} wide")
    for name, values in lost.items():
        print(f"  {name:28}costs {sum(values) / len(values):8.4f} dB, at most {max(values):.4f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=14)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--clips", type=Path)
    parser.add_argument("--every", type=int, default=1, help="take every n-th clip")
    parser.add_argument("--wan", type=int, metavar="WIDTH", help="tiny-wan on the clips, so wide")
    parser.add_argument("--only-clips", action="store_true", help="leave out the random weights")
    options = parser.parse_args()
    print(f"{datetime.date.today()}  torch {torch.__version__}, float32")
    if not options.only_clips:
        random_weights(options.frames, options.size)
    if options.clips and options.wan:
        wans_kind(options.clips, 1 + options.frames // 4 * 4, options.every, options.wan)
    elif options.clips:
        real_clips(options.clips, options.frames, options.every)


if __name__ == "__main__":
    main()
