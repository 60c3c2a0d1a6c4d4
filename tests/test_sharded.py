"""Several processes that walk one clip: the numbers of one, and errors that all of them hear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import awake
from sharded_worker import CASES, awake_wan

from temporal_vae import Plan

PROCESSES = 3
Results = list[dict[str, Any]]


def start(script: str, folder: Path, rank: int, size: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    here = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", here / script, folder, str(rank), str(size)],
        cwd=here, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process found; all cases in one start, which takes longer than they do."""
    folder = tmp_path_factory.mktemp("sharded")
    running = [start("sharded_worker.py", folder, rank, PROCESSES) for rank in range(PROCESSES)]
    said = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, "\n".join(said)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert all("failed" not in each for each in found), "\n".join(
        str(each.get("failed")) for each in found
    )
    return found


@pytest.mark.parametrize("name", CASES)
def test_processes_together_give_the_numbers_of_one(name: str, results: Results) -> None:
    for case, (decoded, mean, log_variance) in zip(CASES[name], results[0][name], strict=True):
        assert max(decoded, mean, log_variance) < 1e-10, case


def test_float32_and_bfloat16_go_between_processes_as_they_are(results: Results) -> None:
    assert max(results[0]["float32"]) < 1e-4
    assert max(results[0]["bfloat16"]) < 0.2


def test_no_more_is_sent_than_pixels_for_frames_and_back(results: Results) -> None:
    for each in results:
        sent, least = each["sent"]
        assert 0.9 * least < sent < 1.1 * least  # pixels do not always share out evenly


def test_no_process_has_more_than_its_plan(results: Results) -> None:
    for of_process in results:
        for name, share in of_process["held"].items():
            assert 0.2 < share <= 1, name


def test_what_one_process_cannot_do_is_said_in_all(results: Results) -> None:
    said = [each["refusals"] for each in results]
    for each in said:
        assert "parts of different clips" in each["other clips"]
        assert "parts of different clips" in each["numbers"]
        assert "too few for 3 processes" in each["nothing"]
        assert "needs at least one of the frames" in each["empty"]
        assert "requires_grad_(False)" in each["gradients"]
    assert "torch.float32 on cpu, the model torch.float64" in said[1]["one wrong"]
    assert "another one cannot walk its part" in said[0]["one wrong"]
    assert "(B, C, T, H, W), got (4, 3, 4, 4)" in said[1]["a frame"]
    assert "another one" in said[0]["a frame"]
    assert "below the least" in said[1]["budget"] and "another one" in said[0]["budget"]


@pytest.mark.parametrize("kind", ["default", "Wan 2.1"])
def test_an_error_in_the_middle_of_a_walk_is_heard_by_all_who_can_go_on(
    kind: str, results: Results
) -> None:
    for rank, each in enumerate(found["recovered"][kind] for found in results):
        assert max(each["seconds"]) < 20, "the timeout of the group is 60 seconds"
        if rank == 1:
            assert each["said"] == ["MemoryError: no more memory", "KeyboardInterrupt: Control-C"]
            continue
        assert [said.partition(":")[0] for said in each["said"]] == ["RuntimeError"] * 2
        assert all("one of them has ended or had an error" in said for said in each["said"])
    assert results[0]["recovered"][kind]["error"] == [0, 0]


def test_a_killed_process_is_an_error_in_the_others_not_a_hang(tmp_path: Path) -> None:
    running = [start("sharded_killed.py", tmp_path, rank, 2) for rank in range(2)]
    deadline = time.monotonic() + 120
    while not (tmp_path / "1.ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running[1].kill()
    said = running[0].communicate(timeout=120)[1].decode()
    running[1].communicate()
    assert running[0].returncode not in (0, None)
    assert "could not exchange with the others: one of them has ended" in said


@pytest.mark.parametrize("name", ["default", "Wan 2.1"])
def test_the_plan_says_what_each_process_takes(name: str) -> None:
    vae = awake(torch.float32, base_channels=16) if name == "default" else awake_wan().float()
    shape = (1, vae.latent_channels, 16, 64, 32)
    axis = 3 if name == "Wan 2.1" else 2
    for budget in (None, "least"):
        peaks = [shared(vae.plan(shape, budget=budget or "1GiB", ranks=n)) for n in (2, 4)]
        assert peaks[1] < peaks[0] * (0.62 if budget is None else 0.75)
    plan = vae.plan(shape, ranks=4)
    assert plan.ranks == 4 and "the largest part of 4" in plan.explain()
    assert plan.shape[axis] == shape[axis] // 4
    with pytest.raises(ValueError, match="too few for 65"):
        vae.plan(shape, ranks=65)
    with pytest.raises(ValueError, match="ranks, the number of processes"):
        vae.plan(shape, ranks=2, stream=True)
    with torch.no_grad(), pytest.raises(ValueError, match="ranks=4"):
        vae.decode(torch.zeros(plan.shape), plan=plan)


def shared(plan: Plan) -> int:
    """Bytes of a plan without those that are there whatever the size."""
    fixed = ("the kernels' own", "gaps")
    return plan.peak_bytes - sum(size for part, size in plan.parts if part in fixed)


def test_a_group_of_one_process_walks_as_one(tmp_path: Path) -> None:
    """As `torchrun --nproc-per-node 1` starts it, with a bound of memory and without."""
    script = tmp_path / "one.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from conftest import awake, difference\n"
        "from temporal_vae import sharded\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, "
        "world_size=1)\n"
        "vae = awake().requires_grad_(False)\n"
        "z, x = torch.randn(1, 4, 3, 2, 2).double(), torch.randn(1, 3, 3, 16, 16).double()\n"
        "for memory in (None, 'least'):\n"
        "    assert difference(sharded.decode(vae, z, memory=memory), vae.decode(z)) < 1e-10\n"
        "    mean = sharded.encode(vae, x, memory=memory).mean\n"
        "    assert difference(mean, vae.encode(x, sample_mode=False)) < 1e-10\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
