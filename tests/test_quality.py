"""Metrics, pictures, the linear baseline, and what the bundled weights reach."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED, difference, pixels
from PIL import Image

from temporal_vae import TemporalVAE
from temporal_vae.evaluation import metrics, pictures
from temporal_vae.evaluation.baseline import LinearBaseline
from temporal_vae.evaluation.evaluate import evaluate, mean_scores, reconstruct_frames
from temporal_vae.evaluation.perturbed import decoded_perturbed
from temporal_vae.video import Uint8Frames, read_clip, to_bytes, to_pixels

FLAT = [0, 128, 255]
TINY_ENCODER = "eae46e4617dc102a623166bca2ed42df2e22cac847ff89aac2301c9bcca801d2"


def clip(frames: int = 6, height: int = 32, width: int = 48) -> Uint8Frames:
    return to_bytes(pixels(frames, height, width).float())


def test_psnr_is_its_definition() -> None:
    a = clip()
    b = a.copy()
    b[0] = 255 - b[0]
    b[1:] ^= 1
    error = (a.astype(float) - b) ** 2
    expected = np.mean([10 * math.log10(255**2 / error[t].mean()) for t in range(len(a))])
    assert metrics.psnr(a, b) == pytest.approx(expected, abs=1e-4)
    assert metrics.psnr(a, a) == metrics.PSNR_CEILING


def test_flicker_counts_what_moves_and_nothing_else() -> None:
    a = clip() // 2 + 60
    static = a + 9
    shaken = a.copy()
    shaken[::2] += 9
    assert metrics.flicker(a, a) == metrics.flicker(a, static) == 0
    assert metrics.flicker(a, shaken) == pytest.approx(9)
    assert metrics.flicker(a[:1], shaken[:1]) == 0
    assert metrics.psnr(a, static) < metrics.psnr(a, shaken)  # which PSNR cannot see


def test_scores() -> None:
    a = clip()
    same, other = metrics.score(a, a), metrics.score(a, a[::-1].copy())
    assert same.ssim == pytest.approx(1)
    assert other.ssim < 0.5 and other.flicker > 10 and other.psnr < 15
    with pytest.raises(ValueError, match="one shape"):
        metrics.score(a, a[:, :-1])


def test_a_time_slice_is_a_column_over_time() -> None:
    a = clip(6, 32, 48)
    assert np.array_equal(pictures.time_slice(a, 5), a[:, :, 5].transpose(1, 0, 2))
    wide = pictures.time_slice(a, width=12)
    assert wide.shape == (32, 12, 3)
    assert np.array_equal(wide[:, ::2], pictures.time_slice(a))


def test_a_poster_holds_its_panels(tmp_path: Path) -> None:
    """Of any size; and all its words, on as many lines as they need, below one another."""
    a, b = clip(), clip()[::-1].copy()
    middle, path = len(a) // 2, tmp_path / "a.png"
    rows = [
        [pictures.Panel(a[middle], "one"), pictures.Panel(b[middle], "two\nlines")],
        [pictures.Panel(pictures.time_slice(a, width=48), "three")],
    ]
    short, long = (
        pictures.poster("title", [pictures.Section("heading", text, rows)], "foot")
        for text in ("words", "words " * 40)
    )
    assert long.height > short.height + 100 and long.width == short.width
    short.save(path)
    sheet = np.asarray(Image.open(path))
    assert np.array_equal(sheet, np.asarray(short)) and (sheet[-3:] == 255).all()
    for panel in (a[middle], b[middle], pictures.time_slice(a, width=48)):
        found = np.lib.stride_tricks.sliding_window_view(sheet, (32, 1, 3))
        assert (found[:, :, 0, :, 0] == panel[:, 0]).all((2, 3)).any(), "a panel is missing"
    difference = np.abs(a[middle].astype(int) - b[middle]) * 2
    assert np.array_equal(pictures.amplified_difference(a, b, 2)[middle], difference.clip(0, 255))


def test_the_linear_baseline_is_a_projection() -> None:
    baseline = LinearBaseline.fit([clip(4, 64, 64)], 4)
    assert np.allclose(baseline.basis @ baseline.basis.T, np.eye(4), atol=1e-5)
    once = baseline(clip(4, 64, 64))
    assert np.abs(baseline(once).astype(int) - once).max() <= 1
    everything = LinearBaseline.fit([clip(4, 64, 64)], 192)
    assert np.array_equal(everything(clip(4, 64, 64)), clip(4, 64, 64))


def test_noise_on_the_linear_baseline_has_the_stated_deviation() -> None:
    frames = clip(4, 64, 64)
    baseline = LinearBaseline.fit([frames], 4)
    added = baseline(frames, 0.1).astype(float) - baseline(frames)
    expected = 0.1 * np.sqrt((baseline.deviation**2).sum() / 192)
    assert np.sqrt((added**2).mean()) == pytest.approx(expected, rel=0.15)  # 8-bit, clipped
    numbers = numbers_of(frames, baseline)
    assert np.allclose(numbers.std(0), baseline.deviation, rtol=1e-3)


def numbers_of(frames: Uint8Frames, baseline: LinearBaseline) -> np.ndarray[Any, Any]:
    """The numbers that the baseline keeps of each block."""
    blocks = frames.reshape(4, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 192)
    return (blocks - baseline.mean) @ baseline.basis.T


def test_the_linear_baseline_is_the_best_of_its_kind() -> None:
    """No other four directions explain more of the data it was fitted to."""
    frames = [clip(4, 64, 64)]
    frames[0][..., 1:] = frames[0][..., :1]  # some structure to find
    baseline = LinearBaseline.fit(frames, 4)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(192, 4)))[0].T.astype(np.float32)
    other = LinearBaseline(baseline.mean, basis, baseline.deviation)
    assert metrics.psnr(frames[0], baseline(frames[0])) > metrics.psnr(frames[0], other(frames[0]))


@pytest.fixture(scope="module")
def tiny() -> TemporalVAE:
    return TemporalVAE.from_pretrained("tiny")


@pytest.mark.parametrize("level", FLAT)
def test_flat_clips_come_back(tiny: TemporalVAE, level: int) -> None:
    flat = np.full((4, 48, 64, 3), level, np.uint8)
    assert np.abs(reconstruct_frames(flat, tiny).astype(float) - flat).mean() <= 2


def test_a_fade_comes_back(tiny: TemporalVAE) -> None:
    levels = np.linspace(0, 255, 25).round().astype(np.uint8)
    fade = np.broadcast_to(levels[:, None, None, None], (25, 64, 96, 3)).copy()
    assert np.abs(reconstruct_frames(fade, tiny).astype(float) - fade).mean() <= 2


def test_the_bundled_decoder_is_awake(tiny: TemporalVAE) -> None:
    """Two frames swapped change the others and themselves by more than the swap; see `awake`."""
    latent = tiny.encode(pixels(5, 32, 32).float(), sample_mode=False)
    order = [1, 0, 2, 3, 4]
    swapped = tiny.decode(latent[:, :, order])[:, :, order]
    assert difference(swapped, tiny.decode(latent)) > 0.01


@pytest.mark.parametrize("name", ["tiny", "tiny-frames"])
def test_the_bundled_encoder_is_the_one_that_latents_were_made_with(name: str) -> None:
    """Files of latents name it by this hash, and diffusion models may have been trained on it."""
    record = TemporalVAE.from_pretrained(name).latent_record()
    assert record.encoder_sha256 == TINY_ENCODER
    assert record.scale_factor == 0.3461


def test_the_bundled_causal_model_gives_each_frame_at_once_from_the_past_alone() -> None:
    vae = TemporalVAE.from_pretrained("tiny-causal")
    assert vae.config.causal_mode and vae.encode_reach == 0
    latent = vae.encode(pixels(4, 32, 32).float(), sample_mode=False).detach()
    whole = vae.decode(latent).detach()
    stream = vae.decode_stream()
    pieces = [stream.push(latent[:, :, t : t + 1]) for t in range(4)]
    assert all(piece is not None and piece.shape[2] == 1 for piece in pieces)
    streamed = torch.cat([piece.detach() for piece in pieces if piece is not None], 2)
    assert difference(streamed, whole) < 1e-4
    swapped = vae.decode(latent[:, :, [1, 0, 2, 3]])[:, :, 2:]
    assert difference(swapped.detach(), whole[:, :, 2:]) > 0.005  # awake: the past is seen


def test_the_bundled_model_of_wans_kind_streams_and_is_above_a_matrix(real_clip: Path) -> None:
    """Its linear counterpart has as many numbers a frame, of single frames."""
    vae = TemporalVAE.from_pretrained("tiny-wan").float().requires_grad_(False)
    frames = read_clip(real_clip, frames=9, width=192, multiple=8)
    video = to_pixels(frames)
    latent = vae.encode(video, sample_mode=False)
    assert latent.shape[2] == vae.latent_frames(9) == 3
    scaled = vae.scale_latent(latent).transpose(0, 1).flatten(1)
    assert 0.3 < float(scaled.std(1).mean()) < 2
    whole = vae.decode(latent)
    stream = vae.decode_stream()
    pieces = [stream.push(latent[:, :, t : t + 1]) for t in range(3)]
    assert [0 if piece is None else piece.shape[2] for piece in pieces] == [1, 4, 4]
    assert difference(torch.cat([p for p in pieces if p is not None], 2), whole) < 1e-4
    swapped = vae.decode(latent[:, :, [0, 0, 2]])[:, :, 5:]
    assert difference(swapped, whole[:, :, 5:]) > 0.005  # awake: the past is seen
    made = to_bytes(whole.clamp(-1, 1))
    assert metrics.psnr(frames, made) > metrics.psnr(frames, LinearBaseline.bundled()(frames)) + 1


def test_latents_have_unit_variance_after_scaling(tiny: TemporalVAE, real_clip: Path) -> None:
    frames = read_clip(real_clip, frames=4, width=256, multiple=8)
    latent = tiny.encode_video_for_diffusion(to_pixels(frames), sample_mode=False)
    assert 0.5 < float(latent.detach().std()) < 2


def test_time_steadies_perturbed_latents(tiny: TemporalVAE, real_clip: Path) -> None:
    """Against the same decoder without temporal layers: what `tiny` is trained for."""
    frames = read_clip(real_clip, frames=8, width=128, multiple=8)
    twin = TemporalVAE.from_pretrained("tiny-frames").float()
    ours, theirs = (
        metrics.score(frames, decoded_perturbed(model, frames, [0.4])[0]) for model in (tiny, twin)
    )
    assert ours.psnr > theirs.psnr and ours.flicker < 0.95 * theirs.flicker


def test_better_than_linear_on_a_real_clip(tiny: TemporalVAE, real_clip: Path) -> None:
    rows = list(evaluate([real_clip], tiny, frames=5, width=192))
    assert rows[0].model.psnr > rows[0].linear.psnr


@pytest.mark.slow
def test_better_than_linear_over_the_evaluation_clips(tiny: TemporalVAE) -> None:
    folder = SHARED / "clips/eval"
    if not folder.is_dir():
        pytest.skip("the evaluation clips are not beside this checkout")
    rows = list(evaluate(sorted(folder.glob("*.mp4")), tiny))
    model, linear = (mean_scores([getattr(r, s) for r in rows]) for s in ("model", "linear"))
    assert model.psnr > linear.psnr
    assert model.psnr >= 25.2
