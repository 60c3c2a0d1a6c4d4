"""The words of `tvae encode-dataset` and `tvae export-dataset`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from temporal_vae.cli.groups import OptionGroup, option
from temporal_vae.cli.options import (
    EncodeOptions,
    FrameOptions,
    ModelOptions,
    choose_dtype,
    dtype_name,
)
from temporal_vae.cli.report import Meter, out, say, say_error
from temporal_vae.convert import allocator
from temporal_vae.dataset.buckets import Bucket, parse_buckets

if TYPE_CHECKING:
    from temporal_vae.dataset.encode import DatasetOptions


def cut_of(text: str) -> int | Literal["scenes"]:
    """Frames of a clip, or "scenes"."""
    if text == "scenes":
        return "scenes"
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"--cut takes a number of frames, or scenes, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class DataSetOptions(OptionGroup):
    """What clips are made, by what, and how they are stored."""

    panel = "Data set"
    layout: Literal["files", "webdataset"] = option(
        "files", "NAME", "files: OUT/NAME.safetensors for each clip. webdataset: OUT/shard-N.tar. "
        "Default: files.")  # fmt: skip
    shard_clips: int = option(1000, "NUMBER", "Clips in a shard of webdataset. Default: 1000.")
    buckets: tuple[Bucket, ...] | None = option(
        None, "WxH[xF],...", "Bring each clip to the size in this list whose shape is nearest to "
        "its own, cutting what stands out in the middle, such as 512x320,320x512; with a third "
        "number to the longest length that it fills, such as 512x320x49,512x320x17.",
        parse_buckets)  # fmt: skip
    cut: int | Literal["scenes"] | None = option(
        None, "NUMBER|scenes", "Make clips of so many frames of each video, or one of each scene "
        "(by PySceneDetect, the extra scenes). Default: one clip of each video.",
        cut_of)  # fmt: skip
    workers: int | None = option(
        None, "NUMBER", "Processes that decode; with Ray, for each process that encodes. Default: "
        "one for each core, at most 8.")  # fmt: skip
    engine: Literal["local", "ray"] = option(
        "local", "NAME", "local: this machine. ray: a cluster of Ray (the extra ray), whose "
        "machines see SRC and OUT under the same paths. Default: local.")  # fmt: skip
    address: str | None = option(
        None, "ADDRESS", "Of Ray's cluster, such as ray://host:10001, or auto for the one that "
        "this machine belongs to. Default: one of this machine alone.")  # fmt: skip
    encoders: int = option(1, "NUMBER", "Processes that encode, with Ray. Default: 1.")
    retry_failed: bool = option(False, "", "Try the videos again that failed in an earlier run.")
    quiet: bool = option(False, "", "Print nothing but errors.")

    def chosen(self, frames: FrameOptions) -> DatasetOptions:
        """The same as the library takes it. Raises `ValueError` for what cannot be."""
        from temporal_vae.dataset.encode import DatasetOptions

        return DatasetOptions(
            frames=frames.selected(), buckets=self.buckets or (), cut=self.cut, layout=self.layout,
            shard_clips=self.shard_clips, engine=self.engine, address=self.address,
            workers=min(8, os.cpu_count() or 1) if self.workers is None else self.workers,
            encoders=self.encoders, retry_failed=self.retry_failed,
        )  # fmt: skip


@dataclass(frozen=True)
class ExportOptions(OptionGroup):
    """In which layout latents are written for other trainers."""

    panel = "Layout"
    layout: Literal["musubi", "cogvideo"] = option(
        "musubi", "NAME", "musubi: the cache directory of musubi-tuner. cogvideo: the data_root of "
        "CogVideo's fine-tuning. Default: musubi.")  # fmt: skip
    architecture: str = option("wan", "NAME", "Of musubi-tuner: wan, hv, hv15 or k5. Default: wan.")
    model_name: str = option(
        "cogvideox-t2v", "NAME", "CogVideo's --model_name. Default: cogvideox-t2v."
    )
    resolution: str | None = option(
        None, "FxHxW", "CogVideo's --train_resolution, such as 49x480x720: clips of this many "
        "frames, height and width are taken. Default: that of all clips.")  # fmt: skip
    sample: bool = option(
        False, "", "Draw latents from their distribution, once; without it they are its mean."
    )
    dtype: str = option(
        "bfloat16", "TYPE", "Numbers to store: float32, bfloat16 or float16. Default: bfloat16.",
        dtype_name)  # fmt: skip
    quiet: bool = option(False, "", "Print nothing but errors.")


def export_dataset(folder: Path, target: Path, options: ExportOptions) -> None:
    """Write the clips of a data set of latents in another layout."""
    from temporal_vae.dataset import export

    dtype = choose_dtype(options.dtype)
    with Meter("exporting", options.quiet, unit="clips") as meter:
        if options.layout == "musubi":
            count = export.export_musubi(
                folder, target, options.architecture, sample=options.sample, dtype=dtype,
                progress=meter,
            )  # fmt: skip
        else:
            count = export.export_cogvideo(
                folder, target, options.model_name, resolution=options.resolution,
                sample=options.sample, dtype=dtype, progress=meter,
            )  # fmt: skip
    if not options.quiet:
        out.print(f"{target}: {count} clips", markup=False, soft_wrap=True)


def encode_dataset(
    source: Path, target: Path, data: DataSetOptions, model: ModelOptions, latents: EncodeOptions,
    frames: FrameOptions,
) -> None:  # fmt: skip
    """Encode, and say how many clips there are; with status 2 where some failed."""
    from temporal_vae.dataset import entries

    next(entries.entries_of(source), None)  # what is wrong with it is told before torch is loaded
    allocator.settle(model.memory)
    from temporal_vae.dataset import encode

    options = data.chosen(frames)
    how = latents.encoding(frames.clip_frames, model.memory)
    vae, record = model.load_with_record()
    with Meter("encoding", data.quiet, unit="clips") as meter:
        counts = encode.encode_dataset(source, target, vae, record, how, options,
                                       lambda done: meter(done, None))  # fmt: skip
    if not data.quiet:
        skipped = f", {counts['skipped']} left out" if counts.get("skipped") else ""
        out.print(f"{target}: {counts.get('ok', 0)} clips{skipped}", markup=False, soft_wrap=True)
    if not counts:
        say(f"{source} holds no videos")
    if failed := counts.get("failed", 0):
        say_error(f"{failed} of {sum(counts.values())} failed: see the columns status and error of "
                  f"{target / entries.MANIFEST}; --retry-failed tries them again")  # fmt: skip
        raise typer.Exit(2)
