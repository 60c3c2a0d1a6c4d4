"""Exported graphs: the numbers of the model, in ONNX Runtime, OpenVINO and packages of torch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import awake, difference, redraw
from torch import Tensor

from temporal_vae import TemporalVAE, WanVAEConfig
from temporal_vae.convert.export import export
from temporal_vae.export import files, formats
from temporal_vae.export.graphs import Graph, Graphs, Port, Size

ROOT = Path(__file__).parent.parent
Run = Callable[[str, list[Tensor]], list[Tensor]]
"""Runs a graph by its name."""
SLIM: dict[str, Any] = {"channel_multipliers": (1,)}


def wan(**options: Any) -> TemporalVAE:
    """A small awake model of Wan's kind."""
    small: dict[str, Any] = {
        "base_channels": 8, "latent_channels": 4, "channel_multipliers": (1, 1, 1),
        "blocks_per_level": 1, "temporal_downsample": (True, True),
    }  # fmt: skip
    model = TemporalVAE.from_config(WanVAEConfig(**(small | options)), seed=0).double()
    redraw(model)
    return model


MODELS: dict[str, Callable[[], TemporalVAE]] = {
    "causal": lambda: awake(causal_mode=True),
    "looks ahead": awake,
    "far ahead": lambda: awake(
        temporal_kernel_size=5, num_temporal_layers=2, temporal_attention_reach=2, **SLIM
    ),
    "time_conv_out": lambda: awake(time_conv_out=True, temporal_attention_reach=0, **SLIM),
    "wan": wan,
    "wan, a latent a frame": lambda: wan(channel_multipliers=(1, 1), temporal_downsample=(False,)),
    "wan22": lambda: wan(level_shortcuts=True, patch_size=2),
}


def graphs_of(model: TemporalVAE) -> dict[str, Graph]:
    found = Graphs.of(model.encoder.ready(), model.decoder.ready(), None).graphs
    return {graph.name: graph for graph in found}


@contextmanager
def as_when_exporting() -> Iterator[None]:
    """Layers compute here as they do while a graph is traced, but with values."""
    torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_exporting_flag = False


