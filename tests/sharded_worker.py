"""What each of several processes does for `test_sharded.py`: every case, one after another."""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import awake, redraw
from torch import Tensor

from temporal_vae import TemporalVAE, WanVAEConfig, sharded
from temporal_vae.walks.processes import Group
from temporal_vae.walks.sharded import walk
from temporal_vae.walks.stages import shapes_in
from temporal_vae.walks.tracing import LiveBytes

SVD: dict[str, Any] = {
    "temporal_norm": "clip", "clip_frames": 7, "temporal_attention_reach": 0,
    "time_conv_out": True,
}  # fmt: skip


def awake_wan(**options: Any) -> TemporalVAE:
    config = WanVAEConfig(
        latent_channels=4, base_channels=8, channel_multipliers=(1, 2, 2), blocks_per_level=1,
        temporal_downsample=(False, True), **options,
    )  # fmt: skip
    model = TemporalVAE.from_config(config).double()
    redraw(model)
    return model


MODELS: dict[str, Callable[[], TemporalVAE]] = {
    "default": awake,
    "causal": lambda: awake(causal_mode=True),
    "norms over the clip": lambda: awake(**SVD),
    "Wan 2.1": lambda: awake_wan(),
    "Wan 2.2": lambda: awake_wan(decoder_base_channels=16, level_shortcuts=True, patch_size=2),
}
CASES: dict[str, list[tuple[Any, tuple[int, ...] | None]]] = {
    "default": [(None, None), ("least", (2, 4, 1))],
    "causal": [(None, None)],
    "norms over the clip": [("least", (1, 1, 5))],
    "Wan 2.1": [(None, (1, 4, 2)), ("least", None)],
    "Wan 2.2": [(None, None)],
}
"""The memory of each process, and the sizes of parts (frames, rows of latents) if they are not as
equal as can be."""


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def errors(vae: TemporalVAE, sizes: tuple[int, ...] | None, memory: Any) -> list[float]:
    """How far decoded pixels and encoded moments are from those of one process."""
    vae.requires_grad_(False)
    frames, (h, w), scale = 7, (7, 3), vae.downsample_factor
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, vae.latent_channels, frames, h, w, generator=generator).to(vae.dtype)
    length = vae.video_frames(frames)
    pixels = torch.rand(2, 3, length, h * scale, w * scale, generator=generator).to(vae.dtype)
    axis, rank = sharded.split_axis(vae), dist.get_rank()
    if sizes is None:
        own, video = sharded.part(vae, latent), sharded.part(vae, pixels, "encode")
    else:
        unit = scale if axis == 3 else 1
        own = latent.split(sizes, axis)[rank]
        video = pixels.split([n * unit for n in sizes], axis)[rank]
    decoded = sharded.gather(vae, sharded.decode(vae, own, memory=memory))
    found = sharded.encode(vae, video, memory=memory)
    moments = [sharded.gather(vae, each) for each in (found.mean, found.log_variance)]
    if decoded is None:
        return []
    expected = (vae.decode(latent), *vae.encode_with_distribution(pixels))
    got = (decoded, *moments)
    return [relative(ours, theirs) for ours, theirs in zip(got, expected, strict=True)]  # type: ignore[arg-type]


def message(run: Callable[[], object]) -> str:
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was raised"


def refusals(vae: TemporalVAE) -> dict[str, str]:
    """What is said about parts that no walk can take; by every process."""
    vae.requires_grad_(False)
    rank = dist.get_rank()
    latent = torch.zeros(1, 4, 3, 4, 4, dtype=vae.dtype)
    other = latent[..., :3] if rank == 1 else latent
    wrong = latent.float() if rank == 1 else latent
    return {
        "other clips": message(lambda: sharded.decode(vae, other)),
        "one wrong": message(lambda: sharded.decode(vae, wrong)),
        "budget": message(lambda: sharded.decode(vae, latent, memory=1000 if rank else None)),
        "nothing": message(lambda: sharded.part(vae, latent[:, :, :2])),
        "a frame": message(lambda: sharded.gather(vae, latent[0] if rank == 1 else latent)),
        "numbers": message(lambda: sharded.gather(vae, wrong)),
        "empty": message(lambda: sharded.decode(vae, latent[:, :, : 2 - rank])),
        "gradients": message(lambda: sharded.decode(vae.requires_grad_(True), latent)),
    }


