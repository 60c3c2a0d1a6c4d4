"""The processes of a sharded walk, and what they exchange.

Everything goes through `torch.distributed`, by whatever backend has an all-to-all of unequal parts:
gloo and NCCL have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore

from temporal_vae.network.kernels.norm import Moments

_Gloo: Any = getattr(dist, "ProcessGroupGloo", None)
"""None where torch was built without it."""
_connections: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Of groups of processes, connections for walks alone."""
_made = 0
"""How many of these there have been, of any group."""


@dataclass
class Group:
    """The processes that walk together, and this one's place among them."""

    handle: Any = None
    """Of `torch.distributed`; None for all processes."""
    sent: int = 0
    """Bytes that this process has sent to others."""

    @cached_property
    def rank(self) -> int:
        """The place of this process."""
        return int(_of(self.handle).rank())

    @cached_property
    def size(self) -> int:
        """How many processes there are."""
        return int(_of(self.handle).size())

    def exchange(self, parts: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
        """Send a part to each process; what came from each, flat, of so many numbers."""
        flat = torch.cat([part.reshape(-1) for part in parts])
        out = flat.new_empty(sum(numbers))
        size = flat.element_size()
        splits = [n * size for n in numbers], [part.numel() * size for part in parts]
        sent, received = flat.view(torch.uint8), out.view(torch.uint8)  # which every backend knows
        with self._told():
            _of(self.handle).alltoall_base(received, sent, *splits).wait()
        self.sent += sum(splits[1]) - splits[1][self.rank]
        return list(out.split(list(numbers)))

    def of_all(self, value: Tensor) -> list[Tensor]:
        """A tensor of each process, all of one shape."""
        found = [torch.empty_like(value) for _ in range(self.size)]
        with self._told():
            _of(self.handle).allgather([found], [value.contiguous()]).wait()
        return found

    @contextmanager
    def apart(self, x: Tensor) -> Iterator[Group]:
        """These processes for one walk of x: an error in one of them ends it in all.

        Over gloo they speak on connections of their own, which the process closes that has an
        error: the others, who wait for it, are told at once, and can go on to another walk.
        """
        parent = _of(self.handle)
        has_store = hasattr(parent, "get_group_store")  # as it has in newer releases of torch
        if not (_Gloo and has_store and isinstance(parent._get_backend(x.device), _Gloo)):
            yield self
            return
        group = Group(_connected(self, parent))
        try:
            yield group
            group.of_all(torch.zeros(1))  # all have come to the end
        except BaseException:
            del _connections[parent]
            # connections close when nobody refers to them, and the error's traceback has `group`
            group.handle = None
            raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say what it means when the others do not answer."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size} could not exchange with the others: one of "
                "them has ended or had an error, or did not answer in time; what it printed last "
                "says why"
            ) from error

    def joined(self, moments: Moments | None, norm: nn.Module, like: Tensor) -> Moments:
        """Moments of what all processes have from those of what each has, if it has anything."""
        groups = cast(int, norm.num_groups)
        mean = variance = torch.zeros(1, groups, dtype=torch.float64, device=like.device)
        count = 0
        if moments is not None:
            count, mean, variance = moments.count, moments.mean, moments.variance
        counts = torch.full_like(mean, count)  # a whole number, exact in float64
        everyone = self.of_all(torch.stack([counts, mean, variance]))
        found = [Moments(int(c[0, 0]), m, v) for c, m, v in everyone]
        return Moments.join([each for each in found if each.count])


def _of(handle: Any) -> Any:
    """What processes speak through."""
    if handle is None and not dist.is_initialized():
        raise ValueError(
            "there are no processes yet: call torch.distributed.init_process_group(), in a program "
            "that torchrun starts"
        )
    if handle == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process does not belong to the group that was given")
    return dist.group.WORLD if handle is None else handle


def _connected(group: Group, parent: Any) -> Any:
    """Connections of all processes: made once, and again by all after an error in one of them."""
    global _made
    here = torch.tensor([_made, int(parent in _connections)])
    made, there = torch.stack(group.of_all(here)).unbind(1)
    if not there.all():
        _made = int(made.max()) + 1  # under a name that none of them has had
        store = PrefixStore(f"temporal_vae/{_made}", parent.get_group_store())
        seconds = parent._get_backend(torch.device("cpu")).options._timeout
        with group._told():
            _connections[parent] = _Gloo(store, group.rank, group.size, timeout=seconds)
    return _connections[parent]
