"""Speed against every peer, the same weights in all; one command, one table.

    python benchmarks/speed.py [--rows svd-decode svd-encode wan-decode wan-encode wan-image]
        [--sizes 4x128x128 8x256x256] [--dtypes float32 bfloat16] [--sides ...] [--repeats 5]

Interleaved, medians of seconds. "times" is how many times as fast as the fastest peer of its dtype
a side of ours is: above 1 is faster. Sides:

    diffusers      diffusers' module            channels-last   the same with channels-last weights
    compiled       diffusers by torch.compile   onnxruntime     diffusers' graph, float32 alone
    openvino       the same graph, with the dtype as its precision hint
    ours           the whole walk               bounded         in two fifths of what that takes
    ours-compiled  after `vae.compile()`

"error" is the RMS distance to diffusers in float64, over its RMS (with --errors, which takes long).
"peak" is the share of the operations a second that a 3x3 convolution of 128 channels reaches in the
same run; operations are those of diffusers' graph, whatever is really computed. "ceiling" is how
many times as fast as diffusers one could be with the operations that stay when doubled pixels are
folded, all at that peak: Amdahl's bound on what is left to win.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, AutoencoderKLWan
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from temporal_vae import TemporalVAE
from temporal_vae.checkpoints import diffusers_names, wan_names
from temporal_vae.network.framewise import Upsample
from temporal_vae.network.spacetime import SpacetimeUpsample

Sides = dict[str, Callable[[], Any]]
OURS = ("ours", "bounded", "ours-compiled")
SIDES = ("diffusers", "channels-last", "compiled", "onnxruntime", "openvino", *OURS)
ROWS = ("svd-decode", "svd-encode", "wan-decode", "wan-encode", "wan-image")


class Decode(nn.Module):
    """A decoder of diffusers as a function of one tensor, for exporters and compilers."""

    def __init__(self, vae: Any, frames: int):
        super().__init__()
        self.vae, self.frames = vae, frames

    def forward(self, latent: Tensor) -> Any:
        """See the class."""
        if isinstance(self.vae, AutoencoderKLWan):
            return self.vae.decode(latent).sample
        return self.vae.decode(latent, num_frames=self.frames).sample


class Encode(nn.Module):
    """An encoder of diffusers, likewise: the mean of the posterior."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor) -> Any:
        """See the class."""
        return self.vae.encode(video).latent_dist.mean


