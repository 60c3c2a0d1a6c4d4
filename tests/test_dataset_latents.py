"""A data set of latents to train on, and in the layouts of other trainers."""

from __future__ import annotations

import gc
import glob
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file
from test_dataset import run
from test_video import noise, smooth, write
from torch.utils.data import DataLoader

from temporal_vae import EqualShapes, LatentDataset, LatentFile, TemporalVAE, read_latents
from temporal_vae.dataset.export import export_cogvideo, export_musubi
from temporal_vae.files.safetensors import SUFFIX
from temporal_vae.latents import LatentFileError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, model: TemporalVAE) -> dict[str, Path]:
    """The same clips as files and as shards: six of 32x32x3, four of 32x48x5, one alone."""
    root = tmp_path_factory.mktemp("latents")
    source = root / "src"
    (source / "deep").mkdir(parents=True)
    shapes = [(3, 32, 32)] * 6 + [(5, 32, 48)] * 4 + [(2, 32, 32)]
    for index, shape in enumerate(shapes):
        write(source / ("deep" if index % 2 else "") / f"v_{index}.mkv", noise(*shape))
    (source / "broken.mkv").write_bytes(b"")
    lines = [f'{{"path": "{p.relative_to(source)}", "caption": "clip {p.stem}"}}'
             for p in sorted(source.rglob("*.mkv"))]  # fmt: skip
    (source / "list.jsonl").write_text("\n".join(lines))
    for layout in ("files", "webdataset"):
        options: dict[str, Any] = {"layout": layout, "shard_clips": 4}
        counts = run(source / "list.jsonl", root / layout, model, **options)
        assert counts == {"ok": 11, "failed": 1}
    return {"files": root / "files", "webdataset": root / "webdataset"}


