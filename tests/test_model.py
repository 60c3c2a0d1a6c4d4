"""The members of `TemporalVAE`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import awake, difference, pixels
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

import temporal_vae
from temporal_vae import LatentDistribution, TemporalVAE, TemporalVAEConfig
from temporal_vae.checkpoints import pretrained

SHAPES: list[dict[str, Any]] = [
    {"channel_multipliers": multipliers, "num_temporal_layers": layers}
    for multipliers in ((1,), (2, 1), (1, 2, 4), (3, 1, 2))
    for layers in (0, 1, 2, 3)
] + [
    {"temporal_kernel_size": kernel, "causal_mode": c}
    for kernel in (1, 3, 5)
    for c in (False, True)
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (2, 3)])
def test_shapes(options: dict[str, Any], batch: int, frames: int) -> None:
    model = awake(torch.float32, **options)
    f = model.downsample_factor
    video = pixels(frames, 2 * f, 3 * f, batch=batch).float()
    latent = model.encode(video)
    assert latent.shape == (batch, 4, frames, 2, 3)
    assert model.decode(latent).shape == video.shape
    image = model.encode(video[:, :, 0], sample_mode=False)
    assert image.shape == (batch, 4, 2, 3)
    assert model.decode(image).shape == video[:, :, 0].shape


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_input_channels(channels: int) -> None:
    model = awake(input_channels=channels, causal_mode=True)
    video = pixels(channels=channels)
    assert model.predict(video).shape == video.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = awake(dtype)
    video = pixels().to(dtype)
    output = model.predict(video)
    assert output.dtype == model.dtype == dtype
    assert output.isfinite().all()
    exact = awake().predict(pixels())
    close = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.02}
    assert difference(output.double(), exact) < close[dtype]


@pytest.mark.parametrize("options", [{}, {"causal_mode": True}], ids=str)
def test_an_image_is_a_video_of_one_frame(options: dict[str, Any]) -> None:
    model = awake(**options)
    video = pixels(1, batch=2)
    posterior, image = model.encode_with_distribution(video), video[:, :, 0]
    for a, b in zip(model.encode_with_distribution(image), posterior, strict=True):
        assert torch.equal(a, b[:, :, 0])
    assert torch.equal(model.predict(image), model.predict(video)[:, :, 0])
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    a, b = model.encode(image, generator=seeded[0]), model.encode(video, generator=seeded[1])
    assert torch.equal(a, b[:, :, 0])


def test_a_batch_is_its_samples() -> None:
    model = awake()
    video = pixels(batch=3)
    singly = torch.cat([model.predict(sample) for sample in video.split(1)])
    assert difference(singly, model.predict(video)) < 1e-12


def test_frames_before_channels() -> None:
    model = awake()
    video = pixels(4, batch=2)
    other = video.transpose(1, 2)
    mean, log_variance = model.encode_with_distribution(video)
    swapped = model.encode_with_distribution(other, layout="BTCHW")
    assert torch.equal(swapped.mean.transpose(1, 2), mean)
    assert torch.equal(swapped.log_variance.transpose(1, 2), log_variance)
    assert torch.equal(
        model.decode(swapped.mean, layout="BTCHW").transpose(1, 2), model.decode(mean)
    )
    assert torch.equal(model.predict(other, layout="BTCHW").transpose(1, 2), model.predict(video))
    direct, _ = model(video, sample_posterior=False)
    reconstruction, posterior = model(other, sample_posterior=False, layout="BTCHW")
    assert torch.equal(reconstruction.transpose(1, 2), direct)
    assert posterior.mean.shape == (*other.shape[:2], 4, 8, 12)
    drawn = model.encode(video, generator=torch.Generator().manual_seed(1))
    again = model.encode(other, generator=torch.Generator().manual_seed(1), layout="BTCHW")
    assert torch.equal(again.transpose(1, 2), drawn)
    latent = model.encode_video_for_diffusion(other, False, layout="BTCHW")
    pixels_back = model.decode_video_from_diffusion(latent, layout="BTCHW")
    assert difference(pixels_back.transpose(1, 2), model.predict(video)) < 1e-12


WRONG: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("rank 3", lambda x: x[0, 0], "got .5, 16, 24."),
    ("no batch", lambda x: x[0, :, 0], r"unsqueeze\(0\)"),
    ("rank 6", lambda x: x[None], "video .B, C, T, H, W. or image"),
    ("BTCHW", lambda x: x.transpose(1, 2), "layout='BTCHW'"),
    ("BTHWC", lambda x: x.permute(0, 2, 3, 4, 1), r"permute\(0, 4, 1, 2, 3\)"),
    ("BHWC", lambda x: x[:, :, 0].permute(0, 2, 3, 1), r"permute\(0, 3, 1, 2\)"),
    ("channels", lambda x: x[:, :2], "3 channels on axis 1"),
    ("a video without batch", lambda x: x[0], r"needs its batch, video.unsqueeze\(0\)"),
    ("uint8", lambda x: (x * 100).to(torch.uint8), "127.5 - 1"),
    ("dtype", lambda x: x.float(), r"video.to\(torch.float64\)"),
    ("height", lambda x: x[..., :15, :], "multiples of 2, got 15x24: pad to 16x24.*crop to 14x24"),
    ("one pixel", lambda x: x[..., :1, :1], "pad to 2x2"),
    ("empty", lambda x: x[:, :, :0], "not be empty"),
    ("list", lambda x: x.tolist(), "torch.Tensor, got list"),
    ("device", lambda x: x.to("meta"), "on meta, the model on cpu"),
]


@pytest.mark.parametrize(("change", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_pixels_are_refused(change: Callable[[Tensor], Any], message: str) -> None:
    model = awake()
    for member in (model.encode, model.predict, model.encode_with_distribution, model):
        with pytest.raises(ValueError, match=message):
            member(change(pixels()))


def test_wrong_latents_are_refused() -> None:
    model = awake()
    latent = torch.zeros(1, 4, 5, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="latent must have 4 channels"):
        model.decode(latent[:, :3])
    with pytest.raises(ValueError, match="layout='BTCHW'"):
        model.decode(latent.transpose(1, 2))
    with pytest.raises(ValueError, match="layout='BCTHW'"):
        model.decode(latent, layout="BTCHW")
    with pytest.raises(ValueError, match="got 'THWC'"):
        model.decode(latent, layout="THWC")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"latent is torch\.float32"):
        model.decode(latent.float())


def test_autocast_may_mix_dtypes() -> None:
    model = awake(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = model(pixels().float())
        assert model.decode(model.encode(pixels().float())).shape == output.shape


def test_sampling() -> None:
    model = awake()
    mean, log_variance = model.encode_with_distribution(pixels())
    noise = model.sample(torch.zeros_like(mean), torch.zeros_like(mean), seed=5)
    expected = mean + (log_variance / 2).exp() * noise
    assert difference(model.sample(mean, log_variance, seed=5), expected) < 1e-12
    assert not torch.equal(model.sample(mean, log_variance), model.sample(mean, log_variance))
    mean.requires_grad_(), log_variance.requires_grad_()
    grads = torch.autograd.grad(
        model.sample(mean, log_variance, seed=5).sum(), [mean, log_variance]
    )
    assert torch.equal(grads[0], torch.ones_like(mean))
    torch.testing.assert_close(grads[1], noise * (log_variance / 2).exp() / 2)


def test_noise_is_drawn_frame_by_frame() -> None:
    """So that a clip encoded in pieces gets the noise of the whole."""
    zeros = torch.zeros(2, 4, 5, 3, 3)
    whole = LatentDistribution(zeros, zeros).sample(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    parts = [LatentDistribution(z, z).sample(generator) for z in zeros.split([2, 3], 2)]
    assert torch.equal(torch.cat(parts, 2), whole)
    assert abs(float(whole.std()) - 1) < 0.1


def test_bad_sampling_is_refused() -> None:
    model = awake()
    zeros = torch.zeros(1, 4, 2, 2, 2)
    with pytest.raises(ValueError, match="one shape"):
        model.sample(zeros, zeros[:, :2])
    with pytest.raises(ValueError, match="not both"):
        model.sample(zeros, zeros, seed=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="2 axes"):
        model.sample(zeros[0, 0, 0], zeros[0, 0, 0])
    with pytest.raises(ValueError, match="one shape"):
        model.kl_divergence(zeros, zeros[:, :2])
    elsewhere = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"on cuda, but latent noise .* CPU"):
        model.sample(zeros, zeros, generator=elsewhere)  # type: ignore[arg-type]


def test_seeds() -> None:
    state = torch.get_rng_state()
    a, b = (TemporalVAE(base_channels=8, seed=4) for _ in range(2))
    c = TemporalVAE(base_channels=8, seed=5)
    d, e = (TemporalVAE(base_channels=8) for _ in range(2))
    weights = [m.encoder.conv_in.weight for m in (a, b, c, d, e)]
    assert torch.equal(weights[0], weights[1])
    for i, j in ((0, 2), (0, 3), (3, 4)):
        assert not torch.equal(weights[i], weights[j])
    video = pixels(2, 16, 16).float()
    assert torch.equal(a.encode(video), b.encode(video))
    assert not torch.equal(a.encode(video), a.encode(video))
    zeros, own = torch.zeros(1, 4, 2, 2), a._generator.get_state()
    a.sample(zeros, zeros, seed=5)
    a.sample(zeros, zeros, generator=torch.Generator())
    assert torch.equal(a._generator.get_state(), own), "the model's own generator was touched"
    assert torch.equal(torch.get_rng_state(), state), "the global random state was touched"


def test_scaling() -> None:
    model = awake(latent_scale_factor=0.3, latent_shift_factor=0.7)
    latent = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(model.scale_latent(latent), (latent - 0.7) * 0.3)
    torch.testing.assert_close(model.unscale_latent(model.scale_latent(latent)), latent)
    video = pixels()
    scaled = model.encode_video_for_diffusion(video, sample_mode=False)
    assert torch.equal(scaled, model.scale_latent(model.encode(video, sample_mode=False)))
    assert difference(model.decode_video_from_diffusion(scaled), model.predict(video)) < 1e-12


def test_forward_and_predict() -> None:
    model = awake()
    video = pixels()
    generator = torch.Generator().manual_seed(2)
    reconstruction, posterior = model(video, generator=generator)
    latent = posterior.sample(torch.Generator().manual_seed(2))
    assert torch.equal(reconstruction, model.decode(latent))
    assert reconstruction.requires_grad
    plain, _ = model(video, sample_posterior=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    global_state, own_state = torch.get_rng_state(), model._generator.get_state()
    model.train()
    predicted = model.predict(video)
    assert difference(predicted, plain) < 1e-12
    assert not predicted.requires_grad
    assert model.training
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(model._generator.get_state(), own_state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_kl_divergence_is_torchs() -> None:
    mean, log_variance = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    expected = (
        torch_kl(Normal(mean, (log_variance / 2).exp()), Normal(0, 1)).flatten(1).sum(1).mean()
    )
    torch.testing.assert_close(awake().kl_divergence(mean, log_variance), expected)


def test_log_variance_is_clamped() -> None:
    moments = torch.tensor([0.0, -100.0, 0.0, 100.0]).view(1, 4, 1, 1)[:, [0, 2, 1, 3]]
    assert LatentDistribution.from_moments(moments).log_variance.flatten().tolist() == [-30.0, 20.0]


def test_properties() -> None:
    model = awake(causal_mode=True, temporal_kernel_size=5, latent_channels=6)
    assert (model.downsample_factor, model.input_channels, model.latent_channels) == (2, 3, 6)
    assert (model.is_causal, model.temporal_kernel_size) == (True, 5)
    assert model.latent_scale_factor == 0.18215
    assert model.parameter_count == sum(p.numel() for p in model.parameters())
    assert type(model.parameter_count) is int
    assert model.supports_slicing is True and model.supports_tiling is True


def test_results_share_no_storage() -> None:
    model = awake()
    video = pixels()
    mean, log_variance = model.encode_with_distribution(video)
    results = [video, mean, log_variance, model.encode(video, False), model.decode(mean)]
    results += [model.decode(mean), model.scale_latent(mean), model.predict(video)]
    pointers = {x.untyped_storage().data_ptr() for x in results}
    assert len(pointers) == len(results)
    assert all(x.is_contiguous() for x in results)


def test_a_copy_is_independent() -> None:
    model = awake()
    twin = copy.deepcopy(model)
    video = pixels()
    assert torch.equal(twin.encode(video), model.encode(video))
    with torch.no_grad():
        twin.encoder.conv_in.weight.zero_()
    assert not torch.equal(twin.predict(video), model.predict(video))


def test_save_and_load(tmp_path: Path) -> None:
    model = awake(torch.float32, latent_scale_factor=0.5)
    model.save_pretrained(tmp_path / "a" / "b")
    again = TemporalVAE.from_pretrained(tmp_path / "a" / "b")
    assert again.config == model.config
    assert torch.equal(again.predict(pixels().float()), model.predict(pixels().float()))
    half = TemporalVAE.from_pretrained(tmp_path / "a" / "b", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_loading_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a built-in one \(tiny"):
        TemporalVAE.from_pretrained(tmp_path)
    awake(torch.float32).save_pretrained(tmp_path)
    weights, config = tmp_path / pretrained.WEIGHTS_FILE, tmp_path / pretrained.CONFIG_FILE
    data, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged"):
        TemporalVAE.from_pretrained(tmp_path)
    weights.write_bytes(data)
    for bad, message in (
        ("{", "not JSON"),
        ("[]", "not a temporal_vae configuration"),
        (text.replace('"format_version": 1', '"format_version": 9'), "newer"),
        (text.replace('"model"', '"modle"'), "under 'model'"),
        (text.replace('"causal_mode"', '"casual_mode"'), "casual_mode"),
        (text.replace('"base_channels": 8', '"base_channels": 16'), "base_channels|do not fit"),
    ):
        config.write_text(bad)
        with pytest.raises(ValueError, match=message):
            TemporalVAE.from_pretrained(tmp_path)


def test_tiny_is_bundled() -> None:
    model = TemporalVAE.from_pretrained("tiny")
    assert model.config == TemporalVAEConfig.tiny()
    assert model.dtype == torch.float32
    folder = Path(temporal_vae.__file__).parent / "weights" / "tiny"
    size = (folder / pretrained.WEIGHTS_FILE).stat().st_size
    assert size <= 16 * 2**20
