"""A data set of latents in the layouts in which trainers of others keep theirs.

Both take latents as the diffusion model does, scaled, (L, T, h, w), a safetensors file a clip,
which they find by the name of its video without folder and suffix. Text embeddings are theirs to
make.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from temporal_vae.dataset.entries import OURS
from temporal_vae.dataset.latents import LatentDataset
from temporal_vae.dataset.manifest import read_manifest
from temporal_vae.files.atomic import atomic_path
from temporal_vae.latents import SUFFIX

ARCHITECTURES = {
    "wan": "wan", "hv": "hunyuan_video", "hv15": "hunyuan_video_1_5", "k5": "kandinsky5",
}  # fmt: skip
"""Of musubi-tuner, short and long names: those whose caches hold nothing but latents."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Clip:
    """What names of files tell of a clip."""

    stem: str
    first: int
    frames: int
    height: int
    width: int
    caption: str | None


def _clips(folder: Path) -> list[_Clip]:
    """The clips, in the order of the manifest, named by their videos.

    Where two videos would have one name, both get that of their latents, with folders in it.
    """
    columns = ["name", "first", "frames", "height", "width", "caption"]
    rows = read_manifest(folder, columns).to_pylist()
    videos = [row["name"].partition(OURS)[0] for row in rows]
    stems = [os.path.splitext(os.path.basename(video))[0] for video in videos]
    sharing = Counter(stem for _, stem in set(zip(videos, stems, strict=True)))
    plain = [stem if sharing[stem] == 1 else video.replace("/", "%2F")
             for video, stem in zip(videos, stems, strict=True)]  # fmt: skip
    # parts that begin at one frame, of a video's own start each, and long names cut to one
    equal = Counter((stem, row["first"]) for stem, row in zip(plain, rows, strict=True))
    return [
        _Clip(
            stem if equal[stem, row["first"]] == 1 else row["name"].replace("/", "%2F"),
            *(row[column] for column in columns[1:]),
        )
        for stem, row in zip(plain, rows, strict=True)
    ]


def export_musubi(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    architecture: str = "wan",
    *,
    sample: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> int:
    """Write the cache directory of a video data set of musubi-tuner; gives the number of clips.

    A clip is `NAME_FFFFF-NNN_WWWWxHHHH_ARCH.safetensors`: its first frame, its number of frames,
    and its size in pixels; musubi-tuner takes `NAME_ARCH_te.safetensors` beside it for its text.

    Raises `ValueError` for an architecture that is not in `ARCHITECTURES`.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture must be one of {known}, got {architecture!r}")
    latents = LatentDataset(folder, sample=sample, dtype=dtype)
    clips, root = _clips(Path(folder)), Path(target)
    root.mkdir(parents=True, exist_ok=True)
    for index, clip in enumerate(clips):
        stored = latents[index]["latents"].contiguous()
        size = "x".join(map(str, stored.shape[1:]))
        part, pixels = f"{clip.first:05d}-{clip.frames:03d}", f"{clip.width:04d}x{clip.height:04d}"
        told = {
            "architecture": ARCHITECTURES[architecture], "width": str(clip.width),
            "height": str(clip.height), "format_version": "1.0.1", "frame_count": str(clip.frames),
        }  # fmt: skip
        with atomic_path(root / f"{clip.stem}_{part}_{pixels}_{architecture}{SUFFIX}") as path:
            save_file({f"latents_{size}_{str(dtype).removeprefix('torch.')}": stored}, path, told)
        if progress is not None:
            progress(index + 1, len(clips))
    return len(clips)


def export_cogvideo(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    model_name: str = "cogvideox-t2v",
    *,
    resolution: str | None = None,
    sample: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> int:
    """Write the `data_root` of CogVideo's text-to-video fine-tuning; gives the number of clips.

    A clip is `cache/video_latent/MODEL/FRAMESxHEIGHTxWIDTH/NAME.safetensors`, for a trainer that is
    run with that `--model_name` and `--train_resolution`. `prompts.txt` and `videos.txt` list
    captions and videos. The trainer wants each video to be there, and reads none whose latents are:
    so an empty file stands for each.

    Raises `ValueError` for clips of several resolutions, unless one is named.
    """
    latents = LatentDataset(folder, sample=sample, dtype=dtype)
    clips, root = _clips(Path(folder)), Path(target)
    sizes = [f"{clip.frames}x{clip.height}x{clip.width}" for clip in clips]
    found = Counter(sizes)
    if resolution not in found and (len(found) > 1 or resolution is not None):
        told = ", ".join(f"{size} ({count} clips)" for size, count in found.most_common(8))
        raise ValueError(
            f"CogVideo trains clips of one FRAMESxHEIGHTxWIDTH, got resolution={resolution!r}, and "
            f"these have {told}: name one of them"
        )
    chosen = [i for i, size in enumerate(sizes) if size == (resolution or size)]
    parts = Counter(clips[index].stem for index in chosen)
    prompts, videos = [], []
    for done, index in enumerate(chosen, 1):
        clip = clips[index]
        name = clip.stem if parts[clip.stem] == 1 else f"{clip.stem}{OURS}{clip.first:06d}"
        cache = root / "cache" / "video_latent" / model_name / sizes[index]
        for place in (cache, root / "videos"):
            place.mkdir(parents=True, exist_ok=True)
        with atomic_path(cache / f"{name}{SUFFIX}") as path:
            save_file({"encoded_video": latents[index]["latents"].contiguous()}, path)
        (root / "videos" / f"{name}.mp4").touch()
        videos.append(f"videos/{name}.mp4")
        prompts.append(" ".join((clip.caption or name).split()))
        if progress is not None:
            progress(done, len(chosen))
    for listed, lines in (("prompts.txt", prompts), ("videos.txt", videos)):
        with atomic_path(root / listed) as path:
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(chosen)
