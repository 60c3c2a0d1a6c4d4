"""The training loop, on clips made here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_video import noise, smooth, write

from temporal_vae import TemporalVAE, TemporalVAEConfig
from temporal_vae.training import loop
from temporal_vae.training.data import BatchShape, draw_batch

RECIPE = """
seed = 0
save_minutes = 0
[data]
exclude = ["skip_*"]
widths = [48]
[[stage]]
name = "frames"
minutes = 0.004
temporal = false
learning_rate = 1e-3
batches = [[1.0, 2, 1, 32]]
[[stage]]
name = "clips"
minutes = 0.008
temporal = true
learning_rate = 1e-3
batches = [[0.5, 1, 3, 32], [0.5, 2, 1, 32]]
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TemporalVAEConfig(base_channels=8, channel_multipliers=(1, 2))
    monkeypatch.setattr(TemporalVAEConfig, "tiny", lambda: layout)


def test_batches() -> None:
    rng, clips = np.random.default_rng(0), [smooth(5, 40, 60), noise(2, 33, 36)]
    for shape in (BatchShape(3, 1, 32), BatchShape(2, 4, 33), BatchShape(40, 2, 40)):
        batch = draw_batch(clips, shape, rng)
        assert batch.shape == (shape.samples, 3, shape.frames, shape.crop, shape.crop)
        assert batch.abs().max() <= 1
    assert not torch.equal(draw_batch(clips, shape, rng), draw_batch(clips, shape, rng))


def test_loss_falls() -> None:
    model = TemporalVAE.from_config(TemporalVAEConfig.tiny(), seed=0)
    optimizers = loop.Optimizers(model, 2e-3)
    rng, clips = np.random.default_rng(0), [smooth(6, 40, 60)]
    errors = [
        loop.train_step(model, optimizers, draw_batch(clips, BatchShape(2, 3, 32), rng), 1e-3, 2e-3)
        for _ in range(24)
    ]
    first, last = (np.mean([e["error"] for e in part]) for part in (errors[:6], errors[-6:]))
    assert last < 0.7 * first


def test_the_image_twin_shares_its_parameters() -> None:
    model = TemporalVAE.from_config(TemporalVAEConfig.tiny(), seed=0)
    twin = loop.image_twin(model)
    ours = dict(model.named_parameters())
    assert all(ours[name] is parameter for name, parameter in twin.named_parameters())
    assert {n for n in ours if "temporal" not in n} == {n for n, _ in twin.named_parameters()}


def test_both_optimizers_see_every_parameter_once() -> None:
    model = TemporalVAE.from_config(TemporalVAEConfig.tiny(), seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = loop.Optimizers(model, 1e-2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers.step(1e-2)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_recipe_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "skip_b"):
        write(tmp_path / f"{name}.mp4", smooth(5, 48, 64))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    arguments = [str(tmp_path / "recipe.toml"), "--clips", str(tmp_path), "--out"]
    loop.main([*arguments, str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "reading a" in said and "skip_b" not in said
    trained = TemporalVAE.from_pretrained(tmp_path / "out")
    fresh = TemporalVAE.from_config(trained.config, seed=0)
    for name in ("encoder.conv_in.weight", "decoder.mid_block.temporals.0.0.conv2.weight"):
        assert not torch.equal(trained.state_dict()[name], fresh.state_dict()[name])
    loop.main([*arguments, str(tmp_path / "more"), "--start", str(tmp_path / "out")])
    again = TemporalVAE.from_pretrained(tmp_path / "more")
    assert replace(again.config, latent_scale_factor=1.0) == replace(
        trained.config, latent_scale_factor=1.0
    )


def test_the_latent_scale_is_measured() -> None:
    model = TemporalVAE.from_config(TemporalVAEConfig.tiny(), seed=0)
    rng, clips = np.random.default_rng(0), [noise(9, 80, 80)]
    scale = loop.latent_scale(model, clips, rng)
    latent = model.encode(draw_batch(clips, BatchShape(4, 8, 64), rng)).detach()
    assert float(latent.square().mean().sqrt()) * scale == pytest.approx(1, abs=0.1)


def test_the_learning_rate_warms_up_and_falls() -> None:
    stage = loop.Stage(name="a", minutes=1, shapes=(), chances=(), temporal=True, learning_rate=1.0)
    rates = [loop.learning_rate(stage, p, 1000) for p in (0.0, 0.5, 1.0, 2.0)]
    assert rates == pytest.approx([1.0, 0.51, 0.02, 0.02])
    assert loop.learning_rate(stage, 0.0, 0) == pytest.approx(0.02)
    assert loop.learning_rate(replace(stage, final_rate=0.5), 1.0, 99) == pytest.approx(0.5)