def recovered(kind: str) -> dict[str, Any]:
    """What each process hears of an error in the middle of a walk on one of them, how soon, and
    whether all can walk again."""
    vae = MODELS[kind]().requires_grad_(False)
    latent = torch.randn(1, 4, 6, 6, 3, generator=torch.Generator().manual_seed(2)).double()
    own, layer = sharded.part(vae, latent), list(vae.decoder.layers())[-2]
    expected = sharded.gather(vae, sharded.decode(vae, own))
    found: dict[str, Any] = {"said": [], "seconds": [], "error": []}
    for error in (MemoryError("no more memory"), KeyboardInterrupt("Control-C")):
        with broken(layer, error if dist.get_rank() == 1 else None):
            start = time.monotonic()
            try:
                sharded.decode(vae, own)
            except BaseException as raised:
                found["said"].append(f"{type(raised).__name__}: {raised}")
            found["seconds"].append(time.monotonic() - start)
        again = sharded.gather(vae, sharded.decode(vae, own))
        if again is not None and expected is not None:
            found["error"].append(relative(again, expected))
    return found


@contextmanager
def broken(layer: Any, error: BaseException | None) -> Iterator[None]:
    """A layer that raises, if there is something to raise."""

    def fails(*_: Any, **__: Any) -> Any:
        raise error or AssertionError

    if error is not None:
        layer.compute = layer.stream = fails
    try:
        yield
    finally:
        if error is not None:
            del layer.compute, layer.stream


def sent() -> list[int]:
    """Bytes that a process sends for a clip, and what pixels for frames and back must take."""
    vae, size = awake(torch.float32), dist.get_world_size()
    latent = torch.zeros(1, vae.latent_channels, 2, 6, 6)
    group, layers = Group(), list(vae.decoder.layers())
    bounds = vae.plan((1, vae.latent_channels, 2 * size, 6, 6), ranks=size).bounds
    assert bounds is not None
    with torch.no_grad():
        walk(vae.decoder, latent, bounds, group)
    shapes = shapes_in(layers, tuple(latent.shape))
    crossing = [
        math.prod(shape) * 4 * (size - 1) // size
        for layer, shape in zip(layers, shapes, strict=False)
        if layer.cut == "pixels"
    ]
    return [group.sent, 2 * sum(crossing)]


def held() -> dict[str, float]:
    """What this process has alive for its part, as a share of its plan."""
    size, rank, found = dist.get_world_size(), dist.get_rank(), dict[str, float]()
    for name, kind, shape, memory in (
        ("bands", "Wan 2.1", (1, 4, 3, 8 * size, 3), "least"),
        ("one frame", "Wan 2.1", (1, 4, 1, 8 * size, 3), None),
        ("whole beside bands", "Wan 2.1", (1, 4, 3, 8 * size, 3), "least" if rank else None),
        ("many frames", "default", (1, 4, 24 * size, 4, 4), "least"),
    ):  # fmt: skip
        vae = MODELS[kind]().requires_grad_(False)
        plan = vae.plan(shape, "decode", budget=memory, ranks=size)
        own = sharded.part(vae, torch.zeros(shape, dtype=vae.dtype))
        with LiveBytes() as alive:
            for there in (own, *vae.parameters()):
                alive.leave_out(there)
            sharded.decode(vae, own, memory=memory)
        found[name] = alive.most / plan.peak_bytes
    return found


def work(results: dict[str, Any]) -> None:
    for name, cases in CASES.items():
        results[name] = [errors(MODELS[name](), sizes, memory) for memory, sizes in cases]
    single = awake(torch.float32)
    results["float32"] = errors(single, None, None)
    results["bfloat16"] = errors(awake(torch.float32).bfloat16(), None, None)
    results["sent"] = sent()
    results["held"] = held()
    results["refusals"] = refusals(awake())
    results["recovered"] = {kind: recovered(kind) for kind in ("default", "Wan 2.1")}


def main() -> None:
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    results: dict[str, Any] = {}
    try:
        work(results)
    except Exception:  # the test shows it
        results["failed"] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
