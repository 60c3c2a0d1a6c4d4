"""Numbers kept before the code is moved about: afterwards they must still be the same.

    python benchmarks/golden.py make [--revision HEAD] [--folder FOLDER]
    python benchmarks/golden.py check [--folder FOLDER] [--committed]
    python benchmarks/golden.py commit

`make` checks a revision out beside this one, computes a few hundred outputs with it and keeps them
in a folder outside of the repository. `check` computes the same with the files that lie here and
compares: a line an entry, and exit status 1 where one differs, is missing or is new.

An entry is "exact", the same to the last bit, or falls under law 1, where what is cut into pieces
may be cut otherwise: max|difference| / max|kept| at most 1e-10 in float64 and 1e-4 in float32. The
last bits depend on the processor and on torch, so a folder serves the machine that made it.

`commit` writes golden.safetensors beside this script: whole walks of small models in float64, which
hold to 1e-12 on any machine, so `check` compares them too. For their sake weights and inputs are
drawn evenly, from whole numbers: normal ones differ in the last bit between processors.

All models are small and awake: every parameter is drawn, those that start at zero too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import temporal_vae
from temporal_vae import (
    LatentDistribution,
    Plan,
    TemporalVAE,
    load_video,
    read_latents,
    save_video,
    write_latents,
)

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = Path(__file__).with_suffix(".safetensors")
CACHE = Path.home() / ".cache" / "temporal-vae" / "golden"
VALUES, ABOUT = "values.safetensors", "about.json"

COMMITTED_TOLERANCE = 1e-12
LAW_1 = {torch.float64: 1e-10, torch.float32: 1e-4}

Operation = Literal["encode", "decode"]
Rule = Literal["exact", "law 1"]
OPERATIONS: tuple[Operation, Operation] = ("encode", "decode")

SVD_LIKE: dict[str, Any] = {
    "temporal_norm": "clip",
    "clip_frames": 4,
    "temporal_encoder": False,
    "temporal_attention_reach": 0,
    "time_conv_out": True,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "symmetric": {},
    "causal": {"causal_mode": True, "num_temporal_layers": 2, "time_conv_out": True},
    "kernel 5": {"temporal_kernel_size": 5, "blocks_per_level": 1, "time_conv_out": True},
    "svd": SVD_LIKE,
    "clip norm": SVD_LIKE | {"temporal_encoder": True, "temporal_attention_reach": 3},
    "image": {"num_temporal_layers": 0},
    "grey": {"input_channels": 1, "latent_channels": 2, "latent_shift_factor": 0.5},
    "rgba": {"input_channels": 4, "norm_groups": 4, "quant_conv": False, "post_quant_conv": False},
    "one level": {"channel_multipliers": (1,), "temporal_kernel_size": 1},
}
BANDED: dict[str, Any] = {"blocks_per_level": 1, "channel_multipliers": (1, 2, 2)}
"""Bands pay where the coarsest level is small, since attention there takes a whole frame."""
SHORT_REACH: dict[str, Any] = {"blocks_per_level": 1, "temporal_attention_reach": 2}
"""So that a stream gives something before its end."""

LOUD = re.compile(r"\b(conv_in|conv1|conv2|to_out\.0)\.")
"""What writes into the residual stream or is read by a norm alone: loud, it overflows float16."""


# Entries -------------------------------------------------------------------------------------


class Book:
    """Values by name, each with the rule it is compared by."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.rules: dict[str, Rule] = {}

    def add(self, name: str, value: Tensor | bytes, rule: Rule = "exact") -> None:
        """Keep a copy. Raises `ValueError` for a name that is taken, and what is not finite."""
        if isinstance(value, bytes):
            value = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        value = value.detach().clone(memory_format=torch.contiguous_format)
        if name in self.values or not bool(value.isfinite().all()):
            raise ValueError(f"{name} is there twice, or not finite")
        self.values[name], self.rules[name] = value, rule

    def save(self, folder: Path, revision: str) -> None:
        """Write all into a folder, what says that it is complete last."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT).unlink(missing_ok=True)
        save_file(self.values, folder / VALUES)
        about = {"revision": revision, "made with": made_with(), "rules": self.rules}
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def made_with() -> str:
    """What the last bits depend on."""
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"python {platform.python_version()}, torch {torch.__version__}, {kernels}"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of mean 0 and variance 1, float64, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * math.sqrt(12)


def pixels(*shape: int) -> Tensor:
    """Pixels in [-1, 1], float64."""
    return drawn(*shape, seed=7) / math.sqrt(3)


def noise() -> torch.Generator:
    """What draws the latents."""
    return torch.Generator().manual_seed(5)


@torch.no_grad()
def redraw(model: TemporalVAE, gain: float = 1.0) -> None:
    """Give every parameter, mixes and last convolutions included, a value that matters.

    By its name, so that their order shows where order is what is kept, and nowhere else. `gain`
    makes the residual stream louder.
    """
    for name, p in model.named_parameters():
        values = drawn(*p.shape, seed=zlib.crc32(name.encode()))
        if p.ndim >= 2:
            values *= 1.0 if "distance_bias" in name else 1.5 * p[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.3 * values
        else:
            values *= 0.5
        p.copy_(values * gain if LOUD.search(name) else values)


def awake(dtype: torch.dtype = torch.float64, gain: float = 1.0, **options: Any) -> TemporalVAE:
    """A small model in which every layer does something; options are those of `TemporalVAE`."""
    small: dict[str, Any] = {"base_channels": 8, "channel_multipliers": (1, 2), "seed": 0}
    model = TemporalVAE(**(small | options)).double()
    redraw(model, gain)
    if model.get_metadata().parameters["decoder_temporal"]:
        z, order = drawn(1, model.latent_channels, 4, 2, 2), [1, 0, 2, 3]
        with torch.no_grad():
            moved = (model.decode(z[:, :, order])[:, :, order] - model.decode(z)).abs().max()
        assert float(moved) > 0.01, "the model is asleep"
    return model.to(dtype)


def inputs(
    model: TemporalVAE, frames: int, rows: int, columns: int, batch: int = 1
) -> list[Tensor]:
    """A video of so many latent cells each way, and latents."""
    f = model.downsample_factor
    video = pixels(batch, model.input_channels, frames, rows * f, columns * f)
    latent = drawn(batch, model.latent_channels, frames, rows, columns, seed=9)
    return [video.to(model.dtype), latent.to(model.dtype)]


def moments(model: TemporalVAE, video: Tensor, plan: Plan | None = None) -> Tensor:
    """Mean and log-variance, joined."""
    return torch.cat(tuple(model.encode_with_distribution(video, plan=plan)), 1)


def short(dtype: torch.dtype) -> str:
    """The name of a dtype, without torch."""
    return str(dtype).removeprefix("torch.")


# Whole walks ---------------------------------------------------------------------------------


@torch.no_grad()
def whole(book: Book) -> None:
    """Every layout, a batch of two clips, and images; sampled, there and back, in either layout."""
    for layout, options in LAYOUTS.items():
        for dtype in (torch.float64, torch.float32):
            model, name = awake(dtype, **options), f"whole/{layout}/{short(dtype)}"
            video, latent = inputs(model, 5, 8, 12, batch=2)
            book.add(f"{name}/moments", moments(model, video))
            book.add(f"{name}/decode", model.decode(latent))
            book.add(f"{name}/sampled", model.encode(video, generator=noise()))
            book.add(f"{name}/sampled by the model", model.encode(video))
            book.add(f"{name}/image moments", moments(model, video[:, :, 0]))
            book.add(f"{name}/image", model.decode(latent[:, :, 0]))
            book.add(f"{name}/one frame", model.decode(latent[:1, :, :1]))
            reconstruction, posterior = model(video, generator=noise())
            book.add(f"{name}/forward", reconstruction)
            book.add(f"{name}/forward, KL", model.kl_divergence(*posterior))
            book.add(f"{name}/predict", model.predict(video))
    model = awake()
    video, latent = (x.transpose(1, 2) for x in inputs(model, 5, 4, 6, batch=2))
    mean, log_variance = model.encode_with_distribution(video, layout="BTCHW")
    book.add("whole/BTCHW/mean", mean)
    book.add("whole/BTCHW/log-variance", log_variance)
    book.add("whole/BTCHW/sampled", model.encode(video, generator=noise(), layout="BTCHW"))
    book.add("whole/BTCHW/decode", model.decode(latent, layout="BTCHW"))
    book.add("whole/BTCHW/forward", model(video, generator=noise(), layout="BTCHW")[0])
    model = awake(latent_scale_factor=0.3, latent_shift_factor=0.5)
    video, latent = inputs(model, 3, 4, 6)
    book.add("whole/diffusion/encode", model.encode_video_for_diffusion(video, generator=noise()))
    book.add("whole/diffusion/decode", model.decode_video_from_diffusion(latent))


@torch.no_grad()
def large(book: Book) -> None:
    """Where layers take another way: 512 channels, two heads, more frames than go at a time."""
    one_block: dict[str, Any] = {"blocks_per_level": 1}
    wide = one_block | {"channel_multipliers": (1, 64), "num_temporal_layers": 0}
    heads = one_block | {"channel_multipliers": (1,), "base_channels": 128}
    for name, options, frames in (("wide", wide, 2), ("heads", heads, 2), ("long", one_block, 70)):
        model = awake(torch.float32, **options)
        video, latent = inputs(model, frames, 3, 4)
        book.add(f"large/{name}/moments", moments(model, video))
        book.add(f"large/{name}/decode", model.decode(latent))


@torch.no_grad()
def half(book: Book) -> None:
    """16-bit types; in float16 also weights whose residual stream has to be carried scaled."""
    for layout in ("symmetric", "causal", "svd", "image"):
        for kind, dtype, gain in (
            ("bfloat16", torch.bfloat16, 1.0),
            ("float16", torch.float16, 1.0),
            ("float16, loud", torch.float16, 2.0**12),
        ):
            model, name = awake(dtype, gain, **LAYOUTS[layout]), f"half/{layout}/{kind}"
            video, latent = inputs(model, 5, 4, 6)
            scales = [*model.stream_scales.values()]
            assert (min(scales) < 1) == (gain > 1), "this should scale the stream, and only this"
            book.add(f"{name}/stream scales", torch.tensor(scales, dtype=torch.float64))
            book.add(f"{name}/moments", moments(model, video))
            book.add(f"{name}/decode", model.decode(latent))
            book.add(f"{name}/record", model.serialize())


@torch.no_grad()
def committed(book: Book) -> None:
    """What is compared on any machine."""
    for layout, options in LAYOUTS.items():
        model = awake(**options)
        video, latent = inputs(model, 4, 4, 6)
        book.add(f"committed/{layout}/moments", moments(model, video))
        book.add(f"committed/{layout}/decode", model.decode(latent))


# Pieces --------------------------------------------------------------------------------------


def plans(
    model: TemporalVAE, shape: Sequence[int], operation: Operation, stream: bool = False
) -> dict[str, Plan]:
    """The fastest plans in groups of frames and in bands of rows, and the one of lowest memory.

    "least" as a budget may be a little above that, where it is faster.
    """
    found, budget = [], None
    with contextlib.suppress(ValueError):  # until a budget cannot be met
        while True:
            found.append(model.plan(shape, operation, budget=budget, stream=stream))
            budget = found[-1].peak_bytes - 1
    return {
        "groups": next(plan for plan in found if plan.walk == "bounded" and not plan.banded),
        "bands": next(plan for plan in found if plan.banded),
        "lowest": found[-1],
    }


@torch.no_grad()
def bounded(book: Book) -> None:
    """Walks within budgets; the bands and groups of an awake model are a few pieces each."""
    for layout in ("symmetric", "causal", "svd", "image"):
        model = awake(**(LAYOUTS[layout] | BANDED))
        video, latent = inputs(model, 5, 16, 8)
        ways = {
            "encode": plans(model, video.shape, "encode"),
            "decode": plans(model, latent.shape, "decode"),
        }
        for kind in ways["encode"]:
            name = f"bounded/{layout}/float64/{kind}"
            found = moments(model, video, ways["encode"][kind])
            book.add(f"{name}/moments", found, "law 1")
            book.add(f"{name}/decode", model.decode(latent, plan=ways["decode"][kind]), "law 1")
    model = awake(torch.float32, **BANDED)
    video, latent = inputs(model, 5, 16, 8, batch=2)
    plan = plans(model, video.shape, "encode")["groups"]
    book.add("bounded/symmetric/float32/moments", moments(model, video, plan), "law 1")
    plan = plans(model, latent.shape, "decode")["bands"]
    book.add("bounded/symmetric/float32/decode", model.decode(latent, plan=plan), "law 1")


@torch.no_grad()
def options_of_memory(book: Book) -> None:
    """The other ways to say how an input is walked, and where the result goes."""
    model = awake(**BANDED)
    video, latent = inputs(model, 5, 24, 8)
    plan = plans(model, latent.shape, "decode")["groups"]
    book.add("memory/iter_decode", torch.cat([*model.iter_decode(latent, plan=plan)], 2), "law 1")
    book.add("memory/out", model.decode(latent, plan=plan, out=torch.empty_like(video)), "law 1")
    with tempfile.TemporaryDirectory() as folder:
        for operation, x in zip(OPERATIONS, (video, latent), strict=True):
            plan = model.plan(x.shape, operation, budget="least", offload=folder)
            walk = moments if operation == "encode" else TemporalVAE.decode
            book.add(f"memory/offload/{operation}", walk(model, x, plan=plan), "law 1")
    clips, latents = inputs(model, 5, 24, 8, batch=2)
    settings: dict[str, Callable[[], None]] = {
        "slicing": lambda: model.set_slicing_enabled(True),
        "tiling": lambda: model.set_tiling_enabled(True),
        "budget": lambda: model.set_memory_budget("least"),
    }
    for name, choose in settings.items():
        choose()
        book.add(f"memory/{name}/encode", model.encode(clips, generator=noise()), "law 1")
        book.add(f"memory/{name}/decode", model.decode(latents), "law 1")
        model.set_slicing_enabled(False)
        model.set_tiling_enabled(False)


FRAMES, ODD = 23, (1, 3, 2, 5, 1, 7, 4)
"""Frames of a stream, and in odd pieces."""


@torch.no_grad()
def streams(book: Book) -> None:
    """Clips in pieces, with and without a budget; how many frames each step gives is exact."""
    for layout in ("symmetric", "causal", "kernel 5", "image"):
        for dtype, kind, sizes in (
            (torch.float64, "odd pieces", ODD),
            (torch.float64, "at once", (FRAMES,)),
            (torch.float32, "odd pieces", ODD),
        ):
            model = awake(dtype, **(LAYOUTS[layout] | SHORT_REACH))
            videos, latents = (x.split(sizes, 2) for x in inputs(model, FRAMES, 4, 3))
            add_stream(book, f"stream/{layout}/{short(dtype)}/{kind}", model, videos, latents)
    for layout in ("symmetric", "causal"):
        model = awake(**(LAYOUTS[layout] | SHORT_REACH))
        video, latent = inputs(model, FRAMES, 16, 4)
        encode, decode = (
            plans(model, (*x.shape[:2], max(ODD), *x.shape[3:]), operation, stream=True)
            for operation, x in zip(OPERATIONS, (video, latent), strict=True)
        )
        videos, latents = video.split(ODD, 2), latent.split(ODD, 2)
        for kind in ("groups", "lowest"):
            both, name = (encode[kind], decode[kind]), f"stream/{layout}/{kind}"
            add_stream(book, name, model, videos, latents, *both)


def add_stream(
    book: Book,
    name: str,
    model: TemporalVAE,
    videos: Sequence[Tensor],
    latents: Sequence[Tensor],
    encode: Plan | None = None,
    decode: Plan | None = None,
) -> None:
    """Step by step, sampled and as moments, and the way back."""
    state, found, given, generator = None, list[Tensor](), list[int](), noise()
    for video in videos:
        latent, state = model.encode_step(video, state, generator=generator, plan=encode)
        given.append(0 if latent is None else latent.shape[2])
        found += [] if latent is None else [latent]
    rest = model.encode_finish(state, generator=generator, plan=encode)
    book.add(f"{name}/encode", torch.cat(found + ([] if rest is None else [rest]), 2), "law 1")
    state, found = None, []
    for latent in latents:
        frames, state = model.decode_step(latent, state, decode)
        given.append(0 if frames is None else frames.shape[2])
        found += [] if frames is None else [frames]
    rest = model.decode_finish(state, decode)
    book.add(f"{name}/decode", torch.cat(found + ([] if rest is None else [rest]), 2), "law 1")
    book.add(f"{name}/frames of each step", torch.tensor(given))
    book.add(f"{name}/moments", torch.cat([*model.moments_stream(encode).pull(videos)], 2), "law 1")


def streams_of_more(book: Book) -> None:
    """Streams with gradients, and two of different age that go on as one batch.

    Every layer must have seen a frame for that, where a model that looks ahead is late.
    """
    for layout, ages in (("symmetric", (20, 17)), ("causal", (5, 1))):
        model = awake(**(LAYOUTS[layout] | SHORT_REACH))
        _, latent = inputs(model, FRAMES, 3, 2)
        latent.requires_grad_()
        found = torch.cat([*model.decode_stream().pull(latent.split(5, 2))], 2)
        book.add(f"stream/{layout}/with gradient", found, "law 1")
        (gradient,) = torch.autograd.grad(found.square().sum(), latent)
        book.add(f"stream/{layout}/gradient", gradient, "law 1")
        with torch.no_grad():
            older, younger = (model.decode_step(latent[:, :, :age])[1] for age in ages)
            both = tuple(
                tuple(torch.cat(pair) for pair in zip(*layers, strict=True))
                for layers in zip(older, younger, strict=True)
            )
            given, _ = model.decode_step(latent[:, :, 20:].repeat(2, 1, 1, 1, 1), both)
        assert given is not None
        book.add(f"stream/{layout}/two as one", given, "law 1")


@torch.no_grad()
def streams_that_hand_on(book: Book) -> None:
    """Streams that let go of each state as the next is made."""
    for layout in ("symmetric", "causal"):
        model = awake(**(LAYOUTS[layout] | SHORT_REACH))
        video, latent = inputs(model, FRAMES, 16, 4)
        for budget in (None, "least"):
            name = f"stream/{layout}/handed on/{budget}"
            encode, decode = (
                model.plan((*x.shape[:2], max(ODD), *x.shape[3:]), operation, budget=budget,
                           stream=True, keep_state=False)
                for operation, x in zip(OPERATIONS, (video, latent), strict=True)
            )  # fmt: skip
            pulled = model.encode_stream(generator=noise(), plan=encode).pull(video.split(ODD, 2))
            book.add(f"{name}/encode", torch.cat([*pulled], 2), "law 1")
            pulled = model.decode_stream(decode).pull(latent.split(ODD, 2))
            book.add(f"{name}/decode", torch.cat([*pulled], 2), "law 1")


# Training and description --------------------------------------------------------------------


def training(book: Book) -> None:
    """Gradients, and two steps down with their losses."""
    for layout in ("symmetric", "causal", "svd", "image"):
        for dtype in (torch.float64, torch.float32):
            model, name = awake(dtype, **LAYOUTS[layout]), f"training/{layout}/{short(dtype)}"
            video, _ = inputs(model, 4, 4, 6)
            book.add(f"{name}/gradients", model.compute_gradients(video, video.flip(2)))
            losses = [model.train_step(video, learning_rate=1e-3) for _ in range(2)]
            values = [loss[term] for loss in losses for term in sorted(loss)]
            book.add(f"{name}/losses", torch.tensor(values, dtype=torch.float64))
            book.add(f"{name}/parameters", model.get_parameters())


def masks(book: Book) -> None:
    """Latent channels that are not in use, and what each of them is worth."""
    model = awake()
    video, latent = inputs(model, 4, 4, 6)
    worth = model.get_feature_importance(video)
    values = [value or 0.0 for channel in sorted(worth) for value in worth[channel]]
    book.add("masks/importance", torch.tensor(values, dtype=torch.float64))
    model.set_active_feature_indices([0, 2])
    with torch.no_grad():
        book.add("masks/moments", moments(model, video))
        book.add("masks/sampled", model.encode(video, generator=noise()))
        book.add("masks/decode", model.decode(latent))
        pulled = model.encode_stream(generator=noise()).pull(video.split(3, 2))
        book.add("masks/stream", torch.cat([*pulled], 2), "law 1")
        pulled = model.decode_stream().pull(latent.split(3, 2))
        book.add("masks/stream, decoded", torch.cat([*pulled], 2), "law 1")
    book.add("masks/gradients", model.compute_gradients(video, video.flip(2)))


def description(book: Book) -> None:
    """What a model says of itself, and its weights at birth."""
    for layout, options in LAYOUTS.items():
        small: dict[str, Any] = {"base_channels": 8, "channel_multipliers": (1, 2), "seed": 3}
        model = TemporalVAE(**(small | options))
        said = json.dumps(model.get_metadata().to_dict(), sort_keys=True)
        book.add(f"description/{layout}/metadata", said.encode())
        book.add(f"description/{layout}/at birth", model.get_parameters())


@torch.no_grad()
def graph(book: Book) -> None:
    """An exported graph with every kind of layer, run at a size it was not made for."""
    one_level = {"channel_multipliers": (1,), "blocks_per_level": 1}  # tracing takes its time
    model = awake(torch.float32, **(LAYOUTS["clip norm"] | one_level))
    program = model.export_computation_graph(inputs(model, 2, 2, 2, batch=2)[0])
    video, _ = inputs(model, 5, 4, 3)
    book.add("graph/clip norm", cast(Tensor, program.module()(video)))


# Files ---------------------------------------------------------------------------------------


@torch.no_grad()
def files(book: Book) -> None:
    """Records, checkpoints and latents, byte for byte, and what is read of them again."""
    for layout in ("symmetric", "svd", "rgba"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            record = awake(dtype, **LAYOUTS[layout]).serialize()
            book.add(f"files/record/{layout}/{short(dtype)}", record)
            again = TemporalVAE.from_bytes(record).serialize()
            book.add(f"files/record/{layout}/{short(dtype)}, again", again)
    formats: dict[str, Literal["temporal_vae", "diffusers"]] = {
        "symmetric": "temporal_vae", "svd": "diffusers", "image": "diffusers"
    }  # fmt: skip
    for layout, format in formats.items():
        options = LAYOUTS[layout] | {"channel_multipliers": (1,), "base_channels": 32}
        options |= {"norm_groups": 32, "post_quant_conv": layout != "svd"}
        awake(torch.float32, **options).save_pretrained(layout, format=format)
        for file in sorted(Path(layout).iterdir()):
            book.add(f"files/{format}/{layout}/{file.name}", file.read_bytes())
        loaded = TemporalVAE.from_pretrained(layout)
        book.add(f"files/{format}/{layout}, loaded", loaded.get_parameters())
    inflated = TemporalVAE.from_image_vae("image", causal_mode=True, seed=0)
    book.add("files/inflated", inflated.get_parameters())
    tiny = TemporalVAE.from_pretrained("tiny")
    video, latent = inputs(tiny, 3, 2, 3)
    book.add("files/tiny/moments", moments(tiny, video))
    book.add("files/tiny/decode", tiny.decode(latent))
    book.add("files/tiny/record", json.dumps(asdict(tiny.latent_record("tiny"))).encode())
    model = awake(**LAYOUTS["symmetric"])
    video, latent = inputs(model, 5, 4, 6)
    stored: dict[str, Tensor | LatentDistribution] = {
        "sample": latent, "moments": model.encode_with_distribution(video)
    }  # fmt: skip
    for kind, value in stored.items():
        path = Path(f"{kind}.safetensors")
        write_latents(path, value, model.latent_record("m"), timestamps=[0, 1, 3, 4, 9], fps=25)
        book.add(f"files/latents/{kind}", path.read_bytes())
        generator = noise() if kind == "moments" else None
        found, _ = read_latents(
            path, 1, 3, sample_mode=kind == "moments", generator=generator, scaled=True
        )
        book.add(f"files/latents/{kind}, read", found)


COMMANDS: dict[str, str] = {
    "stream.safetensors": "encode in.y4m {out} --model symmetric --dtype float64 "
    "--latent-dtype float32",
    "least.safetensors": "encode in.y4m {out} --model symmetric --dtype float64 "
    "--latent-dtype float32 --memory least",
    "sample.safetensors": "encode in.y4m {out} --model causal --sample --seed 4 --scaled "
    "--latent-dtype float16",
    "clips.safetensors": "encode in.y4m {out} --model svd --clip-frames 4 --dtype float64",
    "stream.y4m": "decode stream.safetensors {out} --model symmetric --dtype float64",
    "least.y4m": "decode stream.safetensors {out} --model symmetric --dtype float64 --memory least",
    "clips.y4m": "decode clips.safetensors {out} --model svd --dtype float64 --memory least",
    "causal.y4m": "reconstruct in.y4m {out} --model causal --dtype float64",
    "causal, least.y4m": "reconstruct in.y4m {out} --model causal --dtype float64 --memory least",
    "svd.y4m": "reconstruct in.y4m {out} --model svd --dtype float64",
    "svd, least.y4m": "reconstruct in.y4m {out} --model svd --dtype float64 --memory least",
    "part.rgb": "reconstruct in.y4m {out} --model symmetric --start 0.1 --frames 3 --size 20x14",
}
"""Files that the command writes, in this order, and how."""


def commands(book: Book) -> None:
    """The command on a video whose sides are no whole cells: its files byte for byte.

    Pieces may be cut otherwise; computed in float64, that moves no pixel by a level, and no latent
    that is stored in float32.
    """
    save_video(pixels(1, 3, 5, 97, 49).float(), "in.y4m", fps=10)
    book.add("commands/in.y4m", Path("in.y4m").read_bytes())
    book.add("commands/in.y4m, read", load_video("in.y4m")[0])
    for layout in ("symmetric", "causal", "svd"):
        awake(torch.float32, **LAYOUTS[layout]).save_pretrained(layout)
    for out, words in COMMANDS.items():
        run([out if word == "{out}" else word for word in words.split()])
        book.add(f"commands/{out}", Path(out).read_bytes())


def run(words: list[str]) -> None:
    """`tvae` with these words, in this process. Raises `RuntimeError` where it fails."""
    with mock.patch.object(sys, "argv", ["tvae", *words, "--quiet"]):
        try:
            entry_point()()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"tvae {' '.join(words)} failed") from end


def entry_point() -> Callable[[], None]:
    """The command's function, which has lived in two places."""
    try:
        module = importlib.import_module("temporal_vae.cli.main")
    except ModuleNotFoundError:
        module = importlib.import_module("temporal_vae.cli")
    return cast(Callable[[], None], module.main)