def zeros(port: Port, clip: Tensor, cell: int) -> Tensor:
    sizes = {"batch": len(clip), "rows": clip.shape[3] // cell, "columns": clip.shape[4] // cell}
    shape = [a.times * sizes[a.name] if isinstance(a, Size) else a for a in port.shape]
    return torch.zeros(shape, dtype=clip.dtype if port.dtype.is_floating_point else port.dtype)


def streamed(graphs: dict[str, Graph], verb: str, clip: Tensor, cell: int, run: Run) -> Tensor:
    """A clip by the graphs of the steps, in uneven pieces: latents, or pixels."""
    step, results, state = graphs[f"{verb}_step"], 2 if verb == "encode" else 1, list[Tensor]()
    found, frames = [], clip.shape[2]
    if f"{verb}_first" in graphs:
        y, *rest = run(f"{verb}_first", [clip[:, :, :1]])
        found, state, clip = [y], rest[results - 1 :], clip[:, :, 1:]
        each = (clip.shape[2]) // 3
        cuts = [each, 2 * each]
    else:
        state = [zeros(port, clip, cell) for port in step.inputs[1:]]
        more = torch.randn_like(clip[:, :, :1]).expand(-1, -1, step.delay, -1, -1)
        clip = torch.cat([clip, more], 2)
        cuts = [1, 5]
    done = 0
    for piece in (clip[:, :, : cuts[0]], clip[:, :, cuts[0] : cuts[1]], clip[:, :, cuts[1] :]):
        done += piece.shape[2]
        if step.delay and done > frames:
            state[1] = torch.full_like(state[1], frames)
        y, *rest = run(step.name, [piece, *state])
        found, state = [*found, y], rest[results - 1 :]
    assert [tuple(tail.shape) for tail in state] == [
        tuple(zeros(port, clip, cell).shape) for port in step.inputs[1:]
    ]
    return torch.cat(found, 2)[:, :, step.delay :]


def clip_for(model: TemporalVAE, frames: int = 9) -> Tensor:
    """Pixels of two samples, whose frames make whole latents."""
    frames = frames if model.frames_per_latent == 1 else 1 + 3 * model.frames_per_latent
    f, generator = model.downsample_factor, torch.Generator().manual_seed(3)
    shape = (2, model.input_channels, frames, 2 * f, 3 * f)
    return (torch.rand(shape, generator=generator) * 2 - 1).to(model.dtype)


def assert_same(model: TemporalVAE, run: Run, clip: Tensor, most: float) -> None:
    """Whole clips and streams are the model's, both ways."""
    graphs, f = graphs_of(model), model.downsample_factor
    with torch.no_grad():
        posterior = model.encode_with_distribution(clip)
        frames = model.decode(posterior.mean)
        for got, wanted in zip(run("encode", [clip]), posterior, strict=True):
            assert difference(got, wanted) < most
        assert difference(run("decode", [posterior.mean])[0], frames) < most
        assert difference(streamed(graphs, "encode", clip, f, run), posterior.mean) < most
        assert difference(streamed(graphs, "decode", posterior.mean, 1, run), frames) < most


# What the graphs compute -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_what_is_traced_is_the_model(name: str) -> None:
    """Without the exporter, whose turn is slow: the same functions, with values."""
    model = MODELS[name]()
    graphs = graphs_of(model)

    def run(name: str, inputs: list[Tensor]) -> list[Tensor]:
        with as_when_exporting():
            return list(graphs[name].module(*inputs))

    assert_same(model, run, clip_for(model), 1e-10)


def test_an_image_of_wans_kind_is_a_first_piece() -> None:
    model = wan()
    image = clip_for(model)[:, :, :1]
    with torch.no_grad(), as_when_exporting():
        mean, *_ = graphs_of(model)["encode_first"].module(image)
    assert difference(mean, model.encode(image, False)) < 1e-10


def test_masked_channels_are_masked_in_the_graphs() -> None:
    model = awake(causal_mode=True, **SLIM)
    model.set_active_feature_indices([0, 2])
    encode, *_ = Graphs.of(model.encoder, model.decoder, (0, 2)).graphs
    clip = clip_for(model)
    with torch.no_grad(), as_when_exporting():
        mean, log_variance = encode.module(clip)
    assert not mean[:, [1, 3]].any() and not log_variance[:, [1, 3]].any()
    assert difference(mean, model.encode(clip, False)) < 1e-10


def test_graphs_that_are_left_out_have_a_reason() -> None:
    model = awake(temporal_encoder=False, temporal_norm="clip", clip_frames=5)
    found = Graphs.of(model.encoder, model.decoder, None)
    assert [graph.name for graph in found.graphs] == ["encode", "decode"]
    assert "normalises over the whole clip" in found.left_out["decode_step"]
    assert "takes the pieces of a stream as they come" in found.left_out["encode_step"]


# Refusals --------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused_in_a_sentence(
    tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "graphs"
    told = run("export", "tiny", out, "--format", "tflite")
    assert told.returncode == 1 and "one of onnx, pt2, got 'tflite'" in told.stderr
    told = run("export", "tiny", tmp_path)
    assert told.returncode == 1 and "exists: take another name" in told.stderr
    told = run("export", tmp_path / "no-model", out)
    assert told.returncode == 1 and told.stderr.count("\n") == 1
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    told = run("export", "tiny", out)
    assert told.returncode == 1 and "pip install 'temporal-video-vae[export]'" in told.stderr
    assert not out.exists()
    with pytest.raises(ValueError, match=r"float32 on the CPU, and this one is in torch\.float64"):
        export(awake(), out)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.Packages, "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        export(awake(torch.float32), tmp_path / "graphs", "pt2")
    assert not list(tmp_path.iterdir())


# In other programs -----------------------------------------------------------------------------


def needs(*packages: str) -> None:
    """Skip where a package is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def in_onnx_runtime(folder: Path) -> Run:
    """Runs ONNX models."""
    import onnxruntime

    def run(name: str, inputs: list[Tensor]) -> list[Tensor]:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        given = {
            p.name: x.detach().numpy() for p, x in zip(session.get_inputs(), inputs, strict=True)
        }
        return [torch.from_numpy(y) for y in session.run(None, given)]

    return run


def in_openvino(folder: Path) -> Run:
    """The same, by OpenVINO."""
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32"}

    def run(name: str, inputs: list[Tensor]) -> list[Tensor]:
        model = openvino.Core().compile_model(folder / f"{name}.onnx", "CPU", exact)
        found = model([x.detach().numpy() for x in inputs])
        return [torch.from_numpy(np.array(found[port])) for port in model.outputs]

    return run


def test_one_step_in_onnx_runtime(tmp_path: Path) -> None:
    """The smallest of all exports; the others are slow."""
    needs("onnx", "onnxscript", "onnxruntime")
    model = wan(channel_multipliers=(1,), temporal_downsample=()).float()
    step, clip = graphs_of(model)["encode_step"], clip_for(model)
    files.write(Graphs((step,), {}), model.config, tmp_path / "graphs", "onnx")
    found = streamed({step.name: step}, "encode", clip, 1, in_onnx_runtime(tmp_path / "graphs"))
    assert difference(found, model.encode(clip, False)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "looks ahead", "wan", "wan22"])
def test_onnx_is_the_model(name: str, tmp_path: Path) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    model, out = MODELS[name]().float(), tmp_path / "graphs"
    about = export(model, out)
    assert about == json.loads((out / files.ABOUT).read_text()) and about["opset"] == files.OPSET
    assert_same(model, in_onnx_runtime(out), clip_for(model), 1e-4)
    assert_same(model, in_onnx_runtime(out), clip_for(model)[:1], 1e-4)
    weights = sum(p.nbytes for p in model.parameters())
    assert (out / files.WEIGHTS).stat().st_size <= weights  # once, for all graphs
    if "decode_first" not in about["graphs"]:
        assert_the_example_streams(model, out, tmp_path)
    needs("openvino")
    assert_same(model, in_openvino(out), clip_for(model), 1e-4)


def assert_the_example_streams(model: TemporalVAE, graphs: Path, folder: Path) -> None:
    """Where torch and this library cannot be imported."""
    latent = model.encode(clip_for(model), False)
    np.save(folder / "latents.npy", latent.detach().numpy())
    words = [str(graphs), str(folder / "latents.npy"), str(folder / "frames.npy")]
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['temporal_vae'] = None; "
        f"sys.argv[1:] = {words!r}; runpy.run_path({str(ROOT / 'examples/stream_onnx.py')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    frames = torch.from_numpy(np.load(folder / "frames.npy"))
    assert difference(frames, model.decode(latent)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "looks ahead", "wan"])
def test_packages_need_torch_alone(name: str, tmp_path: Path) -> None:
    model, out = MODELS[name]().float(), tmp_path / "graphs"
    export(model, out, "pt2")

    def run(name: str, inputs: list[Tensor]) -> list[Tensor]:
        torch.save(inputs, tmp_path / "in.pt")
        code = (
            "import sys, torch; sys.modules['temporal_vae'] = None; "
            f"program = torch.export.load({str(out / f'{name}.pt2')!r}); "
            f"inputs = torch.load({str(tmp_path / 'in.pt')!r}); "
            "found = program.module(check_guards=False)(*inputs); "
            f"torch.save(list(found), {str(tmp_path / 'out.pt')!r})"
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
        found: list[Tensor] = torch.load(tmp_path / "out.pt")
        return found

    assert_same(model, run, clip_for(model), 1e-4)
