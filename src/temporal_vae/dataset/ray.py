"""The engine of a cluster: Ray Data hands videos to processes that encode.

Ray schedules, restarts and balances. Each of its processes is the engine of one machine, which
decodes ahead and writes its files itself: so the machines of a cluster see SRC and OUT under the
same paths. Rows come back to the one process that keeps the state.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from typing import Any

from temporal_vae.convert import allocator
from temporal_vae.dataset.entries import Entry
from temporal_vae.dataset.local import Events, Job, Pipeline, Row
from temporal_vae.dataset.messages import packed, unpacked
from temporal_vae.walks.budget import Budget

WINDOW = 8192
"""Videos that Ray is given at a time, so that no list of all of them is in memory."""

Batch = dict[str, Any]
"""Columns of a data set of Ray: each of its rows is a video, or what came of one."""


class Worker:
    """A process of the cluster. Ray calls it in several threads, with a video each."""

    def __init__(self, make: Callable[[], Pipeline], share: int, memory: Budget):
        """`share`: how many such processes are on a machine, which all want its cores."""
        import torch

        allocator.settle(memory)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // share))  # Ray sets one for each
        self._pipeline = make()
        self._came: dict[int, SimpleQueue[Row | OSError | None]] = {}
        self._failed: OSError | None = None
        self._pipeline.start()
        threading.Thread(target=self._sort, daemon=True).start()

    def _sort(self) -> None:
        """Hand what comes to the call that waits for it."""
        try:
            while True:
                for entry, row in self._pipeline.next():
                    self._came[entry.number].put(row)
        except Exception as error:  # each call ends, and says why; also those to come
            self._failed = OSError(str(error))
            for queue in list(self._came.values()):
                queue.put(self._failed)

    def __call__(self, batch: Batch) -> Batch:
        """All that comes of a video: rows, or an error that ends the run."""
        [job] = map(unpacked, batch["job"])
        entry: Entry = job[0]
        came = self._came.setdefault(entry.number, SimpleQueue())
        self._pipeline.todo.put(job)
        if self._failed is not None:
            came.put(self._failed)
        rows: list[Row | OSError] = []
        while (row := came.get()) is not None:
            rows.append(row)
            if isinstance(row, OSError):
                break
        del self._came[entry.number]
        return {"came": [packed((entry, rows))]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where videos are encoded."""

    address: str | None
    """None for a cluster on this machine alone."""
    processes: int
    """That encode, with a GPU each if `gpu` says so."""
    gpu: bool
    ahead: int
    """Videos that each of them has under way."""
    memory: Budget = None
    """What encoding may take."""

    def run(self, jobs: Iterable[Job], make: Callable[[], Pipeline]) -> Events:
        """Events of all jobs, in the order in which they come; see `Pipeline.run`."""
        import ray

        begun = not ray.is_initialized()
        if begun:
            # a cluster of this machine alone needs no dashboard, which takes a core a while
            shown = {} if self.address else {"include_dashboard": False}
            ray.init(
                address=self.address, log_to_driver=False, logging_level=logging.ERROR, **shown
            )
        try:
            jobs = iter(jobs)
            while window := list(islice(jobs, WINDOW)):
                for entry, rows in self._came(window, make):
                    for row in rows:
                        if isinstance(row, OSError):
                            raise row
                        yield entry, row
                    yield entry, None
        finally:
            if begun:
                ray.shutdown()

    def _came(
        self, window: list[Job], make: Callable[[], Pipeline]
    ) -> Iterator[tuple[Entry, list[Row | OSError]]]:
        """Videos, and what came of each, as soon as it did."""
        from ray import data, nodes

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        data.DataContext.get_current().enable_progress_bars = False
        machines = sum(node["Alive"] and "CPU" in node["Resources"] for node in nodes())
        share = math.ceil(self.processes / max(1, machines))
        items = [{"job": packed(job)} for job in window]
        done = data.from_items(items, override_num_blocks=len(items)).map_batches(
            Worker, batch_size=1, fn_constructor_args=(make, share, self.memory),
            compute=data.ActorPoolStrategy(
                size=self.processes, max_tasks_in_flight_per_actor=2 * self.ahead,
                max_concurrent_calls_per_actor=self.ahead, enable_true_multi_threading=True,
            ),
            **({"num_gpus": 1} if self.gpu else {"num_cpus": 1}),
        )  # fmt: skip
        for row in done.iter_rows():
            yield unpacked(row["came"])
