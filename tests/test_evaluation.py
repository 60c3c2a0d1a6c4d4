"""Evaluation: values of libraries, faults by their names, streams, what is said of bad input."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED, awake, difference
from test_foreign import theirs as svd_model
from test_video import write
from test_wan import ours as wan_model
from torch import Tensor

from temporal_vae import TemporalVAE
from temporal_vae.evaluation import baseline, clips, codecs, compare, measures, perceptual, series
from temporal_vae.evaluation.baseline import KINDS, LinearBaseline
from temporal_vae.evaluation.codecs import DiffusersCodec, LinearCodec, ModelCodec
from temporal_vae.evaluation.diagnosis import diagnose
from temporal_vae.evaluation.metrics import flicker, psnr
from temporal_vae.evaluation.perturbed import decoded_perturbed, perturbations
from temporal_vae.evaluation.results import Evaluation, Mean, student_quantile
from temporal_vae.video import Uint8Frames, VideoReader, pad_frames, read_clip, to_pixels

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def moving(frames: int, height: int = 48, width: int = 64, step: int = 2) -> Uint8Frames:
    """A smooth texture that moves to the right."""
    drawn = np.random.default_rng(0).normal(size=(height // 8 + 2, width // 8 + 2, 3))
    big = np.kron(drawn, np.ones((8, 8, 1)))
    soft = sum(np.roll(big, (i, j), (0, 1)) for i in range(8) for j in range(8))
    texture = 128 + np.asarray(soft)[:height, :width]
    return to_bytes8(np.stack([np.roll(texture, step * t, 1) for t in range(frames)]))


def to_bytes8(frames: np.ndarray[Any, Any]) -> Uint8Frames:
    return np.asarray(frames.round().clip(0, 255).astype(np.uint8))


def noisy(frames: Uint8Frames, deviation: float = 6.0) -> Uint8Frames:
    drawn = np.random.default_rng(1).normal(0, deviation, frames.shape)
    return to_bytes8(frames + drawn)


def tensors(frames: Uint8Frames) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float()


def found(measure: measures.Measure, a: Uint8Frames, b: Uint8Frames) -> dict[str, float]:
    for original, ours in zip(tensors(a), tensors(b), strict=True):
        measure.add(measures.Pair(original, ours))
    return measure.found().values


def run_codec(codec: codecs.Codec, frames: Uint8Frames) -> Tensor:
    """(T, 3, H, W) in 8-bit units."""
    return torch.stack(list(codec(iter(frames))))


# Values ----------------------------------------------------------------------------------------


def test_values_are_those_of_torchmetrics() -> None:
    from torchmetrics.functional import image

    a = moving(3, 176, 192)
    b = noisy(a)
    ours, original = tensors(b), tensors(a)
    expected = {
        "psnr": image.peak_signal_noise_ratio(
            ours, original, data_range=255.0, dim=(1, 2, 3), reduction="elementwise_mean"
        ),
        "ssim": image.structural_similarity_index_measure(ours, original, data_range=255.0),
        "ms_ssim": image.multiscale_structural_similarity_index_measure(
            ours, original, data_range=255.0
        ),
    }
    for name, value in expected.items():
        values = found(getattr(measures, name)(), a, b)
        assert values[name] == pytest.approx(float(torch.as_tensor(value)), rel=1e-6), name


def test_cvvdp_is_the_package_own() -> None:
    try:
        measure = perceptual.Cvvdp(25.0)
    except measures.NotMeasuredError as error:
        pytest.skip(str(error))
    import pycvvdp

    a = moving(4, 64, 96)
    b = noisy(a)
    own = pycvvdp.cvvdp(display_name="standard_4k", quiet=True, device=torch.device("cpu"))
    jod, _ = own.predict(b, a, dim_order="FHWC", frames_per_second=25)
    assert found(measure, a, b)["cvvdp"] == pytest.approx(float(jod), abs=1e-6)
    assert "torchvision" not in sys.modules or sys.modules["torchvision"].__file__


def test_vmaf_is_the_package_own() -> None:
    vmaf = pytest.importorskip("vmaf_torch", reason="vmaf-torch is not installed")
    a = moving(4, 64, 96)
    b = noisy(a)
    luma = torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)
    with torch.no_grad():
        own = vmaf.VMAF(clip_score=True)(*((tensors(x) * luma).sum(1)[:, None] for x in (a, b)))
    assert found(perceptual.Vmaf(), a, b)["vmaf"] == pytest.approx(float(own.mean()), rel=3e-6)


def test_warp_error_is_flicker_along_the_motion() -> None:
    """What sticks to the picture is no error along its motion; what stands on the screen is."""
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    clean = moving(6, 96, 128)
    pattern = np.random.default_rng(2).normal(0, 5, clean.shape[1:])
    stuck = np.stack([np.roll(pattern, 2 * t, 1) for t in range(6)])
    along, screen = (
        found(measures.WarpError(), clean, to_bytes8(clean + error))["warp_error"]
        for error in (stuck, np.broadcast_to(pattern, clean.shape))
    )
    assert along < 0.5 * screen
    assert found(measures.Changes(), clean, to_bytes8(clean + stuck))["flicker"] > 5
    assert found(measures.WarpError(), clean, clean)["warp_error"] == 0


def test_quantiles_are_those_of_tables() -> None:
    table = {1: 12.7062, 4: 2.7764, 5: 2.5706, 9: 2.2622, 17: 2.1098, 30: 2.0423, 1000: 1.9623}
    for freedom, value in table.items():
        assert student_quantile(freedom) == pytest.approx(value, rel=2e-3)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(0).normal(3, 2, (2000, 6))
    means = [Mean.of(row.tolist()) for row in drawn]
    assert np.mean([m.low <= 3 <= m.high for m in means]) == pytest.approx(0.95, abs=0.015)
    assert math.isnan(Mean.of([1.0]).low)
    assert math.isnan(Mean.of([1.0, math.nan]).mean)


@pytest.mark.slow
def test_measuring_takes_little_beside_the_reconstruction() -> None:
    frames = np.repeat(moving(1, 176, 192), 8, 0)
    names = ("psnr", "ssim", "ms_ssim", "flicker", "drift", "ends")
    recorder = clips.Recorder(clips.Conditions(25).makes(names))
    start = time.monotonic()
    clips.repeated(iter(frames), ModelCodec(TemporalVAE.from_pretrained("tiny")), [recorder])
    recorder.found()
    assert recorder.seconds <= 0.3 * (time.monotonic() - start - recorder.seconds)


# Series ----------------------------------------------------------------------------------------


def test_chance_has_neither_period_nor_drift() -> None:
    drawn = np.random.default_rng(0)
    periods, drifts = [], []
    for _ in range(100):
        values = drawn.normal(size=96)
        periods.append(series.period(np.abs(values)).strength)
        drifts.append(abs(series.drift(values.tolist())))
    assert np.mean(np.array(periods) > 0) <= 0.1
    assert np.mean(np.array(drifts) > 0) <= 0.05


@pytest.mark.parametrize("n", [2, 4, 5, 16, 17, 31])
def test_a_period_is_found(n: int) -> None:
    values = np.random.default_rng(0).uniform(0, 0.5, 96)
    values[n - 1 :: n] += 3
    found = series.period(values)
    assert found.frames == n and found.strength > 0.3


def test_a_drift_is_measured_and_single_frames_are_not() -> None:
    ramp = np.linspace(0, 6, 60) + np.random.default_rng(0).normal(0, 0.2, 60)
    assert series.drift(ramp.tolist()) == pytest.approx(4, abs=0.4)
    spikes = np.zeros(60)
    spikes[[3, 50, 51]] = -40
    assert series.drift(spikes.tolist()) == 0
    assert math.isnan(series.drift([0.0, math.nan, 1.0]))


# Faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("real", [False, True], ids=["synthetic", "real"])
def test_each_fault_moves_its_own_metric_and_is_named(
    real: bool, request: pytest.FixtureRequest
) -> None:
    faults = script("faults")
    clip = moving(80)  # a third of it is no whole number of chunks
    if real:
        clip = read_clip(request.getfixturevalue("real_clip"), 102, 96, 8)
    base = faults.noisy(clip)
    floors, results = faults.matrix(clip, base)
    assert not list(diagnose(faults.measured(clip, base)))
    for fault, result in results.items():
        own = faults.OWN[fault]
        times = {name: abs(result.values[name]) / floor for name, floor in floors.items()}
        assert times[own] >= 5, (fault, times)
        for other in ("luma_drift", "chroma_drift", "period_strength"):
            if other != own:
                assert times[other] < 1.5, (fault, other, times)
        lines = list(diagnose(result))
        assert lines and lines[0].startswith(faults.NAMED[fault]), (fault, lines)


def distortions(frames: Uint8Frames) -> dict[str, Uint8Frames]:
    """The flicker of 6 percent, and four others at the same PSNR."""
    from torch.nn.functional import conv2d, pad

    drawn = np.random.default_rng(0)
    gains = drawn.uniform(-1, 1, (len(frames), 1, 1, 1))
    each, one = drawn.normal(size=frames.shape), drawn.normal(size=frames.shape[1:])

    def blurred(sigma: float) -> np.ndarray[Any, Any]:
        places = torch.arange(-4.0, 5.0)
        weights = torch.exp(-0.5 * (places / max(sigma, 1e-3)) ** 2)
        kernel = torch.outer(weights, weights)
        kernel = (kernel / kernel.sum()).expand(3, 1, -1, -1)
        x = conv2d(pad(tensors(frames), (4, 4, 4, 4), mode="reflect"), kernel, groups=3)
        return np.asarray(x.permute(0, 2, 3, 1).numpy())

    whole: dict[str, Callable[[float], Any]] = {
        "blur": lambda x: blurred(x * 4),
        "gain": lambda x: frames * (1 + x / 4),
        "static noise": lambda x: frames + 40 * x * one,
        "noise": lambda x: frames + 40 * x * each,
    }
    made = {"flicker": to_bytes8(frames * (1 + 0.06 * gains))}
    aim = psnr(frames, made["flicker"])
    for name, of in whole.items():
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            above = psnr(frames, to_bytes8(of(middle))) > aim
            low, high = (middle, high) if above else (low, middle)
        made[name] = to_bytes8(of((low + high) / 2))
    return made


@pytest.mark.slow
def test_metrics_order_distortions_of_equal_psnr() -> None:
    """flicker by how much moves, cvvdp by what is seen: whole frames that flicker are worst."""
    path = SHARED / "clips/eval/foreman_cif.mp4"
    if not path.exists():
        pytest.skip("the evaluation clips are not beside this checkout")
    clip = read_clip(path, 30)
    made = distortions(clip)
    by_flicker = sorted(made, key=lambda name: -flicker(clip, made[name]))
    assert by_flicker == ["flicker", "noise", "blur", "gain", "static noise"]
    try:
        jods = {n: found(perceptual.Cvvdp(30.0), clip, x)["cvvdp"] for n, x in made.items()}
    except measures.NotMeasuredError as error:
        pytest.skip(str(error))
    assert sorted(made, key=jods.__getitem__) == [
        "flicker",
        "static noise",
        "blur",
        "noise",
        "gain",
    ]


# Codecs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal_mode": True}], ids=str)
def test_a_streamed_model_is_the_whole_one(options: dict[str, Any]) -> None:
    model = awake(**options)
    frames = noisy(moving(19, 19, 37), 20)
    whole = model.predict(to_pixels(pad_frames(frames, 2)).double())[0, :, :, :19, :37]
    given = run_codec(ModelCodec(model), frames)
    assert difference(given, ((whole + 1) * 127.5).transpose(0, 1)) < 1e-5


def test_clips_and_single_frames_know_nothing_of_each_other() -> None:
    model, frames = awake(), noisy(moving(7, 16, 24), 20)
    for length in (1, 3):
        parts = [frames[i : i + length] for i in range(0, 7, length)]
        apart = [run_codec(ModelCodec(model), part) for part in parts]
        assert difference(run_codec(ModelCodec(model, length), frames), torch.cat(apart)) < 1e-5
    assert (
        difference(run_codec(ModelCodec(model, 1), frames), run_codec(ModelCodec(model), frames))
        > 0.01
    )


@pytest.mark.parametrize("count", [1, 5, 7, 8])
def test_the_last_frame_is_repeated_for_latents_of_several(count: int) -> None:
    model = wan_model("Wan 2.1").float()
    frames = moving(count, 16, 24)
    filled = np.concatenate([frames, *[frames[-1:]] * (-(count - 1) % 4)])
    whole = model.predict(to_pixels(pad_frames(filled, 8)))[0, :, :count, :16, :24]
    given = run_codec(ModelCodec(model), frames)
    assert len(given) == count
    assert difference(given, ((whole + 1) * 127.5).transpose(0, 1)) < 1e-4


def test_diffusers_own_code_gives_our_numbers(tmp_path: Path) -> None:
    frames = noisy(moving(6, 16, 24), 20)
    image = TemporalVAE(
        base_channels=8, channel_multipliers=(1, 2), num_temporal_layers=0, norm_groups=4, seed=0
    )
    svd_model().float().save_pretrained(tmp_path / "svd")
    models = [wan_model("Wan 2.1").float(), image, TemporalVAE.from_pretrained(tmp_path / "svd")]
    for index, model in enumerate(models):
        folder = tmp_path / str(index)
        model.save_pretrained(folder, format="diffusers")
        theirs = DiffusersCodec.load(str(folder), torch.float32, torch.device("cpu"))
        ours = run_codec(ModelCodec(model), frames).clamp(0, 255)
        assert difference(run_codec(theirs, frames).clamp(0, 255), ours) < 1e-3


def test_what_is_no_folder_of_diffusers_says_so(tmp_path: Path) -> None:
    args = torch.float32, torch.device("cpu")
    with pytest.raises(ValueError, match="names a class"):
        DiffusersCodec.load(str(tmp_path), *args)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="no VAE"):
        DiffusersCodec.load(str(tmp_path), *args)


@pytest.mark.parametrize("name", ["Wan 2.1", "awake"])
def test_noise_on_pieces_is_noise_on_the_whole(name: str) -> None:
    model = wan_model(name).float() if name != "awake" else awake(torch.float32)
    frames, shares = moving(13, 16, 24), (0.0, 0.2)
    whole = decoded_perturbed(model, frames, shares)
    pieces = list(ModelCodec(model).perturbed(iter(frames), shares))
    for index, expected in enumerate(whole):
        given = torch.stack([each[index] for each in pieces]).round().clamp(0, 255)
        assert (given - tensors(expected)).abs().max() <= 1
    assert psnr(whole[0], whole[1]) < 60
    with torch.no_grad():
        latent = model.encode(to_pixels(frames), sample_mode=False)
    (louder,) = perturbations(model, latent, [0.5], torch.Generator().manual_seed(0))
    added = model.scale_latent(louder) - model.scale_latent(latent)
    assert float(added.std()) == pytest.approx(0.5, rel=0.2)


def test_linear_baselines_of_blocks_in_time() -> None:
    clip = moving(13, 40, 52)
    assert (ROOT / "src/temporal_vae/weights/linear_baseline.safetensors").stat().st_size <= 300_000
    quality = {}
    for name, (numbers, frames) in KINDS.items():
        bundled = LinearBaseline.bundled(name)
        assert bundled.frames == frames and len(bundled.basis) == numbers * frames
        given = run_codec(LinearCodec(bundled), clip)
        assert (given.round().clamp(0, 255) - tensors(bundled(clip))).abs().max() == 0
        quality[name] = psnr(clip, bundled(clip))
    assert quality["4"] < quality["4x4"] < quality["16x4"]
    still = LinearBaseline.fit([np.repeat(noisy(moving(1)), 8, 0)], 48, 4)
    assert len(still.mean) == 768
    with pytest.raises(ValueError, match="no baseline pca:5: take one of pca:4, pca:16"):
        LinearBaseline.bundled("5")


def test_fitted_baselines_come_back_from_their_file(tmp_path: Path) -> None:
    frames = [noisy(moving(8, 32, 32), 30)]
    fitted = baseline.fit_all(frames)
    baseline.write(fitted, tmp_path / "b.safetensors")
    stored = LinearBaseline.read(tmp_path / "b.safetensors", "4x4")
    assert np.allclose(stored.basis, fitted["4x4"].basis, atol=1e-3)
    direct = LinearBaseline.fit(frames, 16, 4)
    assert np.allclose(direct.deviation, fitted["4x4"].deviation)


# Clips -----------------------------------------------------------------------------------------


class Halved:
    """Takes three frames ahead, and halves the contrast."""

    can_be_perturbed = can_be_repeated = True

    def __init__(self, bad: Sequence[int] = ()):
        self.bad, self.given = bad, 0

    def __call__(self, frames: Iterator[Uint8Frames]) -> Iterator[Tensor]:
        return (ours for (ours,) in self.perturbed(frames, (0.0,)))

    def perturbed(
        self, frames: Iterator[Uint8Frames], shares: Sequence[float]
    ) -> Iterator[list[Tensor]]:
        ahead: list[Tensor] = []
        for frame in frames:
            ours = 64 + torch.from_numpy(frame).permute(2, 0, 1).float() / 2
            if self.given + len(ahead) in self.bad:
                ours[0, 3, 5] = torch.nan
            ahead.append(ours)
            if len(ahead) > 3:
                self.given += 1
                yield [ahead.pop(0)] * len(shares)
        for ours in ahead:
            yield [ours] * len(shares)


def test_rounds_are_one_after_the_other() -> None:
    frames = noisy(moving(9, 16, 24), 30)
    recorders = [clips.Recorder(clips.SHORT) for _ in range(3)]
    clips.repeated(iter(frames), Halved(), recorders)
    once = frames
    for recorder in recorders:
        once = to_bytes8(64 + once.astype(np.float32) / 2)
        assert recorder.found().values["psnr"] == pytest.approx(psnr(frames, once), abs=1e-5)
        assert recorder.count == 9


def test_no_more_frames_are_held_than_a_codec_takes_ahead() -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def frames() -> Iterator[Uint8Frames]:
        nonlocal most
        for index in range(200):
            frame = np.full((16, 16, 3), index, np.uint8)
            alive.append(weakref.ref(frame))
            most = max(most, sum(ref() is not None for ref in alive))
            yield frame

    names = [name for name in clips.STANDARD if name not in ("cvvdp", "vmaf")]
    clips.repeated(frames(), Halved(), [clips.Recorder(clips.Conditions(25).makes(names))])
    assert most <= 8


def test_what_is_not_a_number_is_counted_and_never_averaged_away(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", moving(9, 16, 24))
    makes = {name: clips.CHEAP[name] for name in ("psnr", "ssim", "flicker", "drift", "ends")}
    result = clips.measure_clip(
        lambda: VideoReader(path), Halved([4]), clips.PROTOCOLS["quick"], lambda: None, makes
    )
    assert result.bad_frames == (4,) and result.bad_values == 1
    assert [math.isnan(x) for x in result.frames["psnr"]] == [i == 4 for i in range(9)]
    for name in ("psnr", "ssim", "flicker", "luma_drift", "first_frame_gap"):
        assert math.isnan(result.values[name]), name
    assert result.diagnosis[0].startswith(
        "not a number: 1 values in 1 frames, the first one frame 4"
    )
    fine = clips.measure_clip(
        lambda: VideoReader(path), Halved(), clips.PROTOCOLS["quick"], lambda: None, makes
    )
    both = [clips_result(name, model) for name, model in (("a", result), ("b", fine))]
    noisy_alone = [Halved(), Halved([2])]  # a pass for itself, one for its noise
    codec: Any = type("Codec", (Halved,), {
        "__call__": lambda _, frames: noisy_alone[0](frames),
        "perturbed": lambda _, frames, shares: noisy_alone[1].perturbed(frames, shares),
    })()  # fmt: skip
    protocol = replace(clips.PROTOCOLS["quick"], shares=(0.4,))
    under_noise = clips.measure_clip(
        lambda: VideoReader(path), codec, protocol, lambda: None, makes
    )
    assert under_noise.bad_values == 0 and math.isnan(under_noise.values["psnr/noise 0.4"])
    assert under_noise.diagnosis[-1].startswith("noise 0.4: not a number: 1 values in 1 frames")
    stored = Evaluation({}, ("m",), both).to_json()
    assert stored["mean"]["m"]["psnr"] == {"mean": None, "low": None, "high": None, "clips": 2}
    json.dumps(stored, allow_nan=False)


def test_a_number_that_is_none_is_seen_where_nothing_is_found_again() -> None:
    frames = [moving(1, 48, 64)[0]] * 2
    frames[1] = frames[1].copy()
    frames[1][20:28, 20:28] = 255 - frames[1][20:28, 20:28]  # was not there before
    measure = measures.WarpError()
    for index, frame in enumerate(frames):
        original = torch.from_numpy(frame.copy()).permute(2, 0, 1).float()
        ours = original + 1
        if index:
            ours[:, 24, 24] = torch.nan
        measure.add(measures.Pair(original, ours))
    assert math.isnan(measure.found().values["warp_error"])


def clips_result(name: str, model: Any) -> Any:
    from temporal_vae.evaluation.results import ClipResult

    return ClipResult(name, name, 9, 24, 16, 25.0, {"m": model})


# The command -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for index, size in enumerate(((24, 32), (32, 24))):
        write(tmp_path / "clips" / f"{index}.mkv", moving(12, *size))
    return tmp_path


def test_evaluate_gives_numbers_by_frame_clip_and_set(
    folder: Path, run: Run, small_model: Path
) -> None:
    out = folder / "out.json"
    names = [str(small_model), f"frames:{small_model}", "pca:4", "pca:4x4"]
    words = [word for name in names for word in ("--model", name)]
    done = run("evaluate", folder / "clips", *words, "--json", out, "--frames", 7)
    assert done.returncode == 0, done.stderr
    stored = json.loads(out.read_text())
    assert [clip["frames"] for clip in stored["clips"]] == [7, 7]
    assert [(clip["width"], clip["height"]) for clip in stored["clips"]] == [(32, 24), (24, 32)]
    for clip in stored["clips"]:
        assert list(clip["models"]) == names
        for model in clip["models"].values():
            for key in ("psnr", "ssim", "flicker", "luma_drift", "chroma_drift"):
                assert isinstance(model[key], float)
            assert len(model["per_frame"]["psnr"]) == 7
            assert ("warp_error" in model) != ("warp_error" in model["missing"])
            assert model["seconds"] >= 0 and model["bad_values"] == 0
    psnrs = [clip["models"]["pca:4"]["psnr"] for clip in stored["clips"]]
    mean = stored["mean"]["pca:4"]["psnr"]
    assert mean["mean"] == pytest.approx(np.mean(psnrs))
    assert mean["low"] < mean["mean"] < mean["high"] and mean["clips"] == 2
    assert "Student" in stored["interval"] and stored["protocol"]["display"] == "standard_4k"
    assert "pca:4x4" in done.stdout and "in brackets: 95 %" in done.stderr
    assert "ms_ssim: it needs frames of more than 160 pixels" in done.stderr
    assert "fvd: FVD needs" in done.stderr


def test_the_full_protocol_says_its_cost_and_has_curves(
    folder: Path, run: Run, small_model: Path
) -> None:
    out, clip = folder / "out.json", folder / "clips" / "0.mkv"
    done = run("evaluate", clip, "--model", small_model, "--model", "pca:4", "--protocol", "full",
               "--json", out, "--frames", 5)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("tvae: full decodes each frame 7 times")
    model = json.loads(out.read_text())["clips"][0]["models"]
    assert list(model) == [str(small_model), "pca:4", f"frames:{small_model}"]
    for each in model.values():
        for share in ("0.1", "0.2", "0.4"):
            assert {f"psnr/noise {share}", f"flicker/noise {share}"} <= set(each)
        assert {f"psnr/round {n}" for n in (2, 3, 4)} <= set(each)
    linear = model["pca:4"]
    assert linear["psnr"] > linear["psnr/noise 0.1"] > linear["psnr/noise 0.4"]
    assert linear["psnr/round 4"] == pytest.approx(linear["psnr"], abs=0.1)  # a projection


@pytest.mark.parametrize(
    ("own", "words", "seen"),
    [(64, (), 64), (320, (), 256), (64, ("--width", "128"), 128), (320, ("--width", "128"), 128)],
)
def test_no_clip_is_enlarged_unless_asked_for(
    tmp_path: Path, run: Run, own: int, words: tuple[str, ...], seen: int
) -> None:
    clip, result = write(tmp_path / "a.mkv", moving(2, 48, own)), tmp_path / "a.json"
    done = run(
        "evaluate", clip, "--model", "pca:4", "--protocol", "quick", "--json", result, *words
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(result.read_text())["clips"][0]["width"] == seen


def test_a_video_is_a_reconstruction(folder: Path, run: Run) -> None:
    clip = folder / "clips" / "0.mkv"
    shorter = write(folder / "short.mkv", moving(11, 24, 32))
    done = run("evaluate", clip, "--model", f"video:{clip}", "--protocol", "quick")
    assert done.returncode == 0 and "100.00" in done.stdout
    turned = folder / "clips" / "1.mkv"
    for other, words in ((shorter, "ends after 11 frames"), (turned, "24x32 and the clip 32x24")):
        done = run("evaluate", clip, "--model", f"video:{other}", "--model", "pca:4")
        assert done.returncode == 1 and words in done.stderr and "1 of 2 failed" in done.stderr
        assert "pca:4" in done.stdout
    done = run("evaluate", shorter, "--model", f"video:{clip}")
    assert done.returncode == 1 and "has more frames than the 11" in done.stderr


def test_bad_input_is_one_sentence(folder: Path, run: Run) -> None:
    (folder / "clips" / "broken.mp4").write_bytes(b"no video")
    one = write(folder / "one.mkv", moving(1, 24, 32))
    out = folder / "out.json"
    done = run("evaluate", folder / "clips", one, "--model", "pca:4", "--json", out)
    assert done.returncode == 1 and "1 of 4 failed" in done.stderr
    stored = json.loads(out.read_text())
    assert list(stored["failed"]) == [str(folder / "clips" / "broken.mp4")]
    assert len(stored["clips"]) == 3
    assert stored["mean"]["pca:4"]["psnr"]["clips"] == 3
    assert stored["mean"]["pca:4"]["flicker"]["clips"] == 2
    assert (
        stored["clips"][2]["models"]["pca:4"]["missing"]["flicker"] == "one frame does not change"
    )
    for words, message in (
        (["--protocol", "fast"], "--protocol must be one of quick, standard, full"),
        (["--model", "pca:7"], "no baseline pca:7"),
        (["--lpips-heads", "x"], "LPIPS needs both"),
        (["--model", "nobody-knows"], "nobody-knows"),
    ):
        done = run("evaluate", one, *words)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_missing_packages_are_named_with_their_line(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cv2", "pycvvdp", "vmaf_torch", "torchmetrics.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    done = run("evaluate", folder / "clips" / "0.mkv", "--model", "pca:4")
    assert done.returncode == 0, done.stderr
    for extra in ("cvvdp", "vmaf", "report"):
        assert f"pip install 'temporal-video-vae[{extra}]'" in done.stderr
    assert "psnr, ssim" in done.stderr and "no number" not in done.stdout


def test_baselines_can_be_fitted_anew(folder: Path, run: Run) -> None:
    out = folder / "out.json"
    clip = folder / "clips" / "0.mkv"
    values = []
    for words in ([], ["--baseline-fit", folder / "clips"]):
        done = run("evaluate", clip, "--model", "pca:4", "--json", out, *words)
        assert done.returncode == 0, done.stderr
        values.append(json.loads(out.read_text())["mean"]["pca:4"]["psnr"]["mean"])
    assert values[1] > values[0] + 1


def test_compare_shows_both_and_what_is_between(folder: Path, run: Run) -> None:
    a, out = folder / "clips" / "0.mkv", folder / "side.mkv"
    b = write(folder / "b.mkv", to_bytes8(moving(12, 24, 32) + 4.0))
    done = run("compare", a, b, out)
    assert done.returncode == 0, done.stderr
    frames = read_clip(out)
    first = moving(12, 24, 32)
    assert frames.shape[0] == 12 and frames.shape[2] == 96
    assert np.array_equal(frames[3, -24:, :32], first[3])
    assert np.array_equal(frames[3, -24:, 32:64], to_bytes8(first[3] + 4.0))
    assert (frames[3, -24:, 64:] == 32).mean() > 0.9
    assert run("compare", a, b, folder / "wipe.mkv", "--wipe").returncode == 0
    wiped = read_clip(folder / "wipe.mkv")
    assert wiped.shape[2] == 32 and not np.array_equal(wiped[0, -24:], first[0])
    for other, words in (
        (folder / "clips" / "1.mkv", "give --size"),
        (write(folder / "short.mkv", moving(5, 24, 32)), "ends after 5 frames"),
    ):
        done = run("compare", a, other, folder / "x.mkv")
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
        assert not (folder / "x.mkv").exists()


def test_a_wipe_goes_from_side_to_side() -> None:
    a, b = (np.full((20, 40, 3), value, np.uint8) for value in (10, 200))
    layout = compare.Layout(("a", "b"), wipe=True)
    shares = [
        (layout.frame(a, b, seconds)[-20:] == 10).mean()
        for seconds in (0, compare.WIPE_SECONDS / 2, compare.WIPE_SECONDS, 2 * compare.WIPE_SECONDS)
    ]
    assert shares[0] == 0 and 0.4 < shares[1] < 0.6 and shares[2] > 0.9 and shares[3] == 0


def test_reconstruct_measures_and_shows_its_result(
    folder: Path, run: Run, small_model: Path
) -> None:
    a, out = folder / "clips" / "0.mkv", folder / "r.mkv"
    done = run("reconstruct", a, out, "--model", small_model, "--json", "--metrics",
               "--compare", folder / "side.mkv", "--frames", 5)  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    frames = moving(12, 24, 32)[:5]
    assert row["psnr"] == pytest.approx(psnr(frames, read_clip(out)), abs=1e-4)
    assert row["flicker"] == pytest.approx(flicker(frames, read_clip(out)), abs=1e-4)
    assert 0 <= row["ssim"] <= 1
    assert read_clip(folder / "side.mkv").shape[2] == 96
    done = run("reconstruct", a, "-", "--model", small_model, "--metrics")
    assert done.returncode == 1


def test_a_comparison_replaces_no_video_that_is_compared_or_there(
    folder: Path, run: Run, small_model: Path
) -> None:
    a, b = folder / "clips" / "0.mkv", folder / "clips" / "1.mkv"
    kept = a.read_bytes(), b.read_bytes()
    new = folder / "new.mkv"
    for words, says in (
        (("compare", a, b, a), "one of the videos that are compared"),
        (("compare", a, a, b), "give --overwrite"),
        (("compare", a, b, b, "--overwrite"), "one of the videos that are compared"),
        (("reconstruct", a, new, "--model", small_model, "--compare", a), "are compared"),
        (("reconstruct", a, new, "--model", small_model, "--compare", new), "are compared"),
        (("reconstruct", a, new, "--model", small_model, "--compare", b), "give --overwrite"),
    ):
        done = run(*words)
        assert done.returncode == 1 and says in done.stderr, done.stderr
    assert (a.read_bytes(), b.read_bytes()) == kept and not new.exists()


def test_heavy_packages_are_imported_when_they_are_needed() -> None:
    code = (
        "import sys; from temporal_vae.cli import evaluation, comparing\n"
        "print('torch' in sys.modules)\n"
        "import temporal_vae.evaluation.clips, temporal_vae.evaluation.compare\n"
        "heavy = {'torchmetrics', 'cv2', 'pycvvdp', 'vmaf_torch', 'PIL', 'diffusers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "[]"]
