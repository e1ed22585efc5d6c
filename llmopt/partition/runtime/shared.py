"""Sums over processes of one machine through memory that they share.

What a process has goes into a place of its own and a counter says so; who sees all counters there adds up all places,
in one order, so that everybody has the same bits. Nobody sleeps meanwhile: peers come soon, and a core that slept takes
longer to wake than the sum takes. There are two places by turns: who is at the next message has seen everyone arrive at
this one, so that all are done with the one before.

A counter must not be seen before what it counts. x86 keeps stores in order (Intel SDM, volume 3, 9.2.2); elsewhere, on
several machines, and where there is no memory to share, `shared_places` gives None.
"""

import mmap
import os
import platform
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

FOLDER = Path("/dev/shm")  # noqa: S108 (what is there is unlinked as soon as all have it)
_ORDERED = ("x86_64", "AMD64")
_PLACE_BYTES = 1 << 20
_COUNTER_BYTES = 64  # a cache line for each
_PATIENCE = 2_000, 20_000  # looks before giving way to others on this core, and before sleeping
_NAP_S = 5e-5

Combine = Callable[..., Tensor]  # like torch.add, with `out`


class SharedPlaces:
    """The memory, as one of its processes has it: `index` of `count`."""

    def __init__(self, memory: mmap.mmap, index: int, count: int) -> None:
        self._memory, self._index = memory, index
        view = memoryview(memory)
        self._counters = view[: count * _COUNTER_BYTES].cast("q")[:: _COUNTER_BYTES // 8]
        places = torch.frombuffer(memory, dtype=torch.uint8, offset=count * _COUNTER_BYTES)
        self._places = places.view(2, count, _PLACE_BYTES)
        self._message = 0

    def combine(self, values: Tensor, by: Combine = torch.add) -> None:
        """Put the sum of what all have, or what else `by` makes of two, in the place of contiguous values."""
        for part in torch.split(values.view(-1), _PLACE_BYTES // values.element_size()):
            self._combine(part, by)

    def _combine(self, values: Tensor, by: Combine) -> None:
        self._message += 1
        places = [place[: values.nbytes].view(values.dtype) for place in self._places[self._message % 2]]
        places[self._index].copy_(values)
        self._counters[self._index] = self._message
        for other, place in enumerate(places):
            self._await(other)
            if other == 0:
                values.copy_(place)
            else:
                by(values, place, out=values)

    def _await(self, other: int) -> None:
        looks = 0
        while self._counters[other] < self._message:
            looks += 1
            if looks > _PATIENCE[1]:
                time.sleep(_NAP_S)
            elif looks > _PATIENCE[0]:
                os.sched_yield()


def shared_places(ranks: Sequence[int], group: dist.ProcessGroup | None) -> SharedPlaces | None:
    """Memory of all ranks of a group, on each of them; None on all where one has no way to it. All call it."""
    index = list(ranks).index(dist.get_rank())
    path = FOLDER / f"llmopt-{secrets.token_hex(8)}"
    named = [str(path)]
    memory = _made(path, len(ranks)) if index == 0 else None
    dist.broadcast_object_list(named, ranks[0], group=group)
    if index:
        memory = _opened(Path(named[0]), len(ranks))
    reached = torch.tensor([memory is not None])
    dist.all_reduce(reached, dist.ReduceOp.MIN, group=group)
    if index == 0:
        path.unlink(missing_ok=True)
    if memory is None or not reached:
        return None
    return SharedPlaces(memory, index, len(ranks))


def _made(path: Path, count: int) -> mmap.mmap | None:
    if platform.machine() not in _ORDERED:
        return None
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(file, 0, _size(count))  # so that no page is missing when it is written
            return mmap.mmap(file, _size(count))
        finally:
            os.close(file)
    except OSError:
        return None


def _opened(path: Path, count: int) -> mmap.mmap | None:
    try:
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), _size(count))
    except (OSError, ValueError):
        return None


def _size(count: int) -> int:
    return count * (_COUNTER_BYTES + 2 * _PLACE_BYTES)
