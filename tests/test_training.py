"""Training: recipes, batches, the loop, runs that stop and go on, and the command."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import awake
from safetensors.torch import load_file
from test_video import noise, smooth, write
from torch import nn

from temporal_vae import TemporalVAE
from temporal_vae.cli import main
from temporal_vae.config import WanVAEConfig
from temporal_vae.training import loop, optimizers, recipe, step
from temporal_vae.training.build import build_model, image_twin
from temporal_vae.training.data import Batches, Share, in_order
from temporal_vae.training.loop import train
from temporal_vae.training.recipe import Recipe, to_toml
from temporal_vae.training.sources import Inputs, Skipped, find_sources, hold_out, probe_all
from temporal_vae.training.validation import HeldOut

SMALL = {"base_channels": 8, "channel_multipliers": [1, 2], "blocks_per_level": 1}
WAN: dict[str, Any] = SMALL | {
    "temporal_downsample": [True]
}  # two frames make a latent, but for the first
WAN_LINE: dict[str, Any] = {
    "base_channels": 8, "channel_multipliers": [1, 2, 3], "latent_channels": 4,
    "temporal_downsample": [False, True], "blocks_per_level": 1,
}  # wide enough to begin as a linear autoencoder  # fmt: skip
RECIPES = Path(__file__).parent.parent / "recipes"


def table(**changes: Any) -> dict[str, Any]:
    """A recipe of a few steps for clips of `clips`."""
    base: dict[str, Any] = {
        "steps": 4,
        "save_minutes": 0,
        "model": {"config": dict(SMALL)},
        "data": {"batch": [{"samples": 2, "frames": 3, "crop": 16}], "workers": 0},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "validation": {"every": 0, "clips": 1, "frames": 3, "width": 32},
    }
    return recipe._merged(base, changes)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips, of which none is held out by its name."""
    folder = tmp_path_factory.mktemp("clips")
    for index, name in enumerate("abde"):
        frames = smooth(7, 24, 32) if index % 2 else noise(6, 24, 32)
        write(folder / f"{name}.mkv", frames)
    return folder


def run(folder: Path, clips: Path, resume: bool = False, **changes: Any) -> list[dict[str, Any]]:
    its = table(**changes)
    return list(train(Recipe.from_table(its), Inputs([clips]), folder, resume=resume, table=its))


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records]


# Recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dta": {}}, "unknown key dta"),
        ({"data": {"batch": [{"smples": 1}]}}, r"data.batch\[0\].*smples"),
        ({"stage": [{"loss": {"x": 1}}]}, "stage 1.*unknown key x"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"hours": 1}, "`steps` or for `hours`"),
        ({"model": {"preset": "huge"}}, "preset must be one of"),
        ({"model": {"train": ["middle"]}}, "middle"),
        ({"optimizer": {"rates": {"temporal": 2}}}, "rates"),
        ({"optimizer": {"learning_rate": -1}}, "learning_rate"),
        ({"loss": {"lpips": 1.0}}, "lpips_trunk"),
        ({"loss": {"feature": 1.0}}, "feature_weights"),
        ({"stage": [{"share": 0}]}, "shares"),
        ({"data": {"fps": 8, "strides": [2]}}, "fps"),
        ({"data": {"strides": []}}, "strides"),
        ({"optimizer": {"final_rate": -1.0}}, "final_rate is a share"),
        ({"optimizer": {"rates": {"encoder": math.nan}}}, "rates"),
        ({"steps": None, "hours": math.inf}, "hours must be a finite"),
        ({"model": {"train": []}}, "nothing to train"),
        ({"validation": {"noise": [-0.1]}}, "noise"),
        ({"stage": [{"seed": 5, "model": {"init": "x"}}]}, "seed, model.init: a run has one"),
    ],
)
def test_what_is_no_recipe(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        its = {name: value for name, value in table(**changes).items() if value is not None}
        Recipe.from_table(its).bounds()


def test_changes_of_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('hours = 2\n[data]\nbatch = [{crop = 32}]\n[[stage]]\nshare = 1\nname = "x"\n')
    changed, its = Recipe.read(file, ["steps=12", "data.workers=2", "model.init=tiny"])
    assert (changed.steps, changed.hours, changed.data.workers) == (12, None, 2)
    assert changed.model.init == "tiny" and changed.stages()[0].name == "x"
    (tmp_path / "b.toml").write_text(to_toml(its))
    assert Recipe.read(tmp_path / "b.toml") == (changed, its)
    for bad in ("steps", "data.crop=48", "=3"):
        with pytest.raises(ValueError, match=r"a\.toml"):
            Recipe.read(file, [bad])


def test_changes_of_a_stage(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(
        'steps = 4\n[[stage]]\nname = "x"\nloss = {noise = 0.5}\n[[stage]]\nname = "y"\n'
    )
    changed, _ = Recipe.read(file, ["stage.x.loss.noise=0.25", "loss.l1=1"])
    assert [stage.loss.noise for stage in changed.stages()] == [0.25, 0.0]
    for change, message in (("loss.noise=0.1", r"--set stage\.x\.loss"), ("stage.z.share=1", "z")):
        with pytest.raises(ValueError, match=message):
            Recipe.read(file, [change])


def test_stages_follow_one_another_by_their_shares(tmp_path: Path, clips: Path) -> None:
    stages = [
        {"name": "first", "share": 1, "model": {"temporal": False}},
        {"name": "second", "share": 3, "loss": {"l1": 1.0, "log_mse": 0.0}},
    ]
    records = run(tmp_path / "run", clips, stage=stages, steps=8)
    assert [record["stage"] for record in records] == ["first"] * 2 + ["second"] * 6
    assert "reconstruction/log_mse" in records[0] and "reconstruction/l1" in records[-1]
    assert "reconstruction/l1" not in records[0]


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_recipes_of_the_library_are_recipes(file: Path) -> None:
    assert Recipe.read(file)[0].stages()


# Data ----------------------------------------------------------------------------------------


def test_batches_are_a_function_of_their_number(clips: Path) -> None:
    found = probe_all(find_sources([clips]), Skipped(), lambda *_: None)
    data = Recipe.from_table(table(data={"colours": 0.5, "fades": 0.2})).data
    one, other = (Batches(found, data, seed=3) for _ in range(2))
    for number in (5, 0, 17):
        a, b = one[number], other[number]
        assert torch.equal(a.frames, b.frames) and a.seeds == b.seeds
        assert a.frames.shape == (2, 3, 16, 16, 3) and a.pixels().shape == (2, 3, 3, 16, 16)
        assert a.pixels().abs().max() <= 1
    assert not torch.equal(one[0].frames, one[1].frames)
    assert not torch.equal(one[0].frames, Batches(found, data, seed=4)[0].frames)
    halves = [Batches(found, data, 3, Share(rank, 2))[5] for rank in range(2)]
    assert torch.equal(torch.cat([half.frames for half in halves]), one[5].frames)
    ahead = in_order(one, 5, workers=1)
    assert torch.equal(next(ahead).frames, other[5].frames)
    assert torch.equal(next(ahead).frames, other[6].frames)


def test_fades_are_a_share_of_every_kind_of_batch(clips: Path) -> None:
    """Of 600 samples a fifth; a fade begins and ends in flat colours."""
    found = probe_all(find_sources([clips]), Skipped(), lambda *_: None)
    kinds = [{"samples": 1, "frames": n, "crop": 16} for n in (2, 3)]
    batches = Batches(found, Recipe.from_table(table(data={"batch": kinds, "fades": 0.2})).data, 0)
    flat: dict[int, list[bool]] = {2: [], 3: []}
    for number in range(600):
        frames = batches[number].frames[0]
        flat[len(frames)].append(bool((frames == frames[:, :1, :1]).all()))
    for shares in flat.values():
        assert len(shares) > 200 and 0.1 < np.mean(shares) < 0.3


def test_batches_do_not_depend_on_what_is_kept_in_memory(clips: Path) -> None:
    found = probe_all(find_sources([clips]), Skipped(), lambda *_: None)
    for more in ({"strides": [1, 2]}, {"fps": 10.0}, {"widths": [32, 48]}):
        kept, read = (
            Batches(found, Recipe.from_table(table(data=more | {"cache": size})).data, 0)
            for size in ("1GiB", "1KiB")
        )
        for number in range(6):
            assert torch.equal(kept[number].frames, read[number].frames), more


def test_lists_and_tar_files_hold_the_same_clips(tmp_path: Path, clips: Path) -> None:
    files = sorted(clips.glob("*.mkv"))
    skipped = Skipped()
    (tmp_path / "odd.txt").write_text("gone.mp4\nodd.txt\n" + str(files[0]))
    assert len(find_sources([tmp_path / "odd.txt"], (), skipped)) == 1 and len(skipped) == 2
    (clips / "all.txt").write_text("# a list\n" + "\n".join(file.name for file in files))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in files:
            tar.add(file, arcname=f"0001/{file.name}")
            tar.addfile(tarfile.TarInfo("0001/caption.json"), io.BytesIO())
    data = Recipe.from_table(table()).data
    seen = [
        Batches(probe_all(find_sources([place]), Skipped(), lambda *_: None), data, 0)[0].frames
        for place in (clips, clips / "all.txt", tmp_path / "shard.tar")
    ]
    (clips / "all.txt").unlink()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_what_cannot_be_trained_on_is_skipped_with_a_reason(tmp_path: Path, clips: Path) -> None:
    for file in clips.glob("*.mkv"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    write(tmp_path / "still.mkv", smooth(1, 32, 32))
    write(tmp_path / "small.mkv", smooth(5, 8, 8))
    write(tmp_path / "short.mp4", smooth(3, 32, 32))
    inputs = Inputs([tmp_path])
    kind = [{"samples": 1, "frames": 5, "crop": 16}]
    inputs.look(Recipe.from_table(table(data={"batch": kind})))
    reasons = {Path(name).stem: reason for name, reason in inputs.skipped.reasons.items()}
    assert set(reasons) == {"broken", "still", "small", "short"}
    assert "one frame" in reasons["still"] and "too small" in reasons["small"]
    assert "too few" in reasons["short"] and len(inputs.clips) == 4


def test_a_clip_that_breaks_off_is_left_for_another(tmp_path: Path) -> None:
    write(tmp_path / "whole.mkv", smooth(8, 32, 32))
    write(tmp_path / "torn.mkv", noise(40, 64, 64))
    data = (tmp_path / "torn.mkv").read_bytes()
    found = probe_all(find_sources([tmp_path]), Skipped(), lambda *_: None)
    (tmp_path / "torn.mkv").write_bytes(data[: len(data) // 20])
    kind = [{"samples": 8, "frames": 6, "crop": 16}]
    batches = Batches(found, Recipe.from_table(table(data={"batch": kind})).data, 0)
    samples = batches[0]
    assert samples.frames.shape[0] == 8
    assert {clip.source.name for clip, _ in samples.broken} == {"torn.mkv"}


@pytest.mark.parametrize("name", ["empty", "nowhere", "excluded", "texts"])
def test_no_data(tmp_path: Path, clips: Path, name: str) -> None:
    places = {"empty": tmp_path, "nowhere": tmp_path / "x", "excluded": clips, "texts": tmp_path}
    if name == "texts":
        (tmp_path / "a.mp4").write_text("text")
    its = Recipe.from_table(table(data={"exclude": ["*"]} if name == "excluded" else {}))
    with pytest.raises(ValueError, match=r"no videos|is not there|none of"):
        Inputs([places[name]]).look(its)


def test_every_twentieth_name_is_held_out_wherever_it_lies(tmp_path: Path) -> None:
    for index in range(200):
        (tmp_path / f"clip{index}.mp4").touch()
    kept, held = hold_out(find_sources([tmp_path]))
    assert 4 <= len(held) <= 20 and len(kept) + len(held) == 200
    again = hold_out(held)
    assert again == (held, [])  # they would all be held out: then none is


# The step ------------------------------------------------------------------------------------


def test_latent_noise_has_the_stated_deviation_and_is_its_own_in_every_frame() -> None:
    spec = recipe.Loss(noise=0.4, clean=0.25)
    seeds = range(2000)
    shares = step.noise_shares(seeds, spec)
    assert float((shares == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert float(shares.max()) <= 0.4 and float(shares[shares > 0].mean()) == pytest.approx(
        0.2, abs=0.01
    )
    model = awake(torch.float32, latent_scale_factor=0.25)
    heard: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    video = torch.zeros(1, 3, 6, 64, 64)
    seed = int(shares.argmax())
    step.Pass(model, recipe.Loss())(video, [seed])
    step.Pass(model, spec)(video, [seed])
    added = (heard[1] - heard[0])[0].detach()  # (L, T, h, w)
    assert float(added.std()) == pytest.approx(float(shares[seed]) / 0.25, rel=0.02)
    frames = added.transpose(0, 1).flatten(1)
    assert (torch.corrcoef(frames) - torch.eye(6)).abs().max() < 0.06


def test_noise_is_that_of_the_sample_alone() -> None:
    like = torch.zeros(3, 4, 2, 5, 5)
    whole = step.draw(like, [7, 8, 9])
    assert torch.equal(whole[1:], step.draw(like[1:], [8, 9]))


def test_terms_by_hand() -> None:
    video, other = (torch.rand(2, 3, 4, 16, 16) * 2 - 1 for _ in range(2))
    spec = recipe.Loss(l1=2.0, mse=3.0, log_mse=0.5, colour=0.25, temporal=0.125, kl=0.1)
    mean, log_variance = torch.randn(2, 2, 4, 4, 2, 2).unbind(0)
    terms = step.Terms(spec, torch.device("cpu"), (4, 2))
    found = terms(video, other, mean, log_variance)
    error = (other - video).square().mean((1, 3, 4))
    assert float(found["log_mse"]) == pytest.approx(float((error + 1e-3).log().mean()))
    moved = (other - video).diff(dim=2).square().mean((1, 3, 4))
    assert float(found["temporal"]) == pytest.approx(float((moved + 1e-3).log().mean()))
    nats = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    assert float(found["kl"]) == pytest.approx(float(nats), rel=1e-5)
    weights = {"l1": 2, "mse": 3, "log_mse": 0.5, "colour": 0.25, "temporal": 0.125, "kl": 0.1}
    total = sum(weight * float(found[name]) for name, weight in weights.items())
    assert float(terms.weighted(found)) == pytest.approx(total, rel=1e-5)


def test_a_student_has_the_cells_of_its_teacher(tmp_path: Path) -> None:
    awake(torch.float32, latent_channels=5).save_pretrained(tmp_path / "teacher")
    spec = recipe.Loss(distill=1.0, teacher=str(tmp_path / "teacher"))
    with pytest.raises(ValueError, match="5 channels"):
        step.Terms(spec, torch.device("cpu"), (4, 2))


def test_muon_steps_are_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)  # a matrix by chance may be singular
    for shape in ((8, 20), (20, 8), (6, 6)):
        matrix = torch.randn(shape, generator=generator)
        singular = torch.linalg.svdvals(optimizers.orthogonal(matrix).float())
        assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3


def test_the_schedule_warms_up_and_falls() -> None:
    spec = recipe.Optimizer(learning_rate=1.0, warmup_steps=50)
    rates = [optimizers.learning_rate(spec, p, 1000) for p in (0.0, 0.5, 1.0, 2.0)]
    assert rates == pytest.approx([1.0, 0.51, 0.02, 0.02])
    assert optimizers.learning_rate(spec, 0.0, 0) == pytest.approx(0.02)


def test_the_image_twin_shares_its_parameters() -> None:
    model = awake(torch.float32)
    twin = image_twin(model)
    ours = dict(model.named_parameters())
    assert all(ours[name] is parameter for name, parameter in twin.named_parameters())
    assert {n for n in ours if "temporal" not in n} == {n for n, _ in twin.named_parameters()}


# The loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(tmp_path: Path, clips: Path, optimizer: str) -> None:
    data = {"batch": [{"samples": 4, "frames": 2, "crop": 16}], "flips": False}
    records = run(
        tmp_path / "run", clips / "b.mkv", steps=40, save_minutes=99, data=data,
        optimizer={"name": optimizer, "learning_rate": 1e-2, "ema": 0.0},
    )  # fmt: skip
    errors = [record["reconstruction/error"] for record in records]
    assert np.mean(errors[-8:]) < 0.85 * np.mean(errors[:8])
    assert [record["step"] for record in records] == list(range(1, 41))


def test_what_is_frozen_stays_bit_for_bit(tmp_path: Path, clips: Path) -> None:
    awake(torch.float32).save_pretrained(tmp_path / "init")
    before = TemporalVAE.from_pretrained(tmp_path / "init").state_dict()
    run(tmp_path / "run", clips, model={"init": str(tmp_path / "init"), "config": {},
                                        "train": ["decoder.temporal"]})  # fmt: skip
    after = TemporalVAE.from_pretrained(tmp_path / "run" / "model").state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and {optimizers.part_of(name) for name in moved} == {"decoder.temporal"}
    assert moved == {n for n in after if optimizers.part_of(n) == "decoder.temporal"}


def test_a_budget_and_checkpointing_leave_the_losses_as_they_are(
    tmp_path: Path, clips: Path
) -> None:
    found = [
        losses(run(tmp_path / str(index), clips, model=its, loss={"noise": 0.3}))
        for index, its in enumerate(
            ({}, {"memory": "least", "train": ["decoder"]}, {"gradient_checkpointing": True},
             {"train": ["decoder"]})
        )
    ]  # fmt: skip
    narrow = {"dtype": "bfloat16"}
    both = [
        losses(run(tmp_path / f"narrow{index}", clips, model=its, optimizer=narrow, steps=2))
        for index, its in enumerate(
            ({"train": ["decoder"]}, {"memory": "least", "train": ["decoder"]})
        )
    ]
    assert both[0] == pytest.approx(both[1], abs=0.02)
    assert found[2] == pytest.approx(found[0], abs=1e-5)
    assert found[1] == pytest.approx(found[3], abs=1e-5) and found[0] != found[1]
    with pytest.raises(ValueError, match="below the least"):
        run(tmp_path / "small", clips, model={"memory": "1KiB"})


def test_each_part_has_its_own_rate(tmp_path: Path, clips: Path) -> None:
    awake(torch.float32).save_pretrained(tmp_path / "init")
    before = TemporalVAE.from_pretrained(tmp_path / "init").state_dict()
    run(tmp_path / "run", clips, model={"init": str(tmp_path / "init"), "config": {}},
        optimizer={"rates": {"decoder.spatial": 0.0, "encoder": 0.0}})  # fmt: skip
    after = TemporalVAE.from_pretrained(tmp_path / "run/model").state_dict()
    moved = {optimizers.part_of(n) for n in after if not torch.equal(after[n], before[n])}
    assert moved == {"decoder.temporal"}


def test_gradients_are_averaged_over_batches(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", smooth(3, 16, 16))  # fits one crop: all batches are the same
    data = {"batch": [{"samples": 1, "frames": 3, "crop": 16}], "flips": False}
    norms = [
        run(tmp_path / f"run{count}", tmp_path / "a.mkv", steps=1, data=data,
            optimizer={"accumulate": count})[0]["gradient_norm"]
        for count in (1, 3)
    ]  # fmt: skip
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def whole_and_parts(tmp_path: Path, clips: Path, stop: int, **changes: Any) -> tuple[Any, Any]:
    """The records of a run in `whole`, and of one in `part` that is stopped and gone on with."""
    whole = run(tmp_path / "whole", clips, **changes)
    its = table(**changes)
    part = train(Recipe.from_table(its), Inputs([clips]), tmp_path / "part", table=its)
    first = [next(part) for _ in range(stop)]
    part.close()
    state = json.loads((tmp_path / "part/state.json").read_text())
    assert (state["status"], state["step"]) == ("stopped", stop)
    return whole, first + run(tmp_path / "part", clips, resume=True, **changes)


def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, clips: Path) -> None:
    changes: dict[str, Any] = {
        "steps": 6, "loss": {"noise": 0.3, "adversarial": 0.1, "sample": True},
        "critic": {"start": 0.0, "width": 4, "depth": 1},
        "optimizer": {"accumulate": 2, "warmup_steps": 6},
        "stage": [{"share": 1, "model": {"temporal": False}}, {"share": 2}],
    }  # fmt: skip
    whole, parts = whole_and_parts(tmp_path, clips, 4, **changes)
    assert losses(parts) == losses(whole)
    assert any("critic/adversarial" in record for record in parts[4:])
    for name in ("model/model.safetensors", "checkpoints/step-00000006/average.safetensors"):
        ours, theirs = (load_file(tmp_path / each / name) for each in ("whole", "part"))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_model_of_wans_kind_goes_on_and_has_the_scale_of_its_channels(
    tmp_path: Path, clips: Path
) -> None:
    changes: dict[str, Any] = {
        "steps": 4, "model": {"preset": "tiny-wan", "config": WAN},
        "loss": {"noise": 0.3, "sample": True, "kl": 1e-3}, "optimizer": {"ema": 0.5},
        "stage": [{"share": 1}, {"share": 3}], "validation": {"frames": 4},
    }  # fmt: skip
    whole, parts = whole_and_parts(tmp_path, clips, 3, **changes)
    assert losses(parts) == losses(whole)
    model = TemporalVAE.from_pretrained(tmp_path / "part/model")
    found = probe_all(find_sources([clips]), Skipped(), lambda *_: None)
    batches = Batches(found, Recipe.from_table(table()).data, 0)
    generator = torch.Generator().manual_seed(
        0
    )  # the noise of the latents, drawn as the run draws it
    videos = [batches[number].pixels() for number in range(loop.SCALE_BATCHES)]
    latent = torch.cat([model.encode(x, generator=generator).detach() for x in videos])
    cells = model.scale_latent(latent).transpose(0, 1).flatten(1)
    assert cells.mean(1).abs().max() < 1e-3 and (cells.std(1) - 1).abs().max() < 1e-3
    assert latent.transpose(0, 1).flatten(1).std(1).sub(1).abs().max() > 0.1


def test_noise_has_the_deviation_of_each_channel() -> None:
    config = WanVAEConfig(**WAN | {"latent_channels": 2}, latent_std=(0.5, 3.0))
    model = TemporalVAE.from_config(config)
    heard: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    spec = recipe.Loss(noise=0.4, clean=0.0)
    for each in (recipe.Loss(), spec):
        step.Pass(model, each)(torch.zeros(1, 3, 5, 64, 64), [5])
    share = float(step.noise_shares([5], spec))
    added = (heard[1] - heard[0])[0].flatten(1).std(1)
    assert added.tolist() == pytest.approx([0.5 * share, 3.0 * share], rel=0.05)


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, clips: Path) -> None:
    its = table()
    first = train(Recipe.from_table(its), Inputs([clips]), tmp_path / "run", table=its)
    next(first)
    with pytest.raises(ValueError, match="another process trains in"):
        run(tmp_path / "run", clips, resume=True)
    first.close()
    assert losses(run(tmp_path / "run", clips, resume=True))


def test_other_clips_are_told_of_when_a_run_goes_on(tmp_path: Path, clips: Path) -> None:
    """A folder that was moved has the same clips; one that has lost one has others."""
    moved = shutil.copytree(clips, tmp_path / "moved")
    for steps, note in ((2, False), (3, True)):
        its, said = table(steps=steps), list[str]()
        if note:
            (moved / "e.mkv").unlink()
        for data in (clips, moved):
            list(train(Recipe.from_table(its), Inputs([data]), tmp_path / "run", resume=True,
                       table=its, say=said.append))  # fmt: skip
        assert any("not the clips" in line for line in said) == note


def test_records_past_the_checkpoint_are_dropped(tmp_path: Path, clips: Path) -> None:
    run(tmp_path / "run", clips, steps=3)
    metrics = tmp_path / "run/metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    run(tmp_path / "run", clips, resume=True, steps=4)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[3]["loss"] != 1.0 and {"step", "loss", "reconstruction/log_mse"} <= set(lines[0])


def test_checkpoints_hold_plain_tensors(tmp_path: Path, clips: Path) -> None:
    run(tmp_path / "run", clips, steps=3, keep=2)
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000003"]
    names = {file.name for file in folders[-1].iterdir()}
    assert names == {"weights.safetensors", "average.safetensors", "optimizer.0.safetensors",
                     "state.json"}  # fmt: skip
    weights = load_file(folders[-1] / "weights.safetensors")
    model = TemporalVAE.from_pretrained(tmp_path / "run/model")
    assert weights.keys() == model.state_dict().keys()
    assert (tmp_path / "run/model/recipe.toml").read_text() == (
        tmp_path / "run/recipe.toml"
    ).read_text()


@pytest.mark.parametrize("what", ["another recipe", "no resume", "no run", "damaged", "a file"])
def test_folders_that_are_not_gone_on_with(tmp_path: Path, clips: Path, what: str) -> None:
    folder, changes = tmp_path / "run", {"optimizer": {"learning_rate": 2e-3}}
    run(folder, clips, steps=2)
    if what == "no run":
        (folder / "recipe.toml").unlink()
    if what == "damaged":
        (folder / "checkpoints/step-00000002/weights.safetensors").write_bytes(b"")
    if what == "a file":
        folder = folder / "recipe.toml"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"run|cannot be read"):
        run(folder, clips, resume=what != "no resume", steps=3,
            **(changes if what == "another recipe" else {}))  # fmt: skip
    after = {path: path.read_bytes() for path in before}
    lost = [path for path in before if after[path] != before[path]]
    assert not [path for path in lost if path.suffix == ".safetensors"]


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    awake(torch.float32).save_pretrained(tmp_path / "init")
    spec = recipe.Model(init=str(tmp_path / "init"), config={"base_channels": 16})
    with pytest.raises(ValueError, match="another architecture"):
        build_model(spec, 0)
    with pytest.raises(ValueError, match=r"unknown basechannels"):
        build_model(recipe.Model(config={"basechannels": 16}), 0)


@pytest.mark.parametrize("config", [{"causal_mode": True}, {"num_temporal_layers": 2},
                                    {"temporal_decoder": False}])  # fmt: skip
def test_another_layout_in_time_begins_as_the_image_vae(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    awake(torch.float32).save_pretrained(tmp_path / "init")
    model, _ = build_model(recipe.Model(init=str(tmp_path / "init"), config=config), 0)
    loaded = TemporalVAE.from_pretrained(tmp_path / "init")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if "temporal" not in n)
    if "temporal_decoder" in config:
        assert model.decode_reach == 0 and model.encode_reach == loaded.encode_reach
        video = torch.rand(1, 3, 4, 16, 16)
        assert torch.equal(model.encode(video, False), loaded.encode(video, False))
    if "causal_mode" in config:
        z = torch.randn(1, 4, 3, 4, 4)
        alone = [model.decode(z[:, :, t : t + 1]) for t in range(3)]
        assert (model.decode(z) - torch.cat(alone, 2)).abs().max() < 1e-5


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(tmp_path: Path, clips: Path) -> None:
    records = run(tmp_path / "run", clips, steps=2)
    assert all(math.isfinite(loss) for loss in losses(records))
    with pytest.raises(ValueError, match=r"step \d+ is not finite.*its batch is in") as caught:
        run(tmp_path / "bad", clips, steps=400, save_minutes=99, data={"flips": False},
            optimizer={"learning_rate": 1e18, "clip_norm": 0.0, "ema": 0.0})  # fmt: skip
    file = next((tmp_path / "bad").glob("failed-step-*.safetensors"))
    assert str(file) in str(caught.value) and load_file(file)["frames"].shape == (2, 3, 16, 16, 3)
    assert json.loads((tmp_path / "bad/state.json").read_text())["status"] == "failed"


def test_a_gradient_that_is_not_finite_leaves_the_weights(tmp_path: Path, clips: Path) -> None:
    its = table(steps=5)
    records = train(Recipe.from_table(its), Inputs([clips]), tmp_path / "run", table=its)
    next(records)
    with (
        mock.patch.object(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf)),
        pytest.raises(ValueError, match="gradient_norm = inf"),
    ):
        next(records)
    weights = load_file(tmp_path / "run/checkpoints/step-00000001/weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert losses(run(tmp_path / "run", clips, steps=2, resume=True)) == losses(
        run(tmp_path / "whole", clips, steps=2)[1:]
    )


def test_a_run_from_python_alone_goes_on(tmp_path: Path, clips: Path) -> None:
    its = Recipe.from_table(table(steps=2))
    assert len(list(train(its, Inputs([clips]), tmp_path / "run"))) == 2
    assert Recipe.read(tmp_path / "run/recipe.toml")[0] == its
    more = Recipe.from_table(table(steps=3))
    assert len(list(train(more, Inputs([clips]), tmp_path / "run", resume=True))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"config": SMALL | {"input_channels": 1}}}, "RGB"),
        ({"data": {"batch": [{"frames": 2, "crop": 15}]}}, "no multiple"),
        ({"model": {"preset": "tiny-wan", "config": WAN},
          "data": {"batch": [{"frames": 4, "crop": 16}]}}, "take 3 frames or 5"),
        ({"model": {"preset": "tiny-wan", "config": WAN, "temporal": False}}, "frames = 1"),
        ({"model": {"preset": "tiny-wan", "config": WAN, "start": "linear"}}, "is known for"),
        ({"model": {"config": SMALL, "start": "linear"}}, "is known for"),
        ({"model": {"config": SMALL, "branches": False}}, "Wan's kind alone"),
        ({"model": {"init": "tiny", "start": "linear"}}, "leave one of both away"),
        ({"loss": {"log_mse": 0.0, "colour": 0.0, "kl": 1.0}, "model": {"train": ["decoder"]}},
         "nothing in"),
    ],
)  # fmt: skip
def test_what_cannot_train_a_model_is_refused_before_the_first_step(
    tmp_path: Path, clips: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", clips, **changes)
    assert not (tmp_path / "run").exists()


def test_the_last_checkpoint_can_be_gone_on_from(tmp_path: Path, clips: Path) -> None:
    """It is as those before it: with the weights as they are, and their average beside them."""
    run(tmp_path / "run", clips, steps=3, save_minutes=99, optimizer={"ema": 0.5})
    checkpoint = tmp_path / "run/checkpoints/step-00000003"
    weights, average = (load_file(checkpoint / f"{n}.safetensors") for n in ("weights", "average"))
    model = load_file(tmp_path / "run/model/model.safetensors")
    assert not torch.equal(weights["decoder.conv_out.weight"], average["decoder.conv_out.weight"])
    assert torch.equal(model["decoder.conv_out.weight"], average["decoder.conv_out.weight"])
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["average_updates"] == 3


def test_the_scale_of_an_image_stage_is_measured(tmp_path: Path, clips: Path) -> None:
    """And what is measured of the model with it goes by that scale."""
    measured = list[float]()
    stage = [{"model": {"temporal": False}}]
    with mock.patch.object(
        loop.Training, "measure", lambda its: measured.append(its.network.latent_scale_factor)
    ):
        run(tmp_path / "run", clips, steps=2, stage=stage)
    model = TemporalVAE.from_pretrained(tmp_path / "run/model")
    found = probe_all(find_sources([clips]), Skipped(), lambda *_: None)
    batches = Batches(found, Recipe.from_table(table()).data, 0)
    video = torch.cat([batches[number].pixels() for number in range(8)])
    deviation = float(model.encode(video).detach().std())
    assert model.latent_scale_factor * deviation == pytest.approx(1, abs=0.1)
    assert measured == [model.latent_scale_factor]


def test_averages_are_what_is_saved(tmp_path: Path, clips: Path) -> None:
    run(tmp_path / "run", clips, steps=3, optimizer={"ema": 0.5})
    checkpoint = tmp_path / "run/checkpoints/step-00000003"
    present, average, saved = (
        load_file(file)
        for file in (checkpoint / "weights.safetensors", checkpoint / "average.safetensors",
                     tmp_path / "run/model/model.safetensors")
    )  # fmt: skip
    name = "decoder.conv_out.weight"
    assert torch.equal(saved[name], average[name]) and not torch.equal(saved[name], present[name])


def test_measurements(tmp_path: Path, clips: Path) -> None:
    its = table(steps=4, validation={"every": 2})
    write(tmp_path / "v.mkv", smooth(4, 32, 32))
    inputs = Inputs([clips], validation=[tmp_path / "v.mkv"])
    records = list(train(Recipe.from_table(its), inputs, tmp_path / "run", table=its))
    assert len(records) == 4
    text = (tmp_path / "run/validation.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and lines[0]["clips"] == 1
    assert set(lines[0]["noise"]) == {"0", "0.1", "0.2", "0.4"}
    for scores in lines[0]["noise"].values():
        assert {"psnr", "ssim", "flicker", "linear"} == set(scores)
    linear = [lines[0]["noise"][share]["linear"]["psnr"] for share in ("0", "0.2", "0.4")]
    assert linear[0] > linear[1] > linear[2]
    alone = run(tmp_path / "alone", clips, steps=4)  # measuring leaves the training as it is
    inputs.skipped.reasons.clear()
    assert losses(alone) == losses(records)
    assert len(list((tmp_path / "run/samples").glob("step-*-v.png"))) == 2


def test_measuring_is_what_its_words_say(clips: Path) -> None:
    """Noise of no share is the plain reconstruction."""
    held = HeldOut.read(find_sources([clips / "a.mkv"]), recipe.Validation(frames=3, width=32),
                        Skipped())  # fmt: skip
    model = awake(torch.float32)
    frames = held.clips["a"]
    from temporal_vae.evaluation.evaluate import reconstruct_frames
    from temporal_vae.evaluation.metrics import score

    plain = score(frames, reconstruct_frames(frames, model))
    assert held.measure(model, 0, None)["noise"]["0"]["psnr"] == pytest.approx(plain.psnr, abs=1e-3)


# Several processes -----------------------------------------------------------------------------


def torchrun(tmp_path: Path, clips: Path, out: str, *more: str) -> list[float]:
    loss = {"noise": 0.3, "adversarial": 0.0 if "fsdp" in more else 0.2}
    critic = {"start": 0.0, "width": 4, "depth": 1}
    its = table(steps=3, loss=loss, critic=critic, optimizer={"ema": 0.0})
    (tmp_path / "recipe.toml").write_text(to_toml(its))
    tvae = [str(Path(sys.executable).parent / "tvae"), "train", str(tmp_path / "recipe.toml"),
            "--data", str(clips), "--out", str(tmp_path / out),
            "--device", "cpu", *more]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", *tvae]  # fmt: skip
    done = subprocess.run(command if out != "one" else [sys.executable, *tvae],
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_give_the_loss_of_one(tmp_path: Path, clips: Path, strategy: str) -> None:
    one = torchrun(
        tmp_path, clips, "one", *(["--set", "loss.adversarial=0"] * (strategy == "fsdp"))
    )
    two = torchrun(tmp_path, clips, strategy, "--strategy", strategy)
    assert one == pytest.approx(two, abs=1e-5) and len(set(one)) == 3
    ours, theirs = (load_file(tmp_path / out / "model/model.safetensors")
                    for out in ("one", strategy))  # fmt: skip
    assert all((ours[n] - theirs[n]).abs().max() < 1e-4 for n in ours)


# The command -----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(table(steps=2000, save_minutes=0)))
    yield path


def tvae(*words: object) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).parent / "tvae"), "train", *map(str, words)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` ignores it
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.slow)
                                 for number in (signal.SIGINT, signal.SIGTERM))],
)  # fmt: skip
def test_a_run_that_was_ended_goes_on(
    tmp_path: Path, clips: Path, file: Path, number: signal.Signals
) -> None:
    words = [file, "--data", clips, "--out", tmp_path / "run", "--device", "cpu",
             "--set", "data.workers=1"]  # fmt: skip
    process = tvae(*words)
    wait_for(tmp_path / "run/checkpoints/step-00000003", process)
    os.killpg(process.pid, number)  # as a terminal does, and what ends jobs
    process.communicate(timeout=60)
    assert process.returncode != 0
    before = json.loads((tmp_path / "run/state.json").read_text())
    if number != signal.SIGKILL:
        assert before["status"] == "stopped"
    last = max(int(p.name[5:]) for p in (tmp_path / "run/checkpoints").glob("step-*"))
    done = tvae(*words, "--resume", "--set", f"steps={last + 2}")
    _, said = done.communicate(timeout=120)
    assert done.returncode == 0 and f"going on from step {last}" in said
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, last + 3))


def test_the_command_checks_before_the_first_step(
    tmp_path: Path, clips: Path, file: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data/broken.mp4").write_bytes(b"no video")
    words = ["train", str(file), "--data", str(clips), str(tmp_path / "data"), "--check"]
    monkeypatch.setattr(sys, "argv", ["tvae", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    said = capsys.readouterr()
    assert not ended.value.code and not (tmp_path / "run").exists()
    assert "clips" in said.out and "broken.mp4" in said.err and "trained" in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing", "--data", "CLIPS", "--out", "run"], "no recipe nothing"),
        (["RECIPE", "--out", "run"], "--data is missing"),
        (["RECIPE", "--data", "CLIPS"], "--out is missing"),
        (["RECIPE", "--data", "nowhere", "--out", "run"], "nowhere is not there"),
        (["RECIPE", "--data", "CLIPS", "--out", "run", "--set", "x=1"], "unknown key x"),
        (["RECIPE", "--data", "CLIPS", "--out", "run", "--init", "nobody"], "nobody"),
        (["RECIPE", "--data", "CLIPS", "--out", "run", "--strategy", "x"], "--strategy"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, clips: Path, file: Path, words: list[str], message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    known = {"RECIPE": str(file), "CLIPS": str(clips)}
    monkeypatch.setattr(sys, "argv", ["tvae", "train", *(known.get(w, w) for w in words)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    said = capsys.readouterr().err
    assert ended.value.code and message in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small tmpfs")
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, clips: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)],
                             capture_output=True, check=False)  # fmt: skip
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(OSError, match=r"cannot write|No space"):
            run(disk / "run", clips, steps=500, keep=500)
        last = sorted((disk / "run/checkpoints").glob("step-*"))[-1]
        assert load_file(last / "weights.safetensors")
        assert not [p for p in (disk / "run/checkpoints").iterdir() if "part" in p.name]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_every_recipe_trains_through_the_command(
    file: Path, tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, but for a smaller model, smaller batches, and as many steps as it has stages."""
    its = tomllib.loads(file.read_text())
    tiny_batch = [{"samples": 2, "frames": 3, "crop": 16}]
    for section in (its, *its.get("stage", [])):
        if "batch" in section.get("data", {}):
            section["data"]["batch"] = tiny_batch
    its["data"] |= {"widths": [32], "workers": 0}
    stages = its.get("stage", [{}])
    its["steps"], its["validation"] = len(stages), {"every": 0, "frames": 3, "width": 32}
    for stage in stages:
        stage["share"] = 1
    image = file.stem in ("svd-decoder", "inflate")
    model = awake(torch.float32, num_temporal_layers=0) if image else awake(torch.float32)
    model.save_pretrained(tmp_path / "init")
    words = ["--init", str(tmp_path / "init")]
    if "preset" in its["model"]:
        small = WAN_LINE if its["model"]["preset"] == "tiny-wan" else SMALL
        words, its["model"]["config"] = [], its["model"].get("config", {}) | small
    if "teacher" in its["loss"]:
        its["loss"]["teacher"] = str(tmp_path / "init")
    (tmp_path / "recipe.toml").write_text(to_toml(its))
    words = ["train", str(tmp_path / "recipe.toml"), "--data", str(clips), "--out",
             str(tmp_path / "run"), "--device", "cpu", *words]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["tvae", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert not ended.value.code
    text = (tmp_path / "run/metrics.jsonl").read_text()
    names = [stage.get("name", "") for stage in stages]
    assert [json.loads(line)["stage"] for line in text.splitlines()] == names
    assert TemporalVAE.from_pretrained(tmp_path / "run/model").decode_reach != 0
    assert "done" in (tmp_path / "run/run.html").read_text()
