"""A data set on a cluster of several nodes, each in processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import psutil
import pytest
import torch
from test_dataset import contents, rows, run
from test_video import noise, write

from temporal_vae import TemporalVAE
from temporal_vae.convert import allocator, memory
from temporal_vae.dataset import ray as engine
from temporal_vae.dataset.entries import Entry
from temporal_vae.dataset.messages import packed, unpacked
from temporal_vae.video.sources import Source

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of two nodes."""
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")  # of a busy machine
    ray = pytest.importorskip("ray", reason="ray, of the extra ray, is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(autouse=True)
def as_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Ray's processes have: videos walked as they are outside of tests, and all cores."""
    monkeypatch.setattr(memory, "WHOLE_PIXELS", memory.PIECE_PIXELS)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for index in range(12):
        write(folder / f"{index}.mkv", noise(3 + index % 4, 32, 32))
    (folder / "deep").mkdir()
    write(folder / "deep" / "0.mkv", noise(2, 32, 32))
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def test_a_cluster_gives_the_bytes_of_one_machine(
    videos: Path, model: TemporalVAE, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "WINDOW", 8)  # so that there are two
    options: dict[str, Any] = {"layout": "webdataset", "shard_clips": 5, "cut": 4}
    counts = run(videos, tmp_path / "local", model, **options)
    assert counts["failed"] == 1
    found = run(videos, tmp_path / "ray", model, engine="ray", address=address, encoders=2,
                **options)  # fmt: skip
    assert found == counts
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert rows(tmp_path / "ray") == rows(tmp_path / "local")
    assert run(videos, tmp_path / "ray", model, **options) == counts  # and either goes on


def test_processes_of_the_cluster_that_are_killed_change_nothing(
    videos: Path, model: TemporalVAE, tmp_path: Path, address: str
) -> None:
    run(videos, tmp_path / "local", model)
    killed: list[int] = []

    def kill() -> None:
        """One process that encodes, once it has begun to."""
        while not killed:
            time.sleep(0.02)
            for process in psutil.process_iter(["cmdline"]):
                if "MapWorker" in " ".join(process.info["cmdline"] or []) and process.children():
                    killed.append(process.pid)
                    os.kill(process.pid, signal.SIGKILL)
                    return

    threading.Thread(target=kill, daemon=True).start()
    run(videos, tmp_path / "ray", model, engine="ray", address=address, encoders=2)
    assert killed and contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert rows(tmp_path / "ray") == rows(tmp_path / "local")


def test_a_folder_that_cannot_be_written_ends_the_run(
    videos: Path, model: TemporalVAE, tmp_path: Path, address: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deep").touch()  # where a folder is needed
    with pytest.raises(OSError, match="deep"):
        run(videos, tmp_path / "out", model, engine="ray", address=address)


def test_calls_after_the_failure_of_a_process_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may hand it more videos before the run ends: none may wait for ever."""
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    settled: list[Any] = []
    monkeypatch.setattr(allocator, "settle", settled.append)

    class Broken:
        todo: SimpleQueue[Any] = SimpleQueue()

        def start(self) -> None: ...

        def next(self) -> Iterator[Any]:
            self.todo.get()
            raise OSError("no space left on device")

    threads = torch.get_num_threads()
    try:
        worker = engine.Worker(cast(Any, Broken), 2, "1GiB")
        assert torch.get_num_threads() == 3, "two processes share six cores"
        assert settled == ["1GiB"]
    finally:
        torch.set_num_threads(threads)
    found: list[str] = []

    def call(number: int) -> None:
        entry = Entry(number, f"{number}", Source("a.mp4"))
        came = worker({"job": [packed((entry, []))]})["came"][0]
        found.append(str(unpacked(came)[1][0]))

    for number in range(2):
        thread = threading.Thread(target=call, args=(number,), daemon=True)
        thread.start()
        thread.join(20)
    assert found == ["no space left on device"] * 2