@dataclass
class Pair:
    """diffusers' model and ours of the same random weights."""

    theirs: Any
    ours: TemporalVAE
    wan: bool

    @classmethod
    def of(cls, layout: str, dtype: torch.dtype) -> Pair:
        """Both, of a layout: "svd", or "wan" with its base width at 96, or at 32 as "wan32"."""
        torch.manual_seed(0)
        theirs: Any
        if layout.startswith("wan"):
            theirs = AutoencoderKLWan(base_dim=int(layout[3:] or 96))
            ours = TemporalVAE.from_config(wan_names.read_config(theirs.config))
            state = theirs.state_dict()
            ours.load_state_dict({wan_names.our_name(key): t for key, t in state.items()})
        else:
            theirs = AutoencoderKLTemporalDecoder(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
            )  # fmt: skip
            config, state = diffusers_names.from_diffusers(theirs.state_dict(), theirs.config)
            ours = TemporalVAE.from_config(config)
            ours.load_state_dict(state)
        both = theirs.to(dtype).eval(), ours.to(dtype).eval()
        for model in both:
            model.requires_grad_(False)
        return cls(*both, layout.startswith("wan"))

    def module(self, verb: str, frames: int) -> nn.Module:
        """diffusers' encoder or decoder."""
        return Encode(self.theirs) if verb == "encode" else Decode(self.theirs, frames)

    def input(self, verb: str, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(ours, theirs) of random pixels or latents."""
        factor, dtype = self.ours.downsample_factor, self.ours.dtype
        if verb == "encode":
            x = torch.rand(1, 3, frames, height, width, dtype=dtype) * 2 - 1
        else:
            count = self.ours.latent_frames(frames)
            size = (height // factor, width // factor)
            x = torch.randn(1, self.ours.latent_channels, count, *size, dtype=dtype)
        return x, x if self.wan else x.transpose(1, 2).flatten(0, 1).contiguous()


def peers(pair: Pair, verb: str, frames: int, x: Tensor, wanted: list[str], folder: Path) -> Sides:
    """Their ways."""
    module, dtype = pair.module(verb, frames), pair.ours.dtype
    found: Sides = {"diffusers": lambda: module(x)}
    if "channels-last" in wanted:
        other = Pair(copy.deepcopy(pair.theirs), pair.ours, pair.wan)
        for part in other.theirs.modules():
            if isinstance(part, nn.Conv2d | nn.Conv3d):
                clip = isinstance(part, nn.Conv3d)
                order = torch.channels_last_3d if clip else torch.channels_last
                part.weight.data = part.weight.contiguous(memory_format=order)
        last = other.module(verb, frames)
        found["channels-last"] = lambda: last(x)
    if "compiled" in wanted:
        compiled = torch.compile(module, options={"freezing": True})
        found["compiled"] = lambda: compiled(x)
    if dtype == torch.float32 and {"onnxruntime", "openvino"} & {*wanted}:
        exported(pair, verb, frames, x, folder / "model.onnx")
    if "onnxruntime" in wanted and (folder / "model.onnx").exists() and dtype == torch.float32:
        found["onnxruntime"] = onnxruntime(folder / "model.onnx", x)
    if "openvino" in wanted and (folder / "model.onnx").exists():
        found["openvino"] = openvino(folder / "model.onnx", x)
    return {name: side for name, side in found.items() if name in wanted}


def exported(pair: Pair, verb: str, frames: int, x: Tensor, file: Path) -> None:
    """diffusers' graph as ONNX, of this one size."""
    with torch.no_grad():
        torch.onnx.export(pair.module(verb, frames), (x,), file, dynamo=True, verbose=False)


def onnxruntime(file: Path, x: Tensor) -> Callable[[], Any]:
    """A graph in ONNX Runtime, with as many threads as torch has."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def openvino(file: Path, x: Tensor) -> Callable[[], Any]:
    """A graph in OpenVINO, with a precision for a hint."""
    import openvino as ov

    hint = "f32" if x.dtype == torch.float32 else "bf16"
    config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = ov.Core().compile_model(str(file), "CPU", config)
    feed = [x.float().numpy()]
    return lambda: model(feed)


def ours(pair: Pair, verb: str, x: Tensor, wanted: list[str]) -> Sides:
    """Our ways; what is bounded gets a fifth of what diffusers takes, or the least there is."""
    vae = pair.ours
    walk: Any = vae.decode if verb == "decode" else partial(vae.encode, sample_mode=False)
    whole, least = (vae.plan(x.shape, verb, budget=b).peak_bytes for b in (None, "least"))  # type: ignore[arg-type]
    plan = vae.plan(x.shape, verb, budget=max(least, whole * 2 // 5))  # type: ignore[arg-type]
    found: Sides = {"ours": lambda: walk(x), "bounded": lambda: walk(x, plan=plan)}
    if "ours-compiled" in wanted:
        other = copy.deepcopy(vae)
        other.compile()
        made: Any = other.decode if verb == "decode" else partial(other.encode, sample_mode=False)
        found["ours-compiled"] = lambda: made(x)
    return {name: side for name, side in found.items() if name in wanted}


def medians(sides: Sides, repeats: int) -> dict[str, float]:
    """Median seconds of each side, taken in turn, after one run of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def convolution_peak(dtype: torch.dtype) -> float:
    """Operations a second of a 3x3 convolution, the best of several; what all of it could reach."""
    conv = nn.Conv2d(128, 128, 3, padding=1).to(dtype)
    conv.weight.data = conv.weight.contiguous(memory_format=torch.channels_last)
    x = torch.randn(4, 128, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
    best = math.inf
    with torch.no_grad():
        for _ in range(12):
            start = time.perf_counter()
            conv(x)
            best = min(best, time.perf_counter() - start)
    return 2 * 9 * 128 * x.numel() / best


def operations(pair: Pair, verb: str, frames: int, x: Tensor) -> tuple[int, int]:
    """Operations of diffusers' graph, and those that stay when doubled pixels are folded."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pair.module(verb, frames)(x)
    total = int(counter.get_total_flops())
    line = pair.ours.decoder if verb == "decode" else pair.ours.encoder
    shape, folded = (1, *_clip_shape(pair, verb, frames, x)), 0
    for layer in line.layers():
        after = layer.output_shape(shape)
        if isinstance(layer, Upsample | SpacetimeUpsample):
            conv = next(p for p in layer.parameters() if p.ndim == 4)
            folded += 2 * conv.numel() * math.prod(after) // after[1] * 5 // 9
        shape = after
    return total, total - folded


def _clip_shape(pair: Pair, verb: str, frames: int, x: Tensor) -> tuple[int, ...]:
    if pair.wan:
        return tuple(x.shape[1:])
    return (x.shape[1], frames, *x.shape[2:])


def error(side: Callable[[], Any], reference: Tensor) -> float:
    """RMS distance to the reference, over its RMS."""
    with torch.no_grad():
        y = side()
    if not isinstance(y, Tensor):
        y = torch.as_tensor(y[0])
    if y.ndim != reference.ndim:  # ours is a clip, diffusers' frames
        y = y.transpose(1, 2).flatten(0, 1)
    y = y.clamp(-1, 1) if y.shape[1] == 3 and y.ndim == 5 else y  # as diffusers does for Wan's kind
    return float((y.double() - reference).square().mean().sqrt() / reference.square().mean().sqrt())


def one(row: str, size: str, dtype: torch.dtype, options: argparse.Namespace, folder: Path) -> None:
    """Print the table of a row, a size and a dtype."""
    layout, verb = row.split("-")
    frames, height, width = (int(n) for n in size.split("x"))
    if layout == "wan":
        frames = 1 if verb == "image" else 1 + 4 * (frames // 4)
        layout, verb = f"wan{options.wan_width}", "decode" if verb == "image" else verb
    pair = Pair.of(layout, dtype)
    mine, theirs = pair.input(verb, frames, height, width)
    sides = peers(pair, verb, frames, theirs, options.sides, folder)
    sides |= ours(pair, verb, mine, options.sides)
    took, peak = medians(sides, options.repeats), convolution_peak(dtype)
    total, stays = operations(pair, verb, frames, theirs)
    ceiling = took["diffusers"] / (stays / peak) if "diffusers" in took else math.nan
    reference = None
    if options.errors:
        wide = Pair.of(layout, torch.float64)
        wide.theirs.load_state_dict(pair.theirs.state_dict())
        with torch.no_grad():
            reference = wide.module(verb, frames)(theirs.double())
    print(
        f"\n{row} {frames}x{height}x{width} {dtype}: {total / 1e12:.3f} x 10^12 operations, "
        f"convolution peak {peak / 1e9:.0f} x 10^9 a second, ceiling {ceiling:.2f} of diffusers"
    )
    fastest = min((t for name, t in took.items() if name not in OURS), default=math.nan)
    for name, seconds in took.items():
        times = f"{fastest / seconds:8.2f}" if name in OURS else f"{'':8}"
        wrong = "" if reference is None else f"  error {error(sides[name], reference):.1e}"
        share = f"  peak {total / seconds / peak:5.2f}"
        print(f"  {name:16}{seconds:9.3f} s{times}{share}{wrong}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--sizes", nargs="+", default=["4x128x128", "8x256x256"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--wan-width", type=int, default=96, help="96 is Wan's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--errors", action="store_true", help="measure them against float64")
    options = parser.parse_args()
    for name in ("onnxruntime", "openvino"):
        if name in options.sides and importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: left out")
            options.sides.remove(name)
    print(
        f"{datetime.date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, medians of "
        f"{options.repeats}"
    )
    for row in options.rows:
        for size in options.sizes:
            with tempfile.TemporaryDirectory() as folder:
                for dtype in options.dtypes:
                    one(row, size, getattr(torch, dtype), options, Path(folder))


if __name__ == "__main__":
    main()
