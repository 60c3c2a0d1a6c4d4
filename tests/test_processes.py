"""Across processes: what is sent, what is shared by a fork, what is sharded."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import awake, difference, pixels
from test_video import write
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from temporal_vae import LatentFile, LatentFileError, to_diffusers, write_latents
from temporal_vae.latents import LatentWriter
from temporal_vae.video import VideoError, VideoReader, VideoWriter

FRAMES = 200


def numbered(path: Path) -> Path:
    """A file of latents whose frames hold their number."""
    z = torch.arange(FRAMES).float().view(1, 1, FRAMES, 1, 1).expand(1, 4, -1, 8, 8).contiguous()
    write_latents(path, z, awake(torch.float32).latent_record("x"))
    return path


def answer(things: dict[str, Any], queue: Any) -> None:
    """In the child: what the things give."""
    torch.set_num_threads(1)
    model = things["model"]
    with torch.no_grad():
        drawn = model.encode(pixels())  # by its generator
        queue.put((
            drawn.numpy(), model.decode(drawn).numpy(),
            things["drop-in"].decode(drawn[0].transpose(0, 1), num_frames=5).sample.numpy(),
            things["file"].read(7, 2).numpy(),
        ))  # fmt: skip


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_models_and_files_go_to_another_process(method: str, tmp_path: Path) -> None:
    model = awake()
    file = LatentFile(numbered(tmp_path / "z.safetensors"))
    things = {"model": model, "drop-in": to_diffusers(model), "file": file}
    context = mp.get_context(method)
    queue = context.Queue()
    child = context.Process(  # type: ignore[attr-defined]
        target=answer, args=(things, queue)
    )
    child.start()
    drawn, decoded, frames, read = map(torch.from_numpy, queue.get(timeout=120))
    child.join()
    with torch.no_grad():
        expected = model.encode(pixels())
        assert torch.equal(drawn, expected)
        assert difference(decoded, model.decode(expected)) < 1e-10
        assert difference(frames, model.decode(expected)[0].transpose(0, 1)) < 1e-10
    with file:
        assert torch.equal(read, file.read(7, 2))


def test_a_copy_of_a_file_is_the_same_file_or_an_error(tmp_path: Path) -> None:
    path = numbered(tmp_path / "z.safetensors")
    with LatentFile(path) as file:
        sent = pickle.dumps(file)
        with pickle.loads(sent) as other:
            assert torch.equal(other.read(3, 1), file.read(3, 1))
        zeros, record = torch.zeros(1, 4, 9, 8, 8), awake(torch.float32).latent_record("x")
        write_latents(path, zeros, record, overwrite=True)
        with pytest.raises(LatentFileError, match="not the file any more"):
            pickle.loads(sent)
        assert file.read(3, 1).max() == 3  # which is open still


class Numbered(Dataset[tuple[int, float, float]]):
    def __init__(self, path: Path):
        self.file = LatentFile(path)

    def __len__(self) -> int:
        return FRAMES

    def __getitem__(self, index: int) -> tuple[int, float, float]:
        z: Tensor = self.file.read(index, 1)
        return index, z.min().item(), z.max().item()


def test_forked_workers_read_the_frames_they_ask_for(tmp_path: Path) -> None:
    data = Numbered(numbered(tmp_path / "z.safetensors"))
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    with data.file:
        found = list(loader)
    assert len(found) == FRAMES and all(index == low == high for index, low, high in found)


# Videos --------------------------------------------------------------------------------------


def levels(reader: VideoReader) -> list[int]:
    """The grey of each frame."""
    return [int(frame.image.mean()) for frame in reader]


def forked(work: Callable[[], object]) -> object:
    """What some work gives, or raises, in a forked process."""
    context = mp.get_context("fork")
    queue = context.Queue()

    def run() -> None:
        try:
            queue.put(work())
        except Exception as error:
            queue.put(f"{type(error).__name__}: {error}")

    child = context.Process(target=run)
    child.start()
    try:
        return queue.get(timeout=60)
    finally:
        child.kill()
        child.join()


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """Sixty frames, each brighter than the last."""
    frames = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1) * 4
    return write(tmp_path / "grey.mkv", np.broadcast_to(frames, (60, 48, 64, 3)).copy())


def test_a_reader_that_has_not_begun_is_opened_again_elsewhere(grey: Path) -> None:
    def read(close: bool) -> int:  # which leaves decoders with threads to the garbage collector
        before = VideoReader(grey)
        frames = len(levels(before))
        if close:
            before.close()
        return frames

    gc.collect()
    gc.disable()
    try:
        for close in (True, False):
            assert read(close) == 60
            assert forked(lambda: gc.collect() * 0) == 0
    finally:
        gc.enable()
    with VideoReader(grey, start=0.4, stride=2, width=32) as reader:
        with pickle.loads(pickle.dumps(reader)) as other:
            there = levels(other)
        assert len(there) == 25 and forked(lambda: levels(reader)) == there
        assert levels(reader) == there  # nobody has moved its place in the file


def test_a_reader_that_has_begun_is_refused_elsewhere(grey: Path) -> None:
    with VideoReader(grey) as reader:
        frames = iter(reader)
        next(frames)
        with pytest.raises(VideoError, match="open it in the process"):
            pickle.dumps(reader)
        assert "cannot be read on in a forked process" in str(forked(lambda: next(frames)))
        assert forked(reader.close) is None  # which waits for no thread
        assert len(list(frames)) == 59


def test_writers_stay_where_they_are(tmp_path: Path) -> None:
    model = awake(torch.float32)
    path = numbered(tmp_path / "z.safetensors")
    with (
        LatentFile(path) as file,
        LatentWriter(tmp_path / "other", file.info) as latents,
        pytest.raises(TypeError, match="written by one process"),
    ):
        pickle.dumps(latents)
    with VideoWriter(tmp_path / "a.mkv", 16, 16, Fraction(25)) as video:
        with pytest.raises(TypeError, match="written by one process"):
            pickle.dumps(video)
        video.write(np.zeros((16, 16, 3), np.uint8), 0)
    assert pickle.loads(pickle.dumps(model.decode_stream().state)) == ()


# Models in parts -----------------------------------------------------------------------------

SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from conftest import awake, difference, pixels
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
torch.set_num_threads(1)
x = pixels()
def gradients(model):
    y = model(x, sample_posterior=False)[0]
    y.square().mean().backward()
    return y, [getattr(p.grad, "full_tensor", lambda: p.grad)() for p in model.parameters()]
expected, theirs = gradients(awake())
vae = awake()
for block in (*vae.encoder.down_blocks, *vae.decoder.up_blocks):
    fully_shard(block)
fully_shard(vae)
for model in (vae, DistributedDataParallel(awake(), find_unused_parameters=True)):
    found, ours = gradients(model)
    assert difference(found, expected) < 1e-10
    # ours are in another order only if the lists differ in length
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
try:
    with torch.no_grad():
        z = torch.zeros(1, 4, 3, 4, 6).double()
        vae.decode(z, plan=awake().plan(z.shape, budget="least"))
except ValueError as error:
    assert "walked whole" in str(error), error
else:
    raise AssertionError("sharded weights walked in pieces")
dist.destroy_process_group()
"""


def test_sharded_by_blocks_and_data_parallel(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SHARDED, Path(__file__).parent, tmp_path / "store"]
    said = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