# What is made and compared -------------------------------------------------------------------

PARTS = (
    whole, large, half, committed, bounded, options_of_memory, streams, streams_of_more,
    streams_that_hand_on, training, masks, description, graph, files, commands,
)  # fmt: skip


def write(folder: Path, revision: str, parts: Sequence[Callable[[Book], None]]) -> bool:
    """Compute with the library that is on Python's path, on one thread, and keep the values.

    Of a part that fails there are fewer; the rest is computed all the same. Gives whether none did.
    """
    folder, book, complete = folder.resolve(), Book(), True
    torch.set_num_threads(1)
    for part in parts:
        with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
            try:
                part(book)
            except Exception:
                traceback.print_exc()
                complete = False
    book.save(folder, revision)
    return complete


def compute(tree: Path, folder: Path, revision: str, only_committed: bool = False) -> bool:
    """`write`, in a process of its own, with the library of a source tree."""
    source = str(tree / "src")
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    words = ["write", str(folder), "--source", source, "--revision", revision]
    done = subprocess.run(
        [sys.executable, __file__, *words, *(["--committed"] if only_committed else [])],
        env=os.environ | threads | {"PYTHONPATH": source},
    )
    return done.returncode == 0


def git(*words: str) -> str:
    """What git says, in this repository."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A revision as files beside these, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def make(revision: str, folder: Path | None) -> None:
    """Keep the values of a revision."""
    revision = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    folder = (folder or CACHE / revision).resolve()
    with checked_out(revision) as tree:
        if not compute(tree, folder, revision):
            (folder / ABOUT).unlink(missing_ok=True)
            sys.exit(f"nothing is kept of {revision}: it fails")
    print(f"{folder}: {len(load_file(folder / VALUES))} entries of {revision}")


def newest() -> Path:
    """The folder made last, of this commit or one before it."""
    known = set(git("rev-list", "HEAD").split())
    made = [about for about in CACHE.glob(f"*/{ABOUT}") if about.parent.name in known]
    if not made:
        sys.exit("nothing is kept to compare with: python benchmarks/golden.py make")
    return max(made, key=lambda about: about.stat().st_mtime).parent


def check(folder: Path | None, only_committed: bool) -> bool:
    """Compare the files here with what was kept; print a line an entry, give whether all hold."""
    kept, about = dict[str, Tensor](), {}
    if not only_committed:
        folder = (folder or newest()).resolve()
        kept, about = load_file(folder / VALUES), json.loads((folder / ABOUT).read_text())
        print(f"kept of {about['revision']}, {about['made with']}")
        if about["made with"] != made_with():
            print(f"but here: {made_with()}: what is exact there need not be here")
    with tempfile.TemporaryDirectory() as now:
        complete = compute(ROOT, Path(now), "", only_committed)
        found, said = load_file(Path(now) / VALUES), json.loads((Path(now) / ABOUT).read_text())
    rules: dict[str, Rule] = about.get("rules", {}) | said["rules"]
    held = []
    if not only_committed:
        names = [*kept.keys() | found.keys()]
        held += [tell(name, found.get(name), kept.get(name), rules[name]) for name in sorted(names)]
    small, here = load_file(COMMITTED), {n for n in found if n.startswith("committed/")}
    for name in sorted(small.keys() | here):
        label = f"{COMMITTED.name}: {name}"
        held.append(tell(label, found.get(name), small.get(name), COMMITTED_TOLERANCE))
    print(f"{held.count(False)} of {len(held)} failed" + ("" if complete else ", and see above"))
    return complete and all(held)


def tell(name: str, found: Tensor | None, kept: Tensor | None, rule: str | float) -> bool:
    """Print the worst error of an entry and whether it holds."""
    error, verdict = math.inf, "FAILED"
    if found is None or kept is None:
        verdict = "FAILED: missing" if found is None else "FAILED: not kept"
    elif (found.shape, found.dtype) != (kept.shape, kept.dtype):
        verdict = (
            f"FAILED: {short(found.dtype)} {tuple(found.shape)}, "
            f"was {short(kept.dtype)} {tuple(kept.shape)}"
        )
    else:
        error = difference(found, kept)
        if rule == "exact":
            holds = torch.equal(in_bytes(found), in_bytes(kept))
        else:
            holds = error <= (LAW_1[kept.dtype] if isinstance(rule, str) else rule)
        verdict = "ok" if holds else "FAILED"
    print(f"{name:64} {error:8.1e}  {rule:6}  {verdict}")
    return verdict == "ok"


def difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    if b.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=sys.float_info.min))


def in_bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor: minus zero is not zero."""
    return x.reshape(-1).view(torch.uint8)