@pytest.fixture(params=["files", "webdataset"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def test_both_layouts_hold_the_same_clips(folders: dict[str, Path]) -> None:
    files, shards = LatentDataset(folders["files"]), LatentDataset(folders["webdataset"])
    assert len(files) == len(shards) == 11
    for index in range(11):
        a, b = files[index], shards[index]
        assert a["latents"].equal(b["latents"]) and a["latents"].shape == files.shape(index)
        assert {**a, "latents": 0} == {**b, "latents": 0}
        assert a["caption"].startswith("clip v_") and a["fps"] == 25
    assert files[-1]["name"] == files[10]["name"]
    with pytest.raises(IndexError, match="there are 11 clips"):
        files[11]


def test_latents_are_scaled_once_and_drawn_if_asked_for(folder: Path, folders: Any) -> None:
    scaled, plain = LatentDataset(folder)[3], LatentDataset(folder, scaled=False)[3]
    latents, info = read_latents(folders["files"] / f"{plain['name']}{SUFFIX}")
    assert plain["latents"].equal(latents[0])
    assert info.scale_factor is not None and info.shift_factor is not None
    expected = (latents[0] - info.shift_factor) * info.scale_factor
    torch.testing.assert_close(scaled["latents"], expected)
    drawn = LatentDataset(folder, sample=True, dtype=torch.bfloat16)
    one, two = drawn[3]["latents"], drawn[3]["latents"]
    assert one.dtype == torch.bfloat16 and not one.equal(two)


def test_a_part_of_a_file_is_read_like_a_file(folders: dict[str, Path]) -> None:
    dataset = LatentDataset(folders["webdataset"])
    with dataset.open(5) as file:
        again = pickle.loads(pickle.dumps(file))
        assert again.read().equal(file.read()) and again.info == file.info
        again.__exit__()
    row = dataset.row(5)
    shard = folders["webdataset"] / row["shard"]
    for begin, size in ((row["offset"] + 8, row["bytes"]), (row["offset"], row["bytes"] - 1),
                        (10**9, 100)):  # fmt: skip
        with pytest.raises(LatentFileError):
            LatentFile(shard, begin, size)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(folders: dict[str, Path]) -> None:
    webdataset = pytest.importorskip("webdataset")
    dataset = LatentDataset(folders["webdataset"])
    shards = sorted(map(str, folders["webdataset"].glob("*.tar")))
    assert len(shards) == 3
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    gc.collect()  # it leaves closing its files to chance
    assert len(samples) == len({sample["__key__"] for sample in samples}) == 11
    names = []
    for sample in samples:
        assert load(sample["safetensors"])["moments"].shape[0] in (2, 3, 5)
        names.append(json.loads(sample["json"])["name"])
    assert names == [dataset.row(index)["name"] for index in range(11)]


# Batches -----------------------------------------------------------------------------------------


def test_batches_have_one_shape_and_each_clip_once(folder: Path) -> None:
    dataset = LatentDataset(folder)
    assert sorted(map(len, dataset.buckets().values())) == [1, 4, 6]
    sampler = EqualShapes(dataset, 2, seed=1)
    epochs = [list(sampler) for _ in range(3)]
    assert len(sampler) == 5 and epochs[0] != epochs[1]
    for batches in epochs:
        assert len(batches) == 5
        taken = [index for batch in batches for index in batch]
        assert len(set(taken)) == 10
        assert all(len({dataset.shape(index) for index in batch}) == 1 for batch in batches)
    assert [EqualShapes(dataset, 2, seed=1).batches(e) for e in range(3)] == epochs
    assert EqualShapes(dataset, 2, seed=2).batches(0) != epochs[0]


def test_processes_share_the_batches_of_one(folder: Path) -> None:
    dataset = LatentDataset(folder)
    whole = EqualShapes(dataset, 1, seed=3).batches(0)
    parts = [EqualShapes(dataset, 1, seed=3, rank=rank, world=3) for rank in range(3)]
    shared = [part.batches(0) for part in parts]
    assert [len(batches) for batches in shared] == [3, 3, 3] == [len(part) for part in parts]
    assert [batch for turn in zip(*shared, strict=True) for batch in turn] == whole[:9]


def test_an_order_goes_on_where_it_stopped(folder: Path) -> None:
    dataset = LatentDataset(folder)

    def loader(sampler: EqualShapes, workers: int) -> DataLoader[Any]:
        return DataLoader(dataset, batch_sampler=sampler, num_workers=workers)

    sampler = EqualShapes(dataset, 2, seed=5)
    expected = [batch["name"] for _ in range(2) for batch in loader(sampler, 0)]
    for stop in (0, 3, 7):
        sampler, seen = EqualShapes(dataset, 2, seed=5), list[Any]()
        while len(seen) < stop:
            for batch in loader(sampler, 2 if stop == 3 else 0):
                assert batch["latents"].shape[:2] == (2, 4)
                seen.append(batch["name"])
                if len(seen) == stop:
                    break
        state = sampler.state_dict(stop % 5) if stop else {"epoch": 0, "batches": 0}
        sampler = EqualShapes(dataset, 2, seed=5)
        sampler.load_state_dict(state)
        while len(seen) < 10:
            seen += [batch["name"] for batch in loader(sampler, 0)]
        assert seen == expected


def test_a_batch_that_no_shape_fills_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the most common one has 6"):
        EqualShapes(LatentDataset(folder), 7)
    with pytest.raises(ValueError, match="has no manifest"):
        LatentDataset(tmp_path)


def test_the_example_trains_a_denoiser(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On three clips it learns more than the mean, which is 0."""
    page = (ROOT / "docs" / "datasets.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code.splitlines()) <= 20
    code = code.replace('"latents/"', repr(str(folder))).replace("num_workers=4", "num_workers=0")
    exec(compile(code, "datasets.md", "exec"), {})
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


# Layouts of other trainers -----------------------------------------------------------------------


def test_musubi_tuner_finds_its_cache(folder: Path, tmp_path: Path) -> None:
    """As its `VideoDataset.prepare_for_training` and `BucketBatchManager` do."""
    assert export_musubi(folder, tmp_path, "hv") == 11
    items, dataset = {}, LatentDataset(folder, dtype=torch.bfloat16)
    for cache_file in glob.glob(os.path.join(tmp_path, "*_hv.safetensors")):
        tokens = os.path.basename(cache_file).split("_")
        width, height = map(int, tokens[-2].split("x"))
        frame_pos, frame_count = map(int, tokens[-3].split("-")[:2])
        items["_".join(tokens[:-3])] = (width, height, frame_pos, frame_count, cache_file)
    assert set(items) == {f"v_{index}" for index in range(11)}
    by_name = {Path(dataset[index]["name"]).stem: dataset[index] for index in range(11)}
    for name, (width, height, frame_pos, frame_count, cache_file) in items.items():
        [(key, latents)] = load_file(cache_file).items()
        content, size, dtype = key.rsplit("_", 2)
        assert content == "latents" and dtype == "bfloat16" == str(latents.dtype)[6:]
        assert tuple(map(int, size.split("x"))) == latents.shape[1:]
        assert latents.equal(by_name[name]["latents"]) and frame_pos == 0
        with safe_open(cache_file, "pt") as file:
            told = file.metadata()
        assert told == {"architecture": "hunyuan_video", "format_version": "1.0.1",
                        "width": str(width), "height": str(height),
                        "frame_count": str(frame_count)}  # fmt: skip
    with pytest.raises(ValueError, match="must be one of wan, hv"):
        export_musubi(folder, tmp_path, "svd")


def test_cogvideo_finds_its_cache(folder: Path, tmp_path: Path) -> None:
    """As its `BaseT2VDataset` does."""
    with pytest.raises(ValueError, match=r"3x32x32 \(6 clips\)"):
        export_cogvideo(folder, tmp_path)
    assert not list(tmp_path.iterdir())
    assert export_cogvideo(folder, tmp_path, "cogvideox-t2v", resolution="5x32x48") == 4
    prompts, videos = (
        (tmp_path / f"{name}.txt").read_text().splitlines() for name in ("prompts", "videos")
    )
    assert len(prompts) == len(videos) == 4
    dataset = LatentDataset(folder, dtype=torch.bfloat16)
    by_caption = {dataset[index]["caption"]: dataset[index]["latents"] for index in range(11)}
    for prompt, line in zip(prompts, videos, strict=True):
        video = tmp_path / line
        assert video.is_file()
        latent_dir = tmp_path / "cache" / "video_latent" / "cogvideox-t2v" / "5x32x48"
        encoded = load_file(latent_dir / (video.stem + ".safetensors"))["encoded_video"]
        assert encoded.equal(by_caption[prompt]) and encoded.shape == (4, 5, 16, 24)


def test_names_of_other_layouts_do_not_collide(tmp_path: Path, model: TemporalVAE) -> None:
    source = tmp_path / "src"
    for place in ("a", "b"):
        (source / place).mkdir(parents=True)
        write(source / place / "same.mkv", noise(6, 32, 32))
    write(source / "other.mkv", noise(6, 32, 32))
    run(source, tmp_path / "out", model, cut=3)
    assert export_musubi(tmp_path / "out", tmp_path / "m") == 6
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        f"{name}_{part}_0032x0032_wan.safetensors"
        for name in ("a%2Fsame.mkv", "b%2Fsame.mkv", "other") for part in ("00000-003", "00003-003")
    ]  # fmt: skip
    assert export_cogvideo(tmp_path / "out", tmp_path / "c") == 6
    assert len(set((tmp_path / "c" / "videos.txt").read_text().splitlines())) == 6


def test_parts_of_a_video_do_not_collide_in_other_layouts(
    model: TemporalVAE, tmp_path: Path
) -> None:
    write(tmp_path / "a.mkv", smooth(6, 32, 32))
    (tmp_path / "list.csv").write_text("path,start,frames\na.mkv,0,2\na.mkv,0.08,2\n")
    out = tmp_path / "out"
    run(tmp_path / "list.csv", out, model)
    assert export_musubi(out, tmp_path / "musubi") == 2
    assert len(list((tmp_path / "musubi").glob("*.safetensors"))) == 2
    assert export_cogvideo(out, tmp_path / "cog") == 2
    assert len(list((tmp_path / "cog").rglob("*.safetensors"))) == 2
    assert len(set((tmp_path / "cog" / "videos.txt").read_text().split())) == 2
    with pytest.raises(ValueError, match="resolution='3x8x8'"):
        export_cogvideo(out, tmp_path / "cog", resolution="3x8x8")


def test_an_order_is_kept_before_the_first_batch(folder: Path) -> None:
    batches = EqualShapes(LatentDataset(folder), 1)
    assert batches.state_dict(0) == {"epoch": 0, "batches": 0}
    order = list(batches)
    other = EqualShapes(LatentDataset(folder), 1)
    other.load_state_dict({"epoch": 0, "batches": 0})
    assert other.state_dict(0) == {"epoch": 0, "batches": 0}
    assert list(other) == order
    assert other.state_dict(1) == {"epoch": 0, "batches": 1}