def commit() -> None:
    """Write the small file that lies beside this script."""
    with tempfile.TemporaryDirectory() as folder:
        if not compute(ROOT, Path(folder), "", only_committed=True):
            sys.exit("nothing is written")
        COMMITTED.write_bytes((Path(folder) / VALUES).read_bytes())
    print(f"{COMMITTED}: {COMMITTED.stat().st_size} bytes")


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make", help="keep the values of a revision")
    making.add_argument("--revision", default="HEAD")
    making.add_argument("--folder", type=Path)
    checking = verbs.add_parser("check", help="compare the files here with what was kept")
    checking.add_argument("--folder", type=Path)
    checking.add_argument("--committed", action="store_true", help="with golden.safetensors alone")
    verbs.add_parser("commit", help="write golden.safetensors beside this script")
    writing = verbs.add_parser("write", help="what make and check run in a process of its own")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--source", type=Path, required=True)
    writing.add_argument("--revision", default="")
    writing.add_argument("--committed", action="store_true")
    options = parser.parse_args()
    if options.verb == "make":
        make(options.revision, options.folder)
    elif options.verb == "check":
        sys.exit(not check(options.folder, options.committed))
    elif options.verb == "commit":
        commit()
    else:
        used = Path(temporal_vae.__file__).resolve()
        assert used.is_relative_to(options.source.resolve()), f"{used} is not of {options.source}"
        parts = (committed,) if options.committed else PARTS
        sys.exit(not write(options.folder, options.revision, parts))


if __name__ == "__main__":
    main()
